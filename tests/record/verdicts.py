"""Verdicts on the claims about long trainings, whose parts are in lib/lab/claims.toml, and the table of the schedule,
from the runs that a record keeps: they are recorded beside them, and notebooks 03 and 04 show them."""

import math
import statistics
from collections.abc import Mapping
from typing import Any

from lib.lab.claims import REPRODUCED, Verdict, decide
from lib.lab.results import (
    Groups,
    Result,
    Runs,
    at_level,
    by_variant,
    each,
    final,
    first_non_finite,
    growth,
    known,
    last_projection_share,
    level,
    nearer,
    never_non_finite,
    peak,
    stable,
)
from lib.lab.variants import NAMED, PROTECTIONS
from lib.training.config import TrainConfig
from lib.util.stats import difference

WHOLE, WHOLE_3 = "whole system", "whole system, 3 stages"
CREATIVE, RECONSTRUCTION = "creative terms alone", "creative terms, reconstruction"
NOVELTY, RESIDUAL = "creative terms, novelty 0.6", "creative terms, residual 0.3"

EPOCH_3_BATCH_205 = 3 * 205  # source document 001 puts the NaN of claim C7 here: at least so many steps
EPOCHS = 200  # of claim C10
CURES = (RECONSTRUCTION, NOVELTY, RESIDUAL)  # of a constant output, by claim C15

decoded_merit = final("model/merit", 0.0)  # figure of merit
movement = final("model/movement_ratio", 0.0)  # movement of the decoded output over its clips' mean


def largest_factor(result: Result) -> float:
    """Largest target scale of any stage, at the start, a quarter or the end of training."""
    parts = (result.start, result.quarter, result.end)
    return max((v for part in parts for k, v in part.items() if k.endswith("/target_scale")), default=math.inf)


def audit_gradients(results: Runs) -> list[Verdict]:
    """C7, C9 and the NaN of C8, from runs of three epochs and more of the settings of the source documents, and of the
    2×2×2 of the protections."""
    found = by_variant(results)
    reference, exploding, repair, learnable = (found[variant.name] for variant in NAMED)
    weak, healthy = each(exploding, peak), each(reference, peak)
    facts = {"steps": min(r.steps for r in exploding), "healthy": f"{max(healthy):.2g}"}
    facts["ended"] = first_non_finite(learnable)
    return [
        decide("C7.weak_rises", each(exploding, growth), facts=facts),
        decide("C7.weak_ends", holds=not never_non_finite(exploding), found=first_non_finite(exploding)),
        decide("C7.repair_rises", each(repair, growth)),
        decide("C7.weak_is_larger", weak, difference(weak, healthy) == "higher", facts=facts),
        decide("C7.reference", [r.end.get("grad_norm", math.inf) for r in reference]),
        decide("C7.last_projection", each(exploding, last_projection_share)),
        decide("C8.ends", each(learnable, peak), not never_non_finite(learnable), facts=facts),
        *audit_protections(found),
    ]


def audit_protections(found: Mapping[str, Runs]) -> list[Verdict]:
    """C9. The protections act on what is large: they are judged with an objective whose gradients are."""
    # (spectral norm, clamp, clipping) → runs of the exploding cascade
    cells = {levels: found[variant.name] for levels, variant in PROTECTIONS.items()}
    bare, clipped, limit = cells[False, False, False], cells[False, False, True], TrainConfig().clip
    bare_peaks = each(bare, peak)
    facts = {"bare": max(bare_peaks), "ended": first_non_finite(bare)}
    short = "" if max(bare_peaks) > limit else f"without any protection no norm passed the limit of {limit:g}"
    protected = {"all": (True,) * 3, "norm": (True, False, False), "clamp": (False, True, False)}
    peaks = {name: each(cells[on], peak) for name, on in protected.items()}
    return [
        *(decide(f"C9.{n}", p, difference(p, bare_peaks) == "lower", facts=facts) for n, p in peaks.items()),
        decide("C9.clipping", each(clipped, peak), stable(clipped) and not stable(bare), short=short),
        decide("C9.bare", each(bare, growth), not stable(bare), facts=facts),
    ]


def audit_schedule(results: Runs, epochs: int) -> list[Verdict]:
    """C7, C10 to C13 and C15, from runs of `epochs` epochs of the variants in `SCHEDULED`."""
    found = by_variant(results)
    whole, three = found[WHOLE], found[WHOLE_3]
    short = "" if epochs >= EPOCHS else f"{epochs} epochs only"
    early = [norm for run in whole for norm in run.grad_norm[: math.ceil(len(run.grad_norm) * 10 / epochs)]]
    parts = min(len(run.grad_norm) for run in whole)
    recorded = f" (recorded as medians of {parts} parts)" if parts < min(run.steps for run in whole) else ""
    masks = [run.quarter.get("masks/complementarity", 0.0) for run in whole]
    first = statistics.median(run.start.get("masks/complementarity", 0.0) for run in whole)
    ended = any(run.non_finite is not None and run.non_finite["step"] <= EPOCH_3_BATCH_205 for run in three)
    few_steps = never_non_finite(three) and min(run.steps for run in three) < EPOCH_3_BATCH_205
    fewer = f"fewer than {EPOCH_3_BATCH_205} steps" if few_steps else ""
    merits, other_merits = (each(runs, decoded_merit) for runs in (whole, three))
    other_merit, other_level = (statistics.median(each(three, m)) for m in (decoded_merit, level))
    facts = {"recorded": recorded, "first": first, "merit": other_merit, "level": other_level}
    finite = never_non_finite(whole)
    return [
        decide("C7.whole_ends", holds=ended, found=first_non_finite(three), short=fewer),
        decide("C10.finite", holds=finite, found=first_non_finite(whole), short=finite and short),
        decide("C10.norm", early, facts=facts, short=short),
        decide("C11.factor", each(whole, largest_factor)),
        decide("C12.masks", masks, facts=facts, short=short),
        decide("C13.as_good", merits, difference(merits, other_merits) != "lower", facts=facts),
        decide("C15.whole_norm", each(whole, peak), facts=facts),
        decide("C15.whole_level", known(whole, final("rms_ratio")), at_level(whole)),
        decide("C15.whole_nearer", known(whole, nearer)),
        *audit_cures(found[CREATIVE], {name: found[name] for name in CURES}),
    ]


def audit_cures(ill: Runs, cured: Mapping[str, Runs]) -> list[Verdict]:
    """Whether creative terms alone leave a constant output, and what brings back movement where they do."""
    without = each(ill, movement)
    constant = decide("C15.constant", without)
    novelty_acts = any(part.get("loss/novelty") for r in ill for part in (r.start, r.quarter, r.end))
    verdicts = [constant, decide("C15.creative_level", each(ill, level), at_level(ill))]
    for name, results in cured.items():
        short = "" if constant.verdict == REPRODUCED else "the output is not constant without it"
        if name == NOVELTY and not novelty_acts:
            short = "the novelty term never acted, whatever its weight: no cosine passed 0.7"
        moves, facts = each(results, movement), {"without": statistics.median(without)}
        verdicts.append(decide(f"C15.{name}", moves, difference(moves, without) == "higher", facts=facts, short=short))
    return verdicts


def schedule_rows(groups: Groups) -> list[dict[str, Any]]:
    """A row for each variant of the whole schedule: how its runs ended, and the mean objective metrics after it."""
    rows = []
    for name, runs in groups.items():
        row = {"variant": name, "seeds": len(runs), "steps": min(run.steps for run in runs)}
        row["non-finite"] = sum(run.non_finite is not None for run in runs)
        for key in ("rhythm", "harmony", "merit", "movement_ratio"):
            values = known(runs, final(f"model/{key}"))
            row[key.removesuffix("_ratio")] = f"{sum(values) / max(1, len(values)):.2f}"
        rows.append(row)
    return rows
