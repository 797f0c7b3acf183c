"""Where a non-finite value appeared first, on a model of three layers. test_trainer.py tests the same in training."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from lib.training.nonfinite import NORM, Finding, NonFiniteError, find_non_finite, stage_of


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.ModuleDict({"stages": nn.ModuleList(nn.Linear(4, 4) for _ in range(3))})


def forward(model, x, factor=1.0):
    for stage in model["stages"]:
        x = stage(x)
    return (x * factor).square().mean()


def find(model, batch, forward, max_norm=math.inf):
    names = ["input latents", "target latents"][: len(batch)]
    return find_non_finite(model, batch, names, forward, max_norm)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_latents_come_first_then_parameters_then_the_forward_pass(model, poison):
    x = torch.randn(2, 4)
    bad = torch.stack([x[0], x[1] * poison])
    assert find(model, (bad,), lambda batch: forward(model, x)) == Finding(None, "input latents", clips=(1,))
    assert find(model, (x,), lambda batch: forward(model, x * poison)).tensor == "input of stages.0"
    model["stages"][1].bias.data[2] = poison
    assert find(model, (x,), lambda batch: forward(model, x)) == Finding(1, "parameter stages.1.bias")


def test_an_overflow_is_named_where_it_happens(model):
    for stage in model["stages"]:
        stage.weight.data.fill_(1e18)
    found = find(model, (torch.ones(2, 4),), lambda batch: forward(model, batch[0]))
    assert (found.stage, found.tensor, found.operation.split(" (")[0]) == (
        2,
        "output of stages.2",
        "addmm gave inf",
    )


def test_a_loss_or_a_gradient_alone(model):
    x = torch.randn(2, 4)
    found = find(model, (x,), lambda batch: forward(model, x, factor=1e30))
    assert (found.stage, found.tensor, found.operation.split()[0]) == (None, "loss", "pow")
    found = find(model, (x,), lambda batch: (forward(model, x) * 0).sqrt())  # finite, with an infinite slope
    assert (found.stage, found.tensor.split(".")[0]) == (2, "gradient of stages")  # backward reaches the last one first
    assert found.operation.startswith("the gradient of sqrt gave inf")


# Of one clip in three, whatever the others are: state → what it gives, and which operation it is that gives it.
STATES = {
    "root at 0": (lambda y, s: (y * s[:, None]).square().mean(dim=1).sqrt(), "the gradient of sqrt gave inf"),
    "0 / 0": (lambda y, s: y.mean(dim=1) * s / s, "div gave NaN"),
    "log of 0": (lambda y, s: -(y.sum(dim=1).exp() * s).log(), "log gave inf"),
    "x / 0": (lambda y, s: y.mean(dim=1) / s, "div gave inf"),
    "exponential": (lambda y, s: (y.mean(dim=1) * 0 + 100 * (1 - s)).exp(), "exp gave inf"),
    "root in place": (lambda y, s: (y.mean(dim=1) * 0 + s - 0.5).sqrt_(), "sqrt gave NaN"),
    "a mask of infinities": (
        lambda y, s: (y * 0 + s[:, None]).masked_fill(s[:, None] == 0, -math.inf).softmax(dim=1).square().sum(dim=1),
        "softmax gave NaN",
    ),
}


@pytest.mark.parametrize("state", STATES)
def test_the_operation_the_line_and_the_clip_are_named(model, state):
    function, said = STATES[state]
    healthy = torch.tensor([1.0, 0.0, 1.0])

    def loss(batch):
        y = model["stages"][0](batch[0])
        return function(y, healthy).mean()

    found = find(model, (torch.randn(3, 4),), loss)
    place = f"{Path(__file__).name}:{function.__code__.co_firstlineno} in <lambda>"
    assert found.operation == f"{said} ({place})"
    assert found.clips == (1,)


# of the same clips, what is infinite on the way only, beside a root of 0 in the second
HARMLESS = {
    "clamped": lambda y, s: (1 / s.roll(1)).clamp(max=2),
    "gradient that torch masks": lambda y, s: (y * s.roll(1)[:, None]).std(dim=1),
    "padding": lambda y, s: nn.functional.pad(y, (1, 1), value=-math.inf).amax(dim=1),
    "mask": lambda y, s: y.masked_fill(s[:, None] == 0, -math.inf).clamp(min=0).mean(dim=1),
}


@pytest.mark.parametrize("way", HARMLESS)
def test_an_infinity_that_reaches_nothing_is_not_blamed(model, way):
    healthy = torch.tensor([1.0, 0.0, 1.0])

    def loss(batch):
        y = model["stages"][0](batch[0])
        return (HARMLESS[way](y, healthy) + (y * healthy[:, None]).square().mean(dim=1).sqrt()).mean()

    found = find(model, (torch.randn(3, 4),), loss)
    assert found.operation.startswith("the gradient of sqrt gave inf")
    assert found.clips == (1,)
    alone = find(model, (torch.randn(3, 4),), lambda batch: HARMLESS[way](model["stages"][0](batch[0]), healthy).mean())
    assert alone == Finding(None, NORM)


def test_rows_of_a_weight_are_no_clips(model):
    one = torch.tensor([1.0, 1.0, 0.0, 1.0])
    weight = model["stages"][0].weight
    found = find(model, (torch.randn(4, 4),), lambda batch: (weight.square().sum(dim=1) * one).sqrt().mean())
    assert (found.operation.split(" (")[0], found.clips) == ("the gradient of sqrt gave inf", ())


def test_a_norm_of_finite_gradients_can_overflow(model):
    found = find(model, (torch.ones(2, 4),), lambda batch: 1e38 * forward(model, batch[0]) * 1e-3, 1.0)
    assert found == Finding(None, NORM, spread="the norm of finite gradients overflows; clipping makes all of them 0")


def test_what_clipping_makes_of_an_infinite_gradient_is_what_it_makes(model):
    """One infinite element: torch's clipping leaves NaN there and 0 everywhere else; one NaN: NaN everywhere."""
    for poison, said in ((math.inf, "those NaN and all others 0"), (math.nan, "all of them NaN")):
        bad = torch.zeros(4, 4)
        bad[1, 2] = poison
        hook = model["stages"][0].weight.register_hook(lambda gradient, bad=bad: gradient + bad)
        found = find(model, (torch.randn(2, 4),), lambda batch: forward(model, batch[0]), 1.0)
        assert found.spread == f"1 of 60 gradients are not finite; clipping makes {said}"
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        clipped = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert int(clipped.isnan().sum()) == (60 if math.isnan(poison) else 1)
        assert not clipped.nan_to_num().any()
        hook.remove()
    assert find(model, (torch.randn(2, 4),), lambda batch: forward(model, batch[0], 1e30)).spread.endswith("not finite")


def test_leftovers_of_memory_and_masks_are_no_faults(model):
    def loss(batch):
        masked = model["stages"][0](batch[0]).masked_fill(torch.tensor([True, False, False, False]), -math.inf)
        return torch.log(masked.softmax(dim=1).sum(dim=1) - 1).mean()

    assert "log gave" in find(model, (torch.randn(2, 4),), loss).operation


def test_nothing_is_left_on_a_healthy_model(model):
    x = torch.randn(2, 4)
    assert find(model, (x,), lambda batch: forward(model, x)) == Finding(None, NORM)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("which", [0, 1])
def test_the_tensor_of_a_batch_that_is_not_finite_is_named(model, which):
    good, bad = tuple(torch.randn(2, 2, 4)), tuple(torch.randn(2, 2, 4))
    bad[which][0, 0] = float("nan")
    seen = []

    def loss_of(batch):
        seen.append(batch)
        return forward(model, batch[0] + batch[1])

    assert find(model, bad, loss_of) == Finding(None, ("input latents", "target latents")[which], clips=(0,))
    assert seen == []
    assert find(model, good, loss_of).tensor == NORM
    assert seen == [good]


def test_stage_and_message():
    assert stage_of("stages.12.layers.0.qkv") == 12
    assert stage_of("cascade.stages.1.output_projection.weight") == 1
    assert stage_of("mask_generator.stages.1") is None
    assert stage_of("head.weight") is None
    operation = "log gave inf (terms.py:3 in mine)"
    error = NonFiniteError(7, Finding(1, "output of stages.1", operation), ["a with b", "c with d", "e with f"])
    assert (error.step, error.stage, error.tensor, error.operation) == (7, 1, "output of stages.1", operation)
    said = "step 7, stage 1, first in output of stages.1; log gave inf (terms.py:3 in mine); in a with b, c with d and"
    assert f"{said} 1 more; no checkpoint" in str(error)
    assert str(error).endswith("restart with a lower learning rate or that operation bounded; see notebook 03")
    assert error.facts["pairs"] == ["a with b", "c with d", "e with f"]
    assert "restart with a lower learning rate; see" in str(NonFiniteError(1, Finding(None, NORM)))
