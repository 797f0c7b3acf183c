"""Tables and sentences of notebooks 02 and 04 that follow from the ablation's runs, whichever way they came out."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lib.lab.results import Groups, Measure, at_level, each, final, first_non_finite, growth, known, peak, rising
from lib.lab.variants import REFERENCE, SINGLE_CHANGES, Variant
from lib.training.config import TrainConfig
from lib.util.stats import describe, difference, factorial_effects

Rows = list[dict[str, Any]]
Measures = Mapping[str, Measure]  # by label; NaN for a run without an end
Values = Mapping[str, Sequence[float]]  # by name, one per seed

MEASURES: Measures = {  # label of an axis, with its unit
    "largest gradient norm": peak,
    "gradient growth (last / first tenth)": growth,
    "validation MSE (squared latent units)": final("mse"),
    "output / target RMS": final("rms_ratio"),
}
SUMMARY: Measures = {
    "gradient norm, first tenth": lambda run: run.start.get("grad_norm", math.nan),
    "last tenth": lambda run: run.end.get("grad_norm", math.nan),
    "largest": peak,
    "validation MSE": final("mse"),
    "output / target RMS": final("rms_ratio"),
}
LEAKAGE: Measures = {
    "largest gradient norm": peak,
    "output / target RMS": final("rms_ratio"),
    "correlation with input": final("input_correlation"),
    "with target": final("target_correlation"),
    "validation MSE": final("mse"),
}
TRADE_OFF: Measures = {
    "leakage": lambda run: (final("input_correlation")(run) + final("target_correlation")(run)) / 2,
    "gradients": peak,
    "error": final("mse"),
}
EFFECTS: Measures = {
    "largest gradient norm (decades)": lambda run: math.log10(peak(run)),
    "gradient growth (decades)": lambda run: math.log10(growth(run)),
    "validation MSE (squared latent units)": final("mse"),
}


def grid_measures(groups: Groups) -> dict[str, Values]:
    """Label → variant → one value per seed: what `plots.variant_ranges` draws."""
    return {label: {name: known(runs, of) for name, runs in groups.items()} for label, of in MEASURES.items()}


def summary(groups: Groups, columns: Measures = SUMMARY) -> Rows:
    """A row for each variant: how its runs ended, and every measure as median and range over seeds."""
    return [
        {"variant": name, "end": first_non_finite(runs)}
        | {label: describe(known(runs, of), 4 if "MSE" in label else 3) for label, of in columns.items()}
        for name, runs in groups.items()
    ]


def leakage_rows(groups: Groups, names: Sequence[str]) -> Rows:
    """A row for each variant: what leaks from the sources, beside stability, level and error."""
    rows = summary({name: groups[name] for name in names if name in groups}, LEAKAGE)
    return [row | {"at the target level": "yes" if at_level(groups[row["variant"]]) else "no"} for row in rows]


def single_changes(groups: Groups) -> Rows:
    """A row for each variant that changes one thing: every measure, and how it compares with the reference's."""
    rows = []
    for name, factor in ((variant.name, variant.factor) for variant in SINGLE_CHANGES if variant.name in groups):
        row = {"group": factor, "change": name, "end": first_non_finite(groups[name])}
        for label, measure in MEASURES.items():
            values, others = known(groups[name], measure), known(groups[REFERENCE], measure)
            row[label.split(" (")[0]] = f"{describe(values)}: {difference(values, others)}"
        rows.append(row)
    return rows


def against_chance(rows: Rows, seeds: int) -> str:
    """How many comparisons find a difference, and how many would by chance: 2 in (2n choose n) sets do not overlap."""
    words = [cell.split(": ")[-1] for row in rows for cell in row.values()]
    differ = sum(word in ("higher", "lower") for word in words)
    compared = differ + words.count("within seed spread")
    chance = 2 / math.comb(2 * seeds, seeds) * compared
    return f"{differ} of {compared} comparisons say 'higher' or 'lower'; by chance alone {chance:.0f} would"


def effects(cells: Mapping[tuple, Variant], factors: Sequence[str], groups: Groups) -> dict[str, Values]:
    """Measure with its unit → effects and interactions of a 2×2×2's factors; only measures that every run has."""
    found = {}
    for label, measure in EFFECTS.items():
        measured = {levels: each(groups.get(variant.name, ()), measure) for levels, variant in cells.items()}
        if all(values and all(map(math.isfinite, values)) for values in measured.values()):
            found[label] = factorial_effects(measured, factors)
    return found


def effect_rows(effects: Mapping[str, Values]) -> Rows:
    names = next(iter(effects.values()), {})
    rows = [{"effect of": n} | {label: describe(found[n], 2) for label, found in effects.items()} for n in names]
    return rows or [{"effect of": "not known: the grid lacks variants of this 2×2×2, or a run met a non-finite value"}]


def findings(groups: Groups) -> list[str]:
    """A sentence on rising gradients, on clipping and on non-finite values."""
    runs = [run for results in groups.values() for run in results]
    risers = ", ".join(name for name, results in groups.items() if rising(results)) or "no variant"
    limit = TrainConfig().clip
    clipped = [norm > limit for run in runs for norm in run.grad_norm]
    return [
        f"The gradient norm rises over training in every seed of: {risers}.",
        f"It passes {limit:g}, where clipping acts, in {sum(clipped)} of {len(clipped)} recorded points.",
        f"Non-finite values end {sum(run.non_finite is not None for run in runs)} of {len(runs)} runs.",
    ]


def weak_residuals(groups: Groups, names: Sequence[str]) -> list[str]:
    """A line for each way to keep a weak residual, against two stages, and one that names the ways that succeed."""
    lines, winners = [], []
    for name in (name for name in names if name in groups):
        runs, others = groups[name], groups[REFERENCE]
        found = {label: difference(known(runs, of), known(others, of)) for label, of in TRADE_OFF.items()}
        level = "at" if at_level(runs) else "not at"
        lines.append(f"{name}: {', '.join(f'{n} {word}' for n, word in found.items())}; {level} the target level")
        if level == "at" and found["leakage"] == "lower" and found["gradients"] != "higher":
            winners.append(name)
    return [*lines, f"less leakage at the target level without larger gradients: {', '.join(winners) or 'none'}"]
