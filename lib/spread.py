"""Statistics over seeds: medians with ranges, and what may be called a difference."""

import itertools
import math
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence


def describe(values: Sequence[float], digits: int = 3) -> str:
    """Median and range as '2.4 (2.1 to 2.9)', with so many significant digits; 'none' without values."""
    if not values:
        return "none"
    numbers = [f(values) for f in (statistics.median, min, max)]
    middle, low, high = (f"{n:,.0f}" if abs(n) >= 10**digits else f"{n:#.{digits}g}".rstrip(".") for n in numbers)
    return f"{middle} ({low} to {high})" if len(values) > 1 else middle


def difference(values: Sequence[float], others: Sequence[float]) -> str:
    """'higher' or 'lower' where the ranges of both do not overlap, else 'within seed spread'.

    With three seeds a side, chance alone separates the ranges one time in ten (2/20), with five one in 126. NaN raises
    `ValueError`: it compares with nothing.
    """
    if any(math.isnan(value) for value in (*values, *others)):
        raise ValueError(f"cannot compare NaN: {list(values)} and {list(others)}")
    if len(values) < 2 or len(others) < 2:
        return "one seed tells nothing"
    if min(values) > max(others):
        return "higher"
    if max(values) < min(others):
        return "lower"
    return "within seed spread"


def factorial_effects(
    cells: Mapping[tuple[bool, ...], Sequence[float]], factors: Sequence[str]
) -> dict[str, list[float]]:
    """Main effects and interactions of a full two-level factorial, per seed.

    `cells`: levels → one value a seed, seeds in one order. The effect of a set of factors is the mean over the cells in
    which an even number of them is off, minus the mean over the others (Box, Hunter and Hunter, Statistics for
    Experimenters, chapter 5). Returns 'norm', 'norm × clamp', … → one value a seed.
    """
    seeds_of = sorted({len(values) for values in cells.values()})
    if len(cells) != 2 ** len(factors) or len(seeds_of) != 1:
        wanted = f"all {2 ** len(factors)} cells with equally many seeds"
        raise ValueError(f"needs {wanted}, got {len(cells)} cells with {seeds_of} seeds")
    seeds = range(len(next(iter(cells.values()))))
    effects = {}
    for size in range(1, len(factors) + 1):
        for chosen in itertools.combinations(range(len(factors)), size):
            sign = _sign_of(chosen)
            name = " × ".join(factors[i] for i in chosen)
            effects[name] = [
                sum(sign(levels) * values[seed] for levels, values in cells.items()) / (len(cells) / 2)
                for seed in seeds
            ]
    return effects


def _sign_of(chosen: Sequence[int]) -> Callable[[tuple[bool, ...]], int]:
    return lambda levels: -1 if sum(not levels[i] for i in chosen) % 2 else 1


def mean_and_error(values: Sequence[float], groups: Sequence[Hashable] | None = None) -> tuple[float, float]:
    """Mean and its standard error. Values of one group, such as clips of one song, are not independent: the error is
    that of as many draws as there are groups (Liang and Zeger 1986, doi 10.1093/biomet/73.1.13), and infinite for one.
    """
    mean, count = statistics.fmean(values), len(values)
    sums: dict[Hashable, float] = {}
    for group, value in zip(range(count) if groups is None else groups, values, strict=True):
        sums[group] = sums.get(group, 0.0) + value - mean
    if len(sums) < 2:
        return mean, math.inf
    return mean, math.sqrt(sum(s**2 for s in sums.values()) * len(sums) / (len(sums) - 1)) / count
