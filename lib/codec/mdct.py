"""The embedded codec: a fixed lapped transform without weights. Legend as in `lib.codec`; H hop (320 samples)."""

import math

import torch
from torch import Tensor, nn

from lib.util.provenance import code_fingerprint
from lib.util.tensors import cached_table, torch_threads

SAMPLE_RATE, HOP, DIM = 24_000, 320, 128
BAND = 4_500.0  # Hz, reconstructed to over 60 dB; the 128 bins reach up to 4800 Hz
KAISER_ALPHA = 4.0  # 88 dB of rejection in the band, where the sine window has 62 dB
ROOT = 3  # latents are cube roots: kurtosis 5 on the demo music instead of 60, and the inverse is smooth at zero
GAIN = 14.5  # brings the demo music to RMS 5.7, the level of EnCodec's latents
ROLL_OFF = 80.0 / 300.0  # dB per Hz above the band, in the sound for which the clip's edges are optimal
FLOOR = -120.0  # dB
CONTEXT = 480  # samples from which the padding is predicted
PADDING_NOISE = 1e-2  # white noise assumed in it: less reconstructs better, more avoids clicks in the padding
MAX_COEFFICIENT = 1e4  # a full-scale waveform stays below sqrt(640) = 25; decode clamps here to stay finite


class MdctCodec(nn.Module):
    """The 128 lowest of 320 lapped cosine bins (0 to 4.8 kHz), companded by a power law for light tails.

    A TDAC transform (Princen, Johnson, Bradley 1987): butterflies across the T - 1 inner block boundaries and an
    orthonormal DCT-IV of each block. It has exactly T frames for T·H samples, where the usual form has T + 1. The
    first and the last block have one edge without a neighbour, where a cosine series would distort the waveform and
    lose 30 dB. Their functions are the orthonormal ones that best capture band-limited sound, rotated towards the
    cosines. It computes on the device of its input, in float64 for float64 and in float32 otherwise.
    """

    sample_rate, hop, dim, name = SAMPLE_RATE, HOP, DIM, "mdct"

    @property
    def fingerprint(self) -> str:
        """Hash of this code, not of packages, so that a run can be used with another build of torch."""
        return code_fingerprint("lib.codec.mdct", packages=False)

    @torch.no_grad()
    def encode(self, wav: Tensor) -> Tensor:
        """`[B, 1, N]` → `[B, 128, T]`. The padding of the last frame continues the sound, to avoid an abrupt end."""
        wav = checked(wav, channels=1)
        with torch.autocast(wav.device.type, enabled=False):
            blocks = _continue(wav[:, 0]).unflatten(1, (-1, HOP))  # [B, T, H]
            coefficients = _transform(_butterfly(blocks), inverse=False)  # [B, T, D]
        latents = GAIN * coefficients.sign() * coefficients.abs().pow(1 / ROOT)
        if not torch.isfinite(latents).all():
            raise ValueError("wav holds NaN or infinite samples, or overflows its dtype; check the audio on loading")
        return latents.transpose(1, 2)

    def decode(self, latents: Tensor, length: int | None = None) -> Tensor:
        """`[B, 128, T]` → `[B, 1, T·320]` or `[B, 1, length]`. Finite for finite latents: see `MAX_COEFFICIENT`."""
        latents = checked(latents, channels=DIM)
        bound = GAIN * MAX_COEFFICIENT ** (1 / ROOT)
        coefficients = (latents.clamp(-bound, bound).transpose(1, 2) / GAIN).pow(ROOT)
        with torch.autocast(latents.device.type, enabled=False):
            blocks = _butterfly(_transform(coefficients, inverse=True), inverse=True)
        return trimmed(blocks.flatten(1).unsqueeze(1), length)


def checked(x: Tensor, channels: int) -> Tensor:
    if x.ndim != 3 or x.shape[1] != channels or x.shape[2] < 1:
        raise ValueError(f"expected [B, {channels}, at least 1], got {list(x.shape)}")
    return x if x.dtype == torch.float64 else x.float()


def trimmed(wav: Tensor, length: int | None) -> Tensor:
    if length is not None and not 0 < length <= wav.shape[-1]:
        raise ValueError(f"length {length}: the latents hold 1 to {wav.shape[-1]} samples")
    return wav[..., :length]


def _butterfly(blocks: Tensor, inverse: bool = False) -> Tensor:
    return _rotate(blocks, _tables(blocks.device, blocks.dtype)["window"], inverse)


def _rotate(blocks: Tensor, window: Tensor, inverse: bool = False) -> Tensor:
    """Rotate each pair of samples mirrored at an inner boundary: even towards the right block, odd towards the left."""
    half = HOP // 2
    cos, sin = window[half:], window[:half].flip(0)  # cos² + sin² = 1
    sin = -sin if inverse else sin
    left, right = blocks[:, :-1, half:].flip(-1), blocks[:, 1:, :half]
    rotated = blocks.clone()
    rotated[:, 1:, :half] = cos * right + sin * left
    rotated[:, :-1, half:] = (cos * left - sin * right).flip(-1)
    return rotated


def _transform(x: Tensor, inverse: bool) -> Tensor:
    """Blocks `[B, T, H]` → coefficients `[B, T, D]`, or back; orthonormal, so the inverse is the transpose."""
    tables = _tables(x.device, x.dtype)
    parts = {"single": x} if x.shape[1] == 1 else {"first": x[:, :1], "inner": x[:, 1:-1], "last": x[:, -1:]}
    return torch.cat([part @ (tables[key] if inverse else tables[key].T) for key, part in parts.items()], dim=1)


def _continue(wav: Tensor) -> Tensor:
    """Pad `[B, N]` to whole frames by linear prediction of band-limited sound; an abrupt end would lose 30 dB there."""
    padding, known = -wav.shape[-1] % HOP, min(wav.shape[-1], CONTEXT)
    if not padding:
        return wav
    weights = _prediction(known, padding).to(wav)
    return torch.cat([wav, wav[:, -known:] @ weights], dim=1)


@cached_table
def _tables(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: table.to(device, dtype) for key, table in _design().items()}


@cached_table
@torch_threads(1)
def _design() -> dict[str, Tensor]:
    """The window's rising half `[H]` and the functions `[D, H]` of each kind of block (inner: DCT-IV), in float64."""
    kaiser = torch.kaiser_window(HOP + 1, periodic=False, beta=math.pi * KAISER_ALPHA, dtype=torch.float64)
    window = (kaiser.cumsum(0)[:-1] / kaiser.sum()).sqrt()
    k, n = torch.arange(DIM, dtype=torch.float64)[:, None], torch.arange(HOP, dtype=torch.float64) + 0.5
    cosines = math.sqrt(2 / HOP) * torch.cos(math.pi / HOP * (k + 0.5) * n)  # even to the left, odd to the right

    eye = torch.eye(2 * HOP, dtype=torch.float64)
    fold = _rotate(eye.unflatten(1, (2, HOP)), window)  # [2H, 2, H]: sample → place in two neighbours
    return {
        "window": window,
        "inner": cosines,
        "first": _edge_functions(fold[:, 0], cosines),
        "last": _edge_functions(fold[:, 1], cosines),
        "single": _edge_functions(eye[:HOP, :HOP], cosines),
    }


def _edge_functions(fold: Tensor, cosines: Tensor) -> Tensor:
    """`[D, H]`: eigenvectors of most energy for band-limited sound (Slepian), rotated to the cosines (Procrustes)."""
    covariance = fold.T @ _autocovariance(fold.shape[0]) @ fold
    subspace = torch.linalg.eigh(covariance).eigenvectors[:, -DIM:]  # [H, D]
    u, _, vh = torch.linalg.svd(cosines @ subspace)
    return u @ vh @ subspace.T


@cached_table
def _prediction(known: int, padding: int) -> Tensor:
    """`[known, padding]`: weights of the optimal linear prediction of the samples that follow (Wiener)."""
    covariance = _autocovariance(known + padding)
    noise = PADDING_NOISE * torch.eye(known, dtype=torch.float64)
    return torch.linalg.solve(covariance[:known, :known] + noise, covariance[:known, known:])


def _autocovariance(size: int) -> Tensor:
    """`[size, size]` of unit-power sound with a flat spectrum up to `BAND` and a slope of `ROLL_OFF` above."""
    points = 1 << 15
    frequency = torch.fft.rfftfreq(points, 1 / SAMPLE_RATE, dtype=torch.float64)
    decibels = (-ROLL_OFF * (frequency - BAND).clamp(min=0)).clamp(min=FLOOR)
    lags = torch.fft.irfft(10 ** (decibels / 10), n=points)
    index = torch.arange(size)
    return (lags / lags[0])[(index[:, None] - index).abs()]
