"""The verdicts on training: every one is brought to come out both ways by results made for it."""

import math

import pytest

from lib.ablation import Result
from lib.audit import (
    EPOCH_3_BATCH_205,
    audit_grid,
    audit_named,
    disagreements,
    effects_in_decades,
    first_non_finite,
    largest_factor,
    last_projection_share,
    peak,
    safe,
    scalar_ratio,
)
from lib.cascade import Cascade
from lib.claims import NOT_TESTED, REFUTED, REPRODUCED
from lib.variants import EXPLODING, LEARNABLE, PROTECTION_NAMES, PROTECTIONS, REFERENCE, REPAIR, VARIANTS

VARIANT = {variant.name: variant for variant in VARIANTS}


def result(variant: str, seed: int = 0, *, norms=(1.0, 1.0), steps: int = 100, ratio: float = 1.0, **more) -> Result:
    """A run whose gradient norm goes from the first to the second of `norms`."""
    stages = VARIANT[variant].stages
    part = {f"stage{i}/wanted_factor": more.get("factor", 1.2) for i in range(stages)}
    shares = more.get("shares", {"layers": 1.0, "output_projection": 0.5})
    part |= {f"grad_norm/stage{i}/{name}": value for i in range(stages) for name, value in shares.items()}
    non_finite = {"step": more["bad_step"], "stage": 1, "tensor": "x"} if "bad_step" in more else None
    return Result(
        variant=variant,
        seed=seed,
        num_layers=2,
        steps=steps,
        non_finite=non_finite,
        start=part | {"grad_norm": norms[0]},
        end=part | {"grad_norm": norms[1]},
        final=None if non_finite else {"rms_ratio": ratio, "mse": 18.0},
        grad_norm=(norms[0], max(norms), norms[1]),
        run="r",
    )


def named(**changes) -> list[Result]:
    """The four settings with three seeds; `changes` by short name."""
    short = {"two": REFERENCE, "weak": EXPLODING, "repair": REPAIR, "learnable": LEARNABLE}
    return [result(name, seed, **changes.get(key, {})) for key, name in short.items() for seed in range(3)]


def verdict(results: list[Result], claim: str, words: str) -> str:
    (found,) = [v.verdict for v in audit_named(results) if v.claim == claim and words in v.said]
    return found


@pytest.mark.parametrize(
    ("claim", "words", "reproduced", "refuted"),
    [
        ("C7", "0.1×: gradient norm rises", {"weak": {"norms": (2, 15)}}, {"weak": {"norms": (2, 1)}}),
        ("C7", "NaN", {"weak": {"bad_step": 40}}, {"two": {"steps": 700}, "weak": {"steps": 700}}),
        ("C7", "0.3×", {"repair": {"norms": (4, 6)}}, {"repair": {"norms": (4, 3)}}),
        ("C7", "larger gradients than two", {"weak": {"norms": (9, 9)}}, {"weak": {"norms": (1, 1)}}),
        ("C7", "stays in 2 to 5", {"two": {"norms": (2, 5)}}, {"two": {"norms": (2, 6)}}),
        ("C7", "most of the gradient", {"weak": {"shares": {"layers": 0.1, "output_projection": 0.1}}}, {}),
        ("C8", "NaN", {"learnable": {"bad_step": 3}}, {"two": {"steps": 700}, "learnable": {"steps": 700}}),
        ("C8", "larger gradients", {"learnable": {"norms": (99, 99)}}, {}),
        ("C11", "above 1.3", {"two": {"factor": 1.3}}, {"two": {"factor": 1.31}}),
        ("C14", "0.3×", {"repair": {"ratio": 0.9}}, {"repair": {"ratio": 0.6}}),
    ],
)
def test_each_verdict_comes_out_both_ways(claim, words, reproduced, refuted):
    if words == "most of the gradient":  # over half of it must sit in the last of three equal stages
        reproduced = {"weak": {"shares": {"layers": 0.0, "output_projection": 1.0}}}
        runs = named(**reproduced)
        for run in runs:
            if run.variant == EXPLODING:
                run.end["grad_norm/stage2/output_projection"] = 3.0
        assert verdict(runs, claim, words) == REPRODUCED
    else:
        assert verdict(named(**reproduced), claim, words) == REPRODUCED
    assert verdict(named(**refuted), claim, words) == REFUTED


def test_short_runs_do_not_settle_what_takes_long():
    for claim, words in (("C7", "NaN"), ("C8", "NaN"), ("C10", "200 epochs")):
        assert verdict(named(), claim, words) == NOT_TESTED
    assert verdict(named(two={"bad_step": 5}), "C10", "200 epochs") == REFUTED
    long = {"steps": EPOCH_3_BATCH_205}
    assert verdict(named(two=long, weak=long), "C7", "NaN") == REFUTED


def test_one_seed_that_disagrees_is_enough_against_a_rise():
    runs = [r for r in named(weak={"norms": (2, 15)}) if (r.variant, r.seed) != (EXPLODING, 2)]
    assert verdict([*runs, result(EXPLODING, 2, norms=(2, 1))], "C7", "0.1×: gradient norm rises") == REFUTED


def grid(level_of) -> list[Result]:
    """The 2×2×2 with a largest gradient norm by its levels, three seeds, and the fallbacks."""
    cells = [
        result(v.name, s, norms=(1.0, level_of(*k) * (1 + s / 100))) for k, v in PROTECTIONS.items() for s in range(3)
    ]
    return cells + [result(n, s) for n in ("stage 1 at 512", "3 stages", "4 stages", "5 stages") for s in range(3)]


def test_protections_are_judged_by_their_effects():
    found = {v.said: v.verdict for v in audit_grid(grid(lambda norm, clamp, clip: 10 ** (3 - 2 * clamp + norm)))}
    assert found["all three together: smaller gradients than with none"] == REPRODUCED
    assert found["clamp alone makes gradients smaller"] == REPRODUCED
    assert found["norm alone makes gradients smaller"] == REFUTED
    assert found["clipping alone makes gradients smaller"] == REFUTED
    worse = {v.said: v.verdict for v in audit_grid(grid(lambda norm, clamp, clip: 10 ** (3 + norm)))}
    assert worse["all three together: smaller gradients than with none"] == REFUTED


def test_effects_are_in_decades():
    runs: dict[str, list[Result]] = {}
    for r in grid(lambda norm, clamp, clip: 10 ** (3 - 2 * clamp)):
        runs.setdefault(r.variant, []).append(r)
    effects = effects_in_decades(PROTECTIONS, PROTECTION_NAMES, runs, peak)
    assert all(value == pytest.approx(-2) for value in effects["clamp"])
    assert all(value == pytest.approx(0, abs=1e-9) for value in effects["norm × clamp"])


def test_fallbacks_and_what_was_not_run():
    good = audit_grid(grid(lambda *_: 1.0))
    assert {v.verdict for v in good if v.claim == "C14"} == {REPRODUCED}
    quiet = [r for r in grid(lambda *_: 1.0) if r.variant != "4 stages"] + [result("4 stages", ratio=0.5)]
    assert [v.verdict for v in audit_grid(quiet) if "four stages" in v.said] == [REFUTED]
    assert {v.verdict for v in audit_grid(named())} == {NOT_TESTED}


def test_measures():
    run = result(EXPLODING, norms=(1, 7), factor=4.0)
    assert peak(run) == 7
    assert math.isnan(peak(Result("v", 0, 2, 0, None, {}, {}, None, (), "r")))
    assert largest_factor(run) == 4.0
    assert last_projection_share(run) == pytest.approx(0.25 / 3.75)
    assert not safe([run, result(EXPLODING, bad_step=3)])
    assert first_non_finite([run]) == "no non-finite value in 100 steps"
    assert first_non_finite([run, result(EXPLODING, bad_step=3)]) == "non-finite in 1 of 2 runs, first at step 3"


def test_the_ratio_of_the_scalars_is_by_element():
    """Ones everywhere: every element of every parameter has the gradient 1, so the ratio is 1."""
    run = result(LEARNABLE)
    model = Cascade(VARIANT[LEARNABLE].cascade(2))
    norms = {
        f"grad_norm/stage{i}/{name}": math.sqrt(sum(p.numel() for p in part.parameters()))
        for i, stage in enumerate(model.stages)
        for name, part in stage.named_children()
        if list(part.parameters())
    }
    kept = {k: v for k, v in run.start.items() if not k.startswith("grad_norm/")}
    run.start.clear()
    run.start.update(kept | norms)
    assert scalar_ratio(run) == pytest.approx(1.0, rel=1e-6)
    run.start["grad_norm/stage0/rms_scaling"] *= 100
    run.start["grad_norm/stage1/rms_scaling"] *= 100
    assert scalar_ratio(run) == pytest.approx(100.0, rel=1e-6)


def test_depths_disagree_only_where_both_have_a_verdict():
    shallow, deep = audit_named(named()), audit_named(named(weak={"norms": (1, 9)}))
    found = disagreements(shallow, deep)
    assert any("0.1×: gradient norm rises" in line and "refuted → reproduced" in line for line in found)
    assert disagreements(shallow, shallow) == []
    assert not any("NaN" in line for line in disagreements(shallow, audit_named(named(weak={"bad_step": 4}))))
