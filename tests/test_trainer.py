"""Training: what it computes and records, that a kill at any moment changes nothing, and how it stops when it must."""

import dataclasses
import itertools
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import lib.runs
import lib.trainer
from lib.cascade import Cascade, CascadeConfig
from lib.errors import UserError, exit_on_user_error
from lib.latents import LatentPairs
from lib.losses import LossConfig
from lib.projection import spectral_sigma
from lib.runs import Run
from lib.trainer import NonFiniteError, TrainConfig, Trainer, catch_stop_signals, evenly_spread, train

ROOT = Path(__file__).parent.parent
# Three steps an epoch, so that checkpoints fall within epochs; at this rate and seed the last one is not the best.
CONFIG = TrainConfig(max_steps=8, batch_size=2, checkpoint_every=2, learning_rate=3e-2, seed=2)


@pytest.fixture
def start(tmp_path, tiny_index, tiny_codec, tiny_cascade) -> Callable[..., Run]:
    """`start(folder, cascade=, resume=, **TrainConfig fields)` trains; dropout and noise make every step random."""

    def run(folder: str = "run", cascade: CascadeConfig | None = None, resume: bool = False, **changes) -> Run:
        cascade = cascade or tiny_cascade(anti_cheating=0.1)
        config = dataclasses.replace(CONFIG, **changes)
        return train(tmp_path / folder, tiny_index, tiny_codec, cascade, config, resume=resume)

    return run


@pytest.fixture
def new_trainer(tmp_path, tiny_index, tiny_codec, tiny_cascade) -> Callable[..., Trainer]:
    """A trainer before its first step, to be looked into."""

    def build(cascade: CascadeConfig | None = None, **changes) -> Trainer:
        config = dataclasses.replace(CONFIG, **changes)
        cascade = cascade or tiny_cascade()
        codec = {"name": tiny_codec.name, "fingerprint": tiny_codec.fingerprint}
        values = {"cascade": cascade.to_dict(), "train": dataclasses.asdict(config), "codec": codec}
        return Trainer(Run.create(tmp_path / "run", values), *(LatentPairs(tiny_index, s) for s in ("train", "val")))

    return build


# --- what a run computes and records ----------------------------------------------------------------------------------


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
        "mixed_rms",
        "output_rms",
        "wanted_factor",
        "applied_factor",
        "clamped",
    )
    shared = {"split", "step", "loss", "loss/input_mse", "loss/target_mse"}
    shared |= {f"stage{i}/{name}" for i in range(2) for name in stage}
    parts = ("input_norm", "layers", "post_norm", "output_projection")
    trained = shared | {"grad_norm", "epoch"} | {f"grad_norm/stage{i}/{part}" for i in range(2) for part in parts}
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
    input, target = next(trainer.batches())
    manual = Cascade(tiny_cascade(dropout=0.0))
    manual.load_state_dict(trainer.model.state_dict())
    output, traces = manual(input, target)
    (0.3 * (output - input).pow(2).mean() + 0.3 * (output - target).pow(2).mean()).backward()
    norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in manual.parameters()))
    row = trainer.train_step(input, target)
    assert norm > 1e-2  # far above the clip, so that before and after differ
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)
    clipped = math.sqrt(sum(p.grad.double().square().sum().item() for p in trainer.model.parameters()))
    assert clipped == pytest.approx(1e-3, rel=1e-3)
    assert row["stage1/output_rms"] == pytest.approx(traces[1].output_rms.mean().item(), rel=1e-5)
    assert row["stage0/wanted_factor"] == pytest.approx(traces[0].wanted_factor.mean().item(), rel=1e-5)


def test_one_step_is_adamw(new_trainer, tiny_cascade):
    trainer = new_trainer(tiny_cascade(dropout=0.0), weight_decay=0.5, clip=None)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train_step(*next(trainer.batches()))
    for old, new in zip(before, trainer.model.parameters(), strict=True):
        step = new.grad / (new.grad.abs() + 1e-8)  # Adam's first step: m̂ / (√v̂ + ε)
        torch.testing.assert_close(new.detach(), old * (1 - 3e-2 * 0.5) - 3e-2 * step, rtol=1e-4, atol=1e-6)


def test_defaults_are_the_reference():
    config = TrainConfig()
    assert (config.learning_rate, config.weight_decay, config.clip) == (1e-4, 0.01, 10.0)
    assert (config.loss.input_weight, config.loss.target_weight) == (0.3, 0.3)
    assert (config.batch_size, config.epochs) == (8, 200)


def test_an_epoch_takes_every_pair_once_in_an_order_of_its_own(new_trainer):
    trainer = new_trainer()
    orders = []
    for trainer.step in (0, 3, 0):
        batches = list(itertools.islice(trainer.batches(), 3))
        assert [len(input) for input, _ in batches] == [2, 2, 1]
        orders.append(torch.cat([input for input, _ in batches]))
    everything = torch.stack([trainer.train_pairs[i][0] for i in range(5)])
    for order in orders:
        assert sorted(order.sum(dim=(1, 2)).tolist()) == sorted(everything.sum(dim=(1, 2)).tolist())
    assert torch.equal(orders[0], orders[2])
    assert not torch.equal(orders[0], orders[1])
    trainer.step = 1  # within an epoch: the rest of it
    assert torch.equal(torch.cat([input for input, _ in itertools.islice(trainer.batches(), 2)]), orders[0][2:])


def test_validation_is_the_mean_over_pairs_in_eval_mode(start, tiny_index):
    run = start(max_steps=2)  # nine pairs: a batch of eight and one of one
    model = run.load_model("last")
    pairs = LatentPairs(tiny_index, "val")
    losses, factors = [], []
    with torch.no_grad():
        for input, target in (pairs[i] for i in range(len(pairs))):
            output, traces = model(input[None], target[None])
            losses.append(0.3 * (output - input).square().mean() + 0.3 * (output - target).square().mean())
            factors.append(traces[1].wanted_factor)
    (row,) = run.metrics("val")
    assert row["loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    assert row["stage1/wanted_factor"] == pytest.approx(torch.stack(factors).mean().item(), rel=1e-5)
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


def test_warns_once_a_stage_when_a_factor_passes_1_3(start, tiny_cascade, caplog, monkeypatch):
    weak = tiny_cascade(2, residual_weight=2.0).with_stage(1, residual_weight=0.1)  # the seeds' broken stage
    log = Run.log

    def stop_at_5(run, row):
        if row["step"] == 5:
            raise RuntimeError("as if killed")
        log(run, row)

    with caplog.at_level(logging.WARNING), monkeypatch.context() as patch:
        patch.setattr(Run, "log", stop_at_5)
        with pytest.raises(RuntimeError, match="as if killed"):
            start(cascade=weak)
    warnings = [record.getMessage() for record in caplog.records if record.name == "lib.trainer"]
    assert len(warnings) == 1
    assert warnings[0].startswith("step 1: stage 1 wants the factor ")
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        run = start(cascade=weak, resume=True)
    assert not [record for record in caplog.records if record.name == "lib.trainer"]  # it remembers
    rows = run.metrics("train")
    assert all(row["stage1/wanted_factor"] > 1.3 for row in rows)
    assert all(row["stage0/wanted_factor"] < 1.3 for row in rows)
    assert all(row["stage1/clamped"] == 1.0 for row in rows)


def test_same_seed_same_run_and_another_seed_another(start):
    first, second, other = start("a"), start("b"), start("c", seed=1)
    assert first.metrics() == second.metrics()
    assert first.metrics() != other.metrics()


def test_bf16_trains_and_keeps_fp32_weights(start):
    run = start(precision="bf16")
    assert all(math.isfinite(row["loss"]) for row in run.metrics())
    assert all(p.dtype == torch.float32 for p in run.load_model().parameters())
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
    "before anything is written": lambda: die_before(lib.trainer.Run, "create", 1),
    "after config.json": lambda: die_before(lib.trainer.Run, "forget_metrics_after", 1),
    "step 1": lambda: die_at_step(1),
    "step 2, half a row": lambda: die_at_step(2, half_a_line=True),
    "step 5, in the second epoch": lambda: die_at_step(5),
    "step 8, the last": lambda: die_at_step(8, half_a_line=True),
    "first checkpoint, within the weights": lambda: die_while_writing(1),
    "first checkpoint, before its name": lambda: die_before(os, "rename", 1),
    "first checkpoint, before best": lambda: die_before(Run, "_point", 1),
    "first checkpoint, between best and last": lambda: die_before(Run, "_point", 2),
    "second checkpoint, within the weights": lambda: die_while_writing(2),
    "second checkpoint, before the optimizer": lambda: die_before(torch, "save", 2),
    "second checkpoint, at an fsync": lambda: die_before(lib.runs, "fsync", 8),
    "second checkpoint, before its name": lambda: die_before(os, "rename", 2),
    "second checkpoint, before best": lambda: die_before(Run, "_point", 3),
    "second checkpoint, between best and last": lambda: die_before(Run, "_point", 4),
    "second checkpoint, before the pruning": lambda: die_before(Run, "_prune", 2),
    "third checkpoint, before its name": lambda: die_before(os, "rename", 3),
    "third checkpoint, before the pruning": lambda: die_before(Run, "_prune", 3),
    "last checkpoint, before its name": lambda: die_before(os, "rename", 4),
    "last checkpoint, before the pruning": lambda: die_before(Run, "_prune", 4),
}


def assert_same_run(resumed: Run, whole: Run) -> None:
    """Weights, optimizer, RNG, best checkpoint and metrics, to the last bit."""
    assert (resumed.path / "metrics.jsonl").read_bytes() == (whole.path / "metrics.jsonl").read_bytes()
    for pointer in ("best", "last"):
        assert os.readlink(resumed.path / pointer) == os.readlink(whole.path / pointer)
        first, second = (run.path / pointer / "model.safetensors" for run in (resumed, whole))
        assert first.read_bytes() == second.read_bytes()
    states = []
    for run in (resumed, whole):
        _, training = run.load_training(Cascade(CascadeConfig.from_dict(run.config["cascade"])))
        moments = [value for state in training["optimizer"]["state"].values() for value in state.values()]
        states.append([*moments, training["rng"], torch.tensor(training["best_loss"])])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
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
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    assert_same_run(start(resume=True), whole)
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before


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


# --- Ctrl-C and SIGTERM -----------------------------------------------------------------------------------------------


def signal_myself_at(step: int, number: int) -> None:
    log = Run.log

    def hook(run: Run, row: dict) -> None:
        log(run, row)
        if row["step"] == step and row["split"] == "train":
            os.kill(os.getpid(), number)

    Run.log = hook


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [1, 5, 6])  # 6 is a checkpoint of its own
def test_signals_save_and_exit_cleanly(start, whole, tmp_path, number, step):
    def child():
        signal_myself_at(step, number)
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
    for stage in run.load_model("last").stages:  # saved with the σ of this step's weights
        assert spectral_sigma(stage.output_projection) == pytest.approx(1, abs=1e-5)
    assert_same_run(start(resume=True), whole)


def test_a_signal_in_the_last_step_lets_it_finish(start, whole, tmp_path):
    def child():
        signal_myself_at(8, signal.SIGTERM)
        start()

    assert in_child(child, tmp_path / "output.txt") == 0, (tmp_path / "output.txt").read_text()
    assert_same_run(Run.open(tmp_path / "run"), whole)


PROGRAM = """
import json, signal, sys, time
import torch
from conftest import TinyCodec
from lib.cascade import CascadeConfig
from lib.errors import exit_on_user_error
from lib.runs import Run
from lib.trainer import TrainConfig, train

log = Run.log

def wait_at_step_5(run, row):
    log(run, row)
    if row["step"] == 5:
        handler = signal.getsignal(signal.SIGTERM)
        print("at step 5", flush=True)
        while signal.getsignal(signal.SIGTERM) == handler:  # the first signal takes the handler away
            time.sleep(0.01)

Run.log = wait_at_step_5
config, index, out = sys.argv[1:]
config = json.load(open(config))
with exit_on_user_error():
    train(out, index, TinyCodec(), CascadeConfig.from_dict(config["cascade"]), TrainConfig(**config["train"]))
"""


def test_sigterm_to_a_program_of_its_own(start, tiny_index, tmp_path, whole):
    """A fresh interpreter, as a user starts it, and a signal from outside."""
    command = [sys.executable, "-c", PROGRAM, whole.path / "config.json", tiny_index, tmp_path / "run"]
    paths = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=paths) as process:
        try:
            assert process.stdout.readline() == "at step 5\n", process.stderr.read()
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "error: stopped by SIGTERM; step 5 is saved in" in errors
    assert_same_run(start(resume=True), whole)


def test_the_second_signal_acts_at_once():
    class Stopped:
        stop_signal = None

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    trainer = Stopped()
    with catch_stop_signals(trainer):
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] != before
        os.kill(os.getpid(), signal.SIGTERM)
        assert trainer.stop_signal == signal.SIGTERM
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    with catch_stop_signals(trainer):
        pass
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


# --- non-finite values ------------------------------------------------------------------------------------------------


def poison_before(monkeypatch, step: int, poison: Callable[[Cascade], None]) -> None:
    """Call `poison(model)` once, just before a training step."""
    train_step = Trainer.train_step

    def hook(trainer: Trainer, input, target):
        if trainer.step + 1 == step:
            poison(trainer.model)
        return train_step(trainer, input, target)

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


GRADIENT = r"gradient of stages\.0\.layers\.0\.ffn_out\.(bias|weight)"


@pytest.mark.parametrize(
    ("poison", "stage", "tensor"),
    [
        (poison_parameter, 1, r"parameter stages\.1\.layers\.0\.ffn_in\.weight"),
        (overflow_in_the_ffn, 1, r"output of stages\.1\.layers\.0\.ffn_out"),
        (overflow_in_the_residual, 1, r"input of stages\.1\.rms_scaling"),
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
    assert run.metrics()[-1] == {
        "split": "train", "step": 5, "event": "non_finite", "stage": stage, "tensor": error.value.tensor
    }  # fmt: skip
    assert run.metrics("train")[-2]["step"] == 4  # the bad step was not taken
    assert os.readlink(run.path / "last").endswith("step_00000004")
    assert all(value.isfinite().all() for value in run.load_model("last").state_dict().values())
    monkeypatch.undo()
    if clip == CONFIG.clip:  # without the fault it goes on from there
        assert_same_run(start(resume=True), whole)


@pytest.mark.parametrize("which", [0, 1])
def test_non_finite_latents_are_named(start, tmp_path, monkeypatch, which):
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
    assert "no checkpoint had been written yet" in str(error.value)
    assert not Run.open(tmp_path / "run").has_checkpoint()


def test_a_non_finite_validation_writes_no_checkpoint(start, tmp_path, monkeypatch):
    """A step with finite gradients can still break the weights: the checkpoint after it must not be written."""
    validate = Trainer.validate

    def broken(trainer):
        if trainer.step == 6:
            poison_parameter(trainer.model)
        return validate(trainer)

    monkeypatch.setattr(Trainer, "validate", broken)
    with pytest.raises(NonFiniteError) as error:
        start()
    assert (error.value.step, error.value.stage) == (6, 1)
    assert error.value.tensor == "parameter stages.1.layers.0.ffn_in.weight"
    run = Run.open(tmp_path / "run")
    assert os.readlink(run.path / "last").endswith("step_00000004")
    assert all(value.isfinite().all() for value in run.load_model("last").state_dict().values())
    row = run.metrics()[-1]
    assert (row["split"], row["step"], row["event"], row["stage"]) == ("val", 6, "non_finite", 1)


# --- refused ----------------------------------------------------------------------------------------------------------


def test_resume_with_another_config_lists_the_fields(start, tiny_cascade, tiny_codec):
    start()
    with pytest.raises(UserError, match=r"another config \(train\.learning_rate: 0\.03 → 0\.02\)"):
        start(resume=True, learning_rate=0.02)
    with pytest.raises(UserError, match=r"cascade\.stages\[1\]\.dropout: 0\.1 → 0\.2"):
        start(resume=True, cascade=tiny_cascade(anti_cheating=0.1).with_stage(1, dropout=0.2))
    with pytest.raises(UserError, match=r"train\.loss\.input_weight: 0\.3 → 0\.5"):
        start(resume=True, loss=LossConfig(input_weight=0.5))
    start(resume=True)  # its own config is accepted


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
    with pytest.raises(UserError, match="file: cannot write here"):
        start("file")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0), ("batch_size", 0), ("batch_size", 1.5), ("checkpoint_every", 0), ("max_steps", 0),
        ("learning_rate", 0.0), ("learning_rate", math.nan), ("learning_rate", -1.0), ("weight_decay", -0.1),
        ("weight_decay", math.inf), ("clip", 0.0), ("clip", -1.0), ("clip", math.inf), ("num_workers", -1),
        ("precision", "fp16"), ("precision", "bf-16"),
    ],
)  # fmt: skip
def test_bad_values_name_the_field(field, value):
    with pytest.raises(UserError, match=rf"^{field}={value!r} is not allowed; use ") as error:
        TrainConfig(**{field: value})
    if field == "precision":
        assert "fp32, bf16" in str(error.value)


def test_config_survives_json():
    config = TrainConfig(clip=None, weight_decay=0.0, loss=LossConfig(0.1, 0.2))
    assert TrainConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
    assert isinstance(TrainConfig(loss={"input_weight": 0.1}).loss, LossConfig)


def test_reader_processes_give_the_same_run(start):
    first = start(max_steps=2)
    assert start("workers", max_steps=2, num_workers=1).metrics() == first.metrics()


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
    row = trainer.train_step(*next(trainer.batches()))
    for i, stage in enumerate(trainer.model.stages):
        for name in ("input_norm", "layers", "post_norm", "output_projection", "rms_scaling"):
            squares = sum(p.grad.double().square().sum().item() for p in getattr(stage, name).parameters())
            assert row[f"grad_norm/stage{i}/{name}"] == pytest.approx(math.sqrt(squares), rel=1e-5)


@pytest.mark.parametrize(
    ("count", "most", "chosen"),
    [
        (9, None, list(range(9))),
        (9, 9, list(range(9))),
        (9, 20, list(range(9))),
        (9, 4, [0, 2, 4, 6]),
        (9, 1, [0]),
        (10, 3, [0, 3, 6]),
    ],
)
def test_evenly_spread(count, most, chosen):
    assert evenly_spread(count, most).tolist() == chosen


def test_validation_of_some_pairs_is_the_mean_over_those(start, tiny_index):
    run = start(max_steps=2, max_val_pairs=4)
    model, pairs = run.load_model("last"), LatentPairs(tiny_index, "val")
    losses = []
    with torch.no_grad():
        for input, target in (pairs[i] for i in range(9)):
            output, _ = model(input[None], target[None])
            losses.append((0.3 * (output - input).square().mean() + 0.3 * (output - target).square().mean()).item())
    (row,) = run.metrics("val")
    assert row["loss"] == pytest.approx(sum(losses[i] for i in (0, 2, 4, 6)) / 4, rel=1e-5)
    assert abs(sum(losses[:4]) / 4 / row["loss"] - 1) > 1e-3
    assert abs(sum(losses) / 9 / row["loss"] - 1) > 1e-3


@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_a_bad_number_of_validation_pairs_is_refused(value):
    with pytest.raises(UserError, match=rf"^max_val_pairs={value} is not allowed; use a whole number, 1 or more"):
        TrainConfig(max_val_pairs=value)


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
