"""The discriminator in training: what it learns, and what it leaves alone."""

import copy
import dataclasses
import math

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lib.model.discriminator import Discriminator
from lib.training.adversary import Adversary
from lib.training.config import AdversaryConfig
from lib.training.losses import discriminator_hinge
from lib.util.errors import UserError

FRAMES = 12
CONFIG = AdversaryConfig(discriminator_learning_rate=1e-3)


def build(clip: float = math.inf, seed: int = 0, *, dropout: bool = True, **changes) -> Adversary:
    torch.manual_seed(seed)
    config = dataclasses.replace(CONFIG, **changes)
    adversary = Adversary(config, Discriminator(8), clip=clip, accelerator=Accelerator())
    if not dropout:
        for module in adversary.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    return adversary


def batch(B: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Fake samples `[B, 8, 12]` and twice as many real ones; their means differ in sign."""
    noise = torch.randn(3 * B, 8, FRAMES, generator=torch.Generator().manual_seed(seed))
    return noise[:B] - 1, noise[B:] + 1


def copied(adversary: Adversary) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in adversary.model.state_dict().items()}


def moved(adversary: Adversary, before: dict[str, Tensor]) -> bool:
    return any(not torch.equal(value, before[name]) for name, value in adversary.model.state_dict().items())


# --- learning ---------------------------------------------------------------------------------------------------------


def test_it_learns_to_tell_real_from_fake():
    adversary = build()
    rows = [adversary.train_step([batch(seed=step)]) for step in range(8)]
    first, last = ({name: value.item() for name, value in row.items()} for row in (rows[0], rows[-1]))
    assert first["discriminator/loss"] == pytest.approx(2, abs=0.3)  # the hinge where all logits are 0
    assert last["discriminator/loss"] < 0.5
    assert last["discriminator/real"] > 0.2
    assert last["discriminator/fake"] < -0.2
    fake, real = batch(32, seed=999)
    critic = adversary.critic(100)
    with torch.no_grad():
        adversary.model.eval()
        assert (critic(fake) < 0).all()
        assert (critic(real) > 0).all()


def test_its_loss_is_the_hinge_on_the_weights_before_the_step():
    """And its metrics are the logits' means."""
    adversary = build(dropout=False)
    fake, real = batch()
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
        dataclasses.replace(CONFIG, discriminator_learning_rate=0.02), TwoScales(), 1.0, Accelerator()
    )
    assert adversary.optimizer.param_groups[0]["betas"] == (0.8, 0.99)
    fake, real = torch.rand(4, 1, 40), torch.rand(4, 1, 40) + 1
    rows = [adversary.train_step([(fake, real)]) for step in range(150)]
    assert set(rows[0]) == {"discriminator/loss", "discriminator/grad_norm"}
    assert rows[-1]["discriminator/loss"] < 0.5 * rows[0]["discriminator/loss"]
    assert [len(scores) for scores in adversary.critic(0)(fake)] == [4, 4]


def test_accumulated_batches_are_one_batch():
    """Of unlike sizes; the loss, its gradient and so the step are those of all clips together."""
    whole = batch(6)
    parts = list(zip(*(x.split(sizes) for x, sizes in zip(whole, ((4, 2), (8, 4)), strict=True)), strict=True))
    adversaries = [build(dropout=False) for _ in range(2)]
    rows = [a.train_step(batches) for a, batches in zip(adversaries, ([whole], parts), strict=True)]
    values = [{name: value.item() for name, value in row.items()} for row in rows]
    assert values[1] == pytest.approx(values[0], rel=1e-4)
    for x, y in zip(*(a.model.parameters() for a in adversaries), strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-3, atol=1e-7)


def test_one_step_is_adamw_with_the_clipped_gradient():
    adversary = build(clip=0.01, dropout=False)
    before = [p.detach().clone() for p in adversary.model.parameters()]
    norm = adversary.train_step([batch()])["discriminator/grad_norm"].item()
    assert norm > 0.05  # far above the clip; before clipping
    parameters = list(adversary.model.parameters())
    assert math.sqrt(sum(p.grad.square().sum().item() for p in parameters)) == pytest.approx(0.01, rel=1e-3)
    for old, new in zip(before, parameters, strict=True):
        step = new.grad / (new.grad.abs() + 1e-8)  # Adam's first step: m̂ / (√v̂ + ε)
        torch.testing.assert_close(new.detach(), old * (1 - 1e-3 * 0.01) - 1e-3 * step, rtol=1e-4, atol=1e-6)
    assert adversary.optimizer.param_groups[0]["betas"] == (0.5, 0.999)


def test_learning_sends_no_gradient_to_the_samples():
    clips = [x.requires_grad_() for x in batch()]
    build().train_step([tuple(clips)])
    assert all(clip.grad is None for clip in clips)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_gradient_skips_the_update(bad):
    adversary = build()
    adversary.train_step([batch()])
    before, optimizer = copied(adversary), str(adversary.optimizer.state_dict())
    fake, real = batch()
    fake[1, 2, 3] = bad
    found = adversary.train_step([(fake, real)])
    assert not found["discriminator/grad_norm"].isfinite()
    assert not moved(adversary, before)
    assert str(adversary.optimizer.state_dict()) == optimizer
    assert adversary.train_step([batch()])["discriminator/grad_norm"].isfinite()  # and the next step is a good one
    assert moved(adversary, before)


# --- the critic -------------------------------------------------------------------------------------------------------


def test_the_critics_gradient_reaches_the_latents_and_no_weight():
    adversary = build(dropout=False)
    latents = batch()[0].requires_grad_()
    logits = adversary.critic(0)(latents)
    assert logits.shape == (4,)
    logits.sum().backward()
    assert (latents.grad.abs().amax(dim=(1, 2)) > 0).all()
    assert all(p.grad is None and p.requires_grad for p in adversary.model.parameters())
    adversary.model.eval()
    torch.testing.assert_close(adversary.critic(0)(latents), adversary.model(latents))


def test_following_the_critic_makes_latents_more_real():
    adversary = build()
    for step in range(8):
        adversary.train_step([batch(seed=step)])
    adversary.model.eval()
    critic, latents = adversary.critic(8), batch()[0].requires_grad_()
    before = critic(latents)
    before.sum().backward()
    direction = latents.grad / latents.grad.flatten(1).norm(dim=1)[:, None, None]
    assert (critic(latents + direction) > before + 0.01).all()


@pytest.mark.parametrize("warmup", [0, 3])
def test_there_is_no_critic_during_the_warm_up(warmup):
    adversary = build(discriminator_warmup=warmup)
    before = copied(adversary)
    assert [adversary.critic(step) is None for step in range(5)] == [step < warmup for step in range(5)]
    adversary.train_step([batch()])
    assert moved(adversary, before)  # but it learns


def test_the_critic_is_the_discriminator_as_it_is_now():
    adversary = build(dropout=False)
    latents = batch()[0]
    first = adversary.critic(0)(latents)
    adversary.train_step([batch()])
    second = adversary.critic(1)(latents)
    assert not torch.allclose(first, second, rtol=1e-3)
    torch.testing.assert_close(second, adversary.model(latents))


# --- saving -----------------------------------------------------------------------------------------------------------


def test_a_saved_discriminator_resumes_exactly():
    first = build()
    for step in range(3):
        first.train_step([batch(seed=step)])
    state = torch.get_rng_state()
    second = build(seed=77)
    assert moved(second, copied(first))
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # as from disk; or they would share their moments
    assert not moved(second, copied(first))
    rows = []
    for adversary in (first, second):
        torch.set_rng_state(state)  # of dropout
        rows.append([adversary.train_step([batch(seed=step)]) for step in range(3, 6)])
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
