"""One process at a time: who else is there is named or waited for."""

import logging
import subprocess
import sys

import pytest

from lib.util.errors import UserError
from lib.util.locks import only_one

PROGRAM = """import os, pathlib, sys, time
from lib.util.locks import only_one
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
