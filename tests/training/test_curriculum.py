"""Noise that grows with the epochs: its share by hand, its level by statistics."""

import math

import pytest
import torch

from lib.model.cascade import rms
from lib.training.curriculum import CurriculumConfig, mix_noise, noise_share
from lib.util.errors import UserError


@pytest.mark.parametrize(
    ("epoch", "rate", "ceiling", "start", "wanted"),
    [
        (0, 0.1, 0.3, 0, 0.0),
        (1, 0.1, 0.3, 0, 0.1),
        (2.5, 0.1, 0.3, 0, 0.25),
        (3, 0.1, 0.3, 0, 0.3),
        (50, 0.1, 0.3, 0, 0.3),
        (50, 0.1, 1.0, 0, 1.0),
        (4, 0.1, 0.3, 5, 0.0),  # never negative
        (5, 0.1, 0.3, 5, 0.0),
        (7, 0.02, 0.3, 5, 0.04),
        (100, 0.0, 0.3, 0, 0.0),
        (100, 0.1, 0.0, 0, 0.0),
    ],
)
def test_the_share_grows_from_its_start_to_its_ceiling(epoch, rate, ceiling, start, wanted):
    assert noise_share(epoch, CurriculumConfig(rate, ceiling, start)) == pytest.approx(wanted)


def test_by_default_there_is_no_noise_and_no_shuffling():
    config = CurriculumConfig()
    assert noise_share(1000, config) == 0
    assert config.target_shuffling == 0


@pytest.fixture
def latents() -> torch.Tensor:
    """`[4, 128, 300]` of levels from 0.5 to 20: 38,400 values a clip, whose RMS is known to 0.4 %."""
    clips = torch.randn(4, 128, 300, generator=torch.Generator().manual_seed(0))
    return clips * torch.tensor([0.5, 2.0, 6.0, 20.0])[:, None, None]


@pytest.mark.parametrize("share", [0.1, 0.3, 0.7, 1.0])
def test_every_clip_keeps_its_level(latents, share):
    torch.manual_seed(1)
    mixed = mix_noise(latents, share)
    torch.testing.assert_close(rms(mixed), rms(latents), rtol=0.015, atol=0)
    kept = (mixed * latents).mean(dim=(1, 2)) / latents.square().mean(dim=(1, 2))
    torch.testing.assert_close(kept, torch.full((4,), math.sqrt(1 - share**2)), rtol=0, atol=0.02)
    noise = mixed - math.sqrt(1 - share**2) * latents
    torch.testing.assert_close(rms(noise), share * rms(latents), rtol=0.015, atol=0)


def test_the_noise_is_normal_and_of_each_place(latents):
    torch.manual_seed(1)
    noise = (mix_noise(latents, 1.0) / rms(latents)[:, None, None]).double()
    assert noise.mean().item() == pytest.approx(0, abs=0.01)
    assert noise.pow(4).mean().item() == pytest.approx(3, abs=0.1)
    neighbours = (noise[..., 1:] * noise[..., :-1]).mean().item()
    clips = (noise[0] * noise[1]).mean().item()
    assert abs(neighbours) < 0.01
    assert abs(clips) < 0.02


def test_a_share_of_0_is_the_same_object_and_draws_nothing(latents):
    state = torch.get_rng_state()
    assert mix_noise(latents, 0.0) is latents
    assert torch.equal(torch.get_rng_state(), state)
    mix_noise(latents, 0.1)
    assert not torch.equal(torch.get_rng_state(), state)


def test_the_latents_themselves_are_left_alone(latents):
    before = latents.clone()
    mix_noise(latents, 0.5)
    assert torch.equal(latents, before)


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("noise_rate", -0.1, "0 or more"),
        ("noise_rate", math.nan, "0 or more"),
        ("noise_ceiling", 1.1, "at most 1"),
        ("noise_ceiling", -0.1, "0 or more"),
        ("noise_start", -1, "a whole number, 0 or more"),
        ("noise_start", 1.5, "a whole number, 0 or more"),
        ("target_shuffling", 1.5, "at most 1"),
        ("target_shuffling", math.inf, "at most 1"),
    ],
)
def test_refusals_name_the_field(field, value, wanted):
    with pytest.raises(UserError, match=f"^{field}=.* is not allowed; use .*{wanted}"):
        CurriculumConfig(**{field: value})
