"""Statistics over seeds and songs: medians with ranges, standard errors, tests of a difference."""

import itertools
import math
import operator
import statistics
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import scipy.special

TEST = "t-test at the 5 % level, standard errors clustered by song"  # to be named beside the words below
WORDS = {1: "better than", -1: "worse than", 0: "no statistically significant difference from"}  # by verdict
COUNTED = {verdict: words + " {count} of {total} ({names})" for verdict, words in WORDS.items()}


class Comparison(NamedTuple):
    """A mean advantage, its standard error (infinite for one draw), and the number of independent draws (songs)."""

    mean: float
    error: float
    draws: int

    @property
    def verdict(self) -> int:
        """The sign of the mean if it differs from 0 by Student's t, two-sided at 5 %, draws − 1 degrees of freedom;
        otherwise 0. Without spread every mean except 0 differs."""
        least = scipy.special.stdtrit(self.draws - 1, 0.975) * self.error if self.draws > 1 else math.inf
        return int(self.mean > least) - int(self.mean < -least)

    def in_words(self, other: str) -> str:
        return f"{WORDS[self.verdict]} {other}"

    def __str__(self) -> str:
        return f"{self.mean:+.3f}" + (f" ± {self.error:.3f}" if math.isfinite(self.error) else "")


def in_words(comparisons: Mapping[str, Comparison], wordings: Mapping[int, str] = COUNTED) -> str:
    """Names grouped by verdict: 'better than 2 of 3 (a, b); worse than 1 of 3 (c)'."""
    groups = {verdict: [name for name, found in comparisons.items() if found.verdict == verdict] for verdict in WORDS}
    return "; ".join(
        wordings[verdict].format(names=", ".join(names), count=len(names), total=len(comparisons))
        for verdict, names in groups.items()
        if names
    )


def describe(values: Sequence[float], digits: int = 3) -> str:
    """Median and range as '2.4 (2.1 to 2.9)', with `digits` significant digits; 'none' without values."""
    if not values:
        return "none"
    numbers = statistics.median(values), min(values), max(values)
    middle, low, high = (f"{n:,.0f}" if abs(n) >= 10**digits else f"{n:#.{digits}g}".rstrip(".") for n in numbers)
    return f"{middle} ({low} to {high})" if len(values) > 1 else middle


def difference(values: Sequence[float], others: Sequence[float]) -> str:
    """'higher' or 'lower' if the two ranges do not overlap, else 'within seed spread'; NaN raises `ValueError`. Chance
    alone separates the ranges of n seeds each 2 times in (2n choose n): of three seeds, one time in ten."""
    if any(math.isnan(value) for value in (*values, *others)):
        raise ValueError(f"cannot compare NaN: {list(values)} and {list(others)}")
    if len(values) < 2 or len(others) < 2:
        return "one seed tells nothing"
    if min(values) > max(others):
        return "higher"
    return "lower" if max(values) < min(others) else "within seed spread"


def factorial_effects(
    cells: Mapping[tuple[bool, ...], Sequence[float]], factors: Sequence[str]
) -> dict[str, list[float]]:
    """Main effects and interactions of a full two-level factorial: 'norm', 'norm × clamp', … → one value per seed.
    `cells`: levels → one value per seed, in one order. The effect of a set of factors is the mean over the cells in
    which an even number of them is off, less that over the others (Box et al., Statistics for Experimenters, ch. 5)."""
    if len(cells) != 2 ** len(factors):
        raise ValueError(f"needs all {2 ** len(factors)} cells, got {len(cells)}")
    effects = {}
    for size in range(1, len(factors) + 1):
        for chosen in itertools.combinations(range(len(factors)), size):
            signs = [(-1) ** sum(not levels[i] for i in chosen) for levels in cells]
            sums = [sum(map(operator.mul, signs, values)) for values in zip(*cells.values(), strict=True)]
            effects[" × ".join(factors[i] for i in chosen)] = [total / (len(cells) / 2) for total in sums]
    return effects


def mean_and_error(values: Sequence[float], groups: Sequence[Hashable] | None = None) -> tuple[float, float]:
    """Mean and standard error, clustered by `groups` (Liang and Zeger 1986, doi 10.1093/biomet/73.1.13), ∞ for one."""
    mean, count, sums = statistics.fmean(values), len(values), {}
    for group, value in zip(range(count) if groups is None else groups, values, strict=True):
        sums[group] = sums.get(group, 0.0) + value - mean
    squares = sum(s**2 for s in sums.values())
    return mean, math.sqrt(squares * len(sums) / (len(sums) - 1)) / count if len(sums) > 1 else math.inf


def paired_comparison(values: Sequence[float], first: Sequence[Hashable], second: Sequence[Hashable]) -> Comparison:
    """Mean of differences over pairs of an input song and a target song, its standard error by the jackknife: one song
    is left out at a time, with all pairs that it has a part in, in either role (Snijders and Borgatti 1999, Connections
    22(2), less their correction for single pairs, which makes it too small where songs matter). The smaller number of
    songs in a role counts as draws. `ValueError` for lists of different lengths."""
    mean, draws = statistics.fmean(values), min(len(set(first)), len(set(second)))
    pairs, songs = list(zip(values, first, second, strict=True)), dict.fromkeys((*first, *second))
    without = [[value for value, *pair in pairs if song not in pair] for song in songs]
    if draws < 2 or not all(without):
        return Comparison(mean, math.inf, draws)
    squares = sum((statistics.fmean(rest) - mean) ** 2 for rest in without)
    return Comparison(mean, math.sqrt(squares * (len(songs) - 1) / len(songs)), draws)
