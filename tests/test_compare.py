"""Two runs side by side: every number and every sound on the page is found again without the page's own code."""

import base64
import dataclasses
import html
import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import soundfile
import torch
from markupsafe import escape

import lib.compare
from lib.audio.decode import resample
from lib.audio.files import load_audio
from lib.codec.mdct import MdctCodec
from lib.compare import MEASURES, OF_LOSSES, Compared, compare_runs, main, music_new_to_both, names_of, spread
from lib.data.pairs import Manifest, Pair, build_manifest, read_manifest, write_manifest
from lib.evaluation.baselines import advantage
from lib.evaluation.fusion_metrics import sound_features, sound_metrics
from lib.fuse import fuse_clips
from lib.model.cascade import CascadeConfig
from lib.model.fusion import load_model
from lib.training.run import Run
from lib.util.errors import UserError
from lib.util.stats import TEST

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def codec():
    return MdctCodec()


NO_LOSSES = "; no losses, as they are of different pairs, codecs or objectives"


def row(step: int, split: str, loss: float) -> dict:
    stage = {"stage0/applied_scale": 1.0, "stage0/target_scale": 1.1}
    return {"split": split, "step": step, "epoch": 0, "loss": loss, "grad_norm": 2.0} | stage


def songs_of(pair: Pair) -> set[str]:
    return {pair.input.path, pair.target.path}


@pytest.fixture(scope="module")
def moved(songs) -> str:
    """The song that the second run has trained on, and the first one validates on."""
    return songs.split("val")[0].input.path


@pytest.fixture(scope="module")
def runs(tmp_path_factory, codec, songs, save_run, moved) -> tuple[Run, Run]:
    """One without masks and one with, whose split of the songs is another."""
    folder, cascade = tmp_path_factory.mktemp("compared"), CascadeConfig.reference(num_layers=1)
    train = {"learning_rate": 1e-4, "batch_size": 4, "loss": {"input_weight": 0.3}}
    first = save_run(folder / "a", codec, cascade, seed=1, train=train, data="index-1")
    other = cascade.with_stage(1, residual_weight=0.9)
    train = train | {"learning_rate": 1e-3, "loss": {"input_weight": 0.4}}
    second = save_run(folder / "b run", codec, other, "learned", seed=2, train=train, data="index-1")
    for run, losses in ((first, (2.0, 1.5, 1.75)), (second, (1.25,))):
        for number, loss in enumerate(losses, 1):
            run.log(row(number, "train", 10 * loss))
            run.log(row(number, "val", loss))
    write_manifest(songs, first.path / "manifest.json")
    write_manifest(retrained(songs, moved), second.path / "manifest.json")
    return first, second


def retrained(songs: Manifest, song: str) -> Manifest:
    """The manifest with one song more in training, and without its pairs with others."""
    kept = [pair for pair in songs.pairs if songs_of(pair) == {song} or song not in songs_of(pair)]
    pairs = [dataclasses.replace(pair, split="train") if song in songs_of(pair) else pair for pair in kept]
    return dataclasses.replace(songs, pairs=tuple(pairs))


@pytest.fixture(scope="module")
def new_pairs(songs, moved) -> list[Pair]:
    """What neither run was trained on."""
    pairs = [pair for pair in songs.split("val") if moved not in songs_of(pair)]
    assert 1 < len(pairs) < len(songs.split("val"))
    return pairs


@pytest.fixture(scope="module")
def page(tmp_path_factory, runs) -> tuple[str, dict, str]:
    """The page, its tables and facts as data, and what the program printed."""
    out = tmp_path_factory.mktemp("out") / "page"
    command = [sys.executable, "-m", "lib.compare", *(str(run.path) for run in runs), "-o", out, "--pairs", "1"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    return (out / "index.html").read_text(), json.loads((out / "summary.json").read_text()), ended.stdout


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_configs_differences_are_found_exactly(page):
    rows = page[1]["tables"]["What differs in the configs"]
    assert [tuple(row.values()) for row in rows] == [
        ("cascade.stages[1].residual_weight", "1.0", "0.9"),
        ("masking.masking", "none", "learned"),
        ("train.learning_rate", "0.0001", "0.001"),
        ("train.loss.input_weight", "0.3", "0.4"),
    ]
    assert [list(row) for row in rows] == 4 * [["field", "a", "b run"]]
    for row in rows:
        assert all(f"<td>{value}</td>" in page[0] for value in row.values())


def test_the_metrics_are_those_of_the_sounds(page, runs, codec, songs, new_pairs):
    _, summary, _ = page
    rows = {row["run"]: row for row in summary["tables"]["Means over pairs that neither run was trained on"]}
    trained = {row["run"]: row for row in summary["tables"][f"What was trained{NO_LOSSES}"]}
    assert list(rows) == list(trained) == ["a", "b run"]
    music = f"{songs.root}, validation set of a and b run"  # one, as what is new to both is the same
    assert {(row["music"], row["pairs"]) for row in rows.values()} == {(music, len(new_pairs))}
    everything = {}
    for run, steps in zip(runs, (3, 1), strict=True):
        model, judged = load_model(run), []
        for pair in new_pairs:
            wavs = [load_audio(songs.path(c), c.offset, c.length) for c in (pair.input, pair.target)]
            output = fuse_clips(*(wav[None] for wav in wavs), model, codec)[0]
            judged.append(sound_metrics(*map(sound_features, (output, *wavs))))
        row, everything[run.path.name] = rows[run.path.name], judged
        parameters = f"{sum(p.numel() for p in model.parameters()):,}"
        assert trained[run.path.name] == {"run": run.path.name, "parameters": parameters, "steps": steps}
        for name in MEASURES:
            mean = sum(judgement[name] for judgement in judged) / len(judged)
            assert float(row[name.replace("_", " ")]) == pytest.approx(mean, abs=0.0051)
    assert rows["a"]["onsets"] != rows["b run"]["onsets"]
    songs_of_pairs = [(pair.input.sha256, pair.target.sha256) for pair in new_pairs]
    said = advantage(everything, "a", "b run", songs_of_pairs).in_words("b run")
    assert f"{said} on {len(new_pairs)} pair(s) ({escape(TEST)})" in page[0]
    assert f"{said} on {len(new_pairs)} pair(s) ({TEST})\n" in page[2]


def test_both_runs_play_the_same_pair(page, runs, codec, songs, new_pairs):
    found = re.findall(r'<audio [^>]*aria-label="([^"]*)" src="data:audio/flac;base64,([^"]*)"', page[0])
    heard = {name: torch.from_numpy(soundfile.read(io.BytesIO(base64.b64decode(data)))[0]) for name, data in found}
    assert [name for name, _ in found] == ["input", "target", "a", "b run"]  # of one pair
    wavs = [load_audio(songs.path(c), c.offset, c.length) for c in (new_pairs[0].input, new_pairs[0].target)]
    wanted = {"input": wavs[0], "target": wavs[1]}
    for run in runs:
        wanted[run.path.name] = fuse_clips(*(wav[None] for wav in wavs), load_model(run), codec)[0]
    for name, wav in wanted.items():
        assert torch.allclose(heard[name].float(), wav[0], rtol=0, atol=1e-4), name


class References(HTMLParser):
    """Everything that a page names to be loaded or to be linked to."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]


def test_the_page_needs_nothing_but_itself(page):
    references = References()
    references.feed(page[0])
    assert len(references.found) > 5
    assert all(reference.startswith(("data:", "#")) for reference in references.found)


def test_the_page_says_what_was_compared(page, runs, songs, new_pairs):
    text, summary, printed = page
    assert "<title>a and b run</title>" in text
    for run in runs:
        assert summary["facts"][run.path.name].startswith(f"{run.path}, commit ")
        assert html.escape(summary["facts"][run.path.name]) in text
    count = len(new_pairs)
    music = f"{songs.root}, validation set of a and b run"
    assert summary["facts"][music] == f"{count} pairs that are new to both, {count} of them measured"
    assert f"figure of merit of a against b run on {music}: " in printed
    pictures = re.findall('alt="([^"]*)"', text)
    assert "Gradient norms" in pictures
    assert "Validation losses" not in pictures  # as objectives differ
    lines = printed.splitlines()
    assert "What differs in the configs" in lines
    assert re.search(r"^train\.learning_rate +0\.0001 +0\.001$", printed, re.MULTILINE)
    assert re.fullmatch(r"page: .*/page/index\.html", lines[-1])


def test_in_a_notebook_the_tables_come_back(tmp_path, runs, monkeypatch):
    monkeypatch.setattr(lib.compare, "ROOT", tmp_path)
    path, tables = compare_runs(*(run.path for run in runs), pairs=1, judged=1)
    assert path == tmp_path / "outputs" / "compare" / "a-b run" / "index.html"
    assert path.exists()
    assert len(tables["configs"].rows) == 4
    assert [row[1:3] for row in tables["metrics"].rows] == [["1", "a"], ["1", "b run"]]


def test_equal_runs_are_said_to_be_equal_on_pairs_of_two_songs(tmp_path, runs, songs):
    shutil.copytree(runs[0].path, tmp_path / "twin", symlinks=True)
    write_manifest(lib.compare.read_manifest(runs[0].path / "manifest.json"), tmp_path / "twin/manifest.json")
    _, tables = compare_runs(runs[0].path, tmp_path / "twin", tmp_path / "out", pairs=1, judged=99)
    of_two = sum(len(songs_of(pair)) == 2 for pair in songs.split("val"))
    assert 0 < of_two < len(songs.split("val"))
    assert tables["configs"].rows == [["none: the configs are equal"]]
    first, second = tables["metrics"].rows
    assert first[1:3] == [str(of_two), "a"]
    assert first[3:] == second[3:]
    assert tables["runs"].columns == ["run", "parameters", "steps", "lowest validation loss"]  # of equal objectives
    assert [row[-1] for row in tables["runs"].rows] == ["1.500", "1.500"]
    text = (tmp_path / "out" / "index.html").read_text()
    assert "fields of the configs that differ" in text
    assert {"Gradient norms", "Validation losses"} <= set(re.findall('alt="([^"]*)"', text))


# --- which pairs ------------------------------------------------------------------------------------------------------


def ids(pairs: dict) -> list[tuple[str, int, str, int]]:
    return [(Path(a.path).name, a.offset, Path(b.path).name, b.offset) for a, b in pairs.values()]


def expected(pairs: list[Pair]) -> list[tuple[str, int, str, int]]:
    return [(pair.input.path, pair.input.offset, pair.target.path, pair.target.offset) for pair in pairs]


def of(*runs: Path) -> dict[str, Path]:
    return {path.name: path for path in runs}


def test_only_pairs_that_neither_run_trained_on(runs, songs, new_pairs):
    paths = [run.path for run in runs]
    music = music_new_to_both(of(*paths))
    assert list(music) == [f"{songs.root}, validation set of a and b run"]
    (found,) = music.values()
    assert ids(found) == expected(new_pairs)
    assert all(Path(clip.path).is_file() for clips in found.values() for clip in clips)


def test_the_order_of_the_arguments_plays_no_part(tmp_path, runs, other_music):
    """Neither for the music nor for what is found on it."""
    pages = []
    for number, paths in enumerate(((runs[0].path, other_music), (other_music, runs[0].path))):
        page, tables = compare_runs(*paths, tmp_path / str(number), pairs=1, judged=2)
        pages.append((page.read_text(), {name: table.rows for name, table in tables.items()}))
    assert pages[0] == pages[1]
    assert [row[2] for row in pages[0][1]["metrics"]] == 2 * ["a", "other"]


@pytest.fixture
def other_music(tmp_path, runs, songs) -> Path:
    """A copy of the first run that was trained on other music, in `tmp_path/music`."""
    shutil.copytree(songs.root, tmp_path / "music")
    for path in (tmp_path / "music").glob("*.wav"):
        samples, rate = soundfile.read(path)
        soundfile.write(path, samples[::-1], rate, subtype="PCM_24")
    shutil.copytree(runs[0].path, tmp_path / "other", symlinks=True)
    build_manifest(tmp_path / "music", tmp_path / "other" / "manifest.json", 0.5, mode="both")
    return tmp_path / "other"


def test_both_runs_are_measured_on_both_validation_sets_and_on_other_music(tmp_path, runs, songs, other_music):
    shutil.copytree(songs.root, tmp_path / "third")
    for path in (tmp_path / "third").glob("*.wav"):
        samples, rate = soundfile.read(path)
        soundfile.write(path, samples / 2, rate, subtype="PCM_24")
    music = music_new_to_both(of(runs[0].path, other_music), tmp_path / "third")
    theirs = f"{tmp_path / 'music'}, validation set of other"
    assert list(music) == [f"{songs.root}, validation set of a", theirs, str(tmp_path / "third")]
    assert {Path(clip.path).parent for clips in music[theirs].values() for clip in clips} == {tmp_path / "music"}
    third = {clip.path for clips in music[str(tmp_path / "third")].values() for clip in clips}
    assert third == {str(path) for path in (tmp_path / "third").glob("*.wav")}  # no split, as neither was trained on it
    # a set that one of them was trained on is named, and left out
    manifest = read_manifest(other_music / "manifest.json")
    write_manifest(dataclasses.replace(manifest, pairs=known(manifest) + known(songs)), other_music / "manifest.json")
    music = music_new_to_both(of(runs[0].path, other_music), tmp_path / "third")
    assert [len(pairs) > 0 for pairs in music.values()] == [False, False, True]
    _, tables = compare_runs(runs[0].path, other_music, tmp_path / "out", data=tmp_path / "third", pairs=1, judged=1)
    assert [row[0] for row in tables["metrics"].rows] == 2 * [str(tmp_path / "third")]
    facts = json.loads((tmp_path / "out" / "summary.json").read_text())["facts"]
    assert facts[theirs] == "0 pairs that are new to both, 0 of them measured"


def test_a_set_whose_songs_are_not_here_is_left_out_and_named(tmp_path, runs, songs, other_music, capsys):
    absent = next((tmp_path / "music").glob("*.wav"))
    shutil.rmtree(tmp_path / "music")
    assert list(music_new_to_both(of(runs[0].path, other_music))) == [f"{songs.root}, validation set of a"]
    said = capsys.readouterr().err
    assert said.startswith(f"{tmp_path / 'music'}, validation set of other: left out, as {absent.parent}/")
    assert said.count("\n") == 1
    with pytest.raises(UserError, match=r"left out, as .* is not there; .*name a folder of other music by --data"):
        music_new_to_both({"x": other_music, "y": other_music})


def test_the_same_songs_in_two_folders_are_one_set(tmp_path, runs, songs):
    shutil.copytree(songs.root, tmp_path / "copy")
    shutil.copytree(runs[0].path, tmp_path / "other", symlinks=True)
    manifest = read_manifest(tmp_path / "other" / "manifest.json")
    write_manifest(dataclasses.replace(manifest, root=tmp_path / "copy"), tmp_path / "other" / "manifest.json")
    assert len(music_new_to_both(of(runs[0].path, tmp_path / "other"))) == 1


def known(manifest: Manifest) -> tuple[Pair, ...]:
    """All of its pairs, as training pairs."""
    return tuple(dataclasses.replace(pair, split="train") for pair in manifest.pairs)


def test_losses_are_shown_where_pairs_codec_and_objective_are_the_same():
    changed = {"masking.masking": True, "train.learning_rate": True, "data": False, "codec.fingerprint": False}
    changed |= {"train.loss.notes_weight": False, "train.max_val_pairs": False}
    for field, compare in changed.items():
        assert field.startswith(OF_LOSSES) is not compare, field


def test_the_longer_clips_for_listening_are_taken_where_there_are_any(tmp_path, runs, songs, new_pairs):
    first = tmp_path / "first"
    first.mkdir()
    write_manifest(songs, first / "manifest.json")
    longer = [dataclasses.replace(new_pairs[0], mode="cross"), songs.split("val")[0]]
    write_manifest(dataclasses.replace(songs, pairs=tuple(longer)), first / "listening.json")
    found = music_new_to_both(of(first, runs[1].path))
    assert ids(found[f"{songs.root}, validation set of first"]) == expected(new_pairs[:1])
    # a song that the first run itself was trained on is none to compare with, whatever it listens to
    trained = dataclasses.replace(songs.split("train")[0], split="val")
    write_manifest(dataclasses.replace(songs, pairs=(trained, new_pairs[0])), first / "listening.json")
    others = tuple(pair for pair in songs.split("train") if not songs_of(pair) & songs_of(trained))
    (tmp_path / "second").mkdir()
    write_manifest(dataclasses.replace(songs, pairs=others), tmp_path / "second" / "manifest.json")
    found = music_new_to_both(of(first, tmp_path / "second"))
    assert ids(found[f"{songs.root}, validation set of first"]) == expected(new_pairs[:1])


def test_pairs_are_spread_evenly():
    pairs = {str(i): (i, i) for i in range(10)}
    assert list(spread(pairs, 3)) == ["0", "3", "6"]
    assert spread(pairs, 10) == spread(pairs, 99) == pairs


# --- codecs of other rates --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own(tmp_path_factory, blocks, songs, save_run) -> Run:
    """A run of the codec at 16 kHz, split by songs like the others."""
    folder = tmp_path_factory.mktemp("compared") / "own"
    cascade = dataclasses.replace(CascadeConfig.reference(1, num_layers=1), latent_dim=blocks.dim)
    run = save_run(folder, blocks, cascade, "learned", seed=3)
    build_manifest(songs.root, folder / "manifest.json", 0.5, mode="both", sample_rate=blocks.sample_rate)
    return run


def test_runs_of_codecs_at_two_rates_are_compared_on_the_same_seconds(tmp_path, runs, own, songs, blocks, codec):
    out, codecs = tmp_path / "out", {"a": (runs[0], codec), "own": (own, blocks)}
    _, tables = compare_runs(runs[0].path, own.path, out, pairs=1, judged=1)
    rates = re.findall(r'data-seconds="([0-9.]+)" data-rate="(\d+)"', (out / "index.html").read_text())
    assert rates == [("0.500000", "24000"), ("0.500000", "16000")]  # those of the two validation sets
    table = tables["metrics"]
    rows = [dict(zip(table.columns, cells, strict=True)) for cells in table.rows]
    assert [row["run"] for row in rows] == ["a", "own", "a", "own"]
    for rate, pair in ((24_000, rows[:2]), (16_000, rows[2:])):
        manifest = read_manifest((own if rate == 16_000 else runs[0]).path / "manifest.json")
        clips = next(p for p in manifest.split("val") if len(songs_of(p)) == 2)
        wavs = [load_audio(manifest.path(c), c.offset, rate // 2, rate) for c in (clips.input, clips.target)]
        for row in pair:
            run, its_codec = codecs[row["run"]]
            at_its_rate = [resample(wav, rate, its_codec.sample_rate)[None] for wav in wavs]
            fusion = resample(fuse_clips(*at_its_rate, load_model(run), its_codec)[0], its_codec.sample_rate, rate)
            sounds = [resample(wav, rate, 24_000) for wav in (fusion, *wavs)]
            judged = sound_metrics(*map(sound_features, sounds))
            for name in MEASURES:
                found = float(row[name.replace("_", " ")])
                assert found == pytest.approx(judged[name], abs=0.0051), (rate, row["run"], name)


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("paths", "wanted"),
    [
        (("outputs/a", "outputs/b"), ["a", "b"]),
        (("one/demo", "two/demo"), ["one/demo", "two/demo"]),
        (("one/x/demo", "two/x/demo"), ["one/x/demo", "two/x/demo"]),
        (("/demo", "/two/demo"), ["/demo", "two/demo"]),
        (("one/../b", "a"), ["b", "a"]),
    ],
)
def test_runs_are_named_by_as_many_folders_as_tell_them_apart(paths, wanted):
    assert names_of([Path(path) for path in paths]) == wanted


def test_a_link_is_the_run_that_it_points_to(tmp_path, runs):
    (tmp_path / "link").symlink_to(runs[0].path)
    with pytest.raises(UserError, match="link: compared with itself; name two runs"):
        names_of([tmp_path / "link", runs[0].path])


def test_runs_in_folders_of_one_name_get_a_page(tmp_path, runs, monkeypatch):
    for parent, run in zip(("one", "two"), runs, strict=True):
        shutil.copytree(run.path, tmp_path / parent / "demo", symlinks=True)
        manifest = lib.compare.read_manifest(run.path / "manifest.json")
        write_manifest(manifest, tmp_path / parent / "demo" / "manifest.json")
    monkeypatch.setattr(lib.compare, "ROOT", tmp_path)
    page, tables = compare_runs(tmp_path / "one/demo", tmp_path / "two/demo", pairs=1, judged=1)
    assert page.parent == tmp_path / "outputs" / "compare" / "one_demo-two_demo"
    assert [row[2] for row in tables["metrics"].rows] == ["one/demo", "two/demo"]


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def program(monkeypatch, capsys):
    """`program(*arguments)` runs it and returns the exit code and the lines on stderr."""

    def run(*arguments: object) -> tuple[int, list[str]]:
        monkeypatch.setattr(sys, "argv", ["lib.compare", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr().err.splitlines()

    return run


@pytest.fixture
def spoiled(tmp_path, runs) -> Path:
    """A copy of the second run to take something from."""
    shutil.copytree(runs[1].path, tmp_path / "spoiled", symlinks=True)
    manifest = lib.compare.read_manifest(runs[1].path / "manifest.json")
    write_manifest(manifest, tmp_path / "spoiled" / "manifest.json")
    return tmp_path / "spoiled"


def test_mistakes_in_what_is_asked_for(program, runs, tmp_path):
    first, second = (run.path for run in runs)
    told = {
        (first, first): f"error: {first}: compared with itself; name two runs",
        (
            first,
            tmp_path,
        ): f"error: {tmp_path}: no run here (no config.json); `make demo` trains one, and notebooks 04 and 06 do",
        (first, second, "--pairs", 0): "error: --pairs 0, --judged 24: at least one pair each is needed",
        (first, second, "--judged", -1): "error: --pairs 3, --judged -1: at least one pair each is needed",
    }
    for arguments, line in told.items():
        assert program(*arguments, "--out", tmp_path / "out") == (2, [line])
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    code, lines = program(first, second, "--out", tmp_path / "file")
    assert (code, lines[-1].split("(")[0]) == (2, f"error: {tmp_path / 'file'}: cannot be written ")
    code, lines = program(first, second, "--pairs", "many")
    assert code == 2
    assert "argument --pairs: invalid int value: 'many'" in lines[-1]


def without_manifest(run: Path) -> None:
    (run / "manifest.json").unlink()


def without_checkpoint(run: Path) -> None:
    (run / "best").unlink()


def damaged(run: Path) -> None:
    (run / "best" / "model.safetensors").write_bytes(b"")


def without_codec(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    del config["codec"]
    (run / "config.json").write_text(json.dumps(config))


SPOILED = {
    without_manifest: r"spoiled/manifest\.json: no such file; build the manifest again",
    without_checkpoint: r"spoiled/best: no checkpoint here; train this run first",
    damaged: r"best/model\.safetensors: truncated or changed since it was written; .*train again",
    without_codec: r"spoiled/config\.json: names no codec, as a run of the fusion model does; .*restore the file",
}


@pytest.mark.parametrize("spoil", SPOILED, ids=lambda spoil: spoil.__name__)
@pytest.mark.parametrize("place", [0, 1])
def test_a_run_that_lacks_something_is_reported_in_one_line(program, runs, spoiled, tmp_path, spoil, place):
    spoil(spoiled)
    arguments = [runs[0].path]
    arguments.insert(place, spoiled)
    code, (line,) = program(*arguments, "--out", tmp_path / "out")
    assert code == 2
    assert re.fullmatch(rf"error: .*{SPOILED[spoil]}", line)
    assert not (tmp_path / "out").exists()


def test_pairs_that_one_run_knows_are_reported(program, runs, songs, spoiled, tmp_path):
    pairs = tuple(dataclasses.replace(pair, split="train") for pair in songs.pairs)
    write_manifest(dataclasses.replace(songs, pairs=pairs), spoiled / "manifest.json")
    told = "error: a and spoiled: one of the two was trained on the songs of every pair of "
    told += f"{songs.root}, validation set of a; {songs.root}, validation set of spoiled; "
    told += "name a folder of other music by --data"
    assert program(runs[0].path, spoiled, "--out", tmp_path / "out") == (2, [told])


def test_a_runs_own_page_is_not_written_over(program, runs):
    before = sorted(path.name for path in runs[0].path.iterdir())
    code, (line,) = program(runs[0].path, runs[1].path, "--out", runs[0].path)
    assert (code, line) == (
        2,
        f"error: {runs[0].path}: holds a run or its page, which would be lost; choose another folder",
    )
    assert sorted(path.name for path in runs[0].path.iterdir()) == before


# --- codecs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "folder", "wanted"),
    [
        *(("mdct", "", "mdct"), ("mdct", "w", "mdct"), ("encodec", "", "encodec"), ("encodec", "w", "w")),
        ("mine:Codec", "its:Codec", "its:Codec"),
    ],
)
def test_weights_are_for_the_runs_that_need_them(tmp_path, monkeypatch, name, folder, wanted):
    codec = SimpleNamespace(fingerprint="f")
    asked = []
    monkeypatch.setattr(lib.compare, "load_codec", lambda name: asked.append(name) or codec)
    monkeypatch.setattr(lib.compare, "load_model", lambda *args, **options: None)
    Compared("a", Run(tmp_path, {"codec": {"name": name, "fingerprint": "f"}}), folder)
    assert asked == [wanted]
