"""Where a NaN or an infinity appeared first: what a training that must stop has to say."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
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


def find_non_finite(
    model: nn.Module, tensors: Mapping[str, Tensor], forward: Callable[[], Tensor]
) -> tuple[int | None, str]:
    """The stage (None: outside the stages) and the first tensor that is not finite, in the order of computation.

    Looks at the batch's tensors by name, at the parameters, then repeats the pass: `forward()` must return the loss,
    under the same random numbers each time it is called. Gradients are watched as the backward pass makes them.
    """
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            return None, name
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return stage_of(name), f"parameter {name}"
    found: list[tuple[str, str]] = []  # kind of tensor and name of its module or parameter, the first one first

    def watch(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, outputs: Any) -> None:
            for kind, values in (("input", inputs), ("output", outputs)):
                for value in values if isinstance(values, tuple) else (values,):
                    if isinstance(value, Tensor) and not value.isfinite().all():
                        found.append((kind, name))

        return hook

    def watch_gradient(name: str) -> Callable:
        def hook(parameter: Tensor) -> None:
            if not parameter.grad.isfinite().all():
                found.append(("gradient", name))

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    hooks += [p.register_post_accumulate_grad_hook(watch_gradient(name)) for name, p in model.named_parameters()]
    try:
        with torch.no_grad():
            loss = forward()
        if not found and not loss.isfinite():
            return None, "loss"
        if not found:  # once more with gradients: clipping has overwritten those of the step
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


def find_in_batches(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, ...]],
    names: Sequence[str],
    forward: Callable[[tuple[Tensor, ...]], Tensor],
) -> tuple[int | None, str] | None:
    """The same for the batches of one step, each by itself, with the names of a batch's tensors; None where there are
    none."""
    found = None
    for batch in batches:
        tensors = dict(zip(names, batch, strict=True))
        found = find_non_finite(model, tensors, lambda batch=batch: forward(batch))
        if found[1] != NORM:
            break
    return found


def not_finite(x: Tensor) -> Tensor:
    """1 for each element that is NaN or infinite, else 0: for a device to read without its host."""
    return (~x.isfinite()).float()


def stage_of(name: str) -> int | None:
    match = re.match(r"(?:cascade\.)?stages\.(\d+)", name)
    return int(match[1]) if match else None
