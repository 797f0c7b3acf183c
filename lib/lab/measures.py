"""What is measured of a run of the ablation, and of the runs of a variant."""

import math
from collections.abc import Callable, Mapping, Sequence

from lib.lab.results import Result

Runs = Sequence[Result]  # of one variant, one for each seed
Groups = Mapping[str, Runs]  # by the variant's name
Measure = Callable[[Result], float]

HEALTHY_RATIO = (0.8, 1.2)  # of output RMS to target RMS, by claim C15


def each(results: Runs, measure: Measure) -> list[float]:
    return [measure(result) for result in results]


def known(results: Runs, measure: Measure) -> list[float]:
    """The measure of every run that has it: without NaN."""
    return [value for value in each(results, measure) if not math.isnan(value)]


def final(key: str, missing: float = math.nan) -> Measure:
    """A metric on the validation pairs after training; `missing` for a run without an end."""
    return lambda result: result.final[key] if result.final else missing


level = final("rms_ratio", 0.0)  # output RMS over target RMS
decoded_merit = final("model/merit", 0.0)  # figure of merit
movement = final("model/movement_ratio", 0.0)  # movement of the decoded output over its clips' mean


def nearer(result: Result) -> float:
    """Correlation of the output with the source that it is nearer to; NaN for a run without an end."""
    return max(final("input_correlation")(result), final("target_correlation")(result))


def peak(result: Result) -> float:
    """Largest gradient norm before clipping; infinite for a run that met a non-finite value."""
    return max(result.grad_norm, default=math.inf)


def growth(result: Result) -> float:
    """Median gradient norm of the last tenth of the steps over the first; infinite where a value was not finite."""
    return math.inf if result.non_finite else result.end["grad_norm"] / result.start["grad_norm"]


def largest_factor(result: Result) -> float:
    """Largest target scale of any stage, at the start, a quarter or the end of training."""
    parts = (result.start, result.quarter, result.end)
    return max((v for part in parts for k, v in part.items() if k.endswith("/target_scale")), default=math.inf)


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
