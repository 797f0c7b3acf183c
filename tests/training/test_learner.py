"""A step of any model: what it computes and reports, and that it skips the update if a value is not finite."""

import copy
import dataclasses
import math

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lib.model.discriminator import Discriminator
from lib.model.projection import SpectralLinear
from lib.training.config import AdversaryConfig, LoopConfig
from lib.training.learner import (
    Adversary,
    Learner,
    StepInfo,
    evaluating,
    gradient_norms,
    learning_rate_factor,
    step_unless,
    to_floats,
    update_ema,
)
from lib.training.losses import discriminator_hinge
from lib.util.errors import UserError

CONFIG = LoopConfig(learning_rate=0.01, clip=1.0)


class Regression(Learner):
    """Two layers that learn the second of a pair from the first; notes where in a training each loss was asked for."""

    def __init__(self, config: LoopConfig, adversary: AdversaryConfig | None = None):
        torch.manual_seed(0)
        accelerator = Accelerator(mixed_precision="no")
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        discriminator = nn.Sequential(nn.Linear(3, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1), nn.Flatten(0))
        groups = [
            {"params": list(model[0].parameters()), "full_lr": config.learning_rate},
            {"params": list(model[2].parameters()), "full_lr": config.learning_rate / 10},
        ]
        super().__init__(config, model, accelerator, groups)
        if adversary:
            self.adversary = Adversary(adversary, discriminator, config.max_norm, accelerator)
        self.infos: list[StepInfo | None] = []

    def loss(self, model, batch, info=None):
        self.infos.append(info)
        with self.autocast():
            fake = model(batch[0])
        fake, real = fake.float(), batch[1]
        mse = (fake - real).square().mean()
        critic = self.adversary.critic(info.step) if self.adversary and info else None
        loss = mse if critic is None else mse - 0.1 * critic(fake).mean()
        return loss, {"mse": mse}, (fake, real)


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
    losses = [learner.train_step([batch(step)], StepInfo(step))["loss"].item() for step in range(400)]
    assert losses[-1] < 0.2 * losses[0]
    assert all(p.dtype == torch.float32 for p in learner.unwrapped_model.parameters())


def test_one_step_is_adamw_with_the_rate_of_each_group():
    learner = build(weight_decay=0.5, clip=None, warmup_steps=2)
    before = weights(learner.unwrapped_model)
    learner.train_step([batch()], StepInfo(0))
    for name, new in learner.unwrapped_model.named_parameters():
        rate = 0.01 / 2 / (1 if name.startswith("0.") else 10)  # half of the warm-up
        step = new.grad / (new.grad.abs() + 1e-8)  # Adam's first step: m̂ / (√v̂ + ε)
        torch.testing.assert_close(new.detach(), before[name] * (1 - rate * 0.5) - rate * step, rtol=1e-4, atol=1e-6)


def test_accumulated_batches_of_unlike_sizes_are_one_batch():
    whole = batch(B=7)
    parts = list(zip(*(x.split((4, 3)) for x in whole), strict=True))
    learners = [build(clip=None) for _ in range(2)]
    rows = [learner.train_step(steps, StepInfo(0)) for learner, steps in zip(learners, ([whole], parts), strict=True)]
    assert rows[1].keys() == rows[0].keys()
    for name, value in rows[0].items():
        torch.testing.assert_close(rows[1][name], value, rtol=1e-5, atol=1e-7)
    for x, y in zip(*(learner.unwrapped_model.parameters() for learner in learners), strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-7)
    assert not torch.allclose(rows[0]["loss"], (sum(build().loss(learners[0].model, p)[0] for p in parts)) / 2)


def test_the_ema_follows_its_decay():
    learner = build(ema=0.5)
    assert learner.eval_model is learner.ema_model is not learner.unwrapped_model
    assert build().eval_model is not None
    expected = weights(learner.unwrapped_model)
    for step in range(3):
        learner.train_step([batch(step)], StepInfo(step))
        decay = min(0.5, (1 + step) / (10 + step))
        now = weights(learner.unwrapped_model)
        expected = {name: decay * value + (1 - decay) * now[name] for name, value in expected.items()}
    for name, value in weights(learner.eval_model).items():
        torch.testing.assert_close(value, expected[name])
        assert not torch.allclose(value, now[name], rtol=1e-4)


def test_the_loss_gets_the_step_in_training_only():
    learner = build()
    learner.train_step([batch(0), batch(1)], StepInfo(7, 2, progress=0.5))
    learner.loss(learner.unwrapped_model, batch())  # as in validation
    assert learner.infos == [StepInfo(step=7, epoch=2, progress=0.5)] * 2 + [None]


# --- learning rates ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "progress", "warmup", "schedule", "expected"),
    [
        (0, 0.0, 0, "constant", 1.0),
        (500, 0.9, 0, "constant", 1.0),
        (0, 0.0, 10, "constant", 0.1),  # never 0, or the first step would do nothing
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
def test_learning_rate_factor_by_hand(step, progress, warmup, schedule, expected):
    config = LoopConfig(warmup_steps=warmup, schedule=schedule)
    assert learning_rate_factor(StepInfo(step, progress=progress), config) == pytest.approx(expected, abs=1e-12)


def test_the_schedule_falls_and_the_warm_up_rises():
    config = LoopConfig(schedule="cosine")
    falling = [learning_rate_factor(StepInfo(0, progress=k / 100), config) for k in range(101)]
    assert falling == sorted(falling, reverse=True)
    assert (falling[0], falling[-1]) == (1, 0)
    rising = [learning_rate_factor(StepInfo(step), LoopConfig(warmup_steps=50)) for step in range(60)]
    assert rising == sorted(rising)
    assert max(rising) == 1


# --- EMA --------------------------------------------------------------------------------------------------------------


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
def test_one_update_of_the_ema(decay, step, used):
    """decay · EMA + (1 − decay) · weights, with a decay of at most (1 + step)/(10 + step)."""
    ema_model, model = linear(2.0), linear(5.0)
    update_ema(ema_model, model, decay, step)
    for parameter in ema_model.parameters():
        torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, used * 2.0 + (1 - used) * 5.0))
    assert all((parameter == 5).all() for parameter in model.parameters())


def test_the_initial_weights_are_forgotten():
    """After 100 steps nothing is left of them, though a constant decay of 0.999 would keep 90 %."""
    ema_model, model = linear(1000.0), linear(1.0)
    for step in range(100):
        update_ema(ema_model, model, 0.999, step)
    assert (ema_model.weight - 1).abs().max() < 1e-3


def test_statistics_of_batch_norms_are_copied():
    """Or the EMA model would use a mean of 0 in eval mode, for ever."""
    ema_model, model = nn.Sequential(nn.BatchNorm1d(3)), nn.Sequential(nn.BatchNorm1d(3))
    model(5 + torch.randn(8, 3))
    update_ema(ema_model, model, 0.999, 0)
    assert model[0].running_mean.abs().min() > 0.1
    for averaged, current in zip(ema_model.buffers(), model.buffers(), strict=True):
        assert torch.equal(averaged, current)
        assert averaged is not current


def test_weights_and_ema_share_no_memory():
    ema_model, model = linear(0.0), linear(1.0)
    update_ema(ema_model, model, 0.5, 100)
    with torch.no_grad():
        model.weight.fill_(7.0)
    assert (ema_model.weight == 0.5).all()


# --- reports ----------------------------------------------------------------------------------------------------------


def test_a_row_has_loss_gradient_norms_of_the_parts_and_the_subclass_own_metrics():
    learner = build(clip=1e-3)
    row = learner.train_step([batch()], StepInfo(0))
    parts = ["grad_norm/0", "grad_norm/2"]  # the tanh has no parameters
    assert list(row) == ["loss", "grad_norm", *parts, "mse", "sign/gradient_share"]
    largest = max(p.grad.abs().max().item() for p in learner.model.parameters())  # clipped, as is the norm
    assert row["sign/gradient_share"].item() == pytest.approx(largest / 1e-3, rel=1e-3)
    assert all(isinstance(value, Tensor) and value.numel() == 1 and not value.requires_grad for value in row.values())
    assert row["grad_norm/0"].square() + row["grad_norm/2"].square() == pytest.approx(row["grad_norm"].item() ** 2)
    assert row["grad_norm"] > 0.1  # before clipping
    clipped = torch.nn.utils.get_total_norm([p.grad for p in learner.unwrapped_model.parameters()])
    assert clipped.item() == pytest.approx(1e-3, rel=1e-3)
    assert learner.facts(StepInfo(0, 0)) == learner.warnings(row) == {}


def test_gradient_norms_of_the_parts():
    parts = {"first": nn.Linear(3, 2), "frozen": nn.Linear(3, 2).requires_grad_(False), "last/of two": nn.Linear(2, 1)}
    for name in ("first", "last/of two"):
        parts[name].weight.grad = torch.full_like(parts[name].weight, 2.0)
    parts["first"].bias.grad = torch.full((2,), 3.0)
    expected = {"grad_norm/first": math.sqrt(6 * 4 + 2 * 9), "grad_norm/last/of two": math.sqrt(2 * 4)}
    assert to_floats(gradient_norms(parts)) == pytest.approx(expected)  # no entry for a part without gradients


def test_to_floats_keeps_names_values_and_order():
    values = {"b": torch.tensor(1.5, dtype=torch.float64), "a": torch.tensor(2), "c": torch.tensor(math.inf)}
    found = to_floats(values | {"d": torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True)})
    assert list(found.items()) == [("b", 1.5), ("a", 2.0), ("c", math.inf), ("d", 0.5)]
    assert math.isnan(to_floats({"x": torch.tensor(math.nan)})["x"])
    assert to_floats(values, Accelerator()) == to_floats(values)


# --- non-finite values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_from_a_bad_batch_on_every_update_is_skipped(bad):
    learner = build(AdversaryConfig(discriminator_learning_rate=1e-2))
    learner.train_step([batch()], StepInfo(0))
    models = learner.unwrapped_model, learner.adversary.model
    before = [weights(model) for model in models]
    first, second = batch(1)
    second[0, 0] = bad
    assert not learner.train_step([batch(2), (first, second)], StepInfo(1))["loss"].isfinite()
    assert learner.train_step([batch(2)], StepInfo(2))["loss"].isfinite()  # a good one that follows
    assert all(same(old, weights(model)) for old, model in zip(before, models, strict=True))


@pytest.mark.parametrize("failed", [0.0, 1.0])
def test_a_fused_optimizer_still_reads_the_private_found_inf(failed):
    """If this fails after an upgrade of torch or accelerate, `step_unless` needs another way to skip an update."""
    model = linear(1.0)
    optimizer = Accelerator().prepare(torch.optim.AdamW(model.parameters(), lr=0.1, fused=True))
    model(torch.ones(1, 3)).sum().backward()
    step_unless(torch.tensor(failed), optimizer)
    message = "torch.optim.AdamW(fused=True) no longer reads the attribute `found_inf`"
    assert torch.equal(model.weight, torch.ones(2, 3)) == bool(failed), message


# --- the discriminator ------------------------------------------------------------------------------------------------


def test_the_discriminator_learns_from_what_the_loss_gives_it():
    learner = build(AdversaryConfig(discriminator_learning_rate=1e-2))
    alone = copy.deepcopy(learner.adversary)
    given = [learner.loss(learner.unwrapped_model, batch(seed))[2] for seed in (0, 1)]
    row = learner.train_step([batch(0), batch(1)], StepInfo(0))
    assert row["loss"] != row["mse"]  # the critic is part of the loss
    expected = alone.train_step([(fake.detach(), real) for fake, real in given])
    assert {name: row[name].item() for name in expected} == {name: value.item() for name, value in expected.items()}
    assert same(weights(alone.model), weights(learner.adversary.model))
    assert {"discriminator/loss", "discriminator/grad_norm"} <= expected.keys()
    before = weights(learner.adversary.model)
    learner.train_step([batch(2)], StepInfo(1))
    assert not same(before, weights(learner.adversary.model))


def test_without_samples_the_discriminator_does_not_learn(monkeypatch):
    learner = build(AdversaryConfig(discriminator_learning_rate=1e-2))
    loss = learner.loss
    monkeypatch.setattr(learner, "loss", lambda *given: (*loss(*given)[:2], None))
    before = weights(learner.adversary.model)
    assert "discriminator/loss" not in learner.train_step([batch()], StepInfo(0))
    assert same(before, weights(learner.adversary.model))


# --- eval mode --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_evaluating_realigns_projections_and_restores_the_mode(training):
    model = nn.Sequential(SpectralLinear(6, 4)).train(training)
    with torch.no_grad():
        model[0].parametrizations.weight.original.add_(torch.randn(4, 6))
    with evaluating(model) as same_model:
        assert same_model is model
        assert not model.training
        assert torch.linalg.svdvals(model[0].weight.detach())[0].item() == pytest.approx(1, abs=1e-3)
    assert model.training == training


# --- the discriminator in training: what it learns, and what it leaves alone ------------------------------------------

FRAMES = 12
ADVERSARY = AdversaryConfig(discriminator_learning_rate=1e-3)


def build_adversary(clip: float = math.inf, seed: int = 0, *, dropout: bool = True, **changes) -> Adversary:
    torch.manual_seed(seed)
    config = dataclasses.replace(ADVERSARY, **changes)
    adversary = Adversary(config, Discriminator(8), clip=clip, accelerator=Accelerator())
    if not dropout:
        for module in adversary.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    return adversary


def samples(B: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Fake samples `[B, 8, 12]` and twice as many real ones; their means differ in sign."""
    noise = torch.randn(3 * B, 8, FRAMES, generator=torch.Generator().manual_seed(seed))
    return noise[:B] - 1, noise[B:] + 1


def copied(adversary: Adversary) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in adversary.model.state_dict().items()}


def moved(adversary: Adversary, before: dict[str, Tensor]) -> bool:
    return any(not torch.equal(value, before[name]) for name, value in adversary.model.state_dict().items())


# --- learning ---------------------------------------------------------------------------------------------------------


def test_it_learns_to_tell_real_from_fake():
    adversary = build_adversary()
    rows = [adversary.train_step([samples(seed=step)]) for step in range(8)]
    first, last = ({name: value.item() for name, value in row.items()} for row in (rows[0], rows[-1]))
    assert first["discriminator/loss"] == pytest.approx(2, abs=0.3)  # the hinge where all logits are 0
    assert last["discriminator/loss"] < 0.5
    assert last["discriminator/real"] > 0.2
    assert last["discriminator/fake"] < -0.2
    fake, real = samples(32, seed=999)
    critic = adversary.critic(100)
    with torch.no_grad():
        adversary.model.eval()
        assert (critic(fake) < 0).all()
        assert (critic(real) > 0).all()


def test_its_loss_is_the_hinge_on_the_weights_before_the_step():
    """And its metrics are the logits' means."""
    adversary = build_adversary(dropout=False)
    fake, real = samples()
    with torch.no_grad():
        of_fake, of_real = adversary.model(fake), adversary.model(real)
    found = adversary.train_step([(fake, real)])
    expected = {
        "loss": discriminator_hinge(of_real, of_fake).item(),
        "real": of_real.mean().item(),
        "fake": of_fake.mean().item(),
    }
    assert set(found) == {f"discriminator/{name}" for name in (*expected, "grad_norm")}
    assert {name: found[f"discriminator/{name}"].item() for name in expected} == pytest.approx(
        expected, rel=1e-4, abs=1e-6
    )
    assert abs(of_real[:4].mean() - of_real[4:].mean()) > 1e-4  # all of the real ones count


class TwoScales(nn.Module):
    """Scores of a signal `[B, 1, N]` at two scales, as discriminators of sound give them."""

    def __init__(self):
        super().__init__()
        self.scales = nn.ModuleList(nn.Conv1d(1, 1, kernel, stride=kernel) for kernel in (2, 5))

    def forward(self, wav: Tensor) -> list[Tensor]:
        return [scale(wav) for scale in self.scales]


class LeastSquares(Adversary):
    betas = (0.8, 0.99)

    def loss(self, fake, real):
        loss = sum((x - 1).square().mean() for x in self.model(real)) + sum(x.square().mean() for x in self.model(fake))
        return loss, {"loss": loss}


def test_a_subclass_has_a_loss_for_a_discriminator_with_other_outputs():
    torch.manual_seed(0)
    adversary = LeastSquares(
        dataclasses.replace(ADVERSARY, discriminator_learning_rate=0.02), TwoScales(), 1.0, Accelerator()
    )
    assert adversary.optimizer.param_groups[0]["betas"] == (0.8, 0.99)
    fake, real = torch.rand(4, 1, 40), torch.rand(4, 1, 40) + 1
    rows = [adversary.train_step([(fake, real)]) for step in range(150)]
    assert set(rows[0]) == {"discriminator/loss", "discriminator/grad_norm"}
    assert rows[-1]["discriminator/loss"] < 0.5 * rows[0]["discriminator/loss"]
    assert [len(scores) for scores in adversary.critic(0)(fake)] == [4, 4]


def test_accumulated_batches_are_one_batch():
    """Of unlike sizes; the loss, its gradient and so the step are those of all clips together."""
    whole = samples(6)
    parts = list(zip(*(x.split(sizes) for x, sizes in zip(whole, ((4, 2), (8, 4)), strict=True)), strict=True))
    adversaries = [build_adversary(dropout=False) for _ in range(2)]
    rows = [a.train_step(batches) for a, batches in zip(adversaries, ([whole], parts), strict=True)]
    values = [{name: value.item() for name, value in row.items()} for row in rows]
    assert values[1] == pytest.approx(values[0], rel=1e-4)
    for x, y in zip(*(a.model.parameters() for a in adversaries), strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-3, atol=1e-7)


def test_one_step_is_adamw_with_the_clipped_gradient():
    adversary = build_adversary(clip=0.01, dropout=False)
    before = [p.detach().clone() for p in adversary.model.parameters()]
    norm = adversary.train_step([samples()])["discriminator/grad_norm"].item()
    assert norm > 0.05  # far above the clip; before clipping
    parameters = list(adversary.model.parameters())
    assert math.sqrt(sum(p.grad.square().sum().item() for p in parameters)) == pytest.approx(0.01, rel=1e-3)
    for old, new in zip(before, parameters, strict=True):
        step = new.grad / (new.grad.abs() + 1e-8)  # Adam's first step: m̂ / (√v̂ + ε)
        torch.testing.assert_close(new.detach(), old * (1 - 1e-3 * 0.01) - 1e-3 * step, rtol=1e-4, atol=1e-6)
    assert adversary.optimizer.param_groups[0]["betas"] == (0.5, 0.999)


def test_learning_sends_no_gradient_to_the_samples():
    clips = [x.requires_grad_() for x in samples()]
    build_adversary().train_step([tuple(clips)])
    assert all(clip.grad is None for clip in clips)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_gradient_skips_the_update(bad):
    adversary = build_adversary()
    adversary.train_step([samples()])
    before, optimizer = copied(adversary), str(adversary.optimizer.state_dict())
    fake, real = samples()
    fake[1, 2, 3] = bad
    found = adversary.train_step([(fake, real)])
    assert not found["discriminator/grad_norm"].isfinite()
    assert not moved(adversary, before)
    assert str(adversary.optimizer.state_dict()) == optimizer
    assert adversary.train_step([samples()])["discriminator/grad_norm"].isfinite()  # and the next step is a good one
    assert moved(adversary, before)


# --- the critic -------------------------------------------------------------------------------------------------------


def test_the_critics_gradient_reaches_the_latents_and_no_weight():
    adversary = build_adversary(dropout=False)
    latents = samples()[0].requires_grad_()
    logits = adversary.critic(0)(latents)
    assert logits.shape == (4,)
    logits.sum().backward()
    assert (latents.grad.abs().amax(dim=(1, 2)) > 0).all()
    assert all(p.grad is None and p.requires_grad for p in adversary.model.parameters())
    adversary.model.eval()
    torch.testing.assert_close(adversary.critic(0)(latents), adversary.model(latents))


def test_following_the_critic_makes_latents_more_real():
    adversary = build_adversary()
    for step in range(8):
        adversary.train_step([samples(seed=step)])
    adversary.model.eval()
    critic, latents = adversary.critic(8), samples()[0].requires_grad_()
    before = critic(latents)
    before.sum().backward()
    direction = latents.grad / latents.grad.flatten(1).norm(dim=1)[:, None, None]
    assert (critic(latents + direction) > before + 0.01).all()


@pytest.mark.parametrize("warmup", [0, 3])
def test_there_is_no_critic_during_the_warm_up(warmup):
    adversary = build_adversary(discriminator_warmup=warmup)
    before = copied(adversary)
    assert [adversary.critic(step) is None for step in range(5)] == [step < warmup for step in range(5)]
    adversary.train_step([samples()])
    assert moved(adversary, before)  # but it learns


def test_the_critic_is_the_discriminator_as_it_is_now():
    adversary = build_adversary(dropout=False)
    latents = samples()[0]
    first = adversary.critic(0)(latents)
    adversary.train_step([samples()])
    second = adversary.critic(1)(latents)
    assert not torch.allclose(first, second, rtol=1e-3)
    torch.testing.assert_close(second, adversary.model(latents))


# --- saving -----------------------------------------------------------------------------------------------------------


def test_a_saved_discriminator_resumes_exactly():
    first = build_adversary()
    for step in range(3):
        first.train_step([samples(seed=step)])
    state = torch.get_rng_state()
    second = build_adversary(seed=77)
    assert moved(second, copied(first))
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # as from disk; or they would share their moments
    assert not moved(second, copied(first))
    rows = []
    for adversary in (first, second):
        torch.set_rng_state(state)  # of dropout
        rows.append([adversary.train_step([samples(seed=step)]) for step in range(3, 6)])
    assert not moved(second, copied(first))
    for mine, other in zip(*rows, strict=True):
        assert {name: value.item() for name, value in mine.items()} == {n: value.item() for n, value in other.items()}


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("discriminator_learning_rate", 0.0, "above 0"),
        ("discriminator_learning_rate", -1e-4, "above 0"),
        ("discriminator_learning_rate", math.nan, "above 0"),
        ("discriminator_learning_rate", "1e-4", "a finite number"),
        ("discriminator_warmup", -1, "a whole number, 0 or more"),
    ],
)
def test_refusals_name_the_field(field, value, expected):
    with pytest.raises(UserError, match=f"^{field}=.* is not allowed; use .*{expected}"):
        AdversaryConfig(**{field: value})


def test_by_default_there_is_none():
    assert AdversaryConfig().discriminator_learning_rate is None
