"""Learning rates and averaged weights against their formulas."""

import math

import pytest
import torch
from torch import nn

from lib.training.config import LoopConfig
from lib.training.optimization import learning_rate_factor, move_average


@pytest.mark.parametrize(
    ("step", "progress", "warmup", "schedule", "wanted"),
    [
        (0, 0.0, 0, "constant", 1.0),
        (500, 0.9, 0, "constant", 1.0),
        (0, 0.0, 10, "constant", 0.1),  # never 0: the first step is one
        (4, 0.0, 10, "constant", 0.5),
        (9, 0.0, 10, "constant", 1.0),
        (10, 0.9, 10, "constant", 1.0),
        (0, 0.0, 0, "cosine", 1.0),
        (7, 0.5, 0, "cosine", 0.5),
        (7, 0.25, 0, "cosine", (1 + math.sqrt(0.5)) / 2),
        (9, 1.0, 0, "cosine", 0.0),
        (4, 0.5, 10, "cosine", 0.25),  # both
        (99, 1 / 3, 10, "cosine", 0.75),
    ],
)
def test_learning_rate_factor_by_hand(step, progress, warmup, schedule, wanted):
    config = LoopConfig(warmup_steps=warmup, schedule=schedule)
    assert learning_rate_factor(step, progress, config) == pytest.approx(wanted, abs=1e-12)


def test_the_schedule_falls_and_the_warm_up_rises():
    config = LoopConfig(schedule="cosine")
    falling = [learning_rate_factor(0, k / 100, config) for k in range(101)]
    assert falling == sorted(falling, reverse=True)
    assert (falling[0], falling[-1]) == (1, 0)
    rising = [learning_rate_factor(step, 0, LoopConfig(warmup_steps=50)) for step in range(60)]
    assert rising == sorted(rising)
    assert max(rising) == 1


def linear(value: float) -> nn.Module:
    module = nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)
    return module


@pytest.mark.parametrize(
    ("decay", "step", "used"),
    [(0.999, 0, 0.1), (0.999, 8, 0.5), (0.999, 90, 0.91), (0.999, 10**6, 0.999), (0.05, 0, 0.05), (0.5, 100, 0.5)],
)
def test_one_move_of_the_average(decay, step, used):
    """decay · average + (1 − decay) · weights, with a decay of at most (1 + step)/(10 + step)."""
    average, model = linear(2.0), linear(5.0)
    move_average(average, model, decay, step)
    for parameter in average.parameters():
        torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, used * 2.0 + (1 - used) * 5.0))
    assert all((parameter == 5).all() for parameter in model.parameters())


def test_the_start_is_forgotten():
    """After 100 steps nothing is left of the start, though the plain decay of 0.999 would keep 90 % of it."""
    average, model = linear(1000.0), linear(1.0)
    for step in range(100):
        move_average(average, model, 0.999, step)
    assert (average.weight - 1).abs().max() < 1e-3


def test_statistics_of_batch_norms_are_copied():
    """Nobody else would bring them to the average: in eval mode it would use a mean of 0 for ever."""
    average, model = nn.Sequential(nn.BatchNorm1d(3)), nn.Sequential(nn.BatchNorm1d(3))
    model(5 + torch.randn(8, 3))
    move_average(average, model, 0.999, 0)
    assert model[0].running_mean.abs().min() > 0.1
    for ours, theirs in zip(average.buffers(), model.buffers(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours is not theirs


def test_weights_and_average_share_no_memory():
    average, model = linear(0.0), linear(1.0)
    move_average(average, model, 0.5, 100)
    with torch.no_grad():
        model.weight.fill_(7.0)
    assert (average.weight == 0.5).all()
