"""The plan of a training: memory against what a step takes here, and what is said; and the checks of a machine."""

import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flops import training_flops
from torch.utils.flop_counter import FlopCounterMode

import lib.plan
from lib.codec.mdct import MdctCodec
from lib.plan import (
    GIB,
    GPUS,
    UNKNOWN,
    Checks,
    Cost,
    check_finite,
    costs_of,
    in_words,
    largest_difference,
    main,
    planned_names,
    random_encodec,
)
from lib.presets import load_preset
from lib.project import ROOT
from lib.util.errors import UserError

# one step, or two, in a process whose allocator gives back what is free: what it took beyond what the process had
STEPS = """
import ctypes, dataclasses, gc, json, sys, torch
from accelerate import Accelerator
from lib.codec.codec import load_codec
from lib.model.fusion import FusionModel
from lib.plan import random_encodec
from lib.presets import load_preset
from lib.training.fusion_learner import FusionLearner
from lib.training.learner import StepInfo

torch.set_num_threads(1)
preset = load_preset(sys.argv[1], json.loads(sys.argv[3]))
codec = random_encodec() if preset.codec == "encodec" else load_codec(preset.codec)

def train(frames, batch_size, steps):
    cascade = dataclasses.replace(preset.model.cascade, latent_dim=codec.dim)
    model = FusionModel(cascade, preset.model.masking)
    learner = FusionLearner(preset.train, model, Accelerator(cpu=True), codec)
    clips = tuple(5 * torch.randn(2, batch_size, codec.dim, frames))
    for step in range(steps):
        float(learner.train_step([clips], StepInfo(step))["loss"])

def kibibytes(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

train(40, 1, 1)
gc.collect()
ctypes.CDLL("libc.so.6").malloc_trim(0)
before = kibibytes("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
train(round(preset.data.clip_seconds * 75), int(sys.argv[2]), 2)
print(1024 * (kibibytes("VmHWM") - before))
"""


TWO_STAGES = {"model.num_stages": 2, "model.masking.masking": "none"}
PLANNED = {
    "demo": ("demo", 8, {}),
    "reference": ("reference", 4, {}),
    "half": ("reference", 4, {"train.precision": "bf16"}),
    "stages": ("demo", 2, TWO_STAGES),
    "stages, twice": ("demo", 4, TWO_STAGES),
    "full": ("full", 2, {"codec": "encodec", "train.precision": "bf16", "data.clip_seconds": 2.0}),
}


def changes_of(name: str) -> dict[str, Any]:
    return {"codec": "mdct", "train.precision": "fp32"} | PLANNED[name][2]


@pytest.fixture(scope="module")
def planned() -> dict[str, Cost]:
    """All in one process, as starting one takes longer than a plan."""
    steps = []
    for name, (preset, size, _) in PLANNED.items():
        codec = random_encodec() if changes_of(name)["codec"] == "encodec" else MdctCodec()
        steps.append((load_preset(preset, changes_of(name)), codec, size))
    return dict(zip(PLANNED, costs_of(steps), strict=True))


@pytest.mark.parametrize("name", ["demo", "reference", "full"])
def test_the_planned_memory_is_what_a_step_takes(planned, name):
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", STEPS, name, str(PLANNED[name][1]), json.dumps(changes_of(name))]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    cost = planned[name]
    assert cost.peak == pytest.approx(int(done.stdout), rel=0.15)
    assert cost.optimizer == pytest.approx(2 * cost.gradients, rel=0.01)  # Adam's two averages
    assert cost.weights + cost.optimizer + cost.model + cost.sound < 1.1 * cost.peak


def test_operations_and_activations_grow_with_the_batch_and_match_the_count_by_hand(planned):
    one, two = planned["stages"], planned["stages, twice"]
    assert two.model_flops == pytest.approx(2 * one.model_flops, rel=0.05)  # but for the projections' alignment
    assert two.model == pytest.approx(2 * one.model, rel=0.1)
    assert (two.weights, two.gradients, two.optimizer) == (one.weights, one.gradients, one.optimizer)
    cascade = load_preset("demo", TWO_STAGES).model.cascade
    assert two.model_flops == pytest.approx(4 * training_flops(cascade, 300), rel=0.1)


def test_half_precision_takes_less_for_activations(planned):
    assert 0.5 < planned["half"].model / planned["reference"].model < 0.9
    assert planned["half"].model_flops == planned["reference"].model_flops


def test_what_is_said_follows_from_the_counts(monkeypatch):
    tera, counts = 10**12, {"weights": GIB, "gradients": GIB, "optimizer": 2 * GIB, "model": 4 * GIB, "sound": 2 * GIB}
    costs = [Cost(**counts, peak=peak * GIB, model_flops=989 * tera, sound_flops=495 * tera) for peak in (10, 16)]
    monkeypatch.setattr(lib.plan, "costs_of", lambda _: costs)
    preset = load_preset("full", {"codec": "mdct"})  # batch size 8, so 0.75 GiB a clip and 4 GiB for the rest
    said = "\n".join(in_words(preset, MdctCodec(), "h100", 8_000, share=0.5))
    assert "at most 10.00 GiB at once" in said
    assert "24 GiB: batch size 24, 40 GiB: batch size 43, 80 GiB: batch size 92, in 92% of each" in said
    assert "4.000 s at 50.00% of the peak" in said
    assert "8,000 pairs, 200,000 steps: 222.2 h on one GPU, 27.8 h on eight" in said
    assert "at most 9.8 GB" in said
    changed = {"train.max_steps": 900, "train.max_train_pairs": 1_600, "train.accumulate": 2}
    said = "\n".join(in_words(load_preset("full", {"codec": "mdct"} | changed), MdctCodec(), "h100", 8_000, share=0.5))
    assert "1,600 pairs, 900 steps: 2.0 h on one GPU, 2.0 h on eight" in said
    assert "8.000 s at 50.00% of the peak" in said
    full = [cost._replace(peak=100 * GIB + cost.peak) for cost in costs]
    monkeypatch.setattr(lib.plan, "costs_of", lambda _: full)
    assert "24 GiB: batch size 0" in "\n".join(in_words(preset, MdctCodec(), "h100", 8_000, share=0.5))


def test_in_float32_matrix_products_take_longer():
    cost = Cost(0, 0, 0, 0, 0, 0, model_flops=67 * 10**12, sound_flops=495 * 10**12)
    assert GPUS["h100"].seconds(cost, half=False) == pytest.approx(2)
    assert GPUS["h100"].seconds(cost, half=True) == pytest.approx(1 + 67 / 989)


def test_an_lstm_counts():
    layers = torch.nn.LSTM(512, 512, num_layers=2)
    with FlopCounterMode(display=False, custom_mapping=UNKNOWN) as forward:
        output, _ = layers(torch.randn(75, 1, 512))
    by_hand = 2 * 75 * 2 * (4 * 512) * (512 + 512)
    assert forward.get_total_flops() == by_hand
    with FlopCounterMode(display=False, custom_mapping=UNKNOWN) as backward:
        output.sum().backward()
    assert backward.get_total_flops() == 2 * by_hand


def test_the_command_plans_and_names_what_it_plans_for(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plan", "--preset=smoke", "--codec=encodec", "--gpu=l4"])  # no weights needed
    main()
    said = capsys.readouterr().out
    assert said.startswith("smoke, codec encodec, clips of 2 s, batch size 4, l4")
    assert len(said.splitlines()) == 7


@pytest.mark.parametrize("wrong", ["--training-pairs=0", "--share=0", "--share=1.5", "--gpu=abacus", "--set=a.b=1"])
def test_wrong_options_are_refused_at_once(wrong, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plan", "--preset=smoke", wrong])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert wrong.lstrip("-").partition("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("card", "names"),
    [
        ("NVIDIA H100 80GB HBM3", ["h100"]),
        ("NVIDIA H200", ["h200"]),
        ("NVIDIA A100-SXM4-40GB", ["a100", "a100-40"]),
        ("NVIDIA L4", ["l4"]),
        ("NVIDIA L40S", ["l40s"]),
        ("NVIDIA GeForce RTX 4090", ["rtx4090"]),
        ("NVIDIA RTX A6000", []),
    ],
)
def test_a_card_is_known_by_its_name(card, names):
    assert planned_names(card) == names


def checks_for(gpu: str) -> Checks:
    checks = Checks.__new__(Checks)
    checks.planned_for, checks.device = gpu, torch.device("cuda")
    return checks


def test_a_plan_for_another_card_is_refused(monkeypatch):
    found = SimpleNamespace(name="NVIDIA L4", total_memory=22 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert checks_for("l4").gpu() == "1 of NVIDIA L4, 22 GiB"
    with pytest.raises(UserError, match=r"NVIDIA L4: is not what is planned for; name it by --gpu l4"):
        checks_for("h100").gpu()


@pytest.mark.parametrize(
    ("gpus", "count", "where"), [(0, 2, "CPU"), (1, 2, "CPU"), (2, 2, "GPUs"), (6, 4, "GPUs"), (16, 8, "GPUs")]
)
def test_as_many_processes_are_tried_as_there_are_gpus(monkeypatch, gpus, count, where):
    asked = []

    def trained(out, steps, *options, by=(), **environment):
        asked.append((options, by, environment))
        return [1.0] * steps

    monkeypatch.setattr(lib.plan, "trained", trained)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert checks_for("h100").processes() == f"losses of {count} on the {where} differ from one's by 0e+00 at most"
    (alone, by, on), (together, torchrun, also_on) = asked
    assert (alone, together) == (("--set=train.batch_size=8",), (f"--set=train.batch_size={8 // count}",))
    assert by == ()
    assert f"--nproc_per_node={count}" in torchrun
    assert on == also_on == ({"CUDA_VISIBLE_DEVICES": ""} if where == "CPU" else {})


@pytest.mark.parametrize("others", [[2.0, 1.01], [2.0, math.nan]])
def test_other_losses_are_a_failure(others):
    assert largest_difference([2.0, 1.0], [2.0, 1.0]) == 0
    with pytest.raises(UserError, match="relative differences of losses"):
        largest_difference([2.0, 1.0], others)


def test_what_is_not_finite_or_was_not_timed_is_a_failure():
    with pytest.raises(UserError, match="vae loss=nan"):
        check_finite({"vae grad_norm": torch.tensor(1.0), "vae loss": torch.tensor(math.nan)})
    checks = Checks.__new__(Checks)
    checks.seconds = math.nan
    with pytest.raises(UserError, match="the fusion step must succeed"):
        checks.throughput()


def test_the_checks_run_and_say_what_fails():
    """Here there is no GPU, which is one failure; all else works."""
    done = subprocess.run(
        [sys.executable, "-m", "lib.plan", "--preset", "smoke", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 1, done.stderr
    assert "FAILED" in lines[0]
    assert "sees no GPU; install a driver for CUDA" in lines[0]
    assert len(lines) == 7
    assert all("ok" in line and "FAILED" not in line for line in lines[1:]), done.stdout
    assert "resume: losses differ by 0e+00 at most" in done.stdout
