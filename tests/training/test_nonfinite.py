"""Where a non-finite value appeared first, on a model of three layers. test_trainer.py tests the same in training."""

import pytest
import torch
from torch import nn

from lib.training.nonfinite import NORM, NonFiniteError, find_non_finite, stage_of

NAMES = ("input", "target")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.ModuleDict({"stages": nn.ModuleList(nn.Linear(4, 4) for _ in range(3))})


def forward(model, x, factor=1.0):
    for stage in model["stages"]:
        x = stage(x)
    return (x * factor).square().mean()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_latents_come_first_then_parameters_then_the_forward_pass(model, poison):
    x = torch.randn(2, 4)
    assert find_non_finite(model, (x * poison,), ["input latents"], lambda batch: forward(model, x)) == (
        None,
        "input latents",
    )
    assert (
        find_non_finite(model, (x,), ["input latents"], lambda batch: forward(model, x * poison))[1]
        == "input of stages.0"
    )
    model["stages"][1].bias.data[2] = poison
    found = find_non_finite(model, (x,), ["input latents"], lambda batch: forward(model, x))
    assert found == (1, "parameter stages.1.bias")


def test_an_overflow_is_named_where_it_happens(model):
    for stage in model["stages"]:
        stage.weight.data.fill_(1e18)
    x = torch.ones(2, 4)
    assert find_non_finite(model, (x,), ["x"], lambda batch: forward(model, x)) == (2, "output of stages.2")


def test_a_loss_or_a_gradient_alone(model):
    x = torch.randn(2, 4)
    assert find_non_finite(model, (x,), ["x"], lambda batch: forward(model, x, factor=1e30)) == (None, "loss")
    root = lambda: (forward(model, x) * 0).sqrt()  # noqa: E731  finite, with an infinite slope
    stage, tensor = find_non_finite(model, (x,), ["x"], lambda batch: root())
    assert (stage, tensor.split(".")[0]) == (2, "gradient of stages")  # backward reaches the last stage first


def test_nothing_is_left_on_a_healthy_model(model):
    x = torch.randn(2, 4)
    assert find_non_finite(model, (x,), ["x"], lambda batch: forward(model, x)) == (None, "norm of the gradients")
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("which", [0, 1])
def test_the_tensor_of_a_batch_that_is_not_finite_is_named(model, which):
    good, bad = tuple(torch.randn(2, 2, 4)), tuple(torch.randn(2, 2, 4))
    bad[which][0, 0] = float("nan")
    seen = []

    def loss_of(batch):
        seen.append(batch)
        return forward(model, batch[0] + batch[1])

    assert find_non_finite(model, bad, NAMES, loss_of) == (None, NAMES[which])
    assert seen == []
    assert find_non_finite(model, good, NAMES, loss_of) == (None, NORM)
    assert seen == [good, good]  # a pass without gradients, one with them


def test_stage_and_message():
    assert stage_of("stages.12.layers.0.qkv") == 12
    assert stage_of("cascade.stages.1.output_projection.weight") == 1
    assert stage_of("mask_generator.stages.1") is None
    assert stage_of("head.weight") is None
    error = NonFiniteError(7, 1, "output of stages.1", None)
    assert (error.step, error.stage, error.tensor) == (7, 1, "output of stages.1")
    assert "step 7, stage 1, first in output of stages.1; no checkpoint" in str(error)
