"""The law of the RMS collapse against Monte Carlo, explicit vectors, and the traces of real untrained cascades."""

import math
import statistics

import pytest
import torch
from torch import nn

from lib.model.cascade import MIXINGS, RESIDUAL_SOURCES, Cascade, CascadeConfig, StageConfig, rms
from lib.model.projection import SpectralLinear, rms_ceiling
from lib.model.rms_law import (
    INPUT,
    LATENT_RMS,
    SAFE_SCALE,
    TARGET,
    Clips,
    Mixture,
    check_collapse,
    initial_projection_rms,
    mean_of,
    pair_rms,
    predict_stage,
    rms_before_scaling,
    smallest_safe_weight,
)

WEAK = {"residual_weight": 0.1, "residual_source": "previous"}
MEASURED = ("projection_rms", "residual_rms", "rms_before_scaling", "target_scale", "applied_scale", "output_rms")


def vectors(similarity: float, B: int = 2, T: int = 60, D: int = 128, seed: int = 0) -> list[torch.Tensor]:
    """Three float64 signals `[B, D, T]` of RMS 1: two with this cosine, and one orthogonal to both."""
    draws = torch.randn(3, B, D * T, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    basis = math.sqrt(D * T) * torch.linalg.qr(draws.permute(1, 2, 0)).Q.permute(2, 0, 1).unflatten(2, (D, T))
    return [basis[0], similarity * basis[0] + math.sqrt(1 - similarity**2) * basis[1], basis[2]]


def rms_of(x: torch.Tensor) -> float:
    """Of the first sample."""
    return x[0].square().mean().sqrt().item()


# --- the projection at its start --------------------------------------------------------------------------------------


@torch.no_grad()
def simulated(kind: type[nn.Linear], d: int, D: int, seed: int) -> float:
    torch.manual_seed(seed)
    linear = kind(d, D).eval()
    frames = nn.functional.layer_norm(torch.randn(1000, d), (d,))
    return nn.functional.linear(frames, linear.weight).square().mean().sqrt().item()


@pytest.mark.parametrize(
    ("d", "D", "seeds", "tolerance"),
    [(256, 128, 5, 0.01), (384, 128, 5, 0.01), (512, 128, 5, 0.01), (128, 128, 5, 0.015), (40, 20, 60, 0.02)],
)
def test_initial_projection_rms_against_monte_carlo(d, D, seeds, tolerance):
    draws = [simulated(SpectralLinear, d, D, seed) for seed in range(seeds)]
    assert statistics.mean(draws) == pytest.approx(initial_projection_rms(d, D), rel=tolerance)
    if d == 40:  # small sizes need the Tracy-Widom term: the asymptotic edge alone is out of tolerance
        asymptotic = math.sqrt(d) / (math.sqrt(d) + math.sqrt(D))
        assert statistics.mean(draws) != pytest.approx(asymptotic, rel=2 * tolerance)


@pytest.mark.parametrize("d", [64, 256, 384])
def test_without_spectral_norm_the_width_does_not_matter(d):
    draws = [simulated(nn.Linear, d, 128, seed) for seed in range(3)]
    assert initial_projection_rms(d, 128, spectral_norm=False) == math.sqrt(1 / 3)
    assert statistics.mean(draws) == pytest.approx(math.sqrt(1 / 3), rel=0.01)


def test_a_wider_stage_starts_higher_but_further_from_its_ceiling():
    widths = (128, 256, 384, 512, 640)
    starts = [initial_projection_rms(d, 128) for d in widths]
    shares = [start / rms_ceiling(d, 128) for start, d in zip(starts, widths, strict=True)]
    assert starts == sorted(starts)
    assert shares == sorted(shares, reverse=True)
    assert max(shares) == pytest.approx(0.5, abs=0.02)


# --- sums of signals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alignment", [-1.0, -0.4, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("weight", [0.0, 0.1, 0.7, -0.5])
def test_rms_before_scaling_of_vectors_with_a_given_cosine(alignment, weight):
    projection, residual, _ = vectors(alignment)
    projection, residual = 1.3 * projection, 5.7 * residual
    measured = rms_of(projection + weight * residual)
    assert rms_before_scaling(1.3, 5.7, weight, alignment) == pytest.approx(measured, rel=1e-9)
    assert rms_before_scaling(1.3, 5.7, weight) == pytest.approx(math.hypot(1.3, 5.7 * weight))


def test_opposite_signals_of_equal_length_leave_nothing():
    assert rms_before_scaling(0.3, 3.0, 0.1, -1.0) == pytest.approx(0.0, abs=1e-8)


def test_the_rms_of_a_pair_is_the_root_mean_square_of_both():
    assert pair_rms(LATENT_RMS, LATENT_RMS) == pytest.approx(LATENT_RMS)
    assert pair_rms(7.0, 1.0) == 5.0  # not 4, their mean
    found = pair_rms(torch.tensor([7.0, 3.0]), torch.tensor([1.0, 3.0]))
    assert torch.equal(found, torch.tensor([5.0, 3.0]))


@pytest.mark.parametrize("clips", [Clips(), Clips(5.7, 5.7, 0.8), Clips(3.0, 8.0, -0.3), Clips(4.0, 4.0, -1.0)])
def test_mixtures_against_tensors(clips):
    input, target, other = vectors(clips.similarity)
    input, target = clips.input_rms * input, clips.target_rms * target
    mixture = Mixture(0.6, 0.2, 1.7)
    previous = 0.6 * input + 0.2 * target + 1.7 * other
    assert INPUT.rms(clips) == pytest.approx(rms_of(input), rel=1e-9)
    assert TARGET.rms(clips) == pytest.approx(rms_of(target), rel=1e-9)
    assert mixture.rms(clips) == pytest.approx(rms_of(previous), rel=1e-9)
    assert mean_of([INPUT, TARGET]).rms(clips) == pytest.approx(rms_of((input + target) / 2), rel=1e-9, abs=1e-9)
    three = rms_of((input + previous + target) / 3)
    assert mean_of([INPUT, mixture, TARGET]).rms(clips) == pytest.approx(three, rel=1e-9)


# --- predictions against real cascades --------------------------------------------------------------------------------

reference = CascadeConfig.reference
UNLIKE, SIMILAR, UNEQUAL = Clips(), Clips(similarity=0.8), Clips(3.0, 8.0, -0.3)
CASES = {
    "reference": (lambda: reference(2, num_layers=1), UNLIKE),
    "reference, 2 layers": (lambda: reference(2, num_layers=2), UNLIKE),
    "reference, similar clips": (lambda: reference(2, num_layers=1), SIMILAR),
    "weak third stage": (lambda: reference(3, num_layers=1).with_stage(-1, **WEAK), UNLIKE),
    "weak third stage, similar clips": (lambda: reference(3, num_layers=1).with_stage(-1, **WEAK), SIMILAR),
    "preserving, with a gain": (
        lambda: reference(3, num_layers=1).with_stage(-1, mixing="preserving", projection_gain=9.0, **WEAK),
        UNLIKE,
    ),
    "preserving everywhere": (
        lambda: reference(2, num_layers=1, mixing="preserving", residual_weight=0.6, projection_gain=4.0),
        UNLIKE,
    ),
    "a level held": (
        lambda: reference(3, num_layers=1).with_stage(-1, projection_level=0.8, **WEAK),
        UNLIKE,
    ),
    "a level held, preserving, unequal clips": (
        lambda: reference(3, num_layers=1).with_stage(-1, projection_level=1.0, mixing="preserving", **WEAK),
        UNEQUAL,
    ),
    "no RMS scaling": (lambda: reference(3, num_layers=1, rms_scaling="off", residual_weight=0.5), UNLIKE),
    "no clamp": (lambda: reference(3, num_layers=1, clamp=None, residual_weight=0.2), UNLIKE),
    "clamped from below": (lambda: reference(2, num_layers=1, residual_weight=2.0), SIMILAR),
    "no spectral norm": (
        lambda: reference(2, num_layers=1, spectral_norm=False, residual_weight=0.1, projection_gain=3.0),
        UNLIKE,
    ),
    "unequal clips": (lambda: reference(3, num_layers=1, residual_weight=0.4), UNEQUAL),
    "unequal clips, input alone": (lambda: CascadeConfig((StageConfig(("noisy_input",), num_layers=1),)), UNEQUAL),
    "width 512": (lambda: reference(2, num_layers=1).with_stage(-1, width=512, residual_weight=0.1), UNLIKE),
    "learnable": (lambda: reference(2, num_layers=1, rms_scaling="learnable", residual_weight=0.3), UNLIKE),
}


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_predictions_against_an_untrained_cascade(case):
    build, clips = CASES[case]
    config = build()
    torch.manual_seed(0)
    input, target, _ = (x.float() for x in vectors(clips.similarity, seed=1))
    _, traces = Cascade(config).eval()(clips.input_rms * input, clips.target_rms * target)
    predictions = config.predict_rms(clips)
    assert len(predictions) == len(traces)
    for i, (found, trace) in enumerate(zip(predictions, traces, strict=True)):
        for name in MEASURED:
            tolerance = 0.05 if name == "projection_rms" else 0.04
            message = f"stage {i}: {name}"
            assert getattr(trace, name).mean().item() == pytest.approx(getattr(found, name), rel=tolerance), message
        assert trace.alignment.abs().max() < 0.1  # what the law assumes
        assert (trace.clamped > 0).all() == (found.applied_scale != found.target_scale and case != "no RMS scaling")


def test_predictions_follow_the_clips_own_similarity_and_rms():
    config = reference(2, num_layers=1)
    unlike, similar, loud = (config.predict_rms(c)[0] for c in (UNLIKE, SIMILAR, Clips(11.4, 11.4)))
    assert similar.residual_rms / unlike.residual_rms == pytest.approx(math.sqrt(1.8))
    assert loud.residual_rms / unlike.residual_rms == pytest.approx(2.0)
    assert loud.projection_rms == unlike.projection_rms  # the clips do not move what LayerNorm hides
    assert config.predict_rms() == config.predict_rms(UNLIKE)


# --- the smallest safe weight -----------------------------------------------------------------------------------------

RESIDUAL = Mixture(0.5, 0.5, 0.4)


def last_stage(weight: float, **changes):
    return predict_stage(StageConfig(residual_weight=weight, **changes), RESIDUAL, SIMILAR, d=384, D=128)[0]


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("clamp", [(0.7, 1.5), (0.5, 1.2), None])
@pytest.mark.parametrize("gain", [1.0, 3.0])
def test_at_the_smallest_safe_weight_the_target_scale_is_the_safe_one(mixing, clamp, gain):
    settings = {"mixing": mixing, "clamp": clamp, "projection_gain": gain}
    safe = last_stage(0.1, **settings).smallest_safe_weight
    assert 0.1 < safe < 1
    at = last_stage(safe, **settings)
    assert at.safe_scale == (clamp[1] if clamp else SAFE_SCALE)
    assert at.target_scale == pytest.approx(at.safe_scale, rel=1e-6)
    assert last_stage(safe - 1e-3, **settings).target_scale > at.safe_scale * (1 + 1e-4)
    assert last_stage(safe + 1e-3, **settings).target_scale < at.safe_scale * (1 - 1e-4)


def test_the_smallest_safe_weight_does_not_depend_on_the_weight():
    assert last_stage(0.9).smallest_safe_weight == last_stage(0.1).smallest_safe_weight


@pytest.mark.parametrize("preserving", [False, True])
def test_smallest_safe_weight_reaches_what_is_needed(preserving):
    weight = smallest_safe_weight(0.6, 5.7, 3.8, preserving=preserving)
    share = math.sqrt(1 - weight**2) if preserving else 1.0
    assert rms_before_scaling(share * 0.6, 5.7, weight) == pytest.approx(3.8, rel=1e-9)
    assert smallest_safe_weight(3.8, 5.7, 3.8, preserving=preserving) == 0.0
    assert smallest_safe_weight(5.0, 5.7, 3.8, preserving=preserving) == 0.0  # the projection alone is enough
    assert smallest_safe_weight(0.6, 0.0, 3.8, preserving=preserving) == math.inf


def test_where_preserving_mixing_has_no_safe_weight():
    assert smallest_safe_weight(0.6, 3.8, 3.8, preserving=True) == pytest.approx(1.0)
    assert smallest_safe_weight(0.6, 3.7, 3.8, preserving=True) == math.inf  # would need more than 1 ...
    assert smallest_safe_weight(0.6, 3.7, 3.8) > 1  # ... which adding allows
    assert smallest_safe_weight(3.0, 3.0, 3.8, preserving=True) == math.inf
    assert smallest_safe_weight(3.5, 3.0, 3.8, preserving=True) == math.inf


def test_preserving_mixing_keeps_the_power_of_two_equal_signals():
    for weight in (0.0, 0.1, 0.6, 1.0):
        share = StageConfig(mixing="preserving", residual_weight=weight).projection_weight
        assert rms_before_scaling(2.0 * share, 2.0, weight) == pytest.approx(2.0)


# --- the highest RMS before scaling -----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"projection_gain": 2.5}, {"mixing": "preserving", "projection_gain": 2.5}])
@pytest.mark.parametrize("weight", [0.1, 0.5])
def test_the_highest_rms_before_scaling_is_reached_and_not_passed(changes, weight):
    """The worst case: a projection of rank one that turns what LayerNorm gives onto the residual. Biases are 0."""
    config = reference(2, num_layers=1).with_stage(
        -1, residual_weight=weight, residual_source="previous", clamp=None, **changes
    )
    torch.manual_seed(0)
    cascade = Cascade(config).eval()
    last, seen = cascade.stages[-1], {}
    last.post_norm.register_forward_hook(lambda module, inputs, output: seen.update(norm=output))
    last.register_forward_hook(lambda module, inputs, output: seen.update(residual=inputs[0]["previous"]))
    input, target, _ = (LATENT_RMS * x.float() for x in vectors(0.0, B=1, T=1))
    cascade(input, target)
    for stage in cascade.stages:
        nn.init.zeros_(stage.output_projection.bias)
    cascade(input, target)
    residual, frame = seen["residual"][0, :, 0], seen["norm"][0, 0]

    highest = config.predict_rms()[-1].highest_rms_before_scaling
    mixed = {}
    for name, matrix in (
        ("aligned", torch.outer(residual, frame)),
        ("opposed", -torch.outer(residual, frame)),
        ("across", torch.outer(residual.roll(1), frame)),
        ("random", torch.randn(128, 384)),
    ):
        last.output_projection.parametrizations.weight.original.copy_(matrix)
        last.output_projection.realign()
        mixed[name] = cascade(input, target)[1][-1].rms_before_scaling.item()
    assert mixed["aligned"] == pytest.approx(highest, rel=1e-3)
    assert all(value < 0.99 * highest for name, value in mixed.items() if name != "aligned")


def test_without_spectral_norm_nothing_bounds_the_projection():
    assert last_stage(0.1, spectral_norm=False).highest_rms_before_scaling == math.inf
    assert last_stage(0.1).highest_rms_before_scaling < math.inf


# --- the design rule --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 5])
def test_the_reference_warns_of_nothing(num_stages):
    assert check_collapse(CascadeConfig.reference(num_stages)) == []
    for changes in ({"clamp": None}, {"rms_scaling": "off"}, {"rms_scaling": "learnable"}, {"spectral_norm": False}):
        assert check_collapse(CascadeConfig.reference(num_stages, **changes)) == []


@pytest.mark.parametrize("source", RESIDUAL_SOURCES)
@pytest.mark.parametrize("num_stages", [2, 3])
@pytest.mark.parametrize("changes", [{}, {"clamp": (0.5, 1.2)}, {"clamp": None}, {"mixing": "preserving"}])
def test_both_sides_of_the_line(source, num_stages, changes):
    base = CascadeConfig.reference(num_stages).with_stage(-1, residual_source=source, **changes)
    safe = base.predict_rms()[-1].smallest_safe_weight
    assert 0.3 < safe < 1.1
    (message,) = check_collapse(base.with_stage(-1, residual_weight=0.999 * safe))
    assert message.startswith(f"stage {num_stages - 1}: ")
    for weight in (safe, 1.001 * safe):
        assert check_collapse(base.with_stage(-1, residual_weight=weight)) == []


def test_the_line_of_a_weak_last_stage():
    """√((5.7/1.5)² − 0.641²)/5.7 for the previous output; the mean of three clips is quieter, so it needs more."""
    base = CascadeConfig.reference(3)
    previous = base.with_stage(-1, residual_source="previous").predict_rms()[-1].smallest_safe_weight
    assert previous == pytest.approx(math.sqrt((5.7 / 1.5) ** 2 - 0.641**2) / 5.7, abs=1e-4)
    assert base.predict_rms()[-1].smallest_safe_weight > previous + 0.1


def test_the_message_tells_stage_weight_predicted_rms_and_the_safe_weight():
    config = CascadeConfig.reference(3).with_stage(-1, residual_weight=0.1, residual_source="previous")
    (message,) = check_collapse(config)
    found = config.predict_rms()[-1]
    assert found.rms_before_scaling == pytest.approx(math.hypot(0.641, 0.57), abs=1e-3)
    assert "stage 2: residual_weight=0.1 " in message
    assert "the predicted RMS before scaling is 0.86, so the target scale is 6.6, above 1.5" in message
    assert "the smallest safe weight is 0.66 at width 384" in message


def test_every_stage_below_the_line_is_named():
    messages = check_collapse(CascadeConfig((StageConfig(residual_weight=0.3),)))
    assert [message.split(":")[0] for message in messages] == ["stage 0"]
    messages = check_collapse(CascadeConfig.reference(3, residual_weight=0.3))
    assert [message.split(":")[0] for message in messages] == ["stage 0", "stage 1", "stage 2"]


def test_a_stage_that_no_weight_can_save():
    first = StageConfig(residual_weight=0.0, rms_scaling="off")  # leaves its projection alone, of RMS 0.6
    last = StageConfig(sources=("input", "previous"), residual_source="previous", mixing="preserving")
    messages = check_collapse(CascadeConfig((first, last)))
    assert "no weight is safe" in messages[1]


def test_the_latents_own_rms_moves_the_line():
    def safe_weight(latent_rms: float) -> float:
        last = StageConfig(("input", "previous", "target"), residual_source="previous")
        return CascadeConfig((StageConfig(), last)).predict_rms(Clips(latent_rms, latent_rms))[-1].smallest_safe_weight

    assert safe_weight(1.0) < 0.5 < safe_weight(5.7) < 0.66  # the projection is nearly loud enough for quiet latents
    assert safe_weight(20.0) > 0.66  # beside which the projection is negligible


@pytest.mark.parametrize("share", [0.8, 1.2])
def test_training_does_not_cross_the_line(share):
    """Below the safe weight every clip stays clamped and too quiet, above it none does: from first to last step."""
    base = CascadeConfig.reference(2, num_layers=1).with_stage(-1, residual_source="previous")
    weight = share * base.predict_rms()[-1].smallest_safe_weight
    config = base.with_stage(-1, residual_weight=weight)
    assert bool(check_collapse(config)) == (share < 1)
    torch.manual_seed(0)
    cascade = Cascade(config)
    optimizer = torch.optim.AdamW(cascade.parameters(), lr=1e-4)
    input, target = LATENT_RMS * torch.randn(2, 4, 128, 20)
    input, target = (LATENT_RMS * x / rms(x)[:, None, None] for x in (input, target))
    losses = []
    for _ in range(40):
        output, traces = cascade(input, target)
        last = traces[-1]
        if share < 1:
            assert (last.clamped == 1).all()
            assert (last.applied_scale == 1.5).all()
            assert (last.output_rms < 0.9 * LATENT_RMS).all()
        else:
            assert (last.clamped == 0).all()
            torch.testing.assert_close(last.output_rms, torch.full((4,), LATENT_RMS), rtol=1e-4, atol=0)
        loss = (output - input).square().mean() + (output - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1  # it did train
