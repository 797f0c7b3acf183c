"""The verdicts on the claims about training and collapse, as functions of what was measured.

Each can come out either way; the tests show both. A claim whose variants were not run is 'not tested here'.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

from lib.lab.ablation import Result, by_variant, growth
from lib.lab.claims import NOT_TESTED, Verdict, judge
from lib.lab.variants import EXPLODING, LEARNABLE, PROTECTIONS, REFERENCE, REPAIR, Variant
from lib.training.config import TrainConfig
from lib.util.stats import describe, difference, factorial_effects

EPOCH_3_BATCH_205 = 3 * 205  # steps at least before the NaN of claim C7, which seed 001 puts there
HEALTHY_RATIO = (0.8, 1.2)  # of output to wanted RMS (claim C15)
SUSPECTS = ("3 stages", EXPLODING, "learnable RMS", "anti-modulation log")  # variants with what the seeds blame


def peak(result: Result) -> float:
    """Largest gradient norm before clipping; infinite for a run that met a non-finite value."""
    return max(result.grad_norm, default=math.inf)


def each(results: Sequence[Result], measure: Callable[[Result], float]) -> list[float]:
    return [measure(result) for result in results]


def within(values: Sequence[float], low: float, high: float) -> bool:
    return all(low <= value <= high for value in values)


def never_non_finite(results: Sequence[Result]) -> bool:
    return all(result.non_finite is None for result in results)


def first_non_finite(results: Sequence[Result]) -> str:
    """'no non-finite value in 100 steps', or the steps at which one came."""
    steps = [result.non_finite["step"] for result in results if result.non_finite]
    if not steps:
        return f"no non-finite value in {min(result.steps for result in results)} steps"
    return f"non-finite in {len(steps)} of {len(results)} runs, first at step {min(steps)}"


def last_stage(result: Result) -> int:
    return max(int(key[5]) for key in result.start if key.endswith("/target_scale"))


def last_projection_share(result: Result) -> float:
    """Share of the last stage's projection in the squared gradient norm at the end; 0 for a run without an end."""
    norms = {key: value**2 for key, value in result.end.items() if key.startswith("grad_norm/")}
    return norms[f"grad_norm/stage{last_stage(result)}/output_projection"] / sum(norms.values()) if norms else 0.0


def largest_factor(result: Result) -> float:
    """Largest wanted factor of any stage, at the start, a quarter or the end of training, each a median over a tenth of
    the steps."""
    parts = (result.start, result.quarter, result.end)
    return max((v for part in parts for k, v in part.items() if k.endswith("/target_scale")), default=math.inf)


def scalar_norms(result: Result) -> tuple[float, float]:
    """Gradient norm of the RMS scalars, and of all other parameters together, at the start."""
    norms = {key: value**2 for key, value in result.start.items() if key.startswith("grad_norm/")}
    scalars = sum(value for key, value in norms.items() if key.endswith("/rms_scaling"))
    return math.sqrt(scalars), math.sqrt(sum(norms.values()) - scalars)


def scalar_ratio(result: Result) -> float:
    """Gradient of the RMS scalars over that of all other parameters, both as RMS over elements, at the start."""
    scalars, others = scalar_norms(result)
    stages = range(last_stage(result) + 1)
    count = 0
    for d in (256 if stage == 0 else 384 for stage in stages):  # as `learnable scalars` has them
        count += result.num_layers * (12 * d * d + 13 * d) + 4 * d + 128 * d + 128
    return scalars / math.sqrt(3 * len(stages)) / (others / math.sqrt(count))


def at_level(results: Sequence[Result]) -> bool:
    """Whether every run ended with an output near the wanted level on the validation pairs."""
    return never_non_finite(results) and within([r.final["rms_ratio"] for r in results], *HEALTHY_RATIO)


def stable(results: Sequence[Result]) -> bool:
    return never_non_finite(results) and not rising(results)


def passes(results: Sequence[Result], key: str, low: float, high: float) -> bool:
    """Whether every run's measure, between its first and last tenth of the steps, meets the interval."""
    spans = [sorted((r.start[key], r.end[key])) for r in results if r.end]
    return bool(spans) and all(first <= high and last >= low for first, last in spans)


def from_to(results: Sequence[Result], key: str) -> str:
    """'from 0.86 to 1.69': medians over seeds of the first and the last tenth of the steps."""
    first, last = (statistics.median(getattr(r, when)[key] for r in results if r.end) for when in ("start", "end"))
    return f"from {first:.2f} to {last:.2f}"


def audit_named(results: Sequence[Result]) -> list[Verdict]:
    """C5 to C8, C15 and the 0.3× part of C14, from the settings that the seeds describe."""
    found = by_variant(results)
    reference, exploding, repair, learnable = (found[n] for n in (REFERENCE, EXPLODING, REPAIR, LEARNABLE))
    steps = min(r.steps for r in reference)
    short = "" if steps >= EPOCH_3_BATCH_205 else f"{steps} steps, fewer than the {EPOCH_3_BATCH_205} of three epochs"
    growths = {name: each(found[name], growth) for name in (REFERENCE, EXPLODING, REPAIR)}
    shares = each(exploding, last_projection_share)
    scalars = [r for r in learnable if r.start]  # without a step there is nothing to compare
    finals = {name: [r.final for r in found[name] if r.final] for name in found}
    return [
        *audit_collapse(exploding, repair),
        judge(
            "C7",
            "0.1×: the gradient norm rises (there: 6.8-fold in three epochs)",
            rising(exploding),
            growths[EXPLODING],
            found=f"times from the first to the last tenth of {steps} steps",
        ),
        judge(
            "C7",
            "0.1×: NaN at epoch 3, batch 205",
            True if not never_non_finite(exploding) else None if short else False,
            found=first_non_finite(exploding),
            why=short if never_non_finite(exploding) else "",
        ),
        judge(
            "C7",
            "0.3×: the gradient norm rises (there: 1.5-fold in three epochs)",
            True if rising(repair) else None if short else False,
            growths[REPAIR],
            found="times",
            why="" if rising(repair) else short,
        ),
        judge(
            "C7",
            "0.1× has larger gradients than two stages",
            difference(each(exploding, peak), each(reference, peak)) == "higher",
            each(exploding, peak),
            found=f"largest norm, against {max(each(reference, peak)):.2g}",
        ),
        judge(
            "C7",
            "two stages: gradient norm 2 to 5 up to epoch 10",
            None if short else within([r.end.get("grad_norm", math.inf) for r in reference], 2, 5),
            [r.end.get("grad_norm", math.inf) for r in reference],
            found="at the end",
            why=short,
        ),
        judge(
            "C7",
            "0.1×: the last projection has most of the gradient",
            min(shares) > 0.5,
            shares,
            found="of the squared norm at the end",
        ),
        judge(
            "C8",
            "learnable scalars: norm 15,438, then NaN",
            True if not never_non_finite(learnable) else None if short else False,
            each(learnable, peak),
            found=f"largest norm; {first_non_finite(learnable)}",
            why=f"{short}; the seed's came in epochs 5, 14 and 24" if never_non_finite(learnable) and short else "",
        ),
        judge(
            "C8",
            "a scalar's gradient is 100 to 10,000 times that of another parameter",
            within(each(scalars, scalar_ratio), 100, 10_000) if scalars else None,
            each(scalars, scalar_ratio),
            found="times, per element",
            why="" if scalars else "no run took a step",
        ),
        judge(
            "C8",
            "the scalars together have a larger gradient than all other parameters",
            all(own > others for own, others in map(scalar_norms, scalars)) if scalars else None,
            [own / others for own, others in map(scalar_norms, scalars)],
            found="times the norm of all others",
            why="" if scalars else "no run took a step",
        ),
        stability("C14", "three stages at 0.3× are stable", repair),
        judge(
            "C14",
            "three stages at 0.3× reach the wanted level (RMS ratio 0.8 to 1.2)",
            at_level(repair),
            [final["rms_ratio"] for final in finals[REPAIR]],
            found="of the wanted RMS",
        ),
        judge(
            "C15",
            "gradient norm below 100 tells health from collapse",
            max(each(reference, peak)) < 100 <= min(each(exploding, peak)),
            each(exploding, peak),
            found=f"largest norm of the collapsing cascade, {max(each(reference, peak)):.2g} of the healthy one",
        ),
        judge(
            "C15",
            "RMS ratio 0.8 to 1.2 tells health from collapse",
            at_level(reference)
            and not any(within([final["rms_ratio"]], *HEALTHY_RATIO) for final in finals[EXPLODING]),
            [final["rms_ratio"] for final in finals[EXPLODING]],
            found="of the wanted RMS in the collapsing cascade, 1 in the healthy one",
        ),
        judge(
            "C15",
            "a healthy output's correlation with either source is below 0.3",
            max(map(nearer, finals[REFERENCE]), default=math.inf) < 0.3,
            [nearer(final) for final in finals[REFERENCE]],
            found="with the nearer source: the residual is the mean of both",
        ),
        judge(
            "C15",
            "a final residual of 0.3 brings back movement that 0.1 lacks",
            difference(*([f["movement_ratio"] / f["rms_ratio"] for f in finals[n]] for n in (REPAIR, EXPLODING)))
            == "higher",
            [f["movement_ratio"] / f["rms_ratio"] for f in finals[REPAIR]],
            found="of the sources' movement, at equal level",
        ),
    ]


def audit_collapse(exploding: Sequence[Result], repair: Sequence[Result]) -> list[Verdict]:
    """C5 and C6: whether training passes the state that seed 002 saw. One state is one verdict: the wanted factor and
    the clamped output follow from the mixed RMS."""
    verdicts = []
    for claim, results, low, high, state in (
        ("C5", exploding, 1.09, 1.09, "mixed RMS 1.09, so 5.2× wanted and 1.64 left"),
        ("C6", repair, 2.5, 3.0, "mixed RMS 2.5 to 3.0, so 2.0 to 2.3× wanted and 4.05 left"),
    ):
        key = "stage2/rms_before_scaling"
        found = f"at the end, {from_to(results, key)}" if all(r.end for r in results) else "no end was reached"
        values = [r.end[key] for r in results if r.end]
        verdicts.append(judge(claim, f"training passes {state}", passes(results, key, low, high), values, found=found))
    key = "stage2/projection_rms"
    values = [r.end[key] for r in exploding if r.end]
    holds = passes(exploding, key, 0.85, 0.85)
    verdicts.append(judge("C5", "training passes projection RMS 0.85", holds, values, found="at the end"))
    ratios = [r.final["rms_ratio"] for r in exploding if r.final]
    stays = bool(ratios) and max(ratios) < HEALTHY_RATIO[0]
    said = "the output of the collapsing cascade stays too quiet"
    verdicts.append(judge("C5", said, stays, ratios, found="of the wanted RMS after training"))
    return verdicts


def nearer(final: Mapping[str, float]) -> float:
    return max(final["input_correlation"], final["target_correlation"])


def stability(claim: str, said: str, results: Sequence[Result]) -> Verdict:
    steps = min(r.steps for r in results)
    end = f"growth of the gradient norm in {steps} steps; {first_non_finite(results)}"
    return judge(claim, said, stable(results), each(results, growth), found=end)


def audit_grid(results: Sequence[Result]) -> list[Verdict]:
    """C9 and the rest of C14, from the single changes and the 2×2×2 of the protections."""
    found = by_variant(results)
    verdicts = []
    if all(variant.name in found for variant in PROTECTIONS.values()):
        bare = found[PROTECTIONS[False, False, False].name]
        for said, levels in (
            ("all three protections together", (True, True, True)),
            ("spectral norm alone", (True, False, False)),
            ("the clamp alone", (False, True, False)),
        ):
            runs = found[PROTECTIONS[levels].name]
            verdicts.append(
                judge(
                    "C9",
                    f"{said}: smaller gradients than with none",
                    difference(each(runs, peak), each(bare, peak)) == "lower",
                    each(runs, peak),
                    found=f"largest norm, against {max(each(bare, peak)):.3g}",
                )
            )
        limit = TrainConfig().clip
        acts = max(each(bare, peak)) > limit
        clipped = found[PROTECTIONS[False, False, True].name]
        verdicts.append(
            judge(
                "C9",
                "clipping alone keeps training stable",
                stable(clipped) and not stable(bare) if acts else None,
                each(clipped, peak),
                found="largest norm before clipping",
                why="" if acts else f"without any protection no norm passed the limit of {limit:g}",
            )
        )
        safe_bare = stable(bare)
        verdicts.append(
            judge(
                "C9",
                "without protection the cascade at 0.1× becomes unstable",
                not safe_bare,
                each(bare, growth),
                found=f"growth of the gradient norm; {first_non_finite(bare)}",
            )
        )
    else:
        verdicts.append(judge("C9", "all three together protect", None, why="the 2×2×2 was not run"))
    for name, said in (
        ("stage 1 at 512", "stage 1 at 512 wide is stable"),
        ("3 stages", "three stages at 1.0× are stable"),
        ("4 stages", "four stages at 1.0× are stable"),
        ("5 stages", "five stages at 1.0× are stable"),
    ):
        if name in found:
            verdicts.append(stability("C14", said, found[name]))
        else:
            verdicts.append(judge("C14", said, None, why="this variant was not run"))
    return verdicts


def effects_in_decades(
    variants: Mapping[tuple[bool, ...], Variant],
    factors: Sequence[str],
    found: Mapping[str, Sequence[Result]],
    measure: Callable[[Result], float],
) -> dict[str, list[float]]:
    """Effects of a 2×2×2's factors on log10 of a measure, per seed; none where a run became non-finite."""
    cells = {levels: each(found[v.name], lambda r: math.log10(measure(r))) for levels, v in variants.items()}
    if any(math.isinf(value) for values in cells.values() for value in values):
        return {}
    return factorial_effects(cells, factors)


def rising(results: Sequence[Result]) -> bool:
    """Whether the gradient norm of every seed is larger in the last tenth of the steps than in the first."""
    return min(each(results, growth)) > 1


def findings(groups: Mapping[str, Sequence[Result]]) -> list[str]:
    """What a grid says of the seeds' suspects, of a rise, of clipping and of NaN, a sentence each."""
    peaks = {name: each(results, peak) for name, results in groups.items()}
    reference, runs = peaks[REFERENCE], [run for results in groups.values() for run in results]
    risers = [name for name, results in groups.items() if rising(results)]
    limit = TrainConfig().clip
    clipped = [norm > limit for run in runs for norm in run.grad_norm]
    return [
        *(
            f"{name}: largest gradient norm {describe(peaks[name])}, against {describe(reference)} of {REFERENCE}: "
            f"{difference(peaks[name], reference)}."
            for name in SUSPECTS
            if name in groups
        ),
        f"The gradient norm rises over training in every seed of: {', '.join(risers) or 'no variant'}.",
        f"It passes {limit:g}, where clipping acts, in {sum(clipped)} of {len(clipped)} recorded points.",
        f"Non-finite values end {sum(run.non_finite is not None for run in runs)} of {len(runs)} runs.",
    ]


def weak_residuals(groups: Mapping[str, Sequence[Result]], names: Sequence[str]) -> list[str]:
    """A line for each way to keep a weak residual, against two stages, and one that names those which leak less at the
    target level without larger gradients."""
    measures: dict[str, Callable[[Result], float]] = {
        "leakage": lambda r: (r.final["input_correlation"] + r.final["target_correlation"]) / 2,
        "gradients": peak,
        "error": lambda r: r.final["mse"],
    }
    lines, winners = [], []
    for name in (name for name in names if name in groups):
        values = {  # a run without an end has a gradient norm: an infinite one
            label: [[of(r) for r in groups[group] if r.final or of is peak] for group in (name, REFERENCE)]
            for label, of in measures.items()
        }
        found = {label: difference(*both) for label, both in values.items()}
        level = "at" if at_level(groups[name]) else "not at"
        lines.append(f"{name}: {', '.join(f'{n} {word}' for n, word in found.items())}; {level} the target level")
        if level == "at" and found["leakage"] == "lower" and found["gradients"] != "higher":
            winners.append(name)
    return [*lines, f"less leakage at the target level without larger gradients: {', '.join(winners) or 'none'}"]


def disagreements(shallow: Sequence[Verdict], deep: Sequence[Verdict]) -> list[str]:
    """The parts of claims on which two depths come to different verdicts; 'not tested' counts as no verdict."""
    other = {(v.claim, v.said): v.verdict for v in deep}
    return [
        f"{v.claim}, {v.said}: {v.verdict} → {other[v.claim, v.said]}"
        for v in shallow
        if (v.claim, v.said) in other
        and NOT_TESTED not in (v.verdict, other[v.claim, v.said])
        and other[v.claim, v.said] != v.verdict
    ]
