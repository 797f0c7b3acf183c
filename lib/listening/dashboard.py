"""Watch a training run: curves, time left, the newest clips and a button, which writes a file that stops it into the
run's folder. `watch("outputs/demo")` shows a run that trains anywhere on the same file system, notebook 04 its own."""

import asyncio
import contextlib
import json
import logging
import math
import os
import re
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from IPython import get_ipython
from IPython.display import display
from ipywidgets import Button, HBox, Image, Label, VBox, Widget
from tqdm import tqdm

from lib.audio.files import load_audio
from lib.listening.player import Players, PlayerWidget
from lib.listening.widgets import PICTURE, Message, can_show_widgets, figure_png
from lib.model.cascade import CascadeConfig
from lib.training import plots
from lib.training.run import Run
from lib.training.trainer import Callback, Trainer
from lib.util.configs import from_fields

SECONDS = 5.0  # between updates, each of which takes about a quarter of a second


class Dashboard(Callback):
    """Shows the training that it is a callback of. The button works while the cell runs if front end and kernel have
    subshells (JupyterLab 4.4, ipykernel 7); otherwise interrupt the cell, which saves and stops as well."""

    def __init__(self, seconds: float = SECONDS):
        self.seconds, self.updated = seconds, -math.inf
        self.panel: Panel | None = None
        self.warnings = WarningLine() if can_show_widgets() else None

    def on_start(self, trainer: Trainer) -> None:
        if can_show_widgets():
            self.panel = Panel(trainer.run)
            display(self.panel.box)

    def on_step(self, trainer: Trainer, row: dict[str, Any]) -> None:
        if self.panel is not None and time.monotonic() - self.updated >= self.seconds:
            self.panel.update()
            self.updated = time.monotonic()
            show_as_busy()

    on_validation = on_step

    def on_end(self, trainer: Trainer) -> None:
        if self.warnings is not None:
            self.warnings.replace_stderr(False)
        if self.panel is not None:
            ended = f"ended at step {trainer.step}; resume = True resumes"
            self.panel.update("finished" if trainer.finished else ended)
            self.panel.button.disabled = True


class WarningLine(logging.Handler):
    """Until it is closed, shows all warnings in a line of its own, rather than on stderr."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.line, self.said = Message(), {}
        for other in [handler for handler in logging.root.handlers if isinstance(handler, WarningLine)]:
            other.replace_stderr(False)  # of a training that was refused
        display(self.line)
        self.replace_stderr(True)

    def replace_stderr(self, on: bool) -> None:
        logging.captureWarnings(on)
        logging.root.addHandler(self) if on else logging.root.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == "Comm":  # of widgets that an earlier view of the page had
            return
        self.said[record.getMessage()] = None
        self.line.say(" · ".join(list(self.said)[-5:]))


def show_as_busy() -> None:
    """Let the front end show the kernel as busy: it shows it as idle once a subshell has answered a button."""
    if kernel := getattr(get_ipython(), "kernel", None):
        kernel.session.send(kernel.iopub_socket, "status", {"execution_state": "busy"}, kernel.get_parent())


def watch(path: str | Path, seconds: float = SECONDS) -> plt.Figure | None:
    """Follow a run that trains elsewhere; a headless run gets the curves so far. `UserError` if there is no run."""
    run = Run.open(path)
    if not can_show_widgets():
        return curves(run, Metrics(run.path / "metrics.jsonl"))
    panel = Panel(run)
    display(panel.box)

    async def follow() -> None:
        while True:
            try:
                panel.update()
            except Exception as error:  # another process may be writing the file: report it and read again
                panel.status.value = f"cannot be shown now: {type(error).__name__}: {error}"
            await asyncio.sleep(seconds if len(panel.seen) > 1 else 0.5)

    panel.task = asyncio.ensure_future(follow())  # without a reference, the task may be collected
    return None


class Panel:
    """The widgets of a dashboard: what a run's folder holds, and the stop button."""

    def __init__(self, run: Run):
        self.run = run
        self.status = Label("starting")
        self.button = Button(description="Stop and save", icon="stop", button_style="warning")
        self.button.on_click(self.stop)
        self.pressed = False
        leave_subshell_to_front_end(self.button)
        self.picture, self.players = Image(**PICTURE), PlayerWidget()
        self.metrics = Metrics(run.path / "metrics.jsonl")
        self.seen: list[tuple[float, int]] = []  # time and newest step of the last updates
        self.newest: tuple[int, Path] | None = None  # when the output that is shown was written, and its file
        self.box = VBox([HBox([self.button, self.status]), self.picture, self.players])

    def stop(self, button: Any) -> None:
        try:
            self.run.stop_file.touch()
            self.pressed = True
            self.status.value = "stopping after this step"
        except OSError as error:
            self.status.value = f"{self.run.stop_file}: cannot be written ({error.strerror})"

    def update(self, status: str = "") -> None:
        """Show what the run's folder holds now, with this status or the progress."""
        self.picture.value = figure_png(curves(self.run, self.metrics))
        self.seen = [*self.seen[-20:], (time.monotonic(), self.metrics.newest["step"])]
        self.status.value = status or self.progress()
        self.show_clips(self.run.path / "audio")

    def progress(self) -> str:
        """'step 120 of 600, epoch 3, 04:30 left'."""
        (began, first), (now, last), total = self.seen[0], self.seen[-1], self.run.total_steps
        status = f"step {last}" + (f" of {total}" if total else "") + f", epoch {self.metrics.newest['epoch']}"
        if self.run.stop_file.exists():
            return f"{status}, stopping after this step"
        if total and last >= total:
            return f"{status}, finished"
        if last and last == self.run.saved_step and (self.pressed or (last == first and len(self.seen) > 6)):
            return f"{status}, saved; no step since"
        if total and last > first:
            status += f", {tqdm.format_interval((now - began) / (last - first) * (total - last))} left"
        return status

    def show_clips(self, folder: Path) -> None:
        """The first demo pair with the model's newest output."""
        outputs = [path for path in folder.glob("pair_0_*.wav") if re.search("_(epoch_[0-9]+|last)$", path.stem)]
        newest = max(((path.stat().st_mtime_ns, path) for path in outputs), default=self.newest)
        if newest != self.newest:
            when = re.sub("epoch_0*", "after epoch ", newest[1].stem.removeprefix("pair_0_"))
            wavs = {name: load_audio(folder / f"pair_0_{name}.wav", channels=None) for name in ("input", "target")}
            self.players.html = Players(wavs | {f"output, {when}": load_audio(newest[1], channels=None)})._repr_html_()
            self.newest = newest


def leave_subshell_to_front_end(widget: Widget) -> None:
    """Let a widget's messages reach the subshell that the front end sends them to. ipykernel 7.4 notes the one that it
    was created in, which is busy while the cell runs. That note is private and is removed: no public switch exists."""
    if widget.comm is not None:
        vars(widget.comm).pop("_reply_subshell_id", None)


class Metrics:
    """What the curves show of a growing metrics.jsonl. Each line is read once: the file may reach gigabytes."""

    NEEDED = re.compile(r"epoch|loss|grad_norm|sign/\w+|stage[0-9]+/(output_rms|target_scale|rms_before_scaling)")

    def __init__(self, path: Path):
        self.path = path
        self.rows: dict[str, list[dict[str, Any]]] = {"train": [], "val": []}
        self.newest: dict[str, Any] = {"step": 0, "epoch": 0}
        self.file_number, self.offset = 0, 0

    def read(self) -> None:
        """Read the added lines, or the whole file if a resumed training has replaced it."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            status = os.fstat(file.fileno())
            if status.st_ino != self.file_number or status.st_size < self.offset:
                self.__init__(self.path)
                self.file_number = status.st_ino
            file.seek(self.offset)
            added = file.read()
        complete = added[: added.rfind(b"\n") + 1]  # the last line may be half written
        self.offset += len(complete)
        for line in complete.splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a damaged line: `Run.metrics` names it
                row = json.loads(line)
                rows, step = self.rows[row["split"]], row["step"]
                rows.append({"step": step} | {k: v for k, v in row.items() if self.NEEDED.fullmatch(k)})
                self.newest |= rows[-1]


def curves(run: Run, metrics: Metrics) -> plt.Figure:
    """A run's curves so far."""
    clamps = [stage.clamp for stage in from_fields(CascadeConfig, run.config["cascade"]).stages]
    metrics.read()
    return plots.training_dashboard(metrics.rows["train"], metrics.rows["val"], clamps)
