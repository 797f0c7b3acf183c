"""What is trained, part by part: seed 004's sizes for a GPU, and small ones for two cores and three minutes."""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib.runs import Run
from lib.superres.data import Library
from lib.superres.encoder import EncoderConfig
from lib.superres.training import DiffusionTraining, PartConfig, VaeTraining, train_diffusion, train_vae
from lib.superres.unet import DenoiserConfig
from lib.superres.vae import VaeConfig


@dataclass(frozen=True)
class Plan:
    """Sizes and training of the autoencoder and of the diffusion model on it."""

    vae: VaeConfig = field(default_factory=VaeConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    vae_training: VaeTraining = field(default_factory=VaeTraining)
    training: DiffusionTraining = field(default_factory=DiffusionTraining)

    def lasting(self, vae_steps: int, steps: int) -> "Plan":
        """The same plan, for so many steps of the autoencoder and of each diffusion model."""
        return dataclasses.replace(
            self,
            vae_training=_lasting(self.vae_training, vae_steps),
            training=_lasting(self.training, steps),
        )

    def train(self, folder: str | Path, library: Library, **options: Any) -> dict[str, Run]:
        """The autoencoder, then two denoisers that differ in what their cross-attention sees: 'diffusion' the sequence,
        'diffusion-pooled' the one vector of the seed."""
        runs = {"vae": train_vae(folder, library, self.vae, self.vae_training, **options)}
        for name, context in (("diffusion", "sequence"), ("diffusion-pooled", "pooled")):
            sizes = dataclasses.replace(self.denoiser, context=context)
            runs[name] = train_diffusion(folder, library, sizes, self.training, name, **options)
        return runs


def _lasting(config: PartConfig, steps: int) -> PartConfig:
    epochs = math.ceil(steps * config.batch_size * config.accumulate / config.examples)
    return dataclasses.replace(config, epochs=epochs, max_steps=steps)


# what two cores train in minutes: the same parts with a hundredth of the width
SMALL_VAE = VaeConfig(channels=(8, 16, 32, 32), num_res_blocks=1, latent_channels=8, norm_groups=4)
SMALL_DENOISER = DenoiserConfig(
    latent_channels=8,
    channels=(32, 48, 64),
    attention=(False, False, True),
    num_res_blocks=1,
    head_channels=16,
    transformers=1,
    norm_groups=8,
    encoder=EncoderConfig(
        channels=(8, 16, 32), hidden_dim=64, num_layers=1, num_heads=4, ffn_dim=128, context_dim=32, positions=64
    ),
)
SMALL = {"clip_seconds": 0.64, "clip": 1.0, "warmup_steps": 10, "schedule": "cosine"}
SMALL_PLAN = Plan(
    SMALL_VAE,
    SMALL_DENOISER,
    VaeTraining(**SMALL, examples=1024, val_examples=16, batch_size=4, learning_rate=3e-3, checkpoint_every=100),
    DiffusionTraining(
        **SMALL, examples=256, val_examples=32, batch_size=16, learning_rate=1e-3, ema=0.99, checkpoint_every=100
    ),
)
FULL_PLAN = Plan(
    vae_training=VaeTraining(batch_size=4, warmup_steps=1000, checkpoint_every=1000, num_workers=8, precision="auto"),
    training=DiffusionTraining(
        batch_size=16, warmup_steps=5000, checkpoint_every=1000, ema=0.9999, num_workers=8, precision="auto"
    ),
)
