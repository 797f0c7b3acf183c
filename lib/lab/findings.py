"""What notebook 02 shows of the grid: tables and sentences that follow from the runs, whichever way they came out."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lib.lab.measures import Groups, Measure, Runs, at_level, each, first_non_finite, growth, peak, rising
from lib.lab.results import Result
from lib.lab.variants import EXPLODING, REFERENCE, SINGLE_CHANGES, Variant
from lib.training.config import TrainConfig
from lib.util.stats import describe, difference, factorial_effects

SUSPECTS = ("3 stages", EXPLODING, "learnable RMS", "anti-modulation log")  # variants with what the seeds blame
MEASURES: dict[str, Measure] = {  # axis label with its unit → measure, NaN for a run without an end
    "largest gradient norm": peak,
    "gradient growth (last / first tenth)": growth,
    "validation MSE (squared latent units)": lambda r: final(r, "mse"),
    "output / target RMS": lambda r: final(r, "rms_ratio"),
}
Rows = list[dict[str, Any]]


def final(result: Result, key: str) -> float:
    """A metric after training; NaN for a run without an end."""
    return result.final[key] if result.final else math.nan


def known(results: Runs, measure: Measure) -> list[float]:
    """The measure of every run that has it."""
    return [value for value in each(results, measure) if not math.isnan(value)]


def grid_measures(groups: Groups) -> dict[str, dict[str, list[float]]]:
    """Label → variant → one value a seed: what `plots.variant_ranges` draws."""
    return {label: {name: known(runs, of) for name, runs in groups.items()} for label, of in MEASURES.items()}


def summary(groups: Groups) -> Rows:
    """A row for each variant: how its runs ended, gradient norms, error and level, as medians and ranges over seeds."""
    return [
        {
            "variant": name,
            "end": first_non_finite(runs),
            "gradient norm, first tenth": describe(each(runs, lambda r: r.start["grad_norm"])),
            "last tenth": describe(each(runs, lambda r: r.end["grad_norm"])),
            "largest": describe(each(runs, peak)),
            "validation MSE": describe(known(runs, lambda r: final(r, "mse")), 4),
            "output / target RMS": describe(known(runs, lambda r: final(r, "rms_ratio"))),
        }
        for name, runs in groups.items()
    ]


def single_changes(groups: Groups) -> Rows:
    """A row for each variant that changes one thing: every measure, and how it compares with the reference's."""
    rows = []
    for variant in (variant for variant in SINGLE_CHANGES if variant.name in groups):
        row = {"group": variant.factor, "change": variant.name, "end": first_non_finite(groups[variant.name])}
        for label, measure in MEASURES.items():
            values, others = known(groups[variant.name], measure), known(groups[REFERENCE], measure)
            row[label.split(" (")[0]] = f"{describe(values)}: {difference(values, others)}"
        rows.append(row)
    return rows


def against_chance(rows: Rows, seeds: int) -> str:
    """How many comparisons of `single_changes` find a difference, and how many would by chance: two sets of n values do
    not overlap 2 times in (2n choose n)."""
    words = [cell.split(": ")[-1] for row in rows for cell in row.values()]
    compared = [word for word in words if word in ("higher", "lower", "within seed spread")]
    differ = sum(word != "within seed spread" for word in compared)
    chance = 2 / math.comb(2 * seeds, seeds) * len(compared)
    return f"{differ} of {len(compared)} comparisons say 'higher' or 'lower'; by chance alone {chance:.0f} would"


def effects(
    variants: Mapping[tuple[bool, ...], Variant], factors: Sequence[str], groups: Groups
) -> dict[str, dict[str, list[float]]]:
    """Measure with its unit → effects and interactions of a 2×2×2's factors, one value a seed.

    Without a measure that some run lacks, and empty where the grid lacks a variant.
    """
    measures: dict[str, Measure] = {
        "largest gradient norm (decades)": lambda r: math.log10(peak(r)),
        "gradient growth (decades)": lambda r: math.log10(growth(r)),
        "validation MSE (squared latent units)": lambda r: final(r, "mse"),
    }
    found = {}
    for label, measure in measures.items():
        cells = {levels: each(groups.get(variant.name, ()), measure) for levels, variant in variants.items()}
        if all(values and all(map(math.isfinite, values)) for values in cells.values()):
            found[label] = factorial_effects(cells, factors)
    return found


def effect_rows(effects: Mapping[str, Mapping[str, Sequence[float]]]) -> Rows:
    names = next(iter(effects.values()), {})
    rows = [{"effect of": n} | {label: describe(found[n], 2) for label, found in effects.items()} for n in names]
    return rows or [{"effect of": "not known: the grid lacks variants of this 2×2×2, or a run met a non-finite value"}]


def findings(groups: Groups) -> list[str]:
    """A sentence on each suspect of the seeds, on rising gradients, on clipping and on non-finite values."""
    peaks = {name: each(results, peak) for name, results in groups.items()}
    reference, runs = peaks[REFERENCE], [run for results in groups.values() for run in results]
    risers = [name for name, results in groups.items() if rising(results)]
    limit = TrainConfig().clip
    clipped = [norm > limit for run in runs for norm in run.grad_norm]
    return [
        *(
            f"{name}: largest gradient norm {describe(peaks[name])}, against {describe(reference)} of {REFERENCE}: "
            f"{difference(peaks[name], reference)}."
            for name in SUSPECTS
            if name in groups
        ),
        f"The gradient norm rises over training in every seed of: {', '.join(risers) or 'no variant'}.",
        f"It passes {limit:g}, where clipping acts, in {sum(clipped)} of {len(clipped)} recorded points.",
        f"Non-finite values end {sum(run.non_finite is not None for run in runs)} of {len(runs)} runs.",
    ]


def leakage_rows(groups: Groups, names: Sequence[str]) -> Rows:
    """A row for each variant: what leaks from the sources, beside stability, level and error."""
    return [
        {
            "variant": name,
            "end": first_non_finite(groups[name]),
            "largest gradient norm": describe(each(groups[name], peak)),
            "output / target RMS": describe(known(groups[name], lambda r: final(r, "rms_ratio"))),
            "correlation with input": describe(known(groups[name], lambda r: final(r, "input_correlation"))),
            "with target": describe(known(groups[name], lambda r: final(r, "target_correlation"))),
            "validation MSE": describe(known(groups[name], lambda r: final(r, "mse")), 4),
            "at the target level": "yes" if at_level(groups[name]) else "no",
        }
        for name in names
        if name in groups
    ]


def weak_residuals(groups: Groups, names: Sequence[str]) -> list[str]:
    """A line for each way to keep a weak residual, against two stages, and one that names those which leak less at the
    target level without larger gradients."""
    measures: dict[str, Measure] = {
        "leakage": lambda r: (final(r, "input_correlation") + final(r, "target_correlation")) / 2,
        "gradients": peak,
        "error": lambda r: final(r, "mse"),
    }
    lines, winners = [], []
    for name in (name for name in names if name in groups):
        found = {
            label: difference(known(groups[name], measure), known(groups[REFERENCE], measure))
            for label, measure in measures.items()
        }
        level = "at" if at_level(groups[name]) else "not at"
        lines.append(f"{name}: {', '.join(f'{n} {word}' for n, word in found.items())}; {level} the target level")
        if level == "at" and found["leakage"] == "lower" and found["gradients"] != "higher":
            winners.append(name)
    return [*lines, f"less leakage at the target level without larger gradients: {', '.join(winners) or 'none'}"]


def schedule_rows(groups: Groups) -> Rows:
    """A row for each variant of the whole schedule: how its runs ended, and the mean objective metrics after it."""
    rows = []
    for name, runs in groups.items():
        row = {"variant": name, "seeds": len(runs), "steps": min(each(runs, lambda r: r.steps))}
        row["non-finite"] = sum(run.non_finite is not None for run in runs)
        for key in ("rhythm", "harmony", "merit", "movement_ratio"):
            values = [run.final[f"model/{key}"] for run in runs if run.final]
            row[key.removesuffix("_ratio")] = f"{sum(values) / max(1, len(values)):.2f}"
        rows.append(row)
    return rows
