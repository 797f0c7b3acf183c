"""How things are timed: side by side in one run, in processes of their own, beside what the machine can do at best."""

import multiprocessing
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from lib.training.config import resolved_precision
from lib.util.provenance import versions

ROUNDS = 3  # after one to warm up
SECONDS = 1.5  # between two stops of the clock, where one call takes less
Run = Callable[[], object]


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def timed(run: Run, repeats: int = 1) -> float:
    """Seconds of a call, the mean of so many, until the result is there."""
    synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize()
    return (time.perf_counter() - started) / repeats


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def enough(seconds: float) -> int:
    """How many calls of so many seconds to time together."""
    return max(1, round(SECONDS / seconds))


def alternate(*runs: Run, rounds: int = ROUNDS) -> list[float]:
    """Median seconds of each, taken in turn so that a busy moment hits all alike."""
    for run in runs:
        run()  # to warm up
    repeats = [enough(timed(run)) for run in runs]
    seconds = [[timed(run, n) for run, n in zip(runs, repeats, strict=True)] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*seconds, strict=True)]


@dataclass(frozen=True)
class Measured:
    """A contender's median and shortest time, and the most memory that it took beyond what it had before its first
    call: gradients and the optimizer's state are counted."""

    seconds: float
    shortest: float
    peak_mib: float


def compete(*contenders: tuple[Callable[..., Run], Any], rounds: int = ROUNDS) -> list[Measured]:
    """The same for what `make(*arguments)` returns, each in a process of its own, so that each one's memory is seen.

    `make` must be a function of a module.
    """
    context = multiprocessing.get_context("spawn")
    children = []
    try:
        for make, *arguments in contenders:
            here, there = context.Pipe()
            child = context.Process(target=_serve, args=(there, make, arguments), daemon=True)
            child.start()
            there.close()
            children.append((child, here))
        at_rest, _, *taken = ([_ask(here) for _, here in children] for _ in range(rounds + 2))  # one to warm up
        results = []
        for (_, before), *answers in zip(at_rest, *taken, strict=True):
            seconds = [seconds for seconds, _ in answers]
            results.append(Measured(statistics.median(seconds), min(seconds), max(0.0, answers[-1][1] - before)))
        return results
    finally:
        for child, here in children:
            here.close()
            child.terminate()
            child.join()


def _ask(connection: Any) -> tuple[float, float]:
    connection.send(None)
    answer = connection.recv()
    if isinstance(answer, str):
        raise RuntimeError(answer)
    return answer


def _serve(connection: Any, make: Callable[..., Run], arguments: list[Any]) -> None:
    """First answer: the memory before the first call. Every other is (seconds of a call, peak MiB so far)."""
    try:
        run = make(*arguments)
        connection.recv()
        connection.send((0.0, _memory()))
        repeats = 1
        while True:
            connection.recv()
            seconds = timed(run, repeats)
            connection.send((seconds, _peak()))
            repeats = enough(seconds)
    except EOFError:
        return
    except Exception as error:
        connection.send(f"{make.__name__}{tuple(arguments)}: {error!r}")


def _memory() -> float:
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts over: that of the imports is forgotten
    return psutil.Process().memory_info().rss / 2**20


def _peak() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 2**10  # ru_maxrss begins with that of the parent


# --- the machine ------------------------------------------------------------------------------------------------------


def matmul_rate(dtype: torch.dtype) -> float:
    """Floating-point operations a second of the best matrix product found, of sizes like the model's and larger."""
    large = 8192 if torch.cuda.is_available() else 2048
    best = 0.0
    for m, k, n in ((large, large, large), (9600, 384, 1536), (9600, 1536, 384), (4 * large, large // 2, large // 2)):
        a = torch.randn(m, k, device=device()).to(dtype)
        b = torch.randn(k, n, device=device()).to(dtype)
        out = torch.empty(m, n, device=device(), dtype=dtype)
        (seconds,) = alternate(lambda a=a, b=b, out=out: torch.mm(a, b, out=out))
        best = max(best, 2 * m * k * n / seconds)
    return best


def copy_rate() -> float:
    """Bytes a second, read and written, of copying far more than any cache holds."""
    source = torch.zeros((2**31 if torch.cuda.is_available() else 2**28) // 4, device=device())
    to = torch.empty_like(source)
    (seconds,) = alternate(lambda: to.copy_(source))
    return 2 * source.numel() * 4 / seconds


def precision() -> str:
    """What this machine trains in fastest: as `precision='auto'` decides."""
    return resolved_precision("auto")


def machine() -> dict[str, Any]:
    facts = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "amx": torch.cpu._is_amx_tile_supported(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        **versions(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda
    return facts


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
