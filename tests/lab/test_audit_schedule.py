"""The verdicts on a whole training, each brought to both outcomes."""

import dataclasses

import pytest

from lib.lab.ablation import Result
from lib.lab.audit_schedule import CURES, audit_continuations, audit_cures, audit_schedule
from lib.lab.claims import NOT_TESTED, REFUTED, REPRODUCED
from lib.lab.variants import CREATIVE, NOVELTY, RECONSTRUCTION, RESIDUAL, SCHEDULED, WHOLE, WHOLE_3

HEALTHY = {
    "heard/merit": 0.7,
    "heard/movement_ratio": 0.9,
    "rms_ratio": 1.0,
    "input_correlation": 0.2,
    "target_correlation": 0.1,
}
TRACE = {"stage0/target_scale": 1.2, "stage1/target_scale": 1.1}


def result(variant: str, seed: int, masks: float = 0.9, factor: float = 1.2, **changes) -> Result:
    trace = TRACE | {"stage1/target_scale": factor}
    norms = (3.0, 4.0, *[1.0] * 38)  # as in a record of 200 epochs: two parts up to epoch 10
    start, quarter = (
        trace | {"masks/complementarity": 0.75, "loss/novelty": 0.1},
        trace | {"masks/complementarity": masks},
    )
    base = Result(variant, seed, 1, 800, None, start, trace, dict(HEALTHY), norms, "run", quarter)
    return dataclasses.replace(base, **changes)


def ended_badly(variant: str, seed: int) -> Result:
    broken = {"step": 400, "stage": 1, "tensor": "output of layer"}
    return result(variant, seed, steps=399, non_finite=broken, final=None, grad_norm=(1.0, float("inf")))


def all_results(**of_variant) -> list[Result]:
    """Two seeds of every variant; `of_variant` maps a name's key in NAMES to a function (name, seed) → Result."""
    return [of_variant.get(KEYS[v.name], result)(v.name, seed) for v in SCHEDULED for seed in range(2)]


KEYS = {WHOLE: "whole", WHOLE_3: "three", CREATIVE: "ill", RECONSTRUCTION: "a", NOVELTY: "b", RESIDUAL: "c"}


def verdict(verdicts, claim: str, said: str) -> str:
    (found,) = [v for v in verdicts if v.claim == claim and said in v.said]
    return found.verdict


def changed(**changes):
    return lambda name, seed: result(name, seed, **changes)


def final(**values):
    return changed(final=HEALTHY | {key.replace("heard_", "heard/"): value for key, value in values.items()})


@pytest.mark.parametrize(
    ("claim", "said", "broken"),
    [
        ("C10", "without NaN", {"whole": ended_badly}),
        ("C10", "gradient norm 2 to 5", {"whole": changed(grad_norm=(1.0,) * 40)}),
        ("C11", "above 1.3", {"whole": changed(factor=1.31)}),
        ("C12", "85 %", {"whole": changed(masks=0.84)}),
        ("C13", "as good as three", {"three": final(heard_merit=0.8)}),
        ("C15", "gradient norm below 100", {"whole": changed(grad_norm=(3.0, 4.0, 101.0))}),
        ("C15", "keeps the level", {"whole": final(rms_ratio=0.7)}),
        ("C15", "correlation with either source", {"whole": final(target_correlation=0.31)}),
        ("C15", "leave a constant output", {}),
    ],
)
def test_a_claim_holds_or_falls_by_what_was_measured(claim, said, broken):
    healthy = {} if broken else {"ill": final(heard_movement_ratio=0.1)}
    assert verdict(audit_schedule(all_results(**healthy), 200), claim, said) == REPRODUCED
    assert verdict(audit_schedule(all_results(**broken), 200), claim, said) == REFUTED


def test_the_nan_of_the_weak_third_stage_is_looked_for_in_three_epochs_of_steps():
    assert verdict(audit_schedule(all_results(three=ended_badly), 200), "C7", "NaN within") == REPRODUCED
    assert verdict(audit_schedule(all_results(), 200), "C7", "NaN within") == REFUTED
    short = audit_schedule(all_results(three=changed(steps=614)), 200)
    assert verdict(short, "C7", "NaN within") == NOT_TESTED


@pytest.mark.parametrize(("claim", "said"), [("C10", "without NaN"), ("C10", "2 to 5"), ("C12", "85 %")])
def test_a_schedule_that_was_cut_short_proves_nothing(claim, said):
    assert verdict(audit_schedule(all_results(), 199), claim, said) == NOT_TESTED


def test_a_nan_counts_however_short_the_schedule_was():
    assert verdict(audit_schedule(all_results(whole=ended_badly), 3), "C10", "without NaN") == REFUTED


@pytest.mark.parametrize("name", CURES)
def test_a_cure_needs_an_ill_output_and_more_movement(name):
    ill = [final(heard_movement_ratio=m)(CREATIVE, seed) for seed, m in enumerate((0.10, 0.15))]
    better = [final(heard_movement_ratio=0.16)(name, seed) for seed in range(2)]
    same = [final(heard_movement_ratio=0.14)(name, seed) for seed in range(2)]
    well = [result(CREATIVE, seed) for seed in range(2)]
    of_this = CURES[name]
    assert verdict(audit_cures(ill, {name: better}), "C15", of_this) == REPRODUCED
    assert verdict(audit_cures(ill, {name: same}), "C15", of_this) == REFUTED
    assert verdict(audit_cures(well, {name: better}), "C15", of_this) == NOT_TESTED


def test_the_measured_numbers_stand_in_the_verdicts():
    verdicts = {(v.claim, v.said): v for v in audit_schedule(all_results(), 200)}
    masks = next(v for (claim, _), v in verdicts.items() if claim == "C12")
    assert masks.measured.startswith("0.900 at epoch 50, 0.750 in the first epochs, 0.75 for constant masks")


def test_a_term_that_never_acts_cures_nothing():
    idle = {"masks/complementarity": 0.75, "loss/novelty": 0.0}
    ill = [dataclasses.replace(r, start=idle) for r in (final(heard_movement_ratio=0.1)(CREATIVE, s) for s in (0, 1))]
    (said, level, cure) = audit_cures(ill, {NOVELTY: [result(NOVELTY, seed) for seed in range(2)]})
    assert (said.verdict, level.verdict, cure.verdict) == (REPRODUCED, REPRODUCED, NOT_TESTED)
    assert "never acted" in cure.why


def test_a_quiet_output_is_told_from_a_constant_one():
    quiet = [final(rms_ratio=0.2)(CREATIVE, seed) for seed in range(2)]
    constant, level = audit_cures(quiet, {})
    assert (constant.verdict, level.verdict) == (REFUTED, REFUTED)


def test_a_late_nan_is_not_the_seeds():
    late = all_results(three=lambda name, seed: result(name, seed, non_finite={"step": 700, "stage": 1, "tensor": "x"}))
    assert verdict(audit_schedule(late, 200), "C7", "NaN within") == REFUTED


@pytest.mark.parametrize(
    ("gain", "pairs", "names", "wanted", "why"),
    [
        (0.2, 8, "abcd", REPRODUCED, "better than their plain average"),
        (0.002, 8, "abcd", REFUTED, "no statistically significant difference to their plain average"),
        (-0.2, 8, "abcd", REFUTED, "worse than their plain average"),
        (0.2, 7, "abcd", NOT_TESTED, "fewer than 8 pairs, or all of one song"),
        (0.2, 8, "a", NOT_TESTED, "fewer than 8 pairs, or all of one song"),
    ],
)
def test_continuations_are_held_against_the_plain_average(gain, pairs, names, wanted, why):
    noise = [0.01 * (-1) ** i for i in range(pairs)]
    judged = {
        "average of latents": [{"merit": 0.5} for _ in noise],
        "model": [{"merit": 0.5 + gain + n} for n in noise],
    }
    songs = [(names[i % len(names)],) * 2 for i in range(pairs)]
    verdict = audit_continuations(judged, "model", songs)
    assert (verdict.verdict, verdict.why) == (wanted, why)
    assert f"over {pairs} continuation pairs" in verdict.measured
