"""Training of the parts, each a run of its own in one folder: `vae`, `diffusion` on its latents, and `hifigan`. A plan
holds sizes and training of all parts: seed 004's for a GPU, a small one for two cores and three minutes."""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Annotated, Any

import torch
from accelerate import Accelerator
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lib.superres import vocoder as hifigan
from lib.superres.degradation import Examples, Library
from lib.superres.diffusion import TIMESTEPS, add_noise
from lib.superres.mel import SAMPLE_RATE, log_mel
from lib.superres.unet import Denoiser, DenoiserConfig
from lib.superres.vae import MelVae, VaeConfig
from lib.training.batches import Batch, Pairs
from lib.training.config import AdversaryConfig, LoopConfig, resolved_precision
from lib.training.learner import Adversary, Learner, Losses, StepInfo
from lib.training.run import Run
from lib.training.trainer import Trainer, open_accelerator
from lib.util.configs import Count, NonNegative, check, checked_dataclass, from_fields, read_entries
from lib.util.errors import UserError
from lib.util.provenance import code_fingerprint

MEASURED = 64  # examples from which the mel's mean and the latents' scale are computed
FROM_DATA = ("sizes.mel_mean", "sizes.mel_std", "latent_scale", "vae_sha256")  # fields of a run's config
CACHE = 4 * 2**30  # bytes of encoded examples to keep in memory
CONTEXT_DROPOUT = 0.1  # share of clips trained without the context
MEL_WEIGHT, FEATURE_WEIGHT = 45.0, 2.0  # of HiFi-GAN's losses, as in its paper
Seconds = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False, multiple_of=0.16)]  # whole latent frames


@checked_dataclass
class PartConfig(LoopConfig):
    """How to train a part: the loop's settings, and the examples of an epoch."""

    clip_seconds: Seconds = 10.24
    examples: Count = 20_000
    val_examples: Count = 64

    @property
    def clip_length(self) -> int:
        return round(self.clip_seconds * SAMPLE_RATE)  # samples


@checked_dataclass
class VaeTraining(PartConfig):
    kl_weight: NonNegative = 1e-4  # small: the latents need a common scale, not a normal distribution


@checked_dataclass
class VocoderTraining(PartConfig):
    clip_seconds: Seconds = 0.32
    period_channels: Count = 32  # width of the period discriminators
    scale_channels: Count = 128  # and of the scale discriminators


class VaeLearner(Learner):
    """Reconstruction of the mel spectrograms of clips and degraded clips: mean absolute error and KL divergence."""

    batch_names = ("clips", "degraded clips")

    def parts(self, model: MelVae) -> dict[str, nn.Module]:
        return {"encoder": model.autoencoder.encoder, "decoder": model.autoencoder.decoder}

    def loss(self, model: nn.Module, batch: Batch, info: StepInfo | None = None) -> Losses:
        mel = log_mel(torch.cat(batch))
        with self.autocast():
            # validation decodes the posterior's mean: it is deterministic, and what the diffusion model works on
            decoded, divergence = model(mel, sampled=info is not None)
        error, divergence = (decoded.float() - mel).abs().mean(), divergence.float().mean()
        return error + self.config.kl_weight * divergence, {"loss/mel": error, "loss/kl": divergence}, None


class DiffusionLearner(Learner):
    """Velocity of noisy latents. A batch is high and low latents `[B, 2·Z, H, W]`, and the low mel."""

    batch_names = ("latents", "degraded mel")

    def loss(self, model: nn.Module, batch: Batch, info: StepInfo | None = None) -> Losses:
        high, low = batch[0].chunk(2, dim=1)
        clips, device = len(high), high.device
        # validation uses the same noise for the same batch, and timesteps spread over the schedule
        generator = None if info else torch.Generator().manual_seed(0)
        noise = torch.randn(high.shape, generator=generator).to(device)
        keeps = (torch.rand(clips, generator=generator) >= CONTEXT_DROPOUT).to(device)
        if info:
            timesteps = torch.randint(TIMESTEPS, (clips,)).to(device)
        else:
            timesteps = (torch.arange(clips, device=device) * 2 + 1) * TIMESTEPS // (2 * clips)
            keeps = torch.ones_like(keeps)
        noisy, velocity = add_noise(high, noise, timesteps)
        with self.autocast():
            found = model(noisy, timesteps, low, batch[1], keeps_context=keeps)
        error = (found.float() - velocity).square().mean()
        return error, {"loss/velocity": error}, None


class VocoderAdversary(Adversary):
    betas = (0.8, 0.99)  # HiFi-GAN's

    def loss(self, fake: Tensor, real: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = hifigan.discriminator_loss(*hifigan.outputs_of_both(self.model, real, fake))
        return loss, {"loss": loss}


class VocoderLearner(Learner):
    """Clips from mel spectrograms: mel distance, adversarial loss, and feature matching."""

    batch_names = ("clips", "degraded clips")

    def __init__(self, config: VocoderTraining, model: hifigan.Vocoder, accelerator: Accelerator):
        super().__init__(config, model, accelerator)
        discriminators = hifigan.Discriminators(config.period_channels, config.scale_channels)
        adversary = AdversaryConfig(discriminator_learning_rate=config.learning_rate)
        self.adversary = VocoderAdversary(adversary, discriminators, config.max_norm, accelerator)

    def loss(self, model: nn.Module, batch: Batch, info: StepInfo | None = None) -> Losses:
        real, mel = batch[0], log_mel(batch[0])
        with self.autocast():
            fake = model(mel).float()
        terms = {"loss/mel": (log_mel(fake) - mel).abs().mean()}
        loss = MEL_WEIGHT * terms["loss/mel"]
        if info and (critic := self.adversary.critic(info.step)):
            of_real, of_fake = hifigan.outputs_of_both(critic, real, fake)
            terms["loss/adversarial"], terms["loss/features"] = hifigan.generator_losses(of_real, of_fake)
            loss = loss + terms["loss/adversarial"] + FEATURE_WEIGHT * terms["loss/features"]
        return loss, terms, (fake, real)


PARTS = {  # learner, model and sizes of each
    "vae": (VaeLearner, MelVae, VaeConfig),
    "diffusion": (DiffusionLearner, Denoiser, DenoiserConfig),
    "hifigan": (VocoderLearner, functools.partial(hifigan.Vocoder, weight_norm=True), hifigan.VocoderConfig),
}


class EncodedExamples:
    """`Examples` for the diffusion model: `[i]` is (scaled latents of the clip and of the degraded clip `[2·Z, H, W]`,
    log mel of the degraded clip `[1, 256, T]`), cached up to `CACHE`, as encoding costs more than a training step."""

    def __init__(self, examples: Examples, vae: MelVae, latent_scale: float, device: torch.device):
        self.examples, self.vae, self.latent_scale, self.device = examples, vae.to(device), latent_scale, device
        self.clip_length, self.sample_rate = examples.clip_length, examples.sample_rate
        self.clip_names = examples.clip_names
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.bytes_left = CACHE

    def __len__(self) -> int:
        return len(self.examples)

    @torch.no_grad()
    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        if i in self.kept:
            return self.kept[i]
        mel = log_mel(torch.stack(self.examples[i]).to(self.device))
        item = (self.latent_scale * self.vae.encode(mel)).flatten(0, 1).cpu(), mel[1].cpu()
        self.bytes_left -= sum(tensor.nbytes for tensor in item)
        if self.bytes_left >= 0:
            self.kept[i] = item
        return item


def train_part(
    folder: str | Path,
    part: str,
    library: Library,
    sizes: Any,
    config: PartConfig,
    *,
    name: str | None = None,
    data: dict[str, Pairs] | None = None,
    resume: bool = False,
) -> Run:
    """Train a part, a key of `PARTS`, into `folder/<name or part>`; `resume` as in `lib.training.fusion_learner.train`.
    The autoencoder's sizes get the log mel's mean and deviation. The denoiser learns `data`, or `encode`'s latents."""
    accelerator = open_accelerator()
    facts, code = {}, [code_fingerprint("lib.superres.training")[:16]]
    if part == "vae":
        examples = examples_of(library, config)["train"]
        mels = torch.stack([log_mel(torch.stack(examples[i])) for i in range(min(MEASURED, len(examples)))])
        sizes = dataclasses.replace(sizes, mel_mean=mels.mean().item(), mel_std=mels.std().item())
    elif part == "diffusion":
        vae_run = Run.open(Path(folder) / "vae")
        data = data or encode(vae_run, library, config)
        if (channels := data["train"].vae.config.latent_channels) != sizes.latent_channels:
            fault = f"does not fit {vae_run.path}, whose latents have {channels}; use that number"
            raise UserError(f"latent_channels={sizes.latent_channels} {fault}")
        facts = {"latent_scale": data["train"].latent_scale, "vae_sha256": vae_run.weights_sha256()}
        code = list(dict.fromkeys([*vae_run.trained_by, *code]))
    data = data or examples_of(library, config)
    config = dataclasses.replace(config, precision=resolved_precision(config.precision))
    config.check_sizes({split: len(found) for split, found in data.items()}, accelerator.num_processes)
    wanted = {"sizes": dataclasses.asdict(sizes), "train": dataclasses.asdict(config), "data": library.fingerprint}
    path, settings = Path(folder) / (name or part), wanted | facts
    with Run.started(path, settings, accelerator, resume=resume, code=code, measured=FROM_DATA) as run:
        config, (learner, model, _) = from_fields(type(config), run.config["train"]), PARTS[part]
        Trainer(run, config, data, lambda launcher: learner(config, model(sizes), launcher)).run_to_end()
    return run


def load_part(run: Run, part: str, which: str = "best") -> nn.Module:
    """A trained part in eval mode on the CPU, without weight norm; `UserError` for a run of another part."""
    _, model_type, sizes_type = PARTS[part]
    try:
        model = model_type(from_fields(sizes_type, run.config["sizes"]))
    except (KeyError, AttributeError, TypeError, ValueError, RuntimeError):
        fault = f"describes no {part} of a super-resolver; name its folder"
        raise UserError(f"{run.path / 'config.json'}: {fault}") from None
    run.load_weights(model, which)
    for layer in model.modules():
        if parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight")
    return model


def examples_of(library: Library, config: PartConfig) -> dict[str, Examples]:
    counts = {"train": config.examples, "val": config.val_examples}
    return {split: Examples(library, split, count, config.clip_length, config.seed) for split, count in counts.items()}


def encode(vae_run: Run, library: Library, config: PartConfig) -> dict[str, EncodedExamples]:
    """The examples as an autoencoder's latents, encoded on first use, scaled to a standard deviation of 1."""
    vae = load_part(vae_run, "vae").requires_grad_(False)
    examples, device = examples_of(library, config), open_accelerator().device
    first = (examples["train"][i][0] for i in range(min(MEASURED, config.examples)))
    scale = 1 / torch.cat([vae.encode(log_mel(clip[None])) for clip in first]).std().item()
    return {split: EncodedExamples(own, vae, scale, device) for split, own in examples.items()}


@checked_dataclass
class Plan:
    """Sizes and training of the parts."""

    vae: VaeConfig = VaeConfig()
    denoiser: DenoiserConfig = DenoiserConfig()
    vocoder: hifigan.VocoderConfig = hifigan.VocoderConfig()
    vae_training: VaeTraining = VaeTraining()
    training: PartConfig = PartConfig()
    vocoder_training: VocoderTraining | None = None  # None: Griffin-Lim, which is not trained

    def lasting(self, vae_steps: int, steps: int, vocoder_steps: int = 0, seed: int = 0) -> "Plan":
        """The plan with these numbers of steps (`vocoder_steps=0`: no HiFi-GAN) and this random seed."""
        fix = "0, or a plan that trains a vocoder, such as 'full'"
        check(self.vocoder_training or not vocoder_steps, "vocoder_steps", vocoder_steps, fix)
        changes = {"vocoder_training": None}
        for part, count in {"vae_training": vae_steps, "training": steps, "vocoder_training": vocoder_steps}.items():
            if count:
                config = getattr(self, part)
                epochs = math.ceil(count * config.batch_size * config.accumulate / config.examples)
                changes[part] = dataclasses.replace(config, epochs=epochs, max_steps=count, seed=seed)
        return dataclasses.replace(self, **changes)

    def train(self, folder: str | Path, library: Library, **options: Any) -> dict[str, Run]:
        """Train every part into its run in the folder, with the options of `train_part`."""
        parts = {"vae": (self.vae, self.vae_training), "diffusion": (self.denoiser, self.training)}
        if self.vocoder_training is not None:
            parts["hifigan"] = (self.vocoder, self.vocoder_training)
        return {part: train_part(folder, part, library, *how, **options) for part, how in parts.items()}


PLANS: dict[str, Plan] = read_entries(Path(__file__).with_name("plans.toml"), lambda name, **parts: Plan(**parts))
