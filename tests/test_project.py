"""A project is opened once and then found again; what it cannot be made of is named."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
from conftest import write_weights
from writing import write_record

import lib.data.pairs
import lib.project
from lib.audio.synth import make_demo_dataset
from lib.data.latents import LatentPairs
from lib.presets import load_preset
from lib.project import DEMO_SONGS, OPENED, UPPER_BAND, Project, open_project, reopen_project, trained_runs
from lib.training.run import LOCK, Run
from lib.util.errors import UserError

SMALL = {"data.clip_seconds": 1.0, "listening.seconds": 2.0, "data.pair_mode": "both"}


@pytest.fixture(scope="module")
def songs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("songs")
    make_demo_dataset(folder, num_songs=5, seconds=5)
    return folder


@pytest.fixture
def root(tmp_path, songs, monkeypatch) -> Path:
    """A repository of its own, with five songs of 5 s in `my songs é`."""
    monkeypatch.setattr(lib.project, "ROOT", tmp_path)
    shutil.copytree(songs, tmp_path / "my songs é")
    return tmp_path


@pytest.fixture
def builds(monkeypatch) -> list[Path]:
    """The manifests that are really built, in order."""
    built, write = [], lib.data.pairs.write_manifest

    def recorded(manifest, path):
        built.append(path)
        write(manifest, path)

    monkeypatch.setattr(lib.data.pairs, "write_manifest", recorded)
    return built


def test_a_project_is_made_from_a_folder_of_songs(root):
    project = open_project(load_preset("smoke", SMALL), "my songs é", "out/run 1")
    assert project.out_dir == root / "out" / "run 1"
    assert project.manifest.root == (root / "my songs é").resolve()
    assert project.manifest.clip_length == 24_000
    assert {pair.mode for pair in project.manifest.pairs} == {"continuation", "cross"}
    assert project.codec.name == "mdct"
    assert project.index.is_relative_to(root / "data" / "latents")
    for split in ("train", "val"):
        assert len(LatentPairs(project.index, split)) == len(project.manifest.split(split))
    assert {path.name for path in root.iterdir()} == {"my songs é", "out", "data"}  # nothing elsewhere


def test_what_a_project_works_with_is_said(root):
    shutil.copy(root / "my songs é" / "song_00.wav", root / "my songs é" / "copy.wav")
    (root / "my songs é" / "notes.txt").touch()
    project = open_project(load_preset("smoke", SMALL), "my songs é", "out")
    counted, model, skipped, *reasons = project.in_words()
    assert re.fullmatch(r"\d+ training and \d+ validation pairs, split by a hash of each song; codec mdct", counted)
    assert model == "masks: wide; stages behind them: 0"
    assert skipped == f"2 files were skipped, listed in {root / 'out' / 'manifest.json'}"
    assert [reason.split(":")[0] for reason in reasons] == ["  notes.txt", "  song_00.wav"]


def test_an_output_folder_whose_name_is_not_utf8_is_refused(root):
    with pytest.raises(UserError, match="use a name in UTF-8"):
        open_project(load_preset("smoke", SMALL), "my songs é", os.fsdecode(b"o\xe9t"))
    assert {path.name for path in root.iterdir()} == {"my songs é"}


def test_relative_paths_are_taken_from_the_repository_whatever_the_working_directory(root, monkeypatch, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    project = open_project(load_preset("smoke", SMALL), "my songs é")
    assert project.out_dir == root / "outputs" / "smoke"
    assert not list((tmp_path / "elsewhere").iterdir())
    absolute = open_project(load_preset("smoke", SMALL), root / "my songs é", tmp_path / "elsewhere" / "run")
    assert absolute.out_dir == tmp_path / "elsewhere" / "run"
    assert absolute.manifest.pairs == project.manifest.pairs


def test_without_data_the_demo_songs_are_made_in_the_repository(root, songs, monkeypatch):
    asked = []

    def copy(folder, num_songs, seed):
        asked.append((folder, num_songs, seed))
        shutil.copytree(songs, folder)

    monkeypatch.setattr(lib.project, "make_demo_dataset", copy)
    for seed, name in ((0, "demo"), (3, "demo_seed3")):
        project = open_project(load_preset("smoke", SMALL | {"data.seed": seed}))
        assert asked.pop() == (root / "data" / name, DEMO_SONGS, seed)
        assert project.manifest.root == (root / "data" / name).resolve()


def test_another_data_seed_is_other_music(root, monkeypatch):
    make = lib.project.make_demo_dataset
    monkeypatch.setattr(lib.project, "make_demo_dataset", lambda *args, **options: make(*args, **options, seconds=5))
    monkeypatch.setattr(lib.project, "DEMO_SONGS", 4)
    first, second = (open_project(load_preset("smoke", SMALL | {"data.seed": seed})) for seed in (0, 1))
    hashes = [{clip.sha256 for pair in p.manifest.pairs for clip in (pair.input, pair.target)} for p in (first, second)]
    assert not hashes[0] & hashes[1]
    assert first.index != second.index


@pytest.mark.parametrize(("seed", "folder"), [(0, "demo_48k"), (2, "demo_48k_seed2")])
def test_generated_songs_have_an_upper_band_of_their_own(root, monkeypatch, songs, seed, folder):
    asked, project = [], open_project(load_preset("smoke", SMALL | {"data.seed": seed}), "my songs é")
    monkeypatch.setattr(lib.project, "make_demo_dataset", lambda folder, **how: asked.append((folder, how)))
    monkeypatch.setattr(lib.project, "read_library", lambda folder, clip_length: folder)
    assert project.upper_band() == (project.manifest.root, f"the music in {project.manifest.root}")
    assert not asked
    for name in ("demo", "demo_seed2", "demo_seed13"):
        manifest = dataclasses.replace(project.manifest, root=root / "data" / name)
        found = dataclasses.replace(project, manifest=manifest).upper_band()
        assert found == (root / "data" / folder, "generated songs")
        assert asked.pop() == (root / "data" / folder, {**UPPER_BAND, "seed": seed})
    for elsewhere in (root / "demo", root / "data" / "demo_seeds", root / "data" / "demo_48k"):
        manifest = dataclasses.replace(project.manifest, root=elsewhere)
        assert dataclasses.replace(project, manifest=manifest).upper_band()[0] == elsewhere


def test_what_is_there_already_is_reused(root, builds):
    settings = load_preset("smoke", SMALL)
    first = open_project(settings, "my songs é")
    again = open_project(settings, "my songs é")
    assert len(builds) == 1
    assert again.manifest == first.manifest
    assert again.index == first.index


def overwrite(folder: Path) -> None:
    """Another song under a name that is there: same size, later time."""
    wav, rate = soundfile.read(folder / "song_01.wav")
    soundfile.write(folder / "song_00.wav", wav, rate, subtype="PCM_16")


def add_in_a_linked_folder(folder: Path) -> None:
    shutil.copy(folder / "song_01.wav", folder.parent / "linked" / "new.wav")


CHANGES = {
    "added": lambda folder: shutil.copy(folder / "song_00.wav", folder / "a copy.WAV"),
    "removed": lambda folder: (folder / "song_00.wav").unlink(),
    "renamed": lambda folder: (folder / "song_00.wav").rename(folder / "other.wav"),
    "overwritten": overwrite,
    "added in a linked folder": add_in_a_linked_folder,
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_manifest_is_built_again_when_the_music_changes(root, builds, change):
    folder, linked = root / "my songs é", root / "linked"
    linked.mkdir()
    (folder / "more").symlink_to(linked)  # music is followed into links
    settings = load_preset("smoke", SMALL)
    first = open_project(settings, folder).manifest
    CHANGES[change](folder)
    second = open_project(settings, folder).manifest
    assert len(builds) == 2
    assert second != first


@pytest.mark.parametrize("setting", [{"data.clip_seconds": 1.5}, {"data.pair_mode": "cross"}, {"data.seed": 1}])
def test_the_manifest_is_built_again_when_a_setting_changes(root, builds, setting):
    first = open_project(load_preset("smoke", SMALL), "my songs é").manifest
    second = open_project(load_preset("smoke", SMALL | setting), "my songs é").manifest
    assert len(builds) == 2
    assert second != first
    open_project(load_preset("smoke", SMALL | {"train.max_steps": 3, "codec": "mdct"} | setting), "my songs é")
    assert len(builds) == 2  # what the pairs do not depend on changes nothing


def test_the_manifest_is_built_again_when_the_code_changes(root, builds, edit_code):
    for count, module in enumerate(("lib.data.pairs", "lib.audio.files"), start=1):
        open_project(load_preset("smoke", SMALL), "my songs é")
        assert len(builds) == count
        edit_code(module)
    open_project(load_preset("smoke", SMALL), "my songs é")
    edit_code("lib.data.latents")  # plays no part
    open_project(load_preset("smoke", SMALL), "my songs é")
    assert len(builds) == 3


def test_a_loop_of_links_in_the_music_ends(root):
    os.symlink("..", root / "my songs é" / "loop")
    assert open_project(load_preset("smoke", SMALL), "my songs é").manifest.pairs


def test_listening_has_longer_clips_and_the_same_split(root, builds):
    project = open_project(load_preset("smoke", SMALL), "my songs é")
    listening = project.listening()
    assert listening.clip_length == 48_000
    for split in ("train", "val"):
        short, long = (
            {clip.sha256 for pair in manifest.split(split) for clip in (pair.input, pair.target)}
            for manifest in (project.manifest, listening)
        )
        assert long
        assert long <= short
    assert [path.name for path in builds] == ["manifest.json", "listening.json"]
    project.listening()
    assert len(builds) == 2


@pytest.mark.parametrize(
    ("data", "out", "changes", "words"),
    [
        ("none", "", {}, "none: no such folder; check the path"),
        ("file", "", {}, "file: a file, not a folder"),
        ("empty", "", {}, "empty: no music in this folder"),
        ("my songs é", "file", {}, "file: cannot be written"),
        ("my songs é", "file/run", {}, "file/run: cannot be written"),
        ("my songs é", "/proc/run", {}, "/proc/run: cannot be written"),
        ("my songs é", "", {"codec": "lpc"}, "codec 'lpc': unknown; choose mdct or encodec"),
        ("my songs é", "", {"data.clip_seconds": 1000}, "no usable pair for"),
        ("my songs é", "", {"data.pair_mode": "all"}, "data.pair_mode='all' is not allowed; use one of auto, "),
    ],
)
def test_what_a_project_cannot_be_made_of(root, data, out, changes, words):
    (root / "file").write_text("x")
    (root / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        open_project(load_preset("smoke", SMALL | changes), data, out)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_output_folder_inside_the_music_is_refused(root):
    with pytest.raises(UserError, match="inside the data folder"):
        open_project(load_preset("smoke", SMALL), "my songs é", "my songs é/out")
    assert not (root / "my songs é" / "out").exists()


def test_listening_clips_that_the_music_cannot_give_name_their_setting(root):
    project = open_project(load_preset("smoke", SMALL | {"listening.seconds": 500.0}), "my songs é")
    with pytest.raises(UserError, match=r"listening\.seconds=500 is too long"):
        project.listening()


def test_while_fusion_is_being_recorded_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(lib.project, "RECORD", tmp_path)
    project = Project(load_preset("smoke"), tmp_path, None, None, tmp_path)
    assert project.recorded_rows("fusion") == ((), {})
    write_record(tmp_path / "fusion.json", [{"setting": "wide masks", "seed": 0}], {"steps": 3})
    assert project.recorded_rows("fusion") == (({"setting": "wide masks", "seed": 0},), {"steps": 3})


def test_a_record_that_lacks_what_the_notebooks_need_is_named(tmp_path, monkeypatch):
    record = json.loads((lib.project.RECORD / "ablation.json").read_text())
    path = tmp_path / "ablation.json"
    monkeypatch.setattr(lib.project, "RECORD", tmp_path)
    project = lib.project.Project(load_preset("smoke"), tmp_path, None, None, None)
    with pytest.raises(UserError, match="no such record"):
        project.grid()
    path.write_text(json.dumps(record))
    results, source = project.grid()
    assert len(results) == len(record["results"])
    assert source == "recorded: preset demo, 100 steps, codec mdct"
    few = [row for row in record["results"] if row["variant"] != "final 2-stage"]
    for broken, what in (
        (record | {"results": few}, "final 2-stage"),
        (record | {"facts": {}}, "codec, preset, steps"),
    ):
        path.write_text(json.dumps(broken))
        with pytest.raises(UserError, match=rf"ablation\.json: lacks {what}; restore"):
            project.grid()


def test_a_refused_resume_and_a_training_under_way_leave_the_manifest_as_it_was(root):
    """`lib.compare` reads there what the run was trained on."""
    preset = load_preset("smoke", SMALL)
    project = open_project(preset, "my songs é", "out")
    codec = {"name": "mdct", "fingerprint": project.codec.fingerprint}
    Run.create(root / "out", {"data": project.index.stem, "codec": codec})
    before = (root / "out" / "manifest.json").read_bytes()
    make_demo_dataset(root / "others", num_songs=5, seconds=5, seed=1)
    with pytest.raises(UserError, match=r"out: holds a run that was trained on other pairs than .*others"):
        open_project(preset, "others", "out", resume=True)
    Run.create(root / "other codec", {"data": "index-1", "codec": {"name": "mine:Own", "fingerprint": "0" * 64}})
    with pytest.raises(UserError, match=r"other codec: this run was trained on latents of codec 'mine:Own'"):
        open_project(preset, "my songs é", "other codec", resume=True)
    (root / "my songs é" / "song_00.wav").touch()  # the same music
    open_project(preset, "my songs é", "out", resume=True)
    assert json.loads((root / "out" / "manifest.json").read_text())["pairs"] == json.loads(before)["pairs"]

    before = (root / "out" / "manifest.json").read_bytes()
    program = "import pathlib, sys; from lib.util.files import only_one\n"
    program += "with only_one(pathlib.Path(sys.argv[1])): print('in', flush=True); input()"
    command = [sys.executable, "-c", program, root / "out" / LOCK]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "in\n"
        open_project(preset, "my songs é", "out")  # to listen, say
        with pytest.raises(UserError, match=rf"out: process {other.pid} on .* is at work here"):
            open_project(preset, "others", "out")
        assert (root / "out" / "manifest.json").read_bytes() == before
        other.stdin.write("\n")
    open_project(preset, "others", "out")
    assert (root / "out" / "manifest.json").read_bytes() != before


# --- reopening --------------------------------------------------------------------------------------------------------


def test_a_project_is_reopened_with_its_own_settings_and_music(root):
    changes = SMALL | {"listening.seconds": 1.5, "train.max_steps": 7}
    opened = open_project(load_preset("demo", changes), "my songs é", "outputs/mine")
    again = reopen_project("outputs/mine")
    assert dataclasses.replace(again, codec=opened.codec) == opened
    assert again.codec.fingerprint == opened.codec.fingerprint
    assert reopen_project(root / "outputs" / "mine").listening().clip_length == 36_000
    changed = reopen_project("outputs/mine", {"listening.seconds": 1.0}).preset
    assert (changed.listening.seconds, changed.train.max_steps) == (1.0, 7)
    with pytest.raises(UserError, match=r"setting listening\.second is unknown; did you mean listening\.seconds"):
        reopen_project("outputs/mine", {"listening.second": 1.0})


def test_a_codec_by_a_relative_folder_is_found_again_from_anywhere(root, monkeypatch, tmp_path):
    write_weights(root / "weights")
    monkeypatch.chdir(root)
    opened = open_project(load_preset("demo", SMALL | {"codec": "weights"}), "my songs é", "outputs/mine")
    monkeypatch.chdir(tmp_path)
    assert reopen_project("outputs/mine").codec.fingerprint == opened.codec.fingerprint


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "no such file; open the project"), ("{", "damaged"), ('{"preset": {}, "data_dir": ""}', "name is missing")],
)
def test_a_folder_that_does_not_say_how_it_was_opened_is_named(root, content, words):
    (root / "outputs" / "mine").mkdir(parents=True)
    if content is not None:
        (root / "outputs" / "mine" / OPENED).write_text(content)
    with pytest.raises(UserError, match=rf"mine/project\.json: .*{words}"):
        reopen_project("outputs/mine")


@pytest.fixture
def outputs(root, save_run, tiny_codec, tiny_cascade) -> Path:
    """Three trained runs, the second of which is the newest, one whose project is not known, and other folders."""
    folder = root / "outputs"
    for name, when in (("demo", 300), ("mine", 500), ("smoke", 400), ("unknown", 600)):
        run = save_run(folder / name, tiny_codec, tiny_cascade())
        os.utime(run.path / "best", (when, when), follow_symlinks=False)
        if name != "unknown":
            (run.path / OPENED).write_text("{}")
    Run.create(folder / "begun", run.config)
    (folder / "begun" / OPENED).write_text("{}")
    (folder / "record").mkdir()
    return folder


def names(found: dict[str, Run]) -> list[str]:
    return [run.path.name for run in found.values()]


def test_the_newest_trained_run_comes_first(outputs):
    found = trained_runs(outputs=outputs)
    assert names(found) == ["mine", "smoke", "demo"]
    assert next(iter(found)).startswith("mine, saved 01 January 0")
    os.utime(outputs / "demo" / "best", follow_symlinks=False)
    assert names(trained_runs(outputs=outputs)) == ["demo", "mine", "smoke"]


@pytest.mark.parametrize("absolute", [False, True])
def test_a_given_folder_wins(outputs, root, absolute):
    found = trained_runs(outputs / "unknown" if absolute else "outputs/unknown", outputs)
    assert names(found) == ["unknown"]
    with pytest.raises(UserError, match="elsewhere: no run here"):
        trained_runs("outputs/elsewhere", outputs)


def test_without_a_run_one_line_says_where_none_is_and_what_to_do(outputs, root):
    for name in ("demo", "mine", "smoke"):
        (outputs / name / OPENED).unlink()
    for folder in (outputs, root / "nothing"):
        with pytest.raises(UserError, match=r"^\S*: no trained run here yet; `make demo` trains one") as caught:
            trained_runs(outputs=folder)
        assert caught.value._render_traceback_() == [str(caught.value)]  # all that a notebook shows
