"""Training of the three parts, each a run of its own in one folder: `vae`, then `diffusion` on its latents; `vocoder`.

A run's config.json holds the part's sizes and how it was trained; `load_part` builds it again.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset

from lib.superres.degradation import Examples, Library
from lib.superres.diffusion import TIMESTEPS, add_noise
from lib.superres.encoder import EncoderConfig
from lib.superres.mel import HOP, SAMPLE_RATE, log_mel
from lib.superres.unet import CONTEXTS, Denoiser, DenoiserConfig
from lib.superres.vae import MelVae, VaeConfig
from lib.superres.vocoder import (
    Discriminators,
    Vocoder,
    VocoderConfig,
    discriminator_loss,
    feature_distance,
    generator_loss,
    judge_both,
)
from lib.training.adversary import Adversary
from lib.training.batches import Batch
from lib.training.config import LENGTH, WITHOUT_EFFECT, AdversaryConfig, LoopConfig, resolved_precision
from lib.training.distributed import open_accelerator
from lib.training.learner import Learner, StepInfo
from lib.training.run import Run
from lib.training.trainer import Callback, Trainer
from lib.util.configs import check, check_counts, check_numbers, from_fields
from lib.util.errors import UserError
from lib.util.provenance import code_fingerprint

PARTS = {"vae": (MelVae, VaeConfig), "diffusion": (Denoiser, DenoiserConfig), "vocoder": (Vocoder, VocoderConfig)}
MEASURED = 64  # examples from which the mel's mean and the latents' scale are taken
CACHE = 4 * 2**30  # bytes of encoded examples that are kept


@dataclass(frozen=True)
class PartConfig(LoopConfig):
    """How to train a part: the loop's settings, and which examples an epoch has."""

    clip_seconds: float = 10.24
    examples: int = 20_000
    val_examples: int = 64

    def __post_init__(self):
        super().__post_init__()
        check_counts(self, "examples", "val_examples")
        frames = self.clip_seconds * SAMPLE_RATE / HOP
        fits = frames >= 16 and abs(frames / 16 - round(frames / 16)) < 1e-6
        check(fits, "clip_seconds", self.clip_seconds, "a multiple of 0.16, a whole number of latent frames")

    @property
    def clip_length(self) -> int:
        """Samples."""
        return round(self.clip_seconds * SAMPLE_RATE)


@dataclass(frozen=True)
class VaeTraining(PartConfig):
    kl_weight: float = 1e-4  # small: the latents need a common size, not a normal distribution

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, "kl_weight")


@dataclass(frozen=True)
class DiffusionTraining(PartConfig):
    condition_dropout: float = 0.1  # share of clips that learn without the context, and as many without any condition

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, "condition_dropout", most=0.5)


@dataclass(frozen=True)
class VocoderTraining(PartConfig):
    clip_seconds: float = 0.32
    mel_weight: float = 45.0  # of HiFi-GAN's paper, as is the next
    feature_weight: float = 2.0
    period_channels: int = 32
    scale_channels: int = 128
    adversary: AdversaryConfig = field(default_factory=lambda: AdversaryConfig(discriminator_learning_rate=1e-4))

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.adversary, dict):
            object.__setattr__(self, "adversary", AdversaryConfig(**self.adversary))
        check_numbers(self, "mel_weight", "feature_weight")
        check_counts(self, "period_channels", "scale_channels")


# --- what each part learns --------------------------------------------------------------------------------------------


def all_parameters(config: LoopConfig, model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": list(model.parameters()), "full_lr": config.learning_rate}]


class VaeLearner(Learner):
    """To give back mel pictures, of whole and of degraded clips alike: mean absolute error and divergence."""

    batch_names = ("clips", "degraded clips")

    def __init__(self, config: VaeTraining, sizes: VaeConfig, accelerator: Accelerator):
        model = MelVae(sizes)
        super().__init__(config, model, all_parameters(config, model), accelerator)

    def parts(self, model: MelVae) -> dict[str, nn.Module]:
        return {"encoder": model.autoencoder.encoder, "decoder": model.autoencoder.decoder}

    def loss(self, model: nn.Module, batch: Batch, moment: StepInfo | None = None) -> tuple[Tensor, dict, None]:
        mel = log_mel(torch.cat(batch))
        with self.autocast():
            # in validation the posterior's mean: no random number, and what the diffusion model will be given
            made, divergence = model(mel, sampled=moment is not None)
        error, divergence = (made.float() - mel).abs().mean(), divergence.float().mean()
        return error + self.config.kl_weight * divergence, {"loss/mel": error, "loss/kl": divergence}, None


class DiffusionLearner(Learner):
    """To predict the velocity of noisy latents. A batch is high and low latents `[B, 2·Z, H, W]`, and the low mel."""

    batch_names = ("latents", "degraded mel")

    def __init__(self, config: DiffusionTraining, sizes: DenoiserConfig, accelerator: Accelerator):
        model = Denoiser(sizes)
        super().__init__(config, model, all_parameters(config, model), accelerator)

    def loss(self, model: nn.Module, batch: Batch, moment: StepInfo | None = None) -> tuple[Tensor, dict, None]:
        high, low = batch[0].chunk(2, dim=1)
        clips, device = len(high), high.device
        # in validation the same noise for the same batch, and timesteps all over the schedule
        generator = None if moment else torch.Generator().manual_seed(0)
        noise = torch.randn(high.shape, generator=generator).to(device)
        keeps = (torch.rand(2, clips, generator=generator) >= self.config.condition_dropout).to(device)
        if moment:
            timesteps = torch.randint(TIMESTEPS, (clips,)).to(device)
        else:
            timesteps = (torch.arange(clips, device=device) * 2 + 1) * TIMESTEPS // (2 * clips)
            keeps = torch.ones_like(keeps)
        noisy, velocity = add_noise(high, noise, timesteps)
        with self.autocast():
            found = model(noisy, timesteps, low, batch[1], keeps_low=keeps[0], keeps_context=keeps.all(dim=0))
        error = (found.float() - velocity).square().mean()
        return error, {"loss/velocity": error}, None


class VocoderAdversary(Adversary):
    betas = (0.8, 0.99)  # HiFi-GAN's

    def loss(self, made: Tensor, real: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = discriminator_loss(*judge_both(self.model, real, made))
        return loss, {"loss": loss}


class VocoderLearner(Learner):
    """To turn mel pictures of whole clips into clips: by mel distance, discriminators, and their features."""

    batch_names = ("clips", "degraded clips")

    def __init__(self, config: VocoderTraining, sizes: VocoderConfig, accelerator: Accelerator):
        model = Vocoder(sizes, weight_norm=True)
        judges = Discriminators(config.period_channels, config.scale_channels)
        adversary = VocoderAdversary(config.adversary, judges, config.max_norm, accelerator)
        super().__init__(config, model, all_parameters(config, model), accelerator, adversary)

    def loss(
        self, model: nn.Module, batch: Batch, moment: StepInfo | None = None
    ) -> tuple[Tensor, dict[str, Tensor], tuple[Tensor, Tensor]]:
        real = batch[0]
        mel = log_mel(real)
        with self.autocast():
            made = model(mel)
        made = made.float()
        terms = {"loss/mel": (log_mel(made) - mel).abs().mean()}
        loss = self.config.mel_weight * terms["loss/mel"]
        if moment and (critic := self.adversary.critic(moment.step)):
            of_real, of_made = judge_both(critic, real, made)
            terms["loss/adversarial"] = generator_loss(of_made)
            terms["loss/features"] = feature_distance(of_real, of_made)
            loss = loss + terms["loss/adversarial"] + self.config.feature_weight * terms["loss/features"]
        return loss, terms, (made, real)


class EncodedExamples(Dataset):
    """`Examples` as the diffusion model learns from them: `[i]` is (latents of the clip and of the degraded one
    `[2·Z, H, W]`, scaled; the degraded one's log mel `[1, 256, T]`).

    The encoder costs more than a step of the denoiser, so what it made is kept, as long as it fits into the cache.
    """

    def __init__(self, examples: Examples, vae: MelVae, latent_scale: float, device: torch.device):
        self.examples, self.vae, self.latent_scale, self.device = examples, vae.to(device), latent_scale, device
        self.clip_length, self.sample_rate = examples.clip_length, examples.sample_rate
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.room = CACHE

    def __len__(self) -> int:
        return len(self.examples)

    @torch.no_grad()
    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        if i in self.kept:
            return self.kept[i]
        mel = log_mel(torch.stack(self.examples[i]).to(self.device))
        latents = (self.latent_scale * self.vae.encode(mel)).flatten(0, 1).cpu()
        item = latents, mel[1].cpu()
        self.room -= sum(tensor.nbytes for tensor in item)
        if self.room >= 0:
            self.kept[i] = item
        return item


# --- runs -------------------------------------------------------------------------------------------------------------


def train_vae(folder: str | Path, library: Library, sizes: VaeConfig, config: VaeTraining, **options: Any) -> Run:
    """Train the autoencoder into `folder/vae`. Mean and deviation of the log mel are measured first.

    `options` of all three functions: `resume`, `progress` and `callbacks` as in `lib.training.trainer.train`.
    """
    mean, std = measured_mel(examples_of(library, config)["train"])
    sizes = dataclasses.replace(sizes, mel_mean=mean, mel_std=std)
    return train_part(folder, "vae", library, sizes, config, VaeLearner, **options)


def train_diffusion(
    folder: str | Path,
    library: Library,
    sizes: DenoiserConfig,
    config: DiffusionTraining,
    name: str = "diffusion",
    *,
    encoded: dict[str, EncodedExamples] | None = None,
    **options: Any,
) -> Run:
    """Train the denoiser and its encoder into `folder/<name>`, on latents of `folder/vae`, whose scale is measured.

    `encoded`: what `encode` gave for this folder, library and config, where another training has used it before.
    """
    vae_run = Run.open(Path(folder) / "vae")
    encoded = encoded or encode(vae_run, library, config)
    vae = encoded["train"].vae
    if vae.config.latent_channels != sizes.latent_channels:
        raise UserError(
            f"latent_channels={sizes.latent_channels} does not fit {vae_run.path}, whose latents have "
            f"{vae.config.latent_channels}; use that number"
        )
    facts = {"latent_scale": encoded["train"].latent_scale, "vae_sha256": vae_run.weights_sha256()}

    def prepare(examples: Examples, accelerator: Accelerator) -> EncodedExamples:
        return encoded[examples.split]

    options |= {"facts": facts, "prepare": prepare, "code": vae_run.trained_by}
    return train_part(folder, name, library, sizes, config, DiffusionLearner, **options)


def encode(vae_run: Run, library: Library, config: PartConfig) -> dict[str, EncodedExamples]:
    """The examples of a diffusion training as an autoencoder's latents, of which each is made when it is asked for."""
    vae = load_part(vae_run, "vae").requires_grad_(False)
    examples, device = examples_of(library, config), open_accelerator().device
    scale = measured_scale(examples["train"], vae)
    return {split: EncodedExamples(own, vae, scale, device) for split, own in examples.items()}


def train_vocoder(
    folder: str | Path, library: Library, sizes: VocoderConfig, config: VocoderTraining, **options: Any
) -> Run:
    """Train HiFi-GAN against its discriminators into `folder/vocoder`."""
    return train_part(folder, "vocoder", library, sizes, config, VocoderLearner, **options)


def train_part(
    folder: str | Path,
    name: str,
    library: Library,
    sizes: Any,
    config: PartConfig,
    learner: type[Learner],
    *,
    facts: dict[str, Any] | None = None,
    code: Sequence[str] = (),
    prepare: Callable[[Examples, Accelerator], Dataset] = lambda examples, accelerator: examples,
    resume: bool = False,
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
) -> Run:
    """`code`: fingerprints of what trained the part that this one rests on."""
    config = dataclasses.replace(config, precision=resolved_precision(config.precision))
    accelerator = open_accelerator()
    examples = examples_of(library, config)
    config.check_sizes({split: len(found) for split, found in examples.items()}, accelerator.num_processes)
    wanted = {"sizes": dataclasses.asdict(sizes), "train": dataclasses.asdict(config), "data": library.fingerprint}
    with accelerator.main_process_first():  # makes the run that the others open
        run = Run.start(
            Path(folder) / name,
            wanted | (facts or {}),
            resume=resume or not accelerator.is_main_process,
            free={"train": LENGTH + WITHOUT_EFFECT},
            code=dict.fromkeys([*code, code_fingerprint("lib.superres.training")[:16]]),
            measured=("sizes.mel_mean", "sizes.mel_std", "latent_scale", "vae_sha256"),
        )
    config = from_fields(type(config), run.config["train"])
    data = {split: prepare(found, accelerator) for split, found in examples.items()}
    Trainer(run, config, data, lambda device: learner(config, sizes, device), callbacks).run_to_end(progress=progress)
    accelerator.wait_for_everyone()
    return run


def load_part(run: Run, part: str, which: str = "best") -> nn.Module:
    """A trained part in eval mode, on the CPU; a vocoder's weights as plain ones. `UserError` where the run is of
    something else."""
    model_type, config_type = PARTS[part]
    try:
        sizes = from_fields(config_type, {key: as_tuple(value) for key, value in run.config["sizes"].items()})
        model = Vocoder(sizes, weight_norm=True) if part == "vocoder" else model_type(sizes)
    except (KeyError, AttributeError, TypeError, ValueError, RuntimeError, UserError):
        raise UserError(
            f"{run.path / 'config.json'}: describes no {part} of a super-resolver; name its folder"
        ) from None
    run.load_weights(model, which)
    if part == "vocoder":
        model.fold_weight_norm()
    return model


def as_tuple(value: Any) -> Any:
    """JSON has lists where configs have tuples."""
    if isinstance(value, dict):
        return {key: as_tuple(item) for key, item in value.items()}
    return tuple(value) if isinstance(value, list) else value


def examples_of(library: Library, config: PartConfig) -> dict[str, Examples]:
    counts = {"train": config.examples, "val": config.val_examples}
    return {split: Examples(library, split, count, config.clip_length, config.seed) for split, count in counts.items()}


def measured_mel(examples: Examples) -> tuple[float, float]:
    """Mean and standard deviation of the log mel, over the first examples, degraded ones with the others."""
    mels = torch.stack([log_mel(torch.stack(examples[i])) for i in range(min(MEASURED, len(examples)))])
    return mels.mean().item(), mels.std().item()


@torch.no_grad()
def measured_scale(examples: Examples, vae: MelVae) -> float:
    """What latents are multiplied with to have a standard deviation of 1, from the first examples' whole clips."""
    latents = [vae.encode(log_mel(examples[i][0][None])) for i in range(min(MEASURED, len(examples)))]
    return 1 / torch.cat(latents).std().item()


# --- plans ------------------------------------------------------------------------------------------------------------


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
