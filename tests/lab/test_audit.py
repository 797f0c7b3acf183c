"""The verdicts on training: every one is brought to come out both ways by results made for it."""

import math

import pytest

from lib.lab.ablation import Result
from lib.lab.audit import (
    EPOCH_3_BATCH_205,
    at_level,
    audit_grid,
    audit_named,
    disagreements,
    effects_in_decades,
    findings,
    first_non_finite,
    largest_factor,
    last_projection_share,
    peak,
    scalar_ratio,
    stable,
    weak_residuals,
)
from lib.lab.claims import NOT_TESTED, REFUTED, REPRODUCED
from lib.lab.variants import EXPLODING, LEARNABLE, PROTECTION_NAMES, PROTECTIONS, REFERENCE, REPAIR, VARIANTS
from lib.model.cascade import Cascade

VARIANT = {variant.name: variant for variant in VARIANTS}


def result(variant: str, seed: int = 0, *, norms=(1.0, 1.0), steps: int = 100, ratio: float = 1.0, **more) -> Result:
    """A run whose gradient norm goes from the first to the second of `norms`, its last mixed RMS through `mixed`."""
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


def named(**changes) -> list[Result]:
    """The four settings with three seeds; `changes` by short name."""
    short = {"two": REFERENCE, "weak": EXPLODING, "repair": REPAIR, "learnable": LEARNABLE}
    return [result(name, seed, **changes.get(key, {})) for key, name in short.items() for seed in range(3)]


def verdict(results: list[Result], claim: str, words: str) -> str:
    (found,) = [v.verdict for v in audit_named(results) if v.claim == claim and words in v.said]
    return found


LONG = {"steps": EPOCH_3_BATCH_205}


@pytest.mark.parametrize(
    ("claim", "words", "reproduced", "refuted"),
    [
        ("C5", "mixed RMS 1.09", {"weak": {"mixed": (0.9, 1.2)}}, {"weak": {"mixed": (0.9, 1.0)}}),
        ("C5", "projection RMS", {"weak": {"projection": (0.6, 0.9)}}, {"weak": {"projection": (0.6, 0.8)}}),
        ("C5", "too quiet", {"weak": {"ratio": 0.7}}, {"weak": {"ratio": 0.9}}),
        ("C6", "2.5 to 3.0", {"repair": {"mixed": (1.8, 2.6)}}, {"repair": {"mixed": (1.8, 2.4)}}),
        ("C7", "0.1×: the gradient norm rises", {"weak": {"norms": (2, 15)}}, {"weak": {"norms": (2, 1)}}),
        ("C7", "NaN", {"weak": {"bad_step": 40}}, {"two": LONG, "weak": LONG}),
        ("C7", "0.3×", {"repair": {"norms": (4, 6)}}, {"two": LONG, "repair": {"norms": (4, 3)}}),
        ("C7", "larger gradients than two", {"weak": {"norms": (9, 9)}}, {"weak": {"norms": (1, 1)}}),
        ("C7", "2 to 5", {"two": LONG | {"norms": (2, 5)}}, {"two": LONG | {"norms": (2, 6)}}),
        ("C8", "NaN", {"learnable": {"bad_step": 3}}, {"two": LONG, "learnable": LONG}),
        ("C8", "100 to 10,000", {"learnable": {"scalars": 1.0}}, {"learnable": {"scalars": 1e-4}}),
        ("C8", "together", {"learnable": {"scalars": 2.0}}, {"learnable": {"scalars": 0.5}}),
        ("C14", "0.3× are stable", {"repair": {"norms": (2, 1)}}, {"repair": {"norms": (1, 2)}}),
        ("C14", "wanted level", {"repair": {"ratio": 0.9}}, {"repair": {"ratio": 0.6}}),
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


def test_short_runs_do_not_settle_what_takes_long():
    for claim, words in (("C7", "NaN"), ("C8", "NaN"), ("C7", "0.3×"), ("C7", "2 to 5")):
        assert verdict(named(), claim, words) == NOT_TESTED


def test_runs_that_end_at_their_first_step_are_judged():
    """No row was logged: nothing is known of them but that they ended."""
    for variant in VARIANTS:
        dead = [
            Result(variant.name, s, 2, 0, {"step": 1, "stage": 0, "tensor": "loss"}, {}, {}, None, (math.inf,), "r")
            for s in range(3)
        ]
        runs = [r for r in [*named(), *grid(lambda *_: 1.0)] if r.variant != variant.name] + dead
        assert audit_named(runs)
        assert audit_grid(runs)


def test_one_seed_that_disagrees_is_enough_against_a_rise():
    runs = [r for r in named(weak={"norms": (2, 15)}) if (r.variant, r.seed) != (EXPLODING, 2)]
    assert verdict([*runs, result(EXPLODING, 2, norms=(2, 1))], "C7", "0.1×: the gradient norm rises") == REFUTED


def grid(level_of) -> list[Result]:
    """The 2×2×2 with a largest gradient norm by its levels, three seeds, and the fallbacks."""
    cells = [
        result(v.name, s, norms=(1.0, level_of(*k) * (1 + s / 100))) for k, v in PROTECTIONS.items() for s in range(3)
    ]
    return cells + [result(n, s) for n in ("stage 1 at 512", "3 stages", "4 stages", "5 stages") for s in range(3)]


def test_protections_are_judged_alone_and_together():
    found = {v.said: v.verdict for v in audit_grid(grid(lambda norm, clamp, clip: 10 ** (3 - 2 * clamp + norm)))}
    assert found["all three protections together: smaller gradients than with none"] == REPRODUCED
    assert found["the clamp alone: smaller gradients than with none"] == REPRODUCED
    assert found["spectral norm alone: smaller gradients than with none"] == REFUTED
    assert found["clipping alone keeps training stable"] == REFUTED
    assert found["without protection the cascade at 0.1× becomes unstable"] == REPRODUCED
    worse = {v.said: v.verdict for v in audit_grid(grid(lambda norm, clamp, clip: 10 ** (3 + norm)))}
    assert worse["all three protections together: smaller gradients than with none"] == REFUTED
    small = {v.said: v.verdict for v in audit_grid(grid(lambda *_: 0.5))}
    assert small["clipping alone keeps training stable"] == NOT_TESTED  # nothing to clip
    assert small["without protection the cascade at 0.1× becomes unstable"] == REFUTED


def test_clipping_can_be_found_to_protect():
    runs = grid(lambda norm, clamp, clip: 0.5 if clip else 99.0)
    assert {v.said: v.verdict for v in audit_grid(runs)}["clipping alone keeps training stable"] == REPRODUCED


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
    rising = [r for r in grid(lambda *_: 1.0) if r.variant != "4 stages"] + [result("4 stages", norms=(1, 2))]
    assert [v.verdict for v in audit_grid(rising) if "four stages" in v.said] == [REFUTED]
    assert {v.verdict for v in audit_grid(named())} == {NOT_TESTED}


def test_measures():
    run = result(EXPLODING, norms=(1, 7), factor=4.0)
    assert peak(run) == 7
    assert math.isinf(peak(result(EXPLODING, bad_step=3)))
    assert largest_factor(run) == 4.0
    assert last_projection_share(run) == pytest.approx(0.25 / 3.75)
    assert at_level([run, run])
    assert not at_level([run, result(EXPLODING, bad_step=3)])
    assert not stable([result(REPAIR), result(REPAIR, bad_step=3)])
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
    assert any("0.1×: the gradient norm rises" in line and "refuted → reproduced" in line for line in found)
    assert disagreements(shallow, shallow) == []
    assert not any("NaN" in line for line in disagreements(shallow, audit_named(named(weak={"bad_step": 4}))))


# --- findings ---------------------------------------------------------------------------------------------------------


def grid_of(**norms: tuple[float, float]) -> dict[str, list[Result]]:
    """Three seeds of the reference and of the variants that `norms` names, in two points each."""
    names = {"three": "3 stages", "weak": EXPLODING, "scalars": "learnable RMS", "log": "anti-modulation log"}
    norms = {REFERENCE: (2.0, 1.0)} | {names[key]: pair for key, pair in norms.items()}
    return {
        name: [result(name, seed, norms=[n + seed / 10 for n in pair]) for seed in range(3)]
        for name, pair in norms.items()
    }


def test_every_suspect_of_the_grid_is_held_against_the_reference():
    found = findings(grid_of(three=(2.1, 1.0), weak=(4.0, 1.0), scalars=(1.0, 0.5)))
    against = f"against 2.10 (2.00 to 2.20) of {REFERENCE}"
    assert found[:3] == [
        f"3 stages: largest gradient norm 2.20 (2.10 to 2.30), {against}: within seed spread.",
        f"{EXPLODING}: largest gradient norm 4.10 (4.00 to 4.20), {against}: higher.",
        f"learnable RMS: largest gradient norm 1.10 (1.00 to 1.20), {against}: lower.",
    ]
    assert not any("anti-modulation log" in sentence for sentence in found)
    assert findings(grid_of(log=(3.0, 1.0)))[0].startswith("anti-modulation log: largest gradient norm 3.10")


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
