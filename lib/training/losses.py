"""The terms of the objective, each a small function with its domain: latents `[B, D, T]`, sound or masks. Each is a
mean over clips of what depends on one clip alone, so that a batch split over processes has the same loss. Legend: B
batch, D latent channels, T frames, N samples."""

import inspect
import math
from collections.abc import Callable
from dataclasses import field

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.audio.features import Sound, correlation, harmony_similarity
from lib.codec.codec import Codec, decoded
from lib.model.cascade import cosine, rms
from lib.model.masks import Masks
from lib.util.configs import Flag, NonNegative, Positive, check, checked_dataclass, choice, load_object, number
from lib.util.errors import UserError

NOVELTY_THRESHOLD = 0.7  # cosine above which an output counts as a copy
SHORTEST_WINDOW = 0.1  # seconds: 8 frames, more than half of the longest window that is reflected at the ends
STFT_SIZES = (512, 1024, 2048)  # samples
OUTLIER_DEVIATIONS = 3.0  # above a band's mean in the sources, in its standard deviations

Critic = Callable[[Tensor], Tensor]  # latents [B, D, T] → logits [B], positive for real


@checked_dataclass
class OwnTerm:
    """A term of your own: a function of output, input, target `[B, D, T]` and masks (or None) → scalar, for each batch
    the mean over its clips."""

    function: str  # 'module:function'
    weight: Positive
    source: str = ""  # sha256 of the module, which `train` fills in: a run resumes with the same one only

    def measure(self, *of: Tensor | Masks | None) -> Tensor:
        value = load_object(self.function)[0](*of)
        is_scalar = isinstance(value, Tensor) and value.ndim == 0
        check(is_scalar, f"the value of {self.function}", getattr(value, "shape", value), "a scalar, a mean over clips")
        return value


@checked_dataclass
class LossConfig:
    """Weights of the terms. A term with weight 0 is not computed, nor is anything that only it needs."""

    # on latents
    input_weight: NonNegative = 0.3  # pulls the output towards the input latents ...
    target_weight: NonNegative = 0.3  # ... and as strongly towards the target's: neither source should win by default
    # the same two pulls by the root of the squared error, whose gradient does not grow with the error
    input_rms_weight: NonNegative = 0.0
    target_rms_weight: NonNegative = 0.0
    novelty_weight: NonNegative = 0.0  # against an output whose cosine with a source is above 0.7
    adversarial_weight: NonNegative = 0.0  # towards latents that the discriminator takes for real
    # on decoded sound
    stft_weight: NonNegative = 0.0  # distance to both sources' spectra, in several resolutions
    mel_weight: NonNegative = 0.0  # the same on the mel scale
    rhythm_weight: NonNegative = 0.0  # the input's onsets ...
    harmony_weight: NonNegative = 0.0  # ... with the target's pitch classes
    # the same by finer features, in which neither treble nor loud notes win
    onsets_weight: NonNegative = 0.0  # the input's hits, in bands that count alike ...
    notes_weight: NonNegative = 0.0  # ... with the target's semitones
    onsets_left_weight: NonNegative = 0.0  # against the target's hits
    notes_left_weight: NonNegative = 0.0  # against semitones that only the input has
    # towards all that lasts in the target, as loud as there: the four above are as good for the few loudest lines alone
    tones_weight: NonNegative = 0.0
    anti_modulation_weight: NonNegative = 0.0  # against an output that copies the sources' loudness curve
    # 'log' has no bound: value and gradient grow without limit towards |corr| = 1
    anti_modulation: choice(("squared", "log")) = "squared"
    # off: roots and deviations without epsilons, as the source documents had them
    guarded: Flag = True
    outlier_weight: NonNegative = 0.0  # against mel bands far louder than in either source
    # part of every clip that is decoded, at random in training; None: all of it
    window_seconds: number(SHORTEST_WINDOW) | None = 2.0
    # on masks
    overlap_weight: NonNegative = 0.0
    coverage_weight: NonNegative = 0.0
    balance_weight: NonNegative = 0.0
    temporal_diversity_weight: NonNegative = 0.0
    own: dict[str, OwnTerm] = field(default_factory=dict)  # by name

    def __post_init__(self):
        if not any(self.weights.values()) and not self.own:
            raise UserError(f"{', '.join(self.weights)} are all 0; give at least one term a weight")
        for name in self.own:
            free = name.isidentifier() and f"{name.removesuffix('_mse')}_weight" not in self.weights
            check(free, "own", name, "a name of letters, digits and _ that no other term has")

    def find_own(self) -> None:
        """`UserError` for a term of your own that is not there, or takes something else."""
        for term in self.own.values():
            function, _ = load_object(term.function)
            try:
                inspect.signature(function).bind("output", "input", "target", "masks")
            except (TypeError, ValueError) as error:
                raise UserError(f"{term.function!r}: {error}; a term takes output, input, target and masks") from None

    @property
    def weights(self) -> dict[str, float]:
        """The weights by the names of their fields."""
        return {name: value for name, value in vars(self).items() if name.endswith("_weight")}

    def weighted(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The terms among `names` whose weight is not 0."""
        return tuple(name for name in names if getattr(self, f"{name}_weight"))


def latent_mse(output: Tensor, reference: Tensor) -> Tensor:
    """Mean squared error over `[B, D, T]`, in squared latent units."""
    return (output - reference).square().mean()


def rms_error(output: Tensor, reference: Tensor, guarded: bool = True) -> Tensor:
    """Root of each clip's mean squared error, mean over clips: its gradient is as long for errors of every size."""
    error = output - reference
    return (rms(error) if guarded else error.square().mean(dim=(1, 2)).sqrt()).mean()


def novelty(output: Tensor, source: Tensor) -> Tensor:
    """How far the cosine between output and source, `[B, D, T]`, is above 0.7: 0 to 0.3, mean over clips."""
    return (cosine(output, source) - NOVELTY_THRESHOLD).relu().mean()


def discriminator_hinge(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss (Lim and Ye 2017, arXiv 1705.02894): wants logits `[B]` above 1 for real and below −1 for fake."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def stft_distance(output: Sound, source: Sound) -> Tensor:
    """Spectral convergence ‖X − Y‖/‖Y‖ plus distance of log magnitudes, mean over windows of 512, 1024 and 2048 samples
    (Yamamoto et al. 2020, arXiv 1910.11480), and over clips. More than 1024 samples."""
    distances = []
    for size in STFT_SIZES:
        x, y = output.magnitudes(size), source.magnitudes(size)  # [B, bins, F]
        convergence = torch.linalg.matrix_norm(x - y) / torch.linalg.matrix_norm(y)
        distances.append(convergence.mean() + (x.log() - y.log()).abs().mean())
    return sum(distances) / len(distances)


def mel_distance(output: Sound, source: Sound) -> Tensor:
    """Mean absolute difference of the log mel powers, in nepers of power."""
    return (output.log_mel - source.log_mel).abs().mean()


def anti_modulation(output: Sound, source: Sound, form: str) -> Tensor:
    """Penalty on an output whose envelope follows a source's: mean of corr² or of −ln(1 − |corr|), which is infinite at
    |corr| = 1. Towards it, the gradient grows as √((1 + |corr|)/(1 − |corr|)) over the centred envelope's length."""
    corr = correlation(output.envelope, source.envelope, output.guarded).clamp(-1, 1)  # rounding may pass 1
    return (corr.square() if form == "squared" else -torch.log(1 - corr.abs())).mean()


@torch.no_grad()
def envelope_signs(output: Sound, *sources: Sound) -> dict[str, Tensor]:
    """What announces that a correlation of envelopes leaves the finite numbers, as means over clips that the largest
    rules: of 1 / (1 − |corr|) with each source, and of an envelope's mean over its deviation. At most 1e8."""
    copying = [1 / (1 - correlation(output.envelope, x.envelope).abs()).clamp_min(1e-8) for x in sources]
    envelopes = [x.envelope for x in (output, *sources)]
    flatness = [1 / (x.std(dim=-1, correction=0) / (x.mean(dim=-1) + 1e-8)).clamp_min(1e-8) for x in envelopes]
    return {"sign/copying": torch.stack(copying).mean(), "sign/flatness": torch.stack(flatness).mean()}


def spectral_outliers(output: Sound, input: Sound, target: Sound) -> Tensor:
    """How far mel bands of the output rise above three standard deviations of that band in both sources, squared.
    Deviations are taken over the sources' frames, in log power, and are at least 0.5."""
    sources = torch.cat([input.log_mel, target.log_mel], dim=2)  # [B, M, 2F]
    mean, deviation = sources.mean(dim=2, keepdim=True), sources.std(dim=2, keepdim=True).clamp_min(0.5)
    return ((output.log_mel - mean) / deviation - OUTLIER_DEVIATIONS).relu().square().mean()


def onsets_left(output: Sound, input: Sound, target: Sound) -> Tensor:
    """Partial regression of the output's hits on the target's, given the input's, 0 or more; mean over bands and clips.
    So the input's own hits are free where the target has them as well."""
    taken, kept, alike = (correlation(x.hits, y.hits) for x, y in ((output, target), (output, input), (input, target)))
    return ((taken - kept * alike) / (1 - alike.square()).clamp_min(0.1)).relu().mean()


def notes_left(output: Sound, input: Sound, target: Sound) -> Tensor:
    """Cosine of the output's semitones with those that stand out further in the input than in the target, 0 to 1."""
    only = (input.notes - target.notes).relu()
    return F.cosine_similarity(output.notes.flatten(1), only.flatten(1)).mean()


def overlap(masks: Masks) -> Tensor:
    """Mean of m_in · m_tgt, 1 − complementarity: 0 if nothing is taken from both clips, 0.25 for two masks of 0.5."""
    return (masks.input * masks.target).mean()


def coverage(masks: Masks) -> Tensor:
    """Mean square of the amount by which both masks together stay below 1: 0 if every place has a source."""
    return (1 - masks.input - masks.target).relu().square().mean()


def balance(masks: Masks) -> Tensor:
    """Squared distance of each mask's mean over (D, T) from 0.5, summed, mean over clips: neither clip should win."""
    return sum((mask.mean(dim=(1, 2)) - 0.5).square().mean() for mask in masks)


def temporal_diversity(masks: Masks) -> Tensor:
    """1 − twice the deviation of each channel's mask over time, mean: 1 for constant masks, 0 for half on, half off."""
    return 1 - sum((mask.var(dim=2, correction=0) + 1e-8).sqrt().mean() for mask in masks)


def tones(output: Sound, input: Sound, target: Sound) -> Tensor:
    """Distance of what lasts in output and target, over the target's own size or, if that is more, a quarter of the
    input's: 0 for the target, at most 1 for silence, bounded where the target is silent. Mean over clips."""
    size = torch.maximum(rms(target.tones), rms(input.tones) / 4)
    return (rms(output.tones - target.tones) / size).mean()


ON_SOUND: dict[str, Callable[[Sound, Sound, Sound, LossConfig], Tensor]] = {  # of output, input and target
    "stft": lambda y, a, b, config: (stft_distance(y, a) + stft_distance(y, b)) / 2,
    "mel": lambda y, a, b, config: (mel_distance(y, a) + mel_distance(y, b)) / 2,
    "rhythm": lambda y, a, b, config: 1 - correlation(y.onsets, a.onsets).mean(),  # 0 to 2
    "harmony": lambda y, a, b, config: 1 - harmony_similarity(y, b).mean(),  # of pitch classes over time
    "onsets": lambda y, a, b, config: 1 - correlation(y.hits, a.hits).mean(),
    "notes": lambda y, a, b, config: 1 - F.cosine_similarity(y.notes.flatten(1), b.notes.flatten(1)).mean(),
    "onsets_left": lambda y, a, b, config: onsets_left(y, a, b),
    "notes_left": lambda y, a, b, config: notes_left(y, a, b),
    "tones": lambda y, a, b, config: tones(y, a, b),
    "anti_modulation": lambda y, a, b, config: sum(anti_modulation(y, x, config.anti_modulation) for x in (a, b)),
    "outlier": lambda y, a, b, config: spectral_outliers(y, a, b),
}
ON_MASKS = {"overlap": overlap, "coverage": coverage, "balance": balance, "temporal_diversity": temporal_diversity}
SOUND_TERMS, MASK_TERMS = tuple(ON_SOUND), tuple(ON_MASKS)


def total_loss(
    output: Tensor,
    input: Tensor,
    target: Tensor,
    config: LossConfig,
    codec: Codec | None = None,
    *,
    masks: Masks | None = None,
    critic: Critic | None = None,
    training: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum for latents `[B, D, T]`, and every term before weighting, by name. The two squared errors are always
    among the terms, so that runs with different objectives can be compared. Terms on sound need a `codec`, terms on
    masks `masks` (`ValueError` without); without a `critic` the adversarial term is left out. The decoded window is
    the middle; in `training` it is drawn from torch's generator, and `envelope_signs` are beside the terms."""
    terms = {"input_mse": latent_mse(output, input), "target_mse": latent_mse(output, target)}
    weights = {"input_mse": config.input_weight, "target_mse": config.target_weight}
    clips = {"input_rms": input, "target_rms": target}
    terms |= {name: rms_error(output, clips[name], config.guarded) for name in config.weighted(tuple(clips))}
    if config.novelty_weight:
        terms["novelty"] = novelty(output, input) + novelty(output, target)
    if config.adversarial_weight and critic is not None:
        terms["adversarial"] = -critic(output).mean()  # the generator's side of the hinge loss
    if on_sound := config.weighted(SOUND_TERMS):
        if codec is None:
            raise ValueError(f"{on_sound[0]}_weight needs sound: give total_loss the codec")
        seconds, frames = config.window_seconds or math.inf, output.shape[2]
        length = round(min(frames, max(1, seconds * codec.sample_rate / codec.hop)))
        latest = frames - length
        start = int(torch.randint(latest + 1, ())) if training and latest else latest // 2
        clips = (x[..., start : start + length] for x in (output, input.detach(), target.detach()))
        sounds = [Sound(decoded(codec, x), config.guarded) for x in clips]
        terms |= {name: ON_SOUND[name](*sounds, config) for name in on_sound}
        if training and "anti_modulation" in on_sound:
            terms |= envelope_signs(*sounds)
    if on_masks := config.weighted(MASK_TERMS):
        if masks is None:
            raise ValueError(f"{on_masks[0]}_weight needs masks: give the model a masking")
        terms |= {name: ON_MASKS[name](masks) for name in on_masks}
    terms |= {name: own.measure(output, input, target, masks) for name, own in config.own.items()}
    weights |= {name: getattr(config, f"{name}_weight", 0.0) for name in terms if name not in weights}
    weights |= {name: own.weight for name, own in config.own.items()}
    return sum(weights[name] * term for name, term in terms.items() if "/" not in name), terms
