"""What is trained, part by part: seed 004's sizes for a GPU, and small ones for two cores and three minutes."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib.runs import Run
from lib.superres.data import Library
from lib.superres.encoder import EncoderConfig
from lib.superres.training import DiffusionTraining, VaeTraining, train_diffusion, train_vae
from lib.superres.unet import DenoiserConfig
from lib.superres.vae import VaeConfig


@dataclass(frozen=True)
class Plan:
    """Sizes and training of the autoencoder and of the diffusion model on it."""

    vae: VaeConfig = field(default_factory=VaeConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    vae_training: VaeTraining = field(default_factory=VaeTraining)
    training: DiffusionTraining = field(default_factory=DiffusionTraining)

    def train(self, folder: str | Path, library: Library, **options: Any) -> dict[str, Run]:
        """The autoencoder, then two denoisers that differ in what their cross-attention sees: 'diffusion' the sequence,
        'diffusion-pooled' the one vector of the seed."""
        runs = {"vae": train_vae(folder, library, self.vae, self.vae_training, **options)}
        for name, context in (("diffusion", "sequence"), ("diffusion-pooled", "pooled")):
            sizes = dataclasses.replace(self.denoiser, context=context)
            runs[name] = train_diffusion(folder, library, sizes, self.training, name, **options)
        return runs


SMALL_VAE = VaeConfig(channels=(16, 32, 32, 32), num_res_blocks=1, latent_channels=8, norm_groups=8)
SMALL_DENOISER = DenoiserConfig(
    latent_channels=8,
    channels=(32, 48, 64),
    attention=(False, False, True),
    num_res_blocks=1,
    head_channels=16,
    transformers=1,
    norm_groups=8,
    encoder=EncoderConfig(
        channels=(8, 16, 32), hidden_dim=64, num_layers=1, num_heads=4, ffn_dim=128, context_dim=32, positions=128
    ),
)
SMALL = {"clip_seconds": 0.64, "examples": 512, "val_examples": 32, "warmup_steps": 10, "schedule": "cosine"}

PLANS = {
    "smoke": Plan(
        SMALL_VAE,
        SMALL_DENOISER,
        VaeTraining(**SMALL, max_steps=4, batch_size=4, learning_rate=2e-3, checkpoint_every=4),
        DiffusionTraining(**SMALL, max_steps=4, batch_size=4, learning_rate=1e-3, ema=0.9, checkpoint_every=4),
    ),
    "demo": Plan(
        SMALL_VAE,
        SMALL_DENOISER,
        VaeTraining(**SMALL, max_steps=150, batch_size=8, learning_rate=2e-3, clip=1.0, checkpoint_every=150),
        DiffusionTraining(
            **SMALL, max_steps=200, batch_size=16, learning_rate=1e-3, clip=1.0, ema=0.99, checkpoint_every=100
        ),
    ),
    "full": Plan(
        vae_training=VaeTraining(batch_size=4, learning_rate=1e-4, max_steps=200_000, precision="auto"),
        training=DiffusionTraining(
            batch_size=16, learning_rate=1e-4, warmup_steps=5000, max_steps=500_000, ema=0.9999, precision="auto"
        ),
    ),
}
