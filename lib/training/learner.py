"""One training step of any model, from its batches to its new weights.

    train_step(batches):
        for batch in batches:
            loss, metrics, (fake, real) = self.loss(model, batch)    # FusionLearner: noise, forward pass, all terms
            backward(loss · the batch's share of the step)           # processes sum their gradients in the last one
        clip the gradients
        failed |= loss or gradient is not finite, in any process
        optimizer.step(), which skips the update if failed
        update_ema(ema_model, model)
        adversary.train_step(all (fake, real), failed)               # its own loss, gradients and optimizer

A GPU is busy as long as the host runs ahead of it, so a step never waits for the value of a tensor: its metrics stay on
the device until the trainer gathers them, and so does `failed`, which the fused optimizer reads there.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from lib.model.projection import realign_projections
from lib.training.batches import Batch
from lib.training.config import AdversaryConfig, LoopConfig
from lib.training.losses import Critic, discriminator_hinge
from lib.training.nonfinite import not_finite

Losses = tuple[Tensor, dict[str, Tensor], tuple[Tensor, Tensor] | None]  # loss, metrics, (fake, real)
Groups = list[dict[str, Any]]


class StepInfo(NamedTuple):
    """Where in training a step is."""

    step: int  # from 0
    epoch: int = 0  # from 0
    progress: float = 0.0  # how much of the training is done, 0 to 1


class Learner:
    """A model in training with its optimizer, EMA weights and discriminator. A subclass defines `loss` and its reports.
    `groups`: the optimizer's parameter groups, each with its full learning rate as 'full_lr'; None: the config's."""

    batch_names: tuple[str, ...] = ("input", "target")  # of a batch's tensors, for the report of a non-finite one
    adversary: "Adversary | None" = None

    def __init__(self, config: LoopConfig, model: nn.Module, accelerator: Accelerator, groups: Groups | None = None):
        self.config, self.accelerator = config, accelerator
        groups = groups or [{"params": list(model.parameters()), "full_lr": config.learning_rate}]
        optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
        self.ema_model = copy.deepcopy(model).to(accelerator.device) if config.ema else None
        if config.compile:
            model.compile(fullgraph=True)  # a part that cannot be compiled is an error, not a slow step
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.failed = torch.zeros((), device=accelerator.device)  # 1 from the first non-finite step on

    def loss(self, model: nn.Module, batch: Batch, info: StepInfo | None = None) -> Losses:
        """Loss and metrics of a batch on the device, and the discriminator's samples: (fake, real), or None. `model`
        may be wrapped by a launcher: use none of its parts. `info` is None in validation: no noise, no critic."""
        raise NotImplementedError

    def parts(self, model: nn.Module) -> dict[str, nn.Module]:
        """The parts of the model whose gradient norms are reported, by name."""
        return dict(model.named_children())

    def facts(self, info: StepInfo) -> dict[str, Any]:
        """Values for a step's row that are known before the step."""
        return {}

    def warnings(self, row: dict[str, Any]) -> dict[Hashable, str]:
        """Signs of trouble in a step's row. For each key, only the first message is logged."""
        return {}

    @property
    def unwrapped_model(self) -> nn.Module:
        """The model in training, without the launcher's wrapper."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def eval_model(self) -> nn.Module:
        """The model to evaluate and to save: with the EMA weights, if there are any."""
        return self.unwrapped_model if self.ema_model is None else self.ema_model

    def autocast(self) -> torch.autocast:
        """bf16 where the config says so: for a model's forward pass, not for its loss."""
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def train_step(self, batches: Sequence[Batch], info: StepInfo) -> dict[str, Tensor]:
        """One optimizer step on one batch or several; returns its metrics as scalars on the device. From the first step
        on whose loss or gradient is not finite, in any process, model and discriminator skip every update."""
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = group["full_lr"] * learning_rate_factor(info, self.config)
        self.optimizer.zero_grad(set_to_none=True)
        means, samples = accumulate_gradients(
            self.accelerator, self.model, batches, lambda batch: self.loss(self.model, batch, info)
        )
        part_norms = gradient_norms(self.parts(self.unwrapped_model))
        # the infinite norm by both ends, which takes a tenth of the time on a CPU
        ends = [end for p in self.model.parameters() if p.grad is not None for end in torch.aminmax(p.grad)]
        grad_norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_norm)
        metrics = {"loss": means.pop("loss"), "grad_norm": grad_norm} | part_norms | means
        metrics["sign/gradient_share"] = torch.stack(ends).abs().max() / (grad_norm + 1e-12)  # of the largest element
        bad = torch.maximum(not_finite(metrics["loss"]), not_finite(grad_norm))
        bad = self.accelerator.reduce(bad, "sum").clamp(max=1)  # all processes skip the update, or none
        self.failed = torch.maximum(self.failed, bad)
        step_unless(self.failed, self.optimizer)
        if self.ema_model is not None:
            update_ema(self.ema_model, self.unwrapped_model, self.config.ema, info.step)
        if self.adversary is not None and samples:
            metrics |= self.adversary.train_step(samples, self.failed)
        return metrics


class Adversary:
    """A discriminator in training, with one logit for every sample of a batch; for other outputs, override `loss`."""

    betas = (0.5, 0.999)  # hinge discriminators are trained with a momentum of 0.5 (Miyato et al. 2018)

    def __init__(self, config: AdversaryConfig, model: nn.Module, clip: float, accelerator: Accelerator):
        self.config, self.clip, self.accelerator = config, clip, accelerator
        rate = config.discriminator_learning_rate
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=self.betas, fused=True)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)

    def critic(self, step: int) -> Critic | None:
        """The discriminator for the loss after `step` steps, with weights that get no gradient; None in its warm-up."""
        if step < self.config.discriminator_warmup:
            return None
        model = self.accelerator.unwrap_model(self.model)
        weights = {name: value.detach() for name, value in model.state_dict(keep_vars=True).items()}
        return lambda samples: torch.func.functional_call(model, weights, (samples,))

    def train_step(self, batches: Sequence[tuple[Tensor, Tensor]], failed: Tensor | None = None) -> dict[str, Tensor]:
        """One step on (fake, real) batches; returns its metrics. Skipped if `failed` or the gradient is not finite."""
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        means, _ = accumulate_gradients(self.accelerator, self.model, batches, lambda batch: (*self.loss(*batch), None))
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip)
        bad = not_finite(norm)
        step_unless(bad if failed is None else torch.maximum(failed, bad), self.optimizer)
        return {f"discriminator/{name}": value for name, value in (means | {"grad_norm": norm}).items()}

    def loss(self, fake: Tensor, real: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The hinge loss, and its metrics."""
        of_real, of_fake = self.model(torch.cat([real, fake]).detach()).split([len(real), len(fake)])
        hinge = discriminator_hinge(of_real, of_fake)
        return hinge, {"loss": hinge, "real": of_real.mean(), "fake": of_fake.mean()}

    def state_dict(self) -> dict[str, Any]:
        model = self.accelerator.unwrap_model(self.model)
        return {"model": model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.accelerator.unwrap_model(self.model).load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def learning_rate_factor(info: StepInfo, config: LoopConfig) -> float:
    """Share of the full learning rate: warm-up times schedule. A function of the step, so resuming restores nothing."""
    factor = min(1.0, (info.step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    return factor * (1 + math.cos(math.pi * info.progress)) / 2 if config.schedule == "cosine" else factor


def accumulate_gradients(
    accelerator: Accelerator, model: nn.Module, batches: Sequence[Batch], losses: Callable[[Batch], Losses]
) -> tuple[dict[str, Tensor], list[Batch]]:
    """Add the gradients of the mean loss over all clips of the batches; returns the means of loss and metrics over
    them, and the samples of each batch for the discriminator."""
    total = sum(len(batch[0]) for batch in batches)
    means, samples = {}, []
    for i, batch in enumerate(batches):
        share = len(batch[0]) / total
        with accelerator.no_sync(model) if i + 1 < len(batches) else contextlib.nullcontext():
            loss, metrics, fake_and_real = losses(batch)
            accelerator.backward(loss * share)
        if fake_and_real is not None:
            samples.append(tuple(x.detach() for x in fake_and_real))
        for name, value in ({"loss": loss} | metrics).items():
            means[name] = means.get(name, 0) + share * value.detach()
    return means, samples


@torch.no_grad()
def gradient_norms(parts: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Gradient norm of every part of a model before clipping, as 'grad_norm/stage1/output_projection'."""
    grads = {name: [p.grad for p in part.parameters() if p.grad is not None] for name, part in parts.items()}
    return {f"grad_norm/{name}": nn.utils.get_total_norm(found) for name, found in grads.items() if found}


def step_unless(failed: Tensor, optimizer: Any) -> None:
    """Step a fused optimizer, as accelerate wraps it; it skips the update where `failed` is 1."""
    # Private, set by torch's GradScaler. No public API skips an update without the host waiting for the flag.
    optimizer.optimizer.found_inf = failed
    optimizer.step()


@torch.no_grad()
def update_ema(ema_model: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move the EMA weights towards the model's, further in the first steps, or the initial ones dominate for long.
    Buffers are copied: statistics of batch norms are averages already, and projections are realigned before use."""
    decay = min(decay, (1 + step) / (10 + step))
    get_ema_multi_avg_fn(decay)(list(ema_model.parameters()), list(model.parameters()), step)
    for averaged, current in zip(ema_model.buffers(), model.buffers(), strict=True):
        averaged.copy_(current)


def to_floats(values: dict[Hashable, Tensor], accelerator: Accelerator | None = None) -> dict[Hashable, float]:
    """Scalars on the host, in one transfer; with an accelerator, their means over its processes."""
    stacked = torch.stack([value.detach().float() for value in values.values()])
    if accelerator is not None:
        stacked = accelerator.reduce(stacked, "mean")
    return dict(zip(values, stacked.tolist(), strict=True))


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode, its projections realigned with weights that may have moved since its last forward."""
    training = model.training
    realign_projections(model)
    try:
        yield model.eval()
    finally:
        model.train(training)
