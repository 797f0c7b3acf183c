"""Verdicts on the claims about training and collapse, whose parts are in claims.toml, from the ablation's runs."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lib.evaluation.baselines import Measured, advantage
from lib.lab import results as measured
from lib.lab import variants
from lib.lab.claims import NOT_TESTED, REPRODUCED, Verdict, decide
from lib.lab.results import Runs, at_level, by_variant, each, final, first_non_finite, growth, known, peak, stable
from lib.model.cascade import CascadeConfig
from lib.model.rms_law import Clips
from lib.training.config import TrainConfig
from lib.util.stats import difference

Values = Sequence[float]  # one per seed

EPOCH_3_BATCH_205 = 3 * 205  # source document 001 puts the NaN of claim C7 here: at least so many steps
EPOCHS = 200  # of claim C10
FEW_PAIRS = 8  # fewer pairs prove nothing about a mean
AGENT = 1_281_730  # parameters of the creative agent, from the shapes in the original checkpoints
FALLBACKS = ("stage 1 at 512", "3 stages", "4 stages", "5 stages")  # variants that claim C14 calls safe
CURES = (variants.RECONSTRUCTION, variants.NOVELTY, variants.RESIDUAL)  # of a constant output, by claim C15


def passing(results: Runs, key: str, low: float, high: float) -> dict[str, Any]:
    """Whether every run's measure passes through an interval in training, its values at the end, and its medians."""
    pairs = [(result.start[key], result.end[key]) for result in results if result.end]
    holds = bool(pairs) and all(min(pair) <= high and max(pair) >= low for pair in pairs)
    found = "no end was reached"
    if len(pairs) == len(results):
        found = "at the end, from {:.2f} to {:.2f}".format(*map(statistics.median, zip(*pairs, strict=True)))
    return {"holds": holds, "values": [last for _, last in pairs], "found": found}


def stability(fallback: str, results: Runs) -> Verdict:
    """C14, for one of its variants."""
    found = f"growth of the gradient norm in {min(r.steps for r in results)} steps; {first_non_finite(results)}"
    return decide(f"C14.{fallback}", each(results, growth), stable(results), found=found)


def audit_parameters(stages: Sequence[int]) -> list[Verdict]:
    """C3, from the parameters of both stages of the reference."""
    three, two = stages[0] + 2 * stages[1] + AGENT, sum(stages) + AGENT
    both = all(math.isclose(n, said, rel_tol=0.02) for n, said in zip(stages, (6.3e6, 14.2e6), strict=True))
    near_three, near_two = math.isclose(three, 27.4e6, rel_tol=0.01), math.isclose(two, 18.3e6, rel_tol=0.01)
    saved = 1 - two / three
    return [
        decide("C3.stages", holds=both, found=" and ".join(f"{n / 1e6:.2f} M" for n in stages)),
        decide("C3.three", holds=near_three, found=f"{three / 1e6:.1f} M with the agent"),
        decide("C3.two", holds=near_two, found=f"{two / 1e6:.1f} M with the agent"),
        decide("C3.saved", holds=abs(saved - 0.33) < 0.01, found=f"{saved:.0%} fewer"),
    ]


def audit_untrained(output_rms: Sequence[Values], scales: Sequence[Values], similarity: float) -> list[Verdict]:
    """C2, from the untrained reference, stage by stage, one value per seed; `similarity`: cosine of the clips."""
    laws = {s / 100: CascadeConfig.reference().predict_rms(Clips(similarity=s / 100)) for s in range(101)}
    alike = next(s for s, stages in laws.items() if max(stage.target_scale for stage in stages) <= 1.02)
    near = all(measured.within(values, 5.73 * 0.95, 5.73 * 1.05) for values in output_rms)
    return [
        decide("C2.levels", output_rms[1], near),
        decide(
            "C2.factors", scales[0], max(map(max, scales)) <= 1.05, facts={"alike": alike, "similarity": similarity}
        ),
    ]


def audit_spectral_norm(ours: float, torchs: float, lipschitz: Values) -> list[Verdict]:
    """C4: the largest σ in training, ours and torch's, and untrained Lipschitz constants, one per seed."""
    return [
        decide("C4.ours", holds=ours <= 1.001, found=f"{ours:.4f} at most"),
        decide("C4.torchs", holds=torchs <= 1.001, found=f"{torchs:.2f} at most"),
        decide("C4.cascade", lipschitz),
    ]


def audit_named(results: Runs) -> list[Verdict]:
    """C5, C6, C15, C8 but for its NaN and the 0.3× part of C14, from the settings of the source documents."""
    found = by_variant(results)
    reference, exploding, repair, learnable = (found[variant.name] for variant in variants.NAMED)
    trained = [r for r in learnable if r.start]  # without a step there is nothing to compare
    no_step = "" if trained else "no run took a step"
    peaks, healthy_peaks, quiet = each(exploding, peak), each(reference, peak), known(exploding, final("rms_ratio"))
    facts = {"healthy": f"{max(healthy_peaks):.2g}"}
    level_tells = at_level(reference) and not any(measured.within([r], *measured.HEALTHY_RATIO) for r in quiet)
    ends = ([run.final for run in runs if run.final] for runs in (repair, exploding))
    moves, fewer_moves = ([end["movement_ratio"] / end["rms_ratio"] for end in own] for own in ends)
    before_scaling = "stage2/rms_before_scaling"
    return [
        decide("C5.before_scaling", **passing(exploding, before_scaling, 1.09, 1.09)),
        decide("C6.before_scaling", **passing(repair, before_scaling, 2.5, 3.0)),
        decide("C5.projection", **passing(exploding, "stage2/projection_rms", 0.85, 0.85) | {"found": "at the end"}),
        decide("C5.quiet", quiet),
        decide("C8.one", each(trained, measured.scalar_ratio), short=no_step),
        decide("C8.all", each(trained, measured.scalars_against_rest), short=no_step),
        stability(variants.REPAIR, repair),
        decide("C14.level", known(repair, final("rms_ratio")), at_level(repair)),
        decide("C15.norm", peaks, max(healthy_peaks) < 100 <= min(peaks), facts=facts),
        decide("C15.ratio", quiet, level_tells),
        decide("C15.nearer", known(reference, measured.nearer)),
        decide("C15.movement", moves, difference(moves, fewer_moves) == "higher"),
    ]


def audit_grid(results: Runs) -> list[Verdict]:
    """The rest of C14, from the single changes."""
    found, missing = by_variant(results), "this variant was not run"
    return [stability(n, found[n]) if n in found else decide(f"C14.{n}", why=missing) for n in FALLBACKS]


def audit_gradients(results: Runs) -> list[Verdict]:
    """C7, C9 and the NaN of C8, from runs of three epochs and more of the settings of the source documents, and of the
    2×2×2 of the protections."""
    found = by_variant(results)
    reference, exploding, repair, learnable = (found[variant.name] for variant in variants.NAMED)
    weak, healthy = each(exploding, peak), each(reference, peak)
    facts = {"steps": min(r.steps for r in exploding), "healthy": f"{max(healthy):.2g}"}
    facts["ended"] = first_non_finite(learnable)
    return [
        decide("C7.weak_rises", each(exploding, growth), facts=facts),
        decide("C7.weak_ends", holds=not measured.never_non_finite(exploding), found=first_non_finite(exploding)),
        decide("C7.repair_rises", each(repair, growth)),
        decide("C7.weak_is_larger", weak, difference(weak, healthy) == "higher", facts=facts),
        decide("C7.reference", [r.end.get("grad_norm", math.inf) for r in reference]),
        decide("C7.last_projection", each(exploding, measured.last_projection_share)),
        decide("C8.ends", each(learnable, peak), not measured.never_non_finite(learnable), facts=facts),
        *audit_protections(found),
    ]


def audit_protections(found: Mapping[str, Runs]) -> list[Verdict]:
    """C9. The protections act on what is large: they are judged with an objective whose gradients are."""
    # (spectral norm, clamp, clipping) → runs of the exploding cascade
    cells = {levels: found[variant.name] for levels, variant in variants.PROTECTIONS.items()}
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
    whole, three = found[variants.WHOLE], found[variants.WHOLE_3]
    short = "" if epochs >= EPOCHS else f"{epochs} epochs only"
    early = [norm for run in whole for norm in run.grad_norm[: math.ceil(len(run.grad_norm) * 10 / epochs)]]
    parts = min(len(run.grad_norm) for run in whole)
    recorded = f" (recorded as medians of {parts} parts)" if parts < min(run.steps for run in whole) else ""
    masks = [run.quarter.get("masks/complementarity", 0.0) for run in whole]
    first = statistics.median(run.start.get("masks/complementarity", 0.0) for run in whole)
    ended = any(run.non_finite is not None and run.non_finite["step"] <= EPOCH_3_BATCH_205 for run in three)
    few_steps = measured.never_non_finite(three) and min(run.steps for run in three) < EPOCH_3_BATCH_205
    fewer = f"fewer than {EPOCH_3_BATCH_205} steps" if few_steps else ""
    merits, other_merits = (each(runs, measured.decoded_merit) for runs in (whole, three))
    other_merit, other_level = (statistics.median(each(three, m)) for m in (measured.decoded_merit, measured.level))
    facts = {"recorded": recorded, "first": first, "merit": other_merit, "level": other_level}
    finite = measured.never_non_finite(whole)
    return [
        decide("C7.whole_ends", holds=ended, found=first_non_finite(three), short=fewer),
        decide("C10.finite", holds=finite, found=first_non_finite(whole), short=finite and short),
        decide("C10.norm", early, facts=facts, short=short),
        decide("C11.factor", each(whole, measured.largest_factor)),
        decide("C12.masks", masks, facts=facts, short=short),
        decide("C13.as_good", merits, difference(merits, other_merits) != "lower", facts=facts),
        decide("C15.whole_norm", each(whole, peak), facts=facts),
        decide("C15.whole_level", known(whole, final("rms_ratio")), at_level(whole)),
        decide("C15.whole_nearer", known(whole, measured.nearer)),
        *audit_cures(found[variants.CREATIVE], {name: found[name] for name in CURES}),
    ]


def audit_continuations(measured: Measured, name: str, songs: Sequence[tuple[str, str]]) -> Verdict:
    """C13: whether `name` has a higher figure of merit than the plain average, over `measure_fusions` of pairs."""
    pairs, found = len(measured[name]), advantage(measured, name, "average of latents", songs)
    return decide(
        "C13.continuations",
        holds=found.verdict > 0,
        found=f"{found} figure of merit, over {pairs} continuation pairs",
        why=found.in_words("their plain average"),
        short="" if pairs >= FEW_PAIRS and found.draws > 1 else f"fewer than {FEW_PAIRS} pairs, or all of one song",
    )


def audit_cures(ill: Runs, cured: Mapping[str, Runs]) -> list[Verdict]:
    """Whether creative terms alone leave a constant output, and what brings back movement where they do."""
    without = each(ill, measured.movement)
    constant = decide("C15.constant", without)
    novelty_acts = any(part.get("loss/novelty") for r in ill for part in (r.start, r.quarter, r.end))
    verdicts = [constant, decide("C15.creative_level", each(ill, measured.level), at_level(ill))]
    for name, results in cured.items():
        short = "" if constant.verdict == REPRODUCED else "the output is not constant without it"
        if name == variants.NOVELTY and not novelty_acts:
            short = "the novelty term never acted, whatever its weight: no cosine passed 0.7"
        moves, facts = each(results, measured.movement), {"without": statistics.median(without)}
        verdicts.append(decide(f"C15.{name}", moves, difference(moves, without) == "higher", facts=facts, short=short))
    return verdicts


def disagreements(shallow: Sequence[Verdict], deep: Sequence[Verdict]) -> list[str]:
    """The parts of claims on which two depths come to different verdicts; 'not tested' counts as no verdict."""
    other = {(v.claim, v.said): v.verdict for v in deep}
    pairs = [(v, other.get((v.claim, v.said), v.verdict)) for v in shallow]
    changed = [(v, found) for v, found in pairs if NOT_TESTED not in (v.verdict, found) and found != v.verdict]
    return [f"{v.claim}, {v.said}: {v.verdict} → {found}" for v, found in changed]
