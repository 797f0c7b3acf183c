"""Diffusion: the schedule against its formula, sampling against models whose answer is known."""

import functools
import math

import pytest
import torch
from torch import Tensor

from lib.superres.diffusion import TIMESTEPS, add_noise, sample, schedule
from lib.superres.unet import Denoiser
from superres.conftest import DENOISER

SHAPE = (2, 2, 8, 4)
LOW, MEL = torch.zeros(SHAPE), torch.zeros(2, 1, 256, 32)


def noise(seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def shares(timesteps: Tensor) -> Tensor:
    """ᾱ for timesteps `[B]`, as `[B, 1, 1, 1]`, in double precision."""
    return all_shares()[timesteps][:, None, None, None]


@functools.cache
def all_shares() -> Tensor:
    """By the formula of Nichol and Dhariwal."""

    def f(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    products, product = [], 1.0
    for t in range(1_000):
        product *= 1 - min(1 - f((t + 1) / 1_000) / f(t / 1_000), 0.999)
        products.append(product)
    return torch.tensor(products, dtype=torch.double)


class Model:
    """Stands in for a `Denoiser`: `velocity(latents, ᾱ)` is what it predicts. Notes what it was called with."""

    def __init__(self, velocity):
        self.velocity, self.calls = velocity, []

    def context(self, mel: Tensor) -> Tensor:
        return torch.ones(len(mel), 5, 3)

    def denoise(self, latents: Tensor, timesteps: Tensor, low: Tensor, context: Tensor) -> Tensor:
        assert len(latents) == len(timesteps) == len(low) == len(context)
        self.calls.append((latents, timesteps.tolist(), low, context))
        return self.velocity(latents.double(), shares(timesteps), low, context).float()


# --- the schedule -----------------------------------------------------------------------------------------------------


def test_the_schedule_is_the_squared_cosine_and_ends_in_noise():
    table = schedule().alphas_cumprod
    assert table.shape == (TIMESTEPS,) == (1_000,)
    torch.testing.assert_close(table.double(), shares(torch.arange(1_000)).flatten(), rtol=1e-3, atol=1e-9)
    assert 0.99 < table[0] < 1
    assert table[499] == pytest.approx(math.cos(0.508 / 1.008 * math.pi / 2) ** 2, rel=1e-3)  # as much noise as signal
    assert 0 < table[-1].sqrt() < 1e-4
    assert bool((table.diff() < 0).all())


def test_noise_is_added_and_velocity_defined_by_the_schedule():
    latents, unit = 5 * noise(1), noise(2)
    timesteps = torch.tensor([37, 999])
    noisy, velocity = add_noise(latents, unit, timesteps)
    a = shares(timesteps)
    torch.testing.assert_close(noisy.double(), a.sqrt() * latents + (1 - a).sqrt() * unit, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(velocity.double(), a.sqrt() * unit - (1 - a).sqrt() * latents, rtol=1e-4, atol=1e-4)
    assert (velocity[0] + (1 - a[0]).sqrt() * latents[0]).abs().max() > 0.5  # the tolerance tells the noise's share


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 50, 61, 103, 501, 999])
def test_any_number_of_timesteps_goes_evenly_from_the_last_one_down(steps):
    model = Model(lambda latents, a, low, context: latents)
    sample(model, LOW, MEL, noise(), steps=steps)
    first, second = torch.tensor([call[1] for call in model.calls]).T
    assert torch.equal(first, second)
    assert len(first) == steps
    assert (first - 999 * (1 - torch.arange(steps) / steps)).abs().max() <= 0.5 + 1e-3
    assert bool((first.diff() < 0).all())


# --- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 7, 10, 30, 50, 61, 103, 501, 600, 999])
def test_with_the_true_velocity_sampling_gives_the_latents_back(steps):
    """Also for steps that do not divide 1000, and latents far beyond the unit interval, which nothing clips."""
    latents = 5 * noise(3)
    assert latents.abs().max() > 10

    def true_velocity(noisy: Tensor, a: Tensor, low: Tensor, context: Tensor) -> Tensor:
        unit = (noisy - a.sqrt() * latents) / (1 - a).sqrt()
        return a.sqrt() * unit - (1 - a).sqrt() * latents

    made = sample(Model(true_velocity), LOW, MEL, noise(), steps=steps)
    torch.testing.assert_close(made, latents, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("steps", "tolerance"), [(10, 0.15), (20, 0.05), (50, 0.02), (600, 1e-3)])
def test_the_solver_is_of_second_order(steps, tolerance):
    """The velocity of data that are normal with deviation 3 turns a unit normal into those, as steps become small. One
    of first order (DDIM, by its formula) is much further from it."""
    model = Model(lambda z, a, low, context: (a * (1 - a)).sqrt() * (1 - 9) / (9 * a + 1 - a) * z)
    made = sample(model, LOW, MEL, noise(), steps=steps)
    ratio = (made / noise()).flatten()
    assert ratio.std() < 1e-4
    assert ratio.mean().item() == pytest.approx(3, rel=tolerance)
    a = shares(torch.tensor([call[1][0] for call in model.calls])).flatten()
    (first,) = torch.ones(1, dtype=torch.double)
    for now, then in zip(a, [*a[1:], torch.tensor(1.0)], strict=True):  # z = (√ᾱ·√ᾱ' · 9 + √(1-ᾱ)·√(1-ᾱ')) / var · z
        first = first * (9 * (now * then).sqrt() + ((1 - now) * (1 - then)).sqrt()) / (9 * now + 1 - now)
    assert abs(ratio.mean().item() - 3) < 0.7 * abs(first.item() - 3)


def test_one_step_gives_the_expected_latents_whatever_the_noise():
    expected = 5 * noise(3)
    model = Model(
        lambda z, a, low, context: a.sqrt() * z - (1 - a).sqrt() * expected
    )  # it expects these from any noise
    one, other = (sample(model, LOW, MEL, noise(seed), steps=1) for seed in (1, 2))
    torch.testing.assert_close(one, expected, rtol=0, atol=2e-3)
    torch.testing.assert_close(other, one, rtol=0, atol=2e-3)


def test_sampling_needs_no_gradient_and_leaves_its_inputs_alone():
    denoiser = Denoiser(DENOISER).eval()
    unit, low = noise(), noise(4)
    made = sample(denoiser, low, MEL, unit, steps=2)
    assert not made.requires_grad
    assert torch.equal(unit, noise())
    assert torch.equal(low, noise(4))
