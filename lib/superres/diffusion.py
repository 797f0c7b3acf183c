"""Latent diffusion: v-prediction (arXiv 2202.00512) on a cosine schedule (arXiv 2102.09672), and DDIM sampling (arXiv
2010.02502) with classifier-free guidance (arXiv 2207.12598). The schedule is diffusers'; its sampler misses the next
timestep if the number of steps does not divide 1000, so the step is written out here."""

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lib.superres.unet import Denoiser

TIMESTEPS = 1000


@functools.cache
def schedule() -> Any:
    from diffusers import DDIMScheduler  # seconds to import

    return DDIMScheduler(num_train_timesteps=TIMESTEPS, beta_schedule="squaredcos_cap_v2")


def add_noise(latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Noisy latents and the velocity to predict, `[B, Z, H, W]` each, at `timesteps [B]`, 0 to 999."""
    return schedule().add_noise(latents, noise, timesteps), schedule().get_velocity(latents, noise, timesteps)


def sampled_timesteps(steps: int) -> Tensor:
    """1 to 1000 evenly spaced timesteps, descending from 999, where only noise is left: `[steps]`."""
    even = np.arange(TIMESTEPS, 0, -TIMESTEPS / steps).round()[:steps]  # some steps end in one value too many
    return torch.from_numpy(even).long() - 1


@torch.no_grad()
def sample(
    denoiser: Denoiser, low: Tensor, mel: Tensor, noise: Tensor, *, steps: int, guidance: float = 1.0, **keeps: Tensor
) -> Tensor:
    """Latents of the full band `[B, Z, H, W]`, from the low band's latents, its mel `[B, 1, 256, T]` and unit normal
    noise; `keeps` as in `Denoiser`. Guidance g: velocity v₀ + g·(v − v₀), v₀ unconditional; 1 takes half the time."""
    timesteps = sampled_timesteps(steps)
    low, context = denoiser.conditions(low, mel, **keeps)
    if guidance != 1:
        low = torch.cat([torch.zeros_like(low), low])
        context = torch.cat([denoiser.null_context.expand_as(context), context])
    latents, shares = noise, schedule().alphas_cumprod[timesteps].tolist()
    for timestep, now, then in zip(timesteps, shares, [*shares[1:], 1.0], strict=True):
        times = timestep.to(noise.device).expand(len(low))
        velocity = denoiser.denoise(latents.repeat(len(low) // len(latents), 1, 1, 1), times, low, context)
        if guidance != 1:
            without, given = velocity.chunk(2)
            velocity = without + guidance * (given - without)
        clean = now**0.5 * latents - (1 - now) ** 0.5 * velocity
        unit = now**0.5 * velocity + (1 - now) ** 0.5 * latents
        latents = then**0.5 * clean + (1 - then) ** 0.5 * unit
    return latents
