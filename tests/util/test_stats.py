"""Statistics over seeds against values computed by hand, and a factorial against a known model."""

import itertools
import math
import random

import pytest

from lib.util.stats import (
    Comparison,
    describe,
    difference,
    factorial_effects,
    in_words,
    mean_and_error,
    paired_comparison,
)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([2.4, 2.9, 2.1], "2.40 (2.10 to 2.90)"),
        ([4.0, 1.0], "2.50 (1.00 to 4.00)"),
        ([0.12345, 0.1, 0.2], "0.123 (0.100 to 0.200)"),
        ([5.0], "5.00"),
        ([15_438.4, 100.0], "7,769 (100 to 15,438)"),
        ([], "none"),
    ],
)
def test_describe(values, text):
    assert describe(values) == text


def test_describe_rounds_to_significant_digits():
    assert describe([math.pi, math.e, 5.0], digits=2) == "3.1 (2.7 to 5.0)"
    assert describe([math.pi], digits=5) == "3.1416"


def test_nan_is_refused():
    for values, others in (([1.0, math.nan], [2.0, 3.0]), ([1.0, 2.0], [math.nan, 3.0])):
        with pytest.raises(ValueError, match="cannot compare NaN"):
            difference(values, others)


@pytest.mark.parametrize(
    ("values", "others", "verdict"),
    [
        ([3, 4], [1, 2], "higher"),
        ([1, 2], [3, 4], "lower"),
        ([1, 2], [2, 3], "within seed spread"),  # they touch
        ([2, 3], [1, 2], "within seed spread"),
        ([1, 9], [4, 5], "within seed spread"),
        ([2.0001, 3], [1, 2], "higher"),
        ([9, 4, 7], [3, 1], "higher"),  # in no order, not as many
        ([5], [1, 2], "one seed tells nothing"),
        ([5, 6], [1], "one seed tells nothing"),
        ([], [], "one seed tells nothing"),
    ],
)
def test_difference(values, others, verdict):
    assert difference(values, others) == verdict


@pytest.mark.parametrize(("seeds", "chance"), [(3, 2 / 20), (5, 1 / 126)])
def test_how_often_chance_alone_separates_the_ranges(seeds, chance):
    """All ways to deal equal ranks to two sides: the share that is called a difference."""
    ranks = set(range(2 * seeds))
    sides = [(side, ranks - set(side)) for side in itertools.combinations(ranks, seeds)]
    called = [difference(list(a), list(b)) != "within seed spread" for a, b in sides]
    assert sum(called) / len(called) == pytest.approx(chance)
    assert chance == 2 / math.comb(2 * seeds, seeds)  # as notebook 02 counts


# --- factorials -------------------------------------------------------------------------------------------------------

FACTORS = ("norm", "clamp", "clipping")
EFFECTS = {  # of seed 0; those of seed 1 are twice as large
    "norm": 3.0,
    "clamp": -1.0,
    "clipping": 0.5,
    "norm × clamp": 2.0,
    "norm × clipping": 0.0,
    "clamp × clipping": -0.25,
    "norm × clamp × clipping": 0.75,
}


def model(levels: tuple[bool, ...], seed: int) -> float:
    """Mean 10, and half of each effect, with the sign that the product of its factors' levels (−1, 1) has."""
    value = 10.0
    for name, effect in EFFECTS.items():
        signs = [1 if levels[FACTORS.index(factor)] else -1 for factor in name.split(" × ")]
        value += (1 + seed) * effect / 2 * math.prod(signs)
    return value


def full_factorial() -> dict[tuple[bool, ...], list[float]]:
    return {levels: [model(levels, 0), model(levels, 1)] for levels in itertools.product((False, True), repeat=3)}


def test_effects_of_a_known_model():
    effects = factorial_effects(full_factorial(), FACTORS)
    assert list(effects) == list(EFFECTS)
    for name, effect in EFFECTS.items():
        assert effects[name] == pytest.approx([effect, 2 * effect]), name


def test_a_main_effect_is_the_mean_with_it_minus_the_mean_without():
    cells = {(False, False): [1.0], (True, False): [4.0], (False, True): [2.0], (True, True): [9.0]}
    effects = factorial_effects(cells, ("a", "b"))
    assert effects == {"a": [(4 + 9 - 1 - 2) / 2], "b": [(2 + 9 - 1 - 4) / 2], "a × b": [(1 + 9 - 2 - 4) / 2]}


def test_cells_come_in_any_order():
    turned = factorial_effects(dict(reversed(full_factorial().items())), FACTORS)
    for name, values in factorial_effects(full_factorial(), FACTORS).items():
        assert turned[name] == pytest.approx(values)


def test_a_missing_cell_is_refused():
    cells = full_factorial()
    del cells[True, False, True]
    with pytest.raises(ValueError, match=r"all 8 cells.*got 7"):
        factorial_effects(cells, FACTORS)


def test_unequal_seeds_are_refused():
    cells = full_factorial()
    cells[True, False, True].pop()
    with pytest.raises(ValueError, match="is shorter than"):
        factorial_effects(cells, FACTORS)


# --- means ------------------------------------------------------------------------------------------------------------


def test_a_mean_and_its_error():
    assert mean_and_error([1.0, 2.0, 3.0, 6.0]) == pytest.approx((3.0, math.sqrt(14 / 3) / 2))
    assert mean_and_error([5.0]) == (5.0, math.inf)
    assert mean_and_error([1.0, 2.0, 3.0, 6.0], "abcd") == mean_and_error([1.0, 2.0, 3.0, 6.0])


def test_values_of_one_group_are_clustered():
    """Groups of one size: the error is that of their means. Of several: the sums of what their values are off."""
    assert mean_and_error([1.0, 3.0, 4.0, 8.0, 0.0, 2.0], "aabbcc") == pytest.approx(mean_and_error([2.0, 6.0, 1.0]))
    assert mean_and_error([1.0, 1.0, 1.0, 5.0], "aaab") == pytest.approx((2.0, math.sqrt((9 + 9) * 2 / 1) / 4))
    assert mean_and_error([1.0, 2.0], "aa") == (1.5, math.inf)
    with pytest.raises(ValueError, match="argument 2"):
        mean_and_error([1.0, 2.0], "a")


# --- comparisons ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mean", "error", "draws", "verdict"),
    [
        (2.58, 1.0, 6, 1),
        (2.56, 1.0, 6, 0),
        (-2.58, 1.0, 6, -1),
        (-2.56, 1.0, 6, 0),
        (12.0, 1.0, 2, 0),
        (13.0, 1.0, 2, 1),
        (5.0, 0.0, 1, 0),  # one draw tells nothing
        (5.0, math.inf, 1, 0),
        (5.0, math.inf, 9, 0),
        (math.nan, 1.0, 9, 0),
        (0.0, 0.0, 6, 0),
        (0.1, 0.0, 6, 1),
        (-0.1, 0.0, 6, -1),
    ],
)
def test_the_verdict_is_students_t_test(mean, error, draws, verdict):
    """Two-sided, at 5 %: 2.571 with five degrees of freedom, 12.706 with one."""
    assert Comparison(mean, error, draws).verdict == verdict


BETTER, WORSE, UNKNOWN = Comparison(3.0, 1.0, 6), Comparison(-3.0, 1.0, 6), Comparison(3.0, math.inf, 1)


def test_a_comparison_in_words():
    assert BETTER.in_words("X") == "better than X"
    assert WORSE.in_words("X") == "worse than X"
    assert UNKNOWN.in_words("X") == "no statistically significant difference from X"
    assert str(BETTER) == "+3.000 ± 1.000"
    assert str(WORSE) == "-3.000 ± 1.000"
    assert str(UNKNOWN) == "+3.000"


def test_several_comparisons_are_grouped_by_verdict():
    found = {"a": WORSE, "b": BETTER, "c": UNKNOWN, "d": BETTER}
    said = "better than 2 of 4 (b, d); worse than 1 of 4 (a); no statistically significant difference from 1 of 4 (c)"
    assert in_words(found) == said
    assert in_words({"b": BETTER}) == "better than 1 of 1 (b)"
    assert in_words(found, {1: "up {names}", -1: "down {names}", 0: "level {names}"}) == "up b, d; down a; level c"


def test_the_jackknife_by_hand():
    """Pairs ab, ac, bc, da with 1, 3, 5, 7: mean 4; without a: 5, without b: 5, without c: 4, without d: 3."""
    found = paired_comparison([1.0, 3.0, 5.0, 7.0], "aabd", "bcca")
    assert (found.mean, found.draws) == (4.0, 3)
    assert found.error == pytest.approx(math.sqrt((1 + 1 + 0 + 1) * 3 / 4))
    swapped = paired_comparison([1.0, 3.0, 5.0, 7.0], "bcca", "aabd")
    assert swapped.error == pytest.approx(found.error)


def test_independent_pairs_have_the_usual_error_and_more_for_the_songs_that_each_removal_takes_twice():
    """Pairs within one song: the jackknife of a mean is its standard error. Of two songs each: √2 of it, for many."""
    values = [random.Random(0).gauss(0, 1) + k % 7 for k in range(60)]
    own = [str(k) for k in range(60)]
    assert paired_comparison(values, own, own).error == pytest.approx(mean_and_error(values)[1])
    of_two = paired_comparison(values, own, [f"other {k}" for k in own])
    assert of_two.error == pytest.approx(mean_and_error(values)[1] * math.sqrt(2), rel=0.02)


def test_pairs_within_one_song_are_clustered():
    values = [1.0, 1.5, 4.0, 4.5, 9.0, 8.0]
    assert paired_comparison(values, "aabbcc", "aabbcc").error == pytest.approx(mean_and_error(values, "aabbcc")[1])


@pytest.mark.parametrize("alike", [0.0, 0.5, 1.0])
def test_chance_is_called_a_difference_at_most_one_time_in_twenty(alike):
    """40 pairs of 12 songs, whose effects as input and as target are alike to some degree, around no advantage."""
    chance, called, rounds = random.Random(0), 0, 400
    all_pairs = list(itertools.permutations(range(12), 2))
    for _ in range(rounds):
        inputs = [chance.gauss(0, 1) for _ in range(12)]
        targets = [alike * x + math.sqrt(1 - alike**2) * chance.gauss(0, 1) for x in inputs]
        pairs = chance.sample(all_pairs, 40)
        values = [inputs[a] + targets[b] + chance.gauss(0, 1) for a, b in pairs]
        called += paired_comparison(values, *zip(*pairs, strict=True)).verdict != 0
    assert called / rounds < 0.06


def test_one_song_on_either_side_gives_an_infinite_error():
    for first, second in (("aaa", "xyz"), ("xyz", "aaa"), ("aba", "aaa")):
        assert paired_comparison([1.0, 2.0, 3.0], first, second) == Comparison(2.0, math.inf, 1)
    assert paired_comparison([1.0, 3.0], "ab", "ba") == Comparison(2.0, math.inf, 2)  # no pair is without a
    with pytest.raises(ValueError, match="zip"):
        paired_comparison([1.0, 2.0, 3.0], "abc", "ab")
