"""A user's mistake ends in one line and an exit code; a bug keeps its traceback."""

import pytest

from lib.util.errors import UserError, exit_on_user_error


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
