"""Training under one's eyes: curves, time left, the latest clips and a stop button.

    dashboard.watch("outputs/demo")

in any notebook shows a run that trains anywhere on the same files: in another notebook, by a launcher on eight GPUs, in
a kernel whose page was closed. The notebook that trains shows the same below its cell. All that is shown comes from the
run's folder, and so does the stop: a file that training looks for after every step. A headless run shows nothing.
"""

import asyncio
import contextlib
import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ipywidgets
import matplotlib.pyplot as plt
from IPython.display import display

from lib.audio.files import load_audio
from lib.listening.player import Players, PlayerWidget
from lib.listening.widgets import can_show_widgets, figure_png
from lib.model.cascade import CascadeConfig
from lib.training import plots
from lib.training.run import Run
from lib.training.telemetry import Callback
from lib.training.trainer import Trainer

SECONDS = 5.0  # between two pictures, each of which takes about a quarter of a second


class Dashboard(Callback):
    """Shows the training that it is a callback of. A kernel answers the button while the cell runs where front end and
    kernel have subshells (JupyterLab 4.4, ipykernel 7); elsewhere, interrupting the cell saves and stops as well."""

    def __init__(self, seconds: float = SECONDS):
        self.seconds = seconds
        self.panel: Panel | None = None

    def on_start(self, trainer: Trainer) -> None:
        if can_show_widgets():
            self.panel = Panel(trainer.run)
            self.began, self.first, self.last = time.monotonic(), trainer.step, -self.seconds
            display(self.panel.box)

    def on_step(self, trainer: Trainer, row: dict[str, Any]) -> None:
        if self.panel is not None and time.monotonic() - self.last >= self.seconds:
            total, taken = trainer.order.total_steps(trainer.step), trainer.step - self.first
            left = (time.monotonic() - self.began) / max(1, taken) * (total - trainer.step)
            self.panel.show(f"step {trainer.step} of {total}, epoch {trainer.order.epoch}, {duration(left)} left")
            self.last = time.monotonic()

    on_validation = on_step

    def on_end(self, trainer: Trainer) -> None:
        if self.panel is not None:
            ended = "finished" if trainer.finished else f"ended at step {trainer.step}; resume = True goes on"
            self.panel.show(ended)
            self.panel.button.disabled = True


def watch(path: str | Path, seconds: float = SECONDS) -> plt.Figure | None:
    """Show a run that trains elsewhere, until this kernel ends; a headless run gets the curves as they are. `UserError`
    where there is no run."""
    run = Run.open(path)
    if not can_show_widgets():
        return curves(run, Metrics(run.path / "metrics.jsonl"))
    panel = Panel(run)
    display(panel.box)

    async def follow() -> None:
        seen: list[tuple[float, int]] = []  # when which step was the newest
        while True:
            try:
                if panel.asked and run.saved_step == panel.metrics.last_step and not run.stop_file.exists():
                    panel.show(f"stopped at step {run.saved_step}, saved")
                else:
                    panel.show(progress(seen, run) if seen else "reading")
                seen = [*seen[-20:], (time.monotonic(), panel.metrics.last_step)]
            except Exception as error:  # of files that another process writes: told, and looked at again
                panel.status.value = f"cannot be shown now: {type(error).__name__}: {error}"
            await asyncio.sleep(seconds if len(seen) > 1 else 0.5)

    panel.task = asyncio.ensure_future(follow())  # a task that nobody holds may be forgotten
    return None


def progress(seen: Sequence[tuple[float, int]], run: Run) -> str:
    """'step 120 of 600, about 4.5 min left', from times and the steps that were the newest then."""
    (began, first), (now, last) = seen[0], seen[-1]
    total = run.total_steps
    status = f"step {last}" + (f" of {total}" if total else "")
    if run.stop_file.exists():
        return f"{status}, stopping after this step"
    if total and last >= total:
        return f"{status}, finished"
    if last and last == run.saved_step and last == first and len(seen) > 6:
        return f"{status}, saved there, and nothing since: stopped, or ended early"
    if total and last > first:
        status += f", {duration((now - began) / (last - first) * (total - last))} left"
    return status


class Panel:
    """The widgets of a dashboard over a run's folder."""

    def __init__(self, run: Run):
        self.run = run
        self.status = ipywidgets.Label("starting")
        self.button = ipywidgets.Button(description="Stop and save", icon="stop", button_style="warning")
        self.button.on_click(self.stop)
        if self.button.comm is not None:
            # ipykernel 7.4 takes a widget's messages to the shell that it was made in, which is busy with the cell;
            # without this note of its own it leaves them in the subshell that the front end sends them to
            vars(self.button.comm).pop("_reply_subshell_id", None)
        self.picture = ipywidgets.Image(format="png", layout={"max_width": "100%", "align_self": "flex-start"})
        self.players = PlayerWidget()
        self.asked = False  # for a stop, by this panel's button
        self.metrics = Metrics(run.path / "metrics.jsonl")
        self.newest: tuple[Path, int] | None = None  # of the clips that are shown, and when it was written
        head = ipywidgets.HBox([self.button, self.status])
        self.box = ipywidgets.VBox([head, self.picture, self.players])

    def stop(self, button: Any) -> None:
        try:
            self.run.stop_file.touch()
            self.asked = True
            self.status.value = "stopping after this step"
        except OSError as error:
            self.status.value = f"{self.run.stop_file}: cannot be written ({error.strerror})"

    def show(self, status: str) -> None:
        self.status.value = status
        self.picture.value = figure_png(curves(self.run, self.metrics))
        self.show_clips(self.run.path / "audio")

    def show_clips(self, folder: Path) -> None:
        """The first demo pair, and what the model makes of it by now."""
        fused = [path for path in folder.glob("pair_0_*.wav") if re.search("_(epoch_[0-9]+|last)$", path.stem)]
        written, newest = max(((path.stat().st_mtime_ns, path) for path in fused), default=(0, None))
        if newest is not None and (newest, written) != self.newest:
            when = re.sub("epoch_0*", "after epoch ", newest.stem.removeprefix("pair_0_"))
            wavs = {name: load_audio(folder / f"pair_0_{name}.wav") for name in ("input", "target")}
            self.players.html = Players(wavs | {f"output, {when}": load_audio(newest)})._repr_html_()
            self.newest = (newest, written)


class Metrics:
    """What the curves need of a metrics.jsonl that grows, each line read once: it may come to gigabytes."""

    NEEDED = re.compile(r"loss|grad_norm|stage[0-9]+/(output_rms|target_scale|rms_before_scaling)")

    def __init__(self, path: Path):
        self.path = path
        self.forget()

    def forget(self) -> None:
        self.rows: dict[str, list[dict[str, Any]]] = {"train": [], "val": []}
        self.file_number, self.offset = 0, 0

    @property
    def last_step(self) -> int:
        return self.rows["train"][-1]["step"] if self.rows["train"] else 0

    def read(self) -> None:
        """Read what was added; all of it where a resumed training has written the file anew."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            status = os.fstat(file.fileno())
            if status.st_ino != self.file_number or status.st_size < self.offset:
                self.forget()
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


def curves(run: Run, metrics: Metrics) -> plt.Figure:
    """A run's curves as they are now."""
    clamps = [stage.clamp for stage in CascadeConfig.from_dict(run.config["cascade"]).stages]
    metrics.read()
    return plots.training_dashboard(metrics.rows["train"], metrics.rows["val"], clamps)


def duration(seconds: float) -> str:
    """'about 4.5 min', 'about 3.2 h'."""
    return f"about {seconds / 60:.1f} min" if seconds < 3600 else f"about {seconds / 3600:.1f} h"
