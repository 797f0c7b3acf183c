"""Training of the parts, each a run of its own in one folder: `completion` of mels, `vae`, `diffusion` on latents of
what the completion lacks, and `hifigan`. A plan holds sizes and training of all parts: those of source document 004
for a GPU, small ones for two cores and minutes."""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
from accelerate import Accelerator
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lib.superres import vocoder as hifigan
from lib.superres.baselines import MelStatistics
from lib.superres.completion import SHARE, Completion, CompletionConfig, missing_bands
from lib.superres.degradation import GRID, HIGHEST, LOWEST, Degradation, Examples, Library
from lib.superres.mel import MELS, SAMPLE_RATE, log_mel
from lib.superres.unet import TIMESTEPS, Denoiser, DenoiserConfig, add_noise
from lib.superres.vae import MelVae, VaeConfig
from lib.training.batches import Batch, Pairs
from lib.training.config import AdversaryConfig, LoopConfig, resolved_precision
from lib.training.learner import Adversary, Learner, Losses, StepInfo
from lib.training.run import Run
from lib.training.trainer import Trainer, open_accelerator
from lib.util.configs import Count, NonNegative, check, checked_dataclass, from_fields, read_entries
from lib.util.errors import UserError
from lib.util.provenance import code_fingerprint

LISTENED = 384  # clips whose frames make the statistics
MEASURED = 64  # examples from which the mel's mean and the latents' scale are computed
NEEDED = ("completion", "vae")  # by the diffusion model
FROM_DATA = ("sizes.mel_mean", "sizes.mel_std", "latent_scale", *(f"{p}_sha256" for p in NEEDED))  # in a run's config
CACHE = 4 * 2**30  # bytes of encoded examples to keep in memory
WHOLE = Degradation(SAMPLE_RATE // 2)  # nothing is removed: what is known of a clip, the learner of completions decides
LAST = 0.5  # share of clips at the last timestep, where the velocity is the expectation
EQUALISER = 0.5  # nepers, deviation of level and slope over the mel bands that training clips are given at random
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


class CompletionLearner(Learner):
    """Mean squared error of what regression leaves above a cutoff, which is another one each time. A batch is the first
    and the second halves of log mels, `[B, 1, 256, T]` each."""

    batch_names = ("first halves", "second halves")

    def loss(self, model: nn.Module, batch: Batch, info: StepInfo | None = None) -> Losses:
        mel, statistics = torch.cat(batch), self.unwrapped_model.statistics
        clips, grid = len(mel), torch.arange(LOWEST, HIGHEST + 1, GRID)  # on the host, which solves for each cutoff
        # validation has cutoffs that are spread over all
        places = torch.randint(len(grid), (clips,)) if info else torch.linspace(0, len(grid) - 1, clips).long()
        cutoffs = grid[places].tolist()
        linear = torch.cat([statistics.predicted(one, at) for one, at in zip(mel.split(1), cutoffs, strict=True)])
        missing = torch.stack([missing_bands(cutoff) for cutoff in cutoffs]).to(mel.device, non_blocking=True)
        with self.autocast():
            correction = model(linear, missing).float()
        squares = (linear + (1 if info else SHARE) * correction - mel).square().mean(dim=(1, 3))  # [B, 256]
        error = ((squares * missing).sum(dim=1) / missing.sum(dim=1)).mean()
        return error, {"loss/mel": error}, None


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
        error, divergence = (decoded - mel).abs().mean(), divergence.mean()
        return error + self.config.kl_weight * divergence, {"loss/mel": error, "loss/kl": divergence}, None


class DiffusionLearner(Learner):
    """Velocity of what the clip's latents have more than those of its completed low band. A batch is both latents
    `[B, 2·Z, H, W]`, and the completed mel."""

    batch_names = ("latents", "completed mel")

    def loss(self, model: nn.Module, batch: Batch, info: StepInfo | None = None) -> Losses:
        high, low = batch[0].chunk(2, dim=1)
        clips, device = len(high), high.device
        # validation uses the same noise for the same batch, and timesteps spread over the schedule
        drawn = {"device": device} if info else {"generator": torch.Generator().manual_seed(0)}
        noise = torch.randn(high.shape, **drawn).to(device)
        spread = (torch.arange(clips, device=device) * 2 + 1) * TIMESTEPS // (2 * clips)
        timesteps = torch.randint(TIMESTEPS, (clips,), device=device) if info else spread
        timesteps = timesteps.masked_fill(torch.rand(clips, **drawn).to(device) < LAST, TIMESTEPS - 1)
        noisy, velocity = add_noise(high - low, noise, timesteps)
        with self.autocast():
            found = model(noisy, timesteps, low, batch[1])
        error = (found.float() - velocity).square().mean()
        return error, {"loss/velocity": error}, None


class VocoderAdversary(Adversary):
    betas = (0.8, 0.99)  # HiFi-GAN's

    def loss(self, fake: Tensor, real: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = hifigan.discriminator_loss(hifigan.outputs_of_both(self.model, real, fake))
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
        fake = model(mel)  # in float32, as its authors train it: samples of bf16 have eight bits
        terms = {"loss/mel": (log_mel(fake) - mel).abs().mean()}
        loss = MEL_WEIGHT * terms["loss/mel"]
        if info and (critic := self.adversary.critic(info.step)):
            adversarial, features = hifigan.generator_losses(hifigan.outputs_of_both(critic, real, fake))
            terms |= {"loss/adversarial": adversarial, "loss/features": features}
            loss = loss + adversarial + FEATURE_WEIGHT * features
        return loss, terms, (fake, real)


PARTS = {  # learner, model and sizes of each
    "completion": (CompletionLearner, Completion, CompletionConfig),
    "vae": (VaeLearner, MelVae, VaeConfig),
    "diffusion": (DiffusionLearner, Denoiser, DenoiserConfig),
    "hifigan": (VocoderLearner, functools.partial(hifigan.Vocoder, weight_norm=True), hifigan.VocoderConfig),
}


class MadeExamples:
    """What `make(mel, cutoff)` makes of `Examples`: of the log mels `[2, 1, 256, T]` of a clip and its degraded
    version, and the cutoff in Hz. Cached up to `CACHE`, as it costs more than a step. Clips for training pass an
    equaliser, so that the shape of spectra is learned."""

    def __init__(self, examples: Examples, make: Callable[[Tensor, int], tuple[Tensor, Tensor]], device: torch.device):
        self.examples, self.make, self.device = examples, make, device
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
        if self.examples.split == "train":
            level, slope = (EQUALISER * torch.randn(2, generator=torch.Generator().manual_seed(i))).tolist()
            mel = mel + (level + slope * torch.linspace(-1, 1, MELS, device=self.device))[:, None]
        first, second = (tensor.cpu() for tensor in self.make(mel, self.examples.cutoff(i)))
        self.bytes_left -= first.nbytes + second.nbytes
        if self.bytes_left >= 0:
            self.kept[i] = first, second
        return first, second


def train_part(
    folder: str | Path,
    part: str,
    library: Library,
    sizes: Any,
    config: PartConfig,
    *,
    name: str | None = None,
    encoded: tuple[dict[str, Pairs], dict[str, Any]] | None = None,
    resume: bool = False,
) -> Run:
    """Train a part, a key of `PARTS`, into `folder/<name or part>`; `resume` as in `lib.training.fusion_learner.train`.
    The autoencoder's sizes get the log mel's mean and deviation. The denoiser learns `encoded` or `encode`'s data."""
    accelerator, folder = open_accelerator(), Path(folder)
    data, facts, code = examples_of(library, config), {}, [code_fingerprint("lib.superres.training")[:16]]
    if part == "completion":
        statistics = MelStatistics.of(library, config.clip_length, min(LISTENED, config.examples))
        statistics.to(device := accelerator.device)

        def halves(examples: Examples) -> MadeExamples:
            whole = dataclasses.replace(examples, degradation=WHOLE)
            return MadeExamples(whole, lambda mel, _: mel[0].chunk(2, dim=-1), device)

        data = {split: halves(examples) for split, examples in data.items()}
    elif part == "vae":
        examples = data["train"]
        mels = torch.stack([log_mel(torch.stack(examples[i])) for i in range(min(MEASURED, len(examples)))])
        sizes = dataclasses.replace(sizes, mel_mean=mels.mean().item(), mel_std=mels.std().item())
    elif part == "diffusion":
        earlier = [Run.open(folder / needed) for needed in NEEDED]
        if (channels := earlier[1].config["sizes"]["latent_channels"]) != sizes.latent_channels:
            fault = f"does not fit {earlier[1].path}, whose latents have {channels}; use that number"
            raise UserError(f"latent_channels={sizes.latent_channels} {fault}")
        data, facts = encoded or encode(folder, library, config)
        code = list(dict.fromkeys([*(by for run in earlier for by in run.trained_by), *code]))
    config = dataclasses.replace(config, precision=resolved_precision(config.precision))
    config.check_sizes({split: len(found) for split, found in data.items()}, accelerator.num_processes)
    wanted = {"sizes": dataclasses.asdict(sizes), "train": dataclasses.asdict(config), "data": library.fingerprint}
    started = {"resume": resume, "code": code, "measured": FROM_DATA}
    with Run.started(folder / (name or part), wanted | facts, accelerator, **started) as run:
        config, (learner, model, _) = from_fields(type(config), run.config["train"]), PARTS[part]
        more = {"statistics": statistics} if part == "completion" else {}
        Trainer(run, config, data, lambda launcher: learner(config, model(sizes, **more), launcher)).run_to_end()
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


def encode(
    folder: Path, library: Library, config: PartConfig, known: float = 0.0
) -> tuple[dict[str, Pairs], dict[str, Any]]:
    """For the diffusion model: latents of a clip and of its completed low band `[2·Z, H, W]`, and the completed log mel
    `[1, 256, T]`, by the parts in the folder. Scaled so that their difference has a standard deviation of 1. `known`:
    share of a clip, from its start, of which the whole band is given. With what a run records of it."""
    runs, device = {part: Run.open(folder / part) for part in NEEDED}, open_accelerator().device
    completion, vae = (load_part(run, part).requires_grad_(False).to(device) for part, run in runs.items())
    scale = 1.0

    def encoded(mel: Tensor, cutoff: int) -> tuple[Tensor, Tensor]:
        completed, frames = completion.complete(mel[1:], cutoff), round(known * mel.shape[-1])
        completed[..., :frames] = mel[:1, ..., :frames]
        return scale * vae.encode(torch.cat([mel[:1], completed])).flatten(0, 1), completed[0]

    data = {split: MadeExamples(own, encoded, device) for split, own in examples_of(library, config).items()}
    first = [torch.sub(*data["train"][i][0].chunk(2)) for i in range(min(MEASURED, config.examples))]
    scale = 1 / torch.stack(first).std().item()
    data["train"].kept.clear()
    return data, {"latent_scale": scale} | {f"{part}_sha256": run.weights_sha256() for part, run in runs.items()}


@checked_dataclass
class Plan:
    """Sizes and training of the parts."""

    completion: CompletionConfig = CompletionConfig()
    vae: VaeConfig = VaeConfig()
    denoiser: DenoiserConfig = DenoiserConfig()
    vocoder: hifigan.VocoderConfig = hifigan.VocoderConfig()
    completion_training: PartConfig = PartConfig()
    vae_training: VaeTraining = VaeTraining()
    training: PartConfig = PartConfig()
    vocoder_training: VocoderTraining | None = None  # None: Griffin-Lim, which is not trained

    def lasting(
        self, completion_steps: int, vae_steps: int, steps: int, vocoder_steps: int = 0, seed: int = 0, **most: float
    ) -> "Plan":
        """The plan with these numbers of steps (`vocoder_steps=0`: no HiFi-GAN) and this random seed. `most`: of fields
        of each part's training that are lowered to it, such as `batch_size`."""
        fix = "0, or a plan that trains a vocoder, such as 'full'"
        check(self.vocoder_training or not vocoder_steps, "vocoder_steps", vocoder_steps, fix)
        changes = {"vocoder_training": None}
        parts = ("completion_training", "vae_training", "training", "vocoder_training")
        for part, count in zip(parts, (completion_steps, vae_steps, steps, vocoder_steps), strict=True):
            if count:
                config = getattr(self, part)
                lowered = {name: min(value, getattr(config, name)) for name, value in most.items()}
                config = dataclasses.replace(config, **lowered)
                epochs = math.ceil(count * config.batch_size * config.accumulate / config.examples)
                changes[part] = dataclasses.replace(config, epochs=epochs, max_steps=count, seed=seed)
        return dataclasses.replace(self, **changes)

    def train(self, folder: str | Path, library: Library, **options: Any) -> dict[str, Run]:
        """Train every part into its run in the folder, with the options of `train_part`."""
        return {part: train_part(folder, part, library, *how, **options) for part, *how in self.parts()}

    def parts(self) -> list[tuple[str, Any, PartConfig]]:
        """Name, sizes and training of each part that is trained."""
        sizes = (self.completion, self.vae, self.denoiser, self.vocoder)
        training = (self.completion_training, self.vae_training, self.training, self.vocoder_training)
        return [how for how in zip(PARTS, sizes, training, strict=True) if how[2] is not None]


PLANS: dict[str, Plan] = read_entries(Path(__file__).with_name("plans.toml"), lambda name, **parts: Plan(**parts))
