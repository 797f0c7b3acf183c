"""The law of the RMS collapse: the RMS of every stage, predicted from widths, weights and clips before any training.

Derived in notebook 03. A stage adds w · residual to a projection. LayerNorm fixes the length of what the projection
reads and its σ is 1, so its RMS has a start and a ceiling that follow from d and D: what residual and projection
together lack of the clips' RMS, RMS scaling must amplify.

Legend: d width of the stage, D latent channels, w residual weight, L RMS of the latents.
"""

import math
from dataclasses import dataclass

from lib.model.projection import rms_ceiling

LATENT_RMS = 5.7  # seed 000 (claim C1); the mdct codec is normalised to it
SAFE_FACTOR = 1.5  # the upper end of the reference's clamp: what a stage may amplify and still reach the wanted RMS


@dataclass(frozen=True)
class Clips:
    """What the law needs to know of a pair: both RMS, and the cosine between the two latents as vectors."""

    input_rms: float = LATENT_RMS
    target_rms: float = LATENT_RMS
    similarity: float = 0.0  # two unlike clips are close to orthogonal

    @property
    def goal(self) -> float:
        """The RMS that scaling aims at: √((in² + tgt²)/2)."""
        return math.sqrt((self.input_rms**2 + self.target_rms**2) / 2)


@dataclass(frozen=True)
class Mixture:
    """A signal as `input` · input + `target` · target + something orthogonal to both of RMS `other`."""

    input: float
    target: float
    other: float = 0.0

    def rms(self, clips: Clips) -> float:
        cross = 2 * self.input * self.target * clips.similarity * clips.input_rms * clips.target_rms
        own = (self.input * clips.input_rms) ** 2 + (self.target * clips.target_rms) ** 2
        return math.sqrt(max(own + cross + self.other**2, 0.0))

    def scaled(self, factor: float) -> "Mixture":
        return Mixture(self.input * factor, self.target * factor, self.other * factor)


INPUT, TARGET = Mixture(1.0, 0.0), Mixture(0.0, 1.0)


def mean_of(signals: list[Mixture]) -> Mixture:
    """The mean of signals whose `other` parts have one origin at most, as those of one stage's sources have."""
    k = len(signals)
    return Mixture(*(sum(getattr(s, name) for s in signals) / k for name in ("input", "target", "other")))


@dataclass(frozen=True)
class StagePrediction:
    """Predicted RMS of one stage, in latent units. Names as in `StageTrace`."""

    projection_rms: float
    residual_rms: float  # before its weight
    rms_before_scaling: float
    target_scale: float
    applied_scale: float
    output_rms: float
    highest_rms_before_scaling: (
        float  # projection at its ceiling and along w · r: passed only as γ leaves 1, or biases 0
    )
    smallest_safe_weight: float  # the smallest at which `target_scale` is at most `safe_factor`; inf: none is
    safe_factor: float


def initial_projection_rms(d: int, D: int, *, spectral_norm: bool = True) -> float:
    """RMS of an untrained projection `d → D` of LayerNorm's output with γ = 1, before its bias.

    A random matrix with entries of variance v gives a vector of norm √d the RMS √(d·v). `nn.Linear` starts with
    v = 1/(3d), so RMS √(1/3) at any width. Spectral norm divides it by the largest singular value: near √v·(√d + √D),
    for finite sizes the Tracy-Widom mean below that (Johnstone 2001, Annals of Statistics 29(2)).
    """
    if not spectral_norm:
        return math.sqrt(1 / 3)
    edge = math.sqrt(d - 1) + math.sqrt(D)
    spread = edge * (1 / math.sqrt(d - 1) + 1 / math.sqrt(D)) ** (1 / 3)
    return math.sqrt(d) / math.sqrt(edge**2 - 1.2065 * spread)


def rms_before_scaling(projection: float, residual: float, weight: float, alignment: float = 0.0) -> float:
    """RMS of projection + w · residual whose cosine is `alignment`: √(p² + w²r² + 2·w·p·r·cos)."""
    squared = projection**2 + (weight * residual) ** 2 + 2 * weight * projection * residual * alignment
    return math.sqrt(max(squared, 0.0))


def preserving_weight(weight: float) -> float:
    """What RMS-preserving mixing gives the projection beside a residual of weight w: √(1 − w²)."""
    return math.sqrt(1 - weight**2)


def smallest_safe_weight(projection: float, residual: float, needed: float, *, preserving: bool = False) -> float:
    """Smallest w whose mixed RMS reaches `needed`, the projection orthogonal to the residual; inf where none does.

    From p² + w²r² ≥ needed², or (1 − w²)·p² + w²r² ≥ needed² with RMS-preserving mixing (then w ≤ 1).
    """
    lacking = needed**2 - projection**2
    if lacking <= 0:
        return 0.0
    gain = residual**2 - (projection**2 if preserving else 0.0)
    weight = math.sqrt(lacking / gain) if gain > 0 else math.inf
    return math.inf if preserving and weight > 1 else weight


def predict_stage(
    residual: Mixture,
    clips: Clips,
    *,
    d: int,
    D: int,
    weight: float,
    gain: float = 1.0,
    spectral_norm: bool = True,
    preserving: bool = False,
    clamp: tuple[float, float] | None = (0.7, 1.5),
    scaling: str = "fixed",
) -> tuple[StagePrediction, Mixture]:
    """One stage at initialisation: its prediction, and its output as a mixture for the stage after it.

    The projection of a random stage is taken as orthogonal to both clips. `scaling`: as `StageConfig.rms_scaling`;
    'learnable' starts at the mean of both RMS where 'fixed' takes the root mean square.
    """
    share = preserving_weight(weight) if preserving else 1.0
    projection, r = gain * initial_projection_rms(d, D, spectral_norm=spectral_norm), residual.rms(clips)
    mixed = Mixture(
        weight * residual.input, weight * residual.target, math.hypot(weight * residual.other, share * projection)
    )
    m = mixed.rms(clips)
    goal = (clips.input_rms + clips.target_rms) / 2 if scaling == "learnable" else clips.goal
    wanted = goal / (m + 1e-8)
    applied = wanted if clamp is None else min(max(wanted, clamp[0]), clamp[1])
    applied = 1.0 if scaling == "off" else applied
    safe = clamp[1] if clamp is not None else SAFE_FACTOR
    prediction = StagePrediction(
        projection_rms=projection,
        residual_rms=r,
        rms_before_scaling=m,
        target_scale=wanted,
        applied_scale=applied,
        output_rms=applied * m,
        highest_rms_before_scaling=share * gain * rms_ceiling(d, D) + abs(weight) * r if spectral_norm else math.inf,
        smallest_safe_weight=smallest_safe_weight(projection, r, goal / safe, preserving=preserving),
        safe_factor=safe,
    )
    return prediction, mixed.scaled(applied)
