"""Learning rates and averaged weights: pure functions of the step, so that a resumed run has nothing to restore."""

import math
from typing import Any

import torch
from torch import nn

from lib.fusion import FusionModel
from lib.train_config import TrainConfig


def parameter_groups(model: FusionModel, config: TrainConfig) -> list[dict[str, Any]]:
    """The cascade's parameters and the mask generator's, each with its learning rate."""
    groups = [{"params": list(model.cascade.parameters()), "full_lr": config.learning_rate}]
    if model.mask_generator is not None:
        rate = config.agent_learning_rate or config.learning_rate
        groups.append({"params": list(model.mask_generator.parameters()), "full_lr": rate})
    return groups


def learning_rate_factor(step: int, progress: float, config: TrainConfig) -> float:
    """Share of the full learning rate after `step` steps: a warm-up, times the schedule at `progress`, 0 to 1."""
    factor = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    return factor * (1 + math.cos(math.pi * progress)) / 2 if config.schedule == "cosine" else factor


@torch.no_grad()
def move_average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move the averaged weights towards the model's. The decay is smaller in the first steps, or the start would
    stay."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
