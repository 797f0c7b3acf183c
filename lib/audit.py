"""The verdicts on the claims about training and collapse, as functions of what was measured.

Each can come out either way; the tests show both. A claim whose variants were not run is 'not tested here'.
"""

import math
from collections.abc import Callable, Mapping, Sequence

from lib.ablation import Result, by_variant, growth
from lib.claims import NOT_TESTED, Verdict, judge
from lib.spread import difference, factorial_effects
from lib.variants import EXPLODING, LEARNABLE, PROTECTION_NAMES, PROTECTIONS, REFERENCE, REPAIR, Variant

EPOCH_3_BATCH_205 = 3 * 205  # steps at least before the NaN of claim C7, which seed 001 puts there
HEALTHY_RATIO = (0.8, 1.2)  # of output to wanted RMS (claim C15)


def peak(result: Result) -> float:
    return max(result.grad_norm, default=float("nan"))


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
    return max(int(key[5]) for key in result.start if key.startswith("stage"))


def last_projection_share(result: Result) -> float:
    """Share of the last stage's projection in the squared gradient norm at the end."""
    norms = {key: value**2 for key, value in result.end.items() if key.startswith("grad_norm/")}
    return norms[f"grad_norm/stage{last_stage(result)}/output_projection"] / sum(norms.values())


def largest_factor(result: Result) -> float:
    """Largest wanted factor of any stage, at the start or the end of training, as medians over a tenth of the steps."""
    found = [v for part in (result.start, result.end) for k, v in part.items() if k.endswith("/wanted_factor")]
    return max(found)


def scalar_ratio(result: Result) -> float:
    """Gradient of the RMS scalars over that of all other parameters, both as RMS over elements, at the start."""
    sizes = parameter_counts(result)
    scalars = {k: v for k, v in result.start.items() if k.startswith("grad_norm/") and k.endswith("/rms_scaling")}
    others = {k: v for k, v in result.start.items() if k.startswith("grad_norm/") and k not in scalars}
    own = sum(v**2 for v in scalars.values()) / (3 * len(scalars))
    rest = sum(v**2 for v in others.values()) / sizes
    return (own / rest) ** 0.5


def parameter_counts(result: Result) -> int:
    """Parameters of a cascade of full widths without its RMS scalars."""
    total = 0
    for stage in range(last_stage(result) + 1):
        d = 256 if stage == 0 else 384
        total += result.num_layers * (12 * d * d + 13 * d) + 4 * d + 128 * d + 128
    return total


def safe(results: Sequence[Result]) -> bool:
    """No non-finite value, and an output at the wanted level on the validation pairs."""
    return never_non_finite(results) and within([r.final["rms_ratio"] for r in results], *HEALTHY_RATIO)


def audit_named(results: Sequence[Result]) -> list[Verdict]:
    """C7, C8, C10, C11 and the 0.3× part of C14, from the settings that the seeds describe."""
    found = by_variant(results)
    reference, exploding, repair, learnable = (found[n] for n in (REFERENCE, EXPLODING, REPAIR, LEARNABLE))
    steps = min(r.steps for r in reference)
    rises = {name: each(found[name], growth) for name in (REFERENCE, EXPLODING, REPAIR)}
    shares = each(exploding, last_projection_share)
    verdicts = [
        judge(
            "C7",
            "0.1×: gradient norm rises (there: 6.8-fold in three epochs)",
            rising(exploding),
            rises[EXPLODING],
            found=f"times from the first to the last tenth of {steps} steps",
        ),
        judge(
            "C7",
            "0.1×: NaN at epoch 3, batch 205",
            True if not never_non_finite(exploding) else None if steps < EPOCH_3_BATCH_205 else False,
            found=first_non_finite(exploding),
            why="" if steps >= EPOCH_3_BATCH_205 else f"shorter than the {EPOCH_3_BATCH_205} steps before that batch",
        ),
        judge("C7", "0.3×: gradient norm rises (there: 1.5-fold)", rising(repair), rises[REPAIR], found="times"),
        judge(
            "C7",
            "0.1× has larger gradients than two stages",
            difference(each(exploding, peak), each(reference, peak)) == "higher",
            each(exploding, peak),
            found=f"largest norm, against {max(each(reference, peak)):.2g}",
        ),
        judge(
            "C7",
            "two stages: gradient norm stays in 2 to 5",
            within([r.start["grad_norm"] for r in reference] + [r.end["grad_norm"] for r in reference], 2, 5),
            each(reference, lambda r: r.end["grad_norm"]),
            found="at the end",
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
            not never_non_finite(learnable) or (False if steps >= EPOCH_3_BATCH_205 else None),
            each(learnable, peak),
            found=f"largest norm; {first_non_finite(learnable)}",
            why="" if steps >= EPOCH_3_BATCH_205 else "the seed's came in epochs 5, 14 and 24",
        ),
        judge(
            "C8",
            "the scalars have larger gradients than two stages' parameters have",
            difference(each(learnable, peak), each(reference, peak)) == "higher",
            each(learnable, peak),
            found=f"largest norm of all, against {max(each(reference, peak)):.2g} without them",
        ),
        judge(
            "C10",
            "two stages: 200 epochs without NaN",
            None if never_non_finite(reference) else False,
            found=first_non_finite(reference),
            why=f"{steps} steps only; needs `make record PRESET=full`" if never_non_finite(reference) else "",
        ),
        judge(
            "C11",
            "two stages: no factor above 1.3",
            max(each(reference, largest_factor)) <= 1.3,
            each(reference, largest_factor),
            found="largest factor of a stage",
        ),
        judge(
            "C14",
            "three stages at 0.3× are safe",
            safe(repair),
            [r.final["rms_ratio"] for r in repair if r.final],
            found="of the wanted RMS",
        ),
    ]
    return verdicts


def audit_grid(results: Sequence[Result]) -> list[Verdict]:
    """C9 and the rest of C14, from the single changes and the 2×2×2 of the protections."""
    found = by_variant(results)
    verdicts = []
    if all(variant.name in found for variant in PROTECTIONS.values()):
        bare, full = (each(found[PROTECTIONS[(on,) * 3].name], peak) for on in (False, True))
        verdicts.append(
            judge(
                "C9",
                "all three together: smaller gradients than with none",
                difference(full, bare) == "lower",
                full,
                found=f"largest norm, against {min(bare):.3g} and more",
            )
        )
        for name, effects in effects_in_decades(PROTECTIONS, PROTECTION_NAMES, found, peak).items():
            if "×" not in name:
                verdicts.append(
                    judge(
                        "C9",
                        f"{name} alone makes gradients smaller",
                        max(effects) < 0,
                        effects,
                        found="decades of the largest norm before clipping, its main effect",
                    )
                )
    else:
        verdicts.append(judge("C9", "all three together protect", None, why="the 2×2×2 was not run"))
    for name, said in (
        ("stage 1 at 512", "stage 1 at 512 wide is safe"),
        ("3 stages", "three stages at 1.0× are safe"),
        ("4 stages", "four stages at 1.0× are safe"),
        ("5 stages", "five stages at 1.0× are safe"),
    ):
        if name in found:
            ratios = [r.final["rms_ratio"] for r in found[name] if r.final]
            steps = min(r.steps for r in found[name])
            verdicts.append(judge("C14", said, safe(found[name]), ratios, found=f"of the wanted RMS, {steps} steps"))
        else:
            verdicts.append(judge("C14", said, None, why="this variant was not run"))
    return verdicts


def effects_in_decades(
    variants: Mapping[tuple[bool, ...], Variant],
    factors: Sequence[str],
    found: Mapping[str, Sequence[Result]],
    measure: Callable[[Result], float],
) -> dict[str, list[float]]:
    """Effects of a 2×2×2's factors on log10 of a measure, per seed."""
    cells = {levels: each(found[v.name], lambda r: math.log10(measure(r))) for levels, v in variants.items()}
    return factorial_effects(cells, factors)


def rising(results: Sequence[Result]) -> bool:
    """Whether the gradient norm of every seed is larger in the last tenth of the steps than in the first."""
    return min(each(results, growth)) > 1


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
