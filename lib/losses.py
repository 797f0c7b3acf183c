"""The terms of the objective, each a small function with its domain: latents `[B, D, T]` or sound `[B, 1, N]`.

Legend: B batch, D latent channels, T frames, N samples.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lib.errors import UserError

SEGMENTS = 250  # of an envelope
ANTI_MODULATIONS = ("squared", "log")

Decode = Callable[[Tensor], Tensor]  # latents [B, D, T] → sound [B, 1, N], differentiable


@dataclass(frozen=True)
class LossConfig:
    """Weights of the terms; 0 leaves a term out. `anti_modulation` chooses that term's form."""

    input_weight: float = 0.3  # pulls the output towards the input latents ...
    target_weight: float = 0.3  # ... and as strongly towards the target's: neither source is to win by default
    input_rms_weight: float = 0.0  # the same two pulls by the root of the squared error, whose gradient does not grow
    target_rms_weight: float = 0.0  # with the error
    anti_modulation_weight: float = 0.0  # against an output that takes over the sources' loudness curve; decodes
    anti_modulation: str = "squared"  # 'log' has no bound: value and gradient grow without end towards |corr| = 1

    def __post_init__(self):
        weights = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.type is float}
        for name, weight in weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise UserError(f"loss {name}={weight!r} is not allowed; use a finite number, 0 or more")
        if not any(weights.values()):
            raise UserError(f"loss: {', '.join(weights)} are all 0; give at least one term a weight")
        if self.anti_modulation not in ANTI_MODULATIONS:
            choices = ", ".join(ANTI_MODULATIONS)
            raise UserError(f"loss anti_modulation={self.anti_modulation!r} is not allowed; use one of {choices}")


def latent_mse(output: Tensor, reference: Tensor) -> Tensor:
    """Mean squared error over `[B, D, T]`, in squared latent units."""
    return (output - reference).square().mean()


def rms_error(output: Tensor, reference: Tensor) -> Tensor:
    """Root of each clip's mean squared error over (D, T), `[B, D, T]` twice → mean over clips, in latent units.

    Its gradient has the same length however large the error is; that of `latent_mse` grows with the error.
    """
    return ((output - reference).square().mean(dim=(1, 2)) + 1e-8).sqrt().mean()


def envelope(wav: Tensor) -> Tensor:
    """Loudness curve: RMS of each of 250 equal segments, `[B, 1, N] → [B, 250]`. N below 250 raises `ValueError`."""
    length = wav.shape[-1] // SEGMENTS
    if length < 1:
        raise ValueError(f"an envelope needs at least {SEGMENTS} samples, got {wav.shape[-1]}")
    segments = wav[:, 0, : SEGMENTS * length].unflatten(1, (SEGMENTS, length))
    return (segments.square().mean(dim=2) + 1e-10).sqrt()


def correlation(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's correlation along the last axis, `[B, n]` twice → `[B]`; 0 where one of them is constant."""
    x, y = x - x.mean(dim=-1, keepdim=True), y - y.mean(dim=-1, keepdim=True)
    return torch.nn.functional.cosine_similarity(x, y, dim=-1)


def anti_modulation(output: Tensor, source: Tensor, form: str) -> Tensor:
    """Penalty on an output `[B, 1, N]` whose envelope follows a source's: mean of corr² or of −ln(1 − |corr|).

    The logarithm has no bound: at |corr| = 1 it is infinite, and towards it its gradient with respect to an envelope of
    length l around its mean grows as √((1 + |corr|)/(1 − |corr|))/l.
    """
    corr = correlation(envelope(output), envelope(source)).clamp(-1, 1)  # rounding may pass 1
    return (corr.square() if form == "squared" else -torch.log(1 - corr.abs())).mean()


def total_loss(
    output: Tensor, input: Tensor, target: Tensor, config: LossConfig, decode: Decode | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum for latents `[B, D, T]`, and every term before weighting, by name.

    The two squared errors are always among the terms: runs of different objectives compare by them. Terms on sound need
    `decode`, and call it only when their weight is not 0.
    """
    terms = {"input_mse": latent_mse(output, input), "target_mse": latent_mse(output, target)}
    weights = {"input_mse": config.input_weight, "target_mse": config.target_weight}
    for name, source, weight in (
        ("input_rms", input, config.input_rms_weight),
        ("target_rms", target, config.target_rms_weight),
    ):
        if weight:
            terms[name], weights[name] = rms_error(output, source), weight
    if config.anti_modulation_weight:
        if decode is None:
            raise ValueError("anti_modulation_weight needs sound: give total_loss the codec's decode")
        sound = decode(output)
        with torch.no_grad():
            sources = decode(input), decode(target)
        penalties = [anti_modulation(sound, source, config.anti_modulation) for source in sources]
        terms["anti_modulation"], weights["anti_modulation"] = sum(penalties), config.anti_modulation_weight
    return sum(weights[name] * term for name, term in terms.items()), terms
