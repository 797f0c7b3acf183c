"""What is learned of fusing: the model's loss, noise and discriminator, and what a step reports of its stages.

Legend: B batch, D latent channels, T frames.
"""

import dataclasses
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lib.model.cascade import CascadeConfig
from lib.model.discriminator import Discriminator
from lib.model.fusion import Fusion, FusionModel
from lib.model.masks import MaskingConfig, complementarity
from lib.training.adversary import Adversary
from lib.training.config import TrainConfig
from lib.training.curriculum import mix_noise, noise_share
from lib.training.learner import Batch, Learner, Moment
from lib.training.losses import Decode, total_loss

FACTOR_WARNING = 1.3  # seed 001 calls a scale factor above it a warning sign


class FusionLearner(Learner):
    """The fusion model in training, on batches of (input, target) latents `[B, D, T]`. Its discriminator takes the
    clean latents of both clips for real."""

    batch_names = ("input latents", "target latents")

    def __init__(
        self,
        config: TrainConfig,
        cascade: CascadeConfig,
        masking: MaskingConfig,
        accelerator: Accelerator,
        decode: Decode | None = None,
    ):
        self.decode = decode
        model = FusionModel(cascade, masking)
        adversary = None
        if config.adversary.discriminator_learning_rate is not None:
            spectral_norm = config.adversary.discriminator_spectral_norm
            discriminator = Discriminator(cascade.latent_dim, spectral_norm=spectral_norm)
            adversary = Adversary(config.adversary, discriminator, config.max_norm, accelerator)
        super().__init__(config, model, parameter_groups(model, config), accelerator, adversary)

    def loss(
        self, model: nn.Module, batch: Batch, moment: Moment | None = None
    ) -> tuple[Tensor, dict[str, Tensor], tuple[Tensor, Tensor] | None]:
        input, target = batch
        noise = noise_share(moment.epoch, self.config.curriculum) if moment else 0.0
        critic = self.adversary.critic(moment.step) if moment and self.adversary else None
        with self.autocast():
            fusion: Fusion = model(mix_noise(input, noise), mix_noise(target, noise))
        output = fusion.latents.float()
        loss, terms = total_loss(
            output,
            input,
            target,
            self.config.loss,
            self.decode,
            masks=fusion.masks,
            critic=critic,
            random_window=model.training,
        )
        told_apart = (output, torch.cat([input, target])) if self.adversary else None
        return loss, step_metrics(terms, fusion), told_apart

    def parts(self, model: FusionModel) -> dict[str, nn.Module]:
        """'stage1/output_projection' and the like, and the mask generator."""
        stages = enumerate(model.cascade.stages)
        parts = {f"stage{i}/{name}": part for i, stage in stages for name, part in stage.named_children()}
        if model.mask_generator is not None:
            parts["mask_generator"] = model.mask_generator
        return parts

    def facts(self, moment: Moment) -> dict[str, Any]:
        curriculum = self.config.curriculum
        return {"noise_share": noise_share(moment.epoch, curriculum)} if curriculum.noise_rate else {}

    def warnings(self, row: dict[str, Any]) -> dict[int, str]:
        """A message for every stage that wants a large factor."""
        wanted = {stage: row[f"stage{stage}/target_scale"] for stage in range(len(self.plain_model.cascade.stages))}
        return {
            stage: f"stage {stage} wants the factor {factor:.2f}, above {FACTOR_WARNING}"
            for stage, factor in wanted.items()
            if factor > FACTOR_WARNING
        }


def parameter_groups(model: FusionModel, config: TrainConfig) -> list[dict[str, Any]]:
    """The cascade's parameters and the mask generator's, each with its learning rate."""
    groups = [{"params": list(model.cascade.parameters()), "full_lr": config.learning_rate}]
    if model.mask_generator is not None:
        rate = config.agent_learning_rate or config.learning_rate
        groups.append({"params": list(model.mask_generator.parameters()), "full_lr": rate})
    return groups


@torch.no_grad()
def step_metrics(terms: dict[str, Tensor], fusion: Fusion) -> dict[str, Tensor]:
    """The loss terms, the masks' complementarity, and the batch means of every stage's trace, by the names that
    metrics.jsonl uses."""
    metrics = {f"loss/{name}": value for name, value in terms.items()}
    if fusion.masks is not None:
        metrics["masks/complementarity"] = complementarity(fusion.masks).mean()
    for stage, trace in enumerate(fusion.traces):
        for trace_field in dataclasses.fields(trace):
            metrics[f"stage{stage}/{trace_field.name}"] = getattr(trace, trace_field.name).mean()
    return metrics
