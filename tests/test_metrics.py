"""Metrics: ratios and moments of signals whose values are known, and baselines against the formula by hand."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from lib.cascade import Cascade, StageTrace
from lib.latents import LatentPairs
from lib.losses import LossConfig
from lib.metrics import band_snr, baseline_losses, evaluate_fusion, kurtosis, movement

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


# --- how a cascade fuses ----------------------------------------------------------------------------------------------


class Answer(nn.Module):
    """A cascade without stages, whose output is a function of its latents."""

    def __init__(self, output):
        super().__init__()
        self.output = output
        self.weight = nn.Parameter(torch.zeros(()))  # says which device it is on

    def forward(self, input, target):
        return self.output(input, target), ()


def by_hand(output: np.ndarray, input: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """The metrics of one pair `[D, T]`."""

    def rms(x):
        return np.sqrt((x**2).mean())

    def moves(x):
        return np.sqrt((x**2).mean(axis=0)).std()

    errors = {"input_mse": ((output - input) ** 2).mean(), "target_mse": ((output - target) ** 2).mean()}
    return errors | {
        "mse": sum(errors.values()) / 2,
        "input_correlation": np.corrcoef(output.ravel(), input.ravel())[0, 1],
        "target_correlation": np.corrcoef(output.ravel(), target.ravel())[0, 1],
        "rms_ratio": rms(output) / np.sqrt((rms(input) ** 2 + rms(target) ** 2) / 2),
        "movement_ratio": moves(output) / ((moves(input) + moves(target)) / 2),
    }


@pytest.mark.filterwarnings("ignore::lib.cascade.CollapseWarning")
def test_evaluate_fusion_is_what_the_formulas_give(tiny_index, tiny_cascade):
    """Nine pairs, one more than a batch takes; dropout is off although the model comes in training mode."""
    torch.manual_seed(1)
    cascade = Cascade(tiny_cascade(residual_weight=0.3)).train()
    pairs = LatentPairs(tiny_index, "val")
    found = evaluate_fusion(cascade, pairs)
    cascade.eval()
    rows = []
    for input, target in (pairs[i] for i in range(9)):
        with torch.no_grad():
            output, traces = cascade(input[None], target[None])
        row = by_hand(*(x.double().numpy() for x in (output[0], input, target)))
        for i, trace in enumerate(traces):
            row |= {f"stage{i}/{name}": value.item() for name, value in vars(trace).items()}
        rows.append(row)
    wanted = {name: np.mean([row[name] for row in rows]) for name in rows[0]}
    assert set(found) == set(wanted)
    assert {f.name for f in dataclasses.fields(StageTrace)} == {n[7:] for n in found if n.startswith("stage1/")}
    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    for name in ("input_correlation", "target_mse", "movement_ratio", "stage1/wanted_factor"):
        values = [row[name] for row in rows]
        mean_of_batch_means = (np.mean(values[:8]) + values[8]) / 2
        assert abs(mean_of_batch_means / found[name] - 1) > 1e-3, name  # the tolerance tells them apart


def test_a_model_that_gives_its_input_back(tiny_index):
    pairs = LatentPairs(tiny_index, "val")
    found = evaluate_fusion(Answer(lambda input, target: input), pairs)
    assert found["input_correlation"] == pytest.approx(1, abs=1e-6)
    assert found["input_mse"] == 0
    assert abs(found["target_correlation"]) < 0.2
    assert found["mse"] == pytest.approx(found["target_mse"] / 2)
    assert found["rms_ratio"] == pytest.approx(1, abs=0.05)
    assert found["movement_ratio"] == pytest.approx(1, abs=0.1)


def test_an_output_that_stands_still_does_not_move(tiny_index):
    pairs = LatentPairs(tiny_index, "val")
    found = evaluate_fusion(Answer(lambda input, target: torch.full_like(input, 3.0)), pairs)
    assert found["movement_ratio"] == pytest.approx(0, abs=1e-6)
    assert found["input_correlation"] == found["target_correlation"] == 0
    doubled = evaluate_fusion(Answer(lambda input, target: 2 * input), pairs)
    assert doubled["movement_ratio"] == pytest.approx(2, abs=0.2)


def test_movement_is_the_standard_deviation_of_the_frames_rms():
    latents = torch.ones(2, 4, 6)
    latents[1, :, ::2] = 3.0  # frames of RMS 3 and 1 in turn
    assert movement(latents).tolist() == pytest.approx([0, 1])


def test_evaluation_leaves_weights_and_gradients_alone(tiny_index, tiny_cascade):
    cascade = Cascade(tiny_cascade())
    before = {name: value.clone() for name, value in cascade.eval().state_dict().items()}
    first, second = (evaluate_fusion(cascade.train(), LatentPairs(tiny_index, "val")) for _ in range(2))
    assert first == second
    assert all(torch.equal(value, before[name]) for name, value in cascade.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in cascade.parameters())
