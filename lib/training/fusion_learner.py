"""Training the fusion model: its loss, noise and discriminator, the metrics of its stages, and `train`."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lib.codec.codec import Codec, placed
from lib.data.latents import LatentPairs
from lib.model.cascade import CascadeConfig
from lib.model.discriminator import Discriminator
from lib.model.fusion import Fusion, FusionModel
from lib.model.masks import MaskingConfig, complementarity
from lib.model.rms_law import check_collapse
from lib.training.batches import Batch, Splits, mix_noise
from lib.training.config import TrainConfig, resolved_precision
from lib.training.learner import Adversary, Learner, Losses, StepInfo
from lib.training.losses import total_loss
from lib.training.run import Run
from lib.training.trainer import Callback, Trainer, open_accelerator
from lib.util.configs import from_fields, load_object
from lib.util.files import file_sha256
from lib.util.provenance import code_fingerprint

logger = logging.getLogger(__name__)

SCALE_WARNING = 1.3  # source document 001 calls a scale above it a warning sign


class FusionLearner(Learner):
    """The fusion model in training, on (input, target) latents `[B, D, T]`; real are both clips' clean latents."""

    batch_names = ("input latents", "target latents")

    def __init__(self, config: TrainConfig, model: FusionModel, accelerator: Accelerator, codec: Codec | None = None):
        self.codec = codec
        super().__init__(config, model, accelerator, parameter_groups(model, config))
        if config.adversary.discriminator_learning_rate is not None:
            discriminator = Discriminator(model.cascade.config.latent_dim)
            self.adversary = Adversary(config.adversary, discriminator, config.max_norm, accelerator)

    def loss(self, model: nn.Module, batch: Batch, info: StepInfo | None = None) -> Losses:
        input, target = batch
        noise = self.config.curriculum.noise_share(info.epoch) if info else 0.0
        critic = self.adversary.critic(info.step) if info and self.adversary else None
        with self.autocast():
            fusion: Fusion = model(mix_noise(input, noise), mix_noise(target, noise))
        output = fusion.latents.float()
        options = {"masks": fusion.masks, "critic": critic, "training": info is not None}
        loss, terms = total_loss(output, input, target, self.config.loss, self.codec, **options)
        fake_and_real = (output, torch.cat([input, target])) if self.adversary else None
        return loss, step_metrics(terms, fusion), fake_and_real

    def parts(self, model: FusionModel) -> dict[str, nn.Module]:
        """'stage1/output_projection' and the like, and the mask generator."""
        stages = enumerate(model.cascade.stages)
        parts = {f"stage{i}/{name}": part for i, stage in stages for name, part in stage.named_children()}
        if model.mask_generator is not None:
            parts["mask_generator"] = model.mask_generator
        return parts

    def facts(self, info: StepInfo) -> dict[str, Any]:
        curriculum = self.config.curriculum
        return {"noise_share": curriculum.noise_share(info.epoch)} if curriculum.noise_rate else {}

    def warnings(self, row: dict[str, Any]) -> dict[int, str]:
        """A message for every stage with a large target scale."""
        scales = enumerate(row[f"stage{i}/target_scale"] for i in range(len(self.unwrapped_model.cascade.stages)))
        message = "stage {} has a target scale of {:.2f}, above {}"
        return {i: message.format(i, scale, SCALE_WARNING) for i, scale in scales if scale > SCALE_WARNING}


def parameter_groups(model: FusionModel, config: TrainConfig) -> list[dict[str, Any]]:
    """The cascade's parameters and the mask generator's, each with its learning rate."""
    agent_rate = config.agent_learning_rate or config.learning_rate
    rates = ((model.cascade, config.learning_rate), (model.mask_generator, agent_rate))
    return [{"params": list(part.parameters()), "full_lr": rate} for part, rate in rates if part is not None]


@torch.no_grad()
def step_metrics(terms: dict[str, Tensor], fusion: Fusion) -> dict[str, Tensor]:
    """Loss terms, the masks' complementarity, and batch means of every stage's trace, as named in metrics.jsonl."""
    metrics = {name if "/" in name else f"loss/{name}": value for name, value in terms.items()}
    if fusion.masks is not None:
        metrics["masks/complementarity"] = complementarity(fusion.masks).mean()
    for stage, trace in enumerate(fusion.traces):
        metrics |= {f"stage{stage}/{name}": value.mean() for name, value in vars(trace).items()}
    return metrics


def run_settings(
    index: str | Path, codec: Codec, cascade: CascadeConfig, config: TrainConfig, masking: MaskingConfig
) -> dict[str, Any]:
    """The config of a run: all that its result depends on. The cascade's channels are the codec's."""
    config.loss.find_own()
    replace, own = dataclasses.replace, config.loss.own.items()
    own = {name: replace(term, source=file_sha256(load_object(term.function)[1])) for name, term in own}
    config = replace(config, precision=resolved_precision(config.precision), loss=replace(config.loss, own=own))
    return {
        "cascade": dataclasses.asdict(replace(cascade, latent_dim=codec.dim)),
        "masking": dataclasses.asdict(masking),
        "train": dataclasses.asdict(config),
        "codec": {"name": codec.name, "fingerprint": codec.fingerprint},
        "data": Path(index).stem,  # names the pairs by their content
    }


def train(
    out_dir: str | Path,
    index: str | Path,
    codec: Codec,
    cascade: CascadeConfig,
    config: TrainConfig,
    masking: MaskingConfig | None = None,
    *,
    resume: bool = False,
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
) -> Run:
    """Train a fusion model on the latents of `index` and return its run directory. With `resume`, a run in `out_dir`
    resumes from its last checkpoint, bit for bit on a CPU. Only its length, the number of processes, and how data are
    read and metrics gathered may have changed; another config or other data is refused, and a run that other code
    finished is trained again. Ctrl-C and SIGTERM save, then `KeyboardInterrupt`. A launcher's processes all call it."""
    masking = masking or MaskingConfig()
    settings = run_settings(index, codec, cascade, config, masking)
    cascade = from_fields(CascadeConfig, settings["cascade"])
    config.check_model(cascade, masking)
    if config.loss.anti_modulation == "log" and config.loss.anti_modulation_weight:
        logger.warning("anti_modulation='log' has no bound: it is infinite where an output's envelope is a source's")
    for message in check_collapse(cascade):
        logger.warning(message)
    pairs = {split: LatentPairs(index, split, codec_fingerprint=codec.fingerprint) for split in ("train", "val")}
    accelerator = open_accelerator()
    config.check_sizes({split: len(found) for split, found in pairs.items()}, accelerator.num_processes)
    code = [code_fingerprint("lib.training.fusion_learner")[:16]]
    source = getattr(codec, "source", codec.name)  # a folder of weights has the name of others
    how = {"resume": resume, "code": code, "notes": {"codec_source": source}}
    with Run.started(out_dir, settings, accelerator, **how) as run, placed(codec, accelerator.device):
        fusion_trainer(run, pairs, codec, callbacks).run_to_end(progress=progress)
    return run


def fusion_trainer(run: Run, pairs: Splits, codec: Codec | None = None, callbacks: Sequence[Callback] = ()) -> Trainer:
    """The trainer of the fusion model that a run's config describes."""
    config = from_fields(TrainConfig, run.config["train"])
    model = from_fields(CascadeConfig, run.config["cascade"]), from_fields(MaskingConfig, run.config["masking"])
    return Trainer(run, config, pairs, lambda on: FusionLearner(config, FusionModel(*model), on, codec), callbacks)
