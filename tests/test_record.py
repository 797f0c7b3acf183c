"""The record: a clean commit, a clone of it, a folder that takes the old one's place; and what its parts run."""

import dataclasses
import functools
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import clones
import numpy as np
import parts
import pytest
import upper_band
from clones import clean_commit, clone_of, continue_in_clone, replace_record
from parts import FIGURES, LICENCES, NO_VECTORS, PARTS, STUDY, found_in, run_variation, variations
from quotes import BLOCKS, MARKS
from settings import settings_of
from verdicts import audit_gradients, audit_schedule, schedule_rows
from writing import write_record

import lib.evaluation.progress
import lib.project
import lib.superres.training
import lib.train
from lib.audio.synth import make_demo_dataset
from lib.data.pairs import Clip, Pair
from lib.evaluation.tables import MASKS_ALONE, SOURCE_SYSTEM
from lib.lab.claims import CLAIMS, VERDICTS, judge
from lib.lab.results import Result, by_variant, read_record
from lib.lab.variants import NAMED, SCHEDULED, VARIANTS
from lib.pipeline import NotebookError
from lib.presets import load_preset
from lib.project import RECORD, ROOT
from lib.report.report import Section
from lib.superres.degradation import Library
from lib.superres.evaluation import Score
from lib.superres.unet import CONTEXTS
from lib.training.run import Run
from lib.util.errors import UserError

TEXT = "\n".join(f"{MARKS[0].format(name)}\nold\n{MARKS[1].format(name)}" for name in BLOCKS)


# --- one clean commit -------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A repository with one commit, where outputs/ is ignored but for the record."""
    root = tmp_path / "repo"
    root.mkdir()
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "n")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "e@example.org")
    (root / ".gitignore").write_text("outputs/*\n!outputs/record/\n")
    (root / "code.py").write_text("x = 1\n")
    (root / "README.md").write_text(TEXT)
    (root / "outputs" / "record").mkdir(parents=True)
    (root / "outputs" / "record" / "old.json").write_text("{}")
    run(root, "init", "--quiet", "--initial-branch=main")
    commit(root)
    return root


def main() -> None:
    """The command, with the arguments in `sys.argv`."""
    runpy.run_path(str(ROOT / "tests" / "record"), run_name="__main__")


def run(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", root, *arguments], check=True, capture_output=True, text=True).stdout.strip()


def commit(root: Path) -> str:
    run(root, "add", "-A")
    run(root, "commit", "--quiet", "-m", "m")
    return run(root, "rev-parse", "HEAD")


def test_a_clean_tree_is_its_commit_and_ignored_files_do_not_matter(checkout):
    (checkout / "outputs" / "demo").mkdir()
    (checkout / "outputs" / "demo" / "x").write_text("")
    assert clean_commit(checkout) == run(checkout, "rev-parse", "HEAD")


@pytest.mark.parametrize("name", ["code.py", "new.py", "outputs/record/old.json"])
def test_a_dirty_tree_is_refused_by_name(checkout, name):
    (checkout / name).write_text("y = 2\n")
    with pytest.raises(UserError, match=rf"differs from its commit in {name}; commit that or stash it"):
        clean_commit(checkout)


def test_a_folder_without_git_is_refused(tmp_path):
    with pytest.raises(UserError, match="a record needs a git checkout"):
        clean_commit(tmp_path)


def test_a_stopped_record_resumes_on_the_same_commit_only(checkout):
    first = clone_of(checkout, clean_commit(checkout))
    assert (first / "code.py").read_text() == "x = 1\n"
    assert not (first / "data").exists()  # nothing that is ignored comes along
    (first / "outputs" / "half done").write_text("")
    (first / "outputs" / "record" / "old.json").unlink()
    assert clone_of(checkout, clean_commit(checkout)) == first
    assert (first / "outputs" / "half done").exists()
    (first / "code.py").write_text("x = 2\n")  # somebody has edited the clone
    assert clone_of(checkout, clean_commit(checkout)) == first
    assert not (first / "outputs" / "half done").exists()
    assert (first / "code.py").read_text() == "x = 1\n"
    (checkout / "code.py").write_text("x = 3\n")
    second = clone_of(checkout, commit(checkout))
    assert second != first
    assert not first.exists()
    assert (second / "code.py").read_text() == "x = 3\n"


def test_a_record_with_other_arguments_is_another(checkout):
    """A short trial of this commit must not be resumed as its record."""
    first = clone_of(checkout, clean_commit(checkout), ["--preset", "demo", "--set", "record.steps=1"])
    (first / "outputs" / "short").write_text("")
    second = clone_of(checkout, clean_commit(checkout), ["--preset", "demo"])
    (second.rename(second.with_suffix(".new")) / "outputs" / "unfinished").write_text("")  # stopped while cloning
    assert clone_of(checkout, clean_commit(checkout), ["--preset", "demo"]) == second != first
    assert not (second / "outputs" / "unfinished").exists()
    assert not (second / "outputs" / "short").exists()
    assert (first / "outputs" / "short").exists()  # it may be under way


def test_a_checkout_inside_another_is_refused(checkout):
    inside = checkout / "outputs" / "inside"
    inside.mkdir()
    with pytest.raises(UserError, match="inside another git repository"):
        clean_commit(inside)


def test_the_command_becomes_itself_in_the_clone(checkout, monkeypatch, tmp_path):
    became = []
    monkeypatch.setattr(clones, "ROOT", checkout)
    monkeypatch.setattr(clones.os, "execve", lambda *given: became.append((os.getcwd(), *given)))
    monkeypatch.chdir(tmp_path)
    continue_in_clone(["--preset", "smoke"])
    ((where, program, command, environment),) = became
    clone = clone_of(checkout, clean_commit(checkout), ["--preset", "smoke"])
    assert where == environment["PYTHONPATH"] == str(clone)
    assert program == sys.executable
    assert command[1:] == ["tests/record", "--preset", "smoke", "--into", str(checkout)]


def test_a_record_takes_the_place_of_the_old_one_as_a_whole(checkout, tmp_path, monkeypatch):
    new = tmp_path / "new"
    new.mkdir()
    (new / "record.json").write_text("new")
    (new / "gpu.json").write_text("as it was in the clone's commit")
    (checkout / "outputs" / "record" / "gpu.json").write_text("recorded meanwhile")
    quoted = lambda folder: dict.fromkeys(BLOCKS, (folder / "record.json").read_text())  # noqa: E731
    monkeypatch.setattr(clones, "readme_blocks", quoted)
    replace_record(new, checkout)
    found = {path.name: path.read_text() for path in (checkout / "outputs" / "record").iterdir()}
    assert found == {"record.json": "new", "gpu.json": "recorded meanwhile"}
    assert [path.name for path in (checkout / "outputs").iterdir()] == ["record"]
    assert (checkout / "README.md").read_text() == TEXT.replace("old", "new")


def test_a_readme_without_marks_leaves_the_old_record(checkout, tmp_path, monkeypatch):
    (new := tmp_path / "new").mkdir()
    (checkout / "README.md").write_text("")
    monkeypatch.setattr(clones, "readme_blocks", lambda folder: dict.fromkeys(BLOCKS, "new"))
    with pytest.raises(UserError, match="marks"):
        replace_record(new, checkout)
    assert (checkout / "outputs" / "record" / "old.json").exists()


def test_the_command_line_makes_paths_absolute_and_hands_settings_on(monkeypatch, tmp_path):
    handed = []

    def stop(arguments):
        handed.extend(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(clones, "continue_in_clone", stop)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    given = [
        "--preset",
        "demo",
        "--data",
        "songs",
        "--codec",
        "weights",
        "--set",
        "train.clip=null",
        "--set",
        "train.seed=3",
    ]
    monkeypatch.setattr(sys, "argv", ["tests/record", *given])
    with pytest.raises(SystemExit):
        main()
    settings = ("--set", "train.clip=null", "--set", "train.seed=3", "--set", f'codec="{tmp_path / "weights"}"')
    assert handed == ["--preset", "demo", "--data", str(tmp_path / "songs"), *settings, "--parts", *PARTS]
    handed.clear()
    monkeypatch.setattr(sys, "argv", ["tests/record", "--preset", "demo", "--parts", "superres", "bench"])
    with pytest.raises(SystemExit):
        main()
    assert handed == ["--preset", "demo", "--data", "", "--parts", "superres", "bench"]


def test_the_command_does_not_measure_where_it_would_write(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tests/record", "--preset", "demo", "--into", str(ROOT)])
    with pytest.raises(SystemExit):
        main()
    assert "is where this command runs" in capsys.readouterr().err


# --- what is measured -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "plans"),
    [("demo", [(VARIANTS, 2, 100), (NAMED, 6, 100)]), ("full", [(VARIANTS, 6, 2000)])],
)
def test_the_record_has_the_grid_and_the_named_settings_at_full_depth(tmp_path, name, plans):
    asked, (scheduled, _) = [], read_record(RECORD / "schedule.json")
    project = SimpleNamespace(codec=SimpleNamespace(name="mdct"), ablation=lambda plan: asked.append(plan) or scheduled)
    parts.record_ablations(load_preset(name), project, tmp_path)
    assert [(plan.variants, plan.num_layers, plan.train.max_steps) for plan in asked[:-1]] == plans
    assert asked[-1].variants == SCHEDULED


def test_the_demos_variations_are_three_data_seeds_two_training_seeds_and_no_vectors():
    found = {row["run"]: row for row in variations(load_preset("demo"))}
    assert len(found) == 7
    assert (found["songs-2-seed-1"]["data_seed"], found["songs-2-seed-1"]["seed"]) == (2, 1)
    assert variations(load_preset("full")) == []
    others = variations(load_preset("demo", {"data.seed": 5, "train.seed": 7}))
    assert {(row["data_seed"], row["seed"]) for row in (others[0], others[-1])} == {(5, 7)}


def test_the_variations_stand_beside_the_run_as_it_is_in_their_order(monkeypatch, tmp_path):
    preset = load_preset("smoke")
    names = [row["run"] for row in variations(preset)]
    pairs = dict.fromkeys(("out", *names), "a") | {"songs-1-seed-0": "b"}
    monkeypatch.setattr(parts, "run_variation", lambda row, *given: tmp_path / row["run"])
    monkeypatch.setattr(parts, "found_in", lambda out: {"pairs": pairs[out.name]})
    monkeypatch.setattr(parts, "run_notebooks", lambda *given, resume: tmp_path / "out" / "index.html")
    parts.record_variations(preset, {}, "", tmp_path)
    rows = json.loads((tmp_path / "variations.json").read_text())
    assert [row["run"] for row in rows] == ["as it is", *names]
    assert rows[2] == {"run": "songs-1-seed-0", "data_seed": 1, "seed": 0, "pairs": "b"}
    pairs["no-vectors"] = "c"
    with pytest.raises(NotebookError, match="no-vectors: has other pairs than the run as it is"):
        parts.record_variations(preset, {}, "", tmp_path)


def test_the_study_on_real_music_runs_notebook_04_for_every_setting_and_seed(monkeypatch, tmp_path):
    preset, ran = load_preset("smoke"), []
    music = tmp_path / "music"
    for package in LICENCES:
        (music / package).mkdir(parents=True)
        (music / package / "one.ogg").write_text("")

    def run_apart(*given):
        ran.append(given)
        return given[0]

    monkeypatch.setattr(parts, "run_apart", run_apart)
    monkeypatch.setattr(parts, "measured_in", lambda out: {"curve": [], "out": out})
    monkeypatch.setattr(parts, "study_rows", lambda rows: [{"runs": len(rows)}])
    clips = [Clip(f"nexuiz-music/{name}.ogg", 0, 48_000, "0" * 64) for name in ("b", "a")]
    manifest = SimpleNamespace(split=lambda name: [Pair("0", "val", "cross", *clips)] if name == "val" else [])
    monkeypatch.setattr(parts, "open_project", lambda *given: SimpleNamespace(manifest=manifest))
    parts.record_fusion(preset, {"train.clip": 2.0}, music, tmp_path)
    rows, facts = read_record(tmp_path / "fusion.json", dict)
    longer = f"{MASKS_ALONE}, {settings_of(preset).steps_on_music} steps"
    found = [(row["setting"], row["seed"]) for row in rows]
    assert found == [*((name, 0) for name in STUDY), (longer, 0), (longer, 1), (longer, 2)]
    assert {row["out"] for row in rows} == {given[0] for given in ran}
    by_name = {given[0]: given for given in ran}
    _, of, data, settings, only = by_name["music-wide-masks-30-steps-1"]
    assert (of, data, only) == ("smoke", str(music), "04")
    same = {"model.num_layers": 1, "train.max_steps": 24, "evaluation.pairs": 4}  # the reference has others
    assert settings == {"train.clip": 2.0, "train.seed": 1} | same | {"train.max_steps": 30}
    assert by_name["music-wide-masks-0"][3] == {"train.clip": 2.0, "train.seed": 0} | same
    assert by_name["music-the-source-documents-system-0"][1] == "reference"
    assert by_name["music-a-cascade-alone-0"][3]["model.masking.masking"] == "none"
    assert facts["held_out"] == ["a", "b"]
    assert facts["tracks"] == {package: ["one"] for package in LICENCES}
    for name, settings in STUDY.items():  # every setting is one that trains
        load_preset("reference" if name == SOURCE_SYSTEM else "demo", settings)


def test_what_notebook_04_measured_is_read_from_its_tables(tmp_path, monkeypatch):
    merits = {"input": "0.00", "trained model": "0.50"}
    tables = {
        "cases": [{"case": "perfect fusion", "merit": "0.9", "onsets": "1"}],
        "means": [{"output": name, "merit": merit, "onsets": "0.30"} for name, merit in merits.items()],
        "older": [{"output": name, "plain merit": "0.70"} for name in merits],
        "marks": [{"mark": "HPSS", "merit on these pairs": "0.421", "above it after": "3 s"}],
        "tuned": [{"recipe": "crossover", "Hz": "750"}],
        "against": [{"baseline": "HPSS", "advantage in merit": "+0.1 ± 0.0", "verdict": "better than the baseline"}],
    }
    monkeypatch.setattr(parts, "sections", lambda out: [])
    monkeypatch.setattr(parts, "tables_of", lambda found: tables)
    run = Run.create(tmp_path / "run", {})
    run.log({"split": "merit", "step": 3, "seconds": 1.6, "merit": 0.12345})
    run.log({"split": "val", "step": 2, "stage0/output_rms": 9.0})
    run.log({"split": "val", "step": 3, "loss": 1.0, "stage0/output_rms": 0.123456})
    found = parts.measured_in(run.path)
    assert found["measured"]["trained model"] == tables["means"][1] | {"plain merit": "0.70"}
    assert found["against"] == {"HPSS": {"advantage in merit": "+0.1 ± 0.0", "verdict": "better than the baseline"}}
    assert found["curve"] == [{"seconds": 2, "merit": 0.123}]
    assert (found["marks"], found["crossovers"], found["stages"]) == (
        {"HPSS": 0.421},
        {"crossover": 750},
        {"stage0/output_rms": 0.1235},
    )


def test_runs_that_were_followed_are_recorded_beside_what_recipes_reach(tmp_path, monkeypatch, capsys):
    """Trained by the command, with the figure of merit at every validation; for a GPU, whose name the rows bear."""
    for module in (parts, lib.project):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(lib.evaluation.progress, "gpu_name", lambda: "a GPU")
    (record := tmp_path / "outputs" / "record").mkdir(parents=True)
    (tmp_path / "README.md").write_text(TEXT)
    make_demo_dataset(tmp_path / "songs", num_songs=4, seconds=9)
    common = ["--preset", "smoke", "--data", str(tmp_path / "songs")]
    settings = ["train.max_steps=2", "train.checkpoint_every=1", "model.num_layers=1"]
    runs = {"wide masks": 0, "wide masks and a cascade": 1}
    for name, stages in runs.items():
        changed = [part for value in (*settings, f"model.num_stages={stages}") for part in ("--set", value)]
        monkeypatch.setattr(
            sys, "argv", ["lib.train", *common, "--out", str(tmp_path / name), "--follow", "3", *changed]
        )
        lib.train.main()
        last = Run.open(tmp_path / name).metrics("merit")[-1]
        assert f"merit: {last['merit']:.2f} on 3 pairs after {last['seconds']:.0f} s" in capsys.readouterr().out
    followed = ["--followed", *(str(tmp_path / name) for name in runs)]
    monkeypatch.setattr(sys, "argv", ["tests/record", *common, *followed])
    main()
    found = json.loads((record / "gpu.json").read_text())
    assert (found["gpu"], found["clip_seconds"], found["batch_size"]) == ("a GPU", 2.0, 4)
    assert list(found["runs"]) == list(runs)
    for rows in found["runs"].values():
        assert [row["step"] for row in rows] == [0, 1, 2]
        assert {row["pairs"] for row in rows} == {3}
    assert found["marks"]["average of waveforms"] < found["marks"]["HPSS"] < 1
    assert (record / "gpu.png").stat().st_size > 10_000
    said = (tmp_path / "README.md").read_text()
    assert "On one a GPU" in said
    assert said.count("\nold\n") == len(BLOCKS) - 1
    (kept := tmp_path / "wide masks" / "metrics.jsonl").write_text(kept.read_text().replace("a GPU", "no GPU"))
    for asked in (followed, [*followed, followed[1]], followed[:2]):  # not on a GPU, or two of a kind
        monkeypatch.setattr(sys, "argv", ["tests/record", *common, *asked])
        with pytest.raises(SystemExit):
            main()
        assert "wide masks: needs one run of each kind, followed from its first step" in capsys.readouterr().err


def test_a_table_that_no_notebook_shows_is_named():
    with pytest.raises(ValueError, match="the columns a, b"):
        parts.rows_with({"caption": [{"a": 1}]}, "a", "b")


def test_a_variation_is_a_pipeline_of_its_own_on_one_thread(monkeypatch, tmp_path):
    called = []

    def call(command, *, cwd, env, stdout, stderr, check):
        called.append((command, env))
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(parts, "ROOT", tmp_path)
    monkeypatch.setattr(parts.subprocess, "run", call)
    _, seeded, *_, bare = variations(load_preset("demo"))
    code = 0
    out = run_variation(bare, load_preset("demo"), {"train.clip": None, "train.seed": 7}, "songs")
    ((command, env),) = called
    assert command[1:] == [
        *("-m", "lib.pipeline", "--preset", "demo", "--data", "songs", "--out", str(out), "--resume"),
        *("--set", "train.clip=null", "--set", "train.seed=0", "--set", "data.seed=0"),
    ]
    assert {name: env[name] for name in ("OMP_NUM_THREADS", *NO_VECTORS)} == {"OMP_NUM_THREADS": "1"} | NO_VECTORS
    run_variation(seeded, load_preset("demo"), {}, "")
    command, env = called[-1]
    assert command[-6:] == ["--only", "04", "--set", "data.seed=0", "--set", "train.seed=1"]
    assert (env["OMP_NUM_THREADS"], NO_VECTORS.keys() & env.keys()) == ("1", set())
    code = 1
    with pytest.raises(NotebookError, match=r"no-vectors: failed; .*log\.txt"):
        run_variation(bare, load_preset("demo"), {}, "")
    code = 130
    with pytest.raises(KeyboardInterrupt, match="make record"):
        run_variation(bare, load_preset("demo"), {}, "")


def test_what_a_run_has_found_is_read_from_its_tables(tmp_path):
    training, _ = (Section(tmp_path, name, name) for name in ("04_training", "05_listening"))
    training.table([{"output": "trained model", "merit": "0.81"}, {"output": "input", "merit": "0.10"}], "Means")
    better = {"advantage in merit": "+0.3 ± 0.1", "verdict": "better than the baseline"}
    training.table([{"baseline": "average"} | better], "Compared")
    training.claims([judge("C13", "coherent", True)])
    (tmp_path / "manifest.json").write_text('{"root": "one", "pairs": ["pair"]}')
    found = found_in(tmp_path)
    assert found["merit"] == {"trained model": 0.81, "input": 0.1}
    assert found["against"] == {"average": "better than"}
    assert found["advantage"] == {"average": "+0.3 ± 0.1"}
    assert found["claims"] == {}  # of two notebooks: not the claims of all
    Section(tmp_path, "01_encoding", "01")
    assert found_in(tmp_path)["claims"] == {"C13: coherent": "reproduced"}
    (tmp_path / "manifest.json").write_text('{"root": "another", "pairs": ["pair"]}')
    assert found_in(tmp_path)["pairs"] == found["pairs"]
    (tmp_path / "manifest.json").write_text('{"root": "another", "pairs": ["another"]}')
    assert found_in(tmp_path)["pairs"] != found["pairs"]


MUSIC, MORE = Path("where music is"), Path("more-music")


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """The command with its parts replaced: no run is made, the committed results are given back."""
    results, _ = read_record(RECORD / "ablation.json")
    scheduled, _ = read_record(RECORD / "schedule.json")
    out = tmp_path / "out"
    (out / "figures").mkdir(parents=True)
    for name in FIGURES:
        (out / "figures" / f"{name}.png").write_bytes(name.encode())
    (out / "summary.json").write_text(json.dumps({"facts": {"code": "commit abcdef0"}, "tables": {}}))
    (tmp_path / "outputs" / "bench").mkdir(parents=True)
    (tmp_path / "outputs" / "bench" / "bench.md").write_text("tables")
    bench = {"machine": {"cores": 2, "commit": "abcdef0", "torch": "2"}, "cascade": []}
    (tmp_path / "outputs" / "bench" / "bench.json").write_text(json.dumps(bench))
    (tmp_path / "README.md").write_text(TEXT)
    (tmp_path / "data").mkdir()
    (script := tmp_path / "data" / "fetch_music.sh").write_text(
        "#!/bin/sh\nexit $(cat $1.status 2>/dev/null || echo 0)\n"
    )
    script.chmod(0o755)
    said = []

    class Project:
        out_dir = tmp_path / "out"

        def __init__(self, preset, data):
            self.preset = preset
            self.codec = type("codec", (), {"name": "mdct"})

        def ablation(self, plan):
            return scheduled if plan.variants == SCHEDULED else [r for r in results if r.num_layers == plan.num_layers]

    def record_fusion(preset, overrides, music, folder):
        assert (folder / "schedule.json").exists()  # notebook 04 shows it
        said.append(music)

    def run_notebooks(*given, resume):
        assert resume
        assert (tmp_path / "record" / "constructed.json").exists()  # notebook 04 shows it
        said.append(given)
        Section(out, "01_encoding", "Encoding").claims([judge("C3", "it holds", True)])
        return out / "index.html"

    monkeypatch.setattr(parts, "record_superres", lambda *given: None)
    monkeypatch.setattr(parts, "record_variations", lambda *given: None)
    monkeypatch.setattr(parts, "record_explosion", lambda *given: None)
    for name in ("constructed", "full_size"):
        write = functools.partial(lambda name, folder: write_record(folder / f"{name}.json", [], {}), name)
        monkeypatch.setattr(parts, f"record_{name}", write)
    monkeypatch.setattr(parts, "record_fusion", record_fusion)
    monkeypatch.setattr(parts, "open_project", Project)
    monkeypatch.setattr(parts, "run_notebooks", run_notebooks)
    monkeypatch.setattr(parts, "ROOT", tmp_path)
    return tmp_path, said


def test_a_record_holds_everything_and_names_its_commit_in_one_file(stub, monkeypatch):
    folder, said = stub
    monkeypatch.setattr(parts, "versions", lambda: {"torch": "2", "commit": "abcdef0"})
    (written := folder / "record").mkdir()
    (written / "record.json").write_text('{"a part of earlier versions": {}}')
    parts.record("demo", {}, "songs", MUSIC, folder=written)
    assert said == [MUSIC, ("demo", {}, "songs")]
    names = {"ablation.json", "schedule.json", "bench.json", "summary.json", "claims.json", "record.json"}
    names |= {"bench.md", "claims.md", "constructed.json", "full_size.json"}
    assert {path.name for path in written.iterdir()} == names | {f"{name}.png" for name in FIGURES}
    assert (written / "bench.md").read_text() == "tables"
    results, facts = read_record(written / "ablation.json")
    assert {r.num_layers for r in results} == {2, 6}
    assert facts == {"preset": "demo", "codec": "mdct", "steps": 100}
    results, facts = read_record(written / "schedule.json")
    assert facts["epochs"] == 200
    assert {r.variant for r in results} == {v.name for v in SCHEDULED}
    claims = json.loads((written / "claims.json").read_text())
    assert [row["claim"] for row in claims] == list(CLAIMS)
    made = json.loads((written / "record.json").read_text())
    assert tuple(made) == PARTS
    assert {(facts["commit"], facts["preset"], facts["codec"]) for facts in made.values()} == {
        ("abcdef0", "demo", "mdct")
    }
    assert (made["fusion"]["music"], made["notebooks"]["music"]) == ("real music", "music in songs")
    assert made["superres"]["music"] == "real music"
    assert [path.name for path in written.glob("*") if b"abcdef0" in path.read_bytes()] == ["record.json"]


def test_a_part_is_measured_by_itself_and_the_others_stay(stub, monkeypatch):
    folder, said = stub
    shutil.copytree(RECORD, written := folder / "record")
    before = {path.name: path.read_bytes() for path in written.iterdir()}
    monkeypatch.setattr(parts, "versions", lambda: {"torch": "2", "commit": "abcdef0"})
    parts.record("demo", {}, "", MUSIC, ["bench", "fusion"], written)
    assert said == [MUSIC]
    changed = {path.name for path in written.iterdir() if path.read_bytes() != before[path.name]}
    assert changed == {"bench.json", "bench.md", "record.json"}
    made, old = json.loads((written / "record.json").read_text()), json.loads(before["record.json"])
    assert {part for part in PARTS if made.get(part) != old.get(part)} == {"bench", "fusion"}
    assert made["bench"]["commit"] == made["fusion"]["commit"] == "abcdef0"


def test_a_stopped_record_resumes_with_the_part_that_it_was_at(stub, monkeypatch):
    folder, said = stub
    shutil.copytree(RECORD, written := folder / "record")
    monkeypatch.setattr(parts, "versions", lambda: {"torch": "2", "commit": "abcdef0"})
    notebooks = parts.run_notebooks

    def stopped(*given, resume):
        raise KeyboardInterrupt

    monkeypatch.setattr(parts, "run_notebooks", stopped)
    with pytest.raises(KeyboardInterrupt):
        parts.record("demo", {}, "", MUSIC, folder=written)
    monkeypatch.setattr(parts, "run_notebooks", notebooks)
    for _ in range(2):
        parts.record("demo", {}, "", MUSIC, folder=written)
    assert said == [MUSIC, ("demo", {}, "")]  # each was measured once
    made = json.loads((written / "record.json").read_text())
    assert {made[part]["commit"] for part in PARTS} == {"abcdef0"}


def test_a_part_alone_needs_the_others_before_any_run(stub):
    folder, said = stub
    with pytest.raises(UserError, match=r"record\.json"):
        parts.record("demo", {}, "", MUSIC, ["fusion"], folder / "record")
    assert not said


@pytest.mark.parametrize(("file", "content"), [("variations", "[]"), ("summary", '{"facts": {}}'), ("fusion", None)])
def test_a_part_alone_needs_the_others_to_be_whole(stub, file, content):
    folder, said = stub
    shutil.copytree(RECORD, written := folder / "record")
    odd = json.dumps({"results": [{}], "setting": 1}) if content is None else content
    (written / f"{file}.json").write_text(odd)
    with pytest.raises(UserError, match=r"record.*damaged \(.*; restore it"):
        parts.record("demo", {}, "", MUSIC, ["bench"], written)
    assert not said


def test_without_music_no_part_is_measured(stub):
    folder, said = stub
    (folder / "music.status").write_text("2")
    with pytest.raises(UserError, match=r"music: lacks the music to measure on; data/README\.md says"):
        parts.record("demo", {}, "", folder / "music", folder=folder / "record")
    assert not said
    assert not (folder / "record").exists()


def test_a_broken_readme_is_seen_before_any_run(stub):
    folder, said = stub
    (folder / "README.md").write_text("no marks")
    with pytest.raises(UserError, match="marks"):
        parts.record("demo", {}, "", MUSIC, folder=folder / "record")
    assert not said
    assert not (folder / "record").exists()


def test_the_full_preset_says_what_it_needs(stub, capsys, monkeypatch):
    def no_weights(*_):
        raise UserError("weights are missing")

    monkeypatch.setattr(parts, "open_project", no_weights)
    monkeypatch.setattr(parts.torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="weights are missing"):
        parts.record("full", {}, "", MUSIC)
    assert "no GPU was found" in capsys.readouterr().err


# --- super-resolution -------------------------------------------------------------------------------------------------


class Song(NamedTuple):
    sha256: str
    path: Path


def songs(count: int = 240) -> list[Song]:
    """Of twelve albums in turn."""
    return [Song(f"{i:03}", Path(f"album {i % 12}") / f"{i}.ogg") for i in range(count)]


@pytest.fixture
def splits(monkeypatch) -> dict[str, upper_band.Split]:
    found = songs()
    libraries = {  # in any order
        MUSIC: Library({"train": tuple(found[:60:-1]), "val": tuple(found[51:61])}),
        MORE: Library({"train": tuple(found[:51:2]), "val": tuple(found[1:51:2])}),
    }
    monkeypatch.setattr(upper_band, "read_library", lambda music, clip_length: libraries[music])
    return upper_band.splits_of((MUSIC, MORE), 48_000)


def test_who_is_judged_neither_trains_nor_chooses(splits):
    assert list(splits) == ["songs", "albums", "30 songs"]
    for split in splits.values():
        judged = set(split.judging.songs["val"])
        trained, choosing = (set(split.training.songs[part]) for part in ("train", "val"))
        assert not judged & (trained | choosing)
        assert not trained & choosing
        assert split.judging.songs["train"] == split.training.songs["train"]
    assert [len(split.training.songs["train"]) for split in splits.values()] == [168, 148, 30]
    assert all(splits[name].judging.songs["val"] == tuple(songs()[:60]) for name in splits if name != "albums")
    held_out, others = (
        {upper_band.album_of(song) for song in of.songs[split]}
        for of, split in ((splits["albums"].judging, "val"), (splits["albums"].judging, "train"))
    )
    assert (len(held_out), len(others), held_out & others) == (upper_band.ALBUMS, 8, set())


def test_onsets_of_the_upper_band_are_compared():
    rng, silence = np.random.default_rng(0), np.zeros(96_000)
    beats = rng.standard_normal(96_000) * (np.arange(96_000) % 12_000 < 600)
    early = np.roll(beats, -6_000)
    low = 0.5 * np.sin(2 * np.pi * 440 * np.arange(96_000) / 48_000)
    judge = functools.partial(upper_band.onset_convergence, cutoff=8_000, top=20_000)
    assert judge(beats, beats) == 0
    assert judge(beats + low, beats) < 0.2  # what is below the cutoff does not count
    assert judge(silence, beats) == pytest.approx(1, abs=0.05)
    assert judge(early, beats) > 1


class Inline:
    """In place of a pool of processes."""

    def __init__(self, *_):
        self.map = lambda function, *arguments: list(map(function, *arguments))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_the_super_resolver_is_trained_and_measured_as_the_record_says(monkeypatch, tmp_path, splits):
    """Trainings and measures are replaced; what goes from one to the next, and into the file, is looked at."""
    steps = {"completion": 7, "vae": 8, "diffusion": 9}
    longer = {"completion_steps": 7, "vae_steps": 8, "steps": 9, "seeds": 2, "clips": 3}
    preset = load_preset("demo", {f"record.superres_{name}": value for name, value in longer.items()})
    trained, judged = [], []

    def train_part(folder, part, library, sizes, config, *, resume, name=None, encoded=None):
        assert resume
        assert config.max_steps == steps[part]
        if name:
            assert name == f"{sizes.context}-{config.seed - preset.train.seed}"
            assert encoded == ("encoded", upper_band.KNOWN)
        trained.append((folder.name, name or part, len(library.songs["train"]), config.seed - preset.train.seed))
        return SimpleNamespace(metrics=lambda split: [{"loss": 9.0}, {"loss": 0.25 + (name == "none-1")}])

    def evaluate(resolver, library, settings, *, clips):
        judged.append((resolver, len(library.songs["val"]), settings.steps, clips))
        pair = (1.5, 0.25)
        return SimpleNamespace(scores=(Score("model", 4000, 3, 2, pair, pair, {"ridge": pair}),))

    monkeypatch.setattr(upper_band, "ProcessPoolExecutor", Inline)
    monkeypatch.setattr(upper_band, "train_part", train_part)
    monkeypatch.setattr(upper_band, "evaluate", evaluate)
    monkeypatch.setattr(upper_band, "encode", lambda folder, library, config, known: ("encoded", known))
    monkeypatch.setattr(upper_band.Study, "resolver", lambda study, name, seed: f"{name} {seed}")
    monkeypatch.setattr(upper_band, "by_steps", lambda study, resolver, library, _: [{"steps": resolver}])
    monkeypatch.setattr(upper_band, "perceptions", lambda study, resolver, library, cutoff: [{"cutoff": cutoff}])
    upper_band.record_superres(preset, (MUSIC, MORE), tmp_path / "runs", tmp_path)
    once = [("songs-0", "vae", 168, 0), ("songs-0", "completion", 168, 0), ("songs-1", "completion", 168, 1)]
    once += [("albums-0", "completion", 148, 0)]
    once += [("30-songs-0", "completion", 30, 0), ("songs-0", "diffusion", 168, 0)]
    contexts = [("songs-0", f"{name}-{seed}", 168, seed) for seed in range(2) for name in CONTEXTS]
    assert trained == [*once, *contexts]
    drawn = preset.superres.sampler_steps
    others = [("songs 1", 60, 0, 3), ("albums 0", 80, 0, 3), ("30 songs 0", 60, 0, 3)]
    assert judged == [("songs 0", 60, drawn, 3), *others]
    scores, facts = read_record(tmp_path / "superres.json", Score)
    assert [score.method for score in scores] == ["model"]
    assert list(facts["others"]) == ["songs, seed 1", "albums, seed 0", "30 songs, seed 0"]
    assert facts["others"]["albums, seed 0"][0]["upper"] == [1.5, 0.25]
    assert (facts["preset"], facts["steps"], facts["sampler_steps"]) == ("demo", steps, drawn)
    assert facts["songs"] == {"songs": [168, 60], "albums": [148, 80], "30 songs": [30, 60]}
    assert len(facts["albums"]) == upper_band.ALBUMS
    assert facts["contexts"] == {"sequence": [0.25] * 2, "pooled": [0.25] * 2, "none": [0.25, 1.25]}
    assert facts["by_steps"] == [{"steps": "songs 0"}]
    assert facts["perceived"] == [{"cutoff": cutoff} for cutoff in upper_band.HEARD_AT]


# --- what is committed ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def committed():
    return json.loads((RECORD / "claims.json").read_text())


def test_every_claim_has_a_verdict(committed):
    assert {row["claim"] for row in committed} == set(CLAIMS)
    for row in committed:
        assert row["verdict"] in VERDICTS
        assert row["why"] or row["measured"], row
        if row["verdict"] != "not tested here":
            assert row["measured"], row


def test_the_recorded_ablation_has_two_depths_and_three_seeds():
    results, facts = read_record(RECORD / "ablation.json")
    assert len({r.num_layers for r in results}) == 2
    seeds = {(r.variant, r.num_layers): 0 for r in results}
    for r in results:
        seeds[r.variant, r.num_layers] += 1
    assert set(seeds.values()) == {3}
    assert all(dataclasses.asdict(r)["steps"] == facts["steps"] or r.non_finite for r in results)


def test_the_recorded_verdicts_follow_from_the_recorded_runs():
    results, facts = read_record(RECORD / "schedule.json")
    assert facts["claims"] == [dataclasses.asdict(v) for v in audit_schedule(results, facts["epochs"])]
    assert facts["table"] == schedule_rows(by_variant(results))
    rows, facts = read_record(RECORD / "explosion.json", dict)
    loops = [Result(**run) for row in rows if row["data"] == "loops" for run in row["results"]]
    assert facts["claims"] == [dataclasses.asdict(v) for v in audit_gradients(loops)]


def test_the_recorded_schedule_ran_its_epochs():
    results, facts = read_record(RECORD / "schedule.json")
    assert facts["epochs"] == settings_of(load_preset("demo")).schedule.epochs == 200
    assert all(r.steps == facts["steps"] or r.non_finite for r in results)
    assert {(r.variant, r.seed) for r in results} == {
        (v.name, seed) for v in SCHEDULED for seed in range(settings_of(load_preset("demo")).schedule.seeds)
    }
