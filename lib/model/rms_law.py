"""The law of the RMS collapse, derived in notebook 03: the RMS of every stage from widths, weights and clips alone. A
stage adds w · residual to a projection. LayerNorm fixes the norm of what the projection reads, and the projection's σ
is 1, so its RMS starts at a value, and stays below a ceiling, that follow from d and D. What the sum lacks of the
clips' RMS, RMS scaling has to amplify. w: residual weight; p, r: RMS of projection, residual; d, D: of `projection`."""

import math
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from torch import Tensor

from lib.model.projection import rms_ceiling

if TYPE_CHECKING:
    from lib.model.cascade import CascadeConfig, StageConfig

LATENT_RMS = 5.7  # of latents of music (source document 000, claim C1); the mdct codec is normalised to it
SAFE_SCALE = 1.5  # upper end of the reference's clamp: what a stage without a clamp may amplify by

Value = TypeVar("Value", float, Tensor)


def pair_rms(input_rms: Value, target_rms: Value) -> Value:
    """The RMS that scaling aims at, which is that of both clips together: √((rms_in² + rms_tgt²)/2)."""
    mean_square = (input_rms**2 + target_rms**2) / 2
    return mean_square.sqrt() if isinstance(mean_square, Tensor) else math.sqrt(mean_square)


class Clips(NamedTuple):
    """What the law needs to know of a pair: the RMS of both latents, and their cosine as vectors."""

    input_rms: float = LATENT_RMS
    target_rms: float = LATENT_RMS
    similarity: float = 0.0


UNLIKE = Clips()  # two unlike clips are nearly orthogonal


class Mixture(NamedTuple):
    """The signal `input` · input + `target` · target + a part orthogonal to both clips, of RMS `other`."""

    input: float
    target: float
    other: float = 0.0

    def rms(self, clips: Clips) -> float:
        cross = 2 * self.input * self.target * clips.similarity * clips.input_rms * clips.target_rms
        own = (self.input * clips.input_rms) ** 2 + (self.target * clips.target_rms) ** 2
        return math.sqrt(max(own + cross + self.other**2, 0.0))


INPUT, TARGET = Mixture(1.0, 0.0), Mixture(0.0, 1.0)


def mean_of(signals: list[Mixture]) -> Mixture:
    """The mean of a stage's signals, of which only one, the previous stage's output, may have an `other` part."""
    return Mixture(*(sum(parts) / len(signals) for parts in zip(*signals, strict=True)))


def initial_projection_rms(d: int, D: int, *, spectral_norm: bool = True) -> float:
    """RMS of an untrained projection `d → D` of LayerNorm's output with γ = 1, before its bias. A random matrix with
    entries of variance v maps a vector of norm √d to one of RMS √(d·v). `nn.Linear` starts with v = 1/(3d), so at RMS
    √(1/3) whatever the width. Spectral norm divides by the largest singular value: about √v·(√d + √D), less the
    Tracy-Widom mean at finite sizes (Johnstone 2001, Annals of Statistics 29(2))."""
    if not spectral_norm:
        return math.sqrt(1 / 3)
    edge = math.sqrt(d - 1) + math.sqrt(D)
    spread = edge * (1 / math.sqrt(d - 1) + 1 / math.sqrt(D)) ** (1 / 3)
    return math.sqrt(d) / math.sqrt(edge**2 - 1.2065 * spread)


def rms_before_scaling(projection: float, residual: float, weight: float, alignment: float = 0.0) -> float:
    """RMS of projection + w · residual whose cosine is `alignment`: √(p² + w²r² + 2·w·p·r·cos)."""
    squared = projection**2 + (weight * residual) ** 2 + 2 * weight * projection * residual * alignment
    return math.sqrt(max(squared, 0.0))


def smallest_safe_weight(projection: float, residual: float, needed: float, *, preserving: bool = False) -> float:
    """Smallest w at which the RMS before scaling reaches `needed`, for a projection orthogonal to the residual:
    p² + w²r² ≥ needed², or (1 − w²)·p² + w²r² ≥ needed² in RMS-preserving mixing, where w ≤ 1. inf: there is none."""
    lacking = needed**2 - projection**2
    if lacking <= 0:
        return 0.0
    gain = residual**2 - (projection**2 if preserving else 0.0)
    weight = math.sqrt(lacking / gain) if gain > 0 else math.inf
    return math.inf if preserving and weight > 1 else weight


class StagePrediction(NamedTuple):
    """Predicted RMS of one stage, in latent units. Names as in `StageTrace`."""

    projection_rms: float
    residual_rms: float  # before its weight
    rms_before_scaling: float
    target_scale: float
    applied_scale: float
    output_rms: float
    highest_rms_before_scaling: float  # projection at its ceiling and parallel to w · r, with γ = 1 and no biases
    smallest_safe_weight: float  # the smallest that keeps `target_scale` at or below `safe_scale`; inf: there is none
    safe_scale: float  # upper end of the clamp


def predict_stage(
    stage: "StageConfig", residual: Mixture, clips: Clips, *, d: int, D: int
) -> tuple[StagePrediction, Mixture]:
    """One stage at initialisation: its prediction, and its output as a mixture for the next stage. A random projection
    is taken as orthogonal to both clips. Learnable scaling aims at the mean of both RMS, fixed at `pair_rms`."""
    weight, gain, share = stage.residual_weight, stage.projection_gain, stage.projection_weight
    goal, r = pair_rms(clips.input_rms, clips.target_rms), residual.rms(clips)
    p, ceiling = gain * initial_projection_rms(d, D, spectral_norm=stage.spectral_norm), gain * rms_ceiling(d, D)
    if stage.projection_level is not None:
        p = ceiling = stage.projection_level * goal
    mixed = Mixture(weight * residual.input, weight * residual.target, math.hypot(weight * residual.other, share * p))
    before = mixed.rms(clips)
    highest = share * ceiling + abs(weight) * r
    if stage.rms_scaling == "learnable":
        goal = (clips.input_rms + clips.target_rms) / 2
    target_scale = goal / (before + 1e-8)
    low, high = (0.0, math.inf) if stage.clamp is None else stage.clamp
    safe = SAFE_SCALE if stage.clamp is None else high
    applied = 1.0 if stage.rms_scaling == "off" else min(max(target_scale, low), high)
    prediction = StagePrediction(
        projection_rms=p,
        residual_rms=r,
        rms_before_scaling=before,
        target_scale=target_scale,
        applied_scale=applied,
        output_rms=applied * before,
        highest_rms_before_scaling=highest if stage.spectral_norm or stage.projection_level else math.inf,
        smallest_safe_weight=smallest_safe_weight(p, r, goal / safe, preserving=stage.mixing == "preserving"),
        safe_scale=safe,
    )
    return prediction, Mixture(*(applied * part for part in mixed))


def check_collapse(config: "CascadeConfig") -> list[str]:
    """A message for each stage whose RMS collapses by design, naming the smallest safe weight: where, for two unlike
    clips, the law predicts a target scale above what its clamp allows (1.5 without a clamp)."""
    messages = []
    for i, (stage, found) in enumerate(zip(config.stages, config.predict_rms(), strict=True)):
        if found.target_scale <= found.safe_scale * (1 + 1e-9):
            continue
        advice = "no weight is safe"
        if found.smallest_safe_weight <= stage.residual_weight:
            advice = "a smaller weight is safe"
        elif math.isfinite(found.smallest_safe_weight):  # rounded up, or the weight in the message would not be safe
            advice = f"the smallest safe weight is {math.ceil(100 * found.smallest_safe_weight) / 100:.2f}"
        messages.append(
            f"stage {i}: residual_weight={stage.residual_weight:g} lets the RMS collapse: the predicted RMS before "
            f"scaling is {found.rms_before_scaling:.2f}, so the target scale is {found.target_scale:.1f}, above "
            f"{found.safe_scale:g}; {advice} at width {config.width(i)}"
        )
    return messages
