"""Files: the old or the new one after a failure, JSON with errors that name the fix, prefetched results, locks."""

import errno
import itertools
import logging
import os
import subprocess
import sys
import threading

import pytest

import lib.util.files
from lib.util.errors import UserError
from lib.util.files import (
    file_sha256,
    make_folder,
    naming,
    only_one,
    prefetch,
    read_json,
    read_json_lines,
    write_atomic,
)


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


def test_the_new_text_is_synced_before_it_is_renamed(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(os, "fsync", lambda handle: order.append("fsync"))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *args: (order.append("replace"), replace(*args)))
    write_atomic(tmp_path / "a.json", "text")
    assert order[:2] == ["fsync", "replace"]


def test_make_folder(tmp_path):
    make_folder(tmp_path / "a b" / "ç")
    make_folder(tmp_path / "a b" / "ç")  # twice is no error
    assert os.listdir(tmp_path / "a b" / "ç") == []  # the probe is removed
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file: cannot be written .*choose another"):
        make_folder(tmp_path / "file")
    with pytest.raises(UserError, match="cannot be written"):
        make_folder(tmp_path / "file" / "below")


def test_make_folder_proves_that_it_can_write(tmp_path, monkeypatch):
    """A folder that exists but is read-only (root ignores modes, so the refusal is simulated)."""

    def refuse(*args, **kwargs):
        raise PermissionError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(lib.util.files.tempfile, "TemporaryFile", refuse)
    with pytest.raises(UserError, match=r"cannot be written \(Read-only file system\)"):
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


def test_read_json_distinguishes_missing_from_unreadable(tmp_path):
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


def test_naming_keeps_the_fix_of_a_user_error_and_lets_bugs_through(tmp_path):
    with pytest.raises(UserError, match=r"^a\.json: steps=0 is not allowed; use 1$"), naming("a.json", "restore it"):
        raise UserError("steps=0 is not allowed; use 1")
    with (
        pytest.raises(UserError, match=r"^a\.json: damaged \(short\); restore it$"),
        naming("a.json", "restore it"),
    ):
        raise ValueError("short")
    with pytest.raises(ZeroDivisionError), naming("a.json", "restore it"):
        raise ZeroDivisionError


# --- prefetch ---------------------------------------------------------------------------------------------------------


class Watched:
    """A function that records its items and the threads that call it; 13 is an error."""

    def __init__(self):
        self.seen, self.threads, self.changed = [], set(), threading.Condition()

    def __call__(self, item: int) -> int:
        if item == 13:
            raise ValueError("thirteen")
        with self.changed:
            self.seen.append(item)
            self.threads.add(threading.current_thread().name)
            self.changed.notify_all()
        return 10 * item

    def wait_for(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.seen) >= count, timeout=30)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_the_next_results_are_computed_while_one_is_used(threads):
    """As many as there are threads and no more."""
    function, found = Watched(), []
    results = prefetch(function, range(12), threads=threads)
    for number, result in enumerate(results, 1):
        found.append(result)
        function.wait_for(min(12, number + threads))
        assert sorted(function.seen) == list(range(min(12, number + threads)))
    assert found == list(range(0, 120, 10))
    assert threading.current_thread().name not in function.threads


def test_items_are_taken_only_as_needed():
    results = prefetch(Watched(), itertools.count(100), threads=2)
    assert [next(results) for _ in range(5)] == [1000, 1010, 1020, 1030, 1040]
    results.close()


def test_an_error_is_raised_in_its_own_place():
    results = prefetch(Watched(), [1, 13, 2], threads=2)
    assert next(results) == 10
    with pytest.raises(ValueError, match="thirteen"):
        next(results)


def test_no_items_give_no_results():
    assert list(prefetch(Watched(), [], threads=2)) == []


def test_no_thread_is_left_when_it_ends_early():
    results = prefetch(Watched(), range(12), threads=3)
    next(results)
    assert any(thread.name.startswith("prefetch") for thread in threading.enumerate())
    results.close()
    assert not any(thread.name.startswith("prefetch") for thread in threading.enumerate())


# --- one process at a time --------------------------------------------------------------------------------------------


PROGRAM = """import os, pathlib, sys, time
from lib.util.files import only_one
with only_one(pathlib.Path(sys.argv[1])):
    worker = os.fork()
    if not worker:  # which holds the lock until its first lines have run
        print("in", flush=True)
    time.sleep(float(sys.argv[2]))
    if not worker:
        os._exit(0)
"""


def other_process(path, seconds: float) -> subprocess.Popen:
    other = subprocess.Popen([sys.executable, "-c", PROGRAM, path, str(seconds)], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "in\n"
    return other


def test_the_second_process_is_refused_or_waits(tmp_path, caplog):
    path = tmp_path / "a folder é" / ".lock"
    with other_process(path, 2) as other:
        refused = pytest.raises(UserError, match=rf"a folder é: process {other.pid} on .* is at work here; wait for it")
        with refused, only_one(path):
            pass
        with caplog.at_level(logging.WARNING), only_one(path, wait=True):
            assert other.wait(60) == 0
        assert f"waiting for process {other.pid}" in caplog.text


def test_a_killed_process_locks_nobody_out(tmp_path):
    """Nor does a worker that it has forked, and that lives on."""
    other = other_process(tmp_path / ".lock", 5)
    other.kill()
    other.wait(60)
    with only_one(tmp_path / ".lock"):
        pass


def test_the_same_process_may_enter_again(tmp_path):
    with only_one(tmp_path / ".lock"), only_one(tmp_path / ".lock"):
        pass
    with other_process(tmp_path / ".lock", 0):  # both have left
        pass
