"""Waveform ⇄ latents, by a frozen codec. Legend: B batch, N samples, T frames (75 Hz), D latent channels (128)."""

from lib.codec.codec import Codec, load_codec
from lib.codec.encodec import EncodecCodec
from lib.codec.mdct import MdctCodec
