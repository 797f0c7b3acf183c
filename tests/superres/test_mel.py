"""The mel front end against numpy, librosa's and torchaudio's filters, and its way back."""

import librosa
import numpy as np
import pytest
import torch
import torchaudio

from lib.audio.features import hann
from lib.superres import mel
from lib.superres.mel import bin_of, inverse_spectrum, log_mel, magnitudes_of, spectrum

BIN = 48_000 / 2048  # Hz
FREQUENCIES = torch.arange(1025) * BIN


def noise(samples: int, seed: int = 0) -> torch.Tensor:
    """`[2, 1, samples]`."""
    return torch.randn(2, 1, samples, generator=torch.Generator().manual_seed(seed))


# --- forth ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("samples", "frames"), [(491_520, 1024), (960, 2), (1440, 3), (48_000, 100)])
def test_one_frame_for_every_480_samples(samples, frames):
    assert log_mel(torch.zeros(1, 1, samples)).shape == (1, 1, 256, frames)  # 491,520 samples are 10.24 s


@pytest.mark.parametrize("samples", [0, 480, 784, 961, 1200, 1439])
def test_refused_lengths(samples):
    with pytest.raises(ValueError, match=f"multiple of 480 samples above 784, got {samples}"):
        log_mel(torch.zeros(1, 1, samples))


def test_picture_is_the_log_of_magnitudes_in_slaney_bands():
    wav = noise(4800) * torch.tensor([0.3, 1e-6])[:, None, None]  # the second clip lies below the floor
    filters = librosa.filters.mel(sr=48_000, n_fft=2048, n_mels=256, fmin=20, fmax=24_000, dtype=np.float64)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(2048) / 2048)
    for picture, clip in zip(log_mel(wav), wav.double().numpy(), strict=True):
        padded = np.pad(clip[0], 784, mode="reflect")
        frames = np.stack([padded[480 * t :][:2048] for t in range(10)])
        magnitudes = np.abs(np.fft.rfft(frames * window, axis=1)).T
        expected = np.log(np.maximum(filters @ magnitudes, 1e-5))
        np.testing.assert_allclose(picture[0].numpy(), expected, atol=1e-4)
    assert torch.all(log_mel(wav)[1] == log_mel(torch.zeros(2, 1, 960)).max())
    assert abs(mel.SILENCE - np.log(1e-5)) < 1e-4


def test_filters_are_triangles_of_area_one_and_none_is_empty():
    filters = mel.filters(torch.device("cpu"))
    theirs = torchaudio.functional.melscale_fbanks(1025, 20.0, 24_000.0, 256, 48_000, norm="slaney", mel_scale="slaney")
    torch.testing.assert_close(filters, theirs.T, atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(BIN * filters[160:].sum(1), torch.ones(96), atol=0.03, rtol=0)  # the wider ones
    assert filters.sum(1).min() > 1e-4


def test_frame_is_centred_on_its_own_samples():
    """An impulse in the middle of the samples t · 480 to (t + 1) · 480 has its energy's centre in frame t."""

    def energy(sample):
        wav = torch.zeros(1, 1, 4800)
        wav[..., sample] = 1
        return spectrum(wav)[0].abs().square().mean(0)  # [T]

    middle = energy(5 * 480 + 240)
    assert (middle * torch.arange(10)).sum() / middle.sum() == pytest.approx(5, abs=1e-5)
    assert middle[5] == pytest.approx(1, abs=1e-6)  # the window's top
    border = energy(5 * 480)  # as far from frame 4 as from frame 5
    assert (border * torch.arange(10)).sum() / border.sum() == pytest.approx(4.5, abs=1e-5)


def test_bin_of_is_the_first_at_or_above():
    assert [bin_of(f) for f in (0, 1, BIN, BIN + 0.01, 4000, 24_000)] == [0, 1, 1, 2, 171, 1024]
    for frequency in np.random.default_rng(0).uniform(0, 24_000, 50):
        assert 0 <= bin_of(frequency) * BIN - frequency < BIN


def test_constants_made_in_inference_mode_take_part_in_backward():
    for cached in (hann, mel.filters, mel.interpolation):
        cached.cache_clear()
    wav = noise(960).requires_grad_()
    with torch.inference_mode():
        magnitudes_of(log_mel(wav))
    log_mel(inverse_spectrum(spectrum(wav) * magnitudes_of(log_mel(wav)))).sum().backward()
    assert wav.grad.abs().min() > 0


# --- and back ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [960, 1440, 9600])
def test_inverse_spectrum_gives_the_waveform_back_up_to_its_edges(samples):
    wav = noise(samples)
    torch.testing.assert_close(inverse_spectrum(spectrum(wav)), wav, atol=1e-5, rtol=0)


def test_inverse_spectrum_is_the_nearest_in_least_squares():
    """No waveform's spectrum is nearer to a made one: the error is orthogonal to that of every direction."""
    frames = torch.complex(*noise(2 * 1025 * 6, seed=1)[:, 0].reshape(2, 2, 1025, 6))
    frames[:, [0, 1024]] = frames[:, [0, 1024]].real.to(frames.dtype)
    wav, other = inverse_spectrum(frames).double(), noise(6 * 480, seed=2).double()
    inner = slice(2 * 480, 4 * 480)  # which the padding does not repeat
    step = torch.zeros_like(other)
    step[..., inner] = other[..., inner]

    def distance(wav):  # Σ over all 2048 bins of a frame: those between the first and the last count twice
        errors = (spectrum(wav.float()).to(torch.complex128) - frames).abs().square()
        return 2 * errors.sum() - errors[:, [0, 1024]].sum()

    nearest, around = distance(wav), [distance(wav + s * step) for s in (-0.02, 0.02)]
    curvature = (around[0] + around[1]) / 2 - nearest
    assert curvature > 0
    assert abs(around[0] - around[1]) < 0.05 * curvature  # a minimum lies within 1/40 of a step


@pytest.mark.parametrize(
    ("shape", "below_20_khz", "above"),
    [
        (torch.ones(1025), 1e-5, 1e-5),
        (torch.exp(-FREQUENCIES / 6000), 0.01, 0.07),  # the last band's centre lies below 24 kHz
        (1 + 0.5 * torch.cos(FREQUENCIES / 4000), 0.01, 0.02),
    ],
)
def test_magnitudes_of_a_smooth_spectrum_come_back(shape, below_20_khz, above):
    bands = mel.filters(torch.device("cpu")) @ shape[None, :, None].repeat(1, 1, 3)
    back = magnitudes_of(bands.log()[:, None])
    assert back.shape == (1, 1025, 3)
    error = (back[0, :, 1] / shape).log().abs()
    edge = bin_of(20_000)
    assert error[:edge].max() < below_20_khz
    assert error[edge:].max() < above


def test_magnitudes_are_never_negative():
    """Where the filters' pseudo-inverse swings below zero."""
    jagged = 5 * noise(256 * 7)[:, 0].reshape(2, 1, 256, 7) - 5
    assert magnitudes_of(jagged).min() > 0
    assert (torch.linalg.pinv(mel.filters(torch.device("cpu"))) @ jagged[:, 0].exp()).min() < 0
