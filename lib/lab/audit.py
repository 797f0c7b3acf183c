"""The verdicts on the claims about training and collapse, as functions of what the ablation's runs measured.

    Said("C7", "0.1×: the gradient norm rises").of(every(gt, 1), each(exploding, growth), "times")

Each is what a seed said, a rule for what was measured, one value per seed, and its unit.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from operator import gt, lt
from typing import Any, NamedTuple

from lib.evaluation.baselines import Measured, advantage
from lib.lab import results as measured
from lib.lab import variants
from lib.lab.claims import NOT_TESTED, Verdict, judge
from lib.lab.results import Runs, at_level, by_variant, each, final, first_non_finite, growth, known, peak, stable
from lib.model.cascade import CascadeConfig
from lib.model.rms_law import Clips
from lib.training.config import TrainConfig
from lib.util.stats import difference

Values = Sequence[float]  # one per seed
Rule = Callable[[Values], bool]

EPOCH_3_BATCH_205 = 3 * 205  # seed 001 puts the NaN of claim C7 here: at least so many steps
EPOCHS = 200  # of claim C10
CONSTANT = 0.2  # an output with less than this share of its clips' movement is called constant
FEW_PAIRS = 8  # fewer pairs prove nothing about a mean
AGENT = 1_281_730  # parameters of the creative agent, from the shapes in the original checkpoints
FALLBACKS = {  # variants that claim C14 calls safe
    "stage 1 at 512": "stage 1 at 512 wide is stable",
    "3 stages": "three stages at 1.0× are stable",
    "4 stages": "four stages at 1.0× are stable",
    "5 stages": "five stages at 1.0× are stable",
}
CURES = {  # of a constant output, by claim C15
    variants.RECONSTRUCTION: "a reconstruction term of 0.01 to 0.05",
    variants.NOVELTY: "a novelty weight of 0.5 to 0.7 instead of 0.85",
    variants.RESIDUAL: "a final residual of 0.2 to 0.3",
}


class Said(NamedTuple):
    """A part of a claim that has its own verdict."""

    claim: str
    text: str

    def of(self, rule: Rule | bool, values: Values | None = None, found: str = "", **more: Any) -> Verdict:
        """By a rule for the values of all seeds, or by whether it holds. `more`: as in `judge`."""
        return judge(self.claim, self.text, rule(values) if callable(rule) else rule, values, found=found, **more)


def every(compare: Callable[[float, float], bool], limit: float) -> Rule:
    return lambda values: bool(values) and all(compare(value, limit) for value in values)


def between(low: float, high: float) -> Rule:
    return lambda values: measured.within(values, low, high)


def differs(word: str, others: Values) -> Rule:
    """'higher' or 'lower' than the values of other runs, in every seed."""
    return lambda values: difference(values, others) == word


def passing(results: Runs, key: str, low: float, high: float) -> tuple[bool, list[float], str]:
    """Whether every run's measure passes through an interval in training, its values at the end, and its medians."""
    pairs = [(result.start[key], result.end[key]) for result in results if result.end]
    holds = bool(pairs) and all(min(pair) <= high and max(pair) >= low for pair in pairs)
    found = "no end was reached"
    if len(pairs) == len(results):
        found = "at the end, from {:.2f} to {:.2f}".format(*map(statistics.median, zip(*pairs, strict=True)))
    return holds, [last for _, last in pairs], found


def stability(results: Runs) -> tuple[bool, list[float], str]:
    found = f"growth of the gradient norm in {min(r.steps for r in results)} steps; {first_non_finite(results)}"
    return stable(results), each(results, growth), found


def audit_parameters(stages: Sequence[int]) -> list[Verdict]:
    """C3, from the parameters of both stages of the reference."""
    three, two = stages[0] + 2 * stages[1] + AGENT, sum(stages) + AGENT
    both = all(math.isclose(n, said, rel_tol=0.02) for n, said in zip(stages, (6.3e6, 14.2e6), strict=True))
    totals = {"three stages: 27.4 M": (three, 27.4e6), "two stages: 18.3 M": (two, 18.3e6)}
    saved = 1 - two / three
    return [
        Said("C3", "stages of 6.3 M and 14.2 M").of(both, found=" and ".join(f"{n / 1e6:.2f} M" for n in stages)),
        *(
            Said("C3", text).of(math.isclose(n, said, rel_tol=0.01), found=f"{n / 1e6:.1f} M with the agent")
            for text, (n, said) in totals.items()
        ),
        Said("C3", "two stages instead of three: 33 % fewer").of(abs(saved - 0.33) < 0.01, found=f"{saved:.0%} fewer"),
    ]


def audit_untrained(output_rms: Sequence[Values], scales: Sequence[Values], similarity: float) -> list[Verdict]:
    """C2, from the untrained reference, stage by stage, one value per seed; `similarity`: cosine of the clips."""
    laws = {s / 100: CascadeConfig.reference().predict_rms(Clips(similarity=s / 100)) for s in range(101)}
    alike = next(s for s, stages in laws.items() if max(stage.target_scale for stage in stages) <= 1.02)
    near = all(measured.within(values, 5.73 * 0.95, 5.73 * 1.05) for values in output_rms)
    needed = f"in stage 0; 1.02 needs clips of cosine {alike:.2f}, these have {similarity:.2f}"
    return [
        Said("C2", "stages leave RMS 5.73 and 5.68").of(near, output_rms[1], "after stage 1, where scaling puts it"),
        Said("C2", "factors 1.01 and 1.02").of(max(map(max, scales)) <= 1.05, scales[0], needed),
    ]


def audit_spectral_norm(ours: float, torchs: float, lipschitz: Values) -> list[Verdict]:
    """C4: the largest σ in training, ours and torch's, and untrained Lipschitz constants, one per seed."""
    return [
        Said("C4", "σ ≤ 1 in training, our projection").of(ours <= 1.001, found=f"{ours:.4f} at most"),
        Said("C4", "σ ≤ 1 in training, torch's spectral norm").of(torchs <= 1.001, found=f"{torchs:.2f} at most"),
        Said("C4", "so the Lipschitz constant of the cascade is ≤ 1").of(
            between(0, 1.001), lipschitz, "at the clips' own level, more on quiet ones"
        ),
    ]


def audit_named(results: Runs) -> list[Verdict]:
    """C5 to C8, C15 and the 0.3× part of C14, from the settings that the seeds describe."""
    found = by_variant(results)
    reference, exploding, repair, learnable = (found[variant.name] for variant in variants.NAMED)
    steps = min(r.steps for r in reference)
    short = "" if steps >= EPOCH_3_BATCH_205 else f"{steps} steps, fewer than the {EPOCH_3_BATCH_205} of three epochs"
    late = short and f"{short}; the seed's came in epochs 5, 14 and 24"
    ended = f"largest norm; {first_non_finite(learnable)}"
    trained = [r for r in learnable if r.start]  # without a step there is nothing to compare
    no_step = "" if trained else "no run took a step"
    peaks, healthy_peaks = each(exploding, peak), each(reference, peak)
    healthy_peak = f"{max(healthy_peaks):.2g}"
    nearer, quiet = known(reference, measured.nearer), known(exploding, final("rms_ratio"))
    moves, fewer_moves = (
        [run.final["movement_ratio"] / run.final["rms_ratio"] for run in runs if run.final]
        for runs in (repair, exploding)
    )
    return [
        Said("C5", "training passes RMS 1.09 before scaling, so a target scale of 5.2 and an output of 1.64").of(
            *passing(exploding, "stage2/rms_before_scaling", 1.09, 1.09)
        ),
        Said(
            "C6", "training passes RMS 2.5 to 3.0 before scaling, so target scales of 2.0 to 2.3 and an output of 4.05"
        ).of(*passing(repair, "stage2/rms_before_scaling", 2.5, 3.0)),
        Said("C5", "training passes projection RMS 0.85").of(
            *passing(exploding, "stage2/projection_rms", 0.85, 0.85)[:2], "at the end"
        ),
        Said("C5", "the output of the collapsing cascade stays too quiet").of(
            every(lt, measured.HEALTHY_RATIO[0]), quiet, "of the target RMS after training"
        ),
        Said("C7", "0.1×: the gradient norm rises (there: 6.8-fold in three epochs)").of(
            every(gt, 1), each(exploding, growth), f"times from the first to the last tenth of {steps} steps"
        ),
        Said("C7", "0.1×: NaN at epoch 3, batch 205").of(
            not measured.never_non_finite(exploding), found=first_non_finite(exploding), short=short, unless=True
        ),
        Said("C7", "0.3×: the gradient norm rises (there: 1.5-fold in three epochs)").of(
            every(gt, 1), each(repair, growth), "times", short=short, unless=True
        ),
        Said("C7", "0.1× has larger gradients than two stages").of(
            differs("higher", healthy_peaks), peaks, f"largest norm, against {healthy_peak}"
        ),
        Said("C7", "two stages: gradient norm 2 to 5 up to epoch 10").of(
            between(2, 5), [r.end.get("grad_norm", math.inf) for r in reference], "at the end", short=short
        ),
        Said("C7", "0.1×: the last projection has most of the gradient").of(
            every(gt, 0.5), each(exploding, measured.last_projection_share), "of the squared norm at the end"
        ),
        Said("C8", "learnable scalars: norm 15,438, then NaN").of(
            not measured.never_non_finite(learnable), each(learnable, peak), ended, short=late, unless=True
        ),
        Said("C8", "a scalar's gradient is 100 to 10,000 times that of another parameter").of(
            between(100, 10_000), each(trained, measured.scalar_ratio), "times, per element", short=no_step
        ),
        Said("C8", "the scalars together have a larger gradient than all other parameters").of(
            every(gt, 1), each(trained, measured.scalars_against_rest), "times the norm of all others", short=no_step
        ),
        Said("C14", "three stages at 0.3× are stable").of(*stability(repair)),
        Said("C14", "three stages at 0.3× reach the target level (RMS ratio 0.8 to 1.2)").of(
            at_level(repair), known(repair, final("rms_ratio")), "of the target RMS"
        ),
        Said("C15", "gradient norm below 100 separates health from collapse").of(
            max(healthy_peaks) < 100 <= min(peaks),
            peaks,
            f"largest norm of the collapsing cascade, {healthy_peak} of the healthy one",
        ),
        Said("C15", "RMS ratio 0.8 to 1.2 separates health from collapse").of(
            at_level(reference) and not any(measured.within([ratio], *measured.HEALTHY_RATIO) for ratio in quiet),
            quiet,
            "of the target RMS in the collapsing cascade, 1 in the healthy one",
        ),
        Said("C15", "a healthy output's correlation with either source is below 0.3").of(
            every(lt, 0.3), nearer, "with the nearer source: the residual is the mean of both"
        ),
        Said("C15", "a final residual of 0.3 brings back movement that 0.1 lacks").of(
            differs("higher", fewer_moves), moves, "of the sources' movement, at equal level"
        ),
    ]


def audit_grid(results: Runs) -> list[Verdict]:
    """C9 and the rest of C14, from the single changes and the 2×2×2 of the protections."""
    found = by_variant(results)
    verdicts = [judge("C9", "all three together protect", None, why="the 2×2×2 was not run")]
    if all(variant.name in found for variant in variants.PROTECTIONS.values()):
        verdicts = audit_protections({levels: found[v.name] for levels, v in variants.PROTECTIONS.items()})
    for name, text in FALLBACKS.items():
        holds = stability(found[name]) if name in found else (None,)
        verdicts.append(Said("C14", text).of(*holds, why="" if name in found else "this variant was not run"))
    return verdicts


def audit_protections(cells: Mapping[tuple[bool, ...], Runs]) -> list[Verdict]:
    """C9; `cells`: (spectral norm, clamp, clipping) → runs of the exploding cascade."""
    bare, clipped, limit = cells[False, False, False], cells[False, False, True], TrainConfig().clip
    bare_peaks = each(bare, peak)
    less, against = differs("lower", bare_peaks), f"largest norm, against {max(bare_peaks):.3g}"
    short = "" if max(bare_peaks) > limit else f"without any protection no norm passed the limit of {limit:g}"
    combinations = {"all three protections together": (True,) * 3}
    combinations |= {"spectral norm alone": (True, False, False), "the clamp alone": (False, True, False)}
    return [
        *(
            Said("C9", f"{name}: smaller gradients than with none").of(less, each(cells[on], peak), against)
            for name, on in combinations.items()
        ),
        Said("C9", "clipping alone keeps training stable").of(
            stable(clipped) and not stable(bare), each(clipped, peak), "largest norm before clipping", short=short
        ),
        Said("C9", "without protection the cascade at 0.1× becomes unstable").of(
            not stable(bare), each(bare, growth), f"growth of the gradient norm; {first_non_finite(bare)}"
        ),
    ]


def audit_schedule(results: Runs, epochs: int) -> list[Verdict]:
    """C7, C10 to C13 and C15, from runs of `epochs` epochs of the variants in `SCHEDULED`."""
    found = by_variant(results)
    whole, three = found[variants.WHOLE], found[variants.WHOLE_3]
    short = "" if epochs >= EPOCHS else f"{epochs} epochs only"
    early = [norm for run in whole for norm in run.grad_norm[: math.ceil(len(run.grad_norm) * 10 / epochs)]]
    parts = min(len(run.grad_norm) for run in whole)
    recorded = f" (recorded as medians of {parts} parts)" if parts < min(run.steps for run in whole) else ""
    masks = [run.quarter.get("masks/complementarity", 0.0) for run in whole]
    first = statistics.median(run.start.get("masks/complementarity", 0.0) for run in whole)
    untrained = f"{first:.3f} in the first epochs, 0.75 for constant masks"
    few_steps = measured.never_non_finite(three) and min(run.steps for run in three) < EPOCH_3_BATCH_205
    merits, other_merits = (each(runs, measured.decoded_merit) for runs in (whole, three))
    other_merit, other_level = (statistics.median(each(three, m)) for m in (measured.decoded_merit, measured.level))
    against = f"figure of merit, against {other_merit:.3f} at {other_level:.2f} of the target RMS"
    return [
        Said("C7", "0.1×, the whole objective: NaN within three epochs").of(
            any(run.non_finite is not None and run.non_finite["step"] <= EPOCH_3_BATCH_205 for run in three),
            found=first_non_finite(three),
            short=f"fewer than {EPOCH_3_BATCH_205} steps" if few_steps else "",
        ),
        Said("C10", "two stages: 200 epochs without NaN").of(
            measured.never_non_finite(whole), found=first_non_finite(whole), short=short, unless=False
        ),
        Said("C10", "two stages: gradient norm 2 to 5 up to epoch 10").of(
            between(2, 5), early, f"before clipping, of the whole objective{recorded}", short=short
        ),
        Said("C11", "two stages: no factor above 1.3").of(
            between(0, 1.3), each(whole, measured.largest_factor), "largest factor of a stage"
        ),
        Said("C12", "complementarity of the masks reaches 85 % by epoch 50").of(
            between(0.85, math.inf), masks, f"at epoch 50, {untrained}", short=short
        ),
        Said("C13", "two stages sound as good as three").of(
            difference(merits, other_merits) != "lower", merits, f"{against}: the figure is blind to level"
        ),
        Said("C15", "the whole system keeps its gradient norm below 100").of(
            every(lt, 100), each(whole, peak), f"largest norm{recorded}"
        ),
        Said("C15", "the whole system keeps the level (RMS ratio 0.8 to 1.2)").of(
            at_level(whole), known(whole, final("rms_ratio")), "of the target RMS; 0.8 to 1.2 is healthy"
        ),
        Said("C15", "the whole system's correlation with either source is below 0.3").of(
            every(lt, 0.3), known(whole, measured.nearer), "with the nearer source"
        ),
        *audit_cures(found[variants.CREATIVE], {name: found[name] for name in CURES}),
    ]


def audit_continuations(measured: Measured, name: str, songs: Sequence[tuple[str, str]]) -> Verdict:
    """C13: whether `name` has a higher figure of merit than the plain average, over `measure_fusions` of pairs."""
    pairs, found = len(measured[name]), advantage(measured, name, "average of latents", songs)
    return Said("C13", "continuations are coherent: they carry both clips better than their plain average does").of(
        found.verdict > 0,
        found=f"{found} figure of merit, over {pairs} continuation pairs",
        why=found.in_words("their plain average"),
        short="" if pairs >= FEW_PAIRS and found.draws > 1 else f"fewer than {FEW_PAIRS} pairs, or all of one song",
    )


def audit_cures(ill: Runs, cured: Mapping[str, Runs]) -> list[Verdict]:
    """Whether creative terms alone leave a constant output, and what brings back movement where they do."""
    without = each(ill, measured.movement)
    constant = every(lt, CONSTANT)(without)
    novelty_acts = any(part.get("loss/novelty") for r in ill for part in (r.start, r.quarter, r.end))
    verdicts = [
        Said("C15", "creative terms alone, with a final residual of 0.1, leave a constant output").of(
            constant, without, f"of the sources' movement, whatever the level; below {CONSTANT} is called constant"
        ),
        Said("C15", "creative terms alone, with a final residual of 0.1, keep the level (RMS ratio 0.8 to 1.2)").of(
            at_level(ill), each(ill, measured.level), "of the target RMS"
        ),
    ]
    for name, results in cured.items():
        short = "" if constant else "the output is not constant without it"
        if name == variants.NOVELTY and not novelty_acts:
            short = "the novelty term never acted, whatever its weight: no cosine passed 0.7"
        found = f"of the sources' movement, {statistics.median(without):.3f} without"
        said = Said("C15", f"{CURES[name]} cures a constant output")
        verdicts.append(said.of(differs("higher", without), each(results, measured.movement), found, short=short))
    return verdicts


def disagreements(shallow: Sequence[Verdict], deep: Sequence[Verdict]) -> list[str]:
    """The parts of claims on which two depths come to different verdicts; 'not tested' counts as no verdict."""
    other = {(v.claim, v.said): v.verdict for v in deep}
    pairs = [(v, other.get((v.claim, v.said), v.verdict)) for v in shallow]
    changed = [(v, found) for v, found in pairs if NOT_TESTED not in (v.verdict, found) and found != v.verdict]
    return [f"{v.claim}, {v.said}: {v.verdict} → {found}" for v, found in changed]
