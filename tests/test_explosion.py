"""The experiments on what ends a training: their data, what they have in common, and what is read off their runs."""

import dataclasses
import json
import math

import explosion
import pytest
import torch
from explosion import (
    Experiment,
    by_the_data,
    cause_rows,
    death_rows,
    expected_rms,
    experiments,
    largest_error,
    of_size,
    run,
    signs,
    silence,
    slim,
)
from lab.test_audit import result
from settings import settings_of
from torch import nn

from lib.audio.files import load_audio, save_audio
from lib.codec.mdct import MdctCodec
from lib.data.latents import LatentPairs, encode_manifest
from lib.data.pairs import build_manifest
from lib.lab.results import Result, final, growth, last_projection_share, nearer, peak
from lib.lab.variants import CAUSES, EXPLODING
from lib.model.cascade import StageConfig
from lib.model.projection import SpectralLinear
from lib.presets import load_preset

SIZE = settings_of(load_preset("demo")).explosion


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Eight songs of noise, of which one begins with 0.6 s of silence; clips of a second; all kinds of data."""
    music = tmp_path_factory.mktemp("music")
    for folder in (explosion.ELECTRONIC, "songs"):
        (music / folder).mkdir()
        for i in range(8):
            wav = 0.1 * torch.randn(1, 4 * 24_000, generator=torch.Generator().manual_seed(i))
            if folder == explosion.ELECTRONIC and i == 3:
                wav[:, : round(0.6 * 24_000)] = 0
            save_audio(music / folder / f"{i}.wav", wav)
    return music, explosion.prepare(music, music / "songs", music / "latents")


def training(index) -> LatentPairs:
    return LatentPairs(index, "train")


def silent(index) -> list[bool]:
    pairs = training(index)
    return [max(map(silence, pairs[i])) >= 38 for i in range(len(pairs))]


def test_silence_is_taken_away_and_put_in(data):
    _, indices = data
    assert not any(silent(indices["loops without silence"]))
    assert not any(silent(indices["songs"]))
    assert sum(silent(indices["songs and silence"])) == 1
    taken = len(training(indices["loops"])) - len(training(indices["loops without silence"]))
    assert taken == sum(silent(indices["loops"]))
    assert len(training(indices["songs"])) == len(training(indices["songs and silence"]))


def test_silent_pairs_are_counted(data):
    _, indices = data
    silences = {name: explosion.silences_of(index) for name, index in indices.items()}
    rows = {row["data"]: row["silent for 0.5 s"] for row in explosion.silence_rows(silences)}
    assert rows == {name: sum(silent(index)) for name, index in indices.items()}
    assert rows["songs and silence"] == 1


def test_the_longest_silence_is_counted():
    latents = torch.ones(4, 9)
    assert silence(latents) == 0
    latents[:, 2:5] = latents[:, 6] = 0
    latents[1, 7:] = 0
    assert silence(latents) == 3


def test_every_cell_meets_every_condition():
    grid = [e for e in experiments(SIZE) if e.name == "grid"]
    conditions = {(e.data, e.rate, e.clip) for e in grid}
    assert len(conditions) == len(grid) == 8
    assert all(e.variants == tuple(CAUSES.values()) for e in grid)
    for e in grid:
        plan = e.plan()
        assert (plan.seeds, plan.train.max_steps >= 3 * 205, plan.train.loss.guarded) == (5, True, False)


def test_an_experiment_differs_in_one_thing_from_what_it_is_compared_with():
    kinds = {}
    for e in experiments(SIZE):
        kinds.setdefault(e.name, set()).add((e.data, e.guarded, e.window))
    assert kinds == {
        "windows": {("loops", False, 0.5), ("songs", False, 0.5)},
        "operation taken away": {("loops", True, 0.5)},
        "pairs taken away": {("loops without silence", False, 0.5)},
        "pair put in": {("songs and silence", False, 0.5)},
        "pair put in, operation taken away": {("songs and silence", True, 0.5)},
        "weak residual": {("loops", True, None)},
        "law": {("loops", True, None)},
        "protections": {("loops", False, None)},
        "longer": {("loops", False, None)},
        "grid": {("loops", False, None), ("songs", False, None)},
    }
    assert set(explosion.JUDGED) == {"weak residual", "protections", "longer"}
    assert explosion.PAIRS["train"] == 205 * next(experiments(SIZE)).plan().train.batch_size


def test_runs_whose_norms_stay_below_the_clip_are_not_repeated(monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(explosion, "run_plan", lambda plan, *_: given.append([v.name for v in plan.variants]) or ())
    first = next(e for e in experiments(SIZE) if e.name == "grid")
    small, large, broken = first.variants[:3]
    unclipped = [of(small, (1.0, 9.9)), of(large, (1.0, 10.1)), of(broken, (1.0, math.inf))]
    e = first._replace(variants=(small, large, broken), clip=10.0)
    assert run(e, tmp_path, tmp_path, unclipped) == (unclipped[0],)
    assert given == [[large.name, broken.name]]
    run(first._replace(variants=(small, large)), tmp_path, tmp_path, [])
    assert given[-1] == [small.name, large.name]


def of(variant, norms, seed: int = 0, **more) -> Result:
    return dataclasses.replace(result(EXPLODING, seed, **more), variant=variant.name, grad_norm=norms)


# --- what is read off the runs ----------------------------------------------------------------------------------------


SOUND = explosion.variants(explosion.ON_SOUND[:1])


def logged(folder, norms, *, seed: int, dead: bool, copying: float = 2.0) -> Result:
    """A run of a correlating variant with these gradient norms, which ends in a NaN if `dead`."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    row = {"split": "train", "sign/copying": copying, "sign/flatness": 2.0, "sign/gradient_share": 0.1}
    row |= {"stage0/target_scale": 1.2, "stage1/target_scale": 1.0}
    lines = [json.dumps(row | {"step": i + 1, "grad_norm": norm}) for i, norm in enumerate(norms)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    changes = {"variant": explosion.ON_SOUND[0], "run": str(folder), "seed": seed, "non_finite": None}
    if dead:
        changes["non_finite"] = {"step": len(norms) + 1, "stage": None, "tensor": "loss"}
    return dataclasses.replace(result(EXPLODING, seed), **changes)


def test_a_limit_is_set_on_some_seeds_and_judged_on_others(tmp_path):
    """The healthy runs of seeds 0 and 1 reach a norm of 5; of the others one reaches 6, and the dead one 7, 3 steps
    before its end."""
    runs = [logged(tmp_path / str(seed), [1, 5, 1], seed=seed, dead=False) for seed in (0, 1)]
    runs += [
        logged(tmp_path / "2", [1, 6, 1], seed=2, dead=False),
        logged(tmp_path / "3", [1, 1, 1], seed=3, dead=False),
    ]
    runs.append(logged(tmp_path / "4", [1, 7, 1, 1], seed=4, dead=True))
    done = [
        (Experiment("grid", "loops", SOUND), tuple(runs)),
        (Experiment("grid", "loops", SOUND, guarded=True), tuple(runs)),
    ]
    rows = {(row["measurement"], row["limit"]): row for row in signs(done)}
    norm = rows["gradient norm", "5"]
    assert (norm["false alarms"], norm["announced"]) == ("1 of 2 healthy runs", "1 of 1 deaths")
    assert norm["steps before"] == "3.00"
    seeds = rows["gradient norm", "100 (C15)"]
    assert (seeds["false alarms"], seeds["announced"]) == ("0 of 2 healthy runs", "0 of 1 deaths")
    assert rows["1 / (1 − |corr|)", "2"]["announced"] == "0 of 1 deaths"


def test_a_look_at_the_data_foresees_deaths(data, tmp_path):
    silences = {name: explosion.silences_of(index) for name, index in data[1].items()}
    dead, alive = (logged(tmp_path / str(d), [1, 1], seed=2, dead=d) for d in (True, False))
    done = [
        (Experiment("a", "songs and silence", SOUND, window=0.5), (dead,)),
        (Experiment("b", "songs", SOUND, window=0.5), (alive,)),
    ]
    row = by_the_data(done, silences)
    assert (row["false alarms"], row["announced"]) == ("0 of 1 healthy runs", "1 of 1 deaths")
    wrong = by_the_data([(done[0][0], (alive,)), (done[1][0], (dead,))], silences)
    assert (wrong["false alarms"], wrong["announced"]) == ("1 of 1 healthy runs", "0 of 1 deaths")


def test_errors_of_the_law_are_against_what_was_measured(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    val = {"split": "val", "step": 5, "stage0/projection_rms": 9.0, "stage0/residual_rms": 4.0}
    val |= {"stage0/alignment": 0.0, "stage0/rms_before_scaling": 10.0}
    better = val | {"step": 9, "stage0/rms_before_scaling": 5.0}
    law = [{"split": "law", "step": step, "stage0/projection_rms": 3.0} for step in (5, 9)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, [val, better, *law])) + "\n")
    assert largest_error(str(tmp_path), StageConfig(residual_weight=1.0), 0) == pytest.approx(0.5)  # √(3² + 4²) = 5
    mixed = largest_error(str(tmp_path), StageConfig(residual_weight=1.0), 0, by_weights=False)
    assert mixed == pytest.approx(math.sqrt(97) / 5 - 1)  # √(9² + 4²)
    share = StageConfig(residual_weight=0.6, mixing="preserving")
    assert largest_error(str(tmp_path), share, 0) == pytest.approx(1 - 2.4 * math.sqrt(2) / 10)


def nan_at(step: int, clips: str, seed: int = 0) -> Result:
    bad = {
        "step": step,
        "stage": None,
        "tensor": "loss",
        "operation": "div gave NaN",
        "pairs": [clips],
        "spread": f"{10 + step} of {10 + step} gradients are not finite",
    }
    return dataclasses.replace(result(EXPLODING, seed, bad_step=step), non_finite=bad)


def test_a_death_is_told_by_its_step_its_operation_and_its_clips():
    runs = (nan_at(4, "a with /x y/b"), nan_at(40, "a with b", 1), nan_at(9, "c with d", 2), result(EXPLODING, 3))
    e = Experiment("windows", "loops", SOUND, rate=3e-4, clip=None, steps=2_000)
    row, quiet = death_rows([(e, runs), (e._replace(clip=10.0, guarded=True), runs[3:])])
    assert row == {
        "experiment": "windows",
        "data": "loops",
        "epsilons": "none",
        "steps": 2000,
        "learning rate": "3e-04",
        "clip": "none",
        "non-finite": "3 of 4",
        "step": "4 to 40",
        "gradient norm before": "1.00 (1.00 to 1.00)",
        "tensor": "loss",
        "operation": "div gave NaN",
        "spread": "all gradients are not finite",
        "clips": "a with b; c with d",  # without folders
    }
    assert (quiet["non-finite"], quiet["step"], quiet["operation"]) == ("0 of 1", "–", "–")
    assert (quiet["epsilons"], quiet["clip"]) == ("ours", "10")


def test_causes_are_told_in_decades_of_the_largest_norm():
    def run_of(variant, on, seed):
        weak, _, log = on
        return dataclasses.replace(result(EXPLODING, seed, norms=(1.0, 10.0 ** (weak + 2 * log))), variant=variant.name)

    runs = tuple(run_of(variant, on, seed) for on, variant in CAUSES.items() for seed in range(3))
    (row,) = cause_rows([(next(e for e in experiments(SIZE) if e.name == "grid"), runs)])
    assert row["weak residual"] == "1.0 (1.0 to 1.0)"
    assert row["learnable scalars"].startswith("0")
    assert row["log penalty"] == "2.0 (2.0 to 2.0)"
    assert row["largest norm"] == "1e+03 (causes: weak + log penalty)"
    assert row["non-finite"] == "0 of 24"


def test_a_slim_result_is_judged_as_the_whole_one():
    whole = dataclasses.replace(result(EXPLODING), grad_norm=(*map(float, range(100)), 3.0))
    kept = Result(**slim(whole))
    for measure in (peak, growth, last_projection_share, final("rms_ratio"), final("mse"), nearer):
        assert measure(kept) == pytest.approx(measure(whole))
    other = Result(**slim(dataclasses.replace(whole, variant="another", final=None)))
    assert (set(other.end), other.final) == ({"grad_norm"}, None)


def test_data_are_as_large_as_asked(data, monkeypatch):
    monkeypatch.setitem(explosion.PAIRS, "train", 3)
    music, _ = data
    codec = MdctCodec()
    manifest = of_size(build_manifest(music / "songs", music / "songs.jsonl", 1.0))
    whole = build_manifest(music / "songs", music / "songs.jsonl", 1.0)
    for split, most in explosion.PAIRS.items():
        ids = {pair.id for pair in manifest.split(split)}
        assert len(manifest.split(split)) == len(ids) == min(most, len(whole.split(split)))
    assert len(training(encode_manifest(manifest, codec, music / "latents"))) == len(manifest.split("train"))
    assert load_audio(music / "latents" / "silence.wav").abs()[..., :10_000].max() == 0


def test_every_plan_can_be_built():
    for e in experiments(SIZE):
        plan = e.plan()
        for variant in plan.variants:
            assert variant.cascade(plan.num_layers).stages
            assert variant.training(plan.train).max_steps in (SIZE.steps, SIZE.longer)


@torch.no_grad()
@pytest.mark.parametrize("spectral", [True, False])
def test_the_expected_rms_is_that_of_evenly_spread_directions(spectral):
    """With a γ of unequal parts, a β and a bias; 20,000 frames leave an error below a per cent."""
    torch.manual_seed(0)
    norm, projection = nn.LayerNorm(64), (SpectralLinear if spectral else nn.Linear)(64, 16)
    norm.weight.uniform_(0.2, 3)
    norm.bias.normal_()
    projection.bias.normal_()
    projection.train()
    measured = projection(norm(torch.randn(20_000, 64))).square().mean().sqrt().item()
    assert expected_rms(norm, projection) == pytest.approx(measured, rel=0.01)
    assert projection.training
