"""Every setting of training, with the reason beside its default; those of the objective are in `losses`."""

import math
from dataclasses import field

import torch

from lib.model.cascade import CascadeConfig
from lib.model.masks import GENERATORS, MaskingConfig
from lib.training.losses import MASK_TERMS, LossConfig
from lib.util.configs import Count, Flag, Fraction, NonNegative, Positive, Seed, Share, Whole, checked_dataclass, choice
from lib.util.errors import UserError

LENGTH = ("epochs", "max_steps", "patience")  # may change on resuming: the run becomes longer or shorter
WITHOUT_EFFECT = ("num_workers", "cpu_threads", "gather_every")  # on what a run computes, so these may change too


@checked_dataclass
class LoopConfig:
    """Settings of every training, which ends by `epochs`, `max_steps` or `patience`, whichever comes first."""

    epochs: Count = 200
    max_steps: Count | None = None
    patience: Count | None = None  # validations in a row without a new lowest loss that end training; None: never
    batch_size: Count = 8  # pairs in each process's batch
    accumulate: Count = 1  # batches of each process in one step: a larger batch in the same memory
    learning_rate: Positive = 1e-4
    warmup_steps: Whole = 0  # during which the learning rate rises from 0
    schedule: choice(("constant", "cosine")) = "constant"  # 'cosine': down to 0 at the end of training
    weight_decay: NonNegative = 0.01
    clip: Positive | None = 10.0  # gradient norm above which gradients are scaled down; None: never
    ema: Fraction = 0.0  # decay of the EMA weights, which are validated and saved; 0: no EMA
    precision: choice(("fp32", "bf16", "auto")) = "fp32"  # autocast; 'auto': where hardware has it
    checkpoint_every: Count = 100  # steps between validations, each of which writes a checkpoint
    max_train_pairs: Count | None = None  # train on at most this many pairs, spread evenly over all; None: on all
    max_val_pairs: Count | None = None  # validate on at most this many pairs, spread likewise
    num_workers: Count = 1  # threads that prefetch batches; a fast GPU needs more than one
    cpu_threads: Count | None = None  # of torch on a CPU; None: its own choice. Small steps are fastest with one
    gather_every: Count = 1  # steps between transfers of the metrics, for each of which a GPU waits
    compile: Flag = False  # torch.compile: minutes at the start; measured slower on a CPU
    seed: Seed = 0

    target_shuffling = 0.0  # no field: only `TrainConfig` has a curriculum

    @property
    def max_norm(self) -> float:
        """The norm that gradients are clipped to; infinite if they never are."""
        return self.clip or math.inf

    def check_sizes(self, pairs: dict[str, int], processes: int = 1) -> None:
        """`UserError` if a split has no pairs, or too few for one step of so many processes."""
        for split, count in pairs.items():
            if count == 0:
                raise UserError(f"the {split} split has no pairs; add music, or lower the clip length")
        available = min(pairs["train"], self.max_train_pairs or pairs["train"])
        if self.batch_size * self.accumulate * processes > available:
            parts = f"batch_size={self.batch_size}" + f" × accumulate={self.accumulate}" * (self.accumulate > 1)
            parts += f" × {processes} processes" * (processes > 1)
            raise UserError(f"{parts} is more than the {available} training pairs; lower it")

    def memory_advice(self, clip_seconds: float) -> str:
        """What to lower when memory runs out: batch, precision or clip length."""
        half = f"batch_size={math.ceil(self.batch_size / 2)} with accumulate={2 * self.accumulate} trains alike"
        advice = [f"lower batch_size (now {self.batch_size})", half] if self.batch_size > 1 else []
        if self.precision == "fp32":
            advice.append("set precision to bf16 (now fp32)")
        return "; ".join([*advice, f"{'or ' if advice else ''}lower clip_seconds (now {clip_seconds:g})"])


@checked_dataclass
class CurriculumConfig:
    """What makes the task harder over the epochs: growing noise, and targets taken from other pairs."""

    noise_rate: NonNegative = 0.0  # growth of the noise share an epoch; 0: no noise
    noise_ceiling: Share = 0.3  # the share at which it stops growing
    noise_start: Whole = 0  # epoch in which it is still 0
    target_shuffling: Share = 0.0  # share of the pairs of an epoch whose targets change places

    def noise_share(self, epoch: float) -> float:
        """α = min(ceiling, rate · epochs since the start), 0 before it."""
        return min(self.noise_ceiling, self.noise_rate * max(0.0, epoch - self.noise_start))


@checked_dataclass
class AdversaryConfig:
    """How the discriminator is trained. Without a learning rate there is none."""

    discriminator_learning_rate: Positive | None = None
    discriminator_warmup: Whole = 0  # steps in which it is trained, but the model's loss does not use it yet


@checked_dataclass
class TrainConfig(LoopConfig):
    """How to train the fusion model."""

    agent_learning_rate: Positive | None = None  # of the mask generator, which has no residual; None: the same
    loss: LossConfig = field(default_factory=LossConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    adversary: AdversaryConfig = field(default_factory=AdversaryConfig)

    def __post_init__(self):
        if self.loss.adversarial_weight and self.adversary.discriminator_learning_rate is None:
            weight = f"adversarial_weight={self.loss.adversarial_weight:g}"
            raise UserError(f"{weight} needs a discriminator: set discriminator_learning_rate, such as 1e-4")

    @property
    def target_shuffling(self) -> float:
        return self.curriculum.target_shuffling

    def check_model(self, cascade: CascadeConfig, masking: MaskingConfig) -> None:
        """`UserError` if there is nothing to train, or if a term on masks has a weight and there are no masks."""
        if not cascade.stages and masking.masking not in GENERATORS:
            raise UserError(f"num_stages=0 with masking={masking.masking!r} leaves nothing to train; set one or more")
        if masking.masking == "none" and (terms := self.loss.weighted(MASK_TERMS)):
            raise UserError(f"{terms[0]}_weight needs masks: set masking='learned', or the weight to 0")


def resolved_precision(precision: str) -> str:
    """'fp32' or 'bf16'; for 'auto' the one in which this machine multiplies matrices fast."""
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu.get_capabilities().get("amx_tile") else "fp32"
