"""Metrics: ratios and moments of signals whose values are known, and baselines against the formula by hand."""

import math

import pytest
import torch

from lib.cascade import Cascade
from lib.losses import LossConfig
from lib.metrics import band_snr, baseline_losses, kurtosis

RATE, N = 24_000, 24_000  # a whole second: every whole frequency falls on one bin


def sine(frequency: float, amplitude: float) -> torch.Tensor:
    return amplitude * torch.sin(2 * torch.pi * frequency * torch.arange(N) / RATE)[None]


def test_band_snr_finds_the_ratio_of_each_band():
    reference = sine(500, 0.5) + sine(3000, 0.2)
    estimate = reference + sine(700, 0.05) + sine(3500, 0.002)  # 20 dB and 40 dB below
    assert band_snr(reference, estimate, (0, 1000, 5000)) == pytest.approx([20, 40], abs=0.01)


def test_band_snr_keeps_a_tone_on_an_edge_in_the_upper_band():
    reference, estimate = sine(500, 0.1) + sine(1000, 0.1), sine(500, 0.1)  # the tone at 1000 Hz is lost
    low, high = band_snr(reference, estimate, (100, 1000, 2000))
    assert low > 80
    assert high == pytest.approx(0, abs=0.01)


def test_band_snr_reads_edges_in_hz_of_the_given_rate():
    reference = sine(500, 0.5)  # at half the rate the same samples are 250 Hz
    ratios = band_snr(reference, 0.9 * reference, (0, 300, 1000), sample_rate=RATE // 2)
    assert ratios[0] == pytest.approx(20, abs=0.01)


def test_band_snr_of_an_empty_band_is_nan():
    reference = torch.zeros(1, N)
    assert math.isnan(band_snr(reference, sine(500, 0.1), (0, 1000))[0])


def test_band_snr_of_a_perfect_copy_is_huge_but_finite():
    ratio = band_snr(sine(500, 0.5), sine(500, 0.5), (0, 1000))[0]
    assert 200 < ratio < math.inf


def test_kurtosis_of_known_distributions():
    torch.manual_seed(0)
    normal = torch.randn(1_000_000)
    laplace = torch.distributions.Laplace(5.0, 2.0).sample((1_000_000,))  # neither shift nor scale matters
    assert kurtosis(normal) == pytest.approx(3, abs=0.05)
    assert kurtosis(laplace) == pytest.approx(6, abs=0.2)


def test_kurtosis_of_constructed_values():
    assert kurtosis(torch.tensor([1.0, -1.0]).repeat(8)) == pytest.approx(1)  # two points: the smallest there is
    one_in_ten = torch.zeros(10)
    one_in_ten[0] = 1  # a Bernoulli variable: (1 - 3p(1 - p)) / (p(1 - p)), p = 0.1
    assert kurtosis(one_in_ten) == pytest.approx((1 - 0.27) / 0.09, rel=1e-6)
    assert kurtosis(1000 + one_in_ten) == pytest.approx((1 - 0.27) / 0.09, rel=1e-3)


@pytest.fixture
def pairs():
    """Nine pairs `[8, 5]`, one more than a batch of the loader: a mean of batch means would be wrong."""
    generator = torch.Generator().manual_seed(3)
    return [tuple((i + 1) * torch.randn(8, 5, generator=generator) for _ in range(2)) for i in range(9)]


@pytest.fixture
def untrained(tiny_cascade):
    torch.manual_seed(1)
    return Cascade(tiny_cascade())


def mean_loss(pairs, output, loss: LossConfig) -> float:
    """The objective by hand, pair by pair; `output` maps input and target `[D, T]` to the output."""
    total = 0.0
    for input, target in pairs:
        fused = output(input, target)
        total += loss.input_weight * (fused - input).square().mean().item()
        total += loss.target_weight * (fused - target).square().mean().item()
    return total / len(pairs)


def test_baselines_are_what_the_formula_gives(pairs, untrained):
    loss = LossConfig(0.3, 0.5)
    losses = baseline_losses(pairs, loss, untrained)

    def rms(x):
        return x.square().mean().sqrt()

    def full_level(input, target):
        mean = (input + target) / 2
        return mean * ((rms(input) ** 2 + rms(target) ** 2) / 2).sqrt() / rms(mean)

    assert losses["input alone"] == pytest.approx(mean_loss(pairs, lambda i, t: i, loss), rel=1e-5)
    assert losses["target alone"] == pytest.approx(mean_loss(pairs, lambda i, t: t, loss), rel=1e-5)
    assert losses["plain average"] == pytest.approx(mean_loss(pairs, lambda i, t: (i + t) / 2, loss), rel=1e-5)
    assert losses["plain average at full level"] == pytest.approx(mean_loss(pairs, full_level, loss), rel=1e-5)
    cascade = untrained.eval()
    with torch.no_grad():
        own = mean_loss(pairs, lambda i, t: cascade(i[None], t[None])[0][0], loss)
    assert losses["untrained cascade"] == pytest.approx(own, rel=1e-4)


def test_the_plain_average_is_the_minimum_for_equal_weights_only(pairs, untrained):
    equal = baseline_losses(pairs, LossConfig(0.3, 0.3), untrained)
    assert min(equal, key=equal.get) == "plain average"
    leaning = baseline_losses(pairs, LossConfig(1.0, 0.0), untrained)
    assert min(leaning, key=leaning.get) == "input alone"
    assert leaning["input alone"] == 0


def test_baselines_are_measured_without_dropout(pairs, untrained):
    first, second = (baseline_losses(pairs, LossConfig(), untrained.train()) for _ in range(2))
    assert first == second
