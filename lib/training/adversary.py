"""The discriminator's side of training: its optimizer and its steps."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lib.training.config import AdversaryConfig
from lib.training.learner import accumulate_gradients, step_unless
from lib.training.losses import Critic, discriminator_hinge
from lib.training.nonfinite import not_finite


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
        means = accumulate_gradients(self.accelerator, self.model, batches, lambda batch: self.loss(*batch))
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip)
        bad = not_finite(norm)
        step_unless(bad if failed is None else torch.maximum(failed, bad), self.optimizer)
        return {f"discriminator/{name}": value for name, value in (means | {"grad_norm": norm}).items()}

    def loss(self, fake: Tensor, real: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The hinge loss, and its metrics."""
        logits = self.model(torch.cat([real, fake]).detach())
        of_real, of_fake = logits.split([len(real), len(fake)])
        hinge = discriminator_hinge(of_real, of_fake)
        return hinge, {"loss": hinge, "real": of_real.mean(), "fake": of_fake.mean()}

    def state_dict(self) -> dict[str, Any]:
        model = self.accelerator.unwrap_model(self.model)
        return {"model": model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.accelerator.unwrap_model(self.model).load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
