"""What a training step reports, by the names that metrics.jsonl uses, and who may listen."""

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn


class Callback:
    """Looks on while a model trains, in the main process. It must not change the model; `trainer` is the `Trainer`."""

    def on_start(self, trainer: Any) -> None:
        """Before the first step that is taken now."""

    def on_step(self, trainer: Any, row: dict[str, Any]) -> None:
        """For every optimizer step, with its row of metrics.jsonl; once its metrics are gathered."""

    def on_epoch(self, trainer: Any, epoch: int) -> None:
        """After the last step of an epoch; `epoch` counts those that are done."""

    def on_validation(self, trainer: Any, row: dict[str, Any]) -> None:
        """After every validation, before its checkpoint."""

    def on_end(self, trainer: Any) -> None:
        """When training ends, stops or fails."""


@torch.no_grad()
def gradient_norms(parts: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Gradient norm of every part of a model before clipping, as 'grad_norm/stage1/output_projection'."""
    norms = {}
    for name, part in parts.items():
        if grads := [p.grad for p in part.parameters() if p.grad is not None]:
            norms[f"grad_norm/{name}"] = torch.nn.utils.get_total_norm(grads)
    return norms


def to_floats(values: dict[Hashable, Tensor]) -> dict[Hashable, float]:
    """Scalars to the host in one transfer."""
    if not values:
        return {}
    return dict(zip(values, torch.stack([v.detach().float() for v in values.values()]).tolist(), strict=True))
