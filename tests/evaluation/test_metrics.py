"""Metrics: ratios and moments of signals whose values are known, and formulas worked out by hand."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from lib.data.latents import LatentPairs
from lib.evaluation.metrics import (
    band_snr,
    evaluate_fusion,
    movement,
    survival,
)
from lib.model.cascade import StageTrace
from lib.model.fusion import FusionModel
from lib.model.masks import MaskingConfig

RATE, N = 24_000, 24_000  # a whole second: every whole frequency falls on one bin


def sine(frequency: float, amplitude: float) -> torch.Tensor:
    return amplitude * torch.sin(2 * torch.pi * frequency * torch.arange(N) / RATE)[None]


def test_band_snr_finds_the_ratio_of_each_band():
    reference = sine(500, 0.5) + sine(3000, 0.2)
    estimate = reference + sine(700, 0.05) + sine(3500, 0.002)  # 20 dB and 40 dB below
    assert band_snr(reference, estimate, (0, 1000, 5000)) == pytest.approx([20, 40], abs=0.01)


def test_band_snr_counts_the_errors_of_all_channels():
    reference = sine(500, 0.5).repeat(2, 1)
    estimate = reference + torch.cat([sine(700, 0.05), -sine(700, 0.05)])  # whose mean is none
    assert band_snr(reference, estimate, (0, 1000)) == pytest.approx([20], abs=0.01)


def test_band_snr_keeps_a_tone_on_an_edge_in_the_upper_band():
    reference, estimate = sine(500, 0.1) + sine(1000, 0.1), sine(500, 0.1)  # the tone at 1000 Hz is lost
    low, high = band_snr(reference, estimate, (100, 1000, 2000))
    assert low > 80
    assert high == pytest.approx(0, abs=0.01)


def test_band_snr_of_an_empty_band_is_nan():
    reference = torch.zeros(1, N)
    assert math.isnan(band_snr(reference, sine(500, 0.1), (0, 1000))[0])


def test_band_snr_of_a_perfect_copy_is_huge_but_finite():
    ratio = band_snr(sine(500, 0.5), sine(500, 0.5), (0, 1000))[0]
    assert 200 < ratio < math.inf


def test_what_survives_is_said_in_every_wording():
    assert survival([70.4, math.nan, 90.0]) == "signal to noise at least 70 dB"
    assert survival([70.4, 90.0], 60) == "signal to noise at least 70 dB; over 60 dB, its design: yes"
    assert survival([59.9, 90.0], 60) == "signal to noise at least 60 dB; over 60 dB, its design: no"
    assert survival([math.nan], 60) == "no signal"


# --- fused latents ----------------------------------------------------------------------------------------------------


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


def test_evaluate_fusion_is_what_the_formulas_give(tiny_index, tiny_cascade):
    """Nine pairs, one more than a batch takes; dropout is off although the model comes in training mode."""
    torch.manual_seed(1)
    model = FusionModel(tiny_cascade(residual_weight=0.3), MaskingConfig("learned")).train()
    pairs = LatentPairs(tiny_index, "val")
    found = evaluate_fusion(model, pairs)
    model.eval()
    rows = []
    for input, target in (pairs[i] for i in range(9)):
        with torch.no_grad():
            output, traces, masks, *_ = model(input[None], target[None])
        row = by_hand(*(x.double().numpy() for x in (output[0], input, target)))
        row["complementarity"] = 1 - (masks.input * masks.target).mean().item()
        for i, trace in enumerate(traces):
            row |= {f"stage{i}/{name}": value.item() for name, value in vars(trace).items()}
        rows.append(row)
    wanted = {name: np.mean([row[name] for row in rows]) for name in rows[0]}
    assert set(found) == set(wanted)
    assert {f.name for f in dataclasses.fields(StageTrace)} == {n[7:] for n in found if n.startswith("stage1/")}
    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    for name in ("input_correlation", "target_mse", "movement_ratio", "stage1/target_scale"):
        values = [row[name] for row in rows]
        mean_of_batch_means = (np.mean(values[:8]) + values[8]) / 2
        assert abs(mean_of_batch_means / found[name] - 1) > 1e-3, name  # the tolerance tells them apart


def test_a_list_of_pairs_may_hold_clips_of_different_lengths(known_model):
    model, pairs = known_model(lambda input, target: (input + 3 * target) / 4), []
    for frames in (7, 12):
        pairs.append(tuple(torch.randn(2, 8, frames, generator=torch.Generator().manual_seed(frames))))
    both, first, second = (evaluate_fusion(model, some) for some in (pairs, pairs[:1], pairs[1:]))
    assert both == pytest.approx({name: (first[name] + second[name]) / 2 for name in first})
    assert first["target_mse"] != pytest.approx(second["target_mse"], rel=1e-3)


def test_a_model_that_gives_its_input_back(tiny_index, known_model):
    pairs = LatentPairs(tiny_index, "val")
    found = evaluate_fusion(known_model(lambda input, target: input), pairs)
    assert found["input_correlation"] == pytest.approx(1, abs=1e-6)
    assert found["input_mse"] == 0
    assert abs(found["target_correlation"]) < 0.2
    assert found["mse"] == pytest.approx(found["target_mse"] / 2)
    assert found["rms_ratio"] == pytest.approx(1, abs=0.05)
    assert found["movement_ratio"] == pytest.approx(1, abs=0.1)


def test_an_output_of_constant_level_does_not_move(tiny_index, known_model):
    pairs = LatentPairs(tiny_index, "val")
    found = evaluate_fusion(known_model(lambda input, target: torch.full_like(input, 3.0)), pairs)
    assert found["movement_ratio"] == pytest.approx(0, abs=1e-6)
    assert found["input_correlation"] == found["target_correlation"] == 0
    doubled = evaluate_fusion(known_model(lambda input, target: 2 * input), pairs)
    assert doubled["movement_ratio"] == pytest.approx(2, abs=0.2)


def test_movement_is_the_standard_deviation_of_the_frames_rms():
    latents = torch.ones(2, 4, 6)
    latents[1, :, ::2] = 3.0  # frames of RMS 3 and 1 in turn
    assert movement(latents).tolist() == pytest.approx([0, 1])


def test_without_masks_there_is_no_complementarity(tiny_index, tiny_cascade):
    pairs = LatentPairs(tiny_index, "val")
    assert "complementarity" not in evaluate_fusion(FusionModel(tiny_cascade()), pairs)
    halves = FusionModel(tiny_cascade(), MaskingConfig("wide"))
    for known in (halves.mask_generator.gains, halves.mask_generator.offsets):
        torch.nn.init.zeros_(known)  # so that its masks are one half everywhere
    assert evaluate_fusion(halves, pairs)["complementarity"] == pytest.approx(0.75)


def test_evaluation_leaves_weights_and_gradients_alone(tiny_index, tiny_cascade):
    model = FusionModel(tiny_cascade())
    before = {name: value.clone() for name, value in model.eval().state_dict().items()}
    first, second = (evaluate_fusion(model.train(), LatentPairs(tiny_index, "val")) for _ in range(2))
    assert first == second
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
