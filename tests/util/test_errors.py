"""A user's mistake ends in one line and an exit code; a bug keeps its traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from IPython.core.interactiveshell import InteractiveShell
from tqdm import tqdm

from lib.util.errors import UserError, exit_on_user_error

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("x.wav: empty; copy it again"), 2, "error: x.wav: empty; copy it again\n"),
        (UserError("two\nlines  and\ttabs"), 2, "error: two lines and tabs\n"),
        (KeyboardInterrupt("saved step 3; go on with --resume"), 130, "error: saved step 3; go on with --resume\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
    ],
)
def test_a_mistake_or_a_stop_is_one_line(capsys, error, code, line):
    with pytest.raises(SystemExit) as stop, exit_on_user_error():
        raise error
    assert stop.value.code == code
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", line)


def test_a_mistake_has_a_line_of_its_own_beside_a_progress_bar(capsys):
    bar = tqdm(total=4, desc="fusing")  # open for as long as the traceback holds it
    with pytest.raises(SystemExit), exit_on_user_error():
        raise UserError("x.wav: empty; copy it again")
    bar.close()
    assert "\nerror: x.wav: empty; copy it again\n" in capsys.readouterr().err.replace("\r", "\n")


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyError("x"), SystemExit(5)])
def test_any_other_exception_passes_through(capsys, error):
    with pytest.raises(type(error)) as caught, exit_on_user_error():
        raise error
    assert caught.value is error
    assert capsys.readouterr().err == ""


def test_success_prints_nothing(capsys):
    with exit_on_user_error():
        pass
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_name_that_is_not_utf8_can_be_printed(stream):
    program = f"""
import os, sys
from lib.util.errors import exit_on_user_error
with exit_on_user_error():
    print(os.fsdecode(b"song \\xff.wav"), file=sys.{stream})
"""
    environment = os.environ | {"PYTHONUTF8": "1"}  # as under any UTF-8 locale, stdout takes no surrogates
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, getattr(done, stream)) == (0, "song \\udcff.wav\n")


def test_a_notebook_shows_a_mistake_as_one_line_and_a_bug_with_its_traceback(capsys):
    shell = InteractiveShell()
    shell.run_cell("from lib.audio.decode import AudioError\nraise AudioError('x.wav', 'empty; copy it again')")
    assert capsys.readouterr().out == "x.wav: empty; copy it again\n"
    shell.run_cell("1 / 0")
    assert "Traceback" in capsys.readouterr().out
