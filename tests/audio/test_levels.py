"""The meter against another implementation of the standard, and against formulas."""

import math

import numpy as np
import pytest
import torch
import torchaudio

from lib.audio.levels import CEILING, Level, Meter, level_of, mean_loudness


def noise(seconds: float, rate: int, channels: int) -> np.ndarray:
    """`[N, C]`, red, each channel a little softer than the one before."""
    white = np.random.default_rng(0).standard_normal((round(seconds * rate), channels))
    red = np.cumsum(white, axis=0)
    return (0.05 * (red - red.mean(axis=0)) / red.std(axis=0) * np.linspace(1, 0.5, channels)).astype(np.float32)


@pytest.mark.parametrize("rate", [16_000, 24_000, 44_100, 48_000])
@pytest.mark.parametrize("channels", [1, 2, 3, 9])
def test_loudness_is_that_of_the_standard(rate, channels):
    samples = noise(3, rate, channels)
    found = level_of([samples], rate, channels)
    wanted = [torchaudio.functional.loudness(torch.from_numpy(c[None].copy()), rate).item() for c in samples.T]
    total = 10 * math.log10(sum(10 ** (lufs / 10) for lufs in wanted))  # powers of channels add
    assert found.lufs == pytest.approx(total, abs=0.15)


def test_pieces_measure_like_the_whole():
    samples = noise(3, 48_000, 2)
    whole = level_of([samples], 48_000, 2)
    for size in (7, 4_800, 100_000):
        pieces = (samples[start : start + size] for start in range(0, len(samples), size))
        assert level_of(pieces, 48_000, 2) == pytest.approx(whole, abs=2e-3)
    meter = Meter(48_000, 2)
    meter.add(samples[:0])
    assert meter.level() == (-math.inf, 0)


def test_the_true_peak_is_of_the_waveform_between_the_samples():
    time = np.arange(24_000)
    samples = np.sin(np.pi / 2 * time + np.pi / 4)[:, None] * np.hanning(24_000)[:, None].clip(0, 0.5)
    assert abs(samples).max() == pytest.approx(0.5 / math.sqrt(2), rel=1e-3)
    assert level_of([samples], 24_000, 1).true_peak == pytest.approx(0.5, rel=5e-3)


@pytest.mark.parametrize(
    ("policy", "level", "loudness", "wanted"),
    [
        ("lufs", Level(-20, 0.1), -14, 10 ** (6 / 20)),
        ("lufs", Level(-20, 0.8), -14, CEILING / 0.8),
        ("lufs", Level(-20, 0.8), -30, 10 ** (-10 / 20)),
        ("lufs", Level(-20, 0.8), math.nan, 1),  # nothing to be as loud as
        ("lufs", Level(-math.inf, 0.8), -14, 1),
        ("peak", Level(-20, 0.1), -14, CEILING / 0.1),
        ("peak", Level(-20, 2.0), -14, CEILING / 2),
        ("none", Level(-20, 0.1), -14, 1),
        ("none", Level(-20, 2.0), -14, CEILING / 2),
        ("peak", Level(-math.inf, 0.0), -14, 1),
    ],
)
def test_policies(policy, level, loudness, wanted):
    assert level.factor(policy, loudness) == pytest.approx(wanted)


def test_the_mean_of_loudnesses_is_of_powers():
    assert mean_loudness(-17.6, -20.6) == pytest.approx(-18.85, abs=0.01)
    assert mean_loudness(-20, -math.inf) == pytest.approx(-20 - 10 * math.log10(2))
    assert mean_loudness(-math.inf, -math.inf) == -math.inf
