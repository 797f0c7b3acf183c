"""Where a NaN or an infinity appeared first: the report of training that must stop."""

import math
import re
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode  # private names, but those that torch's notes tell users of
from torch.utils._pytree import tree_leaves

from lib.training.batches import Batch
from lib.util.errors import UserError

NORM = "norm of the gradients"  # the last resort: nothing else was not finite
LIBRARIES = ("site-packages", "dist-packages", f"{Path(torch.__file__).parent}", __file__)


@dataclass(frozen=True)
class Finding:
    """What `find_non_finite` found: the stage (None: outside the stages), the first tensor, and what made it."""

    stage: int | None
    tensor: str
    operation: str = ""  # the first whose result is not finite though all that it was given is, and the line it is in
    clips: tuple[int, ...] = ()  # of the batch, whose values are not finite, where there is one part for each
    spread: str = ""  # how much of the gradient is not finite, and what clipping makes of the rest


class NonFiniteError(UserError):
    """Training met a NaN or an infinity. `step`, `stage` (None: outside the stages), `tensor` and `operation` say where
    first, `pairs` in which clips of the batch, by file and offset; `facts`: all that for a file."""

    def __init__(self, step: int, found: Finding, pairs: Sequence[str] = (), checkpoint: Path | None = None):
        self.step, self.stage, self.tensor, self.operation = step, found.stage, found.tensor, found.operation
        self.pairs = tuple(pairs)
        self.facts = {name: value for name, value in vars(found).items() if name != "clips"} | {"pairs": list(pairs)}
        where = f"stage {found.stage}" if found.stage is not None else "outside the stages"
        kept = f"the last good checkpoint is {checkpoint}, and resuming replays this step, with the code as it is then"
        clips = f"in {', '.join(self.pairs[:2])}" + f" and {len(pairs) - 2} more" * (len(pairs) > 2)
        parts = [
            f"non-finite value at step {step}, {where}, first in {found.tensor}",
            found.operation,
            clips if pairs else "",
            found.spread,
            kept if checkpoint else "no checkpoint had been written yet",
            f"restart with a lower learning rate{' or that operation bounded' * bool(self.operation)}; see notebook 03",
        ]
        super().__init__("; ".join(filter(None, parts)))


def not_finite(x: Tensor) -> Tensor:
    """1 for each element that is NaN or infinite, else 0; stays on the device."""
    return (~x.isfinite()).float()


class Watch(TorchDispatchMode):
    """Sees every operation of a forward and a backward pass. `origins`: of each that left the finite numbers, what it
    gave and in which line, and the clips of the batch in which."""

    def __init__(self, batch: Sequence[Tensor]):
        super().__init__()
        self.batch_size, self.node, self.origins = len(batch[0]), None, []
        self.traced: dict[int, int] = {}  # memory → number of the origin of what it holds
        self.of_batch = set(map(_memory, batch))  # memory that holds what is made from the batch

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        arguments = [args, kwargs]
        bad = [x for x in _tensors(arguments) if not x.isfinite().all()]  # before it works in place
        sources = [self.traced[_memory(x)] for x in bad if _memory(x) in self.traced]
        # an infinity that is given, such as a mask's, is meant; a NaN that is made of it is not
        meant = bad or any(isinstance(x, float) and not math.isfinite(x) for x in tree_leaves(arguments))
        had_nan = any(x.isnan().any() for x in bad)
        result, name = operation(*args, **(kwargs or {})), operation.overloadpacket.__name__.strip("_")
        given = set(map(_memory, _tensors(arguments)))
        for x in _tensors(result):
            if given & self.of_batch and "like" not in name:
                self.of_batch.add(_memory(x))
            elif _memory(x) not in given:  # no view
                self.of_batch.discard(_memory(x))
            made = "empty" not in name and (not meant or (not had_nan and x.isnan().any()))  # no leftovers of memory
            if not x.isfinite().all() and (sources or made):
                self.traced[_memory(x)] = min(sources) if sources else self.begin(x, name)
            elif _memory(x) not in given:
                self.traced.pop(_memory(x), None)
        return result

    def begin(self, bad: Tensor, name: str) -> int:
        """A new origin; returns its number."""
        stack = traceback.format_stack()
        if self.node is not None:  # 'SqrtBackward0' → 'sqrt'
            name = re.sub(r"(?<!^)(?=[A-Z])", "_", re.sub(r"Backward\d*$", "", self.node.name())).lower()
            # a private key; detect_anomaly prints what is there, and nothing public gives it
            name, stack = f"the gradient of {name}", self.node.metadata.get("traceback_", [])
        found = re.findall(r'File "(.+?)", line (\d+), in (.+)', "".join(stack))
        own = [where for where in found if not any(part in where[0] for part in LIBRARIES)]  # the last is the innermost
        place = "{}:{} in {}".format(Path(own[-1][0]).name, *own[-1][1:]) if own else "inside a library"
        said = f"{name} gave {'NaN' if bad.isnan().any() else 'inf'} ({place})"
        clips = _bad_clips(bad, self.batch_size) if _memory(bad) in self.of_batch else ()
        self.origins.append((said, clips))
        return len(self.origins) - 1

    def first(self, results: Sequence[Tensor]) -> tuple[str, tuple[int, ...]]:
        """Of the origins that reached one of the results, the first."""
        reached = [self.traced[_memory(x)] for x in results if not x.isfinite().all() and _memory(x) in self.traced]
        return self.origins[min(reached)] if reached else ("", ())

    def follow(self, loss: Tensor) -> None:
        """Know which part of the graph below `loss` a backward pass is at."""
        seen, waiting = set(), [loss.grad_fn]
        while waiting:
            if (node := waiting.pop()) is not None and node not in seen:
                seen.add(node)
                node.register_prehook(lambda grads, node=node: setattr(self, "node", node))
                waiting += [following for following, _ in node.next_functions]


def find_non_finite(
    model: nn.Module, batch: Batch, names: Sequence[str], forward: Callable[[Batch], Tensor], max_norm: float = math.inf
) -> Finding:
    """Where a step left the finite numbers: in a batch with these `names`, in the parameters, or in a forward and a
    backward pass. `forward`: batch → loss, under the same random numbers; `max_norm`: of clipping."""
    for name, tensor in zip(names, batch, strict=True):
        if not tensor.isfinite().all():
            return Finding(None, name, clips=_bad_clips(tensor, len(tensor)))
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return Finding(stage_of(name), f"parameter {name}")
    found: list[tuple[int | None, str]] = []

    def check(kind: str, name: str, values: Any) -> None:
        if not all(value.isfinite().all() for value in _tensors(values)):
            found.append((stage_of(name), f"{kind} of {name}"))

    def check_module(name: str, module: nn.Module, inputs: tuple, outputs: Any) -> None:
        check("input", name, inputs)
        check("output", name, outputs)

    hooks = [part.register_forward_hook(partial(check_module, name)) for name, part in model.named_modules() if name]
    for name, p in model.named_parameters():
        hooks.append(p.register_post_accumulate_grad_hook(lambda p, name=name: check("gradient", name, p.grad)))
    model.zero_grad(set_to_none=True)  # clipping has overwritten the gradients of the step
    watch = Watch(batch)
    try:
        with torch.enable_grad(), torch.autograd.set_detect_anomaly(True, check_nan=False), watch:
            loss = forward(batch)
            if not found and not loss.isfinite():
                found.append((None, "loss"))
            if loss.requires_grad:
                watch.follow(loss)
                loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    stage, tensor = found[0] if found else (None, NORM)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    first = watch.first([loss] if not loss.isfinite() else gradients)
    return Finding(stage, tensor, *first, _spread(gradients, max_norm))


def _bad_clips(values: Tensor, batch_size: int) -> tuple[int, ...]:
    if not values.ndim or len(values) != batch_size:
        return ()
    return tuple((~values.isfinite()).reshape(batch_size, -1).any(dim=1).nonzero().flatten().tolist())


def _spread(gradients: Sequence[Tensor], max_norm: float) -> str:
    """What is wrong with the gradients, and what clipping would make of them, in words."""
    count, total = (sum(int(of(g)) for g in gradients) for of in (lambda g: (~g.isfinite()).sum(), Tensor.numel))
    norm = nn.utils.get_total_norm(gradients)
    if norm.isfinite():
        return ""
    said = f"{count:,} of {total:,} gradients are not finite" if count else "the norm of finite gradients overflows"
    made = "all of them NaN" if norm.isnan() else "those NaN and all others 0" if count else "all of them 0"
    return said + f"; clipping makes {made}" * (max_norm < math.inf)


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _tensors(values: Any) -> list[Tensor]:
    """All floating-point tensors in nested lists, tuples and dicts."""
    leaves = tree_leaves(values)
    return [x for x in leaves if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())]


def stage_of(name: str) -> int | None:
    match = re.match(r"(?:cascade\.)?stages\.(\d+)", name)
    return int(match[1]) if match else None
