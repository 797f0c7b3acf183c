"""What looks on while a model trains: it writes and draws what happened, and changes nothing."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lib.callbacks
from lib.audio import load_audio, probe_audio
from lib.callbacks import Dashboard, DemoClips, TensorBoard
from lib.latents import LatentPairs
from lib.processes import rng_state
from lib.runs import Run
from lib.telemetry import Callback
from lib.train_config import TrainConfig
from lib.trainer import Trainer, train

# Three steps an epoch, so that checkpoints fall within epochs.
CONFIG = TrainConfig(epochs=4, batch_size=2, checkpoint_every=4, learning_rate=1e-2, seed=2)


@pytest.fixture
def start(tmp_path, tiny_index, tiny_codec, tiny_cascade) -> Callable[..., Run]:
    """`start(callbacks, folder, resume=, **TrainConfig fields)` trains; dropout and noise make every step random."""

    def run(callbacks: Sequence[Callback] = (), folder: str = "run", resume: bool = False, **changes) -> Run:
        return train(
            tmp_path / folder,
            tiny_index,
            tiny_codec,
            tiny_cascade(anti_cheating=0.1),
            dataclasses.replace(CONFIG, **changes),
            resume=resume,
            progress=False,
            callbacks=callbacks,
        )

    return run


class Stop(RuntimeError):
    pass


class Kill(Callback):
    """Ends a training after a step, as a crash would."""

    def __init__(self, step: int):
        self.step = step

    def on_step(self, trainer: Trainer, row: dict) -> None:
        if row["step"] == self.step:
            raise Stop


class Keep(Callback):
    """Keeps the trainer."""

    def on_start(self, trainer: Trainer) -> None:
        self.trainer = trainer


def state(trainer: Trainer) -> list:
    """All that training goes on from: weights of both models, modes, gradients, random numbers."""
    models = [trainer.learner.plain_model, *([trainer.learner.average] if trainer.learner.average is not None else [])]
    kept = [value.clone() for model in models for value in model.parameters()]
    modes = [module.training for model in models for module in model.modules()]
    gradients = [p.grad.clone() for p in trainer.learner.plain_model.parameters() if p.grad is not None]
    return [*kept, *gradients, rng_state()["rng"], torch.tensor(modes), torch.tensor(torch.is_grad_enabled())]


# --- clips to listen to -----------------------------------------------------------------------------------------------


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_clips_are_written_at_their_epochs_and_at_the_end(start, tiny_codec):
    run = start([DemoClips(tiny_codec, every=2, count=2)])
    times = [f"pair_{pair}_epoch_{epoch:04d}" for pair in (0, 1) for epoch in (2, 4)]
    times = sorted([*times, "pair_0_last", "pair_1_last"])
    sources = [f"pair_{pair}_{name}" for pair in (0, 1) for name in ("input", "target")]
    assert files(run.path / "audio") == sorted(f"{name}.wav" for name in times + sources)
    assert files(run.path / "figures") == [f"{name}.png" for name in times]
    for name in times:
        assert imread(run.path / "figures" / f"{name}.png").std() > 0.05  # something is drawn
    assert plt.get_fignums() == []


def test_the_last_clips_are_of_a_training_that_came_to_its_end(start, tiny_codec, tmp_path):
    """By its length or for lack of patience; not of one that failed."""
    with pytest.raises(Stop):
        start([DemoClips(tiny_codec, every=100, count=1), Kill(5)], folder="failed")
    assert not (tmp_path / "failed" / "audio").exists()
    endings = {"steps": {"max_steps": 2}, "patience": {"patience": 1, "learning_rate": 1.0, "checkpoint_every": 1}}
    for folder, changes in endings.items():
        run = start([DemoClips(tiny_codec, every=100, count=1), keep := Keep()], folder=folder, **changes)
        assert files(run.path / "figures") == ["pair_0_last.png"]
        assert keep.trainer.out_of_patience == (folder == "patience")


def test_sources_are_the_same_validation_pairs_at_the_codecs_level(start, tiny_codec, tiny_index):
    run = start([DemoClips(tiny_codec, every=4, count=2)])
    pairs = LatentPairs(tiny_index, "val")
    for number, place in enumerate((0, 4)):  # spread evenly over nine
        for name, latents in zip(("input", "target"), pairs[place], strict=True):
            path = run.path / "audio" / f"pair_{number}_{name}.wav"
            assert probe_audio(path).sample_rate == tiny_codec.sample_rate
            assert torch.equal(load_audio(path), tiny_codec.decode(latents[None])[0])


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_outputs_are_those_of_the_model_that_is_kept(start, tiny_codec, tiny_index, ema):
    """In eval mode; with an average, the averaged weights and not those in training."""
    run = start([DemoClips(tiny_codec, every=4, count=1), keep := Keep()], ema=ema)
    input, target = (clip[None] for clip in LatentPairs(tiny_index, "val")[0])
    found = load_audio(run.path / "audio" / "pair_0_epoch_0004.wav")
    with torch.no_grad():
        kept = run.load_model("last")(input, target).latents
        torch.testing.assert_close(found, tiny_codec.decode(kept)[0], rtol=1e-4, atol=1e-6)
        in_training = keep.trainer.learner.plain_model.eval()(input, target).latents
    difference = (tiny_codec.decode(in_training)[0] - found).abs().max()
    assert (difference > 1e-4) == (ema > 0)
    assert found.square().mean().sqrt() > 0.01


class Compare(Callback):
    """Whether another callback leaves everything as it was."""

    def __init__(self, other: Callback):
        self.other, self.times = other, 0

    def __getattribute__(self, name: str):
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def call(trainer: Trainer, *arguments) -> None:
            before = state(trainer)
            getattr(self.other, name)(trainer, *arguments)
            after = state(trainer)
            assert len(before) == len(after)
            assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True)), name
            self.times += 1

        return call


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_callbacks_do_not_disturb_training(start, tiny_codec, monkeypatch, ema):
    """Neither while they are called, nor in what comes of it, bit for bit."""
    monkeypatch.setattr(lib.callbacks, "can_show_widgets", lambda: True)
    monkeypatch.setattr(lib.callbacks, "display", lambda display_id: Shown())
    watchers = [Compare(c) for c in (DemoClips(tiny_codec, every=1, count=1), TensorBoard(), Dashboard(seconds=0))]
    alone, watched = (start(w, folder, ema=ema, epochs=2) for w, folder in (((), "alone"), (watchers, "watched")))
    assert all(watcher.times == 1 + 6 + 2 + 2 + 1 for watcher in watchers)
    assert watched.metrics() == alone.metrics()
    for which in ("last", "best"):
        models = [run.load_model(which).state_dict() for run in (alone, watched)]
        assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def curves(run: Run) -> dict[str, list[tuple[int, float]]]:
    accumulator = EventAccumulator(str(run.path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def wanted_curves(run: Run) -> dict[str, list[tuple[int, float]]]:
    wanted: dict[str, list[tuple[int, float]]] = {}
    for row in run.metrics():
        for name in set(row) - {"split", "step", "epoch"}:
            wanted.setdefault(f"{row['split']}/{name}", []).append((row["step"], pytest.approx(row[name], rel=1e-6)))
    return wanted


def test_event_files_hold_every_number(start):
    run = start([TensorBoard()])
    found = curves(run)
    assert found == wanted_curves(run)
    assert [step for step, _ in found["train/loss"]] == list(range(1, 13))
    assert [step for step, _ in found["val/loss"]] == [4, 8, 12]
    assert {"train/grad_norm", "train/stage1/output_rms", "val/loss/input_mse"} <= set(found)


def test_a_resumed_run_takes_the_place_of_the_steps_that_were_lost(start):
    """Killed at step 6, it goes on from the checkpoint of step 4: steps 5 and 6 come once, as taken the second time."""
    with pytest.raises(Stop):
        start([TensorBoard(), Kill(6)])
    run = start([TensorBoard()], resume=True)
    assert [step for step, _ in curves(run)["train/loss"]] == list(range(1, 13))
    assert curves(run) == wanted_curves(run)
    assert len(files(run.path / "tensorboard")) == 2


# --- curves in a notebook ---------------------------------------------------------------------------------------------


class Shown:
    """A display in a front end: keeps how many lines each picture had."""

    def __init__(self):
        self.pictures: list[list[int]] = []

    def update(self, figure: Figure) -> None:
        assert isinstance(figure, Figure)
        self.pictures.append([len(line.get_xdata()) for line in figure.axes[0].lines])


@pytest.fixture
def front_end(monkeypatch) -> list[Shown]:
    """The displays that are opened in a browser that is watching."""
    displays: list[Shown] = []

    def show(*, display_id: bool) -> Shown:
        assert display_id is True
        displays.append(Shown())
        return displays[-1]

    monkeypatch.setattr(lib.callbacks, "can_show_widgets", lambda: True)
    monkeypatch.setattr(lib.callbacks, "display", show)
    return displays


def test_headless_nothing_is_drawn(start, monkeypatch):
    def unwanted(*_, **__):
        raise AssertionError("drawn")

    monkeypatch.setattr(lib.callbacks, "display", unwanted)
    monkeypatch.setattr(lib.callbacks.plots, "training_dashboard", unwanted)
    start([Dashboard(seconds=0)])


def test_the_figure_has_the_curves_of_metrics_jsonl(start):
    run = start([dashboard := Dashboard(), keep := Keep()])
    figure = dashboard.figure(keep.trainer)
    assert [len(axes.lines) for axes in figure.axes] == [2, 1, 2, 2]  # losses, gradient norm, two stages twice
    train, val = run.metrics("train"), run.metrics("val")
    keys = (
        [(train, "loss"), (val, "loss")],
        [(train, "grad_norm")],
        [(train, f"stage{i}/output_rms") for i in range(2)],
        [(train, f"stage{i}/wanted_factor") for i in range(2)],
    )
    for axes, wanted in zip(figure.axes, keys, strict=True):
        for line, (rows, key) in zip(axes.lines, wanted, strict=True):
            assert line.get_xydata().tolist() == [[row["step"], row[key]] for row in rows]
    assert figure.get_suptitle().startswith("step 12 of 12, epoch 4, about 0.0 min left")
    plt.close(figure)


def test_a_front_end_sees_the_curves_grow(start, front_end):
    """Every picture has all steps and validations so far; the last one, after training, all there are."""
    start([Dashboard(seconds=0)])
    (shown,) = front_end
    validations = {4: 1, 8: 2, 12: 3}
    wanted, seen = [], 0
    for step in range(1, 13):
        wanted.append([step, seen])
        if step in validations:
            seen = validations[step]
            wanted.append([step, seen])
    assert shown.pictures == [*wanted, [12, 3]]
    assert plt.get_fignums() == []


def test_pictures_keep_their_distance(start, front_end):
    start([Dashboard(seconds=1000)])
    assert front_end[0].pictures == [[1, 0], [12, 3]]  # the first step and the end


def test_the_time_between_pictures_counts(start, front_end, monkeypatch):
    """With a clock that moves by one second at each look, and two looks a step without a picture."""
    clock = itertools.count(5)
    monkeypatch.setattr(lib.callbacks.time, "monotonic", lambda: float(next(clock)))
    start([Dashboard(seconds=4)])
    first, *rest = [steps for steps, _ in front_end[0].pictures]
    assert first == 1
    assert len(rest) in (3, 4, 5)
    assert rest[-1] == 12


def test_a_failed_training_leaves_its_last_curves(start, front_end):
    with pytest.raises(Stop):
        start([Dashboard(seconds=1000), Kill(6)])
    assert front_end[0].pictures[-1] == [6, 1]


def test_a_resumed_run_shows_what_came_before(start, front_end):
    with pytest.raises(Stop):
        start([Dashboard(seconds=1000), Kill(6)])
    start([Dashboard(seconds=1000)], resume=True)
    assert front_end[1].pictures == [[5, 1], [12, 3]]  # the steps up to the checkpoint of step 4, and those since
