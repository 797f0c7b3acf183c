"""What a waveform says of rhythm, harmony and loudness: differentiable features, in batches, on the sound's device.

Legend: B batch, N samples, M mel bands, F feature frames (hop 320: 75 a second).
"""

import functools

import librosa
import torch
import torchaudio
from torch import Tensor

from lib.audio import SAMPLE_RATE

HOP = 320
SEGMENTS = 250  # of an envelope
MEL_FFT, MEL_BANDS = 1024, 64  # a window short enough to place an onset
CHROMA_FFT = 4096  # 5.9 Hz a bin: semitones apart from 100 Hz up
FLOOR = 1e-8  # of a power: far below any music, and no logarithm of zero


def envelope(wav: Tensor) -> Tensor:
    """Loudness curve: RMS of each of 250 equal segments, `[B, 1, N] → [B, 250]`. N below 250 raises `ValueError`."""
    length = wav.shape[-1] // SEGMENTS
    if length < 1:
        raise ValueError(f"an envelope needs at least {SEGMENTS} samples, got {wav.shape[-1]}")
    segments = wav[:, 0, : SEGMENTS * length].unflatten(1, (SEGMENTS, length))
    return (segments.square().mean(dim=2) + 1e-10).sqrt()


def correlation(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's correlation along the last axis, `[B, n]` twice → `[B]`; 0 where one of them is constant."""
    x, y = x - x.mean(dim=-1, keepdim=True), y - y.mean(dim=-1, keepdim=True)
    return torch.nn.functional.cosine_similarity(x, y, dim=-1)


def log_mel(wav: Tensor) -> Tensor:
    """Natural logarithm of the mel power, `[B, 1, N] → [B, M, F]`."""
    return (_mel(wav.device)(wav[:, 0]) + FLOOR).log()


def onset_envelope(wav: Tensor) -> Tensor:
    """How much every mel band rises from frame to frame, averaged over bands: `[B, 1, N] → [B, F − 1]`, 0 or more.

    The spectral flux of Böck and Widmer (DAFx 2013) without its maximum filter.
    """
    return log_mel(wav).diff(dim=2).relu().mean(dim=1)


def chroma(wav: Tensor) -> Tensor:
    """Power of the twelve pitch classes, from C up, each frame divided by its sum: `[B, 1, N] → [B, 12, F]`."""
    window = torch.hann_window(CHROMA_FFT, device=wav.device)
    spectrum = torch.stft(wav[:, 0], CHROMA_FFT, HOP * 4, window=window, pad_mode="constant", return_complex=True)
    power = spectrum.real.square() + spectrum.imag.square()  # [B, CHROMA_FFT / 2 + 1, F]
    classes = _chroma_bank(wav.device) @ power
    return (classes + FLOOR) / (classes.sum(dim=1, keepdim=True) + 12 * FLOOR)


def harmony_similarity(x: Tensor, y: Tensor) -> Tensor:
    """Cosine of two clips' chroma around their mean of 1/12, over all frames, `[B, 1, N]` twice → `[B]`."""
    x, y = (chroma(wav).flatten(1) - 1 / 12 for wav in (x, y))
    return torch.nn.functional.cosine_similarity(x, y, dim=1)


def rhythm_similarity(x: Tensor, y: Tensor) -> Tensor:
    """Correlation of two clips' onset envelopes, `[B, 1, N]` twice → `[B]`."""
    return correlation(onset_envelope(x), onset_envelope(y))


@functools.lru_cache(maxsize=4)
@torch.inference_mode(False)  # a tensor made in it could never take part in a backward pass
def _mel(device: torch.device) -> torchaudio.transforms.MelSpectrogram:
    mel = torchaudio.transforms.MelSpectrogram(
        SAMPLE_RATE, MEL_FFT, hop_length=HOP, n_mels=MEL_BANDS, norm="slaney", mel_scale="slaney", pad_mode="constant"
    )
    return mel.to(device)


@functools.lru_cache(maxsize=4)
@torch.inference_mode(False)
def _chroma_bank(device: torch.device) -> Tensor:
    """`[12, CHROMA_FFT / 2 + 1]`: which pitch classes a bin belongs to."""
    return torch.from_numpy(librosa.filters.chroma(sr=SAMPLE_RATE, n_fft=CHROMA_FFT)).to(device)
