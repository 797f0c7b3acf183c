"""Verdicts on the claims about the collapse, whose parts are in claims.toml, from the ablation's runs. Those on long
trainings are recorded with them, by `make record`."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from lib.evaluation.baselines import Measured, advantage
from lib.lab import results as measured
from lib.lab import variants
from lib.lab.claims import NOT_TESTED, Verdict, decide
from lib.lab.results import Runs, at_level, by_variant, each, final, first_non_finite, growth, known, peak, stable
from lib.model.cascade import CascadeConfig
from lib.model.rms_law import Clips
from lib.util.stats import difference

Values = Sequence[float]  # one per seed

FEW_PAIRS = 8  # fewer pairs prove nothing about a mean
AGENT = 1_281_730  # parameters of the creative agent, from the shapes in the original checkpoints
FALLBACKS = ("stage 1 at 512", "3 stages", "4 stages", "5 stages")  # variants that claim C14 calls safe


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
    small, facts = max(map(max, scales)) <= 1.05, {"alike": alike, "similarity": similarity}
    return [decide("C2.levels", output_rms[1], near), decide("C2.factors", scales[0], small, facts=facts)]


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


def disagreements(shallow: Sequence[Verdict], deep: Sequence[Verdict]) -> list[str]:
    """The parts of claims on which two depths come to different verdicts; 'not tested' counts as no verdict."""
    other = {(v.claim, v.said): v.verdict for v in deep}
    pairs = [(v, other.get((v.claim, v.said), v.verdict)) for v in shallow]
    changed = [(v, found) for v, found in pairs if NOT_TESTED not in (v.verdict, found) and found != v.verdict]
    return [f"{v.claim}, {v.said}: {v.verdict} → {found}" for v, found in changed]
