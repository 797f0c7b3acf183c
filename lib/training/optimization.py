"""Learning rates and averaged weights: pure functions of the step, so that a resumed run has nothing to restore."""

import math

import torch
from torch import nn

from lib.training.config import LoopConfig


def learning_rate_factor(step: int, progress: float, config: LoopConfig) -> float:
    """Share of the full learning rate after `step` steps: a warm-up, times the schedule at `progress`, 0 to 1."""
    factor = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    return factor * (1 + math.cos(math.pi * progress)) / 2 if config.schedule == "cosine" else factor


@torch.no_grad()
def move_average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move the averaged weights towards the model's. The decay is smaller in the first steps, or the start would
    stay. What batch norms know of their data are averages already, and are copied."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
    for averaged, norm in zip(average.modules(), model.modules(), strict=True):
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            for ours, theirs in zip(averaged.buffers(), norm.buffers(), strict=True):
                ours.copy_(theirs)
