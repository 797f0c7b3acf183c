"""Waveform ⇄ latents, by a frozen codec. Legend: B batch, N samples, T frames, D latent channels."""

from lib.codec.codec import Codec, decoded, load_codec
from lib.codec.encodec import EncodecCodec
from lib.codec.mdct import MdctCodec
