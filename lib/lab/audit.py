"""The verdicts on the claims about training and collapse, as functions of what the ablation's runs measured.

    Said("C7", "0.1×: the gradient norm rises").of(exploding, growth, all_above(1), "times")

A claim is what a seed said, whose runs decide, a measure of a run, a rule for the values of all seeds, and their unit.
Every verdict can come out either way, which the tests show. `audit_named`, `audit_grid`: short runs of the cascade
alone; `audit_schedule`, `audit_continuations`: a whole training of the whole system.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lib.evaluation.baselines import advantage
from lib.lab.claims import NOT_TESTED, Verdict, judge
from lib.lab.measures import (
    HEALTHY_RATIO,
    Groups,
    Measure,
    Runs,
    at_level,
    decoded_merit,
    each,
    first_non_finite,
    growth,
    largest_factor,
    last_projection_share,
    level,
    movement,
    nearer,
    never_non_finite,
    peak,
    scalar_ratio,
    scalars_against_rest,
    stable,
    within,
)
from lib.lab.results import by_variant
from lib.lab.variants import (
    CREATIVE,
    EXPLODING,
    LEARNABLE,
    NOVELTY,
    PROTECTIONS,
    RECONSTRUCTION,
    REFERENCE,
    REPAIR,
    RESIDUAL,
    WHOLE,
    WHOLE_3,
)
from lib.model.cascade import CascadeConfig
from lib.model.rms_law import Clips
from lib.training.config import TrainConfig
from lib.util.stats import difference

Rule = Callable[[Sequence[float]], bool]

EPOCH_3_BATCH_205 = 3 * 205  # seed 001 puts the NaN of claim C7 here: at least so many steps
EPOCHS = 200  # of claim C10
CONSTANT = 0.2  # an output with less than this share of its clips' movement is called constant
FEW_PAIRS = 8  # fewer pairs prove nothing about a mean
AGENT = 1_281_730  # parameters of the creative agent, from the shapes in the original checkpoints
CONSTANT_MASKS = 0.75  # complementarity of two masks that are 0.5 everywhere
FALLBACKS = {  # variants that claim C14 calls safe
    "stage 1 at 512": "stage 1 at 512 wide is stable",
    "3 stages": "three stages at 1.0× are stable",
    "4 stages": "four stages at 1.0× are stable",
    "5 stages": "five stages at 1.0× are stable",
}
CURES = {  # of a constant output, by claim C15
    RECONSTRUCTION: "a reconstruction term of 0.01 to 0.05",
    NOVELTY: "a novelty weight of 0.5 to 0.7 instead of 0.85",
    RESIDUAL: "a final residual of 0.2 to 0.3",
}


def all_above(limit: float) -> Rule:
    return lambda values: bool(values) and min(values) > limit


def all_below(limit: float) -> Rule:
    return lambda values: bool(values) and max(values) < limit


def between(low: float, high: float) -> Rule:
    return lambda values: within(values, low, high)


@dataclass(frozen=True)
class Said:
    """A part of a claim that is judged by itself. `more`: as in `judge`."""

    claim: str
    text: str

    def judge(self, holds: bool, values: Sequence[float] | None = None, found: str = "", **more: Any) -> Verdict:
        return judge(self.claim, self.text, holds, values, found=found, **more)

    def of(self, results: Runs, measure: Measure, rule: Rule, found: str, **more: Any) -> Verdict:
        """By a rule for the values of all seeds."""
        values = each(results, measure)
        return self.judge(rule(values), values, found, **more)

    def passing(self, results: Runs, key: str, low: float, high: float, found: str = "at the end") -> Verdict:
        """By whether every run's measure, between its first and last tenth of the steps, meets an interval."""
        spans = [sorted((r.start[key], r.end[key])) for r in results if r.end]
        holds = bool(spans) and all(first <= high and last >= low for first, last in spans)
        return self.judge(holds, [r.end[key] for r in results if r.end], found)

    def stability(self, results: Runs) -> Verdict:
        found = f"growth of the gradient norm in {min(r.steps for r in results)} steps; {first_non_finite(results)}"
        return self.judge(stable(results), each(results, growth), found)


def audit_parameters(stages: Sequence[int]) -> list[Verdict]:
    """C3, from the parameters of both stages of the reference."""
    three, two = stages[0] + 2 * stages[1] + AGENT, sum(stages) + AGENT
    saved = 1 - two / three
    both = all(math.isclose(n, said, rel_tol=0.02) for n, said in zip(stages, (6.3e6, 14.2e6), strict=True))
    totals = {"three stages: 27.4 M": (three, 27.4e6), "two stages: 18.3 M": (two, 18.3e6)}
    return [
        Said("C3", "stages of 6.3 M and 14.2 M").judge(
            both, found="{:.2f} M and {:.2f} M".format(*(n / 1e6 for n in stages))
        ),
        *(
            Said("C3", text).judge(math.isclose(n, said, rel_tol=0.01), found=f"{n / 1e6:.1f} M with the agent")
            for text, (n, said) in totals.items()
        ),
        Said("C3", "two stages instead of three: 33 % fewer").judge(
            abs(saved - 0.33) < 0.01, found=f"{saved:.0%} fewer"
        ),
    ]


def audit_untrained(
    output_rms: Sequence[Sequence[float]], scales: Sequence[Sequence[float]], similarity: float
) -> list[Verdict]:
    """C2, from the untrained reference: output RMS and target scale, stage by stage, one value a seed; `similarity`:
    the cosine between the clips."""
    laws = {s / 100: CascadeConfig.reference().predict_rms(Clips(similarity=s / 100)) for s in range(101)}
    alike = next(s for s, stages in laws.items() if max(stage.target_scale for stage in stages) <= 1.02)
    return [
        Said("C2", "stages leave RMS 5.73 and 5.68").judge(
            all(within(values, 5.73 * 0.95, 5.73 * 1.05) for values in output_rms),
            output_rms[1],
            "after stage 1, where scaling puts it",
        ),
        Said("C2", "factors 1.01 and 1.02").judge(
            max(map(max, scales)) <= 1.05,
            scales[0],
            f"in stage 0; 1.02 needs clips of cosine {alike:.2f}, these have {similarity:.2f}",
        ),
    ]


def audit_spectral_norm(ours: float, torchs: float, lipschitz: Sequence[float]) -> list[Verdict]:
    """C4: the largest σ that our projection and torch's applied in training, and Lipschitz constants of the untrained
    reference, one a seed."""
    return [
        Said("C4", "σ ≤ 1 in training, our projection").judge(ours <= 1.001, found=f"{ours:.4f} at most"),
        Said("C4", "σ ≤ 1 in training, torch's spectral norm").judge(torchs <= 1.001, found=f"{torchs:.2f} at most"),
        Said("C4", "so the Lipschitz constant of the cascade is ≤ 1").judge(
            within(lipschitz, 0, 1.001), lipschitz, "at the clips' own level, more on quiet ones"
        ),
    ]


def audit_named(results: Runs) -> list[Verdict]:
    """C5 to C8, C15 and the 0.3× part of C14, from the settings that the seeds describe."""
    found = by_variant(results)
    reference, exploding, repair, learnable = (found[n] for n in (REFERENCE, EXPLODING, REPAIR, LEARNABLE))
    steps = min(r.steps for r in reference)
    short = "" if steps >= EPOCH_3_BATCH_205 else f"{steps} steps, fewer than the {EPOCH_3_BATCH_205} of three epochs"
    mixed, healthy_peak = "stage2/rms_before_scaling", f"{max(each(reference, peak)):.2g}"
    finals = {name: [r.final for r in found[name] if r.final] for name in (REFERENCE, EXPLODING, REPAIR)}
    moves = {name: [f["movement_ratio"] / f["rms_ratio"] for f in finals[name]] for name in (REPAIR, EXPLODING)}
    quiet = [final["rms_ratio"] for final in finals[EXPLODING]]
    trained = [r for r in learnable if r.start]  # without a step there is nothing to compare
    no_step = "" if trained else "no run took a step"
    return [
        Said("C5", "training passes mixed RMS 1.09, so 5.2× wanted and 1.64 left").passing(
            exploding,
            "stage2/rms_before_scaling",
            1.09,
            1.09,
            from_start_to_end(exploding, "stage2/rms_before_scaling"),
        ),
        Said("C6", "training passes mixed RMS 2.5 to 3.0, so 2.0 to 2.3× wanted and 4.05 left").passing(
            repair, mixed, 2.5, 3.0, from_start_to_end(repair, mixed)
        ),
        Said("C5", "training passes projection RMS 0.85").passing(exploding, "stage2/projection_rms", 0.85, 0.85),
        Said("C5", "the output of the collapsing cascade stays too quiet").judge(
            all_below(HEALTHY_RATIO[0])(quiet), quiet, "of the wanted RMS after training"
        ),
        Said("C7", "0.1×: the gradient norm rises (there: 6.8-fold in three epochs)").of(
            exploding, growth, all_above(1), f"times from the first to the last tenth of {steps} steps"
        ),
        Said("C7", "0.1×: NaN at epoch 3, batch 205").judge(
            not never_non_finite(exploding), found=first_non_finite(exploding), short=short, unless=True
        ),
        Said("C7", "0.3×: the gradient norm rises (there: 1.5-fold in three epochs)").of(
            repair, growth, all_above(1), "times", short=short, unless=True
        ),
        Said("C7", "0.1× has larger gradients than two stages").of(
            exploding, peak, differs("higher", each(reference, peak)), f"largest norm, against {healthy_peak}"
        ),
        Said("C7", "two stages: gradient norm 2 to 5 up to epoch 10").of(
            reference, lambda r: r.end.get("grad_norm", math.inf), between(2, 5), "at the end", short=short
        ),
        Said("C7", "0.1×: the last projection has most of the gradient").of(
            exploding, last_projection_share, all_above(0.5), "of the squared norm at the end"
        ),
        Said("C8", "learnable scalars: norm 15,438, then NaN").judge(
            not never_non_finite(learnable),
            each(learnable, peak),
            f"largest norm; {first_non_finite(learnable)}",
            short=short and f"{short}; the seed's came in epochs 5, 14 and 24",
            unless=True,
        ),
        Said("C8", "a scalar's gradient is 100 to 10,000 times that of another parameter").of(
            trained, scalar_ratio, between(100, 10_000), "times, per element", short=no_step
        ),
        Said("C8", "the scalars together have a larger gradient than all other parameters").of(
            trained, scalars_against_rest, all_above(1), "times the norm of all others", short=no_step
        ),
        Said("C14", "three stages at 0.3× are stable").stability(repair),
        Said("C14", "three stages at 0.3× reach the wanted level (RMS ratio 0.8 to 1.2)").judge(
            at_level(repair), [final["rms_ratio"] for final in finals[REPAIR]], "of the wanted RMS"
        ),
        Said("C15", "gradient norm below 100 tells health from collapse").judge(
            max(each(reference, peak)) < 100 <= min(each(exploding, peak)),
            each(exploding, peak),
            f"largest norm of the collapsing cascade, {healthy_peak} of the healthy one",
        ),
        Said("C15", "RMS ratio 0.8 to 1.2 tells health from collapse").judge(
            at_level(reference) and not any(within([ratio], *HEALTHY_RATIO) for ratio in quiet),
            quiet,
            "of the wanted RMS in the collapsing cascade, 1 in the healthy one",
        ),
        Said("C15", "a healthy output's correlation with either source is below 0.3").judge(
            all_below(0.3)(each(finals[REFERENCE], nearer)),
            each(finals[REFERENCE], nearer),
            "with the nearer source: the residual is the mean of both",
        ),
        Said("C15", "a final residual of 0.3 brings back movement that 0.1 lacks").judge(
            difference(moves[REPAIR], moves[EXPLODING]) == "higher",
            moves[REPAIR],
            "of the sources' movement, at equal level",
        ),
    ]


def differs(word: str, others: Sequence[float]) -> Rule:
    """'higher' or 'lower' than the values of other runs, in every seed."""
    return lambda values: difference(values, others) == word


def from_start_to_end(results: Runs, key: str) -> str:
    """'at the end, from 0.86 to 1.69': medians over seeds of the first and the last tenth of the steps."""
    if not all(r.end for r in results):
        return "no end was reached"
    first, last = (statistics.median(getattr(r, when)[key] for r in results) for when in ("start", "end"))
    return f"at the end, from {first:.2f} to {last:.2f}"


def audit_grid(results: Runs) -> list[Verdict]:
    """C9 and the rest of C14, from the single changes and the 2×2×2 of the protections."""
    found = by_variant(results)
    verdicts = [judge("C9", "all three together protect", False, short="the 2×2×2 was not run")]
    if all(variant.name in found for variant in PROTECTIONS.values()):
        verdicts = audit_protections({levels: found[variant.name] for levels, variant in PROTECTIONS.items()})
    for name, text in FALLBACKS.items():
        said = Said("C14", text)
        verdicts.append(
            said.stability(found[name]) if name in found else said.judge(False, short="this variant was not run")
        )
    return verdicts


def audit_protections(cells: Mapping[tuple[bool, ...], Runs]) -> list[Verdict]:
    """C9; `cells`: (spectral norm, clamp, clipping) → runs of the exploding cascade."""
    bare, clipped, limit = cells[False, False, False], cells[False, False, True], TrainConfig().clip
    largest = max(each(bare, peak))
    combinations = {
        "all three protections together": (True, True, True),
        "spectral norm alone": (True, False, False),
        "the clamp alone": (False, True, False),
    }
    return [
        *(
            Said("C9", f"{name}: smaller gradients than with none").of(
                cells[levels], peak, differs("lower", each(bare, peak)), f"largest norm, against {largest:.3g}"
            )
            for name, levels in combinations.items()
        ),
        Said("C9", "clipping alone keeps training stable").judge(
            stable(clipped) and not stable(bare),
            each(clipped, peak),
            "largest norm before clipping",
            short="" if largest > limit else f"without any protection no norm passed the limit of {limit:g}",
        ),
        Said("C9", "without protection the cascade at 0.1× becomes unstable").judge(
            not stable(bare), each(bare, growth), f"growth of the gradient norm; {first_non_finite(bare)}"
        ),
    ]


def audit_schedule(results: Runs, epochs: int) -> list[Verdict]:
    """C7, C10 to C13 and C15, from runs of `epochs` epochs of the variants in `SCHEDULED`."""
    found = by_variant(results)
    whole, three = found[WHOLE], found[WHOLE_3]
    finals = [result.final for result in whole if result.final]
    short = "" if epochs >= EPOCHS else f"{epochs} epochs only"
    early = [norm for result in whole for norm in result.grad_norm[: math.ceil(len(result.grad_norm) * 10 / epochs)]]
    parts = min(len(result.grad_norm) for result in whole)
    recorded = f" (recorded as medians of {parts} parts)" if parts < min(r.steps for r in whole) else ""
    untrained = statistics.median(each(whole, lambda result: result.start.get("masks/complementarity", 0.0)))
    few_steps = never_non_finite(three) and min(r.steps for r in three) < EPOCH_3_BATCH_205
    other_merit, other_level = (statistics.median(each(three, measure)) for measure in (decoded_merit, level))
    return [
        Said("C7", "0.1×, the whole objective: NaN within three epochs").judge(
            any(r.non_finite is not None and r.non_finite["step"] <= EPOCH_3_BATCH_205 for r in three),
            found=first_non_finite(three),
            short=f"fewer than {EPOCH_3_BATCH_205} steps" if few_steps else "",
        ),
        Said("C10", "two stages: 200 epochs without NaN").judge(
            never_non_finite(whole), found=first_non_finite(whole), short=short, unless=False
        ),
        Said("C10", "two stages: gradient norm 2 to 5 up to epoch 10").judge(
            within(early, 2, 5), early, f"before clipping, of the whole objective{recorded}", short=short
        ),
        Said("C11", "two stages: no factor above 1.3").of(
            whole, largest_factor, between(0, 1.3), "largest factor of a stage"
        ),
        Said("C12", "complementarity of the masks reaches 85 % by epoch 50").of(
            whole,
            lambda result: result.quarter.get("masks/complementarity", 0.0),
            between(0.85, math.inf),
            f"at epoch 50, {untrained:.3f} in the first epochs, {CONSTANT_MASKS:.2f} for constant masks",
            short=short,
        ),
        Said("C13", "two stages sound as good as three").of(
            whole,
            decoded_merit,
            lambda values: difference(values, each(three, decoded_merit)) != "lower",
            f"figure of merit, against {other_merit:.3f} at {other_level:.2f} of the wanted RMS: "
            "the figure is blind to level",
        ),
        Said("C15", "the whole system keeps its gradient norm below 100").of(
            whole, peak, all_below(100), f"largest norm{recorded}"
        ),
        Said("C15", "the whole system keeps the level (RMS ratio 0.8 to 1.2)").judge(
            at_level(whole),
            [f["rms_ratio"] for f in finals],
            "of the wanted RMS; {} to {} is healthy".format(*HEALTHY_RATIO),
        ),
        Said("C15", "the whole system's correlation with either source is below 0.3").judge(
            all_below(0.3)(each(finals, nearer)), each(finals, nearer), "with the nearer source"
        ),
        *audit_cures(found[CREATIVE], {name: found[name] for name in CURES}),
    ]


def audit_continuations(
    judged: Mapping[str, Sequence[Mapping[str, float]]], name: str, songs: Sequence[tuple[str, str]]
) -> Verdict:
    """C13: whether the output `name` has a higher figure of merit than the plain average, on `measure_fusions` of
    continuation pairs and the songs of each pair."""
    pairs = len(judged[name])
    found = advantage(judged, name, "average of latents", songs)
    enough = pairs >= FEW_PAIRS and found.draws > 1
    return Said("C13", "continuations are coherent: they carry both clips better than their plain average does").judge(
        found.verdict > 0,
        found=f"{found} figure of merit, over {pairs} continuation pairs",
        why=found.in_words("their plain average"),
        short="" if enough else f"fewer than {FEW_PAIRS} pairs, or all of one song",
    )


def audit_cures(ill: Runs, cured: Groups) -> list[Verdict]:
    """Whether creative terms alone leave a constant output, and what brings back movement where they do."""
    without = each(ill, movement)
    constant = all_below(CONSTANT)(without)
    novelty_acts = any(part.get("loss/novelty") for r in ill for part in (r.start, r.quarter, r.end))
    verdicts = [
        Said("C15", "creative terms alone, with a final residual of 0.1, leave a constant output").judge(
            constant, without, f"of the sources' movement, whatever the level; below {CONSTANT} is called constant"
        ),
        Said("C15", "creative terms alone, with a final residual of 0.1, keep the level (RMS ratio 0.8 to 1.2)").judge(
            at_level(ill), each(ill, level), "of the wanted RMS"
        ),
    ]
    for name, results in cured.items():
        short = "" if constant else "the output is not constant without it"
        if name == NOVELTY and not novelty_acts:
            short = "the novelty term never acted, whatever its weight: no cosine passed 0.7"
        found = f"of the sources' movement, {statistics.median(without):.3f} without"
        said = Said("C15", f"{CURES[name]} cures a constant output")
        verdicts.append(said.of(results, movement, differs("higher", without), found, short=short))
    return verdicts


def disagreements(shallow: Sequence[Verdict], deep: Sequence[Verdict]) -> list[str]:
    """The parts of claims on which two depths come to different verdicts; 'not tested' counts as no verdict."""
    other = {(v.claim, v.said): v.verdict for v in deep}
    pairs = [(v, other.get((v.claim, v.said), NOT_TESTED)) for v in shallow]
    return [
        f"{v.claim}, {v.said}: {v.verdict} → {found}"
        for v, found in pairs
        if NOT_TESTED not in (v.verdict, found) and found != v.verdict
    ]
