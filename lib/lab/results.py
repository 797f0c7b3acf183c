"""How the ablation's runs went: a result for each, the record of all, and what is measured of a run or a variant."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lib.training.run import Run
from lib.util.files import naming, read_json


@dataclass(frozen=True)
class Result:
    """How one run went. Metrics have the names of metrics.jsonl and `evaluate_fusion`."""

    variant: str
    seed: int
    num_layers: int
    steps: int  # taken
    non_finite: dict[str, Any] | None  # step, stage and tensor of the first non-finite value
    start: dict[str, float]  # medians over the first tenth of the steps ...
    end: dict[str, float]  # ... and over the last
    final: dict[str, float] | None  # on the validation pairs, after the last step; None after a non-finite value
    grad_norm: tuple[float, ...]  # before clipping, one per step, inf for a non-finite one; recorded: medians of parts
    run: str  # its folder
    quarter: dict[str, float] = field(default_factory=dict)  # medians over the tenth before a quarter of the steps


Item = TypeVar("Item")
Runs = Sequence[Result]  # of one variant, one for each seed
Groups = Mapping[str, Runs]  # by the variant's name
Measure = Callable[[Result], float]

HEALTHY_RATIO = (0.8, 1.2)  # of output RMS to target RMS, by claim C15


def summarize(folder: Path, variant: str, seed: int, num_layers: int) -> Result:
    """The result of the finished run in `folder`, from its result.json and metrics."""
    fix, rows = f"delete {folder} and run again", training_steps(folder)
    values = read_json(folder / "result.json", {"non_finite": object, "final": object}, fix=fix)
    tenth, quarter = max(1, len(rows) // 10), len(rows) // 4
    parts = {"start": rows[:tenth], "end": rows[-tenth:], "quarter": rows[quarter - tenth : quarter]}
    values |= {name: medians(part) for name, part in parts.items()}
    norms = tuple(row["grad_norm"] for row in rows) + ((math.inf,) if values["non_finite"] else ())
    return Result(variant, seed, num_layers, len(rows), **values, grad_norm=norms, run=str(folder))


def training_steps(run: str | Path) -> list[dict[str, Any]]:
    """Its metrics, one row per step."""
    return [row for row in Run.open(run).metrics("train") if "event" not in row]


def medians(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    names = dict.fromkeys(name for row in rows for name in row if name not in ("split", "step", "epoch"))
    values = {name: [row[name] for row in rows if row.get(name) is not None] for name in names}  # null: not finite
    return {name: statistics.median(found) for name, found in values.items() if found}


def by_variant(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Variant → its results in order of seeds."""
    names = dict.fromkeys(result.variant for result in results)
    return {name: [result for result in results if result.variant == name] for name in names}


def read_record(path: Path, kind: type[Item] = Result) -> tuple[tuple[Item, ...], dict[str, Any]]:
    """What `make record` wrote: results of one `kind`, and facts. `UserError` where it is missing or damaged."""
    missing = f"{path}: no such record; `make record` writes one"
    fix = "restore it from the repository or run `make record`"
    content = read_json(path, {"results": list, "facts": dict}, missing=missing, fix=fix)
    with naming(path, fix):
        rows = [{k: tuple(v) if isinstance(v, list) else v for k, v in dict(row).items()} for row in content["results"]]
        if not rows:
            raise ValueError("no results")
        return tuple(kind(**row) for row in rows), content["facts"]


def each(results: Runs, measure: Measure) -> list[float]:
    return [measure(result) for result in results]


def known(results: Runs, measure: Measure) -> list[float]:
    """The measure of every run that has it: without NaN."""
    return [value for value in each(results, measure) if not math.isnan(value)]


def final(key: str, missing: float = math.nan) -> Measure:
    """A metric on the validation pairs after training; `missing` for a run without an end."""
    return lambda result: result.final[key] if result.final else missing


level = final("rms_ratio", 0.0)  # output RMS over target RMS


def nearer(result: Result) -> float:
    """Correlation of the output with the source that it is nearer to; NaN for a run without an end."""
    return max(final("input_correlation")(result), final("target_correlation")(result))


def peak(result: Result) -> float:
    """Largest gradient norm before clipping; infinite for a run that met a non-finite value."""
    return max(result.grad_norm, default=math.inf)


def growth(result: Result) -> float:
    """Median gradient norm of the last tenth of the steps over the first; infinite where a value was not finite."""
    return math.inf if result.non_finite else result.end["grad_norm"] / result.start["grad_norm"]


def gradient_norms(part: Mapping[str, float]) -> dict[str, float]:
    """Squared gradient norm of every part of the model, from a run's `start` or `end`."""
    return {key: value**2 for key, value in part.items() if key.startswith("grad_norm/")}


def last_projection_share(result: Result) -> float:
    """Share of the last stage's projection in the squared gradient norm at the end; 0 for a run without an end."""
    norms = gradient_norms(result.end)
    projections = [norm for key, norm in sorted(norms.items()) if key.endswith("/output_projection")]
    return projections[-1] / sum(norms.values()) if norms else 0.0


def scalars_against_rest(result: Result) -> float:
    """Gradient norm of all RMS scalars together over that of all other parameters, at the start."""
    norms = gradient_norms(result.start)
    scalars = sum(value for key, value in norms.items() if key.endswith("/rms_scaling"))
    return math.sqrt(scalars / (sum(norms.values()) - scalars))


def scalar_ratio(result: Result) -> float:
    """Gradient of the RMS scalars over that of all other parameters, both as RMS over elements, at the start."""
    widths = (256, 384)  # of `learnable scalars`
    count = sum(stage_parameters(width, result.num_layers) for width in widths)
    return scalars_against_rest(result) * math.sqrt(count / (3 * len(widths)))


def stage_parameters(d: int, num_layers: int) -> int:
    """Parameters of a stage of width d whose sources are as wide, without RMS scalars."""
    return num_layers * (12 * d * d + 13 * d) + 4 * d + 128 * d + 128


def within(values: Sequence[float], low: float, high: float) -> bool:
    return all(low <= value <= high for value in values)


def never_non_finite(results: Runs) -> bool:
    return all(result.non_finite is None for result in results)


def first_non_finite(results: Runs) -> str:
    """'no non-finite value in 100 steps', or how many runs met one and when the first did."""
    steps = [result.non_finite["step"] for result in results if result.non_finite]
    if not steps:
        return f"no non-finite value in {min(result.steps for result in results)} steps"
    return f"non-finite in {len(steps)} of {len(results)} runs, first at step {min(steps)}"


def rising(results: Runs) -> bool:
    """Whether the gradient norm of every seed is larger in the last tenth of the steps than in the first."""
    return min(each(results, growth)) > 1


def stable(results: Runs) -> bool:
    return never_non_finite(results) and not rising(results)


def at_level(results: Runs) -> bool:
    """Whether every run ended with an output near the target level on the validation pairs."""
    return never_non_finite(results) and within(each(results, level), *HEALTHY_RATIO)
