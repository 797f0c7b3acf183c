"""Stop signals: the first is noted, the second acts, and the handlers are put back."""

import os
import signal
import threading

import pytest

from lib.util.signals import StopSignals


@pytest.fixture
def handled():
    """Handlers that count, in the place of those that would end the tests."""
    calls = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, frame: calls.append(number)) for number in numbers}
    yield calls
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_acts(handled, number):
    with StopSignals() as stop:
        assert stop.asked is None
        os.kill(os.getpid(), number)
        assert stop.asked == signal.Signals(number).name
        assert handled == []
        os.kill(os.getpid(), number)
        assert handled == [number]


def test_after_one_kind_of_signal_the_other_acts_too(handled):
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked == "SIGTERM"
        assert handled == [signal.SIGINT]


def test_handlers_are_as_before_when_it_ends(handled):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopSignals() as stop:
        assert signal.getsignal(signal.SIGINT) == stop.handle
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    with pytest.raises(RuntimeError), StopSignals():
        raise RuntimeError
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_outside_of_the_main_thread_no_handler_is_set(handled):
    before = signal.getsignal(signal.SIGINT)
    found = []

    def work() -> None:
        with StopSignals() as stop:
            found.append((stop.asked, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(None, before)]


def test_a_file_asks_for_a_stop_as_long_as_it_is_there(handled, tmp_path):
    file = tmp_path / "stop"
    with StopSignals(file=file) as stop:
        assert stop.asked is None
        file.touch()
        assert stop.asked == "the stop button"
        assert handled == []
        file.unlink()
        assert stop.asked is None
        file.touch()
    assert not file.exists()


def test_a_stale_stop_file_is_ignored(handled, tmp_path):
    file = tmp_path / "stop"
    file.touch()
    stop = StopSignals(file=file)
    assert file.exists()  # another training may be meant
    with stop:
        assert not file.exists()
        assert stop.asked is None


def test_the_file_is_forgotten_after_a_failure_too(handled, tmp_path):
    def fail() -> None:
        with StopSignals(file=tmp_path / "stop"):
            (tmp_path / "stop").touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_signal_is_named_before_the_file(handled, tmp_path):
    with StopSignals(file=tmp_path / "stop") as stop:
        (tmp_path / "stop").touch()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked == "SIGINT"


def test_outside_of_the_main_thread_the_file_still_works(tmp_path):
    found = []

    def work() -> None:
        with StopSignals(file=tmp_path / "stop") as stop:
            (tmp_path / "stop").touch()
            found.append(stop.asked)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == ["the stop button"]
    assert not (tmp_path / "stop").exists()


def test_the_first_signal_is_passed_on_and_the_second_acts(handled):
    names = []
    with StopSignals(names.append):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    assert names == ["SIGTERM"]
    assert handled == [signal.SIGTERM]


def test_the_earlier_handlers_are_back_even_if_passing_on_fails(handled):
    def fail(name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), StopSignals(fail) as stop:
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.asked == "SIGINT"
    os.kill(os.getpid(), signal.SIGINT)
    assert handled == [signal.SIGINT]


def test_without_a_second_that_acts_every_signal_is_passed_on(handled):
    names = []
    with StopSignals(names.append, second_acts=False):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), number)
    assert names == ["SIGINT", "SIGTERM", "SIGTERM"]
    assert handled == []
    os.kill(os.getpid(), signal.SIGINT)
    assert handled == [signal.SIGINT]
