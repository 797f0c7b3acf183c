"""The protocol of every codec, and `load_codec`, which takes a name or a directory of weights."""

from pathlib import Path
from typing import Protocol

from torch import Tensor

from lib.codec.encodec import WEIGHTS_FILE, EncodecCodec
from lib.codec.mdct import MdctCodec
from lib.util.errors import UserError

CODEC_NAMES = ("mdct", "encodec")


class Codec(Protocol):
    """What every codec gives. It is frozen: `encode` carries no gradient, `decode` carries one to the latents."""

    sample_rate: int  # Hz
    hop: int  # samples per frame
    dim: int  # latent channels
    name: str
    fingerprint: str  # hex sha256 of everything that changes latents

    def encode(self, wav: Tensor) -> Tensor:
        """`[B, 1, N]` → `[B, dim, T]`, T = ceil(N / hop): the last frame is padded. `ValueError` for NaN or inf."""

    def decode(self, latents: Tensor, length: int | None = None) -> Tensor:
        """`[B, dim, T]` → `[B, 1, T * hop]`, or the first `length` samples of it."""


def load_codec(name_or_path: str | Path) -> "Codec":
    """`"mdct"`, `"encodec"` (cached or downloaded weights), or a directory that holds EnCodec's weights."""
    if name_or_path == "mdct":
        return MdctCodec()
    if name_or_path == "encodec":
        return EncodecCodec.from_hub()
    if Path(name_or_path).is_dir():
        return EncodecCodec.from_directory(name_or_path)
    raise UserError(
        f"codec {str(name_or_path)!r}: unknown; choose {' or '.join(CODEC_NAMES)}, or the path of a directory "
        f"that holds EnCodec's weights ({WEIGHTS_FILE})"
    )
