"""Verdicts on training: each is brought to both outcomes by results invented for it."""

import dataclasses
import math

import pytest
from verdicts import (
    CREATIVE,
    CURES,
    NOVELTY,
    RECONSTRUCTION,
    RESIDUAL,
    WHOLE,
    WHOLE_3,
    audit_cures,
    audit_gradients,
    audit_schedule,
    largest_factor,
    schedule_rows,
)

from lib.lab.audit import (
    audit_continuations,
    audit_grid,
    audit_named,
    audit_parameters,
    audit_spectral_norm,
    audit_untrained,
    disagreements,
)
from lib.lab.claims import CLAIMS, NOT_TESTED, REFUTED, REPRODUCED
from lib.lab.results import Result
from lib.lab.variants import EXPLODING, LEARNABLE, PROTECTIONS, REFERENCE, REPAIR, SCHEDULED, VARIANTS

VARIANT = {variant.name: variant for variant in VARIANTS}


def result(variant: str, seed: int = 0, *, norms=(1.0, 1.0), steps: int = 100, ratio: float = 1.0, **more) -> Result:
    """A run whose gradient norm goes through `norms`, the RMS before scaling through `mixed`."""
    stages = VARIANT[variant].stages
    part = {f"stage{i}/target_scale": more.get("factor", 1.2) for i in range(stages)}
    shares = {"layers": 1.0, "output_projection": 0.5} | more.get("shares", {})
    part |= {f"grad_norm/stage{i}/{name}": value for i in range(stages) for name, value in shares.items()}
    if variant == LEARNABLE:
        part |= {f"grad_norm/stage{i}/rms_scaling": more.get("scalars", 1.0) for i in range(stages)}
    mixed, projection = more.get("mixed", (1.0, 1.0)), more.get("projection", (0.6, 1.2))
    ends = [
        part | {"grad_norm": norms[i], "stage2/rms_before_scaling": mixed[i], "stage2/projection_rms": projection[i]}
        for i in (0, 1)
    ]
    non_finite = {"step": more["bad_step"], "stage": 1, "tensor": "x"} if "bad_step" in more else None
    final = {"rms_ratio": ratio, "mse": 18.0, "movement_ratio": ratio * more.get("movement", 0.5)}
    final |= {"input_correlation": more.get("leak", 0.7), "target_correlation": 0.1}
    return Result(
        variant=variant,
        seed=seed,
        num_layers=2,
        steps=steps,
        non_finite=non_finite,
        start=ends[0],
        end=ends[1],
        final=None if non_finite else final,
        grad_norm=(norms[0], max(norms), norms[1], *([math.inf] if non_finite else [])),
        run="r",
    )


def dead(variant: str, seed: int = 0) -> Result:
    """A run that broke in its first step."""
    return Result(variant, seed, 2, 0, {"step": 1, "stage": 0, "tensor": "loss"}, {}, {}, None, (math.inf,), "r")


def named(**changes) -> list[Result]:
    """The four settings with three seeds; `changes` by short name."""
    short = {"two": REFERENCE, "weak": EXPLODING, "repair": REPAIR, "learnable": LEARNABLE}
    return [result(name, seed, **changes.get(key, {})) for key, name in short.items() for seed in range(3)]


def verdict(results: list[Result], claim: str, words: str) -> str:
    verdicts = audit_named(results) + audit_gradients([*results, *protections(lambda *_: 1.0)])
    (found,) = [v.verdict for v in verdicts if v.claim == claim and words in v.said]
    return found


@pytest.mark.parametrize(
    ("claim", "words", "reproduced", "refuted"),
    [
        ("C5", "RMS 1.09 before", {"weak": {"mixed": (0.9, 1.2)}}, {"weak": {"mixed": (0.9, 1.0)}}),
        ("C5", "projection RMS", {"weak": {"projection": (0.6, 0.9)}}, {"weak": {"projection": (0.6, 0.8)}}),
        ("C5", "too quiet", {"weak": {"ratio": 0.7}}, {"weak": {"ratio": 0.9}}),
        ("C6", "2.5 to 3.0", {"repair": {"mixed": (1.8, 2.6)}}, {"repair": {"mixed": (1.8, 2.4)}}),
        ("C7", "0.1×: the gradient norm rises", {"weak": {"norms": (2, 15)}}, {"weak": {"norms": (2, 1)}}),
        ("C7", "NaN", {"weak": {"bad_step": 40}}, {}),
        ("C7", "0.3×", {"repair": {"norms": (4, 6)}}, {"repair": {"norms": (4, 3)}}),
        ("C7", "larger gradients than two", {"weak": {"norms": (9, 9)}}, {"weak": {"norms": (1, 1)}}),
        ("C7", "2 to 5", {"two": {"norms": (2, 5)}}, {"two": {"norms": (2, 6)}}),
        ("C8", "NaN", {"learnable": {"bad_step": 3}}, {}),
        ("C8", "100 to 10,000", {"learnable": {"scalars": 1.0}}, {"learnable": {"scalars": 1e-4}}),
        ("C8", "together", {"learnable": {"scalars": 2.0}}, {"learnable": {"scalars": 0.5}}),
        ("C14", "0.3× are stable", {"repair": {"norms": (2, 1)}}, {"repair": {"norms": (1, 2)}}),
        ("C14", "target level", {"repair": {"ratio": 0.9}}, {"repair": {"ratio": 0.6}}),
        ("C15", "below 100", {"weak": {"norms": (101, 101)}}, {"weak": {"norms": (99, 99)}}),
        ("C15", "RMS ratio", {"weak": {"ratio": 0.5}}, {"weak": {"ratio": 0.9}}),
        ("C15", "correlation", {"two": {"leak": 0.2}}, {"two": {"leak": 0.4}}),
        ("C15", "movement", {"repair": {"movement": 0.9}}, {"repair": {"movement": 0.5}}),
    ],
)
def test_each_verdict_comes_out_both_ways(claim, words, reproduced, refuted):
    assert verdict(named(**reproduced), claim, words) == REPRODUCED
    assert verdict(named(**refuted), claim, words) == REFUTED


def test_the_last_projection_is_that_of_the_last_stage():
    runs = named()
    assert verdict(runs, "C7", "last projection") == REFUTED
    for run in runs:
        if run.variant == EXPLODING:
            run.end["grad_norm/stage2/output_projection"] = 5.0
    assert verdict(runs, "C7", "last projection") == REPRODUCED


def test_runs_that_end_at_their_first_step_are_judged():
    """No row was logged: nothing is known of them but that they ended."""
    for variant in VARIANTS:
        broken = [dead(variant.name, seed) for seed in range(3)]
        runs = [*named(), *protections(lambda *_: 1.0), *fallbacks()]
        runs = [r for r in runs if r.variant != variant.name] + broken
        assert audit_named(runs)
        assert audit_gradients(runs)
        assert audit_grid(runs)


def test_one_seed_that_disagrees_is_enough_against_a_rise():
    runs = [r for r in named(weak={"norms": (2, 15)}) if (r.variant, r.seed) != (EXPLODING, 2)]
    assert verdict([*runs, result(EXPLODING, 2, norms=(2, 1))], "C7", "0.1×: the gradient norm rises") == REFUTED


def protections(level_of) -> list[Result]:
    """The 2×2×2 with a largest gradient norm by its levels, three seeds."""
    return [
        result(v.name, s, norms=(1.0, level_of(*k) * (1 + s / 100))) for k, v in PROTECTIONS.items() for s in range(3)
    ]


def fallbacks() -> list[Result]:
    return [result(n, s) for n in ("stage 1 at 512", "3 stages", "4 stages", "5 stages") for s in range(3)]


def of_protections(level_of) -> dict[str, str]:
    return {v.said: v.verdict for v in audit_gradients([*named(), *protections(level_of)]) if v.claim == "C9"}


def test_protections_are_judged_alone_and_together():
    found = of_protections(lambda norm, clamp, clip: 10 ** (3 - 2 * clamp + norm))
    assert found["all three protections together: smaller gradients than with none"] == REPRODUCED
    assert found["the clamp alone: smaller gradients than with none"] == REPRODUCED
    assert found["spectral norm alone: smaller gradients than with none"] == REFUTED
    assert found["clipping alone keeps training stable"] == REFUTED
    assert found["without protection the cascade at 0.1× becomes unstable"] == REPRODUCED
    worse = of_protections(lambda norm, clamp, clip: 10 ** (3 + norm))
    assert worse["all three protections together: smaller gradients than with none"] == REFUTED
    small = of_protections(lambda *_: 0.5)
    assert small["clipping alone keeps training stable"] == NOT_TESTED  # nothing to clip
    assert small["without protection the cascade at 0.1× becomes unstable"] == REFUTED


def test_clipping_can_be_found_to_protect():
    found = of_protections(lambda norm, clamp, clip: 0.5 if clip else 99.0)
    assert found["clipping alone keeps training stable"] == REPRODUCED


def test_fallbacks_and_what_was_not_run():
    good = audit_grid(fallbacks())
    assert {v.verdict for v in good if v.claim == "C14"} == {REPRODUCED}
    rising = [r for r in fallbacks() if r.variant != "4 stages"] + [result("4 stages", norms=(1, 2))]
    assert [v.verdict for v in audit_grid(rising) if "four stages" in v.said] == [REFUTED]
    assert {v.verdict for v in audit_grid(named())} == {NOT_TESTED}


def test_depths_disagree_only_where_both_have_a_verdict():
    shallow, deep = audit_named(named()), audit_named(named(repair={"norms": (1, 9)}))
    assert any("0.3× are stable" in line and "reproduced → refuted" in line for line in disagreements(shallow, deep))
    assert disagreements(shallow, shallow) == []
    none = [dataclasses.replace(v, verdict=NOT_TESTED) for v in deep]
    assert disagreements(shallow, none) == []


def test_parameters_are_counted_against_what_is_said():
    found = {v.said: (v.verdict, v.measured) for v in audit_parameters([4_772_480, 10_697_600])}
    assert found == {
        "stages of 6.3 M and 14.2 M": (REFUTED, "4.77 M and 10.70 M"),
        "three stages: 27.4 M": (REPRODUCED, "27.4 M with the agent"),
        "two stages: 18.3 M": (REFUTED, "16.8 M with the agent"),
        "two stages instead of three: 33 % fewer": (REFUTED, "39% fewer"),
    }
    eight = {v.said: v.verdict for v in audit_parameters([6_352_000, 14_246_528])}
    assert eight["stages of 6.3 M and 14.2 M"] == REPRODUCED


# --- a whole training -------------------------------------------------------------------------------------------------

HEALTHY = {
    "model/merit": 0.7,
    "model/movement_ratio": 0.9,
    "rms_ratio": 1.0,
    "input_correlation": 0.2,
    "target_correlation": 0.1,
}
TRACE = {"stage0/target_scale": 1.2, "stage1/target_scale": 1.1}


def scheduled(variant: str, seed: int, masks: float = 0.9, factor: float = 1.2, **changes) -> Result:
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
    return scheduled(variant, seed, steps=399, non_finite=broken, final=None, grad_norm=(1.0, float("inf")))


def all_results(**of_variant) -> list[Result]:
    """Two seeds of every variant; `of_variant` maps a name's key in NAMES to a function (name, seed) → Result."""
    return [of_variant.get(KEYS[v.name], scheduled)(v.name, seed) for v in SCHEDULED for seed in range(2)]


KEYS = {WHOLE: "whole", WHOLE_3: "three", CREATIVE: "ill", RECONSTRUCTION: "a", NOVELTY: "b", RESIDUAL: "c"}


def verdict_of(verdicts, claim: str, said: str) -> str:
    (found,) = [v for v in verdicts if v.claim == claim and said in v.said]
    return found.verdict


def changed(**changes):
    return lambda name, seed: scheduled(name, seed, **changes)


def final(**values):
    return changed(final=HEALTHY | {key.replace("model_", "model/"): value for key, value in values.items()})


@pytest.mark.parametrize(
    ("claim", "said", "broken"),
    [
        ("C10", "without NaN", {"whole": ended_badly}),
        ("C10", "gradient norm 2 to 5", {"whole": changed(grad_norm=(1.0,) * 40)}),
        ("C11", "above 1.3", {"whole": changed(factor=1.31)}),
        ("C12", "85 %", {"whole": changed(masks=0.84)}),
        ("C13", "as good as three", {"three": final(model_merit=0.8)}),
        ("C15", "gradient norm below 100", {"whole": changed(grad_norm=(3.0, 4.0, 101.0))}),
        ("C15", "keeps the level", {"whole": final(rms_ratio=0.7)}),
        ("C15", "correlation with either source", {"whole": final(target_correlation=0.31)}),
        ("C15", "leave a constant output", {}),
    ],
)
def test_a_claim_holds_or_falls_by_what_was_measured(claim, said, broken):
    healthy = {} if broken else {"ill": final(model_movement_ratio=0.1)}
    assert verdict_of(audit_schedule(all_results(**healthy), 200), claim, said) == REPRODUCED
    assert verdict_of(audit_schedule(all_results(**broken), 200), claim, said) == REFUTED


def test_the_nan_of_the_weak_third_stage_is_looked_for_in_three_epochs_of_steps():
    assert verdict_of(audit_schedule(all_results(three=ended_badly), 200), "C7", "NaN within") == REPRODUCED
    assert verdict_of(audit_schedule(all_results(), 200), "C7", "NaN within") == REFUTED
    short = audit_schedule(all_results(three=changed(steps=614)), 200)
    assert verdict_of(short, "C7", "NaN within") == NOT_TESTED


@pytest.mark.parametrize(("claim", "said"), [("C10", "without NaN"), ("C10", "2 to 5"), ("C12", "85 %")])
def test_a_schedule_that_was_cut_short_proves_nothing(claim, said):
    assert verdict_of(audit_schedule(all_results(), 199), claim, said) == NOT_TESTED


def test_a_nan_counts_however_short_the_schedule_was():
    assert verdict_of(audit_schedule(all_results(whole=ended_badly), 3), "C10", "without NaN") == REFUTED


@pytest.mark.parametrize("name", CURES)
def test_a_cure_needs_an_ill_output_and_more_movement(name):
    ill = [final(model_movement_ratio=m)(CREATIVE, seed) for seed, m in enumerate((0.10, 0.15))]
    better = [final(model_movement_ratio=0.16)(name, seed) for seed in range(2)]
    same = [final(model_movement_ratio=0.14)(name, seed) for seed in range(2)]
    well = [scheduled(CREATIVE, seed) for seed in range(2)]
    of_this = CLAIMS["C15"].parts[name].said
    assert verdict_of(audit_cures(ill, {name: better}), "C15", of_this) == REPRODUCED
    assert verdict_of(audit_cures(ill, {name: same}), "C15", of_this) == REFUTED
    assert verdict_of(audit_cures(well, {name: better}), "C15", of_this) == NOT_TESTED


def test_the_measured_numbers_stand_in_the_verdicts():
    verdicts = {(v.claim, v.said): v for v in audit_schedule(all_results(), 200)}
    masks = next(v for (claim, _), v in verdicts.items() if claim == "C12")
    assert masks.measured.startswith("0.900 at epoch 50, 0.750 in the first epochs, 0.75 for constant masks")


def test_a_term_that_never_acts_cures_nothing():
    idle = {"masks/complementarity": 0.75, "loss/novelty": 0.0}
    ill = [dataclasses.replace(r, start=idle) for r in (final(model_movement_ratio=0.1)(CREATIVE, s) for s in (0, 1))]
    (said, level, cure) = audit_cures(ill, {NOVELTY: [scheduled(NOVELTY, seed) for seed in range(2)]})
    assert (said.verdict, level.verdict, cure.verdict) == (REPRODUCED, REPRODUCED, NOT_TESTED)
    assert "never acted" in cure.why


def test_a_quiet_output_is_not_called_constant():
    quiet = [final(rms_ratio=0.2)(CREATIVE, seed) for seed in range(2)]
    constant, level = audit_cures(quiet, {})
    assert (constant.verdict, level.verdict) == (REFUTED, REFUTED)


def test_a_late_nan_is_not_the_documents():
    late = all_results(
        three=lambda name, seed: scheduled(name, seed, non_finite={"step": 700, "stage": 1, "tensor": "x"})
    )
    assert verdict_of(audit_schedule(late, 200), "C7", "NaN within") == REFUTED


def test_the_largest_factor_is_that_of_any_stage():
    assert largest_factor(result(EXPLODING, factor=4.0)) == 4.0


def test_a_row_of_the_schedule_has_means_over_the_runs_that_ended():
    keys = ("rhythm", "harmony", "merit", "movement_ratio")
    good, better, bad = (result(REFERENCE, seed) for seed in range(3))
    good = dataclasses.replace(good, final={f"model/{key}": 0.5 for key in keys})
    better = dataclasses.replace(better, final={f"model/{key}": 1.0 for key in keys})
    bad = dataclasses.replace(bad, final=None, non_finite={"step": 3, "stage": 0, "tensor": "x"}, steps=3)
    (row,) = schedule_rows({"whole": [good, better, bad]})
    assert row == {"variant": "whole", "seeds": 3, "steps": 3, "non-finite": 1} | dict.fromkeys(
        ("rhythm", "harmony", "merit", "movement"), "0.75"
    )


@pytest.mark.parametrize(
    ("gain", "pairs", "names", "wanted", "why"),
    [
        (0.2, 8, "abcd", REPRODUCED, "better than their plain average"),
        (0.002, 8, "abcd", REFUTED, "no statistically significant difference from their plain average"),
        (-0.2, 8, "abcd", REFUTED, "worse than their plain average"),
        (0.2, 7, "abcd", NOT_TESTED, "fewer than 8 pairs, or all of one song"),
        (0.2, 8, "a", NOT_TESTED, "fewer than 8 pairs, or all of one song"),
    ],
)
def test_continuations_are_compared_with_the_plain_average(gain, pairs, names, wanted, why):
    noise = [0.01 * (-1) ** i for i in range(pairs)]
    judged = {
        "average of latents": [{"merit": 0.5} for _ in noise],
        "model": [{"merit": 0.5 + gain + n} for n in noise],
    }
    songs = [(names[i % len(names)],) * 2 for i in range(pairs)]
    found = audit_continuations(judged, "model", songs)
    assert (found.verdict, found.why) == (wanted, why)
    assert f"over {pairs} continuation pairs" in found.measured


# --- an untrained cascade ---------------------------------------------------------------------------------------------


def test_levels_and_scales_of_the_untrained_reference():
    good = audit_untrained([[5.7, 5.75], [5.68, 5.7]], [[1.01, 1.02], [1.0, 1.0]], 0.95)
    assert [v.verdict for v in good] == [REPRODUCED, REPRODUCED]
    bad = audit_untrained([[5.7, 5.75], [4.0, 5.7]], [[1.41, 1.41], [1.2, 1.2]], 0.01)
    assert [v.verdict for v in bad] == [REFUTED, REFUTED]
    assert bad[1].measured == "1.41 in stage 0; 1.02 needs clips of cosine 0.91, these have 0.01"


def test_spectral_norm_is_judged_by_what_it_applied():
    good, bad = audit_spectral_norm(1.0, 1.0, [0.9, 1.0]), audit_spectral_norm(1.1, 1.77, [0.9, 1.11])
    assert [v.verdict for v in good] == [REPRODUCED] * 3
    assert [v.verdict for v in bad] == [REFUTED] * 3
    assert [v.measured for v in bad][:2] == ["1.1000 at most", "1.77 at most"]
