"""Random numbers, sums and stops of a training's processes. What needs several of them is tested with the trainer."""

import os
import signal
import threading

import pytest
import torch

from lib.training.distributed import (
    StopSignals,
    join_processes,
    out_of_memory_advice,
    rng_state,
    seed_process,
    set_rng_state,
    sum_over_processes,
)
from lib.util.errors import UserError

# --- random numbers ---------------------------------------------------------------------------------------------------


def test_random_numbers_go_on_where_they_were():
    torch.manual_seed(3)
    torch.randn(7)
    state = rng_state()
    first = torch.randn(50), torch.rand(3), torch.randperm(20)
    torch.manual_seed(99)
    set_rng_state(state)
    second = torch.randn(50), torch.rand(3), torch.randperm(20)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    set_rng_state(state)  # the state has not moved with them
    assert torch.equal(torch.randn(50), first[0])


@pytest.mark.parametrize(("gpus", "taken"), [(0, False), (1, False), (2, True), (3, False)])
def test_a_state_of_another_number_of_gpus_is_taken_for_the_cpu_alone(monkeypatch, gpus, taken):
    given = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", given.append)
    state = {"rng": torch.get_rng_state(), "cuda_rng": [torch.zeros(16), torch.ones(16)]}  # of two
    first = torch.randn(5)
    set_rng_state(state)
    assert torch.equal(torch.randn(5), first)
    assert given == [state["cuda_rng"]] * taken


def test_seeds_differ_between_processes_and_steps():
    numbers = {}
    for seed in (0, 1):
        for rank in range(4):
            for step in (0, 1, 2, 100):
                seed_process(seed, step, rank)
                numbers[seed, rank, step] = tuple(torch.randn(3).tolist())
    assert len(set(numbers.values())) == len(numbers) == 32
    seed_process(1, 2, 3)
    assert tuple(torch.randn(3).tolist()) == numbers[1, 3, 2]


# --- one process ------------------------------------------------------------------------------------------------------


def test_the_sums_of_one_process_are_its_own(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join_processes().num_processes == 1
    sums = {"loss": 3.5, "pairs": 2.0}
    assert sum_over_processes(sums) == sums
    assert sum_over_processes({}) == {}


def test_sums_add_by_name_where_some_processes_lack_names(monkeypatch):
    parts = [{"loss": 3.0, "pairs": 2.0}, {"pairs": 0.0}, {"loss": 1.5, "pairs": 1.0}]
    monkeypatch.setattr("lib.training.distributed.gather_object", lambda own: parts if own == [parts[0]] else None)
    assert sum_over_processes(parts[0]) == {"loss": 4.5, "pairs": 3.0}


# --- memory -----------------------------------------------------------------------------------------------------------


def advice() -> str:
    return "lower batch_size"


def test_out_of_memory_on_a_gpu_becomes_advice():
    with pytest.raises(UserError, match=r"^lower batch_size$") as caught, out_of_memory_advice(advice):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


def test_out_of_memory_on_a_cpu_becomes_advice():
    """By the allocator's own message: this is more than any machine's addresses."""
    with pytest.raises(UserError, match=r"^lower batch_size$") as caught, out_of_memory_advice(advice):
        torch.empty(1 << 58)
    assert "can't allocate memory" in str(caught.value.__cause__)


@pytest.mark.parametrize("error", [RuntimeError("shapes do not fit"), ValueError("memory"), KeyboardInterrupt()])
def test_other_errors_pass_as_they_are(error):
    with pytest.raises(type(error)) as caught, out_of_memory_advice(lambda: pytest.fail("no advice was asked for")):
        raise error
    assert caught.value is error


def test_without_an_error_nothing_happens():
    with out_of_memory_advice(lambda: pytest.fail("no advice was asked for")):
        pass


# --- stopping ---------------------------------------------------------------------------------------------------------


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
    with StopSignals(file) as stop:
        assert stop.asked is None
        file.touch()
        assert stop.asked == "the stop button"
        assert handled == []
        file.unlink()
        assert stop.asked is None
        file.touch()
    assert not file.exists()


def test_a_file_from_before_is_forgotten(handled, tmp_path):
    file = tmp_path / "stop"
    file.touch()
    stop = StopSignals(file)
    assert file.exists()  # another training may be meant
    with stop:
        assert not file.exists()
        assert stop.asked is None


def test_the_file_is_forgotten_after_a_failure_too(handled, tmp_path):
    def fail() -> None:
        with StopSignals(tmp_path / "stop"):
            (tmp_path / "stop").touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_signal_is_named_before_the_file(handled, tmp_path):
    with StopSignals(tmp_path / "stop") as stop:
        (tmp_path / "stop").touch()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked == "SIGINT"


def test_outside_of_the_main_thread_the_file_still_works(tmp_path):
    found = []

    def work() -> None:
        with StopSignals(tmp_path / "stop") as stop:
            (tmp_path / "stop").touch()
            found.append(stop.asked)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == ["the stop button"]
    assert not (tmp_path / "stop").exists()
