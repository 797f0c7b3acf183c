"""What the processes of one training must agree on: their random numbers, their sums, and when to stop."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from lib.util.errors import UserError


def join_processes() -> PartialState:
    """This process among those that a launcher started. Without a GPU they talk through gloo, whichever launcher."""
    return PartialState(cpu=_was_launched() and not torch.cuda.is_available())


def _was_launched() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def rng_state() -> dict[str, Any]:
    return {"rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state_all()}


def set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["rng"])
    if len(state["cuda_rng"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda_rng"])


def seed_process(seed: int, step: int, rank: int) -> None:
    """Random numbers of their own for each process: dropout and noise must not repeat from one to the next."""
    torch.manual_seed(seed + 7919 * rank + 104_729 * step)


def sum_over_processes(sums: dict[str, float]) -> dict[str, float]:
    """The same sums on every process; a process that had nothing to add may lack names."""
    everywhere: dict[str, float] = {}
    for part in gather_object([sums]):
        for name, value in part.items():
            everywhere[name] = everywhere.get(name, 0.0) + value
    return everywhere


@contextlib.contextmanager
def out_of_memory_advice(advice: Callable[[], str]) -> Iterator[None]:
    """Where memory runs out, `UserError` with the advice instead of the allocator's message."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError on a GPU; the CPU's allocator has no class of its own
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise UserError(advice()) from error


class StopSignals:
    """While training: the first Ctrl-C or SIGTERM asks for a stop after the step, a second acts at once. So does a file
    of the name `file`, which a dashboard in any process may write; it is forgotten when training begins and ends.

    Among several processes a second one is ignored: a launcher passes on the Ctrl-C that its processes have had, and
    ends all when one has ended, which must not stop the one that still writes the checkpoint.
    """

    def __init__(self, file: Path | None = None):
        self.file = file
        self.signal: str | None = None  # its name

    @property
    def asked(self) -> str | None:
        """Who asked for a stop, if anybody did."""
        if self.signal is None and self.file is not None and self.file.exists():
            return "the stop button"
        return self.signal

    def __enter__(self) -> "StopSignals":
        self.forget_file()
        self.earlier = {}
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self.earlier[number] = signal.signal(number, self.handle)
        return self

    def handle(self, number: int, frame: Any) -> None:
        self.signal = signal.Signals(number).name
        if not _was_launched():
            self.restore()

    def restore(self) -> None:
        for number, handler in self.earlier.items():
            signal.signal(number, handler)

    def __exit__(self, *exception: Any) -> None:
        self.restore()
        self.forget_file()

    def forget_file(self) -> None:
        if self.file is not None:
            self.file.unlink(missing_ok=True)
