"""Diffusion in the latents: v-prediction (Salimans and Ho 2022, arXiv 2202.00512) on a cosine schedule (Nichol and
Dhariwal 2021, arXiv 2102.09672), and deterministic sampling (DDIM, Song et al. 2021, arXiv 2010.02502) with
classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598).

The schedule is diffusers'. Its sampler's step does not lead to the next timestep where their number does not divide
1000, so it is written out here.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from lib.superres.unet import Denoiser

TIMESTEPS = 1000


def make_scheduler() -> Any:
    from diffusers import DDIMScheduler  # seconds, which only those pay who use one

    return DDIMScheduler(
        num_train_timesteps=TIMESTEPS,
        beta_schedule="squaredcos_cap_v2",
        timestep_spacing="trailing",  # starts at the last timestep, from noise alone
    )


schedule = functools.cache(make_scheduler)  # for its tables; sampling takes one of its own, whose timesteps it sets


def add_noise(latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Noisy latents and the velocity to be predicted, `[B, Z, H, W]` each, at `timesteps [B]`, 0 to 999."""
    noisy = schedule().add_noise(latents, noise, timesteps)
    return noisy, schedule().get_velocity(latents, noise, timesteps)


def sampled_timesteps(steps: int) -> Tensor:
    """So many timesteps, 1 to 1000, evenly from 999 down: `[steps]`."""
    scheduler = make_scheduler()
    scheduler.set_timesteps(steps)
    return scheduler.timesteps[:steps]  # rounding gives some numbers of steps one more, at -1


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    low: Tensor,
    mel: Tensor,
    noise: Tensor,
    *,
    steps: int = 50,
    guidance: float = 1.0,
    keeps_low: Tensor | None = None,
    keeps_context: Tensor | None = None,
) -> Tensor:
    """Latents of the full band `[B, Z, H, W]`, from those of the low band, its mel `[B, 1, 256, T]` and a unit normal.

    `guidance` moves every step away from what the model predicts without any condition: v = v₀ + g·(v − v₀); 1 leaves
    it alone and takes half the time, 0 is the model without a condition. `keeps_low`, `keeps_context` as in `Denoiser`.
    """
    timesteps = sampled_timesteps(steps)
    context = denoiser.context(mel, keeps_context)
    if keeps_low is not None:
        low = low * keeps_low[:, None, None, None]
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
