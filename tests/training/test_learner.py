"""A step of any model: what it computes, that it holds still where a value is not finite, and what it reports."""

import copy
import dataclasses
import math

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lib.training.adversary import Adversary, AdversaryConfig
from lib.training.config import LoopConfig
from lib.training.learner import Learner, Moment, evaluating

CONFIG = LoopConfig(learning_rate=0.01, clip=1.0)


class Regression(Learner):
    """Two layers that are to make the second of a pair from the first; notes the moments that it is told."""

    def __init__(self, config: LoopConfig, adversary: AdversaryConfig | None = None):
        torch.manual_seed(0)
        accelerator = Accelerator(mixed_precision="no")
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        discriminator = nn.Sequential(nn.Linear(3, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1), nn.Flatten(0))
        told = adversary and Adversary(adversary, discriminator, config.max_norm, accelerator)
        groups = [
            {"params": list(model[0].parameters()), "full_lr": config.learning_rate},
            {"params": list(model[2].parameters()), "full_lr": config.learning_rate / 10},
        ]
        super().__init__(config, model, groups, accelerator, told)
        self.moments: list[Moment | None] = []

    def loss(self, model, batch, moment=None):
        self.moments.append(moment)
        with self.autocast():
            made = model(batch[0])
        made, real = made.float(), batch[1]
        mse = (made - real).square().mean()
        critic = self.adversary.critic(moment.step) if self.adversary and moment else None
        loss = mse if critic is None else mse - 0.1 * critic(made).mean()
        return loss, {"mse": mse}, (made, real)


def build(adversary: AdversaryConfig | None = None, **changes) -> Regression:
    return Regression(dataclasses.replace(CONFIG, **changes), adversary)


def batch(seed: int = 0, B: int = 6) -> tuple[Tensor, Tensor]:
    """`[B, 4]` and `[B, 3]`; the second follows from the first."""
    x = torch.randn(B, 4, generator=torch.Generator().manual_seed(seed))
    return x, x[:, :3] * 2 + 1


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, b[name]) for name, value in a.items())


# --- one step and many ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_learns(precision):
    learner = build(precision=precision, clip=None, learning_rate=0.05)
    losses = [learner.learn(step, [batch(step)], progress=0.0)["loss"].item() for step in range(400)]
    assert losses[-1] < 0.2 * losses[0]
    assert all(p.dtype == torch.float32 for p in learner.plain_model.parameters())


def test_one_step_is_adamw_with_the_rate_of_each_group():
    learner = build(weight_decay=0.5, clip=None, warmup_steps=2)
    before = weights(learner.plain_model)
    learner.learn(0, [batch()], progress=0.0)
    for name, new in learner.plain_model.named_parameters():
        rate = 0.01 / 2 / (1 if name.startswith("0.") else 10)  # half of the warm-up
        step = new.grad / (new.grad.abs() + 1e-8)  # Adam's first step: m̂ / (√v̂ + ε)
        torch.testing.assert_close(new.detach(), before[name] * (1 - rate * 0.5) - rate * step, rtol=1e-4, atol=1e-6)


def test_accumulated_batches_of_unlike_sizes_are_one_batch():
    whole = batch(B=7)
    parts = list(zip(*(x.split((4, 3)) for x in whole), strict=True))
    learners = [build(clip=None) for _ in range(2)]
    rows = [learner.learn(0, steps, progress=0.0) for learner, steps in zip(learners, ([whole], parts), strict=True)]
    assert rows[1].keys() == rows[0].keys()
    for name, value in rows[0].items():
        torch.testing.assert_close(rows[1][name], value, rtol=1e-5, atol=1e-7)
    for x, y in zip(*(learner.plain_model.parameters() for learner in learners), strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-7)
    assert not torch.allclose(rows[0]["loss"], (sum(build().loss(learners[0].model, p)[0] for p in parts)) / 2)


def test_the_average_follows_as_its_decay_says():
    learner = build(ema=0.5)
    assert learner.kept_model is learner.average is not learner.plain_model
    assert build().kept_model is not None
    wanted = weights(learner.plain_model)
    for step in range(3):
        learner.learn(step, [batch(step)], progress=0.0)
        decay = min(0.5, (1 + step) / (10 + step))
        now = weights(learner.plain_model)
        wanted = {name: decay * value + (1 - decay) * now[name] for name, value in wanted.items()}
    for name, value in weights(learner.kept_model).items():
        torch.testing.assert_close(value, wanted[name])
        assert not torch.allclose(value, now[name], rtol=1e-4)


def test_a_step_tells_the_loss_when_it_is():
    learner = build()
    learner.learn(7, [batch(0), batch(1)], progress=0.5, epoch=2)
    learner.loss(learner.plain_model, batch())  # as in validation
    assert learner.moments == [Moment(step=7, epoch=2)] * 2 + [None]


# --- reports ----------------------------------------------------------------------------------------------------------


def test_a_row_has_loss_gradient_norms_of_the_parts_and_the_subclass_own_metrics():
    learner = build(clip=1e-3)
    row = learner.learn(0, [batch()], progress=0.0)
    assert list(row) == ["loss", "grad_norm", "grad_norm/0", "grad_norm/2", "mse"]  # the tanh has no parameters
    assert all(isinstance(value, Tensor) and value.numel() == 1 and not value.requires_grad for value in row.values())
    assert row["grad_norm/0"].square() + row["grad_norm/2"].square() == pytest.approx(row["grad_norm"].item() ** 2)
    assert row["grad_norm"] > 0.1  # before clipping
    clipped = torch.nn.utils.get_total_norm([p.grad for p in learner.plain_model.parameters()])
    assert clipped.item() == pytest.approx(1e-3, rel=1e-3)
    assert learner.facts(Moment(0, 0)) == learner.warnings(row) == {}


# --- values that are not finite ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_from_a_bad_batch_on_everything_holds_still(bad):
    learner = build(AdversaryConfig(discriminator_learning_rate=1e-2))
    learner.learn(0, [batch()], progress=0.0)
    models = learner.plain_model, learner.adversary.model
    before = [weights(model) for model in models]
    first, second = batch(1)
    second[0, 0] = bad
    assert not learner.learn(1, [batch(2), (first, second)], progress=0.0)["loss"].isfinite()
    assert learner.learn(2, [batch(2)], progress=0.0)["loss"].isfinite()  # a good one that follows
    assert all(same(old, weights(model)) for old, model in zip(before, models, strict=True))


# --- the discriminator ------------------------------------------------------------------------------------------------


def test_the_discriminator_learns_from_what_the_loss_gives_it():
    learner = build(AdversaryConfig(discriminator_learning_rate=1e-2))
    alone = copy.deepcopy(learner.adversary)
    given = [learner.loss(learner.plain_model, batch(seed))[2] for seed in (0, 1)]
    row = learner.learn(0, [batch(0), batch(1)], progress=0.0)
    assert row["loss"] != row["mse"]  # the model hears it
    wanted = alone.learn(0, [(made.detach(), real) for made, real in given])
    assert {name: row[name].item() for name in wanted} == {name: value.item() for name, value in wanted.items()}
    assert same(weights(alone.model), weights(learner.adversary.model))
    assert {"discriminator/loss", "discriminator/grad_norm"} <= wanted.keys()
    before = weights(learner.adversary.model)
    learner.learn(1, [batch(2)], progress=0.0)
    assert not same(before, weights(learner.adversary.model))


def test_without_anything_to_tell_apart_it_does_not_learn(monkeypatch):
    learner = build(AdversaryConfig(discriminator_learning_rate=1e-2))
    loss = learner.loss
    monkeypatch.setattr(learner, "loss", lambda *given: (*loss(*given)[:2], None))
    before = weights(learner.adversary.model)
    assert "discriminator/loss" not in learner.learn(0, [batch()], progress=0.0)
    assert same(before, weights(learner.adversary.model))


# --- eval mode --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_evaluating_passes_through_training_and_gives_the_mode_back(training):
    modes = []
    model = nn.Linear(2, 2)
    model.train(training)
    train = model.train
    model.train = lambda mode=True: modes.append(mode) or train(mode)
    with evaluating(model) as same_model:
        assert same_model is model
        assert not model.training
    assert model.training == training
    assert modes == [True, False, training]
