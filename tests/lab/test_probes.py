"""Probes: the ceiling is reached and never passed, gains and norms against formulas and whole Jacobians."""

import itertools
import math

import pytest
import torch
from torch import nn

from lib.lab import probes
from lib.lab.probes import (
    clamped_row,
    jacobian_norm,
    largest_error,
    last_stage_over_weights,
    law_row,
    over_weights,
    predictions,
    scaling_gains,
    stage_rows,
    training_panel,
    untrained,
    weight_row,
)
from lib.lab.results import Result
from lib.lab.variants import EXPLODING, REFERENCE, VARIANTS
from lib.model.cascade import Cascade, CascadeConfig, RmsScaling, StageConfig, cosine, rms
from lib.model.projection import SpectralLinear, realign_projections, rms_ceiling, spectral_sigma
from lib.model.rms_law import Clips

# --- the ceiling of a projection --------------------------------------------------------------------------------------


def unchanged(stage: nn.Module) -> None:
    stage.output_projection.bias.zero_()


def with_biases(stage: nn.Module) -> None:
    stage.output_projection.bias.normal_()
    stage.post_norm.bias.normal_()


def with_one_large_gamma(stage: nn.Module) -> None:
    stage.post_norm.weight.fill_(0.5)
    stage.post_norm.weight[3] = -2.5
    stage.post_norm.bias.fill_(0.1)


def disturbed(stage: nn.Module) -> None:
    stage.post_norm.weight.normal_()
    with_biases(stage)
    weight = stage.output_projection.state_dict(keep_vars=True).get("parametrizations.weight.original")
    (stage.output_projection.weight if weight is None else weight).normal_()
    realign_projections(stage)


@pytest.fixture
def new_stage(tiny_cascade):
    def build(change, **config):
        torch.manual_seed(7)
        stage = Cascade(tiny_cascade(1, **config)).eval().stages[0]
        with torch.no_grad():
            change(stage)
        return stage

    return build


def ceiling(stage: nn.Module) -> float:
    """p_max of notebook 03, with the σ that is applied: (σ·(max|γ|·√d + ‖β‖) + ‖b‖)/√D, times the gain."""
    norm, projection = stage.post_norm, stage.output_projection
    D, d = projection.weight.shape
    longest = norm.weight.abs().max().item() * math.sqrt(d) + norm.bias.norm().item()
    rms = (spectral_sigma(projection) * longest + projection.bias.norm().item()) / math.sqrt(D)
    return stage.config.projection_gain * rms


@torch.no_grad()
def projected_rms(stage: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """RMS over channels of every frame of `x [n, d]` after post_norm and projection."""
    projected = stage.config.projection_gain * stage.output_projection(stage.post_norm(x))
    return projected.square().mean(dim=1).sqrt()


@pytest.mark.parametrize("change", [unchanged, with_biases, with_one_large_gamma, disturbed])
@pytest.mark.parametrize("config", [{}, {"projection_gain": 2.5}, {"spectral_norm": False}])
def test_no_input_passes_the_ceiling(new_stage, change, config):
    stage = new_stage(change, **config)
    d = stage.post_norm.normalized_shape[0]
    x = torch.randn(20_000, d) * torch.logspace(-1, 3, 20_000)[:, None]
    spikes = 1e4 * torch.cat([torch.eye(d), -torch.eye(d)])
    assert projected_rms(stage, torch.cat([x, spikes])).max() <= ceiling(stage) * (1 + 1e-5)


@pytest.mark.parametrize("gamma", [1.0, 0.25, -3.0])
@pytest.mark.parametrize("gain", [1.0, 2.5])
@pytest.mark.parametrize("biases", [False, True])
def test_the_ceiling_is_reached(new_stage, gamma, gain, biases):
    """A frame along the leading right singular vector v; β along v and b along u lengthen it as far as they can."""
    stage = new_stage(unchanged, projection_gain=gain)
    d = stage.post_norm.normalized_shape[0]
    linear = stage.output_projection
    weight = linear.parametrizations.weight.original
    with torch.no_grad():
        weight -= weight.mean(dim=1, keepdim=True)  # LayerNorm takes the mean away, so v must have none
        linear.realign()
        u, s, vh = torch.linalg.svd(linear.weight)
        stage.post_norm.weight.fill_(gamma)
        if biases:
            stage.post_norm.bias.copy_(0.7 * math.copysign(1, gamma) * vh[0])
            linear.bias.copy_(1.3 * math.copysign(1, gamma) * u[:, 0])
    assert s[0].item() == pytest.approx(1, abs=1e-5)
    found = projected_rms(stage, 1e4 * vh[:1]).item()
    assert found == pytest.approx(ceiling(stage), rel=1e-4)
    D = 8
    formula = gain * (abs(gamma) * math.sqrt(d) + (2.0 if biases else 0.0)) / math.sqrt(D)
    assert ceiling(stage) == pytest.approx(formula, rel=1e-4)


def test_a_fresh_stage_has_the_ceiling_of_its_widths(new_stage):
    stage = new_stage(unchanged)
    assert ceiling(stage) == pytest.approx(rms_ceiling(16, 8), rel=1e-5)
    free = new_stage(unchanged, spectral_norm=False)
    sigma = torch.linalg.svdvals(free.output_projection.weight.detach())[0].item()
    assert abs(sigma - 1) > 0.05
    assert ceiling(free) == pytest.approx(sigma * rms_ceiling(16, 8), rel=1e-5)


# --- settings of the last stage ---------------------------------------------------------------------------------------


@pytest.fixture
def latents() -> torch.Tensor:
    """Input and target `[2, 3, 8, 10]`, at the RMS of real latents."""
    return 5.7 * torch.randn(2, 3, 8, 10, generator=torch.Generator().manual_seed(3))


def fresh(config: CascadeConfig) -> Cascade:
    torch.manual_seed(11)
    return Cascade(config).eval()


def test_the_last_stage_over_weights_is_that_of_fresh_cascades(tiny_cascade, latents):
    config = tiny_cascade(3, dropout=0.5).with_stage(-1, residual_source="previous", residual_weight=0.35)
    cascade = fresh(config)
    before = {name: value.clone() for name, value in fresh(config).state_dict().items()}
    weights = [1.0, 0.1, 0.0]
    found = last_stage_over_weights(cascade, weights, *latents)
    assert len(found) == 3
    for weight, trace in zip(weights, found, strict=True):
        with torch.no_grad():
            wanted = fresh(config.with_stage(-1, residual_weight=weight))(*latents)[1][-1]
        assert all(torch.equal(a, b) for a, b in zip(vars(trace).values(), vars(wanted).values(), strict=True))
    last = [trace.rms_before_scaling.mean().item() for trace in found]
    assert last == sorted(last, reverse=True)
    assert last[0] > 1.5 * last[2]
    assert cascade.stages[-1].config == config.stages[-1]
    assert all(p.grad is None for p in cascade.parameters())
    after = cascade.eval().state_dict()
    assert all(torch.allclose(value, before[name], atol=1e-6) for name, value in after.items())


# --- gains of RMS scaling ---------------------------------------------------------------------------------------------


def scaled(clamp: tuple[float, float] | None, level: float, goal: float) -> tuple[float, float]:
    x = torch.randn(1, 8, 10, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    x = level * x / rms(x)
    scaling = RmsScaling(StageConfig(clamp=clamp))
    return scaling_gains(scaling, x, torch.tensor([goal], dtype=torch.float64))


@pytest.mark.parametrize(("level", "factor"), [(1.0, 1.5), (20.0, 0.7)])
def test_a_clamped_scale_stretches_all_directions_alike(level, factor):
    assert scaled((0.7, 1.5), level, goal=5.0) == pytest.approx((factor, factor), rel=1e-9)


@pytest.mark.parametrize("clamp", [None, (0.7, 1.5)])
@pytest.mark.parametrize("level", [5.0, 4.0])
def test_an_unclamped_factor_stretches_across_alone(clamp, level):
    along, across = scaled(clamp, level, goal=5.0)
    assert along == pytest.approx(0, abs=1e-6)
    assert across == pytest.approx(5.0 / level, rel=1e-6)


def test_without_a_clamp_the_stretch_is_the_factor_however_large():
    along, across = scaled(None, 0.05, goal=5.0)
    assert across == pytest.approx(100, rel=1e-4)
    assert along < 1e-2


def test_the_gains_are_those_of_the_whole_jacobian():
    """g/rms · (I − x xᵀ/‖x‖²) row by row: rank n − 1, all its singular values the factor."""
    x = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    goal = torch.tensor([2.0], dtype=torch.float64)
    scaling = RmsScaling(StageConfig(clamp=None))
    jacobian = torch.autograd.functional.jacobian(lambda x: scaling(x, goal, goal)[0], x).view(12, 12)
    values = torch.linalg.svdvals(jacobian)
    along, across = scaling_gains(scaling, x, goal)
    assert across == pytest.approx(values[0].item(), rel=1e-6)
    assert values[10].item() == pytest.approx(values[0].item(), rel=1e-6)
    assert along == pytest.approx(values[11].item(), abs=1e-6)


# --- norms of Jacobians -----------------------------------------------------------------------------------------------


def largest_singular_value(function, x: torch.Tensor) -> float:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        jacobian = torch.autograd.functional.jacobian(function, x)
    return torch.linalg.svdvals(jacobian.reshape(-1, x.numel()))[0].item()


@pytest.mark.parametrize("seed", range(3))
def test_the_norm_of_a_small_function(seed):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    x = torch.randn(4, generator=generator, dtype=torch.float64)

    def function(x):
        return torch.tanh(A @ x) * (x**2).sum()

    wanted = largest_singular_value(function, x)
    assert jacobian_norm(function, x, iterations=100) == pytest.approx(wanted, rel=1e-5)


def test_power_iteration_grows_towards_the_norm_from_below():
    diagonal = torch.tensor([3.0, 2.9, 1.0], dtype=torch.float64)
    found = [jacobian_norm(lambda x: diagonal * x, torch.zeros(3).double(), iterations=n) for n in (1, 2, 5, 20, 400)]
    assert all(a < b <= 3 * (1 + 1e-9) for a, b in itertools.pairwise(found))
    assert found[0] < 2.9
    assert found[-1] == pytest.approx(3, rel=1e-6)


@pytest.mark.parametrize(("d", "D"), [(16, 8), (8, 16)])
def test_a_spectral_projection_has_norm_1(d, D):
    torch.manual_seed(d)
    linear = SpectralLinear(d, D).eval()
    assert jacobian_norm(linear, torch.randn(d), iterations=100) == pytest.approx(1, abs=1e-4)
    plain = nn.Linear(d, D)
    wanted = torch.linalg.svdvals(plain.weight.detach())[0].item()
    assert jacobian_norm(plain, torch.randn(d), iterations=100) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(("clamp", "weight"), [(None, 0.1), ((0.7, 1.5), 1.0)])
def test_the_norm_of_a_stage_is_that_of_its_whole_jacobian(tiny_cascade, clamp, weight):
    """In eval mode, with respect to the previous stage's output, whose gradient the residual carries."""
    config = tiny_cascade(2, clamp=clamp).with_stage(1, residual_weight=weight, residual_source="previous")
    stage = fresh(config).stages[1].double().eval()
    generator = torch.Generator().manual_seed(8)
    input, target, previous = 5.7 * torch.randn(3, 1, 8, 2, generator=generator, dtype=torch.float64)

    def function(previous):
        names = {"input": input, "noisy_input": input, "target": target, "noisy_target": target}
        return stage(names | {"previous": previous})[0]

    wanted = largest_singular_value(function, previous)
    assert jacobian_norm(function, previous, iterations=60) == pytest.approx(wanted, rel=1e-3)
    assert jacobian_norm(function, previous, iterations=2) < wanted
    assert all(p.grad is None for p in stage.parameters())


def test_torchs_spectral_norm_passes_1_where_ours_does_not():
    torch.manual_seed(0)
    stock, ours = nn.utils.parametrizations.spectral_norm(nn.Linear(64, 32)), SpectralLinear(64, 32)
    assert probes.largest_sigma(stock, 1e-2) > 1.05
    assert probes.largest_sigma(ours, 1e-2) <= 1.001


def test_a_quiet_clip_is_amplified_where_a_projection_alone_does_not():
    two, three = (Cascade(CascadeConfig.reference(n, num_layers=1)).eval() for n in (2, 3))
    x, y = torch.randn(2, 1, 128, 6)
    loud, quiet = (probes.lipschitz_constants(two, three, level * x, level * y, level, 0) for level in (1.0, 0.1))
    assert max(loud["projection"], quiet["projection"]) <= 1.001
    assert quiet["LayerNorm + projection"] == pytest.approx(10 * loud["LayerNorm + projection"], rel=0.05)
    assert set(loud) == {"projection", "LayerNorm + projection", "stage 0", "two stages", "exploding 3-stage"}


# --- the law of the RMS -----------------------------------------------------------------------------------------------

CONFIGS = {variant.name: variant.cascade(1) for variant in VARIANTS}


@pytest.fixture(scope="module")
def pair():
    """Two pairs of clips of RMS 5.7 and 4, `[B, D, T]` each."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 2, 128, 20, generator=generator)
    return 5.7 * x, 4.0 * y


def test_a_row_tells_a_law_that_holds_from_one_that_does_not():
    assert law_row("RMS", [1.0, 1.05], 1.0) == {
        "RMS, predicted": "1",
        "RMS, measured": "1.02 (1.00 to 1.05)",
        "largest error": "5.0%",
        "within 10 %": "yes",
    }
    assert law_row("RMS", [1.0, 1.11], 1.0)["within 10 %"] == "no"
    assert law_row("RMS", [1.0, 1.05], 1.0, 0.02)["within 2 %"] == "no"


def test_the_law_knows_the_levels_and_the_cosine_of_each_pair(pair):
    x, y = pair
    config = CONFIGS[EXPLODING]
    clips = Clips(rms(x)[1].item(), rms(y)[1].item(), cosine(x, y)[1].item())
    assert predictions(config, x, y)[1] == config.predict_rms(clips)


def test_every_stage_of_an_untrained_cascade_follows_the_law(pair):
    rows = stage_rows(EXPLODING, CONFIGS[EXPLODING], *pair, range(2))
    assert [(row["cascade"], row["stage"]) for row in rows] == [(EXPLODING, i) for i in range(3)]
    assert [row["within 10 %"] for row in rows] == ["yes"] * 3
    for row in rows:
        measured = float(row["target scale, measured"].split(" ")[0])
        assert measured == pytest.approx(float(row["target scale, predicted"]), rel=0.1)


def test_over_weights_law_and_measurement_have_one_value_a_weight(pair):
    panel = over_weights(CONFIGS[EXPLODING], (0.1, 1.0), *pair, range(2))
    assert [len(run) for run in panel["measured"]] == [len(panel["predicted"])] * 2 == [2, 2]
    assert panel["predicted"][0] < 0.5 * panel["predicted"][1]
    assert largest_error(panel) < 0.1
    assert largest_error(panel | {"predicted": [2 * value for value in panel["predicted"]]}) > 0.4


def test_a_weight_is_judged_by_the_clips_that_are_clamped(pair):
    traces = [untrained(CONFIGS[EXPLODING], seed)(*pair)[1][-1] for seed in range(2)]
    found = weight_row(0.1, 0.66, traces)
    assert (found["law"], found["clamped"], found["as the law says"]) == ("collapses", "100%", "yes")
    found = weight_row(0.1, 0.05, traces)
    assert (found["law"], found["as the law says"]) == ("safe", "no")


# --- in training ------------------------------------------------------------------------------------------------------


def step(scale: float = 1.0) -> dict[str, float]:
    """The last stage's metrics at one step, where 0.6² + (0.1 · 5)² = 0.61; `scale`: of the RMS before scaling."""
    values = {"projection_rms": 0.6, "residual_rms": 5.0, "alignment": 0.0, "rms_before_scaling": scale * 0.61**0.5}
    return {f"stage2/{name}": value for name, value in values.items()}


def result(start: float = 1.0, end: float = 1.0) -> Result:
    ends = [{"stage2/clamped": share} | step() for share in (start, end)]
    return Result(EXPLODING, 0, 1, 2, None, *ends, {"stage2/ceiling": 1.8}, (1.0, 1.0), "run")


def test_training_is_shown_beside_the_law_and_its_bound(pair, monkeypatch):
    monkeypatch.setattr(probes, "training_steps", lambda run: [step(), step(1.5), step()])
    config = CONFIGS[EXPLODING]
    panel = training_panel(config, [result(), result()], *pair)
    assert len(panel["x"]) == len(panel["bound"]) == 3
    assert panel["measured"] == [[pytest.approx(scale * 0.61**0.5) for scale in (1.0, 1.5, 1.0)]] * 2
    assert panel["predicted"][0] < panel["bound"][0]


@pytest.mark.parametrize(("end", "holds"), [(1.0, "yes"), (0.9, "no")])
def test_a_collapse_holds_where_every_clip_stays_clamped(end, holds):
    row = clamped_row(EXPLODING, CONFIGS[EXPLODING], [result(end=1.0), result(end=end)])
    assert (row["law"], row["weight"], row["the law holds"]) == ("collapses", 0.1, holds)
    assert clamped_row(REFERENCE, CONFIGS[EXPLODING].with_stage(-1, residual_weight=1.0), [result()])["law"] == "safe"
