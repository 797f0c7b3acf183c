"""Waveform ⇄ latents, by a frozen codec. Legend: B batch, N samples, T frames (75 Hz), D latent channels (128).

- `codec`: the protocol, and `load_codec`, where a new codec is added
- `mdct`: the embedded default, a fixed transform without weights
- `encodec`: Meta's 24 kHz model along its continuous path, encoder and decoder without the quantiser
"""

from lib.codec.codec import Codec, load_codec
from lib.codec.encodec import EncodecCodec
from lib.codec.mdct import MdctCodec
