"""What is said of the grid, brought to every wording by results invented for it."""

import pytest

from lab.test_audit import dead, protections, result
from lib.lab.findings import (
    against_chance,
    effect_rows,
    effects,
    findings,
    grid_measures,
    leakage_rows,
    single_changes,
    summary,
    weak_residuals,
)
from lib.lab.results import Result, by_variant
from lib.lab.variants import EXPLODING, PROTECTION_NAMES, PROTECTIONS, REFERENCE


def by_name(runs: list[Result]) -> dict[str, list[Result]]:
    return by_variant(runs) | {REFERENCE: [result(REFERENCE, seed) for seed in range(3)]}


def test_effects_are_in_decades():
    found = effects(
        PROTECTIONS, PROTECTION_NAMES, by_name(protections(lambda norm, clamp, clip: 10 ** (3 - 2 * clamp)))
    )
    decades = found["largest gradient norm (decades)"]
    assert decades["clamp"] == pytest.approx([-2] * 3)
    assert decades["norm × clamp"] == pytest.approx([0] * 3, abs=1e-9)
    assert found["validation MSE (squared latent units)"]["clamp"] == pytest.approx([0] * 3)
    rows = effect_rows(found)
    assert [row["effect of"] for row in rows][:4] == ["norm", "clamp", "clipping", "norm × clamp"]
    assert rows[1]["largest gradient norm (decades)"] == "-2.0 (-2.0 to -2.0)"


def test_effects_need_every_cell_and_every_run_to_its_end():
    runs = by_name(protections(lambda *_: 1.0))
    bare = PROTECTIONS[False, False, False].name
    assert effects(PROTECTIONS, PROTECTION_NAMES, {name: runs[name] for name in runs if name != bare}) == {}
    assert effects(PROTECTIONS, PROTECTION_NAMES, runs | {bare: [result(bare, s, bad_step=3) for s in range(3)]}) == {}
    assert "lacks variants" in effect_rows({})[0]["effect of"]


def test_a_run_without_an_end_has_no_error_and_no_level_in_a_table():
    groups = {REFERENCE: [result(REFERENCE, 0, ratio=0.9), result(REFERENCE, 1, bad_step=3)]}
    (row,) = summary(groups)
    assert row["output / target RMS"] == "0.900"
    assert row["largest"] == "inf (1.00 to inf)"
    assert row["end"] == "non-finite in 1 of 2 runs, first at step 3"
    assert summary({REFERENCE: [dead(REFERENCE)]})[0]["gradient norm, first tenth"] == "none"
    assert grid_measures(groups)["output / target RMS"] == {REFERENCE: [0.9]}
    (row,) = leakage_rows(groups, [REFERENCE, "a variant that did not run"])
    assert (row["correlation with input"], row["at the target level"]) == ("0.700", "no")


def test_single_changes_are_compared_with_the_reference_and_with_chance():
    groups = {REFERENCE: [result(REFERENCE, s, norms=(1 + s / 10, 1.0)) for s in range(3)]}
    groups["3 stages"] = [result("3 stages", s, norms=(2 + s / 10, 1.0)) for s in range(3)]
    (row,) = rows = single_changes(groups)
    assert (row["group"], row["change"]) == ("stages", "3 stages")
    assert row["largest gradient norm"] == "2.10 (2.00 to 2.20): higher"
    assert row["gradient growth"].endswith(": lower")
    assert row["validation MSE"].endswith(": within seed spread")
    assert against_chance(rows, 3) == "2 of 4 comparisons say 'higher' or 'lower'; by chance alone 0 would"


def grid_of(**norms: tuple[float, float]) -> dict[str, list[Result]]:
    """Three seeds of the reference and of the variants that `norms` names, in two points each."""
    names = {"three": "3 stages", "weak": EXPLODING, "scalars": "learnable RMS", "log": "anti-modulation log"}
    norms = {REFERENCE: (2.0, 1.0)} | {names[key]: pair for key, pair in norms.items()}
    return {
        name: [result(name, seed, norms=[n + seed / 10 for n in pair]) for seed in range(3)]
        for name, pair in norms.items()
    }


def test_findings_on_a_rise_on_clipping_and_on_ends():
    assert findings(grid_of()) == [
        "The gradient norm rises over training in every seed of: no variant.",
        "It passes 10, where clipping acts, in 0 of 9 recorded points.",
        "Non-finite values end 0 of 3 runs.",
    ]
    groups = grid_of(weak=(2.0, 20.0), three=(1.0, 1.5))
    groups[REFERENCE][0] = result(REFERENCE, norms=(2.0, 1.0), bad_step=3)
    assert findings(groups)[-3:] == [
        f"The gradient norm rises over training in every seed of: {EXPLODING}, 3 stages.",
        "It passes 10, where clipping acts, in 7 of 28 recorded points.",  # two of each of three runs, one of another
        "Non-finite values end 1 of 9 runs.",
    ]


def weak_grid(**changes) -> dict[str, list[Result]]:
    """The reference and one way to keep a weak residual, three seeds each."""
    made = {REFERENCE: {}, "weak, RMS-preserving": changes}
    return {name: [result(name, seed, **given) for seed in range(3)] for name, given in made.items()}


@pytest.mark.parametrize(
    ("changes", "words", "wins"),
    [
        (
            {"leak": 0.2},
            "leakage lower, gradients within seed spread, error within seed spread; at the target level",
            True,
        ),
        ({"leak": 0.2, "ratio": 0.3}, "leakage lower, {} not at the target level", False),
        ({"leak": 0.9}, "leakage higher, {} at the target level", False),
        ({}, "leakage within seed spread, {} at the target level", False),
        ({"leak": 0.2, "norms": (9.0, 1.0)}, "leakage lower, gradients higher, {} at the target level", False),
        ({"leak": 0.2, "norms": (0.5, 0.4)}, "leakage lower, gradients lower, {} at the target level", True),
    ],
)
def test_ways_to_keep_a_weak_residual_in_every_wording(changes, words, wins):
    line, last = weak_residuals(weak_grid(**changes), ["weak, RMS-preserving", "a variant that did not run"])
    first, _, second = words.partition(" {} ")
    assert line.startswith(f"weak, RMS-preserving: {first}")
    assert line.endswith(second)
    winner = "weak, RMS-preserving" if wins else "none"
    assert last == f"less leakage at the target level without larger gradients: {winner}"


def test_a_weak_residual_that_ends_in_a_non_finite_value_has_larger_gradients():
    line, last = weak_residuals(
        weak_grid(leak=0.2) | {"weak, RMS-preserving": broken_seeds()}, ["weak, RMS-preserving"]
    )
    assert "gradients higher" in line
    assert last.endswith(": none")


def broken_seeds() -> list[Result]:
    return [result("weak, RMS-preserving", seed, leak=0.2, bad_step=3 if seed else 5) for seed in range(3)]
