"""What makes the task harder as training goes on: noise in what the model sees, targets from other pairs.

Legend: B batch, D latent channels, T frames.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lib.model.cascade import rms
from lib.util.configs import check_counts, check_numbers


@dataclass(frozen=True)
class CurriculumConfig:
    """Noise that grows with the epochs, and targets taken from other pairs."""

    noise_rate: float = 0.0  # growth of the noise share an epoch; 0: no noise
    noise_ceiling: float = 0.3  # the share at which it stops growing
    noise_start: int = 0  # epoch in which it is still 0
    target_shuffling: float = 0.0  # share of the pairs of an epoch whose targets change places

    def __post_init__(self):
        check_numbers(self, "noise_rate")
        check_numbers(self, "noise_ceiling", "target_shuffling", most=1)
        check_counts(self, "noise_start", least=0)


def noise_share(epoch: float, config: CurriculumConfig) -> float:
    """α = min(ceiling, rate · epochs since the start), 0 before it."""
    return min(config.noise_ceiling, config.noise_rate * max(0.0, epoch - config.noise_start))


def mix_noise(latents: Tensor, share: float) -> Tensor:
    """√(1 − α²) · latents + α · noise of their RMS, `[B, D, T]`: a clip keeps its level at every share α."""
    if share == 0:
        return latents
    noise = torch.randn_like(latents) * rms(latents)[:, None, None]
    return (1 - share**2) ** 0.5 * latents + share * noise
