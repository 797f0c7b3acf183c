"""Run the notebooks in order, headlessly, and join what they show into one page.

    python -m lib.pipeline --preset demo [--data DIR] [--codec NAME|DIR] [--out DIR] [--only 04,05] [--resume]
                           [--set max_steps=200]

Every notebook is executed by papermill into the output folder; its cells are stored as they finish, so that a failure
can be read there. `--resume` skips notebooks that finished under the same settings and lets training go on.
"""

import argparse
import contextlib
import hashlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import papermill
import torch
import yaml
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync
from papermill.exceptions import PapermillExecutionError

from lib.audio import AudioError
from lib.codec import CODEC_NAMES
from lib.errors import UserError, exit_on_user_error
from lib.files import make_folder, write_atomic
from lib.latents import CorruptShardError
from lib.presets import PRESETS, ROOT, Preset, load_preset, open_project
from lib.report import write_report
from lib.runs import Run

NOTEBOOKS = (
    "01_encoding",
    "02_stage_ablation",
    "03_rms_collapse",
    "04_training",
    "05_listening",
    "06_super_resolution",
)
LEAD = (
    "Two clips of music, an input and a target, become latents of a frozen codec; a cascade of transformer stages "
    "fuses them; the codec turns the result back into sound. This page shows one run of that: what it sounds like, how "
    "it was trained, and what the codec does. Every figure, number and player comes from the notebook named below it."
)
TRAINING = ("04_training", "06_super_resolution")  # those that can go on where they were stopped
# to be done again when the other has been
NEEDS = {"05_listening": "04_training", "06_super_resolution": "04_training"}
USER_ERRORS = {error.__name__ for error in (UserError, AudioError, CorruptShardError)}


class NotebookError(RuntimeError):
    """A cell failed for a reason that is not the user's. Says the cell, the error and where the notebook is."""


def run_notebooks(
    preset_name: str,
    overrides: dict[str, Any],
    data_dir: str = "",
    out_dir: str | Path = "",
    only: tuple[str, ...] = NOTEBOOKS,
    resume: bool = False,
) -> Path:
    """Execute the notebooks and write `index.html`; returns its path.

    `UserError` for bad settings or data, before the first notebook where they can be known then; `NotebookError`
    when a cell fails for another reason.
    """
    preset = load_preset(preset_name, **overrides)
    out = Path(out_dir or ROOT / "outputs" / preset_name).resolve()
    data = str(Path(data_dir).resolve()) if data_dir else ""
    say(f"preset {preset_name}: data and latents")
    project = open_project(preset, data, out)
    make_folder(out / "report")
    if "05_listening" in only:
        project.listening()  # refuse songs too short to listen to before training, not after
    train, val = (len(project.manifest.split(split)) for split in ("train", "val"))
    say(f"{train} training and {val} validation pairs, codec {project.codec.name}")
    if skipped := project.manifest.skipped:
        say(f"{len(skipped)} files were skipped, listed in {out / 'manifest.skipped.json'}")
        for item in skipped[:5]:
            say(f"  {item.path}: {item.reason}")
    parameters = {"preset": preset_name, "overrides": overrides, "data_dir": data, "out_dir": str(out)}
    inputs = json.dumps([parameters, project.codec.fingerprint, project.latents.index.name])  # index: by content
    for number, name in enumerate(only, start=1):
        given = parameters | ({"resume": resume} if name in TRAINING else {})
        stamp = done_path(out, name)
        needed = json.dumps(finished(out, NEEDS[name])) if name in NEEDS else ""
        state = hashlib.sha256((inputs + needed + notebook_path(name).read_text()).encode()).hexdigest()
        if resume and finished(out, name).get("state") == state:
            say(f"[{number}/{len(only)}] {name}: done before, skipped")
            continue
        say(f"[{number}/{len(only)}] {name} → {out / name}.ipynb")
        stamp.unlink(missing_ok=True)
        started = time.monotonic()
        execute(name, out, given)
        seconds = time.monotonic() - started
        write_atomic(stamp, json.dumps({"state": state, "seconds": round(seconds), "at": time.time()}))
        say(f"[{number}/{len(only)}] {name}: {seconds:.0f} s")
    return write_report(out, f"Latent fusion: {preset_name}", LEAD, facts(preset, out, train, val))


def execute(name: str, out: Path, parameters: dict[str, Any]) -> None:
    """One notebook through papermill, its progress bars on stderr."""
    executed = out / f"{name}.ipynb"
    # ipc: no open port on a shared server; async: the other manager waits forever for a kernel that was killed
    sockets = tempfile.TemporaryDirectory(
        prefix="kernel-"
    )  # its own: two runs at once would talk to each other's kernel
    kernel = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=f"{sockets.name}/kernel")
    paths = (str(path).replace("{", "{{").replace("}", "}}") for path in (notebook_path(name), executed))
    asked: list[str] = []
    try:
        with stop_signals_go_to(kernel) as asked:
            papermill.execute_notebook(*paths, parameters, cwd=ROOT, km=kernel, stderr_file=sys.stderr)
        if asked:  # between two cells, where no code saw it
            raise KeyboardInterrupt("stopped; go on with --resume")
    except PapermillExecutionError as error:
        if error.ename in USER_ERRORS:
            raise UserError(error.evalue) from None
        if error.ename == "KeyboardInterrupt":
            raise KeyboardInterrupt(f"{error.evalue or 'stopped'}; go on with --resume") from None
        raise NotebookError(
            f"{name}, cell {error.exec_count}: {error.ename}: {error.evalue}; the executed notebook is {executed}"
        ) from None
    except OSError as error:
        raise UserError(
            f"{error.filename or executed}: cannot be written ({error.strerror}); make room there"
        ) from None
    except RuntimeError as error:  # the kernel died, or never started
        if asked:
            raise KeyboardInterrupt("stopped; go on with --resume") from None
        raise NotebookError(f"{name}: {error}; the executed notebook is {executed}") from None
    finally:
        if kernel.has_kernel:
            run_sync(kernel.shutdown_kernel)(now=True)
        run_sync(kernel.cleanup_resources)()
        sockets.cleanup()


@contextlib.contextmanager
def stop_signals_go_to(kernel: AsyncKernelManager) -> Iterator[list[str]]:
    """The first Ctrl-C or SIGTERM interrupts the kernel, which lets training save; a second one acts at once.

    Yields a list, empty until a signal came.
    """
    asked: list[str] = []
    earlier = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in earlier.items():
            signal.signal(number, handler)

    def interrupt(number: int, frame: Any) -> None:
        restore()
        if kernel.provisioner is None or kernel.provisioner.pid is None:
            raise KeyboardInterrupt
        asked.append(signal.Signals(number).name)
        say(f"{asked[0]}: asking the notebook to save and stop; again to stop at once")
        os.kill(kernel.provisioner.pid, signal.SIGINT)

    for number in earlier:
        signal.signal(number, interrupt)
    try:
        yield asked
    finally:
        restore()


def facts(preset: Preset, out: Path, train: int, val: int) -> dict[str, str]:
    """The head of the page: what was run, on what, and how long it took."""
    head = {"preset": preset.name, "pairs": f"{train} training, {val} validation"}
    if (out / "config.json").exists():
        run = Run.open(out)
        steps = [row["step"] for row in run.metrics("train")]
        head["codec"] = run.config["codec"]["name"]
        head["training"] = f"{steps[-1] if steps else 0} steps"
        head["code"] = f"commit {run.config['versions']['commit']}, torch {run.config['versions']['torch']}"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    head["machine"] = f"{os.cpu_count()} cores, {device}"
    seconds = {name: done["seconds"] for name in NOTEBOOKS if (done := finished(out, name))}
    head["time"] = ", ".join(f"{name} {value} s" for name, value in seconds.items())
    return head


def done_path(out: Path, name: str) -> Path:
    """The mark of a finished notebook: the state it ran with, and the seconds it took."""
    return out / "report" / f"{name}.done"


def finished(out: Path, name: str) -> dict[str, Any]:
    """What the mark says; empty where there is none, or none that can be read."""
    try:
        return dict(json.loads(done_path(out, name).read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def notebook_path(name: str) -> Path:
    return ROOT / "notebooks" / f"{name}.ipynb"


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def parse_overrides(settings: list[str]) -> dict[str, Any]:
    """`["max_steps=40", "codec=encodec"]` → values as YAML reads them. `UserError` for anything else."""
    overrides = {}
    for setting in settings:
        key, separator, value = setting.partition("=")
        if not separator or not key:
            raise UserError(f"--set {setting}: not of the form name=value; write for example --set max_steps=200")
        try:
            overrides[key] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError):  # ValueError: what looks like a date and is none
            raise UserError(f"--set {setting}: {value!r} is not a YAML value; quote it") from None
    return overrides


def chosen_notebooks(only: str | None) -> tuple[str, ...]:
    """`"04,05"` → the notebooks' names, in their own order."""
    if only is None:
        return NOTEBOOKS
    asked = [part.strip() for part in only.split(",") if part.strip()]
    unknown = [part for part in asked if not any(part in (name, name[:2]) for name in NOTEBOOKS)]
    if unknown or not asked:
        raise UserError(f"--only {only}: unknown {', '.join(unknown) or 'choice'}; choose from {', '.join(NOTEBOOKS)}")
    return tuple(name for name in NOTEBOOKS if name in asked or name[:2] in asked)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every command that runs notebooks takes."""
    parser.add_argument("--preset", required=True, help=f"one of {', '.join(PRESETS)}")
    parser.add_argument("--data", default="", help="folder of music (default: generated demo songs)")
    parser.add_argument("--codec", help=f"{', '.join(CODEC_NAMES)} or a directory of EnCodec weights")
    parser.add_argument("--out", default="", help="output folder (default: outputs/<preset>)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting of the preset"
    )


def parsed_overrides(options: argparse.Namespace) -> dict[str, Any]:
    overrides = parse_overrides(options.set)
    if options.codec:
        folder = Path(options.codec)
        overrides["codec"] = str(folder.resolve()) if folder.is_dir() else options.codec
    return overrides


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lib.pipeline", description="Run the notebooks in order.")
    add_arguments(parser)
    parser.add_argument("--only", help="notebooks to run, by their numbers: 04,05")
    parser.add_argument("--resume", action="store_true", help="skip what is done, go on with training")
    options = parser.parse_args()
    with exit_on_user_error():
        overrides = parsed_overrides(options)
        only = chosen_notebooks(options.only)
        try:
            page = run_notebooks(options.preset, overrides, options.data, options.out, only, options.resume)
        except NotebookError as error:
            sys.exit(f"error: {error}")
        print(f"report: {page}")


if __name__ == "__main__":
    main()
