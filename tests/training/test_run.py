"""Run directories: what is saved comes back, a crash at any point leaves a complete checkpoint, bad files are named."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lib.training.run
from lib.model.fusion import FusionModel, load_model
from lib.model.masks import MaskingConfig
from lib.training.config import LENGTH, WITHOUT_EFFECT
from lib.training.run import LOCK, Run, find_runs
from lib.util.configs import differing_fields
from lib.util.errors import UserError
from lib.util.tensors import load_weights


def seeded(config, seed: int, masking: MaskingConfig | None = None) -> FusionModel:
    torch.manual_seed(seed)
    return FusionModel(config, masking).eval()


def described(config, masking: MaskingConfig | None = None) -> dict:
    """What a run's config says of its model."""
    return {"cascade": dataclasses.asdict(config), "masking": dataclasses.asdict(masking or MaskingConfig())}


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def steps_on_disk(run: Run) -> list[str]:
    return sorted(os.listdir(run.path / "checkpoints"))


@pytest.fixture
def config(tiny_cascade):
    return tiny_cascade()


@pytest.fixture
def run(tmp_path, config):
    values = described(config) | {"codec": {"name": "tiny", "fingerprint": "f" * 64}}
    return Run.create(tmp_path / "a run é", values)


# --- config and metrics -----------------------------------------------------------------------------------------------


def test_create_and_open_agree(run):
    opened = Run.open(run.path)
    assert opened.config == run.config  # create returns what JSON gives back, tuples as lists and all
    assert opened.config["versions"]["torch"] == torch.__version__
    assert opened.config["versions"]["commit"]
    assert not opened.has_checkpoint()


def test_create_moves_an_earlier_run_aside(run, config):
    run.save(1, seeded(config, 1), {}, is_best=True)
    run.log({"split": "train", "step": 1})
    (run.path / "figures").mkdir()
    second = Run.create(run.path, {"second": True})
    assert Run.open(run.path).config["second"]
    assert not second.has_checkpoint()
    assert second.metrics() == []
    assert steps_on_disk(second) == []
    assert (run.path / "figures").is_dir()  # what is not the run's own stays
    earlier = Run.open(run.path / "replaced")
    assert len(earlier.metrics()) == 1
    assert same_weights(load_model(earlier), seeded(config, 1))
    Run.create(run.path, {"third": True})
    assert Run.open(run.path / "replaced").config["second"]
    assert same_weights(
        load_model(Run.open(run.path / "replaced-1")), seeded(config, 1)
    )  # forgotten twice, still there


def test_a_kill_while_create_moves_the_earlier_run_never_mixes_them(run, config, monkeypatch):
    class Killed(BaseException):
        pass

    run.save(1, seeded(config, 1), {}, is_best=True)
    run.log({"split": "train", "step": 1})
    rename = os.rename

    def killed_after_the_first(source, to):
        rename(source, to)
        raise Killed

    monkeypatch.setattr(os, "rename", killed_after_the_first)
    with pytest.raises(Killed):
        Run.create(run.path, {"second": True})
    monkeypatch.setattr(os, "rename", rename)
    third = Run.create(run.path, {"third": True})
    assert not third.has_checkpoint()
    assert third.metrics() == []
    assert steps_on_disk(third) == []
    earlier = Run.open(run.path / "replaced")  # and what was left of the move has followed
    assert len(earlier.metrics()) == 1
    assert same_weights(load_model(earlier), seeded(config, 1))


@pytest.mark.parametrize("lost", ["removed", "dangling", "copied"])
def test_a_run_whose_links_were_lost_resumes_from_its_newest_checkpoint(begin, tmp_path, lost):
    """By a kill between a checkpoint and its links, or by a copy that followed them or did not."""
    run = begin("a")
    for step in (2, 3):
        take_steps(run, step, 5)
    for name in ("best", "last"):
        folder = (tmp_path / name).resolve()
        (tmp_path / name).unlink()
        if lost == "dangling":
            (tmp_path / name).symlink_to("checkpoints/step_00000002")
        elif lost == "copied":
            shutil.copytree(folder, tmp_path / name)
    run = begin("a")
    assert run.saved_step == 3
    take_steps(run, 4, 5)
    assert Run.open(tmp_path).saved_step == 4
    assert steps_on_disk(run) == ["step_00000004"]


def test_one_training_at_a_time_in_a_folder(tmp_path):
    """Another process is refused by the name of the first; one that was killed refuses nobody."""
    launcher = SimpleNamespace(
        is_main_process=True, main_process_first=contextlib.nullcontext, wait_for_everyone=lambda: None
    )

    def train() -> None:
        with Run.started(tmp_path, {"train": section(5, 0.1)}, launcher, resume=False, code=["a"]) as run:
            run.log({"step": 1})

    program = "import pathlib, sys; from lib.util.files import only_one\n"
    program += "with only_one(pathlib.Path(sys.argv[1])): print('in', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program, tmp_path / LOCK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "in\n"
        with pytest.raises(UserError, match=rf"process {other.pid} on {socket.gethostname()} is at work here; wait"):
            train()
        assert not (tmp_path / "config.json").exists()
        other.kill()
    train()
    train()
    assert len(Run.open(tmp_path / "replaced").metrics()) == 1


def test_a_full_disk_leaves_no_half_checkpoint(run, config, monkeypatch):
    run.save(1, seeded(config, 1), {}, is_best=True)
    write = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        write(path, content[:100])
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        run.save(2, seeded(config, 2), {}, is_best=True)
    assert steps_on_disk(run) == ["step_00000001"]
    assert same_weights(load_model(run), seeded(config, 1))


def test_create_in_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: cannot be written"):
        Run.create(tmp_path / "file", {})
    with pytest.raises(UserError, match="cannot be written"):
        Run.create("/proc/run", {})  # refuses root too


@pytest.mark.parametrize("content", ["{", "", "\xff\xfe", "[]", "3"])
def test_open_names_a_damaged_config(run, content):
    (run.path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"config\.json: damaged"):
        Run.open(run.path)


def test_open_names_a_folder_without_a_run(tmp_path, monkeypatch):
    """In full, so that a reader sees from which folder a relative path was taken."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"^{tmp_path}/none: no run here \(no config\.json\)"):
        Run.open("none")
    (tmp_path / "config.json").mkdir()
    with pytest.raises(UserError, match=r"config\.json: cannot be read"):
        Run.open(tmp_path)


@pytest.mark.parametrize("content", ['{"model_type": "encodec"}', '{"cascade": {}}', '{"masking": {}}'])
def test_another_programs_config_describes_no_model(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json: describes no model; give a run that this project trained"):
        load_model(Run.open(tmp_path))


def test_metrics_come_back_in_order_by_split(run):
    rows = [{"split": "train", "step": 1, "loss": 0.1}, {"split": "val", "step": 1, "loss": 1 / 3}]
    assert run.metrics() == []
    for row in rows:
        run.log(row)
    assert run.metrics() == rows  # floats exactly
    assert run.metrics("val") == rows[1:]
    assert run.metrics("test") == []


def test_non_finite_metrics_are_null_in_valid_json(run):
    run.log({"split": "train", "step": 1, "loss": math.nan, "grad_norm": math.inf, "other": 1.0})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    row = json.loads((run.path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert row == {"split": "train", "step": 1, "loss": None, "grad_norm": None, "other": 1.0}


@pytest.mark.parametrize("half", ['{"split": "tra', '{"split": "train", "step": 2}', "{"])
def test_a_half_written_last_line_is_left_out_and_repaired(run, half):
    run.log({"split": "train", "step": 1})
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write(half)
    assert run.metrics() == [{"split": "train", "step": 1}]
    run.forget_metrics_after(1)
    run.log({"split": "train", "step": 2, "again": True})
    assert run.metrics() == [{"split": "train", "step": 1}, {"split": "train", "step": 2, "again": True}]


def test_a_damaged_line_within_the_metrics_is_named(run):
    run.log({"split": "train", "step": 1})
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"split": "tra\n')
    run.log({"split": "train", "step": 3})
    with pytest.raises(UserError, match=r"metrics\.jsonl.*line 2"):
        run.metrics()


def test_forget_metrics_after(run):
    for step in (1, 2, 3):
        run.log({"split": "train", "step": step})
    run.log({"split": "val", "step": 2})
    run.forget_metrics_after(2)
    assert [(row["split"], row["step"]) for row in run.metrics()] == [("train", 1), ("train", 2), ("val", 2)]
    run.forget_metrics_after(0)
    assert run.metrics() == []


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_save_and_load_round_trip(run, config):
    model = seeded(config, 1)
    state = {"optimizer": {"lr": 1e-4, "exp_avg": torch.randn(3)}, "rng": torch.get_rng_state(), "best_loss": math.inf}
    run.save(7, model, state, is_best=True)
    opened = Run.open(run.path)
    for which in ("best", "last"):
        loaded = load_model(opened, which)
        assert same_weights(loaded, model)
        assert not any(module.training for module in loaded.modules())
        assert loaded.cascade.config == config
    other = seeded(config, 2)
    assert not same_weights(other, model)
    step, training = opened.load_training(other)
    assert step == 7
    assert same_weights(other, model)
    assert torch.equal(training["rng"], state["rng"])
    assert torch.equal(training["optimizer"]["exp_avg"], state["optimizer"]["exp_avg"])
    assert training["best_loss"] == math.inf


def test_weights_of_any_model_are_loaded_where_they_belong(tmp_path):
    run = Run.create(tmp_path, {"what": "a network of two layers"})
    first, second, other = (nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)) for _ in range(3))
    run.save(1, first, {}, is_best=True)
    run.save(2, second, {}, is_best=False)
    for which, expected in (("best", first), ("last", second)):
        other.train()
        assert not same_weights(other, expected)
        assert Run.open(tmp_path).load_weights(other, which) is None
        assert same_weights(other, expected)
        assert not any(module.training for module in other.modules())
    with pytest.raises(UserError, match=r"unknown 0\.bias"):
        run.load_weights(nn.Sequential(nn.Linear(3, 2, bias=False), nn.BatchNorm1d(2)))
    (tmp_path / "last" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="truncated or changed"):
        run.load_weights(other, "last")


@pytest.mark.parametrize("masking", [MaskingConfig("wide"), MaskingConfig("learned")])
def test_the_masks_come_back_with_the_model(tmp_path, config, masking):
    run = Run.create(tmp_path, described(config, masking))
    model = seeded(config, 1, masking)
    run.save(1, model, {}, is_best=True)
    loaded = load_model(Run.open(tmp_path))
    assert loaded.masking == masking
    assert same_weights(loaded, model)
    clips = torch.randn(2, 3, 8, 12)
    for a, b in zip(loaded(*clips).masks, model(*clips).masks, strict=True):
        assert torch.equal(a, b)


def test_a_masking_of_other_fields_is_refused(run, config):
    run.save(1, seeded(config, 1), {}, is_best=True)
    for masking, words in (
        ({"masking": "none", "colour": 1}, r"config\.json: colour is unknown; choose from masking"),
        ({}, r"config\.json: MaskingConfig lacks the field masking"),
        (
            {"masking": "energy", "restore_rms": True, "root": 1},  # which an older version had
            r"config\.json: masking='energy' is not allowed; use one of none, learned, wide$",
        ),
    ):
        with pytest.raises(UserError, match=words):
            load_model(Run(run.path, run.config | {"masking": masking}))
    learned = {"masking": "learned", "restore_rms": True, "root": 1}
    with pytest.raises(UserError, match=r"does not fit this model: missing mask_generator\."):
        load_model(Run(run.path, run.config | {"masking": learned}))


def test_best_and_last_point_and_the_rest_is_deleted(run, config):
    for step, is_best in ((1, True), (2, False), (3, True), (4, False), (5, False)):
        run.save(step, seeded(config, step), {}, is_best=is_best)
        best = {1: 1, 2: 1}.get(step, 3)
        assert steps_on_disk(run) == [f"step_{s:08d}" for s in sorted({best, step})]
        assert same_weights(load_model(run, "best"), seeded(config, best))
        assert same_weights(load_model(run, "last"), seeded(config, step))
    assert not os.path.isabs(os.readlink(run.path / "best"))
    moved = run.path.rename(run.path.with_name("moved"))  # links are relative: a run can be moved or copied
    assert same_weights(load_model(Run.open(moved), "best"), seeded(config, 3))


def test_before_the_first_best_only_last_is_kept(run, config):
    run.save(1, seeded(config, 1), {}, is_best=False)
    run.save(2, seeded(config, 2), {}, is_best=False)
    assert steps_on_disk(run) == ["step_00000002"]
    with pytest.raises(UserError, match="best: no checkpoint here"):
        load_model(run, "best")


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


def kill_at(monkeypatch, call: int) -> list[str]:
    """Let `Run.save` die just before its n-th change of the disk; the list names the changes that it came to."""
    calls: list[str] = []

    def counted(module, name):
        real = getattr(module, name)

        def wrapper(*args, **kwargs):
            calls.append(name)
            if len(calls) == call:
                raise Killed
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, wrapper)

    run = lib.training.run
    for module, name in (
        (run, "fsync"), (os, "rename"), (os, "replace"), (run.Path, "mkdir"), (run.Path, "write_bytes"),
        (run.Path, "write_text"), (run.Path, "symlink_to"), (torch, "save"), (run.shutil, "rmtree"),
    ):  # fmt: skip
        counted(module, name)
    return calls


def test_a_kill_at_any_moment_of_a_save_leaves_complete_checkpoints(tmp_path, config, monkeypatch):
    """Both pointers name a whole checkpoint, and `best` is never older than what `last` knows to be best."""
    models = {step: seeded(config, step) for step in (1, 2, 3)}
    call, died = 0, True
    while died:
        call += 1
        run = Run.create(tmp_path / str(call), described(config))
        run.save(1, models[1], {"best_step": 1}, is_best=True)
        with monkeypatch.context() as patch:
            calls = kill_at(patch, call)
            try:
                run.save(2, models[2], {"best_step": 2}, is_best=True)
                died = False
            except Killed:
                pass
        again = Run.open(run.path)
        model = seeded(config, 9)
        step, training = again.load_training(model)
        assert same_weights(model, models[step]), calls
        best = load_model(again, "best")
        assert same_weights(best, models[1]) or same_weights(best, models[2]), calls
        if training["best_step"] == 2:  # resumes from step 2, and will not call it best once more
            assert same_weights(best, models[2]), calls
        again.save(3, models[3], {"best_step": 3}, is_best=True)  # clears up what the kill left
        assert steps_on_disk(again) == ["step_00000003"], calls
        assert same_weights(load_model(again, "last"), models[3])
    assert call > 12  # it was killed at every one of these
    assert {"fsync", "rename", "replace", "symlink_to", "save", "rmtree"} <= set(calls)


def test_a_file_is_on_disk_before_it_gets_its_name(run, config, monkeypatch):
    calls = kill_at(monkeypatch, -1)
    run.save(1, seeded(config, 1), {}, is_best=True)
    assert calls.index("rename") > max(i for i, name in enumerate(calls[: calls.index("rename")]) if name == "fsync")
    assert calls[: calls.index("rename")].count("fsync") == 4  # three files and their folder


def test_saving_the_same_step_again_keeps_the_file_that_is_there(run, config):
    run.save(1, seeded(config, 1), {}, is_best=False)
    run.save(1, seeded(config, 1), {}, is_best=True)
    assert steps_on_disk(run) == ["step_00000001"]
    assert same_weights(load_model(run, "best"), seeded(config, 1))


@pytest.mark.parametrize("damaged", ["last/training.pt", "last/model.safetensors", "metrics.jsonl"])
def test_a_damaged_run_that_is_refused_stays_as_it_is(begin, tmp_path, damaged):
    run = begin("a")
    run.log({"split": "train", "step": 1})
    take_steps(run, 1, 5)
    (tmp_path / damaged).write_bytes(b"{\n" + (tmp_path / damaged).read_bytes()[:100])
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(UserError, match=Path(damaged).name.replace(".", r"\.")):
        begin("b")  # other code would be noted in config.json
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_full_disk_on_resuming_is_one_line(begin, monkeypatch):
    take_steps(begin("a"), 1, 5)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(
        UserError, match=r"config\.json: cannot be written \(No space left on device\); make room there"
    ):
        begin("b")


def test_a_folder_that_safetensors_cannot_open_is_named(run, config):
    run.save(1, seeded(config, 1), {}, is_best=True)
    odd = run.path.with_name(os.fsdecode(b"r\xe9n"))
    os.rename(run.path, odd)
    with pytest.raises(UserError, match="a folder whose name is not UTF-8; rename that folder"):
        Run.open(odd).load_weights(seeded(config, 2))


@pytest.mark.parametrize("name", ["model.safetensors", "training.pt", "meta.json"])
@pytest.mark.parametrize("damage", ["truncated", "changed", "empty", "missing"])
def test_damaged_checkpoints_are_refused_by_name(run, config, name, damage):
    run.save(1, seeded(config, 1), {"rng": torch.get_rng_state()}, is_best=True)
    path = run.path / "checkpoints" / "step_00000001" / name
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "changed":
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    with pytest.raises(UserError) as error:
        run.load_training(seeded(config, 2))
    assert "last" in str(error.value)
    assert "\n" not in str(error.value)
    assert name in str(error.value) or (name, damage) == ("meta.json", "missing")
    if name == "model.safetensors":
        with pytest.raises(UserError, match=r"best/model\.safetensors: truncated or changed"):
            load_model(run)


def test_the_weights_hash_is_that_of_their_file(run, config):
    for step in (1, 2):
        run.save(step, seeded(config, step), {"step": step}, is_best=step == 1)
    found = {which: Run.open(run.path).weights_sha256(which) for which in ("best", "last")}
    for which, sha256 in found.items():
        assert sha256 == hashlib.sha256((run.path / which / "model.safetensors").read_bytes()).hexdigest()
    assert found["best"] != found["last"]
    assert run.weights_sha256() == found["best"]


def test_the_weights_hash_is_verified(run, config):
    with pytest.raises(UserError, match="best: no checkpoint here"):
        run.weights_sha256()
    run.save(1, seeded(config, 1), {}, is_best=True)
    (run.path / "best" / "training.pt").unlink()  # which is none of the weights
    whole = run.weights_sha256()
    path = run.path / "best" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"best/model\.safetensors: truncated or changed"):
        run.weights_sha256()
    content[-1] ^= 1
    path.write_bytes(content)
    assert run.weights_sha256() == whole


@pytest.mark.parametrize(
    "meta", ["[]", "{}", '{"step": 1, "sha256": {}}', '{"step": 1, "sha256": null}', '{"step": "1"}']
)
def test_a_meta_file_without_its_fields_is_damaged(run, config, meta):
    run.save(1, seeded(config, 1), {}, is_best=True)
    (run.path / "best" / "meta.json").write_text(meta)
    with pytest.raises(UserError, match=r"meta\.json: damaged"):
        load_model(run)


def test_damage_to_the_optimizer_does_not_stop_listening(run, config):
    run.save(1, seeded(config, 1), {}, is_best=True)
    (run.path / "best" / "training.pt").unlink()
    assert same_weights(load_model(run), seeded(config, 1))


def test_a_checkpoint_of_another_config_lists_what_does_not_fit(run, config, tiny_cascade):
    run.save(1, seeded(config, 1), {}, is_best=True)
    for other, problem in (
        (tiny_cascade(3), r"missing cascade\.stages\.2\..* and \d+ more"),
        (tiny_cascade(1), r"unknown cascade\.stages\.1\."),
        (tiny_cascade(2, ffn_mult=3), r"ffn_in\.weight is \[32, 16\] instead of \[48, 16\]"),
    ):
        with pytest.raises(UserError, match=rf"model\.safetensors: does not fit this model: .*{problem}"):
            run.load_training(seeded(other, 1))


def test_load_weights_refuses_other_files(tmp_path, config):
    (tmp_path / "x.safetensors").write_bytes(b"hello")
    with pytest.raises(UserError, match=r"x\.safetensors: not a readable safetensors file"):
        load_weights(seeded(config, 1), tmp_path / "x.safetensors")


def test_a_run_of_another_codec_is_refused(run, config):
    run.save(1, seeded(config, 1), {}, is_best=True)
    load_model(run, codec_fingerprint="f" * 64)
    with pytest.raises(UserError, match=r"'tiny'.*use that codec"):
        load_model(run, codec_fingerprint="0" * 64)


def test_a_pickle_that_would_run_code_is_refused_even_with_its_checksum(run, config, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "marker"),)

    run.save(1, seeded(config, 1), {"optimizer": Evil()}, is_best=True)
    with pytest.raises(UserError, match=r"training\.pt: refused, because loading it would run code"):
        run.load_training(seeded(config, 1))
    assert not (tmp_path / "marker").exists()


def test_a_full_disk_leaves_the_last_checkpoint(run, config, monkeypatch):
    run.save(1, seeded(config, 1), {}, is_best=True)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match="No space"):
            run.save(2, seeded(config, 2), {}, is_best=True)
    assert same_weights(load_model(run, "last"), seeded(config, 1))


def test_differing_fields_come_with_both_values():
    a = {"train": {"lr": 1e-4, "loss": {"weight": 0.3}}, "stages": [{"clamp": [1, 2]}, {"clamp": None}], "gone": "x"}
    b = {"train": {"lr": 1e-3, "loss": {"weight": 0.3}}, "stages": [{"clamp": (1, 3)}, {"clamp": None}], "new": False}
    assert differing_fields(a, b) == [
        ("gone", "x", None),
        ("new", None, False),
        ("stages[0].clamp", [1, 2], [1, 3]),
        ("train.lr", 1e-4, 1e-3),
    ]
    assert differing_fields(a, a) == []
    tuples = {"stages": ({"clamp": (1, 2)}, {"clamp": None})}
    assert differing_fields({"stages": a["stages"]}, tuples) == []  # JSON knows lists only
    assert differing_fields({"x": [1]}, {"x": [1, 2]}) == [("x", [1], [1, 2])]
    assert differing_fields({"x": {"y": 1}}, {"x": 2}) == [("x", None, 2), ("x.y", 1, None)]
    masks = MaskingConfig("learned"), MaskingConfig("wide")
    assert differing_fields(masks[0], dataclasses.asdict(masks[1])) == [("masking", "learned", "wide")]


# --- which runs there are ---------------------------------------------------------------------------------------------


def test_find_runs_lists_the_trained_ones_of_a_codec(tmp_path, config):
    codec = {"codec": {"name": "tiny", "fingerprint": "f" * 64}}
    for name in ("b", "a é"):
        Run.create(tmp_path / name, described(config) | codec).save(1, seeded(config, 1), {}, is_best=True)
    Run.create(tmp_path / "untrained", described(config) | codec)
    Run.create(tmp_path / "not validated yet", described(config) | codec).save(1, seeded(config, 1), {}, is_best=False)
    other = described(config) | {"codec": {"name": "other", "fingerprint": "0" * 64}}
    for name, values in (("another codec", other), ("no codec", described(config)), ("no model", codec)):
        Run.create(tmp_path / name, values).save(1, seeded(config, 1), {}, is_best=True)
    Run.create(tmp_path / "deeper" / "run", described(config) | codec).save(1, seeded(config, 1), {}, is_best=True)
    contents = {"damaged": "{", "list": "[]", "foreign": '{"codec": "h264"}', "null": '{"codec": null}'}
    for name, content in contents.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(content)
    (tmp_path / "folder" / "config.json").mkdir(parents=True)
    (tmp_path / "config.json").write_text("{}")
    found = find_runs(tmp_path, "f" * 64)
    assert list(found) == ["a é", "b"]
    for name, run in found.items():
        assert run.path == tmp_path / name
        assert same_weights(load_model(run, codec_fingerprint="f" * 64), seeded(config, 1))
    assert list(find_runs(tmp_path, "0" * 64)) == ["another codec"]
    assert find_runs(tmp_path / "nowhere", "f" * 64) == {}


def test_the_stop_file_is_in_the_runs_folder_and_goes_to_no_other_run(run):
    assert run.stop_file.parent == run.path
    assert not run.stop_file.exists()
    run.stop_file.touch()
    assert Run.open(run.path).stop_file.exists()


def section(max_steps: int, rate: float) -> dict:
    """A config's section 'train'."""
    return dict.fromkeys(LENGTH + WITHOUT_EFFECT) | {"max_steps": max_steps, "rate": rate}


@pytest.fixture
def begin(tmp_path, caplog):
    """`begin(*code, **fields of its config)`: start or resume a run that is measured to be 1, its length free."""

    def start(*code, resume=True, **changes) -> Run:
        caplog.clear()
        config = {"train": section(5, 0.1), "sizes": {"width": 2, "mean": 1.0}} | changes
        return Run.start(tmp_path, config, resume=resume, code=list(code), measured=["sizes.mean"])

    return start


def take_steps(run: Run, step: int, total: int) -> None:
    run.plan(total)
    run.save(step, nn.Linear(1, 1), {}, is_best=True)


def test_a_finished_run_by_other_code_is_not_reused(begin, caplog, tmp_path):
    take_steps(begin("a"), 5, 5)
    assert begin("a").saved_step == 5
    assert not caplog.records
    run = begin("b")
    assert not run.has_checkpoint()
    assert Run.open(tmp_path).config["code"] == ["b"]
    assert json.loads((tmp_path / "replaced" / "config.json").read_text())["code"] == ["a"]
    assert "was trained by other code and is trained again" in caplog.text
    take_steps(run, 5, 5)
    assert begin("b", train=section(9, 0.1)).saved_step == 5  # longer, by the same code
    begin("c")
    kept = {
        name: json.loads((tmp_path / name / "config.json").read_text())["code"] for name in ("replaced", "replaced-1")
    }
    assert kept == {"replaced": ["b"], "replaced-1": ["a"]}  # nothing that was trained to its end is deleted
    assert not begin("c", train=section(9, 0.1)).has_checkpoint()


def test_an_unfinished_run_by_other_code_is_resumed_and_not_reused_when_finished(begin, caplog, tmp_path):
    take_steps(begin("a"), 3, 5)
    run = begin("b", train=section(6, 0.1))
    assert run.saved_step == 3
    assert "was started by other code; it resumes" in caplog.text
    assert Run.open(tmp_path).config == run.config
    assert (run.config["train"], run.config["code"]) == (section(6, 0.1), ["a", "b"])
    assert begin("b").saved_step == 3
    assert not caplog.records  # said once
    take_steps(run, 5, 5)
    assert not begin("b").has_checkpoint()
    assert Run.open(tmp_path).config["code"] == ["b"]


@pytest.mark.parametrize("step", [3, 5])
def test_a_run_of_unknown_code_is_by_other_code(begin, tmp_path, step):
    take_steps(Run.create(tmp_path, {"train": section(5, 0.1), "sizes": {"width": 2, "mean": 1.0}}), step, 5)
    assert begin("a").config["code"] == (["a"] if step == 5 else ["unknown", "a"])


@pytest.mark.parametrize("step", [3, 5])
def test_what_was_measured_by_other_code_may_differ_and_nothing_else(begin, tmp_path, step):
    take_steps(begin("a"), step, 5)
    other = {"width": 2, "mean": 1.5}
    with pytest.raises(UserError, match=r"another config \(sizes\.mean: 1\.0 → 1\.5\)"):
        begin("a", sizes=other)
    for fields in ({"sizes": {"width": 3, "mean": 1.5}}, {"train": section(5, 0.2)}):
        with pytest.raises(UserError, match="another config"):
            begin("b", **fields)
        assert Run.open(tmp_path).config["code"] == ["a"]
    assert not begin("b", sizes=other).has_checkpoint()


def test_what_was_measured_may_differ_by_rounding_and_stays_as_it_was(begin, tmp_path):
    take_steps(begin("a"), 3, 5)
    run = begin("a", sizes={"width": 2, "mean": 1.0 + 1e-6})
    assert run.saved_step == 3
    assert Run.open(tmp_path).config["sizes"] == run.config["sizes"] == {"width": 2, "mean": 1.0}
    with pytest.raises(UserError, match="another config"):
        begin("a", sizes={"width": 2 + 1e-6, "mean": 1.0})


def test_a_section_that_is_none_is_another_config(begin, tmp_path):
    (begin("a").path / "config.json").write_text(
        json.dumps({"code": ["a"], "train": 1e308, "sizes": {"width": 2, "mean": 1.0}})
    )
    with pytest.raises(UserError, match="another config"):
        begin("a")


def test_a_run_says_where_its_training_ends_and_what_is_saved(tmp_path):
    run = Run.create(tmp_path / "run", {})
    assert (run.total_steps, run.saved_step) == (None, None)
    run.plan(40)
    (run.path / "last").mkdir()
    (run.path / "last" / "meta.json").write_text('{"step": 12}')
    assert (run.total_steps, run.saved_step) == (40, 12)
    for damage in ("", "[]", "{}", '{"step": null, "total_steps": "many"}'):  # read while others write
        (run.path / "plan.json").write_text(damage)
        (run.path / "last" / "meta.json").write_text(damage)
        assert (run.total_steps, run.saved_step) == (None, None)
