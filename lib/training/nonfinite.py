"""Where a NaN or an infinity appeared first: the report of training that must stop."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lib.util.errors import UserError

NORM = "norm of the gradients"  # the last resort: nothing else was not finite


class NonFiniteError(UserError):
    """Training met a NaN or an infinity. `step`, `stage` (None: outside the stages) and `tensor` say where first."""

    def __init__(self, step: int, stage: int | None, tensor: str, checkpoint: Path | None):
        self.step, self.stage, self.tensor = step, stage, tensor
        kept = f"the last good checkpoint is {checkpoint}" if checkpoint else "no checkpoint had been written yet"
        where = f"stage {stage}" if stage is not None else "outside the stages"
        fix = "lower the learning rate, or see notebook 03"
        super().__init__(f"non-finite value at step {step}, {where}, first in {tensor}; {kept}; {fix}")


def not_finite(x: Tensor) -> Tensor:
    """1 for each element that is NaN or infinite, else 0; stays on the device."""
    return (~x.isfinite()).float()


def find_non_finite(
    model: nn.Module, batch: tuple[Tensor, ...], names: Sequence[str], forward: Callable[[tuple[Tensor, ...]], Tensor]
) -> tuple[int | None, str]:
    """The stage (None: outside the stages) and the first tensor that is not finite: of a batch with these `names`, of
    the parameters, or of a forward and a backward pass. `forward`: batch → loss, under the same random numbers."""
    for name, tensor in zip(names, batch, strict=True):
        if not tensor.isfinite().all():
            return None, name
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return stage_of(name), f"parameter {name}"
    found: list[tuple[int | None, str]] = []

    def check(kind: str, name: str, values: Any) -> None:
        values = values if isinstance(values, tuple) else (values,)
        if not all(value.isfinite().all() for value in values if isinstance(value, Tensor)):
            found.append((stage_of(name), f"{kind} of {name}"))

    def check_module(name: str, module: nn.Module, inputs: tuple, outputs: Any) -> None:
        check("input", name, inputs)
        check("output", name, outputs)

    hooks = [part.register_forward_hook(partial(check_module, name)) for name, part in model.named_modules() if name]
    for name, p in model.named_parameters():
        hooks.append(p.register_post_accumulate_grad_hook(lambda p, name=name: check("gradient", name, p.grad)))
    try:
        with torch.no_grad():
            loss = forward(batch)
        if not found and not loss.isfinite():
            return None, "loss"
        if not found:  # again with gradients: clipping has overwritten those of the step
            model.zero_grad(set_to_none=True)
            with torch.enable_grad():
                forward(batch).backward()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else (None, NORM)


def stage_of(name: str) -> int | None:
    match = re.match(r"(?:cascade\.)?stages\.(\d+)", name)
    return int(match[1]) if match else None
