"""The protocol of every codec, and `load_codec`. A new codec is a class that implements it, and a name in `CODECS`."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from torch import Tensor

from lib.codec.encodec import WEIGHTS_FILE, EncodecCodec
from lib.codec.mdct import MdctCodec
from lib.util.errors import UserError


class Codec(Protocol):
    """What every codec offers. It is frozen: `encode` carries no gradient, `decode` carries one to the latents."""

    sample_rate: int  # Hz: 24,000, at which the pairs are cut
    hop: int  # samples per frame: 320, on which losses and metrics count
    dim: int  # latent channels: 128 in the presets' model
    name: str
    fingerprint: str  # hex sha256 of everything that changes latents

    def encode(self, wav: Tensor) -> Tensor:
        """`[B, 1, N]` → `[B, dim, T]`, T = ceil(N / hop): the last frame is padded. `ValueError` for NaN or inf."""

    def decode(self, latents: Tensor, length: int | None = None) -> Tensor:
        """`[B, dim, T]` → `[B, 1, T * hop]`, or the first `length` samples of it."""


CODECS: dict[str, Callable[[], Codec]] = {"mdct": MdctCodec, "encodec": EncodecCodec.from_hub}


def load_codec(name_or_path: str | Path) -> Codec:
    """`"mdct"`, `"encodec"` (cached or downloaded weights), or a directory with EnCodec's weights."""
    if name_or_path in CODECS:
        return CODECS[str(name_or_path)]()
    if Path(name_or_path).is_dir():
        return EncodecCodec.from_directory(name_or_path)
    fix = f"choose {' or '.join(CODECS)}, or the path of a directory that holds EnCodec's weights ({WEIGHTS_FILE})"
    raise UserError(f"codec {str(name_or_path)!r}: unknown; {fix}")
