"""Latent diffusion: v-prediction (arXiv 2202.00512) on a cosine schedule (arXiv 2102.09672), and sampling by
DPM-Solver++ (arXiv 2211.01095) with classifier-free guidance (arXiv 2207.12598), all of diffusers."""

import functools
from typing import Any

import torch
from torch import Tensor

from lib.superres.unet import Denoiser

TIMESTEPS = 1000
SCHEDULE = {"num_train_timesteps": TIMESTEPS, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}


@functools.cache
def schedule() -> Any:
    from diffusers import DDIMScheduler  # seconds to import

    return DDIMScheduler(**SCHEDULE)


def add_noise(latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Noisy latents and the velocity to predict, `[B, Z, H, W]` each, at `timesteps [B]`, 0 to 999."""
    return schedule().add_noise(latents, noise, timesteps), schedule().get_velocity(latents, noise, timesteps)


def solver(steps: int) -> Any:
    """Of second order, through `steps` timesteps, 1 to 999, evenly spaced from 999, where only noise is left."""
    from diffusers import DPMSolverMultistepScheduler

    found = DPMSolverMultistepScheduler(**SCHEDULE)
    found.set_timesteps(steps)
    return found


@torch.no_grad()
def sample(
    denoiser: Denoiser, low: Tensor, mel: Tensor, noise: Tensor, *, steps: int, guidance: float = 1.0, **keeps: Tensor
) -> Tensor:
    """Latents of the full band `[B, Z, H, W]`, from the low band's latents, its mel `[B, 1, 256, T]` and unit normal
    noise; `keeps` as in `Denoiser`. Guidance g: velocity v₀ + g·(v − v₀), v₀ unconditional; 1 takes half the time.
    One step gives the mean that the denoiser expects of them, and hardly depends on the noise."""
    low, context = denoiser.conditions(low, mel, **keeps)
    if guidance != 1:
        low = torch.cat([torch.zeros_like(low), low])
        context = torch.cat([denoiser.null_context.expand_as(context), context])
    latents, solved = noise, solver(steps)
    for timestep in solved.timesteps:
        times = timestep.to(noise.device).expand(len(low))
        velocity = denoiser.denoise(latents.repeat(len(low) // len(latents), 1, 1, 1), times, low, context)
        if guidance != 1:
            without, given = velocity.chunk(2)
            velocity = without + guidance * (given - without)
        latents = solved.step(velocity, timestep, latents, return_dict=False)[0]
    return latents
