"""The manifest: read as written, moved together with its data, damage named by file and line."""

import json
import os
import re
from dataclasses import replace

import pytest

from data.test_pairs import CLIP, build, song, tree
from lib.data.manifest import Clip, read_manifest
from lib.util.errors import UserError


def test_a_manifest_is_read_as_it_was_built(tmp_path):
    root = tree(tmp_path / "Mein Ordner 音楽")
    song(root / "ü \u2028 ж.wav")
    song(root / "tmp.wav", seed=99).rename(os.fsdecode(os.fsencode(root) + b"/\xff.wav"))
    (root / "bad.wav").write_text("no music")
    out = tmp_path / "out" / "pairs.jsonl"
    manifest = build(root, out, seed=3)
    assert read_manifest(out) == manifest
    assert (manifest.clip_length, manifest.sample_rate, manifest.seed) == (CLIP, 24_000, 3)
    assert set(manifest.split("train")) | set(manifest.split("val")) == set(manifest.pairs)
    header, *lines = out.read_text(errors="surrogateescape").removesuffix("\n").split("\n")
    assert json.loads(header)["num_pairs"] == len(lines) == len(manifest.pairs)
    assert set(json.loads(lines[0])) == {"id", "split", "mode", "input", "target"}
    assert set(json.loads(lines[0])["input"]) == {"path", "offset", "length", "sha256"}
    assert [item["path"] for item in json.loads((out.parent / "pairs.skipped.json").read_text())] == ["bad.wav"]
    with pytest.raises(ValueError, match="unknown split 'test'; choose one of train, val"):
        manifest.split("test")


def test_data_and_manifest_can_be_moved_together(tmp_path):
    tree(tmp_path / "a/data")
    build(tmp_path / "a/data", tmp_path / "a/out/pairs.jsonl")
    (tmp_path / "a").rename(tmp_path / "b")
    manifest = read_manifest(tmp_path / "b/out/pairs.jsonl")
    assert all(manifest.path(pair.input).is_file() for pair in manifest.pairs)


def test_key_tells_contents_apart_and_not_names():
    clip = Clip("a.wav", 0, 100, "0" * 64)
    assert replace(clip, path="b.wav").key == clip.key
    changed = [replace(clip, offset=1), replace(clip, length=99), replace(clip, sha256="1" * 64)]
    assert len({clip.key, *(other.key for other in changed)}) == 4
    assert re.fullmatch("[0-9a-f]{16}", clip.key)


@pytest.mark.parametrize(
    ("line", "old", "new", "fault"),
    [
        (1, '"version": 1', '"version": 9', "version 9 is not 1"),
        (1, '"root"', '"rot"', "no field 'root'"),
        (1, '"clip_length": 4800', '"clip_length": "x"', "whole numbers"),
        (1, "{", "", "damaged"),
        (3, "}", "", "damaged"),
        (3, '"split": "', '"split": "un', "split 'untrain'"),
        (3, '"mode": "', '"mode": "un', "is unknown"),
        (3, '"offset": ', '"offset": -', "no sample count"),
        (3, '"sha256": "', '"sha256": "x', "malformed"),
        (3, '"input"', '"inputs"', "no field 'input'"),
        (3, '"target": {', '"target": {"more": 1, ', "more"),
    ],
)
def test_a_damaged_manifest_names_file_and_line(tmp_path, line, old, new, fault):
    out = tmp_path / "pairs.jsonl"
    build(tree(tmp_path / "data"), out, mode="continuation")
    lines = out.read_text().splitlines()
    lines[line - 1] = re.sub(r'"offset": \d+', '"offset": 4800', lines[line - 1]).replace(old, new)
    out.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=rf"pairs\.jsonl, line {line}: .*{fault}.*; build the manifest again"):
        read_manifest(out)


def test_a_missing_empty_or_cut_manifest(tmp_path):
    out = tmp_path / "pairs.jsonl"
    with pytest.raises(UserError, match=r"pairs\.jsonl: no such file"):
        read_manifest(out)
    build(tree(tmp_path / "data"), out)
    text = out.read_text()
    out.write_text("".join(text.splitlines(keepends=True)[:-2]))
    with pytest.raises(UserError, match=r"the file ends after \d+ pairs of \d+"):
        read_manifest(out)
    out.write_text("")
    with pytest.raises(UserError, match="line 1: damaged"):
        read_manifest(out)
    out.write_text(text)
    (tmp_path / "pairs.skipped.json").write_text("[")
    with pytest.raises(UserError, match=r"pairs\.skipped\.json: damaged"):
        read_manifest(out)


def test_a_manifest_that_cannot_be_written(tmp_path, monkeypatch):
    root = tree(tmp_path / "data")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"pairs\.jsonl: cannot be written \(.*\); choose a folder"):
        build(root, tmp_path / "file" / "pairs.jsonl")
    build(root, tmp_path / "pairs.jsonl")
    before = (tmp_path / "pairs.jsonl").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        build(root, tmp_path / "pairs.jsonl", seed=1)
    assert (tmp_path / "pairs.jsonl").read_bytes() == before
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]
