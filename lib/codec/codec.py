"""The protocol of every codec, and `load_codec`, which finds a codec of your own by `module:Class`."""

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from lib.audio.decode import resample
from lib.audio.files import SAMPLE_RATE
from lib.codec.encodec import WEIGHTS_FILE, EncodecCodec
from lib.codec.mdct import MdctCodec
from lib.util.configs import check, load_object
from lib.util.errors import UserError


class Codec(Protocol):
    """A codec has whole numbers sample_rate (Hz), channels (1, which may be left out, or 2), hop (samples a frame) and
    dim (latent channels); a fingerprint, hash of what changes latents, in 12 or more hex digits; encode: [B, channels,
    N] → [B, dim, T], T = ceil(N / hop), without a gradient; and decode: latents, length=None → [B, channels, T · hop]
    or its first `length` samples, with a gradient. Latents should have an RMS near 5.7, which the law of the RMS
    assumes."""

    sample_rate: int
    channels: int
    hop: int
    dim: int
    name: str  # by which `load_codec` finds it, and which it gives to a codec of your own
    fingerprint: str

    def encode(self, wav: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor, length: int | None = None) -> Tensor: ...


MdctCodec.channels = 1  # here, as the code of its own file is its fingerprint
CODECS: dict[str, Callable[[], Codec]] = {"mdct": MdctCodec, "encodec": EncodecCodec.from_hub}
CODEC = (
    f"{' or '.join(CODECS)}, a directory of EnCodec's weights ({WEIGHTS_FILE}), or a codec of your own as module:Class"
)


def load_codec(name_or_path: str | Path) -> Codec:
    """`"mdct"`, `"encodec"` (cached or downloaded weights), a directory with EnCodec's weights, or `"module:Class"`: a
    class of your own, which is called without arguments and tried on a second of sound. `UserError` says what fails."""
    name = str(name_or_path)
    if name in CODECS:
        return CODECS[name]()
    if Path(name).is_dir():
        return EncodecCodec.from_directory(name)
    if ":" not in name:
        raise UserError(f"codec {name!r}: unknown; choose {CODEC}")
    make, _ = load_object(name)
    try:
        codec = make()
        codec.name, codec.channels = name, getattr(codec, "channels", 1)
        _try_out(codec)
    except Exception as error:  # of code that is not ours, too
        wanted = " ".join(Codec.__doc__.split())
        raise UserError(f"codec {name!r}: {type(error).__name__}: {error}. {wanted}") from error
    return codec


@torch.enable_grad()
def _try_out(codec: Codec) -> None:
    if isinstance(codec, nn.Module):
        codec.requires_grad_(False).eval()
    sizes = codec.sample_rate, codec.hop, codec.dim, (C := codec.channels)
    check({type(size) for size in sizes} == {int}, "sample_rate, hop, dim, channels", sizes, "whole numbers")
    check(C in (1, 2), "channels", C, "1 or 2")
    check(codec.dim > 2, "dim", codec.dim, "3 or more, so that latents are not taken for sound")
    check(re.fullmatch("[0-9a-f]{12,}", codec.fingerprint), "fingerprint", codec.fingerprint, "12 or more hex digits")
    N, T = codec.sample_rate + 1, codec.sample_rate // codec.hop + 1
    sound = 0.1 * torch.arange(N).sin().repeat(1, C, 1)
    latents, again = codec.encode(sound), codec.encode(sound)
    check(torch.equal(latents, again), "encode", "differing or NaN", "finite latents, the same for the same sound")
    whole, cut = (codec.decode(latents.detach().clone().requires_grad_(), length=length) for length in (None, N))
    found = [(list(x.shape), x.requires_grad) for x in (latents, whole, cut)]
    wanted = [([1, codec.dim, T], False), ([1, C, T * codec.hop], True), ([1, C, N], True)]
    check(found == wanted, f"shapes and gradients of encode, decode and decode with length={N}", found, wanted)


@contextlib.contextmanager
def placed(codec: Codec, device: torch.device) -> Iterator[None]:
    """In which a codec with weights computes on a device; afterwards, on the CPU again."""
    module = codec if isinstance(codec, nn.Module) else nn.Module()
    try:
        module.to(device)
        yield
    finally:
        module.to("cpu")


def decoded(codec: Codec, latents: Tensor) -> Tensor:
    """Latents `[B, D, T]` as mono sound `[B, 1, N]` at 24 kHz, which losses and metrics compare whatever the codec."""
    return resample(codec.decode(latents).mean(1, keepdim=True), codec.sample_rate, SAMPLE_RATE)
