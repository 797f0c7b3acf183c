"""Where a NaN or an infinity appeared first: the report of a training that must stop."""

import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

NORM = "norm of the gradients"  # the last resort: nothing else was not finite


class NonFiniteError(RuntimeError):
    """Training met a NaN or an infinity. `step`, `stage` (None: outside the stages) and `tensor` say where first."""

    def __init__(self, step: int, stage: int | None, tensor: str, checkpoint: Path | None):
        self.step, self.stage, self.tensor = step, stage, tensor
        kept = f"the last good checkpoint is {checkpoint}" if checkpoint else "no checkpoint had been written yet"
        where = f"stage {stage}" if stage is not None else "outside the stages"
        super().__init__(f"non-finite value at step {step}, {where}, first in {tensor}; {kept}")


def not_finite(x: Tensor) -> Tensor:
    """1 for each element that is NaN or infinite, else 0; stays on the device."""
    return (~x.isfinite()).float()


def find_non_finite(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, ...]],
    names: Sequence[str],
    forward: Callable[[tuple[Tensor, ...]], Tensor],
) -> tuple[int | None, str] | None:
    """The stage (None: outside the stages) and the first tensor of a step that is not finite, in the order of
    computation; None without batches. `names`: of a batch's tensors. `forward`: batch → loss, always under the same
    random numbers."""
    found = None
    for batch in batches:
        found = _find_in_batch(model, dict(zip(names, batch, strict=True)), partial(forward, batch))
        if found[1] != NORM:
            break
    return found


def _find_in_batch(
    model: nn.Module, tensors: dict[str, Tensor], forward: Callable[[], Tensor]
) -> tuple[int | None, str]:
    """Checks the batch's tensors and the parameters, then repeats the forward and the backward pass under hooks."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            return None, name
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return stage_of(name), f"parameter {name}"
    found: list[tuple[str, str]] = []  # kind of tensor and name of its module or parameter, in order

    def check(kind: str, name: str, values: Any) -> None:
        values = values if isinstance(values, tuple) else (values,)
        if not all(value.isfinite().all() for value in values if isinstance(value, Tensor)):
            found.append((kind, name))

    def check_module(name: str, module: nn.Module, inputs: tuple, outputs: Any) -> None:
        check("input", name, inputs)
        check("output", name, outputs)

    modules = [(name, part) for name, part in model.named_modules() if name]
    hooks = [part.register_forward_hook(partial(check_module, name)) for name, part in modules]
    for name, p in model.named_parameters():
        hooks.append(p.register_post_accumulate_grad_hook(lambda p, name=name: check("gradient", name, p.grad)))
    try:
        with torch.no_grad():
            loss = forward()
        if not found and not loss.isfinite():
            return None, "loss"
        if not found:  # again with gradients: clipping has overwritten those of the step
            model.zero_grad(set_to_none=True)
            with torch.enable_grad():
                forward().backward()
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        return None, NORM
    kind, name = found[0]
    return stage_of(name), f"{kind} of {name}"


def stage_of(name: str) -> int | None:
    match = re.match(r"(?:cascade\.)?stages\.(\d+)", name)
    return int(match[1]) if match else None
