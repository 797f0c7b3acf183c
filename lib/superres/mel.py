"""The log-mel spectrogram of the public AudioSR checkpoints (Liu et al. 2023, arXiv 2309.07314), and its inverse."""

import librosa
import numpy as np
import torch
from torch import Tensor

from lib.audio.features import hann
from lib.util.tensors import cached_table

SAMPLE_RATE = 48_000
N_FFT, HOP, MELS = 2048, 480, 256
LOWEST, HIGHEST = 20.0, 24_000.0  # Hz
FLOOR = 1e-5  # of a magnitude
SILENCE = -11.5129  # its logarithm: the value of a silent band
EDGES = librosa.mel_frequencies(MELS + 2, fmin=LOWEST, fmax=HIGHEST)  # Hz: band i begins at i and ends at i + 2
CENTRES = EDGES[1:-1]
KNOWN = 0.9  # share of a cutoff below which a band is the clip's own, whatever filter removed the rest
PAD = (N_FFT - HOP) // 2  # on either side: frame t is centred on samples t · HOP to (t + 1) · HOP


def spectrum(wav: Tensor) -> Tensor:
    """Complex spectrum of waveforms `[B, 1, N]`, N a multiple of HOP above PAD → `[B, N_FFT / 2 + 1, N / HOP]`."""
    if wav.shape[-1] % HOP or wav.shape[-1] <= PAD:
        raise ValueError(f"expected a multiple of {HOP} samples above {PAD}, got {wav.shape[-1]}")
    padded = torch.nn.functional.pad(wav, (PAD, PAD), mode="reflect")[:, 0]
    return torch.stft(padded, N_FFT, HOP, window=hann(N_FFT, wav.device), center=False, return_complex=True)


def inverse_spectrum(spectrum: Tensor) -> Tensor:
    """The waveform `[B, 1, N]` whose spectrum is nearest to `[B, N_FFT / 2 + 1, N / HOP]`, by overlap and add."""
    frames = torch.fft.irfft(spectrum.mT) * hann(N_FFT, spectrum.device)  # [B, T, N_FFT]
    return _overlap_add(frames) / _weight(frames.shape[1], spectrum.device)


def _overlap_add(frames: Tensor) -> Tensor:
    """`[B, T, N_FFT] → [B, 1, T · HOP]`, hop by hop: several times as fast as `torch.nn.functional.fold`."""
    (batch, count), hops = frames.shape[:2], -(-N_FFT // HOP)
    parts = torch.nn.functional.pad(frames, (0, hops * HOP - N_FFT)).view(batch, count, hops, HOP)
    wav = frames.new_zeros(batch, count + hops - 1, HOP)
    for i in range(hops):
        wav[:, i : i + count] += parts[:, :, i]
    return wav.view(batch, 1, -1)[..., PAD : PAD + count * HOP]


def log_mel(wav: Tensor) -> Tensor:
    """Log-mel spectrogram of waveforms at 48 kHz: `[B, 1, N] → [B, 1, 256, N / 480]`."""
    return (filters(wav.device) @ spectrum(wav).abs()).clamp_min(FLOOR).log()[:, None]


def magnitudes_of(mel: Tensor) -> Tensor:
    """Magnitudes `[B, N_FFT / 2 + 1, T]` of a mel `[B, 1, 256, T]`, interpolated: a pseudo-inverse goes below 0."""
    return interpolation(mel.device) @ mel[:, 0].exp()


def bin_of(frequency: float) -> int:
    """The first bin of the spectrum at or above a frequency in Hz."""
    return -int(-frequency * N_FFT // SAMPLE_RATE)


def known_bands(cutoff: float) -> int:
    """The number of bands that end below `KNOWN` of a cutoff in Hz."""
    return int((EDGES[2:] <= KNOWN * cutoff).sum())


@cached_table
def _weight(frames: int, device: torch.device) -> Tensor:
    """The sum of the squared windows of `frames` frames over each sample: `[1, 1, frames · HOP]`."""
    return _overlap_add(hann(N_FFT, device).square().expand(1, frames, -1))


@cached_table
def filters(device: torch.device) -> Tensor:
    """Slaney's triangles with area one, `[256, N_FFT / 2 + 1]`; the lowest cover one bin or two, none is empty."""
    bank = librosa.filters.mel(sr=SAMPLE_RATE, n_fft=N_FFT, n_mels=MELS, fmin=LOWEST, fmax=HIGHEST)
    return torch.from_numpy(bank).to(device)


@cached_table
def interpolation(device: torch.device) -> Tensor:
    """`[N_FFT / 2 + 1, 256]`: a band's mean magnitude at its centre, linear interpolation between the centres."""
    bins = np.arange(N_FFT // 2 + 1) * SAMPLE_RATE / N_FFT
    lines = torch.from_numpy(np.stack([np.interp(bins, CENTRES, band) for band in np.eye(MELS)], axis=1))
    return (lines / filters(torch.device("cpu")).double().sum(dim=1)).float().to(device)
