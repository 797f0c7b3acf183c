"""What notebook 03 measures: gains and Jacobian norms of parts of a cascade, and the law of the RMS against untrained
cascades and the ablation's runs. `x`, `y`: the latents of a few pairs, `[B, D, T]` each."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lib.lab.results import Runs, training_steps
from lib.model.cascade import Cascade, CascadeConfig, RmsScaling, StageTrace, cosine, rms
from lib.model.rms_law import Clips, StagePrediction
from lib.util.stats import describe

Row = dict[str, Any]


@torch.no_grad()
def last_stage_over_weights(cascade: Cascade, weights: list[float], input: Tensor, target: Tensor) -> list[StageTrace]:
    """The last stage's trace at each residual weight, of a cascade in eval mode."""
    last, traces = cascade.stages[-1], []
    signals, _ = cascade.run_stages(input, target, len(cascade.stages) - 1)
    for weight in weights:
        with last.override(residual_weight=weight):
            traces.append(last(signals)[1])
    return traces


def scaling_gains(scaling: RmsScaling, x: Tensor, goal: Tensor) -> tuple[float, float]:
    """The gain of RMS scaling on a gradient parallel to its input `x [1, D, T]`, and on an orthogonal one, by autograd;
    `goal`: the RMS of both clips, `[1]`. Unclamped, x ↦ g·x/rms(x) does not change when x grows: the gain is 0 along x,
    and g/rms(x) across. A clamped scale c makes it the linear map x ↦ c·x, whose gain is c in both."""
    x = x.detach().requires_grad_()
    output = scaling(x, goal, goal)[0]
    along = x.detach() / x.detach().norm()
    generator = torch.Generator().manual_seed(271_828)  # not the seed of x, or nothing would be left across it
    across = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    across = across - (across * along).sum() * along
    directions = along, across / across.norm()
    return tuple(torch.autograd.grad(output, x, d, retain_graph=True)[0].norm().item() for d in directions)


def jacobian_norm(function: Callable[[Tensor], Tensor], x: Tensor, *, iterations: int = 20, seed: int = 0) -> float:
    """Largest singular value of a deterministic function's Jacobian at `x`: power iteration on JᵀJ, from below."""
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype).to(x.device)
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention has no forward-mode derivative
        _, pull_back = torch.func.vjp(function, x)
        for _ in range(iterations):
            _, pushed = torch.func.jvp(function, (x,), (v / v.norm(),))
            if not pushed.any():
                break
            (v,) = pull_back(pushed)
    return pushed.norm().item()


def lipschitz_constants(two: Cascade, three: Cascade, x: Tensor, y: Tensor, level: float, seed: int) -> Row:
    """Jacobian norms of parts and of whole cascades, with respect to both clips `[1, D, T]` together."""
    both, stage = torch.stack((x, y)), two.stages[0]  # [2, 1, D, T]
    z = torch.randn(1, x.shape[2], 256, generator=torch.Generator().manual_seed(seed))
    return {
        "projection": jacobian_norm(stage.output_projection, z, iterations=12),
        "LayerNorm + projection": jacobian_norm(lambda v: stage.output_projection(stage.post_norm(v)), level * z),
        "stage 0": jacobian_norm(lambda v: stage({"input": v[0], "noisy_input": v[0], "target": v[1]})[0], both),
        "two stages": jacobian_norm(lambda v: two(v[0], v[1])[0], both, iterations=12),
        "exploding 3-stage": jacobian_norm(lambda v: three(v[0], v[1])[0], both, iterations=12),
    }


def largest_sigma(layer: nn.Linear, rate: float, steps: int = 40) -> float:
    """Largest true σ that a spectral-norm layer applied in a forward pass while AdamW fitted it to a random map."""
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(64, layer.in_features, generator=generator)
    goal = z @ torch.randn(layer.in_features, layer.out_features, generator=generator)
    optimizer, largest = torch.optim.AdamW(layer.parameters(), lr=rate), 0.0
    for _ in range(steps):
        loss = (layer(z) - goal).square().mean()
        weight, norm = layer.parametrizations.weight.original.detach(), layer.parametrizations.weight[0]
        largest = max(largest, (torch.linalg.matrix_norm(weight, 2) / (norm._u @ weight @ norm._v)).item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return largest


def untrained(config: CascadeConfig, seed: int) -> Cascade:
    torch.manual_seed(seed)
    return Cascade(config).eval()


def predictions(config: CascadeConfig, x: Tensor, y: Tensor) -> list[tuple[StagePrediction, ...]]:
    """The law's prediction for each pair, from its two RMS values and cosine."""
    known = zip(rms(x).tolist(), rms(y).tolist(), cosine(x, y).tolist(), strict=True)
    return [config.predict_rms(Clips(*clips)) for clips in known]


def law_row(what: str, measured: Sequence[float], predicted: float, tolerance: float = 0.1) -> Row:
    """The columns that hold a measured quantity, one value per seed, against the law."""
    error = max(abs(value / predicted - 1) for value in measured)
    return {
        f"{what}, predicted": f"{predicted:.3g}",
        f"{what}, measured": describe(measured),
        "largest error": f"{error:.1%}",
        f"within {100 * tolerance:g} %": "yes" if error < tolerance else "no",
    }


def stage_rows(name: str, config: CascadeConfig, x: Tensor, y: Tensor, seeds: Sequence[int]) -> list[Row]:
    """A row for each stage of an untrained cascade: its RMS before scaling, and the target scale that follows."""
    law, runs = predictions(config, x, y), [untrained(config, seed)(x, y)[1] for seed in seeds]
    rows = []
    for i in range(len(config.stages)):
        measured = [traces[i].rms_before_scaling.mean().item() for traces in runs]
        row = law_row("RMS before scaling", measured, mean_prediction(law, "rms_before_scaling", i))
        scales = [traces[i].target_scale.mean().item() for traces in runs]
        row["target scale, predicted"] = f"{mean_prediction(law, 'target_scale', i):.2f}"
        rows.append({"cascade": name, "stage": i} | row | {"target scale, measured": describe(scales)})
    return rows


def over_weights(config: CascadeConfig, weights: Sequence[float], x: Tensor, y: Tensor, seeds: Sequence[int]) -> Row:
    """The last stage's output RMS over its residual weight, untrained: `measured` [seeds, weights] and `predicted`."""
    laws = [predictions(config.with_stage(-1, residual_weight=weight), x, y) for weight in weights]
    runs = [last_stage_over_weights(untrained(config, seed), list(weights), x, y) for seed in seeds]
    measured = [[trace.output_rms.mean().item() for trace in traces] for traces in runs]
    return {"x": weights, "measured": measured, "predicted": [mean_prediction(law, "output_rms") for law in laws]}


def mean_prediction(law: Sequence[Sequence[StagePrediction]], what: str, stage: int = -1) -> float:
    """A prediction for one stage, as a mean over pairs."""
    return statistics.mean(getattr(pair[stage], what) for pair in law)


def largest_error(panel: Mapping[str, Any]) -> float:
    pairs = (pair for run in panel["measured"] for pair in zip(run, panel["predicted"], strict=True))
    return max(abs(measured / predicted - 1) for measured, predicted in pairs)


def weight_row(weight: float, safe_weight: float, traces: Sequence[StageTrace]) -> Row:
    """A stage at one residual weight, one trace per seed, beside the law's verdict on that weight."""
    clamped = [trace.clamped.mean().item() for trace in traces]
    return {
        "residual weight": weight,
        "law": "collapses" if weight < safe_weight else "safe",
        "target scale": describe([trace.target_scale.mean().item() for trace in traces], 2),
        "clamped": f"{statistics.median(clamped):.0%}",
        "as the law says": "yes" if all(share == float(weight < safe_weight) for share in clamped) else "no",
    }


def training_panel(config: CascadeConfig, runs: Runs, x: Tensor, y: Tensor) -> dict[str, Any]:
    """The last stage's RMS before scaling at every step, the law before training, and its bound while γ is 1."""
    key = f"stage{len(config.stages) - 1}/rms_before_scaling"  # in metrics.jsonl
    measured = [[row[key] for row in training_steps(run.run)] for run in runs]
    count = min(map(len, measured))
    law = predictions(config, x, y)
    lines = {"predicted": "rms_before_scaling", "bound": "highest_rms_before_scaling"}
    panel = {name: [mean_prediction(law, what)] * count for name, what in lines.items()}
    return panel | {"x": range(1, count + 1), "measured": [values[:count] for values in measured]}


def clamped_row(name: str, config: CascadeConfig, runs: Runs) -> Row:
    """Share of clips that the last stage clamps at the start and at the end, beside the law's verdict."""
    weight, safe = config.stages[-1].residual_weight, config.predict_rms()[-1].smallest_safe_weight
    key = f"stage{len(config.stages) - 1}/clamped"
    start, end = ([getattr(run, when)[key] for run in runs] for when in ("start", "end"))
    return {
        "variant": name,
        "weight": weight,
        "smallest safe": f"{safe:.2f}",
        "law": "safe" if weight >= safe else "collapses",
        "clamped, first tenth": describe(start, 2),
        "last tenth": describe(end, 2),
        "the law holds": "yes" if all(share == float(weight < safe) for share in end) else "no",
    }
