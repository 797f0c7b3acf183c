"""Training: what it computes and records, that a kill at any moment changes nothing, and how it stops when it must."""

import dataclasses
import datetime
import hashlib
import itertools
import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import TinyDiscriminator
from torch import nn

import lib.training.fusion_learner
import lib.training.learner
import lib.training.run
import lib.training.trainer
from lib.data.latents import LatentPairs
from lib.model.cascade import Cascade, CascadeConfig
from lib.model.fusion import FusionModel, load_model
from lib.model.masks import GENERATORS, MASKINGS, MaskingConfig
from lib.model.projection import spectral_sigma
from lib.training import losses
from lib.training.batches import Batch, epoch_order
from lib.training.config import AdversaryConfig, CurriculumConfig, LoopConfig, TrainConfig
from lib.training.fusion_learner import fusion_trainer, train
from lib.training.learner import Learner, StepInfo
from lib.training.losses import LossConfig
from lib.training.nonfinite import NonFiniteError
from lib.training.run import LOCK, Run
from lib.training.trainer import Callback, Trainer, join_processes, rng_state, seed_process, set_rng_state
from lib.util.errors import UserError, exit_on_user_error
from lib.util.tensors import safe_torch_load

ROOT = Path(__file__).resolve().parents[2]
# Three steps per epoch, so that checkpoints fall within epochs; at this rate and seed the last one is not the best.
CONFIG = TrainConfig(max_steps=8, batch_size=2, checkpoint_every=2, learning_rate=0.1, seed=2)
# Everything at once: three epochs of three steps, the last of each smaller.
EVERYTHING = {
    "epochs": 3,
    "max_steps": None,
    "seed": 3,  # with which the last checkpoint is not the best, either
    "patience": 99,
    "batch_size": 1,
    "accumulate": 2,
    "agent_learning_rate": 1e-2,
    "warmup_steps": 3,
    "schedule": "cosine",
    "ema": 0.6,
    "loss": LossConfig(
        novelty_weight=0.5, adversarial_weight=0.5, anti_modulation_weight=0.5, overlap_weight=1.0, window_seconds=0.1
    ),
    "curriculum": CurriculumConfig(noise_rate=0.1, target_shuffling=0.4),
    "adversary": AdversaryConfig(discriminator_learning_rate=1e-2, discriminator_warmup=2),
}
LEARNED = MaskingConfig("learned")


def steps_of(trainer: Trainer) -> Iterator[list[Batch]]:
    """The batches of every step that is left."""
    return trainer.read("train", trainer.order.steps())


@pytest.fixture
def start(tmp_path, tiny_index, tiny_codec, tiny_cascade) -> Callable[..., Run]:
    """`start(folder, cascade=, masking=, resume=, callbacks=, **TrainConfig fields)` trains; dropout and noise make
    every step random."""

    def run(
        folder: str = "run",
        cascade: CascadeConfig | None = None,
        masking: MaskingConfig | None = None,
        resume: bool = False,
        callbacks: tuple[Callback, ...] = (),
        **changes,
    ) -> Run:
        cascade = cascade or tiny_cascade(anti_cheating=0.1)
        config = dataclasses.replace(CONFIG, **changes)
        out = tmp_path / folder
        return train(out, tiny_index, tiny_codec, cascade, config, masking, resume=resume, callbacks=callbacks)

    return run


@pytest.fixture
def new_trainer(tmp_path, tiny_index, tiny_codec, tiny_cascade) -> Callable[..., Trainer]:
    """A trainer before its first step, to be looked into."""

    def build(
        cascade: CascadeConfig | None = None,
        masking: MaskingConfig | None = None,
        callbacks: tuple[Callback, ...] = (),
        **changes,
    ) -> Trainer:
        config = dataclasses.replace(CONFIG, **changes)
        cascade = cascade or tiny_cascade()
        values = {"cascade": dataclasses.asdict(cascade), "masking": dataclasses.asdict(masking or MaskingConfig())}
        values |= {"train": dataclasses.asdict(config)}
        values |= {"codec": {"name": tiny_codec.name, "fingerprint": tiny_codec.fingerprint}}
        pairs = {split: LatentPairs(tiny_index, split) for split in ("train", "val")}
        return fusion_trainer(Run.create(tmp_path / "run", values), pairs, tiny_codec, callbacks)

    return build


@pytest.fixture
def tiny_discriminator(monkeypatch) -> None:
    monkeypatch.setattr(lib.training.fusion_learner, "Discriminator", TinyDiscriminator)


class Recorder(Callback):
    """Every call, in order; `look(trainer)` is noted after every step."""

    def __init__(self, look: Callable[[Trainer], Any] = lambda trainer: None):
        self.calls: list[tuple] = []
        self.look, self.seen = look, []

    def on_start(self, trainer):
        self.calls.append(("start", trainer.step))

    def on_step(self, trainer, row):
        self.calls.append(("step", row["step"]))
        self.seen.append(self.look(trainer))

    def on_epoch(self, trainer, epoch):
        self.calls.append(("epoch", epoch))

    def on_validation(self, trainer, row):
        last = os.readlink(trainer.run.path / "last")[-1:] if trainer.run.has_checkpoint() else None
        self.calls.append(("validation", row["step"], last))

    def on_end(self, trainer):
        self.calls.append(("end", trainer.step))


# --- what a run computes and records ----------------------------------------------------------------------------------


def take(trainer: Trainer, batches) -> dict:
    """One step and its row."""
    trainer.train_step(batches, [])
    (row,), _ = trainer.gather()
    return row


def test_the_loss_goes_down(start, tiny_cascade):
    steps = {"max_steps": 60, "checkpoint_every": 60}
    run = start(cascade=tiny_cascade(dropout=0.0), loss=LossConfig(1.0, 0.0), **steps)  # learn to give the input back
    losses = [row["loss"] for row in run.metrics("train")]
    assert sum(losses[-6:]) < 0.7 * sum(losses[:6])
    assert len(losses) == 60


def test_every_row_has_every_metric(start):
    run = start()
    stage = (
        "projection_rms",
        "residual_rms",
        "alignment",
        "rms_before_scaling",
        "output_rms",
        "target_scale",
        "applied_scale",
        "clamped",
    )
    shared = {"split", "step", "loss", "loss/input_mse", "loss/target_mse"}
    shared |= {f"stage{i}/{name}" for i in range(2) for name in stage}
    parts = ("input_norm", "layers", "post_norm", "output_projection")
    trained = shared | {"grad_norm", "epoch", "sign/gradient_share"}
    trained |= {f"grad_norm/stage{i}/{part}" for i in range(2) for part in parts}
    rows = run.metrics()
    assert [row["step"] for row in rows if row["split"] == "train"] == list(range(1, 9))
    assert [row["epoch"] for row in rows if row["split"] == "train"] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert [row["step"] for row in rows if row["split"] == "val"] == [2, 4, 6, 8]
    for row in rows:
        assert set(row) == (trained if row["split"] == "train" else shared)
        assert all(isinstance(value, int | float | str) and value == value for value in row.values())
        assert row["loss"] == pytest.approx(0.3 * row["loss/input_mse"] + 0.3 * row["loss/target_mse"], rel=1e-5)


def test_gradient_norm_is_measured_before_clipping_and_clipping_takes_place(new_trainer, tiny_cascade):
    trainer = new_trainer(tiny_cascade(dropout=0.0), clip=1e-3)
    ((input, target),) = batches = next(steps_of(trainer))
    manual = FusionModel(tiny_cascade(dropout=0.0))
    manual.load_state_dict(trainer.learner.unwrapped_model.state_dict())
    output, traces, *_ = manual(input, target)
    (0.3 * (output - input).pow(2).mean() + 0.3 * (output - target).pow(2).mean()).backward()
    norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in manual.parameters()))
    row = take(trainer, batches)
    assert norm > 1e-2  # far above the clip, so that before and after differ
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)
    clipped = math.sqrt(sum(p.grad.double().square().sum().item() for p in trainer.learner.model.parameters()))
    assert clipped == pytest.approx(1e-3, rel=1e-3)
    assert row["stage1/output_rms"] == pytest.approx(traces[1].output_rms.mean().item(), rel=1e-5)
    assert row["stage0/target_scale"] == pytest.approx(traces[0].target_scale.mean().item(), rel=1e-5)


def test_one_step_is_adamw(new_trainer, tiny_cascade):
    trainer = new_trainer(tiny_cascade(dropout=0.0), weight_decay=0.5, clip=None)
    before = [p.detach().clone() for p in trainer.learner.model.parameters()]
    trainer.train_step(next(steps_of(trainer)), [])
    for old, new in zip(before, trainer.learner.model.parameters(), strict=True):
        step = new.grad / (new.grad.abs() + 1e-8)  # Adam's first step: m̂ / (√v̂ + ε)
        torch.testing.assert_close(new.detach(), old * (1 - 0.1 * 0.5) - 0.1 * step, rtol=1e-4, atol=1e-6)


def test_an_epoch_takes_every_pair_once_in_an_order_of_its_own(new_trainer):
    trainer = new_trainer()
    orders = []
    for trainer.order.epoch in (0, 1, 0):
        batches = list(itertools.islice(steps_of(trainer), 3))
        assert [len(input) for ((input, _),) in batches] == [2, 2, 1]
        orders.append(torch.cat([input for ((input, _),) in batches]))
    everything = torch.stack([trainer.pairs["train"][i][0] for i in range(5)])
    for order in orders:
        assert sorted(order.sum(dim=(1, 2)).tolist()) == sorted(everything.sum(dim=(1, 2)).tolist())
    assert torch.equal(orders[0], orders[2])
    assert not torch.equal(orders[0], orders[1])
    trainer.order.position = 2  # within an epoch: the rest of it
    assert torch.equal(torch.cat([input for ((input, _),) in itertools.islice(steps_of(trainer), 2)]), orders[0][2:])


def test_validation_is_the_mean_over_pairs_in_eval_mode(start, tiny_index):
    run = start(max_steps=2)  # nine pairs: a batch of eight and one of one
    model = load_model(run, "last")
    pairs = LatentPairs(tiny_index, "val")
    losses, factors = [], []
    with torch.no_grad():
        for input, target in (pairs[i] for i in range(len(pairs))):
            output, traces, *_ = model(input[None], target[None])
            losses.append(0.3 * (output - input).square().mean() + 0.3 * (output - target).square().mean())
            factors.append(traces[1].target_scale)
    (row,) = run.metrics("val")
    assert row["loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    assert row["stage1/target_scale"] == pytest.approx(torch.stack(factors).mean().item(), rel=1e-5)
    unweighted = (torch.stack(losses[:8]).mean() + losses[8]) / 2
    assert abs(unweighted.item() / row["loss"] - 1) > 1e-4  # the tolerance tells a mean of batch means


def test_best_is_the_lowest_validation_loss(start, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 1.5])
    validate = Trainer.validate
    monkeypatch.setattr(Trainer, "validate", lambda trainer: validate(trainer) | {"loss": next(losses)})
    run = start()
    assert os.readlink(run.path / "best").endswith("step_00000004")
    assert os.readlink(run.path / "last").endswith("step_00000008")
    assert sorted(os.listdir(run.path / "checkpoints")) == ["step_00000004", "step_00000008"]


def test_warns_once_a_stage_when_a_target_scale_passes_1_3(start, tiny_cascade, caplog, monkeypatch):
    weak = tiny_cascade(2, residual_weight=2.0).with_stage(1, residual_weight=0.1)  # the source documents' broken stage
    log = Run.log

    def stop_at_5(run, row):
        if row["step"] == 5:
            raise RuntimeError("as if killed")
        log(run, row)

    with caplog.at_level(logging.WARNING), monkeypatch.context() as patch:
        patch.setattr(Run, "log", stop_at_5)
        with pytest.raises(RuntimeError, match="as if killed"):
            start(cascade=weak)
    records = [record for record in caplog.records if record.name.startswith("lib.training")]
    collapse, warning = [record.getMessage() for record in records]
    assert collapse.startswith("stage 1: residual_weight=0.1 lets the RMS collapse")
    assert warning.startswith("step 1: stage 1 has a target scale of ")
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        run = start(cascade=weak, resume=True)
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("lib.training")]
    assert messages == [collapse]  # every start checks the config; of the step it remembers to have warned
    rows = run.metrics("train")
    assert all(row["stage1/target_scale"] > 1.3 for row in rows)
    assert all(row["stage0/target_scale"] < 1.3 for row in rows)
    assert all(row["stage1/clamped"] == 1.0 for row in rows)


def test_same_seed_same_run_and_another_seed_another(start):
    first, second, other = start("a"), start("b"), start("c", seed=1)
    assert first.metrics() == second.metrics()
    assert first.metrics() != other.metrics()


def test_bf16_trains_and_keeps_fp32_weights(start):
    run = start(precision="bf16")
    assert all(math.isfinite(row["loss"]) for row in run.metrics())
    assert all(p.dtype == torch.float32 for p in load_model(run).parameters())
    assert run.metrics("train")[0]["loss"] != start("fp32").metrics("train")[0]["loss"]  # it did autocast
    assert run.metrics("train")[0]["loss"] == pytest.approx(start("f").metrics("train")[0]["loss"], rel=0.02)


# --- killed and resumed -----------------------------------------------------------------------------------------------


def in_child(body: Callable[[], None], output: Path) -> int:
    """Run in a forked process; returns its wait status. stdout and stderr go to a file."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        try:
            handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
            try:
                body()
                code = 0
            except SystemExit as stop:
                code = stop.code
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stderr.flush()
            os._exit(code)
        finally:
            os._exit(99)
    return os.waitpid(pid, 0)[1]


def kill_myself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_step(step: int, half_a_line: bool = False) -> None:
    """After a step's optimizer, before (or within) its row of metrics."""
    log = Run.log

    def hook(run: Run, row: dict) -> None:
        if row["step"] == step:
            if half_a_line:
                with open(run.path / "metrics.jsonl", "a") as file:
                    file.write(json.dumps(row)[:40])
            kill_myself()
        log(run, row)

    Run.log = hook


def die_before(module, name: str, call: int) -> None:
    """Just before the n-th call of a function that changes the disk."""
    real, count = getattr(module, name), 0

    def hook(*args, **kwargs):
        nonlocal count
        count += 1
        if count == call:
            kill_myself()
        return real(*args, **kwargs)

    setattr(module, name, hook)


def die_while_writing(call: int) -> None:
    """Within the n-th weights file, half of it on disk."""
    write, count = Path.write_bytes, 0

    def hook(path, content):
        nonlocal count
        count += 1
        if count == call:
            write(path, content[: len(content) // 2])
            kill_myself()
        return write(path, content)

    Path.write_bytes = hook


KILLS = {
    "before anything is written": lambda: die_before(lib.training.run.Run, "create", 1),
    "after config.json": lambda: die_before(lib.training.run.Run, "forget_metrics_after", 1),
    "step 1": lambda: die_at_step(1),
    "step 2, half a row": lambda: die_at_step(2, half_a_line=True),
    "step 5, in the second epoch": lambda: die_at_step(5),
    "step 8, the last": lambda: die_at_step(8, half_a_line=True),
    "first checkpoint, within the weights": lambda: die_while_writing(1),
    "first checkpoint, before its name": lambda: die_before(os, "rename", 1),
    "first checkpoint, before best": lambda: die_before(Path, "symlink_to", 1),
    "first checkpoint, between best and last": lambda: die_before(Path, "symlink_to", 2),
    "second checkpoint, within the weights": lambda: die_while_writing(2),
    "second checkpoint, before the optimizer": lambda: die_before(torch, "save", 2),
    "second checkpoint, at an fsync": lambda: die_before(lib.training.run, "fsync", 8),
    "second checkpoint, before its name": lambda: die_before(os, "rename", 2),
    "second checkpoint, before best": lambda: die_before(Path, "symlink_to", 3),
    "second checkpoint, between best and last": lambda: die_before(Path, "symlink_to", 4),
    "second checkpoint, before the pruning": lambda: die_before(Path, "iterdir", 2),
    "third checkpoint, before its name": lambda: die_before(os, "rename", 3),
    "third checkpoint, before the pruning": lambda: die_before(Path, "iterdir", 3),
    "last checkpoint, before its name": lambda: die_before(os, "rename", 4),
    "last checkpoint, before the pruning": lambda: die_before(Path, "iterdir", 4),
}


def assert_equal(a: Any, b: Any) -> None:
    """Nested dicts and lists of tensors and numbers, to the last bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        a, b = list(a.values()), list(b.values())
    if isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def assert_same_run(resumed: Run, whole: Run) -> None:
    """Weights, optimizers, RNG, place in the data, best checkpoint and metrics, to the last bit."""
    assert (resumed.path / "metrics.jsonl").read_bytes() == (whole.path / "metrics.jsonl").read_bytes()
    for pointer in ("best", "last"):
        assert os.readlink(resumed.path / pointer) == os.readlink(whole.path / pointer)
        first, second = (run.path / pointer / "model.safetensors" for run in (resumed, whole))
        assert first.read_bytes() == second.read_bytes()
    assert_equal(*(safe_torch_load(run.path / "last" / "training.pt") for run in (resumed, whole)))
    assert set(os.listdir(resumed.path / "checkpoints")) >= set(os.listdir(whole.path / "checkpoints"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_index, tiny_codec, tiny_cascade) -> Run:
    """The uninterrupted run that every other is held against."""
    folder = tmp_path_factory.mktemp("whole")
    run = train(folder, tiny_index, tiny_codec, tiny_cascade(anti_cheating=0.1), CONFIG)
    assert os.readlink(run.path / "best") != os.readlink(run.path / "last")  # or a lost `best_loss` would go unseen
    return run


@pytest.mark.parametrize("kill", KILLS)
def test_sigkill_and_resume_give_the_uninterrupted_run(start, whole, tmp_path, kill):
    def child():
        KILLS[kill]()
        start()

    status = in_child(child, tmp_path / "output.txt")
    assert os.WIFSIGNALED(status), (tmp_path / "output.txt").read_text()
    assert os.WTERMSIG(status) == signal.SIGKILL
    torch.manual_seed(99)  # the state of the process that resumes plays no part
    assert_same_run(start(resume=True), whole)


def test_killed_again_and_again(start, whole, tmp_path):
    for kill in ("step 2, half a row", "second checkpoint, within the weights", "step 5, in the second epoch",
                 "step 5, in the second epoch", "step 8, the last"):  # fmt: skip

        def child(kill=kill):
            if kill == "second checkpoint, within the weights":
                die_while_writing(2)
            else:
                KILLS[kill]()
            start(resume=True)

        status = in_child(child, tmp_path / "output.txt")
        assert os.WIFSIGNALED(status), (tmp_path / "output.txt").read_text()
    assert_same_run(start(resume=True), whole)


def test_resuming_a_finished_run_changes_nothing(start, whole):
    run = start()
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.name != LOCK}
    assert_same_run(start(resume=True), whole)
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.name != LOCK} == before


def test_a_comparison_that_can_fail(start, whole):
    """The assertions above tell a run with another seed, and one that was resumed without its RNG."""
    with pytest.raises(AssertionError):
        assert_same_run(start(seed=1), whole)


def test_a_resume_without_the_rng_would_be_another_run(start, whole, tmp_path, monkeypatch):
    def child():
        die_at_step(5)
        start()

    in_child(child, tmp_path / "output.txt")
    monkeypatch.setattr(torch, "set_rng_state", lambda state: None)
    with pytest.raises(AssertionError):
        assert_same_run(start(resume=True), whole)


# --- metrics gathered every few steps ---------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [2, 3, 100])
def test_how_often_metrics_are_gathered_changes_no_row_and_no_weight(start, every):
    settings = {"batch_size": 1, "checkpoint_every": 8}
    recorder = Recorder(lambda trainer: trainer.step)
    run = start("gathered", gather_every=every, callbacks=(recorder,), **settings)
    assert_same_run(run, start("at once", **settings))
    assert [call[1] for call in recorder.calls if call[0] == "step"] == list(range(1, 9))
    # at the latest where an epoch of five steps ends, or a checkpoint is due
    assert recorder.seen == {2: [2, 2, 4, 4, 5, 7, 7, 8], 3: [3, 3, 3, 5, 5, 8, 8, 8], 100: [5] * 5 + [8] * 3}[every]


def test_a_bad_step_is_found_among_those_gathered_with_it(start, tmp_path, monkeypatch):
    """Steps 1 to 5 are gathered together, and the latents of the second are bad."""
    getitem, bad = LatentPairs.__getitem__, epoch_order(5, 0, CONFIG.seed)[1, 0].item()

    def poisoned(pairs, i):
        pair = getitem(pairs, i)
        if i == bad and len(pairs) == 5:
            pair[0][3, 4] = math.nan
        return pair

    monkeypatch.setattr(LatentPairs, "__getitem__", poisoned)
    recorder = Recorder(lambda trainer: trainer.step)
    with pytest.raises(NonFiniteError) as error:
        start(gather_every=100, checkpoint_every=8, batch_size=1, callbacks=(recorder,))
    assert (error.value.step, error.value.tensor) == (2, "input latents")
    run = Run.open(tmp_path / "run")
    assert [row["step"] for row in run.metrics("train")] == [1, 2]
    assert run.metrics()[-1]["event"] == "non_finite"
    assert recorder.seen == [5]  # the good step before it is shown, though the steps after it were tried
    assert not run.has_checkpoint()


def test_a_bad_step_is_repeated_with_its_own_random_numbers(start, monkeypatch):
    before, repeated, train_step = [], [], Trainer.train_step
    monkeypatch.setattr(
        Trainer, "train_step", lambda trainer, *step: before.append(rng_state()) or train_step(trainer, *step)
    )
    monkeypatch.setattr(lib.training.trainer, "set_rng_state", lambda state: repeated.append(state))
    poison_before(monkeypatch, 2, overflow_in_the_ffn)
    with pytest.raises(NonFiniteError, match="step 2"):
        start(gather_every=100, checkpoint_every=8, batch_size=1)
    assert len(before) == 5
    assert repeated
    assert all(torch.equal(state["rng"], before[1]["rng"]) for state in repeated)


@pytest.mark.parametrize("failure", [UserError("a damaged shard"), KeyboardInterrupt()])
def test_the_steps_before_a_failure_are_logged_and_resuming_writes_them_once(start, tmp_path, failure):
    train_step = Trainer.train_step

    def failing(trainer: Trainer, *batches):
        if trainer.step == 4:
            raise failure
        train_step(trainer, *batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", failing)
        with pytest.raises(type(failure)):
            start(gather_every=3, checkpoint_every=8)
    assert [row["step"] for row in Run.open(tmp_path / "run").metrics("train")] == [1, 2, 3, 4]
    run = start(resume=True, gather_every=3, checkpoint_every=8)
    assert [row["step"] for row in run.metrics("train")] == list(range(1, 9))


def test_a_signal_is_seen_at_once_however_seldom_metrics_are_gathered(start, tmp_path):
    earlier = Trainer.train_step
    try:
        signal_myself_in(3, signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt, match="step 3 is saved"):
            start(gather_every=100, checkpoint_every=8, batch_size=1)
    finally:
        Trainer.train_step = earlier
    assert os.readlink(tmp_path / "run" / "last").endswith("step_00000003")


def test_the_warning_names_the_step_it_came_from(start, tiny_cascade, caplog):
    quiet = tiny_cascade(2).with_stage(1, projection_gain=0.01, residual_weight=0.5)
    for every in (1, 100):
        start(str(every), gather_every=every, checkpoint_every=8, batch_size=1, cascade=quiet)
    steps = [record.message.split(":")[0] for record in caplog.records if "has a target scale of" in record.message]
    assert len(steps) >= 2
    assert steps[: len(steps) // 2] == steps[len(steps) // 2 :]


def test_how_data_are_read_and_metrics_gathered_may_change_on_resuming(start, whole):
    start(max_steps=4, gather_every=3, num_workers=2)
    assert_same_run(start(resume=True), whole)


def test_a_compiled_model_trains_and_its_faults_are_found(start, monkeypatch):
    """Traced as torch.compile traces, then run as it is: no C++ compiler is needed."""
    compile = FusionModel.compile
    monkeypatch.setattr(FusionModel, "compile", lambda model, **options: compile(model, backend="eager", **options))
    try:
        compiled = start("compiled", compile=True)
        plain = start("plain")
        for a, b in zip(compiled.metrics("val"), plain.metrics("val"), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        poison_before(monkeypatch, 3, poison_parameter)
        with pytest.raises(NonFiniteError) as error:
            start("broken", compile=True)
        assert (error.value.step, error.value.stage) == (3, 1)
        assert error.value.tensor == "parameter cascade.stages.1.layers.0.ffn_in.weight"
    finally:
        torch.compiler.reset()


# --- Ctrl-C and SIGTERM -----------------------------------------------------------------------------------------------


def signal_myself_in(step: int, number: int) -> None:
    train_step = Trainer.train_step

    def hook(trainer: Trainer, *batches):
        if trainer.step + 1 == step:
            os.kill(os.getpid(), number)
        return train_step(trainer, *batches)

    Trainer.train_step = hook


@pytest.fixture(scope="module")
def everything(tmp_path_factory, tiny_index, tiny_codec, tiny_cascade) -> Run:
    """The uninterrupted run with everything switched on."""
    config, folder = dataclasses.replace(CONFIG, **EVERYTHING), tmp_path_factory.mktemp("everything")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lib.training.fusion_learner, "Discriminator", TinyDiscriminator)
        run = train(folder, tiny_index, tiny_codec, tiny_cascade(anti_cheating=0.1), config, LEARNED)
    rows = run.metrics("train")
    assert len(rows) == 9
    terms = {"loss/adversarial", "loss/overlap", "loss/anti_modulation", "discriminator/fake", "noise_share"}
    assert terms <= {name for row in rows for name in row}
    assert os.readlink(run.path / "best") != os.readlink(run.path / "last")
    return run


@pytest.mark.parametrize("step", range(1, 10))
def test_with_everything_on_a_kill_after_any_step_changes_nothing(
    start, everything, tmp_path, tiny_discriminator, step
):
    def child():
        die_at_step(step)
        start(masking=LEARNED, **EVERYTHING)

    assert os.WIFSIGNALED(in_child(child, tmp_path / "output.txt")), (tmp_path / "output.txt").read_text()
    torch.manual_seed(99)
    assert_same_run(start(masking=LEARNED, resume=True, **EVERYTHING), everything)


@pytest.mark.parametrize("step", range(1, 9))
def test_with_everything_on_a_signal_in_any_step_changes_nothing(
    start, everything, tmp_path, monkeypatch, tiny_discriminator, step
):
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", Trainer.train_step)  # put back afterwards
        signal_myself_in(step, signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt, match=f"stopped by SIGTERM; step {step} is saved"):
            start(masking=LEARNED, **EVERYTHING)
    run = Run.open(tmp_path / "run")
    assert os.readlink(run.path / "last").endswith(f"step_{step:08d}")
    for stage in load_model(run, "last").cascade.stages:  # the EMA weights, with their own σ
        assert spectral_sigma(stage.output_projection) == pytest.approx(1, abs=1e-5)
    torch.manual_seed(99)
    assert_same_run(start(masking=LEARNED, resume=True, **EVERYTHING), everything)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [1, 5, 6])  # 6 is a checkpoint of its own
def test_signals_save_and_exit_cleanly(start, whole, tmp_path, number, step):
    def child():
        signal_myself_in(step, number)
        with exit_on_user_error():
            start()

    status = in_child(child, tmp_path / "output.txt")
    output = (tmp_path / "output.txt").read_text()
    assert os.WIFEXITED(status), output
    assert os.WEXITSTATUS(status) == 130, output
    assert "Traceback" not in output
    last = output.strip().splitlines()[-1]
    assert last == f"error: stopped by {number.name}; step {step} is saved in {tmp_path / 'run'}"
    run = Run.open(tmp_path / "run")
    assert os.readlink(run.path / "last").endswith(f"step_{step:08d}")
    for stage in load_model(run, "last").cascade.stages:  # saved with the σ of this step's weights
        assert spectral_sigma(stage.output_projection) == pytest.approx(1, abs=1e-5)
    assert_same_run(start(resume=True), whole)


def test_a_signal_in_the_last_step_lets_it_finish(start, whole, tmp_path):
    def child():
        signal_myself_in(8, signal.SIGTERM)
        start()

    assert in_child(child, tmp_path / "output.txt") == 0, (tmp_path / "output.txt").read_text()
    assert_same_run(Run.open(tmp_path / "run"), whole)


PROGRAM = """
import json, signal, sys, time
import torch
from conftest import TinyCodec
from lib.model.cascade import CascadeConfig
from lib.util.configs import from_fields
from lib.util.errors import exit_on_user_error
from lib.training.run import LOCK, Run
from lib.training.config import TrainConfig
from lib.training.fusion_learner import train

log = Run.log

def wait_after_step_4(run, row):
    log(run, row)
    if row["step"] == 4 and row["split"] == "train":
        handler = signal.getsignal(signal.SIGTERM)
        print("after step 4", flush=True)
        while signal.getsignal(signal.SIGTERM) == handler:  # the first signal takes the handler away
            time.sleep(0.01)

Run.log = wait_after_step_4
config, index, out = sys.argv[1:]
config = json.load(open(config))
with exit_on_user_error():
    cascade, settings = from_fields(CascadeConfig, config["cascade"]), from_fields(TrainConfig, config["train"])
    train(out, index, TinyCodec(), cascade, settings)
"""


def test_sigterm_to_a_program_of_its_own(start, tiny_index, tmp_path, whole):
    """A fresh interpreter, as a user starts it, and a signal from outside: the next step is the last."""
    command = [sys.executable, "-c", PROGRAM, whole.path / "config.json", tiny_index, tmp_path / "run"]
    paths = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=paths) as process:
        try:
            assert process.stdout.readline() == "after step 4\n", process.stderr.read()
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "error: stopped by SIGTERM; step 5 is saved in" in errors
    assert_same_run(start(resume=True), whole)


# --- the stop file ----------------------------------------------------------------------------------------------------


class Press(Callback):
    """Writes the stop file while a step is taken, as a dashboard in another process would."""

    def __init__(self, step: int):
        self.step = step

    def on_start(self, trainer: Trainer) -> None:
        train_step = trainer.train_step

        def pressed(*step):
            if trainer.step + 1 == self.step:
                trainer.run.stop_file.touch()
            train_step(*step)

        trainer.train_step = pressed


@pytest.mark.parametrize("every", [1, 100])
@pytest.mark.parametrize("step", [1, 5, 6])  # 6 is a checkpoint of its own
def test_the_stop_file_saves_and_stops_after_the_step(start, whole, tmp_path, step, every):
    with pytest.raises(KeyboardInterrupt) as stopped:
        start(callbacks=(Press(step),), gather_every=every)
    run = Run.open(tmp_path / "run")
    assert str(stopped.value) == f"stopped by the stop button; step {step} is saved in {run.path}"
    assert os.readlink(run.path / "last").endswith(f"step_{step:08d}")
    assert not run.stop_file.exists()
    assert_same_run(start(resume=True), whole)


def test_a_stop_file_in_the_last_step_lets_it_finish(start, whole):
    run = start(callbacks=(Press(8),))
    assert_same_run(run, whole)
    assert not run.stop_file.exists()


def test_a_stop_file_from_before_stops_no_new_training(start, whole, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stop").touch()
    run = start()
    assert_same_run(run, whole)
    assert not run.stop_file.exists()
    run = start(max_steps=4)
    run.stop_file.touch()
    assert_same_run(start(resume=True), whole)
    assert not run.stop_file.exists()


# --- non-finite values ------------------------------------------------------------------------------------------------


def poison_before(monkeypatch, step: int, poison: Callable[[Cascade], None]) -> None:
    """Call `poison(cascade)` once, just before a training step."""
    train_step = Trainer.train_step

    def hook(trainer: Trainer, *batches):
        if trainer.step + 1 == step:
            poison(trainer.learner.unwrapped_model.cascade)
        return train_step(trainer, *batches)

    monkeypatch.setattr(Trainer, "train_step", hook)


@torch.no_grad()
def poison_parameter(model: Cascade) -> None:
    model.stages[1].layers[0].ffn_in.weight[0, 0] = math.nan


@torch.no_grad()
def overflow_in_the_ffn(model: Cascade) -> None:
    model.stages[1].layers[0].ffn_in.weight.fill_(1e30)
    model.stages[1].layers[0].ffn_out.weight.fill_(1e30)


@torch.no_grad()
def overflow_in_the_residual(model: Cascade) -> None:
    model.stages[1].config = dataclasses.replace(model.stages[1].config, residual_weight=1e38)


@torch.no_grad()
def overflow_in_the_loss(model: Cascade) -> None:
    model.stages[1].rms_scaling.forward = lambda x, a, b: (x * 1e30, a, a, a)


def bad_gradient(factor: float) -> Callable[[Cascade], None]:
    """A finite forward whose backward is not: the gradient into one module's output is multiplied by the factor."""

    def poison(model: Cascade) -> None:
        def hook(module: nn.Module, inputs, output):
            if output.requires_grad:
                output.register_hook(lambda gradient: gradient * factor)

        model.stages[0].layers[0].ffn_out.register_forward_hook(hook)

    return poison


GRADIENT = r"gradient of cascade\.stages\.0\.layers\.0\.ffn_out\.(bias|weight)"


@pytest.mark.parametrize(
    ("poison", "stage", "tensor"),
    [
        (poison_parameter, 1, r"parameter cascade\.stages\.1\.layers\.0\.ffn_in\.weight"),
        (overflow_in_the_ffn, 1, r"output of cascade\.stages\.1\.layers\.0\.ffn_out"),
        (overflow_in_the_residual, 1, r"input of cascade\.stages\.1\.rms_scaling"),
        (overflow_in_the_loss, None, "loss"),
        (bad_gradient(math.nan), 0, GRADIENT),
        (bad_gradient(math.inf), 0, GRADIENT),
        (bad_gradient(1e30), None, "norm of the gradients"),  # each is finite, their squares are not
    ],
    ids=["parameter", "overflow", "residual", "loss", "gradient nan", "gradient inf", "gradient norm"],
)
@pytest.mark.parametrize("clip", [10.0, None])
def test_a_non_finite_value_is_named_and_leaves_the_last_good_checkpoint(
    start, whole, tmp_path, monkeypatch, poison, stage, tensor, clip
):
    poison_before(monkeypatch, 5, poison)
    with pytest.raises(NonFiniteError) as error:
        start(clip=clip)
    message = str(error.value)
    assert error.value.step == 5
    assert error.value.stage == stage
    assert re.fullmatch(tensor, error.value.tensor), error.value.tensor
    for part in ("step 5", "stage" if stage is None else f"stage {stage}", error.value.tensor, "last"):
        assert part in message
    run = Run.open(tmp_path / "run")
    assert run.metrics()[-1] == {"split": "train", "step": 5, "event": "non_finite"} | error.value.facts
    assert run.metrics("train")[-2]["step"] == 4  # the bad step was not taken
    assert os.readlink(run.path / "last").endswith("step_00000004")
    assert all(value.isfinite().all() for value in load_model(run, "last").state_dict().values())
    monkeypatch.undo()
    if clip == CONFIG.clip:  # without the fault it resumes there
        assert_same_run(start(resume=True), whole)


class EvalOnly(nn.Module):
    """A fault that training does not show."""

    def forward(self, x):
        return x if self.training else x * math.inf


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_a_fault_of_eval_mode_alone_is_named(start, monkeypatch, ema):
    validate = Trainer.validate

    def broken(trainer):
        stage = trainer.learner.eval_model.cascade.stages[1]
        stage.post_norm = nn.Sequential(stage.post_norm, EvalOnly())
        return validate(trainer)

    monkeypatch.setattr(Trainer, "validate", broken)
    with pytest.raises(NonFiniteError) as error:
        start(ema=ema)
    assert (error.value.step, error.value.stage) == (2, 1)
    assert error.value.tensor == "output of cascade.stages.1.post_norm.1"


def test_a_non_finite_discriminator_is_named(start, tmp_path, monkeypatch, tiny_discriminator):
    built = []

    def break_at_4(latent_dim):
        built.append(TinyDiscriminator(latent_dim))
        return built[0]

    def poison(cascade):
        with torch.no_grad():
            built[0].conv.weight[0, 0, 0] = math.nan

    monkeypatch.setattr(lib.training.fusion_learner, "Discriminator", break_at_4)
    poison_before(monkeypatch, 4, poison)
    with pytest.raises(NonFiniteError, match="first in the discriminator's loss or gradient") as error:
        start(adversary=AdversaryConfig(discriminator_learning_rate=1e-3))
    assert (error.value.step, error.value.stage) == (4, None)
    run = Run.open(tmp_path / "run")
    assert os.readlink(run.path / "last").endswith("step_00000002")
    assert run.metrics()[-1]["event"] == "non_finite"


@pytest.mark.parametrize("which", [0, 1])
def test_non_finite_latents_are_named(start, tmp_path, tiny_index, monkeypatch, which):
    getitem = LatentPairs.__getitem__

    def poisoned(pairs, i):
        pair = getitem(pairs, i)
        if i == 2 and len(pairs) == 5:
            pair[which][3, 4] = math.nan
        return pair

    monkeypatch.setattr(LatentPairs, "__getitem__", poisoned)
    with pytest.raises(NonFiniteError) as error:
        start(checkpoint_every=8)
    assert error.value.stage is None
    assert error.value.tensor == ("input latents", "target latents")[which]
    assert error.value.step <= 3  # the pair comes in the first epoch
    assert error.value.pairs == (" with ".join(LatentPairs(tiny_index, "train").clip_names(2)),)
    assert "no checkpoint had been written yet" in str(error.value)
    assert not Run.open(tmp_path / "run").has_checkpoint()


def test_a_non_finite_validation_writes_no_checkpoint(start, tmp_path, monkeypatch):
    """A step with finite gradients can still break the weights: the checkpoint after it must not be written."""
    validate = Trainer.validate

    def broken(trainer):
        if trainer.step == 6:
            poison_parameter(trainer.learner.unwrapped_model.cascade)
        return validate(trainer)

    monkeypatch.setattr(Trainer, "validate", broken)
    with pytest.raises(NonFiniteError) as error:
        start()
    assert (error.value.step, error.value.stage) == (6, 1)
    assert error.value.tensor == "parameter cascade.stages.1.layers.0.ffn_in.weight"
    run = Run.open(tmp_path / "run")
    assert os.readlink(run.path / "last").endswith("step_00000004")
    assert all(value.isfinite().all() for value in load_model(run, "last").state_dict().values())
    row = run.metrics()[-1]
    assert (row["split"], row["step"], row["event"], row["stage"]) == ("val", 6, "non_finite", 1)


# --- refused ----------------------------------------------------------------------------------------------------------


def test_resume_with_another_config_lists_the_fields(start, tiny_cascade, tiny_codec):
    start()
    with pytest.raises(UserError, match=r"another config \(train\.learning_rate: 0\.1 → 0\.02\)"):
        start(resume=True, learning_rate=0.02)
    with pytest.raises(UserError, match=r"cascade\.stages\[1\]\.dropout: 0\.1 → 0\.2"):
        start(resume=True, cascade=tiny_cascade(anti_cheating=0.1).with_stage(1, dropout=0.2))
    with pytest.raises(UserError, match=r"train\.loss\.input_weight: 0\.3 → 0\.5"):
        start(resume=True, loss=LossConfig(input_weight=0.5))
    start(resume=True)  # its own config is accepted


def test_a_run_keeps_its_own_loss_term_and_resumes_with_it_alone(start, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / "own_steady.py"
    module.write_text("def steady(output, input, target, masks):\n    return output.diff(dim=2).abs().mean()\n")
    loss = LossConfig(own={"steady": losses.OwnTerm("own_steady:steady", 0.25)})
    run = start(loss=loss, max_steps=2)
    source = hashlib.sha256(module.read_bytes()).hexdigest()
    term = {"function": "own_steady:steady", "weight": 0.25, "source": source}
    assert run.config["train"]["loss"]["own"] == {"steady": term}
    assert all(row["loss/steady"] > 0 for split in ("train", "val") for row in run.metrics(split))
    fix = "give train.loss.own as in its config.json, each function's module as it was; resume with its own config"
    with pytest.raises(UserError, match=rf"train\.loss\.own\.steady\.function: 'own_steady:steady' → None.*{fix}"):
        start(resume=True, max_steps=4)
    with pytest.raises(UserError, match=rf"train\.loss\.own\.steady\.weight: 0\.25 → 0\.5\).*{fix}"):
        start(resume=True, loss=LossConfig(own={"steady": losses.OwnTerm("own_steady:steady", 0.5)}), max_steps=4)
    written = module.read_text()
    module.write_text(written.replace("abs", "square"))
    with pytest.raises(UserError, match=rf"train\.loss\.own\.steady\.source: '{source}' → .*{fix}"):
        start(resume=True, loss=loss, max_steps=4)
    module.write_text(written)
    assert start(resume=True, loss=loss, max_steps=4).metrics("train")[-1]["step"] == 4
    module.unlink()
    monkeypatch.delitem(sys.modules, "own_steady")
    with pytest.raises(UserError, match="'own_steady:steady': cannot be imported"):
        start(resume=True, loss=loss, max_steps=6)


def test_resume_where_nothing_is_starts(start, whole):
    assert_same_run(start(resume=True), whole)


def test_without_resume_a_new_run_starts(start, whole):
    start(seed=1)
    assert_same_run(start(), whole)


def test_latents_of_another_codec_are_refused(tmp_path, tiny_index, tiny_codec, tiny_cascade):
    class Other(type(tiny_codec)):
        fingerprint = "0" * 64

    with pytest.raises(UserError, match="latents of codec tiny"):
        train(tmp_path / "run", tiny_index, Other(), tiny_cascade(), CONFIG)
    assert not (tmp_path / "run").exists()


def test_a_batch_larger_than_the_data_is_refused(start, tmp_path):
    with pytest.raises(UserError, match="batch_size=6 is more than the 5 training pairs"):
        start(batch_size=6)
    assert not (tmp_path / "run").exists()
    assert len(start(batch_size=5, max_steps=2).metrics("train")) == 2


def test_a_folder_that_cannot_be_written_is_refused(start, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: cannot be written"):
        start("file")


def test_several_readers_give_the_same_run(start):
    first = start(max_steps=2)
    assert start("readers", max_steps=2, num_workers=3).metrics() == first.metrics()


def test_torch_computes_with_as_many_threads_as_asked_for_while_training(start):
    class Threads(Callback):
        def on_step(self, trainer, row):
            seen.append(torch.get_num_threads())

        on_validation = on_step

    before, seen = torch.get_num_threads(), []
    start("asked", max_steps=2, cpu_threads=before + 2, callbacks=(Threads(),))
    start("not asked", max_steps=2, callbacks=(Threads(),))
    assert seen == 3 * [before + 2] + 3 * [before]
    assert torch.get_num_threads() == before


def test_a_finished_run_can_be_made_longer(start):
    longer = start("longer", max_steps=4)
    start("short", max_steps=2)
    extended = start("short", max_steps=4, resume=True)
    assert extended.metrics("train") == longer.metrics("train")
    assert len(extended.metrics("train")) == 4


# --- parts of the gradient, part of the validation --------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"rms_scaling": "learnable", "clamp": None}, {"width": 12}])
def test_the_parts_gradient_norms_add_up_to_the_whole(start, tiny_cascade, changes):
    """Every parameter belongs to one part, and the parts are measured before clipping."""
    run = start(cascade=tiny_cascade(3, **changes), clip=1e-3, max_steps=3)
    for row in run.metrics("train"):
        parts = [value for name, value in row.items() if name.startswith("grad_norm/")]
        assert len(parts) >= 12
        assert math.sqrt(sum(value**2 for value in parts)) == pytest.approx(row["grad_norm"], rel=1e-5)
        assert row["grad_norm"] > 1e-2


def test_a_parts_gradient_norm_is_that_of_its_parameters(new_trainer, tiny_cascade):
    trainer = new_trainer(tiny_cascade(rms_scaling="learnable", clamp=None), clip=None)
    row = take(trainer, next(steps_of(trainer)))
    for i, stage in enumerate(trainer.learner.unwrapped_model.cascade.stages):
        for name in ("input_norm", "layers", "post_norm", "output_projection", "rms_scaling"):
            squares = sum(p.grad.double().square().sum().item() for p in getattr(stage, name).parameters())
            assert row[f"grad_norm/stage{i}/{name}"] == pytest.approx(math.sqrt(squares), rel=1e-5)


def test_validation_of_some_pairs_is_the_mean_over_those(start, tiny_index):
    run = start(max_steps=2, max_val_pairs=4)
    model, pairs = load_model(run, "last"), LatentPairs(tiny_index, "val")
    losses = []
    with torch.no_grad():
        for input, target in (pairs[i] for i in range(9)):
            output = model(input[None], target[None]).latents
            losses.append((0.3 * (output - input).square().mean() + 0.3 * (output - target).square().mean()).item())
    (row,) = run.metrics("val")
    assert row["loss"] == pytest.approx(sum(losses[i] for i in (0, 2, 4, 6)) / 4, rel=1e-5)
    assert abs(sum(losses[:4]) / 4 / row["loss"] - 1) > 1e-3
    assert abs(sum(losses) / 9 / row["loss"] - 1) > 1e-3


def test_without_progress_nothing_is_written(tmp_path, tiny_index, tiny_codec, tiny_cascade, capfd):
    for progress in (False, True):
        train(tmp_path / str(progress), tiny_index, tiny_codec, tiny_cascade(), CONFIG, progress=progress)
        output, errors = capfd.readouterr()
        assert output == ""
        assert ("training" in errors) == progress
        assert bool(errors) == progress


def test_the_trainer_gives_the_loss_its_codecs_sound(start, tiny_codec, monkeypatch):
    """A term on sound trains; without its weight nothing is decoded."""
    calls, decode = [], type(tiny_codec).decode
    monkeypatch.setattr(type(tiny_codec), "decode", lambda codec, x: calls.append(x.shape) or decode(codec, x))
    start("plain", max_steps=2)
    assert not calls
    run = start("sound", max_steps=2, loss=LossConfig(anti_modulation_weight=0.5))
    assert calls[0] == (2, 8, 12)
    row = run.metrics("train")[0]
    sum_of_squares = 0.3 * row["loss/input_mse"] + 0.3 * row["loss/target_mse"]
    assert row["loss"] == pytest.approx(sum_of_squares + 0.5 * row["loss/anti_modulation"], rel=1e-5)


# --- accumulated batches, EMA, rates ----------------------------------------------------------------------------------


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in trainer.learner.unwrapped_model.named_parameters()}


def test_accumulated_batches_equal_one(new_trainer, tiny_cascade):
    """Of 2, 2 and 1 pairs: each counts by its size."""
    masks = MaskingConfig("learned")
    loss = LossConfig(novelty_weight=1.0, overlap_weight=1.0, anti_modulation_weight=1.0, window_seconds=None)
    together = new_trainer(tiny_cascade(dropout=0.0), masks, batch_size=5, loss=loss)
    expected = take(together, next(steps_of(together)))
    apart = new_trainer(tiny_cascade(dropout=0.0), masks, batch_size=2, accumulate=3, loss=loss)
    batches = next(steps_of(apart))
    assert [len(input) for input, _ in batches] == [2, 2, 1]
    row = take(apart, batches)
    assert row.pop("split") == expected.pop("split") == "train"
    assert row == pytest.approx(expected, rel=1e-5, abs=1e-6)
    for name, gradient in gradients(together).items():
        torch.testing.assert_close(gradients(apart)[name], gradient, rtol=1e-4, atol=1e-6)

    model, sums = FusionModel(tiny_cascade(dropout=0.0), masks), 0.0
    model.load_state_dict(new_trainer(tiny_cascade(dropout=0.0), masks).learner.unwrapped_model.state_dict())
    for input, target in batches:
        output = model(input, target).latents
        sums += (0.3 * (output - input).square().mean() + 0.3 * (output - target).square().mean()).item() / 3
    squares = 0.3 * expected["loss/input_mse"] + 0.3 * expected["loss/target_mse"]
    assert abs(sums / squares - 1) > 1e-4  # the mean of the batches' means is another number


def parameters(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.learner.unwrapped_model.named_parameters()}


def test_the_ema_weights_follow_their_formula_and_are_saved(start, new_trainer, tiny_index):
    average, recorder = parameters(new_trainer(ema=0.3)), Recorder(parameters)
    run = start("ema", ema=0.3, callbacks=(recorder,), max_steps=6)
    for step, values in enumerate(recorder.seen):
        decay = min(0.3, (1 + step) / (10 + step))
        average = {name: decay * average[name] + (1 - decay) * value for name, value in values.items()}
    kept = load_model(run, "last")
    for name, value in kept.named_parameters():
        torch.testing.assert_close(value.detach(), average[name], rtol=1e-5, atol=1e-6)
    difference = max((value - recorder.seen[-1][name]).abs().max().item() for name, value in kept.named_parameters())
    assert difference > 1e-3  # the last weights are others

    pairs = LatentPairs(tiny_index, "val")
    with torch.no_grad():
        outputs = [(kept(x[None], y[None]).latents, x, y) for x, y in (pairs[i] for i in range(len(pairs)))]
    loss = sum(((o - x).square().mean() + (o - y).square().mean()).item() * 0.3 for o, x, y in outputs) / len(pairs)
    assert run.metrics("val")[-1]["loss"] == pytest.approx(loss, rel=1e-5)
    plain = start("plain", max_steps=6).metrics("val")[-1]["loss"]
    assert abs(plain / loss - 1) > 1e-4
    assert [row["loss"] for row in run.metrics("train")] == [
        row["loss"] for row in Run.open(run.path.parent / "plain").metrics("train")
    ]  # the EMA changes nothing in training


def rates(trainer: Trainer) -> list[float]:
    return [group["lr"] for group in trainer.learner.optimizer.param_groups]


@pytest.mark.parametrize("length", [{"epochs": 3, "max_steps": None}, {"max_steps": 9}])
def test_the_rates_that_are_set(start, length, monkeypatch):
    settings = {"warmup_steps": 4, "schedule": "cosine", "agent_learning_rate": 2e-2, "masking": LEARNED} | length
    recorder = Recorder(rates)
    start("whole", callbacks=(recorder,), **settings)
    done = [0, 0.4, 0.8, 1, 1.4, 1.8, 2, 2.4, 2.8] if length["max_steps"] is None else range(9)  # 2, 2 and 1 of 5 pairs
    total = 3 if length["max_steps"] is None else 9
    factors = [min(1, (k + 1) / 4) * (1 + math.cos(math.pi * done[k] / total)) / 2 for k in range(9)]
    for (cascade, agent), factor in zip(recorder.seen, factors, strict=True):
        assert cascade == pytest.approx(0.1 * factor)
        assert agent == pytest.approx(2e-2 * factor)
    first, second = Recorder(rates), Recorder(rates)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", Trainer.train_step)
        signal_myself_in(5, signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            start("stopped", callbacks=(first,), **settings)
    start("stopped", callbacks=(second,), resume=True, **settings)
    assert first.seen + second.seen == recorder.seen
    assert len(first.seen) == 5


def test_the_agents_rate_is_its_own(new_trainer, tiny_cascade):
    """Adam's first step is as long as the rate, wherever there is a gradient."""
    trainer = new_trainer(masking=MaskingConfig("learned"), agent_learning_rate=1e-3, weight_decay=0.0)
    before = parameters(trainer)
    trainer.train_step(next(steps_of(trainer)), [])
    longest = {"cascade": 0.0, "mask_generator": 0.0}
    for name, value in parameters(trainer).items():
        part = name.split(".")[0]
        longest[part] = max(longest[part], (value - before[name]).abs().max().item())
    assert longest == pytest.approx({"cascade": 0.1, "mask_generator": 1e-3}, rel=1e-2)


# --- patience ---------------------------------------------------------------------------------------------------------


def test_patience_counts_validations_without_a_lower_loss(start, monkeypatch):
    losses = iter([3.0, 1.0, 1.0, 0.5, 2.0, 0.5, 9.0, 0.4])  # as low as before is no lower
    validate = Trainer.validate
    monkeypatch.setattr(Trainer, "validate", lambda trainer: validate(trainer) | {"loss": next(losses)})
    settings = {"checkpoint_every": 1, "max_steps": 20}
    run = start(patience=2, **settings)
    assert len(run.metrics("train")) == 6
    assert os.readlink(run.path / "best").endswith("step_00000004")
    assert os.readlink(run.path / "last").endswith("step_00000006")
    start(patience=2, resume=True, **settings)  # it is over
    assert len(run.metrics("train")) == 6
    with pytest.raises(StopIteration):  # more patience: it resumes, and remembers what was best
        start(patience=4, resume=True, **settings)
    assert os.readlink(run.path / "best").endswith("step_00000008")


# --- other code ---------------------------------------------------------------------------------------------------


def test_a_run_that_other_code_finished_is_trained_again(start, whole, tmp_path, edit_code):
    start()
    edit_code("lib.presets")  # plays no part
    start(resume=True)
    assert not (tmp_path / "run" / "replaced").exists()
    for module in ("lib.training.fusion_learner", "lib.training.losses", "lib.data.latents", "lib.codec.encodec"):
        edit_code(module)
        assert_same_run(start(resume=True), whole)  # the same, where it does the same
        assert (tmp_path / "run" / "replaced").exists(), module
        shutil.rmtree(tmp_path / "run" / "replaced")
        start(resume=True)
        assert not (tmp_path / "run" / "replaced").exists()


def test_a_run_that_ended_for_lack_of_patience_is_finished(start, tmp_path, monkeypatch, edit_code):
    validate = Trainer.validate
    monkeypatch.setattr(Trainer, "validate", lambda trainer: validate(trainer) | {"loss": 1.0})
    settings = {"patience": 1, "checkpoint_every": 1, "max_steps": 20}
    run = start(**settings)
    assert run.saved_step == run.total_steps < 20
    edit_code("lib.training.trainer")
    run = start(resume=True, **settings)
    assert (tmp_path / "run" / "replaced").exists()
    assert len(run.config["code"]) == 1


def test_a_run_that_other_code_began_is_resumed_but_not_reused(start, tmp_path, edit_code, caplog):
    with pytest.raises(KeyboardInterrupt):
        start(callbacks=(Press(5),))
    edit_code("lib.training.trainer")
    run = start(resume=True)
    assert "was started by other code; it resumes" in caplog.text
    assert len(run.config["code"]) == 2
    assert run.saved_step == run.total_steps
    start(resume=True)
    assert (tmp_path / "run" / "replaced").exists()


# --- noise and the discriminator --------------------------------------------------------------------------------------


def test_the_model_sees_noise_and_is_held_against_clean_latents(start, monkeypatch):
    seen, held = [], []
    forward, total_loss = FusionModel.forward, lib.training.fusion_learner.total_loss

    def watched_forward(model, input, target):
        seen.append((model.training, input.clone(), target.clone()))
        return forward(model, input, target)

    def watched_loss(output, input, target, *rest, **options):
        held.append((input.clone(), target.clone()))
        return total_loss(output, input, target, *rest, **options)

    monkeypatch.setattr(FusionModel, "forward", watched_forward)
    monkeypatch.setattr(lib.training.fusion_learner, "total_loss", watched_loss)
    curriculum = CurriculumConfig(noise_rate=0.25, noise_ceiling=0.4)
    run = start(curriculum=curriculum, batch_size=5, max_steps=3, checkpoint_every=3)  # a step is an epoch
    shares = [row["noise_share"] for row in run.metrics("train")]
    assert shares == pytest.approx([0, 0.25, 0.4])
    assert len(seen) == len(held) == 5  # three steps, and nine validation pairs in two batches
    for (training, *noisy), clean, share in zip(seen, held, [*shares, 0, 0], strict=True):
        assert training == (len(clean[0]) == 5)
        for x, y in zip(noisy, clean, strict=True):
            if share == 0:
                assert torch.equal(x, y)
                continue
            noise = (x - (1 - share**2) ** 0.5 * y) / share
            assert rms(noise) == pytest.approx(rms(y), rel=0.1)
            assert abs((noise * y).mean().item()) < 0.15 * rms(y) ** 2
        assert share == 0 or not torch.allclose(noisy[0] - clean[0], noisy[1] - clean[1], atol=0.1)


def rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


def test_the_discriminators_steps_are_its_own(start, monkeypatch, tiny_discriminator):
    """It learns from the first step on; the model's loss uses it later."""
    learned, train_step = [], lib.training.learner.Adversary.train_step

    def watched(adversary, batches, failed):
        before = [p.detach().clone() for p in adversary.model.parameters()]
        metrics = train_step(adversary, batches, failed)
        learned.append((before, [p.detach().clone() for p in adversary.model.parameters()]))
        return metrics

    monkeypatch.setattr(lib.training.learner.Adversary, "train_step", watched)
    adversary = AdversaryConfig(discriminator_learning_rate=1e-2, discriminator_warmup=3)
    loss = LossConfig(adversarial_weight=0.5)
    run = start(adversary=adversary, loss=loss, curriculum=CurriculumConfig(noise_rate=0.2), max_steps=6)
    rows = run.metrics("train")
    assert ["loss/adversarial" in row for row in rows] == [False] * 3 + [True] * 3
    assert all("discriminator/loss" in row for row in rows)
    assert all("loss/adversarial" not in row for row in run.metrics("val"))  # the losses of validation stay comparable
    for row in rows[3:]:
        squares = 0.3 * row["loss/input_mse"] + 0.3 * row["loss/target_mse"]
        assert row["loss"] == pytest.approx(squares + 0.5 * row["loss/adversarial"], rel=1e-5)
    assert len(learned) == 6
    for before, after in learned:
        assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    for (_, after), (following, _) in itertools.pairwise(learned):  # between its steps nothing else moves it
        assert all(torch.equal(a, b) for a, b in zip(after, following, strict=True))


def test_the_discriminators_real_samples_are_clean_latents_and_its_fake_ones_the_outputs(
    start, tiny_index, monkeypatch, tiny_discriminator
):
    batches, train_step = [], lib.training.learner.Adversary.train_step
    outputs, forward = [], FusionModel.forward

    def watched_forward(model, input, target):
        fusion = forward(model, input, target)
        if model.training:
            outputs.append(fusion.latents.detach().clone())
        return fusion

    monkeypatch.setattr(FusionModel, "forward", watched_forward)
    monkeypatch.setattr(
        lib.training.learner.Adversary,
        "train_step",
        lambda a, given, failed: batches.extend(given) or train_step(a, given),
    )
    pairs = LatentPairs(tiny_index, "train")
    clips = [{pairs[i][side].sum().item() for i in range(5)} for side in (0, 1)]
    adversary = AdversaryConfig(discriminator_learning_rate=1e-2)
    start(adversary=adversary, curriculum=CurriculumConfig(noise_rate=0.2), batch_size=1, accumulate=2, max_steps=6)
    assert len(batches) == 10  # two epochs
    for (fake, real), output in zip(batches, outputs, strict=True):
        assert torch.equal(fake, output)
        assert not fake.requires_grad
        input, target = real.chunk(2)
        assert fake.shape == input.shape == target.shape
        assert input.sum().item() in clips[0]
        assert target.sum().item() in clips[1]


def test_the_discriminator_is_no_part_of_the_models_optimizer(new_trainer, tiny_discriminator):
    adversary = AdversaryConfig(discriminator_learning_rate=1e-4)
    trainer = new_trainer(adversary=adversary, loss=LossConfig(adversarial_weight=1.0), masking=LEARNED)
    own = {id(p) for p in trainer.learner.unwrapped_model.parameters()}
    optimized = [p for group in trainer.learner.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in optimized} == own
    assert len(optimized) == len(own)
    trainer.learner.adversary.optimizer.zero_grad()
    learner = trainer.learner
    loss, terms, _ = learner.loss(learner.model.train(), next(steps_of(trainer))[0], StepInfo(0, 0))
    loss.backward()
    assert "adversarial" in "".join(terms)
    assert all(
        p.grad is None for p in trainer.learner.adversary.model.parameters()
    )  # its weights are frozen in the loss
    assert all(p.grad is not None for p in trainer.learner.unwrapped_model.parameters())


# --- callbacks --------------------------------------------------------------------------------------------------------


def test_callbacks_are_called_in_order(start):
    recorder = Recorder()
    start(callbacks=(recorder,), max_steps=6)
    assert recorder.calls == [
        ("start", 0),
        ("step", 1),
        ("step", 2), ("validation", 2, None),
        ("step", 3), ("epoch", 1),
        ("step", 4), ("validation", 4, "2"),
        ("step", 5),
        ("step", 6), ("epoch", 2), ("validation", 6, "4"),
        ("end", 6),
    ]  # fmt: skip
    recorder.calls.clear()
    start(callbacks=(recorder,), max_steps=7, resume=True)
    assert recorder.calls == [("start", 6), ("step", 7), ("validation", 7, "6"), ("end", 7)]
    recorder.calls.clear()
    start(callbacks=(recorder,), max_steps=7, resume=True)  # no step is left
    assert recorder.calls == [("end", 7)]


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt("stopped"), UserError("use another")])
def test_callbacks_learn_of_the_end_whatever_ends_it(start, monkeypatch, error):
    def fail(cascade):
        raise error

    poison_before(monkeypatch, 4, fail)
    first, second = Recorder(), Recorder()
    with pytest.raises(type(error), match=str(error)):
        start(callbacks=(first, second))
    assert first.calls[-1] == second.calls[-1] == ("end", 3)
    assert first.calls.count(("end", 3)) == 1


def test_a_callback_that_watches_changes_nothing(start, whole):
    assert_same_run(start(callbacks=(Recorder(parameters),)), whole)


# --- random numbers and processes --------------------------------------------------------------------------------


def test_random_numbers_resume_where_they_were():
    torch.manual_seed(3)
    torch.randn(7)
    state = rng_state()
    first = torch.randn(50), torch.rand(3), torch.randperm(20)
    torch.manual_seed(99)
    set_rng_state(state)
    second = torch.randn(50), torch.rand(3), torch.randperm(20)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    set_rng_state(state)  # the state has not moved with them
    assert torch.equal(torch.randn(50), first[0])


@pytest.mark.parametrize(("states", "gpus", "taken"), [(1, 0, True), (1, 2, False), (2, 0, False)])
def test_a_run_of_another_number_of_gpus_or_processes_gets_random_numbers_of_its_own(
    start, monkeypatch, states, gpus, taken
):
    """Not those with which it began, which would be the same in every process."""
    seeds, load = [], Run.load_training

    def loaded(run: Run, model: nn.Module) -> tuple[int, dict[str, Any]]:
        step, training = load(run, model)
        return step, training | {"random": states * training["random"]}

    start(max_steps=2)
    monkeypatch.setattr(Run, "load_training", loaded)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(lib.training.trainer, "seed_process", lambda *of: seeds.append(of))
    start(max_steps=4, resume=True)
    assert seeds == ([] if taken else [(CONFIG.seed, 2, 0)])


def test_seeds_differ_between_processes_and_steps():
    numbers = {}
    for seed in (0, 1):
        for rank in range(4):
            for step in (0, 1, 2, 100):
                seed_process(seed, step, rank)
                numbers[seed, rank, step] = tuple(torch.randn(3).tolist())
    assert len(set(numbers.values())) == len(numbers) == 32
    seed_process(1, 2, 3)
    assert tuple(torch.randn(3).tolist()) == numbers[1, 3, 2]


def test_processes_wait_for_one_that_encodes_for_hours(monkeypatch):
    """NCCL alone gives up after ten minutes."""
    asked = {}
    monkeypatch.setattr(lib.training.trainer, "PartialState", lambda **how: asked.update(how))
    join_processes()
    assert asked["timeout"] >= datetime.timedelta(hours=12)


def test_without_a_launcher_there_is_one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join_processes().num_processes == 1


# --- out of memory ----------------------------------------------------------------------------------------------------


def gpu_is_full(cascade: Cascade) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def machine_is_full(cascade: Cascade) -> None:
    torch.empty(1 << 50)


def library_is_full(cascade: Cascade) -> None:
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


def driver_is_full(cascade: Cascade) -> None:
    raise RuntimeError(
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other call"
    )


@pytest.mark.parametrize("full", [gpu_is_full, machine_is_full, library_is_full, driver_is_full])
@pytest.mark.parametrize("step", [1, 4])
def test_out_of_memory_says_what_to_lower(start, tmp_path, monkeypatch, full, step):
    poison_before(monkeypatch, step, full)
    with pytest.raises(UserError, match=f"out of memory at step {step}: ") as error:
        start(accumulate=2, batch_size=2)
    message = str(error.value)
    for part in ("batch_size (now 2)", "batch_size=1 with accumulate=4 trains alike", "bf16 (now fp32)"):
        assert part in message
    assert "clip_seconds (now 0.16)" in message
    assert ("last is kept" in message) == (step == 4)
    assert "\n" not in message


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), ValueError("can't allocate memory")])
def test_another_error_is_not_taken_for_it(start, monkeypatch, error):
    def fail(cascade):
        raise error

    poison_before(monkeypatch, 1, fail)
    with pytest.raises(type(error), match=str(error)) as caught:
        start()
    assert caught.value is error


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masking", [MaskingConfig(name) for name in MASKINGS], ids=lambda m: m.masking)
def test_every_masking_trains(start, masking):
    loss = LossConfig(overlap_weight=1.0 if masking.masking != "none" else 0.0)
    run = start(masking=masking, loss=loss, max_steps=2)
    rows = run.metrics()
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert all(("masks/complementarity" in row) == (masking.masking != "none") for row in rows)
    assert all(("grad_norm/mask_generator" in row) == (masking.masking in GENERATORS) for row in run.metrics("train"))
    assert load_model(run, "last").masking == masking


def test_a_term_on_masks_without_masks_is_refused(start, tmp_path):
    with pytest.raises(UserError, match="coverage_weight needs masks: set masking='learned', or the weight to 0"):
        start(loss=LossConfig(coverage_weight=0.1))
    assert not (tmp_path / "run").exists()


def test_resume_with_other_masks_is_refused(start):
    start(masking=MaskingConfig("learned"), max_steps=2)
    with pytest.raises(UserError, match=r"masking\.masking: 'learned' → 'wide'"):
        start(masking=MaskingConfig("wide"), max_steps=2, resume=True)


def test_a_step_larger_than_the_data_names_all_that_makes_it(start, tiny_index, tmp_path):
    with pytest.raises(UserError, match="batch_size=2 × accumulate=3 is more than the 5 training pairs; lower it"):
        start(accumulate=3)
    with pytest.raises(UserError, match="batch_size=2 is more than the 1 training pairs"):
        start(max_train_pairs=1)
    assert not (tmp_path / "run").exists()
    pairs = {split: len(LatentPairs(tiny_index, split)) for split in ("train", "val")}
    with pytest.raises(UserError, match="batch_size=2 × 3 processes is more than the 5 training pairs"):
        CONFIG.check_sizes(pairs, 3)
    CONFIG.check_sizes(pairs, 2)


def test_the_precision_is_the_configs_whatever_the_launcher_says(start, whole, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        assert_same_run(start(), whole)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


# --- what is trained can be another thing -----------------------------------------------------------------------------


class Points:
    """Eleven pairs of numbers, the second of which follow from the first."""

    clip_length, sample_rate = 100, 1000

    def __init__(self, bad: int | None = None):
        first = torch.randn(11, 5, generator=torch.Generator().manual_seed(0))
        self.first, self.second = first, first[:, :2].sin()
        if bad is not None:
            self.second[bad, 1] = math.nan

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.first[i], self.second[i]


class Regression(Learner):
    batch_names = ("point", "value")

    def __init__(self, config: LoopConfig, accelerator):
        model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 2))
        super().__init__(config, model, accelerator)
        self.adversary = lib.training.learner.Adversary(
            AdversaryConfig(1e-3), nn.Sequential(nn.Linear(2, 1), nn.Flatten(0)), config.max_norm, accelerator
        )

    def loss(self, model, batch, info=None):
        noise = 0.1 * torch.randn_like(batch[0]) if info else 0.0
        fake = model(batch[0] + noise)
        loss = (fake - batch[1]).square().mean()
        return loss, {"loss/mse": loss}, (fake, batch[1])

    def facts(self, info):
        return {"half_epochs": 2 * info.epoch}

    def warnings(self, row):
        return {"deep": f"the loss is {row['loss']:.3f}"} if row["step"] >= 3 else {}


REGRESSION = LoopConfig(epochs=4, batch_size=2, accumulate=2, checkpoint_every=2, learning_rate=0.02, ema=0.5)


def regress(folder: Path, data: Points | None = None, callbacks: tuple[Callback, ...] = ()) -> Run:
    """Start it, or resume it."""
    config = {"train": dataclasses.asdict(REGRESSION)}
    run = Run.start(folder, config, resume=True, code=["regression"])
    pairs = {"train": data or Points(), "val": Points()}
    Trainer(run, REGRESSION, pairs, lambda on: Regression(REGRESSION, on), callbacks).run_to_end(progress=False)
    return run


def test_a_learner_of_another_kind_trains(tmp_path, caplog):
    recorder = Recorder()
    run = regress(tmp_path, callbacks=(recorder,))
    rows = run.metrics("train")
    assert [(row["step"], row["half_epochs"]) for row in rows] == [(k + 1, 2 * (k // 3)) for k in range(12)]
    parts = {"grad_norm", "grad_norm/0", "grad_norm/3", "sign/gradient_share"}
    adversarial = {f"discriminator/{name}" for name in ("loss", "real", "fake", "grad_norm")}
    assert set(rows[0]) == {"split", "step", "epoch", "half_epochs", "loss", "loss/mse"} | parts | adversarial
    losses = [row["loss"] for row in run.metrics("val")]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    assert recorder.calls[-1] == ("end", 12)
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("lib.training")]
    assert messages == [f"step 3: the loss is {rows[2]['loss']:.3f}"]  # once
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 2))
    run.load_weights(model, "last")
    found = (model(Points().first) - Points().second).square().mean()
    assert found.item() == pytest.approx(losses[-1], rel=1e-5)


@pytest.mark.parametrize("step", [1, 4, 5, 12])
def test_a_learner_of_another_kind_is_killed_and_resumes(tmp_path, step):
    whole = regress(tmp_path / "whole")

    def child():
        die_at_step(step)
        regress(tmp_path / "run")

    assert os.WIFSIGNALED(in_child(child, tmp_path / "output.txt")), (tmp_path / "output.txt").read_text()
    torch.manual_seed(99)
    assert_same_run(regress(tmp_path / "run"), whole)


class OwnTerm(Regression):
    """With a term of a user's own, whose root has an infinite slope where the model is right."""

    def __init__(self, *args):
        super().__init__(*args)
        self.drawn = []

    def loss(self, model, batch, info=None):
        if info:
            self.drawn.append(torch.rand(()).item())
        loss, metrics, _ = super().loss(model, batch, info)
        error = (model(batch[0]) - batch[1]) * (batch[0][:, :1] != 0)
        return loss + error.square().mean(dim=1).sqrt().mean(), metrics, None


@pytest.mark.parametrize("clip", [1.0, None])
def test_a_term_of_ones_own_is_named_with_its_line_and_its_pair_and_replayed(tmp_path, clip):
    config = dataclasses.replace(REGRESSION, clip=clip, checkpoint_every=1)
    data = Points()
    order = epoch_order(11, 0, config.seed)[:, 0].tolist()
    data.first[order[6], 0] = 0  # in the second of the steps, its second batch
    data.clip_names = lambda i: (f"a.ogg at {i} s", f"b.ogg at {i} s")

    def died(resume: bool) -> NonFiniteError:
        run = Run.start(tmp_path, {"train": dataclasses.asdict(config)}, resume=resume, code=[])
        trainer = Trainer(run, config, {"train": data, "val": Points()}, lambda on: OwnTerm(config, on))
        with pytest.raises(NonFiniteError) as error:
            trainer.run_to_end(progress=False)
        *_, first, second, again, second_again = trainer.learner.drawn  # of the step's batches, and in the search
        assert (first, second) == (again, second_again)
        assert trainer.name_of_pair("train", 1, 3) == "a.ogg at 1 s with b.ogg at 3 s"
        return error.value

    error = died(resume=False)
    assert error.step == 2
    assert re.fullmatch(r"the gradient of sqrt gave inf \(test_trainer\.py:\d+ in loss\)", error.operation)
    assert error.pairs == (f"a.ogg at {order[6]} s with b.ogg at {order[6]} s",)
    assert ("clipping makes all of them NaN" in error.facts["spread"]) == (clip is not None)
    assert "last, and resuming replays this step" in str(error)
    again = died(resume=True)  # from the checkpoint before it, the same step with the same random numbers
    assert (again.step, again.facts) == (error.step, error.facts)


def test_a_death_in_validation_is_named_without_gradients(tmp_path):
    run = Run.start(tmp_path, {"train": dataclasses.asdict(REGRESSION)}, resume=False, code=[])
    pairs = {"train": Points(), "val": Points(3)}
    with pytest.raises(NonFiniteError) as error:
        Trainer(run, REGRESSION, pairs, lambda on: Regression(REGRESSION, on)).run_to_end(progress=False)
    assert (error.value.tensor, error.value.pairs) == ("value", ("pair 3 with pair 3",))
    assert error.value.facts["spread"] == ""


def test_in_a_learner_of_another_kind_the_bad_tensor_is_named(tmp_path):
    bad = epoch_order(11, 0, REGRESSION.seed)[6, 0].item()  # in the second of the steps, its second batch
    with pytest.raises(NonFiniteError) as error:
        regress(tmp_path, Points(bad))
    assert (error.value.step, error.value.stage, error.value.tensor) == (2, None, "value")
    assert error.value.pairs == (f"pair {bad} with pair {bad}",)
    assert Run.open(tmp_path).metrics()[-1]["event"] == "non_finite"
