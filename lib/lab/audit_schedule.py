"""The verdicts on the claims about a whole training of the whole system, as functions of what was measured."""

import math
import statistics
from collections.abc import Mapping, Sequence

from lib.evaluation.metrics import advantage
from lib.lab.ablation import Result, by_variant
from lib.lab.audit import (
    EPOCH_3_BATCH_205,
    HEALTHY_RATIO,
    at_level,
    each,
    first_non_finite,
    largest_factor,
    nearer,
    never_non_finite,
    peak,
    within,
)
from lib.lab.claims import Verdict, judge
from lib.lab.variants import CREATIVE, NOVELTY, RECONSTRUCTION, RESIDUAL, WHOLE, WHOLE_3
from lib.util.stats import difference

EPOCHS = 200  # that claim C10 speaks of
CONSTANT = 0.2  # of its clips' movement, below which an output is called constant
FEW_PAIRS = 8  # below which a mean over pairs proves nothing
CONSTANT_MASKS = 0.75  # complementarity of two masks of 0.5


def audit_schedule(results: Sequence[Result], epochs: int) -> list[Verdict]:
    """C7, C10 to C13 and C15, from runs of `epochs` epochs of the variants in `SCHEDULED`."""
    found = by_variant(results)
    whole, three = found[WHOLE], found[WHOLE_3]
    finals = [result.final for result in whole if result.final]
    long_enough = epochs >= EPOCHS
    short = "" if long_enough else f"{epochs} epochs only"
    early = [norm for result in whole for norm in result.grad_norm[: math.ceil(len(result.grad_norm) * 10 / epochs)]]
    parts = min(len(result.grad_norm) for result in whole)
    recorded = f" (recorded as medians of {parts} parts)" if parts < min(r.steps for r in whole) else ""
    masks = each(whole, lambda result: result.quarter.get("masks/complementarity", 0.0))
    untrained = statistics.median(each(whole, lambda result: result.start.get("masks/complementarity", 0.0)))
    steps = min(each(three, lambda result: result.steps)) if never_non_finite(three) else EPOCH_3_BATCH_205
    return [
        judge(
            "C7",
            "0.1×, the whole objective: NaN within three epochs",
            any(within_three_epochs(r) for r in three) if steps >= EPOCH_3_BATCH_205 else None,
            found=first_non_finite(three),
            why="" if steps >= EPOCH_3_BATCH_205 else f"fewer than {EPOCH_3_BATCH_205} steps",
        ),
        judge(
            "C10",
            "two stages: 200 epochs without NaN",
            False if not never_non_finite(whole) else True if long_enough else None,
            found=first_non_finite(whole),
            why=short if never_non_finite(whole) else "",
        ),
        judge(
            "C10",
            "two stages: gradient norm 2 to 5 up to epoch 10",
            within(early, 2, 5) if long_enough else None,
            early,
            found=f"before clipping, of the whole objective{recorded}",
            why=short,
        ),
        judge(
            "C11",
            "two stages: no factor above 1.3",
            max(each(whole, largest_factor)) <= 1.3,
            each(whole, largest_factor),
            found="largest factor of a stage",
        ),
        judge(
            "C12",
            "complementarity of the masks reaches 85 % by epoch 50",
            min(masks) >= 0.85 if long_enough else None,
            masks,
            found=f"at epoch 50, {untrained:.3f} in the first epochs, {CONSTANT_MASKS:.2f} for constant masks",
            why=short,
        ),
        judge(
            "C13",
            "two stages sound as good as three",
            difference(each(whole, heard_merit), each(three, heard_merit)) != "lower",
            each(whole, heard_merit),
            found=f"figure of merit, against {statistics.median(each(three, heard_merit)):.3f} at "
            f"{statistics.median(each(three, level)):.2f} of the wanted RMS: the figure is blind to level",
        ),
        judge(
            "C15",
            "the whole system keeps its gradient norm below 100",
            max(each(whole, peak)) < 100,
            each(whole, peak),
            found=f"largest norm{recorded}",
        ),
        judge(
            "C15",
            "the whole system keeps the level (RMS ratio 0.8 to 1.2)",
            at_level(whole),
            [final["rms_ratio"] for final in finals],
            found=f"of the wanted RMS; {HEALTHY_RATIO[0]} to {HEALTHY_RATIO[1]} is healthy",
        ),
        judge(
            "C15",
            "the whole system's correlation with either source is below 0.3",
            max(map(nearer, finals), default=math.inf) < 0.3,
            [nearer(final) for final in finals],
            found="with the nearer source",
        ),
        *audit_cures(found[CREATIVE], {name: found[name] for name in CURES}),
    ]


def audit_continuations(
    judged: Mapping[str, Sequence[Mapping[str, float]]], name: str, songs: Sequence[tuple[str, str]]
) -> Verdict:
    """C13: whether the output `name` has a higher figure of merit than the plain average, on `judge_outputs` of
    continuation pairs and what `songs` they are from."""
    pairs = len(judged[name])
    found = advantage(judged, name, "average of latents", songs)
    enough = pairs >= FEW_PAIRS and found.draws > 1
    return judge(
        "C13",
        "continuations are coherent: they carry both clips better than their plain average does",
        found.verdict > 0 if enough else None,
        found=f"{found} figure of merit, over {pairs} continuation pairs",
        why=found.in_words("their plain average") if enough else f"fewer than {FEW_PAIRS} pairs, or all of one song",
    )


CURES = {
    RECONSTRUCTION: "a reconstruction term of 0.01 to 0.05",
    NOVELTY: "a novelty weight of 0.5 to 0.7 instead of 0.85",
    RESIDUAL: "a final residual of 0.2 to 0.3",
}


def audit_cures(ill: Sequence[Result], cured: dict[str, Sequence[Result]]) -> list[Verdict]:
    """Whether creative terms alone leave a constant output, and what brings back movement where they do."""
    constant = max(each(ill, movement)) < CONSTANT
    verdicts = [
        judge(
            "C15",
            "creative terms alone, with a final residual of 0.1, leave a constant output",
            constant,
            each(ill, movement),
            found=f"of the sources' movement, whatever the level; below {CONSTANT} is called constant",
        ),
        judge(
            "C15",
            "creative terms alone, with a final residual of 0.1, keep the level (RMS ratio 0.8 to 1.2)",
            at_level(ill),
            each(ill, level),
            found="of the wanted RMS",
        ),
    ]
    for name, results in cured.items():
        reason = "" if constant else "the output is not constant without it"
        if name == NOVELTY and not any(part.get("loss/novelty") for r in ill for part in (r.start, r.quarter, r.end)):
            reason = "the novelty term never acted, whatever its weight: no cosine passed 0.7"
        verdicts.append(
            judge(
                "C15",
                f"{CURES[name]} cures a constant output",
                difference(each(results, movement), each(ill, movement)) == "higher" if not reason else None,
                each(results, movement),
                found=f"of the sources' movement, {statistics.median(each(ill, movement)):.3f} without",
                why=reason,
            )
        )
    return verdicts


def within_three_epochs(result: Result) -> bool:
    """Whether a non-finite value came as early as the seeds' did."""
    return result.non_finite is not None and result.non_finite["step"] <= EPOCH_3_BATCH_205


def level(result: Result) -> float:
    """RMS of the output over the wanted one, on the validation pairs; 0 for a run without an end."""
    return result.final["rms_ratio"] if result.final else 0.0


def heard_merit(result: Result) -> float:
    """Figure of merit on the validation pairs after training; 0 for a run that met a non-finite value."""
    return result.final["heard/merit"] if result.final else 0.0


def movement(result: Result) -> float:
    """Movement of the sound over that of its clips; 0 for a run without an end."""
    return result.final["heard/movement_ratio"] if result.final else 0.0
