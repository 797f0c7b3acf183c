"""Latent diffusion: v-prediction (arXiv 2202.00512) on a cosine schedule (arXiv 2102.09672), and sampling by
DPM-Solver++ (arXiv 2211.01095), all of diffusers."""

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


@torch.no_grad()
def sample(denoiser: Denoiser, low: Tensor, mel: Tensor, noise: Tensor, *, steps: int) -> Tensor:
    """Latents `[B, Z, H, W]`, given the low band's latents, its mel `[B, 1, 256, T]` and unit normal noise. One step
    gives the mean that the denoiser expects, whatever the noise."""
    from diffusers import DPMSolverMultistepScheduler

    solver, context, latents = DPMSolverMultistepScheduler(**SCHEDULE), denoiser.context(mel), noise
    solver.set_timesteps(steps)  # 1 to 999, evenly spaced from 999, where only noise is left
    for timestep in solver.timesteps:
        velocity = denoiser.denoise(latents, timestep.to(noise.device).expand(len(low)), low, context)
        latents = solver.step(velocity, timestep, latents, return_dict=False)[0]
    return latents
