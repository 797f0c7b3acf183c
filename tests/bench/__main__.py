"""The benchmarks, by `make bench`: ratios first, measured side by side in one run.

    python tests/bench [parts] [--out outputs/bench]

Writes bench.json, bench.md (the tables) and two plots, each part as soon as it is measured; without parts all of them.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import explorer
import figures
import models
import paths
import steps
import superres
import tables
import torch
from measure import device, machine

from lib.util.files import write_atomic

ROOT = Path(__file__).resolve().parents[2]


def gpu(found: dict[str, Any]) -> dict[str, Any] | None:
    """What only a GPU can say: compiled against eager, and the time of the whole training."""
    if device().type != "cuda":
        return None
    eager, compiled = models.compete(
        *((models.training_step, name, models.GPU_STEP_B, models.STEP_T, "bf16") for name in ("here", "compiled"))
    )
    steps.no_wait()
    found = {"compiled_ratio": eager.seconds / compiled.seconds, "compiled_s": compiled.seconds}
    return found | steps.full_training() | {f"superres_{name}": value for name, value in superres.on_gpu().items()}


# name → what it measures, given what the parts before it found
PARTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "limit": lambda found: models.limits(),
    "cascade": lambda found: models.rows(found["limit"]),
    "sweep": lambda found: models.sweep(found["limit"]),
    "curves": lambda found: models.curves(),
    "codecs": lambda found: paths.codecs(),
    "intake": lambda found: paths.intake(),
    "fusing": lambda found: paths.fusing(),
    "data": lambda found: paths.data(),
    "objective": lambda found: steps.objective(),
    "kernels": lambda found: steps.kernels(),
    "scaling": lambda found: steps.scaling(),
    "paper": lambda found: steps.paper(found["cascade"][0]["here_s"], found["scaling"]["gradient_mib"] * 2**20),
    "explorer": lambda found: explorer.redraws(),
    "superres": lambda found: superres.parts(found["limit"]),
    "restoring": lambda found: superres.restoring(),
    "gpu": gpu,
}

NEEDS = {"cascade": ("limit",), "sweep": ("limit",), "superres": ("limit",), "paper": ("cascade", "scaling")}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python tests/bench")
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "bench")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}")
    warnings.filterwarnings("ignore", category=FutureWarning)
    options.out.mkdir(parents=True, exist_ok=True)
    store = options.out / "bench.json"
    chosen = [name for name in PARTS if not options.parts or name in options.parts]
    found = json.loads(store.read_text()) if options.parts and store.exists() else {}
    if found.get("machine") != machine():
        found = {"machine": machine()}  # numbers of another machine or commit do not stand beside these
    for name in chosen:
        if lacking := [needed for needed in NEEDS.get(name, ()) if needed not in found]:
            parser.error(f"{name} needs {' and '.join(lacking)} of the same machine and commit: name them too")
        torch.manual_seed(0)
        started = time.perf_counter()
        if (result := PARTS[name](found)) is None:
            continue
        found[name] = result
        print(f"# {name} ({time.perf_counter() - started:.0f} s)\n\n{tables.as_text(name, found)}\n", flush=True)
        write_atomic(store, json.dumps(found, indent=1) + "\n")
    write_atomic(options.out / "bench.md", tables.as_markdown(found))
    if "sweep" in found:
        figures.step_times(found["sweep"], options.out)


if __name__ == "__main__":
    main()
