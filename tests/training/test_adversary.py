"""The discriminator in training: what it learns, what it leaves alone, and its penalty against a second gradient."""

import copy
import dataclasses
import math

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lib.model.discriminator import Discriminator
from lib.training.adversary import Adversary, AdversaryConfig
from lib.training.losses import discriminator_hinge
from lib.util.errors import UserError

FRAMES = 12
CONFIG = AdversaryConfig(discriminator_learning_rate=1e-3)


def build(clip: float = math.inf, seed: int = 0, *, dropout: bool = True, **changes) -> Adversary:
    torch.manual_seed(seed)
    config = dataclasses.replace(CONFIG, **changes)
    model = Discriminator(8, spectral_norm=config.discriminator_spectral_norm)
    adversary = Adversary(config, model, clip=clip, accelerator=Accelerator())
    if not dropout:
        for module in adversary.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    return adversary


def batch(B: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """What was made `[B, 8, 12]` and twice as much that is real; they differ in sign, on the mean."""
    noise = torch.randn(3 * B, 8, FRAMES, generator=torch.Generator().manual_seed(seed))
    return noise[:B] - 1, noise[B:] + 1


def copied(adversary: Adversary) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in adversary.model.state_dict().items()}


def moved(adversary: Adversary, before: dict[str, Tensor]) -> bool:
    return any(not torch.equal(value, before[name]) for name, value in adversary.model.state_dict().items())


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spectral_norm", [False, True])
def test_it_learns_to_tell_music_from_what_was_made(spectral_norm):
    adversary = build(discriminator_spectral_norm=spectral_norm)
    rows = [adversary.learn(step, [batch(seed=step)]) for step in range(8)]
    first, last = ({name: value.item() for name, value in row.items()} for row in (rows[0], rows[-1]))
    assert first["discriminator/loss"] == pytest.approx(2, abs=0.3)  # the hinge where all logits are 0
    assert last["discriminator/loss"] < 0.5
    assert last["discriminator/real"] > 0.2
    assert last["discriminator/made"] < -0.2
    made, real = batch(32, seed=999)
    critic = adversary.critic(100)
    with torch.no_grad():
        adversary.model.eval()
        assert (critic(made) < 0).all()
        assert (critic(real) > 0).all()


def test_its_loss_is_the_hinge_on_the_weights_before_the_step():
    """And its metrics are the logits' means."""
    adversary = build(dropout=False)
    made, real = batch()
    with torch.no_grad():
        of_made, of_real = adversary.model(made), adversary.model(real)
    found = adversary.learn(0, [(made, real)])
    wanted = {
        "loss": discriminator_hinge(of_real, of_made).item(),
        "real": of_real.mean().item(),
        "made": of_made.mean().item(),
    }
    assert set(found) == {f"discriminator/{name}" for name in (*wanted, "grad_norm")}
    assert {name: found[f"discriminator/{name}"].item() for name in wanted} == pytest.approx(wanted, rel=1e-4, abs=1e-6)
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

    def loss(self, made, real):
        loss = sum((x - 1).square().mean() for x in self.model(real)) + sum(x.square().mean() for x in self.model(made))
        return loss, {"loss": loss}


def test_a_subclass_has_a_loss_for_a_discriminator_with_other_outputs():
    torch.manual_seed(0)
    adversary = LeastSquares(
        dataclasses.replace(CONFIG, discriminator_learning_rate=0.02), TwoScales(), 1.0, Accelerator()
    )
    assert adversary.optimizer.param_groups[0]["betas"] == (0.8, 0.99)
    made, real = torch.rand(4, 1, 40), torch.rand(4, 1, 40) + 1
    rows = [adversary.learn(step, [(made, real)]) for step in range(150)]
    assert set(rows[0]) == {"discriminator/loss", "discriminator/grad_norm"}
    assert rows[-1]["discriminator/loss"] < 0.5 * rows[0]["discriminator/loss"]
    assert [len(scores) for scores in adversary.critic(0)(made)] == [4, 4]


def test_accumulated_batches_are_one_batch():
    """Of unlike sizes; the loss, its gradient and so the step are those of all clips together."""
    whole = batch(6)
    parts = list(zip(*(x.split(sizes) for x, sizes in zip(whole, ((4, 2), (8, 4)), strict=True)), strict=True))
    adversaries = [build(dropout=False, gradient_penalty=1.0) for _ in range(2)]
    rows = [a.learn(0, batches) for a, batches in zip(adversaries, ([whole], parts), strict=True)]
    values = [{name: value.item() for name, value in row.items()} for row in rows]
    assert values[1] == pytest.approx(values[0], rel=1e-4)
    for x, y in zip(*(a.model.parameters() for a in adversaries), strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-3, atol=1e-7)


def test_one_step_is_adamw_with_the_clipped_gradient():
    adversary = build(clip=0.01, dropout=False)
    before = [p.detach().clone() for p in adversary.model.parameters()]
    norm = adversary.learn(0, [batch()])["discriminator/grad_norm"].item()
    assert norm > 0.05  # far above the clip; before clipping
    parameters = list(adversary.model.parameters())
    assert math.sqrt(sum(p.grad.square().sum().item() for p in parameters)) == pytest.approx(0.01, rel=1e-3)
    for old, new in zip(before, parameters, strict=True):
        step = new.grad / (new.grad.abs() + 1e-8)  # Adam's first step: m̂ / (√v̂ + ε)
        torch.testing.assert_close(new.detach(), old * (1 - 1e-3 * 0.01) - 1e-3 * step, rtol=1e-4, atol=1e-6)
    assert adversary.optimizer.param_groups[0]["betas"] == (0.5, 0.999)


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_learning_sends_no_gradient_to_what_was_made(penalty):
    clips = [x.requires_grad_() for x in batch()]
    build(gradient_penalty=penalty).learn(0, [tuple(clips)])
    assert all(clip.grad is None for clip in clips)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_it_learns_on_its_turn_only(every):
    adversary = build(discriminator_every=every)
    learned = []
    for step in range(6):
        before = copied(adversary)
        found = adversary.learn(step, [batch()])
        assert moved(adversary, before) == bool(found)
        learned += [step] if found else []
    assert learned == list(range(0, 6, every))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_moves_nothing(bad, penalty):
    adversary = build(gradient_penalty=penalty)
    adversary.learn(0, [batch()])
    before, optimizer = copied(adversary), str(adversary.optimizer.state_dict())
    made, real = batch()
    made[1, 2, 3] = bad
    found = adversary.learn(1, [(made, real)])
    assert not found["discriminator/grad_norm"].isfinite()
    assert not moved(adversary, before)
    assert str(adversary.optimizer.state_dict()) == optimizer
    assert adversary.learn(2, [batch()])["discriminator/grad_norm"].isfinite()  # and the next step is a good one
    assert moved(adversary, before)


# --- what the model hears ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spectral_norm", [False, True])
def test_the_critics_gradient_reaches_the_latents_and_no_weight(spectral_norm):
    adversary = build(dropout=False, discriminator_spectral_norm=spectral_norm)
    latents = batch()[0].requires_grad_()
    logits = adversary.critic(0)(latents)
    assert logits.shape == (4,)
    logits.sum().backward()
    assert (latents.grad.abs().amax(dim=(1, 2)) > 0).all()
    assert all(p.grad is None and p.requires_grad for p in adversary.model.parameters())
    adversary.model.eval()
    torch.testing.assert_close(adversary.critic(0)(latents), adversary.model(latents))


def test_following_the_critic_makes_latents_more_like_music():
    adversary = build()
    for step in range(8):
        adversary.learn(step, [batch(seed=step)])
    adversary.model.eval()
    critic, latents = adversary.critic(8), batch()[0].requires_grad_()
    before = critic(latents)
    before.sum().backward()
    direction = latents.grad / latents.grad.flatten(1).norm(dim=1)[:, None, None]
    assert (critic(latents + direction) > before + 0.01).all()


@pytest.mark.parametrize("warmup", [0, 3])
def test_the_model_hears_nothing_while_the_discriminator_warms_up(warmup):
    adversary = build(discriminator_warmup=warmup)
    before = copied(adversary)
    assert [adversary.critic(step) is None for step in range(5)] == [step < warmup for step in range(5)]
    adversary.learn(0, [batch()])
    assert moved(adversary, before)  # but it learns


def test_the_critic_is_the_discriminator_as_it_is_now():
    adversary = build(dropout=False)
    latents = batch()[0]
    first = adversary.critic(0)(latents)
    adversary.learn(0, [batch()])
    second = adversary.critic(1)(latents)
    assert not torch.allclose(first, second, rtol=1e-3)
    torch.testing.assert_close(second, adversary.model(latents))


# --- penalty and norm -------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """One weight a channel: its gradient at any latents is the weight itself, in each of T frames."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 8))

    def forward(self, latents: Tensor) -> Tensor:
        return (latents * self.weight[:, None]).sum(dim=(1, 2))


def test_the_penalty_of_a_linear_discriminator_is_half_its_weights_square():
    adversary = build(gradient_penalty=3.0)
    adversary.model = model = Linear()
    made, real = batch()
    total, metrics = adversary.loss(made, real)
    penalty = FRAMES * model.weight.square().sum() / 2  # of every clip alike, FRAMES frames
    assert metrics["penalty"].item() == pytest.approx(penalty.item(), rel=1e-5)
    assert total.item() == pytest.approx(metrics["loss"].item() + 3 * penalty.item(), rel=1e-5)
    hinge, plain = build().loss(made, real)
    assert "penalty" not in plain
    assert hinge is plain["loss"]
    (gradient,) = torch.autograd.grad(metrics["penalty"], model.weight)
    torch.testing.assert_close(gradient, FRAMES * model.weight.detach())


def test_the_penalty_is_half_the_squared_gradient_at_music_clip_by_clip():
    """By one backward pass a clip, on the real discriminator; the mean over clips, not over values."""
    adversary = build(dropout=False, gradient_penalty=1.0)
    made, real = batch()
    real[4:] *= 2
    _, metrics = adversary.loss(made, real)
    squares = []
    for clip in real:
        clip = clip[None].clone().requires_grad_()
        adversary.model(clip).sum().backward()
        squares.append(clip.grad.double().square().sum().item())
    assert metrics["penalty"].item() == pytest.approx(sum(squares) / len(squares) / 2, rel=1e-4)
    assert metrics["penalty"].requires_grad


def test_the_penalty_makes_the_discriminator_flat():
    slopes = []
    for penalty in (0.0, 1.0):
        adversary = build(gradient_penalty=penalty)
        for step in range(8):
            adversary.learn(step, [batch(seed=step)])
        adversary.model.eval()
        latents = batch(16, seed=500)[1].requires_grad_()
        adversary.critic(8)(latents).sum().backward()
        slopes.append(latents.grad.flatten(1).norm(dim=1).mean().item())
    assert slopes[1] < 0.8 * slopes[0]


def test_spectral_norm_holds_while_it_learns():
    adversary = build(discriminator_spectral_norm=True)
    for step in range(10):
        adversary.learn(step, [batch(seed=step)])
    adversary.model.eval()
    for layer in adversary.model.modules():
        if isinstance(layer, nn.Conv1d | nn.Linear):
            sigma = torch.linalg.matrix_norm(layer.weight.detach().flatten(1), ord=2).item()
            assert sigma == pytest.approx(1, abs=0.15)  # one power iteration a step follows from behind
    assert not any("parametrizations" in name for name in build().model.state_dict())


# --- saving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spectral_norm", [False, True])
def test_what_was_saved_goes_on_exactly(spectral_norm):
    first = build(discriminator_spectral_norm=spectral_norm, gradient_penalty=0.5)
    for step in range(3):
        first.learn(step, [batch(seed=step)])
    state = torch.get_rng_state()
    second = build(seed=77, discriminator_spectral_norm=spectral_norm, gradient_penalty=0.5)
    assert moved(second, copied(first))
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # as from disk; or they would share their moments
    assert not moved(second, copied(first))
    rows = []
    for adversary in (first, second):
        torch.set_rng_state(state)  # of dropout
        rows.append([adversary.learn(step, [batch(seed=step)]) for step in range(3, 6)])
    assert not moved(second, copied(first))
    for mine, other in zip(*rows, strict=True):
        assert {name: value.item() for name, value in mine.items()} == {n: value.item() for n, value in other.items()}


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("discriminator_learning_rate", 0.0, "above 0"),
        ("discriminator_learning_rate", -1e-4, "above 0"),
        ("discriminator_learning_rate", math.nan, "above 0"),
        ("discriminator_learning_rate", "1e-4", "a finite number"),
        ("discriminator_every", 0, "a whole number, 1 or more"),
        ("discriminator_every", 1.5, "a whole number, 1 or more"),
        ("discriminator_warmup", -1, "a whole number, 0 or more"),
        ("gradient_penalty", -1.0, "0 or more"),
        ("gradient_penalty", math.inf, "0 or more"),
        ("discriminator_spectral_norm", 1, "true or false"),
        ("discriminator_spectral_norm", "yes", "true or false"),
    ],
)
def test_refusals_name_the_field(field, value, wanted):
    with pytest.raises(UserError, match=f"^{field}=.* is not allowed; use .*{wanted}"):
        AdversaryConfig(**{field: value})


def test_by_default_there_is_none():
    assert AdversaryConfig().discriminator_learning_rate is None
