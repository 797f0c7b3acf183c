"""Run the notebooks by papermill and collect their results on one page. More: `--help`."""

from lib.commands import parser_of

if __name__ == "__main__":  # at once: what is imported below takes seconds
    parser_of("pipeline").parse_args()

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import papermill
import yaml
from ipykernel.kernelspec import make_ipkernel_cmd
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync
from papermill.exceptions import PapermillExecutionError

from lib.presets import Preset, load_preset
from lib.project import RECORD, RECORDED, ROOT, open_project
from lib.report.report import FIRST, write_notebook_page, write_report
from lib.training.fusion_learner import run_settings
from lib.training.run import Run
from lib.util.configs import check
from lib.util.errors import UserError, exit_on_user_error
from lib.util.files import file_sha256, only_one, read_json, write_file, writing
from lib.util.provenance import code_fingerprint, gpu_name
from lib.util.signals import StopSignals

FOLDER = ROOT / "notebooks"
# in the order of execution: listening comes early
EXECUTED = ("01_encoding", "04_training", "05_listening", "02_stage_ablation", "03_rms_collapse", "06_super_resolution")
NOTEBOOKS = tuple(sorted(EXECUTED))
LEAD = """Two clips of music fused into one, with the rhythm of the input and the harmony of the target, beside what
simple recipes make of the same pair."""
TRAINING = ("04_training", "06_super_resolution")  # those that can resume
# runs again after the notebook that it needs has run; without a trained run, listening has nothing to play
NEEDS = {"05_listening": "04_training", "06_super_resolution": "04_training"}
STOPPED = "stopped; resume with --resume"
USER_ERRORS = {error.__name__ for error in (UserError, *UserError.__subclasses__())}
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
FAILED = re.compile(r"^-+> *\d+ +(.+)", re.MULTILINE)  # a line in a traceback


class Kernel(AsyncKernelManager):
    """This environment's own kernel, whatever kernel is called python3 where Jupyter looks for one."""

    kernel_spec = KernelSpec(argv=make_ipkernel_cmd(), display_name="Python 3", language="python")


class NotebookError(RuntimeError):
    """A notebook that failed, and why. `by_user`: the message if bad settings or data are the cause."""

    def __init__(self, name: str, reason: str, by_user: str = ""):
        super().__init__(by_user or f"{name}: {reason}")
        self.name, self.reason, self.by_user = name, reason, by_user


def run_notebooks(
    preset_name: str, overrides: dict[str, Any], data_dir="", out_dir: str | Path = "", only=NOTEBOOKS, resume=False
) -> Path:
    """Execute the notebooks, rewriting `index.html` after each; returns its path. If one fails, the others that do not
    need it run first; then `NotebookError` is raised, or `UserError` if bad settings or data caused every failure."""
    out = Path(out_dir or ROOT / "outputs" / preset_name).resolve()
    preset, data = load_preset(preset_name, overrides), str(Path(data_dir).resolve()) if data_dir else ""
    # which notebooks keep in their parameters
    check(data.encode(errors="ignore").decode() == data, "folder", data, "a name in UTF-8")
    with only_one(out / ".notebooks.lock"):  # each notebook that trains has a lock of its own
        if TRAINING[0] in only:
            preset.train.loss.find_own()
        say(f"preset {preset_name}: data and latents")
        project = open_project(preset, data, out, resume=resume)
        if resume and TRAINING[0] in only and (out / "config.json").exists():  # refused before anything is replaced
            model = preset.model
            settings = run_settings(project.index, project.codec, model.cascade, preset.train, model.masking)
            Run.open(out).differences(settings, refused=True)
        if FIRST in only:
            project.listening()  # refuse songs too short to listen to before training, not after
        say("\n".join(project.in_words()))
        train, val = (len(project.manifest.split(split)) for split in ("train", "val"))
        parameters = {"preset": preset_name, "overrides": overrides, "data_dir": data, "out_dir": str(out)}
        # the index is named by its content; notebooks show recorded results, too, and what lib's TOML files say
        shown = [path for path in (RECORD / f"{name}.json" for name in RECORDED) if path.exists()]
        recorded = [file_sha256(path) for path in sorted([*shown, *(ROOT / "lib").rglob("*.toml")])]
        inputs = [parameters, dataclasses.asdict(preset), project.codec.fingerprint, project.index.name]
        inputs += [code_of_lib(), recorded]
        chosen, failures, page = [name for name in EXECUTED if name in only], {}, out / "index.html"
        for number, name in enumerate(chosen, start=1):
            where, needed, executed = f"[{number}/{len(chosen)}] {name}", NEEDS.get(name, ""), out / f"{name}.ipynb"
            conditions = json.dumps([*inputs, read_mark(out, needed), (FOLDER / f"{name}.ipynb").read_text()])
            state = hashlib.sha256(conditions.encode()).hexdigest()
            if resume and read_mark(out, name).get("state") == state:
                say(f"{where}: done before, skipped")
            else:
                stopped = resume and executed.exists() and not read_mark(out, name)
                forget(out, name)
                started = time.monotonic()
                try:
                    if name == FIRST and needed in failures:
                        raise NotebookError(name, f"not run: it needs {needed}, which failed", failures[needed].by_user)
                    say(f"{where} → {executed}")
                    execute(name, out, parameters | ({"resume": resume} if name in TRAINING else {}))
                    seconds = round(time.monotonic() - started)
                    mark = {"state": state, "seconds": seconds, "resumed": stopped, "at": time.time()}
                    say(f"{where}: {seconds} s")
                except NotebookError as error:
                    failures[name], mark = error, {"failed": error.reason}
                    say(f"{where}: {error.reason}")
                write_file(out / "report" / f"{name}.mark", json.dumps(mark))
                if executed.exists():
                    write_notebook_page(executed)
            about, to_come = facts(preset, out, train, val), chosen[number:]
            marks = {other: read_mark(out, other) for other in NOTEBOOKS if other not in to_come}
            reasons = {other: mark["failed"] for other, mark in marks.items() if "failed" in mark}
            write_report(out, f"Latent fusion: {preset_name}", LEAD, about, reasons, to_come)
        if failures:
            said = "; ".join(dict.fromkeys(map(str, failures.values())))
            if all(error.by_user for error in failures.values()):
                raise UserError(said)
            raise NotebookError(f"{len(failures)} of {len(chosen)} notebooks failed", f"{said}; the page is {page}")
        return page


def execute(name: str, out: Path, parameters: dict[str, Any]) -> None:
    """One notebook through papermill, its progress bars on stderr."""
    executed = out / f"{name}.ipynb"
    # ipc: no open port on a shared server; async: the other manager waits forever for a kernel that was killed
    # a folder of its own: two runs at once would talk to each other's kernel
    # under /tmp where the usual place has a long name: a socket's may have 107 bytes
    sockets = tempfile.TemporaryDirectory(prefix="kernel-", dir="/tmp" if len(tempfile.gettempdir()) > 60 else None)
    kernel = Kernel(kernel_name="python3", transport="ipc", ip=f"{sockets.name}/kernel")
    # where modules of one's own are
    kernel.kernel_spec.env["PYTHONPATH"] = os.pathsep.join(filter(None, (os.getcwd(), os.environ.get("PYTHONPATH"))))
    paths = (str(path).replace("{", "{{").replace("}", "}}") for path in (FOLDER / executed.name, executed))

    def interrupt(signal_name: str) -> None:
        if kernel.provisioner is None or kernel.provisioner.pid is None:
            raise KeyboardInterrupt
        say(f"{signal_name}: asking the notebook to save and stop; again to stop at once")
        os.kill(kernel.provisioner.pid, signal.SIGINT)  # which lets training save

    stop = StopSignals(interrupt)
    try:
        with stop, writing(executed):
            papermill.execute_notebook(*paths, parameters, cwd=ROOT, km=kernel, stderr_file=sys.stderr)
        if stop.asked:  # between two cells, where no code saw it
            raise KeyboardInterrupt(STOPPED)
    except PapermillExecutionError as error:
        if error.ename == "KeyboardInterrupt":
            raise KeyboardInterrupt(f"{error.evalue or 'stopped'}; resume with --resume") from None
        lines = FAILED.findall(COLOURS.sub("", "\n".join(error.traceback)))
        said = error.evalue or "".join(lines[-1:])  # an assertion without a message: its first line
        reason = f"cell {error.exec_count}: {error.ename}: {said}; the executed notebook is {executed}"
        raise NotebookError(name, reason, said if error.ename in USER_ERRORS else "") from None
    except RuntimeError as error:  # the kernel died, or never started
        if stop.asked:
            raise KeyboardInterrupt(STOPPED) from None
        raise NotebookError(name, f"{error}; the executed notebook is {executed}") from None
    finally:
        if kernel.has_kernel:
            run_sync(kernel.shutdown_kernel)(now=True)
        run_sync(kernel.cleanup_resources)()
        sockets.cleanup()


def facts(preset: Preset, out: Path, train: int, val: int) -> dict[str, str]:
    """The head of the page: settings, data, machine and times."""
    head = {"preset": preset.name, "pairs": f"{train} training, {val} validation"}
    if (out / "config.json").exists():
        run = Run.open(out)
        steps = [row["step"] for row in run.metrics("train")]
        head["codec"] = run.codec["name"]
        head["training"] = f"{steps[-1] if steps else 0} steps"
        head["code"] = f"commit {run.config['versions']['commit']}, torch {run.config['versions']['torch']}"
    head["machine"] = f"{os.cpu_count()} cores, {gpu_name()}"
    marks = {name: mark for name in NOTEBOOKS if "resumed" in (mark := read_mark(out, name))}  # which old marks lack
    took = (f"{name} {mark['seconds']} s" + " after a stop" * mark["resumed"] for name, mark in marks.items())
    return head | {"time": ", ".join(took)}


def code_of_lib() -> str:
    """A hash of all code that a notebook may use."""
    names = (path.relative_to(ROOT).with_suffix("") for path in (ROOT / "lib").rglob("*.py"))
    return code_fingerprint(*sorted(".".join(name.parts) for name in names))


def forget(out: Path, name: str) -> None:
    """Delete an earlier execution's mark, section, notebook and page: a page shows one run."""
    for path in (f"report/{name}.mark", f"report/{name}.json", f"{name}.ipynb", f"{name}.html"):
        (out / path).unlink(missing_ok=True)


def read_mark(out: Path, name: str) -> dict[str, Any]:
    """How a notebook ended: with which state and after how many seconds, or why it failed; empty if it has not."""
    with contextlib.suppress(UserError):
        return read_json(out / "report" / f"{name}.mark")
    return {}


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def parse_overrides(settings: list[str], codec: str | None = None) -> dict[str, Any]:
    """`["train.max_steps=40"]` → values as YAML reads them; `codec` wins over a setting of that name."""
    overrides: dict[str, Any] = {}
    for setting in settings:
        key, separator, value = setting.partition("=")
        if not (separator and key and value):
            raise UserError(f"--set {setting}: not of the form name=value; write for example --set train.max_steps=200")
        try:
            overrides[key] = read = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError):  # ValueError: what looks like a date and is none
            raise UserError(f"--set {setting}: {value!r} is not a YAML value; quote it") from None
        if type(read) is int and str(read) != value.strip():  # 010 is octal, 1:30 counts in sixties
            raise UserError(f"--set {setting}: YAML takes {value} for {read}; write {key}={read} if that is meant")
    if codec:
        overrides["codec"] = str(Path(codec).resolve()) if Path(codec).is_dir() else codec
    return overrides


def chosen_notebooks(only: str | None) -> tuple[str, ...]:
    """`"04,05"` → the notebooks' names, in their own order; None: all."""
    if only is None:
        return NOTEBOOKS
    asked = [part.strip() for part in only.split(",") if part.strip()]
    unknown = [part for part in asked if not any(part in (name, name[:2]) for name in NOTEBOOKS)]
    if unknown or not asked:
        raise UserError(f"--only {only}: unknown {', '.join(unknown) or 'choice'}; choose from {', '.join(NOTEBOOKS)}")
    return tuple(name for name in NOTEBOOKS if name in asked or name[:2] in asked)


def main() -> None:
    options = parser_of("pipeline").parse_args()
    with exit_on_user_error():
        overrides = parse_overrides(options.set, options.codec)
        only = chosen_notebooks(options.only)
        try:
            page = run_notebooks(options.preset, overrides, options.data, options.out, only, options.resume)
        except NotebookError as error:
            sys.exit(f"error: {error}")
        print(f"report: {page}")


if __name__ == "__main__":
    main()
