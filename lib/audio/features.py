"""Differentiable features of waveforms. Legend: B batch, N samples, M mel bands, F frames (hop 320, 75 a second)."""

import functools
import itertools
import math

import librosa
import numpy as np
import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor

from lib.audio.files import SAMPLE_RATE
from lib.util.tensors import cached_table

HOP = 320
SEGMENTS = 250  # of an envelope
MEL_FFT, MEL_BANDS = 1024, 64  # a window short enough to locate an onset
CHROMA_FFT = 4096  # 5.9 Hz a bin: resolves semitones from 100 Hz up
HIT_BANDS = (20, 160, 1600, 4800)  # Hz, edges: a kick is as much rhythm as a hi-hat
LASTING = 17  # frames, 0.23 s: what lasts as long is no hit
TONE_FFT, TONE_HOP = 2048, 2 * HOP  # 11.7 Hz a bin
NOTE_FFT, NOTE_HOP = 8192, 3 * HOP  # 2.9 Hz a bin: separates semitones from E1 up
LOWEST_NOTE, HIGHEST_NOTE = 28, 99  # MIDI: E1 (41 Hz) to D sharp 7 (2.5 kHz)
FLOOR = 1e-8  # of a power: far below any music, and avoids the logarithm of zero


class Sound:
    """A waveform `[B, 1, N]` and its features, each computed on first use. Not `guarded`: without an epsilon under the
    root of the envelope, as the source documents had it."""

    def __init__(self, wav: Tensor, guarded: bool = True):
        self.wav, self.guarded = wav, guarded
        self.magnitudes = functools.cache(functools.partial(magnitudes, wav))  # of a window's size

    @functools.cached_property
    def envelope(self) -> Tensor:
        """RMS of each of 250 equal segments, `[B, 250]`. N below 250 raises `ValueError`."""
        length = self.wav.shape[-1] // SEGMENTS
        if length < 1:
            raise ValueError(f"an envelope needs at least {SEGMENTS} samples, got {self.wav.shape[-1]}")
        segments = self.wav[:, 0, : SEGMENTS * length].unflatten(1, (SEGMENTS, length))
        return (segments.square().mean(dim=2) + 1e-10 * self.guarded).sqrt()

    @functools.cached_property
    def log_mel(self) -> Tensor:
        """Natural logarithm of the mel power spectrogram, `[B, M, F]`."""
        return (_mel(self.wav.device)(self.wav[:, 0]) + FLOOR).log()

    @functools.cached_property
    def onsets(self) -> Tensor:
        """Mean rise of the bands of `log_mel` from frame to frame, `[B, F − 1]`, 0 or more: the spectral flux of Böck
        and Widmer (DAFx 2013) without its maximum filter."""
        return self.log_mel.diff(dim=2).relu().mean(dim=1)

    @functools.cached_property
    def hits(self) -> Tensor:
        """Rise of what does not last in each of `HIT_BANDS`, `[B, bands, F − 5]`, 0 or more: a hit raises most of a
        band, so the middle half of its frequencies is averaged, and a note's onset, which raises its partials, hardly
        counts. 30 dB below the loudest hit is silence. Two frames at each end see padding; of 8 or fewer, all stay."""
        spectrum = power_spectrum(self.wav, MEL_FFT, HOP).clamp_min(FLOOR**2).sqrt()
        lasting = F.avg_pool1d(held(spectrum, LASTING // 2), LASTING, stride=1)
        power = (spectrum - lasting).relu().square()
        power = power[..., 2:-2] if power.shape[-1] > 8 else power
        rises = (power + 1e-3 * power.amax(dim=(1, 2), keepdim=True) + FLOOR).log().diff(dim=2).relu()
        edges = [math.ceil(hz * MEL_FFT / SAMPLE_RATE) for hz in HIT_BANDS]
        bands = (rises[:, low:high].sort(dim=1).values for low, high in itertools.pairwise(edges))
        return torch.stack([band[:, (n := band.shape[1]) // 4 : n - n // 4].mean(dim=1) for band in bands], dim=1)

    @functools.cached_property
    def tones(self) -> Tensor:
        """Square roots of the magnitudes that last, up to the highest note, `[B, bins, F]`: of geometric means over a
        quarter of a second, which a hit hardly raises."""
        highest = math.ceil(librosa.midi_to_hz(HIGHEST_NOTE) * TONE_FFT / SAMPLE_RATE)
        power = power_spectrum(self.wav, TONE_FFT, TONE_HOP)[:, :highest]
        log = held((power + FLOOR).log(), LASTING // 4)
        return (F.avg_pool1d(log, 2 * (LASTING // 4) + 1, stride=1) / 4).exp()

    @functools.cached_property
    def notes(self) -> Tensor:
        """How far the log power of each semitone rises above that of the octave around it, `[B, semitones, F]`, 0 or
        more: lines of a spectrum, whatever its colour and level; less what rounding leaves of silence."""
        power = _semitone_bank(self.wav.device) @ power_spectrum(self.wav, NOTE_FFT, NOTE_HOP)
        log = (power / (power.amax(dim=(1, 2), keepdim=True) + FLOOR) + 1e-4).log()
        return (log - F.avg_pool1d(held(log.mT, 6), 13, stride=1).mT - 1e-4).relu()

    @functools.cached_property
    def chroma(self) -> Tensor:
        """Power of the twelve pitch classes, from C, normalised to sum 1 in each frame: `[B, 12, F]`."""
        classes = _chroma_bank(self.wav.device) @ power_spectrum(self.wav, CHROMA_FFT, HOP * 4)
        return (classes + FLOOR) / (classes.sum(dim=1, keepdim=True) + 12 * FLOOR)


def magnitudes(wav: Tensor, size: int) -> Tensor:
    """STFT magnitudes, window `size`, hop a quarter of it: `[B, 1, N] → [B, size / 2 + 1, F]`. N above `size / 2`."""
    return power_spectrum(mirrored(wav, size // 2, size // 2), size, size // 4, padded=True).clamp_min(FLOOR).sqrt()


def power_spectrum(wav: Tensor, size: int, hop: int, padded: bool = False) -> Tensor:
    """STFT powers, `[B, 1, N] → [B, size / 2 + 1, F]`; unless the clip is `padded`, it is continued by silence."""
    how = {"center": not padded, "pad_mode": "constant", "return_complex": True}
    spectrum = torch.stft(wav[:, 0], size, hop, window=hann(size, wav.device), **how)
    return spectrum.real.square() + spectrum.imag.square()


def mirrored(x: Tensor, before: int, after: int) -> Tensor:
    """`[..., N]`, continued at both ends by its mirror image. The gradient of `F.pad` adds in another order each time
    on a GPU; that of flips, and of `held`, does not."""
    return torch.cat([x[..., 1 : before + 1].flip(-1), x, x[..., -after - 1 : -1].flip(-1)], dim=-1)


def held(x: Tensor, count: int) -> Tensor:
    """`[..., N]`, continued at both ends by its first and last value, `[..., N + 2 · count]`."""
    first, last = (end.expand(*x.shape[:-1], count) for end in (x[..., :1], x[..., -1:]))
    return torch.cat([first, x, last], dim=-1)


def correlation(x: Tensor, y: Tensor, guarded: bool = True) -> Tensor:
    """Pearson's correlation along the last axis, `[B, n]` twice → `[B]`; 0 if one is constant. Not `guarded`: by roots
    for the deviations, NaN if one is constant."""
    x, y = x - x.mean(dim=-1, keepdim=True), y - y.mean(dim=-1, keepdim=True)
    if not guarded:
        return (x * y).mean(-1) / (x.square().mean(-1).sqrt() * y.square().mean(-1).sqrt())
    return F.cosine_similarity(x, y, dim=-1)


def harmony_similarity(x: Sound, y: Sound) -> Tensor:
    """Cosine similarity of two clips' chroma minus its mean of 1/12, over all frames, → `[B]`."""
    x, y = (sound.chroma.flatten(1) - 1 / 12 for sound in (x, y))
    return F.cosine_similarity(x, y, dim=1)


@cached_table
def hann(size: int, device: torch.device) -> Tensor:
    return torch.hann_window(size, device=device)


@cached_table
def _mel(device: torch.device) -> torchaudio.transforms.MelSpectrogram:
    return torchaudio.transforms.MelSpectrogram(
        SAMPLE_RATE, MEL_FFT, hop_length=HOP, n_mels=MEL_BANDS, norm="slaney", mel_scale="slaney", pad_mode="constant"
    ).to(device)


@cached_table
def _semitone_bank(device: torch.device) -> Tensor:
    """`[semitones, NOTE_FFT / 2 + 1]`: the mean of the bins within a semitone of each, falling off linearly."""
    pitches = librosa.hz_to_midi(np.arange(1, NOTE_FFT // 2 + 1) * SAMPLE_RATE / NOTE_FFT)
    distance = np.abs(pitches - np.arange(LOWEST_NOTE, HIGHEST_NOTE + 1)[:, None])
    weights = np.pad(np.maximum(1 - distance, 0), ((0, 0), (1, 0)))
    return torch.from_numpy(weights / weights.sum(axis=1, keepdims=True)).float().to(device)


@cached_table
def _chroma_bank(device: torch.device) -> Tensor:
    """`[12, CHROMA_FFT / 2 + 1]`: pitch classes of the bins."""
    return torch.from_numpy(librosa.filters.chroma(sr=SAMPLE_RATE, n_fft=CHROMA_FFT)).to(device)
