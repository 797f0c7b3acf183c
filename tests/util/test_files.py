"""Files: the old or the new one after a failure, and no code run from any."""

import argparse
import errno
import os
import pickle
import random

import pytest
import torch

import lib.util.files
from lib.util.errors import UserError
from lib.util.files import (
    file_sha256,
    make_folder,
    naming,
    read_json,
    read_json_lines,
    safe_torch_load,
    write_atomic,
)


class Marker:
    """Unpickling it creates a file: proof that code ran."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_safe_torch_load_reads_plain_values(tmp_path):
    content = {"tensor": torch.arange(3.0), "epoch": 3, "names": ["a", "b"], "none": None, "nested": {"x": (1, 2.5)}}
    torch.save(content, tmp_path / "a.pt")
    loaded = safe_torch_load(tmp_path / "a.pt")
    assert torch.equal(loaded.pop("tensor"), content.pop("tensor"))
    assert loaded == content


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, zipped):
    path, marker = tmp_path / "evil.pt", tmp_path / "marker"
    torch.save({"epoch": Marker(marker)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"evil\.pt: refused, .*run code .*mkdir"):
        safe_torch_load(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # the file is as dangerous as it looks


def test_a_bare_pickle_with_code_is_refused_and_not_run(tmp_path):
    path, marker = tmp_path / "evil.pkl", tmp_path / "marker"
    path.write_bytes(pickle.dumps(Marker(marker), protocol=2))
    with pytest.raises(UserError, match=r"evil\.pkl: refused"):
        safe_torch_load(path)
    assert not marker.exists()


def test_only_the_allowed_class_is_loaded_and_only_for_that_call(tmp_path):
    path = tmp_path / "args.pt"
    torch.save({"args": argparse.Namespace(lr=1e-4)}, path)
    with pytest.raises(UserError, match=r"refused.*argparse\.Namespace"):
        safe_torch_load(path)
    assert safe_torch_load(path, allowed=(argparse.Namespace,))["args"].lr == 1e-4
    with pytest.raises(UserError, match="refused"):
        safe_torch_load(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_files_raise_user_error_and_nothing_else(tmp_path, zipped):
    """Truncated anywhere, flipped bytes, plain noise: the file is named, whatever the unpickler stumbles on."""
    good, bad = tmp_path / "good.pt", tmp_path / "bad.pt"
    torch.save({"a": torch.randn(20), "b": {"c": [1, "x"]}}, good, _use_new_zipfile_serialization=zipped)
    content, rng, refused = good.read_bytes(), random.Random(0), 0
    for attempt in range(300):
        damaged = bytearray(content)
        if attempt % 3 == 0:
            damaged = damaged[: rng.randrange(len(content))]
        elif attempt % 3 == 1:
            for _ in range(3):
                damaged[rng.randrange(len(content))] = rng.randrange(256)
        else:
            damaged = rng.randbytes(rng.randrange(60))
        bad.write_bytes(damaged)
        try:
            safe_torch_load(bad)  # a flipped byte of a tensor's data is a valid file
        except UserError as error:
            refused += str(bad) in str(error)
    assert refused > 150


@pytest.mark.parametrize("content", [b"", b"hello\n", b"RIFF....WAVE"])
def test_what_is_no_checkpoint_is_named(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.pt: .*not a torch checkpoint"):
        safe_torch_load(tmp_path / "x.pt")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match=r"none\.pt: no such file"):
        safe_torch_load(tmp_path / "none.pt")
    with pytest.raises(UserError, match=str(tmp_path)):
        safe_torch_load(tmp_path)


# --- writing ----------------------------------------------------------------------------------------------------------


def test_write_atomic_replaces_the_content(tmp_path):
    path = tmp_path / "ä file.json"
    write_atomic(path, "old")
    write_atomic(path, "new ♪")
    assert path.read_text(encoding="utf-8") == "new ♪"
    write_atomic(path, memoryview(b"\x00\xff"))
    assert path.read_bytes() == b"\x00\xff"
    write_atomic(path, os.fsdecode(b"caf\xe9"))  # a file name that is not UTF-8 comes back as its bytes
    assert path.read_bytes() == b"caf\xe9"
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("broken", ["write", "fsync", "replace"])
def test_a_failure_while_writing_leaves_the_old_file_alone(tmp_path, monkeypatch, broken):
    path = tmp_path / "a.json"
    write_atomic(path, "old")

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if broken == "write":
        monkeypatch.setattr(lib.util.files.Path, "write_bytes", fail)
    elif broken == "fsync":
        monkeypatch.setattr(lib.util.files, "fsync", fail)
    else:
        monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]  # and no temporary file


def test_the_new_text_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(os, "fsync", lambda handle: order.append("fsync"))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *args: (order.append("replace"), replace(*args)))
    write_atomic(tmp_path / "a.json", "text")
    assert order[:2] == ["fsync", "replace"]


def test_make_folder(tmp_path):
    make_folder(tmp_path / "a b" / "ç")
    make_folder(tmp_path / "a b" / "ç")  # twice is no error
    assert os.listdir(tmp_path / "a b" / "ç") == []  # the probe is gone
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file: cannot write here .*choose another"):
        make_folder(tmp_path / "file")
    with pytest.raises(UserError, match="cannot write here"):
        make_folder(tmp_path / "file" / "below")


def test_make_folder_proves_that_it_can_write(tmp_path, monkeypatch):
    """A folder that exists but is read-only (root ignores modes, so the refusal is made here)."""

    def refuse(self, *args, **kwargs):
        raise PermissionError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(lib.util.files.Path, "touch", refuse)
    with pytest.raises(UserError, match=r"cannot write here \(Read-only file system\)"):
        make_folder(tmp_path)


def test_file_sha256(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert file_sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_read_json_returns_what_has_the_right_shape(tmp_path):
    path = tmp_path / "é.json"
    write_atomic(path, '{"steps": 3, "name": "ü", "loss": null}')
    assert read_json(path, {"steps": int, "name": str, "loss": object}) == {"steps": 3, "name": "ü", "loss": None}
    write_atomic(path, "[1]")
    assert read_json(path, list) == [1]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b'{"steps": 3, "name": "\xff"}', "codec can't decode byte"),
        (b"[]", "not the dict"),
        (b"{}", "no field 'steps'"),
        (b'{"steps": 3}', "no field 'name'"),
        (b'{"steps": "3", "name": ""}', "field 'steps' is '3', not of type int"),
        (b'{"steps": true, "name": ""}', "field 'steps' is True, not of type int"),
        (b'{"steps": 3, "name": null}', "field 'name' is None, not of type str"),
    ],
)
def test_read_json_names_file_fault_and_fix(tmp_path, content, fault):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.json: damaged \(.*{fault}.*\); train again$"):
        read_json(tmp_path / "a.json", {"steps": int, "name": str}, fix="train again")


def test_read_json_tells_missing_from_unreadable(tmp_path):
    with pytest.raises(UserError, match=r"a\.json: no such file; restore it$"):
        read_json(tmp_path / "a.json")
    with pytest.raises(UserError, match=r"^folder: no run here; train one$"):
        read_json(tmp_path / "a.json", missing="folder: no run here; train one")
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\); check"):
        read_json(tmp_path)


def test_read_json_lines_leaves_out_a_half_written_last_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"name": "\u2028"}\n{"step": 1}\n{"st')
    assert read_json_lines(path) == [{"name": "\u2028"}, {"step": 1}]
    path.write_text('{"step": 1}\n[]\n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: damaged .*; delete that line$"):
        read_json_lines(path, fix="delete that line")
    path.write_bytes(b'{"name": "\xff"}\n')
    with pytest.raises(UserError, match="damaged"):
        read_json_lines(path)
    assert read_json_lines(path, errors="surrogateescape") == [{"name": "\udcff"}]


def test_naming_keeps_the_fix_of_a_user_error_and_passes_defects_on(tmp_path):
    with pytest.raises(UserError, match=r"^a\.json: steps=0 is not allowed; use 1$"), naming("a.json", "restore it"):
        raise UserError("steps=0 is not allowed; use 1")
    with (
        pytest.raises(UserError, match=r"^a\.json: damaged \(short\); restore it$"),
        naming("a.json", "restore it"),
    ):
        raise ValueError("short")
    with pytest.raises(ZeroDivisionError), naming("a.json", "restore it"):
        raise ZeroDivisionError
