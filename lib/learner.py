"""One optimizer step, from latents to new weights, that never waits for what a tensor holds.

A GPU is busy as long as the host runs ahead of it. So a step's metrics stay tensors until somebody gathers them, and a
loss or gradient that is not finite holds the weights still by a flag that the fused optimizer reads on the device.
Legend: B batch, D latent channels, T frames.
"""

import contextlib
import copy
import math
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lib.adversary import Adversary
from lib.agent import MaskingConfig
from lib.cascade import CascadeConfig
from lib.curriculum import mix_noise
from lib.fusion import Fusion, FusionModel
from lib.losses import Critic, Decode, total_loss
from lib.nonfinite import not_finite
from lib.optimization import learning_rate_factor, move_average, parameter_groups
from lib.telemetry import gradient_norms, step_metrics
from lib.train_config import TrainConfig

Batch = tuple[Tensor, Tensor]  # input and target latents, [B, D, T] each


class Learner:
    """The model in training with all that learns beside it: optimizer, averaged weights, discriminator."""

    def __init__(
        self,
        config: TrainConfig,
        cascade: CascadeConfig,
        masking: MaskingConfig,
        accelerator: Accelerator,
        decode: Decode | None = None,
    ):
        self.config, self.accelerator, self.decode = config, accelerator, decode
        model = FusionModel(cascade, masking)
        optimizer = torch.optim.AdamW(
            parameter_groups(model, config), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self.average = copy.deepcopy(model).to(accelerator.device) if config.ema else None
        if config.compile:
            model.compile(fullgraph=True)  # a part that cannot be compiled is an error, not a slow step
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.adversary = None
        if config.adversary.discriminator_learning_rate is not None:
            self.adversary = Adversary(config.adversary, cascade.latent_dim, self.max_norm, accelerator)
        self.failed = torch.zeros((), device=accelerator.device)  # 1 from the first step on that was not finite

    @property
    def plain_model(self) -> FusionModel:
        """The model in training, out of what the launcher wraps it in."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def kept_model(self) -> FusionModel:
        """The one that is validated and kept: the averaged weights where there are any."""
        return self.plain_model if self.average is None else self.average

    @property
    def max_norm(self) -> float:
        return self.config.clip if self.config.clip is not None else math.inf

    def loss(
        self, model: nn.Module, batch: Batch, *, noise: float = 0.0, critic: Critic | None = None
    ) -> tuple[Tensor, dict[str, Tensor], Fusion]:
        """Loss, metrics and output of a batch on the device; `noise` is the share mixed into what the model sees."""
        input, target = batch
        device = self.accelerator.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.config.precision == "bf16"):
            fusion: Fusion = model(mix_noise(input, noise), mix_noise(target, noise))
        loss, terms = total_loss(
            fusion.latents.float(),
            input,
            target,
            self.config.loss,
            self.decode,
            masks=fusion.masks,
            critic=critic,
            random_window=model.training,
        )
        return loss, step_metrics(terms, fusion), fusion

    def learn(self, step: int, batches: Sequence[Batch], *, progress: float, noise: float = 0.0) -> dict[str, Tensor]:
        """Optimizer step number `step` (from 0) on one batch or several, of a training that is done to `progress`.

        Returns its metrics as scalars on the device. Where loss or gradient is not finite, in whichever process, model
        and discriminator keep their weights, in this step and in all that follow.
        """
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = group["full_lr"] * learning_rate_factor(step, progress, self.config)
        self.optimizer.zero_grad(set_to_none=True)
        critic = self.adversary.critic(step) if self.adversary else None
        sums: dict[str, Tensor] = {}
        made = []
        for i, batch in enumerate(batches):
            weight = len(batch[0]) / sum(len(b[0]) for b in batches)
            with self.accelerator.no_sync(self.model) if i + 1 < len(batches) else contextlib.nullcontext():
                loss, terms, fusion = self.loss(self.model, batch, noise=noise, critic=critic)
                self.accelerator.backward(loss * weight if weight < 1 else loss)
            for name, value in ({"loss": loss} | terms).items():
                sums[name] = sums.get(name, 0) + weight * value.detach()
            made.append(fusion.latents.detach().float())
        shares = gradient_norms(self.plain_model)
        grad_norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_norm)
        metrics = {"loss": sums.pop("loss"), "grad_norm": grad_norm} | shares | sums
        bad = torch.maximum(not_finite(metrics["loss"]), not_finite(grad_norm))
        if self.accelerator.num_processes > 1:  # all hold still or none
            bad = self.accelerator.reduce(bad, "sum").clamp(max=1)
        self.failed = torch.maximum(self.failed, bad)
        self.optimizer.optimizer.found_inf = self.failed  # what a gradient scaler would set: 1 leaves the weights alone
        self.optimizer.step()
        if self.average is not None:
            move_average(self.average, self.plain_model, self.config.ema, step)
        if self.adversary is not None:
            clean = [(output, *batch) for output, batch in zip(made, batches, strict=True)]
            metrics |= self.adversary.learn(step, clean, self.failed)
        return metrics
