"""What is trained, part by part: seed 004's sizes for a GPU, and small ones for two cores and three minutes."""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib.superres.data import Library
from lib.superres.encoder import EncoderConfig
from lib.superres.training import (
    DiffusionTraining,
    PartConfig,
    VaeTraining,
    VocoderTraining,
    encode,
    train_diffusion,
    train_vae,
    train_vocoder,
)
from lib.superres.unet import CONTEXTS, DenoiserConfig
from lib.superres.vae import VaeConfig
from lib.superres.vocoder import VocoderConfig
from lib.training.adversary import AdversaryConfig
from lib.training.run import Run


@dataclass(frozen=True)
class Plan:
    """Sizes and training of the autoencoder, of the diffusion model on it, and of a vocoder."""

    vae: VaeConfig = field(default_factory=VaeConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    vocoder: VocoderConfig = field(default_factory=VocoderConfig)
    vae_training: VaeTraining = field(default_factory=VaeTraining)
    training: DiffusionTraining = field(default_factory=DiffusionTraining)
    vocoder_training: VocoderTraining = field(default_factory=VocoderTraining)

    def lasting(self, vae_steps: int, steps: int, vocoder_steps: int, seed: int = 0) -> "Plan":
        """The same plan, for so many steps of the autoencoder, of each diffusion model, and of the vocoder; their
        random seed."""
        return dataclasses.replace(
            self,
            vae_training=_lasting(self.vae_training, vae_steps, seed),
            training=_lasting(self.training, steps, seed),
            vocoder_training=_lasting(self.vocoder_training, vocoder_steps, seed),
        )

    def train(self, folder: str | Path, library: Library, **options: Any) -> dict[str, Run]:
        """The runs `vae`, `diffusion` and `vocoder` of a folder. `options`: as of the three functions."""
        return {
            "vae": train_vae(folder, library, self.vae, self.vae_training, **options),
            "diffusion": train_diffusion(folder, library, self.denoiser, self.training, **options),
            "vocoder": train_vocoder(folder, library, self.vocoder, self.vocoder_training, **options),
        }

    def compare_contexts(
        self, folder: str | Path, library: Library, seeds: int, **options: Any
    ) -> dict[str, tuple[float, ...]]:
        """Diffusion models on the autoencoder in `folder` that differ in what their cross-attention sees, the sequence
        or the one pooled vector of the seed document: context → last validation loss, one for each random seed.

        What is drawn from a random seed, examples and weights among it, is the same for both.
        """
        losses: dict[str, list[float]] = {context: [] for context in CONTEXTS}
        for seed in range(seeds):
            config = dataclasses.replace(self.training, seed=self.training.seed + seed)
            encoded = encode(Run.open(Path(folder) / "vae"), library, config)
            for context in CONTEXTS:
                sizes, name = dataclasses.replace(self.denoiser, context=context), f"{context}-{seed}"
                run = train_diffusion(folder, library, sizes, config, name, encoded=encoded, **options)
                losses[context].append(run.metrics("val")[-1]["loss"])
        return {context: tuple(values) for context, values in losses.items()}


def _lasting(config: PartConfig, steps: int, seed: int) -> PartConfig:
    epochs = math.ceil(steps * config.batch_size * config.accumulate / config.examples)
    return dataclasses.replace(config, epochs=epochs, max_steps=steps, seed=seed)


# what two cores train in minutes: the same parts with a hundredth of the width
SMALL_VAE = VaeConfig(channels=(8, 16, 32, 32), num_res_blocks=1, latent_channels=4, norm_groups=4)
SMALL_DENOISER = DenoiserConfig(
    latent_channels=4,
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
SMALL_VOCODER = VocoderConfig(channels=128, resblock_kernels=(3, 7))
SMALL = {"clip": 1.0, "warmup_steps": 10, "schedule": "cosine", "checkpoint_every": 100, "clip_seconds": 0.64}
SMALL_PLAN = Plan(
    SMALL_VAE,
    SMALL_DENOISER,
    SMALL_VOCODER,
    VaeTraining(**SMALL, examples=1024, val_examples=16, batch_size=2, learning_rate=3e-3, kl_weight=0.05),
    DiffusionTraining(
        **SMALL, examples=512, val_examples=32, batch_size=16, learning_rate=1e-3, ema=0.99, cpu_threads=1
    ),
    VocoderTraining(
        **SMALL | {"clip_seconds": 0.16},
        examples=256,
        val_examples=8,
        batch_size=2,
        learning_rate=1e-3,
        period_channels=4,
        scale_channels=16,
        adversary=AdversaryConfig(discriminator_learning_rate=1e-3),
    ),
)
FULL = {"checkpoint_every": 1000, "num_workers": 8, "precision": "auto"}
FULL_PLAN = Plan(
    vae_training=VaeTraining(**FULL, batch_size=4, warmup_steps=1000),
    training=DiffusionTraining(**FULL, batch_size=16, warmup_steps=5000, ema=0.9999),
    vocoder_training=VocoderTraining(**FULL, batch_size=16),
)
