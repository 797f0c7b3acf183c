"""The discriminator's side of training: its settings, its optimizer, its steps."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lib.training.losses import Critic, discriminator_hinge
from lib.training.nonfinite import not_finite
from lib.util.configs import check, check_counts, check_numbers


@dataclass(frozen=True)
class AdversaryConfig:
    """How the discriminator learns. Without a learning rate there is none."""

    discriminator_learning_rate: float | None = None
    discriminator_every: int = 1  # steps of the model to one of the discriminator
    discriminator_warmup: int = 0  # steps in which it learns and the model does not hear it yet
    gradient_penalty: float = 0.0  # weight of R1, the squared gradient at real latents; 0: none
    discriminator_spectral_norm: bool = False

    def __post_init__(self):
        if self.discriminator_learning_rate is not None:
            check_numbers(self, "discriminator_learning_rate", above=0)
        check_counts(self, "discriminator_every")
        check_counts(self, "discriminator_warmup", least=0)
        check_numbers(self, "gradient_penalty")
        switch = self.discriminator_spectral_norm
        check(isinstance(switch, bool), "discriminator_spectral_norm", switch, "true or false")


class Adversary:
    """A discriminator in training: a model that has one logit for every sample of a batch. Where it has other outputs,
    a subclass gives another `loss`."""

    betas = (0.5, 0.999)  # the momentum of 0.5 is what hinge discriminators are trained with (Miyato et al. 2018)

    def __init__(self, config: AdversaryConfig, model: nn.Module, clip: float, accelerator: Accelerator):
        self.config, self.clip, self.accelerator = config, clip, accelerator
        rate = config.discriminator_learning_rate
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=self.betas, fused=True)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)

    def critic(self, step: int) -> Critic | None:
        """What the model's loss listens to after `step` steps; None while the discriminator warms up.

        The weights it uses are frozen in it: the gradient reaches the samples and nothing else.
        """
        if step < self.config.discriminator_warmup:
            return None
        model = self.accelerator.unwrap_model(self.model)
        weights = {name: value.detach() for name, value in model.state_dict(keep_vars=True).items()}
        return lambda samples: torch.func.functional_call(model, weights, (samples,))

    def learn(
        self, step: int, pairs: Sequence[tuple[Tensor, Tensor]], failed: Tensor | None = None
    ) -> dict[str, Tensor]:
        """One step on batches of samples, each a pair (made, real) `[B, …]`, `[B', …]`; returns its metrics, or nothing
        where it is not its turn. The weights are left alone where the gradient is not finite or `failed` is 1."""
        if step % self.config.discriminator_every:
            return {}
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        total = sum(len(made) for made, _ in pairs)
        sums: dict[str, Tensor] = {}
        for i, (made, real) in enumerate(pairs):
            share = len(made) / total
            with self.accelerator.no_sync(self.model) if i + 1 < len(pairs) else contextlib.nullcontext():
                loss, metrics = self.loss(made, real)
                self.accelerator.backward(loss * share)
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0) + share * value.detach()
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip)
        bad = not_finite(norm)
        self.optimizer.optimizer.found_inf = bad if failed is None else torch.maximum(failed, bad)
        self.optimizer.step()
        return {f"discriminator/{name}": value for name, value in (sums | {"grad_norm": norm}).items()}

    def loss(self, made: Tensor, real: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What it learns from, and its metrics: the hinge, and R1 where that has a weight."""
        real = real.detach().requires_grad_(self.config.gradient_penalty > 0)
        logits = self.model(torch.cat([real, made.detach()]))
        of_real, of_made = logits.split([len(real), len(made)])
        hinge = discriminator_hinge(of_real, of_made)
        metrics = {"loss": hinge, "real": of_real.mean(), "made": of_made.mean()}
        if not self.config.gradient_penalty:
            return hinge, metrics
        # R1 of Mescheder et al. 2018, arXiv 1801.04406
        (gradient,) = torch.autograd.grad(of_real.sum(), real, create_graph=True)
        metrics["penalty"] = gradient.square().sum(dim=tuple(range(1, real.ndim))).mean() / 2
        return hinge + self.config.gradient_penalty * metrics["penalty"], metrics

    def state_dict(self) -> dict[str, Any]:
        model = self.accelerator.unwrap_model(self.model)
        return {"model": model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.accelerator.unwrap_model(self.model).load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
