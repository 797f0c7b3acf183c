"""Folders to pairs: layouts, modes, the split by content, the manifest, and what is skipped and why."""

import json
import os
import re
import shutil
import signal
import sys
import time
from dataclasses import replace
from multiprocessing.queues import Queue

import numpy as np
import pytest
import soundfile
import torch

from lib.audio.files import SAMPLE_RATE, load_audio
from lib.data import pairs
from lib.data.pairs import MODES, Clip, build_manifest, read_manifest
from lib.util.errors import UserError

CLIP = 4_800  # samples; clip_seconds=0.2 keeps the files small


def song(path, seconds=1.0, seed=None, rate=SAMPLE_RATE):
    """Write noise that only this seed (by default, this name) has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = sum(path.name.encode()) if seed is None else seed
    samples = 0.1 * np.random.default_rng([seed, rate]).standard_normal(round(seconds * rate))
    soundfile.write(path, samples, rate)
    return path


def tree(root, count=6, **options):
    for index in range(count):
        song(root / ("rock" if index % 2 else "jazz") / f"song {index}.wav", seed=index, **options)
    return root


def named(root, train=(1, 2), val=(3,), target="target", seconds=0.2):
    for split, numbers in (("train", train), ("val", val)):
        for number in numbers:
            song(root / split / f"pair_{number:04d}_input.wav", seconds, seed=10 * number)
            song(root / split / f"pair_{number:04d}_{target}.wav", seconds, seed=10 * number + 1)
    return root


def build(root, out=None, **options):
    return build_manifest(root, out or root.parent / "out" / "pairs.json", **({"clip_seconds": 0.2} | options))


def reasons(manifest):
    return {item.path: item.reason for item in manifest.skipped}


def clips(manifest, split):
    return [clip for pair in manifest.split(split) for clip in (pair.input, pair.target)]


# ---- layouts and modes


@pytest.mark.parametrize("target", ["target", "output", "TARGET"])
def test_named_pairs_follow_their_names_and_folders(tmp_path, target):
    manifest = build(named(tmp_path / "data", target=target))
    assert [(pair.id, pair.split, pair.mode) for pair in manifest.pairs] == [
        ("train_pair_0001", "train", "named"),
        ("train_pair_0002", "train", "named"),
        ("val_pair_0003", "val", "named"),
    ]
    for pair in manifest.pairs:
        number = pair.id[-4:]
        assert pair.input.path == f"{pair.split}/pair_{number}_input.wav"
        assert pair.target.path == f"{pair.split}/pair_{number}_{target}.wav"
        assert (pair.input.offset, pair.input.length) == (0, CLIP)
    assert manifest.skipped == ()


def test_long_named_files_are_cut_at_the_same_places(tmp_path):
    root = named(tmp_path / "data", seconds=0.6)
    song(root / "train/pair_0001_target.wav", 0.45, seed=1)  # ends sooner than its input
    manifest = build(root)
    assert [(pair.id, pair.input.offset) for pair in manifest.split("train") if "0001" in pair.id] == [
        ("train_pair_0001_0", 0),
        ("train_pair_0001_1", CLIP),
    ]
    assert all(pair.input.offset == pair.target.offset for pair in manifest.pairs)
    assert len(manifest.split("val")) == 3


def test_incomplete_and_superfluous_named_files_are_listed(tmp_path):
    root = named(tmp_path / "data")
    song(root / "train/pair_0007_input.wav")
    song(root / "train/pair_0008_target.wav")
    song(root / "train/pair_0008_input.wav").write_bytes(b"")
    song(root / "train/pair_0001_output.wav")
    song(root / "train/other.wav")
    song(root / "elsewhere/pair_0009_input.wav")
    manifest = build(root)
    assert len(manifest.pairs) == 3
    found = reasons(manifest)
    assert "no usable target; add pair_0007_target.*" in found["train/pair_0007_input.wav"]
    assert "0 bytes" in found["train/pair_0008_input.wav"]
    assert "no usable input" in found["train/pair_0008_target.wav"]
    for path in ("train/pair_0001_output.wav", "train/other.wav", "elsewhere/pair_0009_input.wav"):
        assert "neither train/ nor val/ pair_XXXX" in found[path]
    assert len(found) == 6


def test_continuation_pairs_are_consecutive_clips_of_one_file(tmp_path):
    manifest = build(tree(tmp_path / "data", seconds=0.7), mode="continuation")
    assert len(manifest.pairs) == 6 * 2  # three whole clips a file, the half one left over
    for pair in manifest.pairs:
        assert pair.mode == "continuation"
        assert pair.input.path == pair.target.path
        assert pair.target.offset == pair.input.offset + CLIP
        assert pair.input.length == pair.target.length == CLIP


def test_cross_pairs_join_two_files_of_one_split(tmp_path):
    manifest = build(tree(tmp_path / "data"), mode="cross")
    for split, files in (("train", 4), ("val", 2)):
        chosen = manifest.split(split)
        assert files <= len(chosen) <= 4 * files
        assert len({(pair.input, pair.target) for pair in chosen}) == len(chosen)
        assert len({pair.input.path for pair in chosen}) == files
        assert all(pair.input.sha256 != pair.target.sha256 for pair in chosen)
    other = build(tree(tmp_path / "data"), mode="cross", seed=1)
    assert {(p.input, p.target) for p in other.pairs} != {(p.input, p.target) for p in manifest.pairs}


def test_both_is_continuation_and_cross_and_auto_chooses(tmp_path):
    root = tree(tmp_path / "data")
    both, auto = build(root, mode="both"), build(root)
    assert auto.pairs == both.pairs
    by_mode = {mode: build(root, mode=mode).pairs for mode in ("continuation", "cross")}
    assert set(both.pairs) == set(by_mode["continuation"]) | set(by_mode["cross"])
    assert len({pair.id for pair in both.pairs}) == len(both.pairs)
    assert {pair.mode for pair in build(named(tmp_path / "named")).pairs} == {"named"}


def test_every_source_format_and_rate_can_be_paired(tmp_path):
    for index, name in enumerate(["a.wav", "b.flac", "c.ogg", "d.mp3", "E.WAV"]):
        song(tmp_path / "data" / name, 1.0, seed=index, rate=44_100)
    manifest = build(tmp_path / "data")
    assert {clip.path for clip in clips(manifest, "train") + clips(manifest, "val")} == {
        "a.wav", "b.flac", "c.ogg", "d.mp3", "E.WAV"
    }  # fmt: skip
    for clip in clips(manifest, "train"):
        assert load_audio(manifest.path(clip), clip.offset, clip.length).shape == (1, clip.length)


def test_clips_are_counted_and_read_at_the_codecs_rate(tmp_path):
    for index in range(4):
        song(tmp_path / "data" / f"{index}.wav", 1.0, seed=index, rate=44_100)
    manifest = build(tmp_path / "data", sample_rate=16_000, mode="continuation")
    assert manifest.sample_rate == 16_000
    assert read_manifest(tmp_path / "out" / "pairs.json") == manifest
    assert sorted({clip.offset for clip in clips(manifest, "train")}) == [0, 3_200, 6_400, 9_600, 12_800]
    pair = manifest.split("train")[1]
    wavs = pairs.load_pair(*(pairs.whole_clip(manifest, clip) for clip in (pair.input, pair.target)))
    both = load_audio(manifest.path(pair.input), 3_200, 6_400, 16_000)
    torch.testing.assert_close(torch.cat(wavs, 1), both, rtol=0, atol=1e-5)
    assert build(tmp_path / "data", mode="continuation").pairs[1].input.offset == 4_800  # and not the earlier manifest


def test_a_last_clip_may_be_a_tenth_short(tmp_path):
    root = tree(tmp_path / "data", count=4, seconds=0.38)
    song(root / "long enough.wav", 0.5)
    found = build(root, mode="continuation").pairs
    assert sorted(pair.target.length for pair in found) == [4_320, 4_320, 4_320, 4_320, 4_800]
    song(root / "too short.wav", 0.379)
    manifest = build(root, mode="continuation")
    assert len(manifest.pairs) == 5
    assert "needs a second clip in the same file" in reasons(manifest)["too short.wav"]
    song(root / "far too short.wav", 0.1)
    found = reasons(build(root))
    assert found == {"far too short.wav": found["far too short.wav"]}  # a cross pair takes the other one
    assert re.match(r"too short: 0\.10 s, a clip needs 0\.18 s; use", found["far too short.wav"])


# ---- the split


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(4))
def test_train_and_val_share_no_source(tmp_path, mode, seed):
    """In every mode, with copies under other names, in other folders, and with another suffix."""
    root = tmp_path / "data"
    if mode == "named":
        named(root, train=(1, 2, 4), val=(3, 5))
        shutil.copy(root / "val/pair_0003_target.wav", root / "train/pair_0001_target.wav")
    else:
        tree(root, count=7)
        for index in range(7):
            shutil.copy(next(root.rglob(f"song {index}.wav")), root / f"{9 - index} copy.wav")
        shutil.copy(next(root.rglob("song 0.wav")), root / "disguised.flac")
    manifest = build(root, mode=mode, seed=seed)
    train, val = ({clip.sha256 for clip in clips(manifest, split)} for split in ("train", "val"))
    assert train
    assert val
    assert not train & val
    assert not {clip.key for clip in clips(manifest, "train")} & {clip.key for clip in clips(manifest, "val")}
    for split in ("train", "val"):  # the recorded hashes are those of the files
        for clip in clips(manifest, split):
            assert clip.sha256 == pairs.check_audio(manifest.path(clip)).sha256


def test_named_content_of_val_is_dropped_from_train(tmp_path):
    root = named(tmp_path / "data")
    shutil.copy(root / "val/pair_0003_input.wav", root / "train/pair_0002_target.wav")
    manifest = build(root)
    assert [pair.id for pair in manifest.pairs] == ["train_pair_0001", "val_pair_0003"]
    found = reasons(manifest)
    assert found["train/pair_0002_target.wav"].startswith("its content is in val/ too")
    assert found["train/pair_0002_input.wav"].startswith("the other half of its pair is in val/ too")


def test_a_copy_counts_once(tmp_path):
    root = tree(tmp_path / "data", count=4)
    before = build(root)
    shutil.copy(root / "jazz/song 0.wav", root / "z copy.wav")
    after = build(root)
    assert after.pairs == before.pairs
    assert reasons(after) == {"z copy.wav": "same content as jazz/song 0.wav, which is used; remove one of them"}


@pytest.mark.parametrize(("count", "val"), [(2, 1), (3, 1), (4, 2), (5, 2), (8, 2), (11, 3)])
def test_size_of_the_split(tmp_path, count, val):
    manifest = build(tree(tmp_path / "data", count), mode="continuation")
    assert len({clip.path for clip in clips(manifest, "val")}) == val
    assert len({clip.path for clip in clips(manifest, "train")}) == count - val


def test_the_split_depends_on_content_and_seed_only(tmp_path):
    root = tree(tmp_path / "data", count=8)

    def validation(**options):
        return {clip.sha256 for clip in clips(build(root, **options), "val")}

    expected = validation()
    assert validation(clip_seconds=0.4) == validation(mode="continuation") == expected
    assert len({frozenset(validation(seed=seed)) for seed in range(6)}) > 1
    for index, path in enumerate(sorted(root.rglob("*.wav"))):
        path.rename(root / f"{index * 3 % 8} renamed.wav")
    assert validation() == expected


@pytest.mark.parametrize("mode", ["auto", "both", "continuation", "cross"])
def test_songs_of_any_name_in_train_and_val_are_split_by_folder(tmp_path, mode):
    root = tmp_path / "data"
    for number in range(4):
        song(root / "train" / "an album" / f"song {number}.wav", seed=number)
    for number in range(4, 6):
        song(root / "val" / f"song {number}.wav", seed=number)
    shutil.copy(root / "val" / "song 4.wav", root / "train" / "copy.wav")
    song(root / "elsewhere.wav", seed=9)
    for seed in range(3):
        manifest = build(root, mode=mode, seed=seed)
        for split, count in (("train", 4), ("val", 2)):
            paths = {clip.path for clip in clips(manifest, split)}
            assert len(paths) == count
            assert all(path.startswith(f"{split}/") for path in paths)
        assert reasons(manifest) == {
            "train/copy.wav": "its content is in val/ too, and train must not see it; remove one of them",
            "elsewhere.wav": "neither in train/ nor in val/; move it into one",
        }


def test_other_names_of_the_split_count_too_and_a_link_changes_nothing(tmp_path):
    root = tmp_path / "data"
    for number in range(6):
        song(root / ("Train" if number < 4 else "validation") / f"song {number}.wav", seed=number)
    (root / "All").symlink_to("Train")
    manifest = build(root)
    for split, folder, count in (("train", "Train/", 4), ("val", "validation/", 2)):
        paths = {clip.path for clip in clips(manifest, split)}
        assert len(paths) == count
        assert all(path.startswith(folder) for path in paths)
    assert manifest.split_by == "the folders train/ and val/"
    assert build(tree(tmp_path / "tree"), tmp_path / "other.json").split_by == "a hash of each song"


def test_a_split_without_music_on_one_side_is_refused(tmp_path):
    """Its training songs would validate."""
    root = tmp_path / "data"
    for number in range(4):
        song(root / "train" / f"song {number}.wav", seed=number)
    (root / "val").mkdir()
    (root / "val" / "song 4.wav").write_text("no audio")
    with pytest.raises(
        UserError, match=r"data: is split into train/ and val/, but no file of val/ is usable; put music"
    ):
        build(root)


def test_same_bytes_for_any_number_of_cores_and_listing_order(tmp_path, monkeypatch):
    root, out = tree(tmp_path / "data", count=10), tmp_path / "pairs.json"
    (root / "bad.wav").write_text("no music")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: [0])
    build(root, out)
    first = out.read_bytes()
    out.unlink()
    walk = os.walk

    def backwards(*args, **options):
        for folder, folders, files in walk(*args, **options):
            folders.reverse()
            yield folder, folders, files[::-1]

    monkeypatch.setattr(os, "walk", backwards)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    build(root, out)
    assert out.read_bytes() == first


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no process is forked")
@pytest.mark.parametrize("seconds", [0.0, 0.5])
def test_a_killed_worker_is_said_in_one_line(tmp_path, monkeypatch, seconds):
    """As the kernel kills one where memory runs out: while files are read, and while they are still handed out."""
    root, put = tree(tmp_path / "data", count=4), Queue.put
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(2))
    monkeypatch.setattr(Queue, "put", lambda *args: (put(*args), time.sleep(seconds)))
    with pytest.raises(UserError, match=r"data: a process that read files here was killed; free some memory"):
        build_manifest(root, tmp_path / "pairs.json", 2.0, check_file=lambda path: os.kill(os.getpid(), signal.SIGKILL))


# ---- bad input


def test_every_bad_file_is_listed_and_the_rest_is_used(tmp_path):
    root = tree(tmp_path / "data")
    good = build(root).pairs
    bad = root / "bad"
    whole = song(bad / "cut.flac", 2).read_bytes()
    (bad / "cut.flac").write_bytes(whole[: len(whole) // 2])
    (bad / "empty.wav").touch()
    (bad / "text.mp3").write_text("not music" * 500)
    soundfile.write(bad / "nan.wav", np.full(9_000, np.nan), 24_000, subtype="FLOAT")
    soundfile.write(bad / "silent.wav", np.zeros(9_000), 24_000)
    song(bad / "blip.wav", 0.01)
    (bad / "broken link.wav").symlink_to("gone.wav")
    (bad / "cover.jpg").write_bytes(b"jpg")
    (root / ".hidden.wav").write_bytes(b"")
    song(root / ".cache" / "hidden.wav")
    manifest = build(root, out=root / "pairs.json")  # inside the folder: must not list itself the second time
    assert build(root, out=root / "pairs.json") == manifest
    assert manifest.pairs == good
    found = reasons(manifest)
    expected = {
        "cut.flac": "damaged", "empty.wav": "0 bytes", "text.mp3": "not audio", "nan.wav": "at 0.000 s",
        "silent.wav": "silent", "blip.wav": "codec frame", "broken link.wav": "no such file", "cover.jpg": "not WAV",
    }  # fmt: skip
    assert set(found) == {f"bad/{name}" for name in expected}
    for name, fault in expected.items():
        assert fault in found[f"bad/{name}"]
        assert ";" in found[f"bad/{name}"]


def test_folders_without_music(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no music in this folder; put WAV, FLAC, OGG, MP3, M4A"):
        build(tmp_path / "empty")
    (tmp_path / "empty" / "song.wma").write_bytes(b"x")
    with pytest.raises(UserError, match=r"no music in this folder \(only 1 other files\)"):
        build(tmp_path / "empty")
    with pytest.raises(UserError, match="gone: no such folder; check the path"):
        build(tmp_path / "gone")
    path = song(tmp_path / "song.wav")
    with pytest.raises(UserError, match=r"song\.wav: a file, not a folder"):
        build(path)


def test_no_usable_pair_is_explained(tmp_path):
    for index in range(5):
        (tmp_path / f"{index}.wav").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"no usable pair for train among 5 music files; .*0\.wav: empty.*2\.wav: empty"
    ):
        build(tmp_path)


def test_one_file_cannot_be_split(tmp_path):
    song(tmp_path / "data/a.wav")
    (tmp_path / "data/b.wav").write_bytes(b"")
    with pytest.raises(UserError, match=r"only one usable file \(a\.wav\).* needs another; add a file"):
        build(tmp_path / "data")


def test_cross_pairs_need_two_files_in_each_split(tmp_path):
    with pytest.raises(UserError, match=r"no usable pair for val.*needs a second file in the same split"):
        build(tree(tmp_path / "data", count=3), mode="cross")


def test_named_layout_without_val(tmp_path):
    root = named(tmp_path / "data", val=())
    with pytest.raises(UserError, match="no usable pair for val"):
        build(root)
    with pytest.raises(UserError, match="no usable train/ and val/ with pair_XXXX"):
        build(tree(tmp_path / "tree"), mode="named")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "random"}, "mode='random' is not allowed; use one of auto, named, continuation, cross, both"),
        ({"clip_seconds": 0}, "clip_seconds=0 is not allowed; use 0.0133 or more, one codec frame"),
        ({"clip_seconds": float("nan")}, "clip_seconds=nan is not allowed"),
    ],
)
def test_impossible_options_are_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        build(tree(tmp_path / "data"), **options)


# ---- the manifest's file: read as written, moved together with its data, damage named by file and line


def test_a_manifest_is_read_as_it_was_built(tmp_path):
    root = tree(tmp_path / "Mein Ordner 音楽")
    song(root / "ü \u2028 ж.wav")
    song(root / "tmp.wav", seed=99).rename(os.fsdecode(os.fsencode(root) + b"/\xff.wav"))
    (root / "bad.wav").write_text("no music")
    out = tmp_path / "out" / "pairs.json"
    manifest = build(root, out, seed=3)
    assert read_manifest(out) == manifest
    assert (manifest.clip_length, manifest.sample_rate, manifest.seed) == (CLIP, 24_000, 3)
    assert set(manifest.split("train")) | set(manifest.split("val")) == set(manifest.pairs)
    written = json.loads(out.read_text(errors="surrogateescape"))
    assert len(written["pairs"]) == len(manifest.pairs)
    assert set(written["pairs"][0]) == {"id", "split", "mode", "input", "target"}
    assert set(written["pairs"][0]["input"]) == {"path", "offset", "length", "sha256", "sample_rate"}
    assert [item["path"] for item in written["skipped"]] == ["bad.wav"]
    with pytest.raises(ValueError, match="unknown split 'test'; choose one of train, val"):
        manifest.split("test")


def test_data_and_manifest_can_be_moved_together(tmp_path):
    tree(tmp_path / "a/data")
    build(tmp_path / "a/data", tmp_path / "a/out/pairs.json")
    (tmp_path / "a").rename(tmp_path / "b")
    manifest = read_manifest(tmp_path / "b/out/pairs.json")
    assert all(manifest.path(pair.input).is_file() for pair in manifest.pairs)
    (tmp_path / "b/data/jazz/song 0.wav").touch()
    assert build(tmp_path / "b/data", tmp_path / "b/out/pairs.json").pairs == manifest.pairs


def test_the_key_depends_on_content_and_not_on_names():
    clip = Clip("a.wav", 0, 100, "0" * 64)
    assert replace(clip, path="b.wav").key == clip.key
    changed = [replace(clip, offset=1), replace(clip, length=99), replace(clip, sha256="1" * 64)]
    assert len({clip.key, *(other.key for other in changed)}) == 4
    assert re.fullmatch("[0-9a-f]{16}", clip.key)


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ('"version": 2', '"version": 1', "version 1 is not 2"),
        ('"version"', '"v"', "no field 'version'"),
        ('"root"', '"rot"', "root is missing"),
        ('"clip_length": 4800', '"clip_length": "x"', "clip_length='x' is not allowed; use a whole number"),
        ("{", "", "damaged"),
        ('"split": "', '"split": "un', r"pairs\[0\]\.split='untrain' is not allowed"),
        ('"mode": "', '"mode": "un', r"pairs\[0\]\.mode='uncontinuation' is not allowed"),
        ('"offset": ', '"offset": -1', r"pairs\[0\]\.input\.offset=-1\d+ is not allowed; use a whole number"),
        ('"sha256": "', '"sha256": "x', r"pairs\[0\]\.input\.sha256='x"),
        ('"input"', '"inputs"', r"pairs\[0\]\.input is missing"),
        ('"target": {', '"target": {"more": 1, ', "more"),
        ('"reason"', '"why"', r"skipped\[0\]\.reason is missing"),
        ('"id"', '"id', "damaged"),
    ],
)
def test_a_damaged_manifest_is_named_with_its_field(tmp_path, old, new, fault):
    root, out = tree(tmp_path / "data"), tmp_path / "pairs.json"
    (root / "cover.jpg").write_bytes(b"jpg")
    manifest = build(root, out, mode="continuation")
    out.write_text(out.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=rf"pairs\.json: .*{fault}"):
        read_manifest(out)
    assert build(root, out, mode="continuation") == manifest == read_manifest(out)


def test_a_missing_empty_or_cut_manifest(tmp_path):
    out = tmp_path / "pairs.json"
    with pytest.raises(UserError, match=r"pairs\.json: no such file; build the manifest again"):
        read_manifest(out)
    build(tree(tmp_path / "data"), out)
    whole = out.read_text()
    for text in (whole[:-4], "", "[]"):
        out.write_text(text)
        with pytest.raises(UserError, match=r"pairs\.json: damaged .*; build the manifest again"):
            read_manifest(out)
    out.write_text(json.dumps(json.loads(whole) | {"pairs": []}))  # by hand, under the old `made_of`
    with pytest.raises(UserError, match=r"pairs\.json: pairs=\[\] is not allowed"):
        read_manifest(out)
    build(tmp_path / "data", out)
    assert out.read_text() == whole


def test_a_manifest_that_cannot_be_written(tmp_path, monkeypatch):
    root = tree(tmp_path / "data")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"pairs\.json: cannot be written \(.*\); choose another output folder"):
        build(root, tmp_path / "file" / "pairs.json")
    build(root, tmp_path / "pairs.json")
    before = (tmp_path / "pairs.json").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"No space left on device\); make room there"):
        build(root, tmp_path / "pairs.json", seed=1)
    assert (tmp_path / "pairs.json").read_bytes() == before
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]
