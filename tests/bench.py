"""The benchmarks, by `make bench`: ratios first, measured side by side in one run, written to outputs/bench.json.

The baseline is the same two-stage architecture from stock parts (`PlainCascade` of the parity test) with what a
straightforward build would use: dropout in attention too, the legacy spectral norm. Positions, whose plain form is
slow in that test, are left out of it.
"""

import dataclasses
import itertools
import json
import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from test_cascade import PlainCascade

from lib.cascade import Cascade, CascadeConfig
from lib.codec import MdctCodec
from lib.explorer import RmsExplorer
from lib.losses import MASK_TERMS, total_loss
from lib.presets import OBJECTIVE
from lib.report import Table

OUT = Path(__file__).resolve().parents[1] / "outputs" / "bench.json"
ROUNDS = 3  # after one to warm up


def alternate(first: Callable[[], object], second: Callable[[], object]) -> tuple[float, float]:
    """Median seconds of both, taken in turn so that a busy moment hits both alike."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS + 1):
        for taken, run in zip(seconds, (first, second), strict=True):
            started = time.perf_counter()
            run()
            taken.append(time.perf_counter() - started)
    return statistics.median(seconds[0][1:]), statistics.median(seconds[1][1:])


def training_step(model: torch.nn.Module, B: int, T: int) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    input, target = torch.randn(2, B, 128, T) * 5.7

    def step() -> None:
        model.train()
        output = model(input, target)
        output = output[0] if isinstance(output, tuple) else output
        optimizer.zero_grad()
        (output - input).square().mean().backward()
        optimizer.step()

    return step


def evaluation(model: torch.nn.Module, B: int, T: int) -> Callable[[], None]:
    input, target = torch.randn(2, B, 128, T) * 5.7

    def run() -> None:
        model.eval()
        with torch.inference_mode():
            model(input, target)

    return run


def sound_terms(codec: MdctCodec, seconds: float | None) -> Callable[[], None]:
    """The preset's terms on sound and their gradient, for four clips of 16 s of which so many seconds are decoded."""
    loss = dataclasses.replace(OBJECTIVE, window_seconds=seconds, adversarial_weight=0.0)
    loss = dataclasses.replace(loss, **dict.fromkeys((f"{name}_weight" for name in MASK_TERMS), 0.0))
    output, input, target = torch.randn(3, 4, 128, 1200) * 5.7

    def run() -> None:
        total_loss(output.requires_grad_(), input, target, loss, codec.decode, random_window=True)[0].backward()

    return run


def baseline() -> torch.nn.Module:
    model = PlainCascade(CascadeConfig.reference(), positions=False)
    for projection in model.projections:
        torch.nn.utils.spectral_norm(projection)
    return model


def main() -> None:
    torch.manual_seed(0)
    rows = []
    for what, make, B, T in (
        ("training step", training_step, 4, 300),
        ("training step", training_step, 1, 1200),
        ("eval forward", evaluation, 1, 1200),
    ):
        plain, ours = alternate(make(baseline(), B, T), make(Cascade(), B, T))
        shape = f"B {B}, T {T}"
        times = {"baseline (s)": f"{plain:.2f}", "here (s)": f"{ours:.2f}"}
        rows.append({"what": what, "shape": shape, "ratio": f"{plain / ours:.2f}"} | times)
    codec, wav = MdctCodec(), torch.randn(1, 1, 384_000) * 0.1
    latents = codec.encode(wav)
    encode, decode = alternate(lambda: codec.encode(wav), lambda: codec.decode(latents))
    rates = [
        {"what": f"mdct {name}", "times real time": f"{16 / seconds:.0f}"}
        for name, seconds in (("encode", encode), ("decode", decode))
    ]
    whole, window = alternate(sound_terms(codec, None), sound_terms(codec, 2.0))
    times = {"whole (s)": f"{whole:.2f}", "window (s)": f"{window:.2f}"}
    saved = {"what": "terms on sound, a window of 2 s of 16 s", "time saved": f"{1 - window / whole:.0%}"} | times
    explorer = RmsExplorer(*torch.randn(2, 1, 128, 75) * 5.7, num_layers=6)
    positions = itertools.count()
    weight, similarity = alternate(
        lambda: explorer.png(weight=next(positions) / 100), lambda: explorer.png(similarity=next(positions) / 100)
    )
    redraws = [
        {"what": f"redraw on {name}", "ms": f"{1000 * seconds:.0f}"}
        for name, seconds in (("residual weight", weight), ("similarity", similarity))
    ]
    machine = {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "peak memory (MiB)": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    for table in (rows, rates, [saved], redraws, [machine]):
        print(Table(table), end="\n\n")
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(
        json.dumps(
            {"cascade": rows, "codec": rates, "objective": [saved], "explorer": redraws, "machine": machine}, indent=1
        )
    )


if __name__ == "__main__":
    main()
