"""The walk over a folder: sorted names, links without loops, and a reason for everything that is skipped."""

import os
from pathlib import Path

import pytest

from lib.audio.walk import Skipped, walk_audio


@pytest.fixture
def music(tmp_path):
    """A folder with music, hidden files and others."""
    root = tmp_path / "Mein Ordner"
    for name in ("b/z.wav", "b/A.FLAC", "b-/y.ogg", "a.mp3", ".hidden.wav", ".cache/x.wav", "b/cover.jpg", "notes"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_music_is_listed_sorted_and_the_rest_with_a_reason(music):
    files, skipped = walk_audio(music)
    assert files == ["a.mp3", "b-/y.ogg", "b/A.FLAC", "b/z.wav"]
    assert {item.path for item in skipped} == {"b/cover.jpg", "notes"}
    assert all("not WAV, FLAC, OGG or MP3" in item.reason and ";" in item.reason for item in skipped)


def test_ignored_files_are_not_named(music):
    _, skipped = walk_audio(music, ignore=(music / "b" / ".." / "b" / "cover.jpg",))
    assert [item.path for item in skipped] == ["notes"]


@pytest.mark.timeout(20)
def test_links_are_followed_and_loops_of_links_end(music, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "linked.wav").touch()
    (music / "b" / "loop").symlink_to(music)
    (music / "b" / "itself").symlink_to(music / "b")
    (music / "more").symlink_to(tmp_path / "elsewhere")
    (music / "broken.wav").symlink_to("gone.wav")
    assert walk_audio(music)[0] == ["a.mp3", "b-/y.ogg", "b/A.FLAC", "b/z.wav", "broken.wav", "more/linked.wav"]


def test_a_folder_that_cannot_be_read_is_skipped_with_its_reason(music, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    files, skipped = walk_audio(music)
    assert files == ["a.mp3", "b-/y.ogg"]
    assert Skipped("b", "folder cannot be read (Permission denied); check its permissions") in skipped
