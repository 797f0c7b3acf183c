"""Training in several processes: they compute what one would, on data of their own, and start and stop as one.

One launch of two processes by torchrun goes through all the scenarios; each writes what it saw, and the tests hold that
against the same scenario in this process alone.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import soundfile
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from conftest import FRAMES, TinyCodec, TinyDiscriminator

import lib.data.latents
import lib.project
import lib.train
import lib.training.batches
import lib.training.fusion_learner
import lib.training.trainer
from lib.audio.synth import make_demo_dataset
from lib.codec.mdct import MdctCodec
from lib.data.latents import LatentPairs, encode_manifest
from lib.data.pairs import Clip, Manifest, Pair
from lib.model.cascade import CascadeConfig
from lib.model.fusion import load_model
from lib.model.masks import MaskingConfig
from lib.presets import ModelSettings, load_preset
from lib.project import open_project
from lib.train import main, train_project
from lib.training.config import AdversaryConfig, CurriculumConfig, TrainConfig
from lib.training.fusion_learner import train
from lib.training.losses import LossConfig
from lib.training.nonfinite import NonFiniteError
from lib.training.run import Run
from lib.training.trainer import Callback, Trainer, join_processes
from lib.util.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
TRAIN_PAIRS, VAL_PAIRS = 13, 3  # 12 for whole steps, and one more; an odd number, so that processes differ in theirs
EVERY_TERM = LossConfig(**dict.fromkeys(LossConfig().weights, 0.1), window_seconds=None)
ADVERSARY = AdversaryConfig(discriminator_learning_rate=1e-3, discriminator_warmup=2)
CONFIG = TrainConfig(
    max_steps=6,
    batch_size=2,
    checkpoint_every=3,
    max_train_pairs=12,
    learning_rate=1e-2,
    curriculum=CurriculumConfig(target_shuffling=0.3),
)
FULL = dataclasses.replace(CONFIG, loss=EVERY_TERM, adversary=ADVERSARY, ema=0.5)
RANDOM = dataclasses.replace(CONFIG, ema=0.5, curriculum=CurriculumConfig(noise_rate=0.2), epochs=3, max_steps=None)
SMALL = {"data.clip_seconds": 1.0, "listening.seconds": 2.0, "data.pair_mode": "both"}


# --- what every process does ------------------------------------------------------------------------------------------


class Watched(Trainer):
    """Notes which clips this process takes in every step."""

    last: "Watched"

    def __init__(self, *arguments: Any):
        self.taken: list[list[float]] = []
        Watched.last = self
        super().__init__(*arguments)

    def train_step(self, batches, places):
        self.taken.append([clip.sum().item() for input, _ in batches for clip in input])
        super().train_step(batches, places)


def tiny_cascade(dropout: float) -> CascadeConfig:
    config = CascadeConfig.reference(2, num_layers=1, num_heads=2, ffn_mult=2, dropout=dropout)
    return dataclasses.replace(config, latent_dim=8)


def run_once(folder: Path, name: str, config: TrainConfig, *, comparable: bool = False, resume: bool = False) -> dict:
    """Train in `folder`; what this process took, and how it ended.

    `comparable` with another number of processes: no dropout, and an ε that keeps Adam from blowing up what is rounding
    alone, such as the gradient of the keys' biases.
    """
    ended: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lib.training.fusion_learner, "Trainer", Watched)
        patch.setattr(lib.training.fusion_learner, "Discriminator", TinyDiscriminator)
        if comparable:
            patch.setattr(torch.nn.Dropout, "forward", lambda layer, x: x)
            patch.setattr(torch.optim, "AdamW", functools.partial(torch.optim.AdamW, eps=1e-2))
        index, masking = next((folder / "songs").rglob("index-*.npz")), MaskingConfig("learned")
        cascade = tiny_cascade(dropout=0.0 if comparable else 0.1)
        try:
            train(folder / name, index, TinyCodec(), cascade, config, masking, resume=resume)
        except (NonFiniteError, KeyboardInterrupt) as error:
            ended = {"error": type(error).__name__, "message": str(error)} | getattr(error, "__dict__", {})
    trainer = Watched.last
    place = {"step": trainer.step, "stale": trainer.stale}
    place |= {"epoch": trainer.order.epoch, "position": trainer.order.position}
    return {"taken": trainer.taken, "ended": {k: str(v) for k, v in ended.items()}, **place}


def plain(folder: Path) -> dict:
    """Two processes' batches of 2 are one's batches of 4, in every term, and in validation."""
    return run_once(folder, "plain", by_processes(FULL), comparable=True)


def accumulated(folder: Path) -> dict:
    config = dataclasses.replace(by_processes(FULL), batch_size=1, accumulate=by_processes(FULL).batch_size)
    return run_once(folder, "accumulated", config, comparable=True)


def few_validation_pairs(folder: Path) -> dict:
    return run_once(folder, "few", dataclasses.replace(by_processes(CONFIG), max_val_pairs=1), comparable=True)


def the_same_data(folder: Path) -> dict:
    """What the comparison must be able to tell."""
    order, init = lib.training.batches.TrainingOrder, lib.training.batches.TrainingOrder.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "__init__", lambda self, pairs, config, rank, of: init(self, pairs, config, 0, of))
        return run_once(folder, "the same data", by_processes(FULL), comparable=True)


def patience(folder: Path) -> dict:
    """Steps far too long: validation gets worse."""
    config = dataclasses.replace(CONFIG, learning_rate=3.0, checkpoint_every=1, patience=2, max_steps=50)
    return run_once(folder, "patience", config)


def bad_data(folder: Path) -> dict:
    """A NaN in what the last process reads for its third step."""
    return poisoned(folder, "bad data", call=2 * CONFIG.batch_size + 1, split=TRAIN_PAIRS)


def bad_validation_data(folder: Path) -> dict:
    return poisoned(folder, "bad validation data", call=1, split=VAL_PAIRS)


def poisoned(folder: Path, name: str, call: int, split: int) -> dict:
    getitem, calls = LatentPairs.__getitem__, 0

    def read(pairs: LatentPairs, i: int):
        nonlocal calls
        input, target = getitem(pairs, i)
        calls += len(pairs) == split
        if calls == call and len(pairs) == split and is_last_process():
            target[3, 4] = math.nan
        return input, target

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LatentPairs, "__getitem__", read)
        return run_once(folder, name, dataclasses.replace(CONFIG, curriculum=CurriculumConfig()))


def stopped_at(step: int, folder: Path, name: str, config: TrainConfig, **options: Any) -> dict:
    """A SIGTERM reaches the last process while it takes the step; and another one, as a launcher would pass it on."""
    train_step = Trainer.train_step

    def signalled(trainer: Trainer, *batches):
        if trainer.step + 1 == step and is_last_process():
            for _ in range(PartialState().num_processes):
                os.kill(os.getpid(), signal.SIGTERM)
        return train_step(trainer, *batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", signalled)
        return run_once(folder, name, config, **options)


def whole(folder: Path) -> dict:
    """Dropout, noise and masks differ from process to process: the run that a stopped one must come back to."""
    return run_once(folder, "whole", RANDOM)


def stopped(folder: Path) -> dict:
    return stopped_at(5, folder, "stopped", RANDOM)


def resumed(folder: Path) -> dict:
    return run_once(folder, "stopped", RANDOM, resume=True)


def stopped_for_one(folder: Path) -> dict:
    """To be resumed by one process: stopped at 8 of 12 pairs."""
    return stopped_at(2, folder, "two, then one", CONFIG)


def resumed_from_one(folder: Path) -> dict:
    """Begun by one process, which stopped at 2 of 12 pairs."""
    return run_once(folder, "one, then two", CONFIG, resume=True)


def resumed_where_too_few_are_left(folder: Path) -> dict:
    """Begun by one process, which stopped at 12 of 13 pairs: the last one is not enough for two."""
    config = dataclasses.replace(CONFIG, max_train_pairs=None, max_steps=9)
    return run_once(folder, "too few left", config, resume=True)


def encoded(folder: Path) -> dict:
    """All open the project, and each counts the clips that it encodes."""
    encode, calls = MdctCodec.encode, folder / f"encoded by {os.getpid()}"
    calls.touch()

    def counted(codec: MdctCodec, wav: torch.Tensor) -> torch.Tensor:
        if wav.shape[2] > codec.hop:  # as much is encoded when the codec is loaded
            with open(calls, "a") as file:  # also by the processes that are forked here
                file.write("." * len(wav))
        return encode(codec, wav)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lib.project, "ROOT", folder / "project")
        patch.setattr(MdctCodec, "encode", counted)
        project = open_project(load_preset("smoke", SMALL), folder / "music", "out", join_processes())
    index = project.index
    return {
        "count": len(calls.read_text()),
        "index": index.name,
        "sha256": hashlib.sha256(index.read_bytes()).hexdigest(),
    }


SCENARIOS: list[Callable[[Path], dict]] = [
    plain, accumulated, few_validation_pairs, the_same_data, patience, bad_data, bad_validation_data, whole, stopped,
    resumed, stopped_for_one, resumed_from_one, resumed_where_too_few_are_left, encoded,
]  # fmt: skip


def by_processes(config: TrainConfig) -> TrainConfig:
    """One process takes as many pairs a step as two."""
    return dataclasses.replace(config, batch_size=config.batch_size * 2 // PartialState().num_processes)


def is_last_process() -> bool:
    return PartialState().process_index == PartialState().num_processes - 1


def run_scenarios(folder: Path) -> None:
    """What torchrun starts twice."""
    torch.set_num_threads(1)
    rank = join_processes().process_index
    for scenario in SCENARIOS:
        result = scenario(folder)
        (folder / f"{scenario.__name__}.{rank}.json").write_text(json.dumps(result))


# --- the launch -------------------------------------------------------------------------------------------------------


def make_data(folder: Path) -> tuple[Manifest, Path]:
    """13 training and 3 validation pairs, and the index of their latents `[8, 12]`."""
    root, length, pairs = folder / "songs", FRAMES * TinyCodec.hop, []
    root.mkdir(parents=True)
    for seed, (split, count) in enumerate((("train", TRAIN_PAIRS), ("val", VAL_PAIRS))):
        path = root / f"{split}.wav"
        wav = 0.1 * np.random.default_rng(seed).standard_normal((count + 1) * length)
        soundfile.write(path, wav, TinyCodec.sample_rate, subtype="FLOAT")
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        cuts = [Clip(path.name, i * length, length, sha256) for i in range(count + 1)]
        pairs += [Pair(f"{split}_{i}", split, "continuation", cuts[i], cuts[i + 1]) for i in range(count)]
    manifest = Manifest(root, length, TinyCodec.sample_rate, 0, tuple(pairs))
    return manifest, encode_manifest(manifest, TinyCodec(), root / "cache")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch(*command: str | Path, cwd: Path = ROOT, timeout: float = 240) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": f"{cwd}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout
    )


def torchrun(*command: str | Path, **options: Any) -> subprocess.CompletedProcess:
    port = f"--master_port={free_port()}"
    return launch("-m", "torch.distributed.run", "--nproc_per_node=2", port, *command, **options)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """What one process did, and what two did."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    make_demo_dataset(one / "music", num_songs=5, seconds=5)
    shutil.copytree(one / "music", two / "music")
    for folder in (one, two):
        make_data(folder)
    stopped_at(1, two, "one, then two", CONFIG)  # this process begins, the two go on
    config = dataclasses.replace(CONFIG, max_train_pairs=None, max_steps=9)
    begun = stopped_at(6, two, "too few left", config)
    assert begun["position"] == 12
    (two / "program.py").write_text(
        "import pathlib, sys, test_train\ntest_train.run_scenarios(pathlib.Path(sys.argv[1]))"
    )
    done = torchrun(two / "program.py", two)
    assert done.returncode == 0, done.stderr[-6000:]
    return one, two


@pytest.fixture(scope="module")
def pair(folders) -> Callable[[Callable[[Path], dict]], tuple[dict, list[dict]]]:
    """The results of a scenario: of one process, made here, and of each of the two."""

    @functools.cache
    def results(scenario: Callable[[Path], dict]) -> tuple[dict, list[dict]]:
        one, two = folders
        return scenario(one), ranks(two, scenario)

    return results


def ranks(folder: Path, scenario: Callable[[Path], dict]) -> list[dict]:
    return [json.loads((folder / f"{scenario.__name__}.{rank}.json").read_text()) for rank in range(2)]


def numbers(folder: Path, name: str, split: str) -> torch.Tensor:
    """Every loss, gradient norm and trace of every row, `[rows, names]`; NaN where a row lacks a name."""
    rows = Run.open(folder / name).metrics(split)
    names = sorted(set().union(*rows) - {"split"})
    return torch.tensor([[row.get(key, math.nan) for key in names] for row in rows], dtype=torch.float64)


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / name / "last" / "model.safetensors")


# --- the same as one process ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scenario", "name"), [(plain, "plain"), (accumulated, "accumulated")])
def test_two_processes_equal_one_with_twice_the_batch(folders, pair, scenario, name):
    one, two = folders
    alone, both = pair(scenario)
    assert alone["step"] == both[0]["step"] == both[1]["step"] == 6
    for mine, first, second in zip(alone["taken"], both[0]["taken"], both[1]["taken"], strict=True):
        assert mine == first + second
        assert len(first) == len(second) == 2
    for split in ("train", "val"):
        torch.testing.assert_close(
            numbers(two, name, split), numbers(one, name, split), rtol=1e-4, atol=1e-5, equal_nan=True
        )
    for tensor, wanted in zip(weights(two, name).values(), weights(one, name).values(), strict=True):
        torch.testing.assert_close(tensor, wanted, rtol=0, atol=1e-5)
    row = Run.open(two / name).metrics("train")[-1]
    assert {"loss/adversarial", "loss/rhythm", "loss/overlap", "discriminator/fake"} <= set(row)


def test_the_comparison_tells_processes_that_see_the_same_data(folders, pair):
    one, two = folders
    pair(plain)
    wrong, right = (numbers(folder, name, "train")[0] for folder, name in ((two, "the same data"), (one, "plain")))
    assert (wrong / right - 1).abs().nan_to_num().max() > 1e-2
    difference = max(
        (a - b).abs().max()
        for a, b in zip(weights(two, "the same data").values(), weights(one, "plain").values(), strict=True)
    )
    assert difference > 1e-3


def test_validation_is_over_the_pairs_of_all_processes(folders, pair):
    """Three pairs for two processes, and one pair for two."""
    one, two = folders
    pair(plain), pair(few_validation_pairs)
    for name in ("plain", "few"):
        torch.testing.assert_close(
            numbers(two, name, "val"), numbers(one, name, "val"), rtol=1e-5, atol=1e-5, equal_nan=True
        )
    means = [Run.open(one / name).metrics("val")[0]["loss/input_mse"] for name in ("plain", "few")]
    assert abs(means[1] / means[0] - 1) > 1e-3  # of other pairs: a process left out would show
    assert [row["step"] for row in Run.open(two / "few").metrics("val")] == [3, 6]


# --- stopping as one --------------------------------------------------------------------------------------------------


def test_patience_ends_every_process_at_the_same_step(folders):
    _, two = folders
    first, second = ranks(two, patience)
    assert first["step"] == second["step"] < 50
    assert first["stale"] == second["stale"] == 2
    validated = [row["loss"] for row in Run.open(two / "patience").metrics("val")]
    assert len(validated) == first["step"]
    assert min(validated) == validated[-3]


@pytest.mark.parametrize(
    ("scenario", "name", "split", "step"),
    [(bad_data, "bad data", "train", 3), (bad_validation_data, "bad validation data", "val", 3)],
)
def test_a_nan_in_one_process_is_named_by_all(folders, scenario, name, split, step):
    _, two = folders
    first, second = ranks(two, scenario)
    assert first["ended"] == second["ended"]
    assert first["ended"]["error"] == "NonFiniteError"
    assert first["ended"]["step"] == str(step)
    assert first["ended"]["tensor"] == "target latents"
    rows = Run.open(two / name).metrics()
    (event,) = [row for row in rows if "event" in row]
    assert rows[-1] == event
    assert (event["split"], event["step"], event["stage"], event["tensor"]) == (split, step, None, "target latents")
    assert event["pairs"]
    assert all(f"{split}.wav at " in pair for pair in event["pairs"])
    assert not Run.open(two / name).has_checkpoint()


def test_a_signal_to_one_process_saves_and_ends_all(folders):
    _, two = folders
    first, second = ranks(two, stopped)
    assert first["ended"] == second["ended"]
    assert first["ended"]["error"] == "KeyboardInterrupt"
    assert first["ended"]["message"] == f"stopped by SIGTERM; step 5 is saved in {two / 'stopped'}"
    assert first["step"] == second["step"] == 5


def test_stopped_processes_go_on_bit_for_bit(folders):
    _, two = folders
    assert [result["step"] for result in ranks(two, resumed)] == [9, 9]
    assert (two / "stopped" / "metrics.jsonl").read_bytes() == (two / "whole" / "metrics.jsonl").read_bytes()
    for name in ("model.safetensors", "training.pt"):
        one, other = ((two / run / "last" / name).read_bytes() for run in ("stopped", "whole"))
        assert one == other


# --- another number of processes --------------------------------------------------------------------------------------


def clips_of_an_epoch(*parts: list[list[float]]) -> list[float]:
    return sorted(clip for part in parts for step in part for clip in step)


def test_one_process_goes_on_with_what_two_have_begun(folders):
    _, two = folders
    first, second = ranks(two, stopped_for_one)
    assert (first["step"], first["epoch"], first["position"]) == (2, 0, 8)
    alone = run_once(two, "two, then one", CONFIG, resume=True)
    assert [len(step) for step in alone["taken"]] == [2, 2, 2, 2]  # the rest of the epoch, and of the six steps
    everything = LatentPairs(next((two / "songs").rglob("index-*.npz")), "train")
    wanted = sorted(everything[i][0].sum().item() for i in range(12))
    assert clips_of_an_epoch(first["taken"], second["taken"], alone["taken"][:2]) == pytest.approx(wanted)
    assert [(row["step"], row["epoch"]) for row in Run.open(two / "two, then one").metrics("train")] == [
        (1, 0), (2, 0), (3, 0), (4, 0), (5, 1), (6, 1)
    ]  # fmt: skip


def test_two_processes_go_on_with_what_one_has_begun(folders):
    _, two = folders
    first, second = ranks(two, resumed_from_one)
    assert [len(step) for step in first["taken"]] == [2, 2, 1, 2, 2]  # 2 of 12 were taken: 4, 4, 2, and the next epoch
    rest = clips_of_an_epoch(first["taken"][:3], second["taken"][:3])
    everything = LatentPairs(next((two / "songs").rglob("index-*.npz")), "train")
    wanted = sorted(everything[i][0].sum().item() for i in range(12))
    assert len(set(rest)) == 10
    assert set(rest) < set(wanted)
    rows = Run.open(two / "one, then two").metrics("train")
    assert [(row["step"], row["epoch"]) for row in rows] == [(1, 0), (2, 0), (3, 0), (4, 0), (5, 1), (6, 1)]


def test_what_is_too_little_for_a_step_of_more_processes_is_left_out(folders):
    _, two = folders
    results = ranks(two, resumed_where_too_few_are_left)
    assert [(result["step"], result["epoch"]) for result in results] == [(9, 2)] * 2
    assert [len(step) for step in results[0]["taken"]] == [2, 2, 2]
    assert len(set(clips_of_an_epoch(*(result["taken"] for result in results)))) == 12
    rows = Run.open(two / "too few left").metrics("train")
    assert [(row["step"], row["epoch"]) for row in rows][-4:] == [(6, 0), (7, 1), (8, 1), (9, 1)]


# --- data -------------------------------------------------------------------------------------------------------------


def test_one_of_two_processes_encodes_every_clip_once(pair):
    alone, both = pair(encoded)
    assert alone["count"] > 8
    assert sorted(result["count"] for result in both) == [0, alone["count"]]
    for result in both:
        assert (result["index"], result["sha256"]) == (alone["index"], alone["sha256"])


# --- launchers --------------------------------------------------------------------------------------------------------

TRAIN = {"max_steps": 2, "batch_size": 2, "checkpoint_every": 2, "max_val_pairs": 2}
TRAIN |= {"loss.rhythm_weight": 0, "loss.harmony_weight": 0, "loss.adversarial_weight": 0}
TRAIN |= {"adversary.discriminator_learning_rate": None}
SETTINGS = SMALL | {"model.num_layers": 1} | {f"train.{name}": value for name, value in TRAIN.items()}
NOTEBOOK = """
import json, sys
import torch
from accelerate import Accelerator
from lib.presets import load_preset
from lib.project import open_project
from lib.train import train_project

project = open_project(load_preset("smoke", json.loads(sys.argv[1])), sys.argv[2], sys.argv[3])
torch.set_num_threads(2)  # OpenMP has its threads, which a fork would wait for,
weight = torch.randn(1000, 1000, requires_grad=True)
(weight @ weight).sum().backward()
torch.optim.AdamW([weight]).step()
assert Accelerator().num_processes == 1  # and an earlier training has left its state
run = train_project(project, num_processes=2)
assert run.metrics("val")
print(run.path)
"""


def test_accelerate_and_a_notebook_start_processes_that_train_alike(tmp_path):
    """The command line as the README gives it, and the same preset from a kernel."""
    shutil.copytree(ROOT / "lib", tmp_path / "lib")  # its cache of latents is then its own
    make_demo_dataset(tmp_path / "music", num_songs=5, seconds=5)
    command, notebook = tmp_path / "by command", tmp_path / "by notebook"
    accelerate = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    accelerate += [f"--main_process_port={free_port()}", "-m", "lib.train"]
    options = [part for name, value in SETTINGS.items() for part in ("--set", f"{name}={json.dumps(value)}")]
    options += ["--preset", "smoke", "--data", tmp_path / "music", "--out", command]
    done = launch(*accelerate, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stdout == f"run: {command}\n"  # one process speaks
    done = launch("-c", NOTEBOOK, json.dumps(SETTINGS), tmp_path / "music", notebook, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stdout.endswith(f"{notebook}\n")
    rows = [Run.open(path).metrics() for path in (command, notebook)]
    assert [(row["split"], row["step"]) for row in rows[0]] == [("train", 1), ("train", 2), ("val", 2)]
    assert rows[0] == rows[1]
    assert "lib.training.trainer" not in done.stderr


def test_accelerate_still_has_the_private_reset_of_its_state():
    """`train_project` forgets an earlier training's state by it, before a notebook starts several processes."""
    assert callable(getattr(AcceleratorState, "_reset_state", None)), "AcceleratorState._reset_state has gone"


def test_a_kernel_that_has_used_a_gpu_cannot_be_forked(tmp_path, monkeypatch):
    project = SimpleNamespace(
        preset=load_preset("smoke"), codec=TinyCodec(), out_dir=tmp_path, index=tmp_path / "index.json"
    )
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(UserError, match="num_processes=2: this kernel has used a GPU already; restart it, train first"):
        train_project(project, num_processes=2)


def test_in_one_process_callbacks_are_called(tmp_path, monkeypatch):
    manifest, index = make_data(tmp_path)
    preset = dataclasses.replace(load_preset("smoke"), train=dataclasses.replace(CONFIG, batch_size=4, max_steps=3))
    project = SimpleNamespace(
        preset=preset, codec=TinyCodec(), out_dir=tmp_path / "out", index=index, manifest=manifest
    )
    monkeypatch.setattr(ModelSettings, "cascade", tiny_cascade(0.1))
    told = []
    mine = Callback()
    monkeypatch.setattr(mine, "on_epoch", lambda trainer, epoch: told.append(epoch))
    run = train_project(project, callbacks=(mine,))
    assert told == [1]
    assert (run.path / "audio" / "pair_0_epoch_0001.wav").exists()
    assert load_model(run, "last").masking == preset.model.masking


NO_TERM = 'train.loss.own={a: {function: "no:term", weight: 1}}'


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--preset", "none"], "preset: unknown 'none'"),
        (["--preset", "smoke", "--set", "max_steps"], "--set max_steps: not of the form name=value"),
        (["--preset", "smoke", "--data", "/nowhere"], "/nowhere: no such folder"),
        (["--preset", "smoke", "--data", "/nowhere", "--set", NO_TERM], "'no:term': cannot be imported"),  # at once
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(tmp_path, monkeypatch, capsys, options, words):
    monkeypatch.setattr(sys, "argv", ["lib.train", *options, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {words}")
    assert errors.count("\n") == 1


def test_the_options_reach_the_training(tmp_path, monkeypatch, capsys):
    asked, project = [], SimpleNamespace(in_words=lambda: ["what it trains on"])

    def note(result: object):
        return lambda *given, **options: asked.append((given, options)) or result

    monkeypatch.setattr(lib.train, "open_project", note(project))
    monkeypatch.setattr(lib.train, "train_project", note(Run(tmp_path, {})))
    options = ["--preset", "demo", "--data", "songs", "--out", "there", "--resume", "--set", "train.max_steps=5"]
    monkeypatch.setattr(sys, "argv", ["lib.train", *options])
    monkeypatch.chdir(tmp_path)
    main()
    (preset, *folders), options = asked[0]
    assert options == {"resume": True}
    assert (preset.name, preset.train.max_steps) == ("demo", 5)
    assert folders[:2] == [tmp_path / "songs", tmp_path / "there"]  # from the current folder, as in other commands
    assert folders[2].num_processes == 1
    assert asked[1] == ((project,), {"resume": True, "callbacks": ()})
    said = capsys.readouterr()
    assert (said.out, said.err) == (f"run: {tmp_path}\n", "what it trains on\n")
