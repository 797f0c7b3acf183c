"""The terms of the objective, each a small function with its domain. So far the latent domain only.

Legend: B batch, D latent channels, T frames.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from lib.errors import UserError


@dataclass(frozen=True)
class LossConfig:
    """Weights of the terms; 0 leaves a term out."""

    input_weight: float = 0.3  # pulls the output towards the input latents ...
    target_weight: float = 0.3  # ... and as strongly towards the target's: neither source is to win by default

    def __post_init__(self):
        for name, weight in (("input_weight", self.input_weight), ("target_weight", self.target_weight)):
            if not (math.isfinite(weight) and weight >= 0):
                raise UserError(f"loss {name}={weight!r} is not allowed; use a finite number, 0 or more")
        if self.input_weight == self.target_weight == 0:
            raise UserError("loss input_weight and target_weight are both 0; give at least one term a weight")


def latent_mse(output: Tensor, reference: Tensor) -> Tensor:
    """Mean squared error over `[B, D, T]`, in squared latent units."""
    return (output - reference).square().mean()


def total_loss(output: Tensor, input: Tensor, target: Tensor, config: LossConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum for latents `[B, D, T]`, and every term before weighting, by name."""
    terms = {"input_mse": latent_mse(output, input), "target_mse": latent_mse(output, target)}
    return config.input_weight * terms["input_mse"] + config.target_weight * terms["target_mse"], terms
