"""What the processes of one training must agree on: device and random numbers."""

import os
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType

from lib.util.errors import UserError


def was_launched() -> bool:
    """Whether this is one of several processes that a launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def join_processes() -> PartialState:
    """This process among the launcher's. Without a GPU they talk through gloo, whichever launcher it is."""
    return PartialState(cpu=was_launched() and not torch.cuda.is_available())


def open_accelerator() -> Accelerator:
    """The process's device and its link to the others; `UserError` unless the launcher asks for data parallelism."""
    join_processes()
    accelerator = Accelerator(mixed_precision="no")  # the config sets the precision, not the launcher
    kind = accelerator.distributed_type
    if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise UserError(f"launcher: {kind.value} is not supported; use plain data parallelism")
    return accelerator


def rng_state() -> dict[str, Any]:
    return {"rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state_all()}


def set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["rng"])
    if len(state["cuda_rng"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda_rng"])


def seed_process(seed: int, step: int, rank: int) -> None:
    """Seed each process differently: dropout and noise must not be the same in all of them."""
    torch.manual_seed(seed + 7919 * rank + 104_729 * step)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's or the CPU's memory ran out; the CPU's allocator has no class of its own for it."""
    on_cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return on_cpu or isinstance(error, torch.OutOfMemoryError)
