"""The dashboard shows what the run's folder holds, and its button stops the training as a signal does."""

import asyncio
import dataclasses
import json
import logging
import os
import re
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import ipykernel.comm.comm
import ipywidgets
import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.figure import Figure

import lib.listening.dashboard
from lib.audio.files import save_audio
from lib.listening.dashboard import Dashboard, Metrics, Panel, curves, leave_subshell_to_front_end, show_as_busy, watch
from lib.model.fusion import load_model
from lib.training.callbacks import DemoClips
from lib.training.config import TrainConfig
from lib.training.fusion_learner import train
from lib.training.run import Run
from lib.training.trainer import Callback, Trainer
from lib.util.errors import UserError
from lib.util.files import write_atomic

# Three steps per epoch, so that checkpoints fall within epochs.
CONFIG = TrainConfig(epochs=4, batch_size=2, checkpoint_every=4, learning_rate=1e-2, seed=2)


@pytest.fixture
def start(tmp_path, tiny_index, tiny_codec, tiny_cascade) -> Callable[..., Run]:
    """`start(callbacks, folder, resume=, **TrainConfig fields)` trains."""

    def run(callbacks: Sequence[Callback] = (), folder: str = "run", resume: bool = False, **changes) -> Run:
        config = dataclasses.replace(CONFIG, **changes)
        data = tiny_index, tiny_codec, tiny_cascade()
        return train(tmp_path / folder, *data, config, resume=resume, progress=False, callbacks=callbacks)

    return run


@pytest.fixture
def run(tmp_path, tiny_cascade) -> Run:
    """A run of two stages that has logged nothing."""
    config = {"cascade": dataclasses.asdict(tiny_cascade()), "train": dataclasses.asdict(CONFIG) | {"max_steps": 40}}
    return Run.create(tmp_path / "run", config)


def row(step: int, split: str = "train") -> dict:
    stage = {"output_rms": 5.0 + step, "target_scale": 1.1, "rms_before_scaling": 5.0, "alignment": 0.5}
    values = {f"stage{i}/{name}": value for i in range(2) for name, value in stage.items()}
    return {"split": split, "step": step, "epoch": 0, "loss": 1 / step, "grad_norm": 2.0 * step} | values


class Stop(RuntimeError):
    pass


class At(Callback):
    """Does something after a step, once."""

    def __init__(self, step: int, act: Callable[[], None]):
        self.step, self.act = step, act

    def on_step(self, trainer: Trainer, row: dict) -> None:
        if row["step"] == self.step:
            self.act()


class Kill(At):
    """Ends a training after a step, as a crash would."""

    def __init__(self, step: int):
        super().__init__(step, self.fail)

    def fail(self) -> None:
        raise Stop


class FrontEnd:
    """A browser that is watching: the panels it got, what their status said, how many points each picture had."""

    def __init__(self):
        self.boxes: list[ipywidgets.Widget] = []
        self.statuses: list[str] = []
        self.pictures: list[list[int]] = []

    def picture(self, figure: Figure) -> bytes:
        self.pictures.append([len(line.get_xdata()) for line in figure.axes[0].lines])
        plt.close(figure)
        return b"a picture"


@pytest.fixture
def front_end(monkeypatch) -> FrontEnd:
    front_end, update = FrontEnd(), Panel.update

    def updated(panel: Panel, status: str = "") -> None:
        update(panel, status)
        front_end.statuses.append(panel.status.value)
        assert bytes(panel.picture.value) == b"a picture"

    monkeypatch.setattr(lib.listening.dashboard, "can_show_widgets", lambda: True)
    monkeypatch.setattr(lib.listening.dashboard, "display", front_end.boxes.append)
    monkeypatch.setattr(lib.listening.dashboard, "figure_png", front_end.picture)
    monkeypatch.setattr(Panel, "update", updated)
    return front_end


# --- while training ---------------------------------------------------------------------------------------------------


def test_headless_nothing_is_drawn_and_no_widget_is_created(start, monkeypatch):
    def unwanted(*_, **__):
        raise AssertionError("drawn")

    monkeypatch.setattr(lib.listening.dashboard, "display", unwanted)
    monkeypatch.setattr(lib.listening.dashboard.plots, "training_dashboard", unwanted)
    monkeypatch.setattr(ipywidgets.Widget, "__init__", unwanted)
    start([Dashboard(seconds=0)])


def test_a_front_end_sees_the_curves_grow(start, front_end):
    """Every picture has all steps and validations so far; the last one, after training, all there are."""
    start([dashboard := Dashboard(seconds=0)])
    assert front_end.boxes == [dashboard.warnings.line, dashboard.panel.box]
    validations = {4: 1, 8: 2, 12: 3}
    wanted, seen = [], 0
    for step in range(1, 13):
        wanted.append([step, seen])
        if step in validations:
            seen = validations[step]
            wanted.append([step, seen])
    assert front_end.pictures == [*wanted, [12, 3]]
    assert plt.get_fignums() == []


def test_the_status_has_step_epoch_and_the_time_left(start, front_end, monkeypatch):
    """With a clock that moves by half a minute a step."""
    now = 1e6
    monkeypatch.setattr(lib.listening.dashboard, "time", SimpleNamespace(monotonic=lambda: now))

    class Clock(Callback):
        def on_step(self, trainer: Trainer, row: dict) -> None:
            nonlocal now
            now += 30

    start([Clock(), dashboard := Dashboard(seconds=1)])
    assert front_end.statuses == [
        "step 1 of 12, epoch 0",
        *(
            f"step {n} of 12, epoch {(n - 1) // 3}, {(12 - n) // 2:02d}:{(12 - n) % 2 * 30:02d} left"
            for n in range(2, 12)
        ),
        "step 12 of 12, epoch 3, finished",
        "finished",
    ]
    assert dashboard.panel.button.disabled


def test_pictures_keep_their_distance(start, front_end):
    start([Dashboard(seconds=1000)])
    assert front_end.pictures == [[1, 0], [12, 3]]  # the first step and the end


def test_the_time_between_pictures_counts(start, front_end, monkeypatch):
    """With a clock that moves by one second a step."""
    now = 0

    class Clock(Callback):
        def on_step(self, trainer: Trainer, row: dict) -> None:
            nonlocal now
            now += 1

    monkeypatch.setattr(lib.listening.dashboard, "time", SimpleNamespace(monotonic=lambda: now))
    start([Clock(), Dashboard(seconds=4)])
    assert [steps for steps, _ in front_end.pictures] == [1, 5, 9, 12]


def test_a_failed_training_leaves_its_last_curves(start, front_end):
    with pytest.raises(Stop):
        start([dashboard := Dashboard(seconds=1000), Kill(6)])
    assert front_end.pictures[-1] == [6, 1]
    assert front_end.statuses[-1] == "ended at step 6; resume = True resumes"
    assert dashboard.panel.button.disabled


def test_a_training_that_had_ended_or_was_refused_keeps_no_later_warning(start, front_end):
    before = list(logging.root.handlers)
    start([Dashboard()])
    start([Dashboard()], resume=True)
    assert logging.root.handlers == before
    Dashboard(), Dashboard()  # whose trainings never began
    start([Dashboard()], resume=True)
    assert logging.root.handlers == before


def test_a_resumed_run_shows_what_came_before(start, front_end):
    with pytest.raises(Stop):
        start([Dashboard(seconds=1000), Kill(6)])
    start([Dashboard(seconds=1000)], resume=True)
    assert front_end.pictures[-2:] == [[5, 1], [12, 3]]  # the steps up to the checkpoint, and those since
    assert front_end.statuses[-2:] == ["step 5 of 12, epoch 1", "finished"]


def test_the_button_saves_and_stops_after_the_step(start, front_end, tmp_path):
    whole = start(folder="whole")
    dashboard = Dashboard(seconds=1000)
    with pytest.raises(KeyboardInterrupt, match="stopped by the stop button; step 6 is saved"):
        start([dashboard, At(5, lambda: dashboard.panel.button.click())])  # while step 6 is being decided on
    stopped = Run.open(tmp_path / "run")
    assert os.readlink(stopped.path / "last").endswith("step_00000006")
    assert not stopped.stop_file.exists()
    assert front_end.statuses[-1] == "ended at step 6; resume = True resumes"
    resumed = start([Dashboard(seconds=1000)], resume=True)
    assert resumed.metrics() == whole.metrics()
    models = [load_model(run, "last").state_dict() for run in (whole, resumed)]
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())


def test_a_button_pressed_before_training_stops_none_of_it(start, run):
    panel = Panel(run)
    panel.button.click()
    assert run.stop_file.exists()
    assert panel.status.value == "stopping after this step"
    again = start()
    assert len(again.metrics("train")) == 12
    assert again.path == run.path
    assert not again.stop_file.exists()


def test_the_clips_of_a_training_are_shown(start, front_end, tiny_codec, tiny_manifest):
    start([DemoClips(tiny_codec, tiny_manifest, every=100, count=1), dashboard := Dashboard(seconds=1000)])
    assert names(dashboard.panel) == ["input", "target", "output, last"]


# --- warnings ---------------------------------------------------------------------------------------------------------


def test_warnings_are_in_a_line_of_their_own_while_a_training_is_watched(start, front_end, capsys):
    def warn() -> None:
        for message in ("RMS <low>", "RMS <low>", "another"):
            logging.getLogger("lib.training").warning(message)
        warnings.warn("from elsewhere", stacklevel=1)
        logging.getLogger("Comm").warning("No such comm: 3afe")  # of a page that was closed

    handlers = list(logging.getLogger().handlers)
    start([dashboard := Dashboard(seconds=1000), At(5, warn)])
    line = dashboard.warnings.line.value
    assert "RMS &lt;low&gt; · another · " in line
    assert "from elsewhere" in line
    assert "comm" not in line
    assert capsys.readouterr().err == ""
    assert logging.getLogger().handlers == handlers


def test_the_kernel_is_shown_as_busy(monkeypatch):
    sent = []
    kernel = SimpleNamespace(
        session=SimpleNamespace(send=lambda *message: sent.append(message)),
        iopub_socket="iopub",
        get_parent=lambda: {"header": {"msg_id": "the cell's"}},
    )
    monkeypatch.setattr(lib.listening.dashboard, "get_ipython", lambda: SimpleNamespace(kernel=kernel))
    show_as_busy()
    assert sent == [("iopub", "status", {"execution_state": "busy"}, {"header": {"msg_id": "the cell's"}})]
    monkeypatch.setattr(lib.listening.dashboard, "get_ipython", lambda: None)
    show_as_busy()
    assert len(sent) == 1


# --- curves -----------------------------------------------------------------------------------------------------------


def test_the_figure_has_the_curves_of_metrics_jsonl(start):
    run = start()
    figure = curves(run, Metrics(run.path / "metrics.jsonl"))
    assert [len(axes.lines) for axes in figure.axes] == [2, 1, 2, 2]  # losses, gradient norm, two stages twice
    train, val = run.metrics("train"), run.metrics("val")
    keys = (
        [(train, "loss"), (val, "loss")],
        [(train, "grad_norm")],
        [(train, f"stage{i}/output_rms") for i in range(2)],
        [(train, f"stage{i}/target_scale") for i in range(2)],
    )
    for axes, wanted in zip(figure.axes, keys, strict=True):
        for line, (rows, key) in zip(axes.lines, wanted, strict=True):
            assert line.get_xydata().tolist() == [[row["step"], row[key]] for row in rows]
    plt.close(figure)


@pytest.fixture
def parsed(monkeypatch) -> list[bytes]:
    """The lines that are parsed from now on."""
    found = []
    monkeypatch.setattr(
        lib.listening.dashboard, "json", SimpleNamespace(loads=lambda line: found.append(line) or json.loads(line))
    )
    return found


@pytest.fixture
def metrics(run) -> Metrics:
    return Metrics(run.path / "metrics.jsonl")


def steps(metrics: Metrics, split: str = "train") -> list[int]:
    return [row["step"] for row in metrics.rows[split]]


def test_every_line_is_read_once(run, metrics, parsed):
    for step in range(1, 6):
        run.log(row(step))
        if step == 3:
            run.log(row(3, "val"))
        metrics.read()
        assert len(parsed) == step + (step >= 3)
    metrics.read()
    assert len(parsed) == 6
    assert steps(metrics) == [1, 2, 3, 4, 5]
    assert steps(metrics, "val") == [3]
    assert metrics.newest["step"] == 5


def test_only_what_the_curves_need_is_kept(run, metrics):
    run.log(row(1) | {"grad_norm/stage0/layers": 1.0, "loss/input_mse": 2.0})
    metrics.read()
    stages = {f"stage{i}/{name}" for i in range(2) for name in ("output_rms", "target_scale", "rms_before_scaling")}
    assert metrics.rows["train"][0].keys() == {"step", "epoch", "loss", "grad_norm"} | stages
    for name in metrics.rows["train"][0]:
        assert metrics.rows["train"][0][name] == row(1)[name]


def test_a_half_written_line_waits_for_its_other_half(run, metrics):
    run.log(row(1))
    line = json.dumps(row(2)) + "\n"
    with open(metrics.path, "a", buffering=1) as file:
        for part in (line[:10], line[10:-1], line[-1:]):
            metrics.read()
            assert steps(metrics) == [1]
            file.write(part)
            file.flush()
    metrics.read()
    assert steps(metrics) == [1, 2]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "no json",
        "",
        "3",
        "null",
        "[1]",
        '"text"',
        "{}",
        '{"split": "train"}',
        '{"split": "test", "step": 2}',
        '{"split": ["train"], "step": 2}',
        "\x00\x00",
        "é",
    ],
)
def test_a_damaged_line_is_passed_over(run, metrics, line):
    run.log(row(1))
    with open(metrics.path, "ab") as file:
        file.write(line.encode("latin-1") + b"\n")
    run.log(row(3))
    metrics.read()
    assert steps(metrics) == [1, 3]
    assert steps(metrics, "val") == []
    plt.close(curves(run, metrics))


def test_a_file_that_a_resumed_training_replaced_is_read_again(run, metrics):
    for step in (1, 2, 3):
        run.log(row(step))
    metrics.read()
    run.forget_metrics_after(2)
    for step in (3, 4):  # longer than what was read
        run.log(row(step) | {"loss": 9.0})
    metrics.read()
    assert [(row["step"], row["loss"]) for row in metrics.rows["train"]] == [(1, 1.0), (2, 0.5), (3, 9.0), (4, 9.0)]
    size = metrics.path.stat().st_size
    write_atomic(metrics.path, json.dumps(row(7)) + " " * (size - len(json.dumps(row(7))) - 1) + "\n")
    metrics.read()  # another file of the same size
    assert steps(metrics) == [7]


def test_a_file_that_was_cut_off_is_read_again(run, metrics):
    for step in (1, 2, 3):
        run.log(row(step))
    metrics.read()
    lines = metrics.path.read_bytes().splitlines(keepends=True)
    os.truncate(metrics.path, len(lines[0]))
    metrics.read()
    assert steps(metrics) == [1]


def test_without_a_file_there_is_nothing_to_show(run, metrics):
    metrics.read()
    assert metrics.rows == {"train": [], "val": []}
    assert metrics.newest["step"] == 0
    plt.close(curves(run, metrics))
    run.log(row(1))
    metrics.read()
    metrics.path.unlink()  # as while a new run takes the old one's place
    metrics.read()
    assert steps(metrics) == [1]


# --- clips ------------------------------------------------------------------------------------------------------------


def names(panel: Panel) -> list[str]:
    return re.findall('data-name="([^"]*)"', panel.players.html)


def clips(run: Run, *stems: str) -> None:
    """Clips of these names, each newer than the one before."""
    folder = run.path / "audio"
    folder.mkdir(exist_ok=True)
    for number, stem in enumerate(stems):
        save_audio(folder / f"{stem}.wav", 0.1 * torch.randn(1, 9600))
        os.utime(folder / f"{stem}.wav", (number, number))


def test_the_newest_clip_of_the_first_pair_is_shown(run):
    panel = Panel(run)
    panel.show_clips(run.path / "audio")  # which is not there yet
    assert panel.players.html == ""
    clips(run, "pair_0_last", "pair_0_epoch_0002", "pair_0_epoch_0010", "pair_1_epoch_0012", "pair_0_input")
    clips(run, "pair_0_target")
    os.utime(run.path / "audio" / "pair_0_epoch_0010.wav", (50, 50))
    os.utime(run.path / "audio" / "pair_1_epoch_0012.wav", (60, 60))
    panel.show_clips(run.path / "audio")
    assert names(panel) == ["input", "target", "output, after epoch 10"]
    os.utime(run.path / "audio" / "pair_0_last.wav", (70, 70))
    panel.show_clips(run.path / "audio")
    assert names(panel) == ["input", "target", "output, last"]


def test_the_same_clips_are_read_once(run, monkeypatch):
    clips(run, "pair_0_epoch_0001", "pair_0_input", "pair_0_target")
    panel, loaded = Panel(run), []

    def load(path, channels):
        assert channels is None  # all there are
        loaded.append(path.name)
        return torch.ones(1, 9600)

    monkeypatch.setattr(lib.listening.dashboard, "load_audio", load)
    for _ in range(3):
        panel.show_clips(run.path / "audio")
    assert sorted(loaded) == ["pair_0_epoch_0001.wav", "pair_0_input.wav", "pair_0_target.wav"]


# --- watching from elsewhere ------------------------------------------------------------------------------------------


def test_a_headless_run_gets_the_curves_as_they_are(run, monkeypatch):
    def unwanted(*_, **__):
        raise AssertionError("a widget")

    monkeypatch.setattr(ipywidgets.Widget, "__init__", unwanted)
    for step in (1, 2):
        run.log(row(step))
    figure = watch(run.path)
    assert isinstance(figure, Figure)
    assert [len(line.get_xdata()) for line in figure.axes[0].lines] == [2, 0]
    plt.close(figure)


def test_a_folder_without_a_run_is_reported(tmp_path):
    with pytest.raises(UserError, match="no run here"):
        watch(tmp_path)


def test_in_a_front_end_a_run_is_followed(run, front_end):
    run.plan(40)

    async def session() -> None:
        assert watch(run.path, seconds=0.02) is None
        (box,) = front_end.boxes
        button, status = box.children[0].children
        await until(lambda: front_end.statuses == ["step 0 of 40, epoch 0"])
        run.log(row(8))
        await until(lambda: re.fullmatch(r"step 8 of 40, epoch 0, 00:0\d left", status.value))
        run.log(row(12))
        await until(lambda: re.fullmatch(r"step 12 of 40, epoch 0, 00:0\d left", status.value))
        assert front_end.pictures[-1] == [2, 0]
        button.click()
        assert run.stop_file.exists()
        await until(lambda: status.value == "step 12 of 40, epoch 0, stopping after this step")
        (run.path / "last").mkdir(exist_ok=True)
        (run.path / "last" / "meta.json").write_text('{"step": 12}')
        run.stop_file.unlink()
        await until(lambda: status.value == "step 12 of 40, epoch 0, saved; no step since")
        run.log(row(13))
        (run.path / "audio").mkdir(exist_ok=True)
        (run.path / "audio" / "pair_0_last.wav").write_bytes(b"half written")
        await until(lambda: status.value.startswith("cannot be shown now: AudioError: "))
        (run.path / "audio" / "pair_0_last.wav").unlink()
        run.log(row(40))
        await until(lambda: status.value == "step 40 of 40, epoch 0, finished")
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    with ThreadPoolExecutor(1) as thread:  # a browser of other tests may keep a loop running in this one
        thread.submit(asyncio.run, session()).result()


async def until(true: Callable[[], object]) -> None:
    for _ in range(500):
        if true():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("not within 5 s")


def progress(panel: Panel, seen: Sequence[tuple[float, int]]) -> str:
    panel.seen, panel.metrics.newest = list(seen), {"step": seen[-1][1], "epoch": 3}
    return panel.progress()


@pytest.mark.parametrize(
    ("seen", "total", "wanted"),
    [
        ([(0.0, 0)], 600, "step 0 of 600, epoch 3"),
        ([(0.0, 100), (10.0, 100)], 600, "step 100 of 600, epoch 3"),  # nothing happens
        ([(0.0, 100), (5.0, 110), (30.0, 120)], 600, "step 120 of 600, epoch 3, 12:00 left"),
        ([(0.0, 0), (60.0, 1)], 601, "step 1 of 601, epoch 3, 10:00:00 left"),
        ([(0.0, 590), (10.0, 600)], 600, "step 600 of 600, epoch 3, finished"),
        ([(0.0, 100), (10.0, 120)], None, "step 120, epoch 3"),
        ([(0.0, 100), (10.0, 20)], 600, "step 20 of 600, epoch 3"),  # a new training in the same place
    ],
)
def test_progress(run, seen, total, wanted):
    if total:
        run.plan(total)
    assert progress(Panel(run), seen) == wanted


def test_progress_of_a_run_that_stops_or_stands_still(run):
    run.plan(600)
    panel, still = Panel(run), [(float(i), 120) for i in range(7)]
    assert progress(panel, still) == "step 120 of 600, epoch 3"
    (run.path / "last").mkdir()
    (run.path / "last" / "meta.json").write_text('{"step": 120}')
    assert progress(panel, still) == "step 120 of 600, epoch 3, saved; no step since"
    assert progress(panel, still[:6]) == "step 120 of 600, epoch 3"  # too early to say
    assert "left" in progress(panel, [(0.0, 119), *still[1:]])
    panel.button.click()
    assert progress(panel, still) == "step 120 of 600, epoch 3, stopping after this step"
    run.stop_file.unlink()  # as training does once it has stopped
    assert progress(panel, still[:2]) == "step 120 of 600, epoch 3, saved; no step since"


# --- subshells --------------------------------------------------------------------------------------------------------


def test_the_buttons_messages_go_to_the_subshell_that_the_front_end_names(monkeypatch):
    """With ipykernel's own comm, opened while a cell of the main shell runs."""
    kernel = SimpleNamespace(
        session=SimpleNamespace(send=lambda *_, **__: None), iopub_socket=None, get_parent=lambda: {"header": {"a": 1}}
    )
    monkeypatch.setattr(ipykernel.comm.comm.Kernel, "initialized", lambda: True)
    monkeypatch.setattr(ipykernel.comm.comm.BaseComm, "kernel", kernel)
    comm = ipykernel.comm.comm.BaseComm(target_name="jupyter.widget")
    assert "_reply_subshell_id" in vars(comm), (
        "ipykernel no longer keeps _reply_subshell_id: see lib.listening.dashboard.leave_subshell_to_front_end"
    )
    assert comm._reply_subshell_for({}, "the front end's") is None  # the main shell, which is busy
    leave_subshell_to_front_end(SimpleNamespace(comm=comm))
    assert comm._reply_subshell_for({}, "the front end's") == "the front end's"
    leave_subshell_to_front_end(SimpleNamespace(comm=comm))  # a second time does no harm
    leave_subshell_to_front_end(SimpleNamespace(comm=None))
