"""One optimizer step, from a batch to new weights, that never waits for what a tensor holds.

A GPU is busy as long as the host runs ahead of it. So a step's metrics stay tensors until somebody gathers them, and a
loss or gradient that is not finite holds the weights still by a flag that the fused optimizer reads on the device.
"""

import contextlib
import copy
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lib.training.adversary import Adversary
from lib.training.config import LoopConfig
from lib.training.nonfinite import not_finite
from lib.training.optimization import learning_rate_factor, move_average
from lib.training.telemetry import gradient_norms

Batch = tuple[Tensor, Tensor]  # the first and the second of its pairs, [B, …] each


@dataclass(frozen=True)
class Moment:
    """When in a training a step is taken."""

    step: int  # from 0
    epoch: int  # from 0


class Learner:
    """A model in training with all that learns beside it: optimizer, averaged weights, discriminator.

    A subclass says what is learned: `loss`, and what is particular about its reports. `groups` are the optimizer's
    parameter groups, each with its full learning rate as 'full_lr'.
    """

    batch_names: tuple[str, ...] = ("input", "target")  # of a batch's tensors, where one of them is not finite

    def __init__(
        self,
        config: LoopConfig,
        model: nn.Module,
        groups: list[dict[str, Any]],
        accelerator: Accelerator,
        adversary: Adversary | None = None,
    ):
        self.config, self.accelerator, self.adversary = config, accelerator, adversary
        optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
        self.average = copy.deepcopy(model).to(accelerator.device) if config.ema else None
        if config.compile:
            model.compile(fullgraph=True)  # a part that cannot be compiled is an error, not a slow step
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.failed = torch.zeros((), device=accelerator.device)  # 1 from the first step on that was not finite

    # --- what a subclass says ------------------------------------------------------------------------------------

    def loss(
        self, model: nn.Module, batch: Batch, moment: Moment | None = None
    ) -> tuple[Tensor, dict[str, Tensor], tuple[Tensor, Tensor] | None]:
        """Loss and metrics of a batch on the device, and what the discriminator is to tell apart: (made, real), or None
        where it is not to learn from it.

        `model` may be what a launcher wraps the model in: it is to be called, and none of its parts. `moment` is that
        of the step; None in validation, which must not depend on it: no noise, no critic.
        """
        raise NotImplementedError

    def parts(self, model: nn.Module) -> dict[str, nn.Module]:
        """The parts of the model whose gradient norms are reported, by name."""
        return {name: part for name, part in model.named_children() if any(True for _ in part.parameters())}

    def facts(self, moment: Moment) -> dict[str, Any]:
        """What the host knows of a step before it is taken, for its row."""
        return {}

    def warnings(self, row: dict[str, Any]) -> dict[Hashable, str]:
        """Signs of trouble in a step's row. Of each key, the first message of a training is logged."""
        return {}

    # --- what is the same for all --------------------------------------------------------------------------------

    @property
    def plain_model(self) -> nn.Module:
        """The model in training, out of what the launcher wraps it in."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def kept_model(self) -> nn.Module:
        """The one that is validated and kept: the averaged weights where there are any."""
        return self.plain_model if self.average is None else self.average

    def autocast(self) -> torch.autocast:
        """bf16 where the config says so: for a model's pass, not for its loss."""
        enabled = self.config.precision == "bf16"
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=enabled)

    def learn(self, step: int, batches: Sequence[Batch], *, progress: float, epoch: int = 0) -> dict[str, Tensor]:
        """Optimizer step number `step` (from 0) on one batch or several, of a training that is done to `progress`.

        Returns its metrics as scalars on the device. Where loss or gradient is not finite, in whichever process, model
        and discriminator keep their weights, in this step and in all that follow.
        """
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = group["full_lr"] * learning_rate_factor(step, progress, self.config)
        self.optimizer.zero_grad(set_to_none=True)
        moment = Moment(step, epoch)
        sums: dict[str, Tensor] = {}
        pairs = []
        for i, batch in enumerate(batches):
            weight = len(batch[0]) / sum(len(b[0]) for b in batches)
            with self.accelerator.no_sync(self.model) if i + 1 < len(batches) else contextlib.nullcontext():
                loss, terms, told_apart = self.loss(self.model, batch, moment)
                self.accelerator.backward(loss * weight if weight < 1 else loss)
            for name, value in ({"loss": loss} | terms).items():
                sums[name] = sums.get(name, 0) + weight * value.detach()
            if told_apart is not None:
                pairs.append(tuple(samples.detach() for samples in told_apart))
        shares = gradient_norms(self.parts(self.plain_model))
        grad_norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_norm)
        metrics = {"loss": sums.pop("loss"), "grad_norm": grad_norm} | shares | sums
        bad = torch.maximum(not_finite(metrics["loss"]), not_finite(grad_norm))
        if self.accelerator.num_processes > 1:  # all hold still or none
            bad = self.accelerator.reduce(bad, "sum").clamp(max=1)
        self.failed = torch.maximum(self.failed, bad)
        self.optimizer.optimizer.found_inf = self.failed  # what a gradient scaler would set: 1 leaves the weights alone
        self.optimizer.step()
        if self.average is not None:
            move_average(self.average, self.plain_model, self.config.ema, step)
        if self.adversary is not None and pairs:
            metrics |= self.adversary.learn(step, pairs, self.failed)
        return metrics


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode, whatever it was in before. Leaving training is what aligns spectral norms with their
    weights, so a model already in eval, whose weights may have moved, passes through training first."""
    training = model.training
    try:
        yield model.train().eval()
    finally:
        model.train(training)
