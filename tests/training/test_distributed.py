"""Random numbers and sums of a training's processes. What needs several of them is in test_train.py."""

import pytest
import torch

from lib.training.distributed import (
    is_out_of_memory,
    join_processes,
    rng_state,
    seed_process,
    set_rng_state,
)

# --- random numbers ---------------------------------------------------------------------------------------------------


def test_random_numbers_resume_where_they_were():
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


def test_without_a_launcher_there_is_one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join_processes().num_processes == 1


# --- memory -----------------------------------------------------------------------------------------------------------


def test_out_of_memory_is_recognised_on_a_gpu_and_on_a_cpu():
    """The CPU's by its allocator's own message: this is more than any machine's addresses."""
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 58)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not fit"), ValueError("can't allocate memory"), KeyboardInterrupt()]
)
def test_other_errors_are_not_taken_for_it(error):
    assert not is_out_of_memory(error)
