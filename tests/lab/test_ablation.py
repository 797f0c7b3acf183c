"""The ablation's runs: cached under a hash of their causes, resumed after any stop, kept in a small record."""

import dataclasses
import functools
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import TinyCodec
from parts import shortened
from torch.utils.data import Subset
from writing import write_record

import lib.lab.ablation
from lib.codec.mdct import MdctCodec
from lib.data.latents import LatentPairs, encode_manifest
from lib.data.pairs import Clip, Manifest, Pair
from lib.evaluation.baselines import mean_metrics, measure_fusions
from lib.evaluation.metrics import evaluate_fusion
from lib.lab.ablation import (
    Job,
    Plan,
    job_key,
    run_job,
    run_jobs,
    run_plan,
    visible_gpus,
)
from lib.lab.results import Result, by_variant, growth, read_record
from lib.lab.variants import Variant
from lib.model.cascade import CascadeConfig
from lib.model.fusion import load_model
from lib.model.masks import MaskingConfig
from lib.training.config import CurriculumConfig, TrainConfig
from lib.training.losses import LossConfig
from lib.training.run import LOCK, Run
from lib.training.trainer import Callback, Trainer
from lib.util.configs import from_fields
from lib.util.errors import UserError
from lib.util.files import file_sha256

ROOT = Path(__file__).resolve().parents[2]
CONFIG = TrainConfig(max_steps=6, batch_size=2, checkpoint_every=2, learning_rate=1e-2, max_val_pairs=4)


@dataclasses.dataclass(frozen=True)
class Tiny(Variant):
    """A variant of a cascade with 8 latent channels and small layers."""

    def cascade(self, num_layers: int) -> CascadeConfig:
        config = dataclasses.replace(super().cascade(num_layers), latent_dim=8)
        for i in range(self.stages):
            config = config.with_stage(i, num_heads=2, ffn_mult=2)
        return config


REFERENCE = Tiny("reference", "named")
WEAK = Tiny("weak", "named", stages=3, last={"residual_weight": 0.1}, train={"clip": 1.0}, loss={"input_weight": 0.6})
BROKEN = Tiny("broken", "learning rate", train={"learning_rate": 1e30})


def tiny_plan(*variants: Variant, seeds: int = 2, **changes) -> Plan:
    return Plan(variants or (REFERENCE, WEAK), 1, seeds, dataclasses.replace(CONFIG, **changes))


def tiny_job(job: Job) -> None:
    """`run_job` with the tiny codec, in whatever process; the environment can make its steps slow."""
    lib.lab.ablation.load_codec = lambda name: TinyCodec()
    if pause := float(os.environ.get("SECONDS_A_STEP", "0")):
        log = Run.log
        Run.log = lambda run, row: (log(run, row), time.sleep(pause))[0]
    run_job(job)


@pytest.fixture(autouse=True)
def deterministic(monkeypatch):
    """As `start_worker` makes a process: what runs in this one can then be compared to the last bit on a GPU too."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(torch.cuda.is_available())
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def started(monkeypatch) -> list[str]:
    """The keys of the jobs that are run, one after the other in this process, on the tiny codec."""
    keys = []

    def serially(jobs, workers):
        for job in jobs:
            keys.append(job.folder.name)
            run_job(job)

    monkeypatch.setattr(lib.lab.ablation, "load_codec", lambda name: TinyCodec())
    monkeypatch.setattr(lib.lab.ablation, "run_jobs", serially)
    return keys


@pytest.fixture
def results(tmp_path, tiny_index, started) -> Callable[..., tuple[Result, ...]]:
    return lambda plan, folder="runs": run_plan(plan, tiny_index, "tiny", tmp_path / folder)


@functools.cache
def uninterrupted(index: Path, folder: Path) -> tuple[Result, ...]:
    """The results of `tiny_plan()`, that interrupted ones are held against."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lib.lab.ablation, "load_codec", lambda name: TinyCodec())
        patch.setattr(lib.lab.ablation, "run_jobs", lambda jobs, workers: [run_job(job) for job in jobs])
        return run_plan(tiny_plan(), index, "tiny", folder)


@pytest.fixture
def whole(tiny_index, tmp_path_factory) -> tuple[Result, ...]:
    return uninterrupted(tiny_index, tmp_path_factory.getbasetemp() / "whole")


class Stages(Callback):
    def on_validation(self, trainer: Trainer, row: dict) -> None:
        trainer.run.log(
            {"split": "stages", "step": trainer.step, "count": len(trainer.learner.eval_model.cascade.stages)}
        )


def test_the_callbacks_of_a_plan_watch_every_run(results):
    found = results(dataclasses.replace(tiny_plan(seeds=1), callbacks=(Stages(),)))
    rows = [Run.open(result.run).metrics("stages") for result in found]
    assert [[row["count"] for row in own] for own in rows] == [[2] * 3, [3] * 3]


def assert_same_results(found: tuple[Result, ...], wanted: tuple[Result, ...]) -> None:
    """All values to the last bit, but for where they lie."""
    assert [dataclasses.replace(r, run="") for r in found] == [dataclasses.replace(r, run="") for r in wanted]
    for a, b in zip(found, wanted, strict=True):
        assert Path(a.run).name == Path(b.run).name
        for name in ("metrics.jsonl", "result.json"):
            assert Path(a.run, name).read_bytes() == Path(b.run, name).read_bytes()


# --- what a plan gives ------------------------------------------------------------------------------------------------


def test_a_result_for_every_variant_and_seed_in_order(whole):
    assert [(r.variant, r.seed) for r in whole] == [("reference", 0), ("reference", 1), ("weak", 0), ("weak", 1)]
    assert len({r.run for r in whole}) == 4
    assert len({r.final["mse"] for r in whole}) == 4
    for result in whole:
        config = json.loads(Path(result.run, "config.json").read_text())
        assert config["train"]["seed"] == result.seed
        assert config["train"]["clip"] == (1.0 if result.variant == "weak" else 10.0)
        assert config["train"]["loss"]["input_weight"] == (0.6 if result.variant == "weak" else 0.3)
        assert len(config["cascade"]["stages"]) == (3 if result.variant == "weak" else 2)
        assert (result.num_layers, result.steps, result.non_finite) == (1, 6, None)
    groups = by_variant(whole)
    assert list(groups) == ["reference", "weak"]
    assert groups["weak"] == list(whole[2:])


def test_a_result_summarizes_its_metrics(results):
    (result,) = results(tiny_plan(REFERENCE, seeds=1, max_steps=31, checkpoint_every=31))
    rows = Run.open(result.run).metrics("train")
    assert result.grad_norm == tuple(row["grad_norm"] for row in rows)
    assert len(rows) == 31
    for name in ("loss", "grad_norm", "stage1/target_scale", "grad_norm/stage0/layers"):
        assert result.start[name] == statistics.median(row[name] for row in rows[:3])
        assert result.end[name] == statistics.median(row[name] for row in rows[-3:])
    assert not {"split", "step", "epoch"} & set(result.start)
    assert growth(result) == result.end["grad_norm"] / result.start["grad_norm"]


def test_the_final_metrics_are_those_of_the_last_checkpoint_on_the_chosen_pairs(
    results, monkeypatch, tiny_index, tmp_path
):
    monkeypatch.setattr(Path, "unlink", lambda path, missing_ok=False: None)
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **options: None)
    (result,) = results(tiny_plan(WEAK, seeds=1))
    monkeypatch.undo()
    model, pairs = load_model(Run.open(result.run), "last"), LatentPairs(tiny_index, "val")
    wanted = evaluate_fusion(model, Subset(pairs, (0, 2, 4, 6)))
    assert result.final == wanted
    assert evaluate_fusion(model, pairs)["mse"] != wanted["mse"]


def test_a_second_call_runs_nothing(results, started):
    first = results(tiny_plan())
    assert len(started) == 4
    written = [path for path in Path(first[0].run).parent.rglob("*") if path.is_file() and path.name != LOCK]
    times = {path: path.stat().st_mtime_ns for path in written}
    assert len(times) == 16
    assert_same_results(results(tiny_plan()), first)
    assert len(started) == 4
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_only_what_is_missing_is_run(results, started):
    few = results(tiny_plan(REFERENCE, seeds=1))
    assert len(started) == 1
    more = results(tiny_plan())
    assert len(started) == 4
    assert_same_results(more[:1], few)


def test_variants_of_equal_config_share_their_runs(results, started):
    double = Tiny("the same in other words", "named", train={"clip": 10.0})
    found = results(tiny_plan(REFERENCE, double, seeds=2))
    assert len(started) == len(set(started)) == 2
    assert [r.variant for r in found] == ["reference"] * 2 + ["the same in other words"] * 2
    assert_same_results(found[2:], tuple(dataclasses.replace(r, variant=found[2].variant) for r in found[:2]))
    assert found[0].run == found[2].run != found[1].run


def test_checkpoints_are_deleted(whole):
    for result in whole:
        assert set(os.listdir(result.run)) == {LOCK, "config.json", "metrics.jsonl", "plan.json", "result.json"}


# --- stopped and resumed ---------------------------------------------------------------------------------------------


class Killed(BaseException):
    """What no code of the project catches."""


def die_at_step_5(patch) -> None:
    log = Run.log

    def hook(run, row):
        if (row["split"], row["step"]) == ("train", 5):
            raise Killed
        log(run, row)

    patch.setattr(Run, "log", hook)


def die_in(name: str) -> Callable:
    def prepare(patch) -> None:
        def hook(*args, **options):
            raise Killed

        patch.setattr(lib.lab.ablation, name, hook)

    return prepare


@pytest.mark.parametrize(
    ("kill", "steps_left"),
    [(die_at_step_5, 2), (die_in("evaluate_fusion"), 0), (die_in("write_atomic"), 0)],
    ids=["step 5", "evaluation", "result"],
)
def test_a_killed_run_is_resumed(results, whole, started, monkeypatch, kill, steps_left):
    with monkeypatch.context() as patch:
        kill(patch)
        with pytest.raises(Killed):
            results(tiny_plan(REFERENCE, seeds=1))
    taken, train_step = [], Trainer.train_step
    monkeypatch.setattr(
        Trainer, "train_step", lambda trainer, *pair: taken.append(trainer.step) or train_step(trainer, *pair)
    )
    assert_same_results(results(tiny_plan(REFERENCE, seeds=1)), whole[:1])
    assert len(taken) == steps_left  # from the checkpoint, not from the start
    assert started[0] == started[1]


def test_a_non_finite_run_is_recorded_and_stops_no_other(results, tmp_path):
    found = results(tiny_plan(BROKEN, REFERENCE))
    for result in found[:2]:
        assert result.non_finite["step"] == 2  # the first step had taken the weights there
        assert result.non_finite["stage"] == 0
        assert result.non_finite["tensor"].startswith(("output of cascade.stages.0.", "input of cascade.stages.0."))
        assert result.final is None
        assert result.steps == 1
        assert [math.isinf(norm) for norm in result.grad_norm] == [False, True]
        assert math.isinf(growth(result))
        assert set(os.listdir(result.run)) == {LOCK, "config.json", "metrics.jsonl", "plan.json", "result.json"}
        assert result.start == result.end
    assert all(result.final and result.non_finite is None for result in found[2:])
    write_record(tmp_path / "record.json", found, {})
    assert [r.non_finite for r in read_record(tmp_path / "record.json")[0]] == [r.non_finite for r in found]


def test_a_run_that_breaks_in_its_first_step_has_no_metrics(results, monkeypatch):
    getitem = LatentPairs.__getitem__
    monkeypatch.setattr(LatentPairs, "__getitem__", lambda pairs, i: tuple(x * math.inf for x in getitem(pairs, i)))
    (result,) = results(tiny_plan(REFERENCE, seeds=1))
    assert result.non_finite.pop("pairs")
    empty = {"operation": "", "spread": ""}
    assert result.non_finite == {"step": 1, "stage": None, "tensor": "input latents"} | empty
    assert (result.steps, result.start, result.end, result.grad_norm) == (0, {}, {}, (math.inf,))
    assert math.isinf(growth(result))


@pytest.mark.parametrize("content", ["{", "", "[]", "null", '{"final": null}', "\x00"])
def test_a_damaged_result_is_named(results, content):
    (result,) = results(tiny_plan(REFERENCE, seeds=1))
    Path(result.run, "result.json").write_text(content)
    with pytest.raises(UserError, match="damaged") as caught:
        results(tiny_plan(REFERENCE, seeds=1))
    assert f"{result.run}/result.json: damaged" in str(caught.value)
    assert f"delete {result.run} and run again" in str(caught.value)


# --- what makes a result ----------------------------------------------------------------------------------------------

PARTS = (
    REFERENCE.cascade(1),
    CONFIG,
    MaskingConfig(),
    TinyCodec.fingerprint,
    "data",
)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        (0, REFERENCE.cascade(2)),
        (0, REFERENCE.cascade(1).with_stage(-1, clamp=None)),
        (1, dataclasses.replace(CONFIG, seed=1)),
        (1, dataclasses.replace(CONFIG, max_steps=7)),
        (1, dataclasses.replace(CONFIG, loss=LossConfig(input_weight=0.5))),
        (1, dataclasses.replace(CONFIG, curriculum=CurriculumConfig(noise_rate=0.1))),
        (2, MaskingConfig("learned")),
        (3, "0" * 64),
        (4, "other"),
    ],
)
def test_the_key_changes_with_every_part(part, value):
    changed = [value if i == part else before for i, before in enumerate(PARTS)]
    assert job_key(*changed) != job_key(*PARTS)


def test_the_key_changes_with_the_code_the_version_and_the_device(monkeypatch, edit_code):
    keys = {job_key(*PARTS)}
    edit_code("lib.presets")  # plays no part
    keys.add(job_key(*PARTS))
    assert len(keys) == 1
    for module in (
        "lib.lab.ablation",
        "lib.model.cascade",
        "lib.audio.features",
        "lib.data.latents",
        "lib.lab.variants",
    ):
        edit_code(module)
        keys.add(job_key(*PARTS))
    monkeypatch.setattr(torch, "__version__", "0.0")
    keys.add(job_key(*PARTS))
    has_gpu = torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: not has_gpu)
    keys.add(job_key(*PARTS))
    assert len(keys) == 8


def test_a_config_that_was_read_back_has_the_same_key():
    read_back = from_fields(CascadeConfig, json.loads(json.dumps(dataclasses.asdict(PARTS[0]))))
    assert job_key(*PARTS) == job_key(read_back, *PARTS[1:])
    assert job_key(*PARTS).isalnum()
    assert len(job_key(*PARTS)) == 16


def test_a_changed_code_makes_new_runs(results, started, edit_code):
    results(tiny_plan(REFERENCE, seeds=1))
    edit_code("lib.training.learner")
    results(tiny_plan(REFERENCE, seeds=1))
    assert len(set(started)) == 2


def test_a_record_of_real_results_names_no_folder_of_this_machine(whole, tmp_path):
    write_record(tmp_path / "record.json", [shortened(result) for result in whole], {"seeds": 2})
    text = (tmp_path / "record.json").read_text()
    assert str(Path(whole[0].run).parent) not in text
    found = read_record(tmp_path / "record.json")[0]
    for short, full in zip(found, whole, strict=True):
        assert short.end == pytest.approx(full.end, rel=5.1e-4)
        assert short.final == pytest.approx(full.final, rel=5.1e-4)
        assert short.final != full.final


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def threads(monkeypatch) -> None:
    """Workers that are threads of this process: for what `run_jobs` makes of their errors."""
    monkeypatch.setattr(lib.lab.ablation, "ProcessPoolExecutor", ThreadPoolExecutor)
    monkeypatch.setattr(lib.lab.ablation, "start_worker", lambda devices: None)


@pytest.mark.parametrize(
    ("visible", "count", "names"),
    [(None, 0, [""]), ("", 0, [""]), (None, 2, ["0", "1"]), ("2,3", 2, ["2", "3"]), ("GPU-8f,GPU-1c", 1, ["GPU-8f"])],
)
def test_workers_take_the_gpus_that_this_process_may_see(monkeypatch, visible, count, names):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_gpus() == names


def jobs_called(*names: str) -> list[Job]:
    return [Job(Path("runs", name), Path("index"), "tiny", *PARTS[:3]) for name in names]


@pytest.mark.parametrize("kind", [UserError, OSError])
def test_the_first_error_ends_all_and_says_whose_it_is(threads, monkeypatch, kind):
    ended = []

    def job(job):
        if job.folder.name == "bad":
            raise kind("the fix")
        time.sleep(0.2)
        ended.append(job.folder.name)

    monkeypatch.setattr(lib.lab.ablation, "run_job", job)
    with pytest.raises(kind, match="the fix") as caught:
        run_jobs(jobs_called("bad", *"abcdefgh"), 1)
    assert caught.value.__notes__ == ["in runs/bad"]
    assert len(ended) <= 1  # what had begun


def test_a_folder_that_cannot_be_written_is_refused(results, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: cannot be written"):
        results(tiny_plan(), "file")


def test_bad_settings_are_refused_before_anything_runs(results, started):
    with pytest.raises(UserError, match="batch_size=6 is more than the 5 training pairs"):
        results(tiny_plan(batch_size=6))
    with pytest.raises(UserError, match="clip=-1"):
        results(tiny_plan(Tiny("bad", "clipping", train={"clip": -1.0})))
    assert len(started) == 1


# --- real processes ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def mdct_index(tmp_path_factory) -> Path:
    """Three training pairs and two for validation, half a second each."""
    root, length = tmp_path_factory.mktemp("noise"), 12_000
    pairs = []
    for seed, (split, clips) in enumerate((("train", 4), ("val", 3))):
        path = root / f"{split}.wav"
        soundfile.write(path, 0.1 * np.random.default_rng(seed).standard_normal(clips * length), 24_000, "FLOAT")
        cuts = [Clip(path.name, i * length, length, file_sha256(path)) for i in range(clips)]
        pairs += [Pair(f"{split}_{i}", split, "continuation", cuts[i], cuts[i + 1]) for i in range(clips - 1)]
    manifest = Manifest(root, length, 24_000, 0, tuple(pairs))
    return encode_manifest(manifest, MdctCodec(), root / "cache")


def test_workers_give_what_one_process_gives(mdct_index, tmp_path, monkeypatch):
    """Two processes at once; a run that cannot be written to is named, and the others follow once it can be."""
    loss = {"anti_modulation_weight": 1.0}
    small = {"width": 16, "num_heads": 2, "ffn_mult": 1}
    variants = (Variant("plain", "named", every=small), Variant("on sound", "objective", every=small, loss=loss))
    plan = Plan(variants, 1, 2, TrainConfig(max_steps=3, batch_size=2, checkpoint_every=3))
    with monkeypatch.context() as patch:
        patch.setattr(lib.lab.ablation, "run_jobs", lambda jobs, workers: [run_job(job) for job in jobs])
        wanted = run_plan(plan, mdct_index, "mdct", tmp_path / "alone")
    blocked = tmp_path / "runs" / Path(wanted[1].run).name
    (blocked / "checkpoints").mkdir(parents=True)
    (blocked / "replaced").write_text("a file where a folder must be")
    with pytest.raises(FileExistsError) as caught:
        run_plan(plan, mdct_index, "mdct", tmp_path / "runs", workers=2)
    assert caught.value.__notes__ == [f"in {blocked}"]
    (blocked / "replaced").unlink()
    found = run_plan(plan, mdct_index, "mdct", tmp_path / "runs", workers=2)
    assert_same_results(found, wanted)
    assert "loss/anti_modulation" in found[2].end
    assert all(result.final for result in found)


def test_with_masks_objective_metrics_are_measured_too(mdct_index, tmp_path, monkeypatch):
    monkeypatch.setattr(lib.lab.ablation, "run_jobs", lambda jobs, workers: [run_job(job) for job in jobs])
    variants = (Variant("plain", "named", every={"width": 16, "num_heads": 2, "ffn_mult": 1}),)
    config = TrainConfig(max_steps=2, batch_size=2, checkpoint_every=2)
    (without,) = run_plan(Plan(variants, 1, 1, config), mdct_index, "mdct", tmp_path)
    (result,) = run_plan(Plan(variants, 1, 1, config, MaskingConfig("learned")), mdct_index, "mdct", tmp_path)
    assert without.run != result.run
    assert set(without.final) < set(result.final)
    judged = set(result.final) - set(without.final)
    for name in ("model", "average of latents"):
        assert {f"{name}/rhythm", f"{name}/harmony", f"{name}/merit"} <= judged
    assert "complementarity" in judged
    assert result.final["model/rhythm"] != result.final["average of latents/rhythm"]
    pairs = LatentPairs(mdct_index, "val")
    average = measure_fusions((pairs[i] for i in range(len(pairs))), MdctCodec(), {})["average of latents"]
    assert result.final["average of latents/merit"] == mean_metrics(average)["merit"]


PROGRAM = """
import signal
import sys
from pathlib import Path
import lib.lab.ablation
from conftest import TinyCodec
from lib.util.errors import exit_on_user_error
from lab.test_ablation import tiny_job, tiny_plan

lib.lab.ablation.load_codec = lambda name: TinyCodec()
lib.lab.ablation.run_job = tiny_job
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in a shell's background
with exit_on_user_error():
    lib.lab.ablation.run_plan(tiny_plan(checkpoint_every=1), Path(sys.argv[1]), "tiny", sys.argv[2], workers=2)
"""


def processes_of(session: int) -> dict[int, str]:
    """The processes that are alive in a session: the program, its workers and their helpers."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = path.read_text().rsplit(")", 1)[1].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(its_session) == session and state != "Z":
            found[int(path.parent.name)] = state
    return found


def wait_until(condition: Callable[[], object], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="lists processes by /proc")
@pytest.mark.parametrize(
    ("number", "to_all", "code"),
    [
        (signal.SIGINT, True, 130),  # as a terminal sends it
        (signal.SIGKILL, False, -signal.SIGKILL),
    ],
    ids=["Ctrl-C", "SIGKILL"],
)
def test_a_stopped_plan_leaves_no_process_and_resumes(results, whole, tiny_index, tmp_path, number, to_all, code):
    """Four slow runs on two workers, stopped in the first two, which have a checkpoint each."""
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT}/tests:{ROOT}/tests/record", "SECONDS_A_STEP": "2"}
    command = [sys.executable, "-c", PROGRAM, tiny_index, tmp_path / "runs"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | paths, start_new_session=True
    ) as process:
        try:
            assert wait_until(lambda: len(list(tmp_path.glob("runs/*/last"))) == 2, 90)
            assert len(processes_of(process.pid)) >= 3
            (os.killpg if to_all else os.kill)(process.pid, number)
            assert wait_until(lambda: not processes_of(process.pid), 90), processes_of(process.pid)
            process.wait(5)
        finally:
            for pid in processes_of(process.pid):
                os.kill(pid, signal.SIGKILL)
        errors = process.stderr.read()
    assert process.returncode == code, errors
    begun = [path.parent for path in tmp_path.glob("runs/*/config.json")]
    assert len(begun) == 2
    assert not list(tmp_path.glob("runs/*/result.json"))
    assert all(Run.open(path).has_checkpoint() for path in begun), errors
    found = results(tiny_plan(checkpoint_every=1))
    for a, b in zip(found, whole, strict=True):
        assert (a.start, a.end, a.final, a.grad_norm) == (b.start, b.end, b.final, b.grad_norm)
