"""How to train: every setting of the loop, its reason beside its default."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from lib.model.masks import MaskingConfig
from lib.training.adversary import AdversaryConfig
from lib.training.curriculum import CurriculumConfig
from lib.training.losses import MASK_TERMS, LossConfig
from lib.util.configs import check, check_counts, check_numbers, is_finite
from lib.util.errors import UserError

PRECISIONS = ("fp32", "bf16", "auto")
SCHEDULES = ("constant", "cosine")
LENGTH = ("epochs", "max_steps", "patience")  # a resumed run may be made longer or shorter
WITHOUT_EFFECT = ("num_workers", "cpu_threads", "gather_every")  # on what a run computes: may change as well
NESTED = {"loss": LossConfig, "curriculum": CurriculumConfig, "adversary": AdversaryConfig}


@dataclass(frozen=True)
class LoopConfig:
    """What every training has, whatever it trains. It ends after `epochs`, `max_steps` or for lack of `patience`,
    whichever comes first."""

    epochs: int = 200
    max_steps: int | None = None
    patience: int | None = None  # validations in a row without a lower loss, after which training ends; None: never
    batch_size: int = 8  # pairs in each process's batch
    accumulate: int = 1  # batches of each process to one step: a larger batch in the same memory
    learning_rate: float = 1e-4
    warmup_steps: int = 0  # in which the learning rate rises from 0
    schedule: str = "constant"  # 'cosine': down to 0 at the end of training
    weight_decay: float = 0.01
    clip: float | None = 10.0  # gradient norm above which gradients are scaled down; None: never
    ema: float = 0.0  # decay of the averaged weights that are validated and kept; 0: no average
    precision: str = "fp32"  # 'bf16': autocast; 'auto': that where the hardware computes in it, else fp32
    checkpoint_every: int = 100  # steps between validations, each of which writes a checkpoint
    max_train_pairs: int | None = None  # train on so many pairs at most, spread evenly over all; None: on all
    max_val_pairs: int | None = None  # validate on so many pairs at most, spread likewise
    num_workers: int = 1  # threads that read the data of the next steps; a fast GPU needs more than one
    cpu_threads: int | None = None  # of torch where it computes on a CPU; None: its own choice. Small steps like one
    gather_every: int = 1  # steps, or fewer where an epoch ends, between transfers of the metrics: a GPU waits in each
    compile: bool = False  # torch.compile: minutes at the start; measured slower on a CPU
    seed: int = 0

    def __post_init__(self):
        check_counts(self, "epochs", "batch_size", "accumulate", "checkpoint_every", "num_workers", "gather_every")
        check_counts(self, "max_steps", "patience", "cpu_threads", "max_train_pairs", "max_val_pairs", optional=True)
        check_counts(self, "warmup_steps", "seed", least=0)
        check(isinstance(self.compile, bool), "compile", self.compile, "true or false")
        check(self.seed < 2**31, "seed", self.seed, "a whole number below 2³¹")
        check_numbers(self, "learning_rate", above=0)
        check_numbers(self, "weight_decay")
        if self.clip is not None:
            check_numbers(self, "clip", above=0)
        check(is_finite(self.ema) and 0 <= self.ema < 1, "ema", self.ema, "a decay from 0 to below 1")
        for name, choices in (("precision", PRECISIONS), ("schedule", SCHEDULES)):
            check(getattr(self, name) in choices, name, getattr(self, name), f"one of {', '.join(choices)}")

    @property
    def max_norm(self) -> float:
        """What gradients are clipped to; infinite where they never are."""
        return self.clip if self.clip is not None else math.inf

    @property
    def target_shuffling(self) -> float:
        """Share of the pairs of an epoch whose targets change places."""
        return 0.0

    def check_sizes(self, pairs: dict[str, int], processes: int = 1) -> None:
        """`UserError` where there are too few pairs, by split, for one step of so many processes."""
        for split, count in pairs.items():
            if count == 0:
                raise UserError(f"the {split} split has no pairs; add music, or lower the clip length")
        available = min(pairs["train"], self.max_train_pairs or pairs["train"])
        if self.batch_size * self.accumulate * processes > available:
            parts = f"batch_size={self.batch_size}"
            parts += f" × accumulate={self.accumulate}" * (self.accumulate > 1)
            parts += f" × {processes} processes" * (processes > 1)
            raise UserError(f"{parts} is more than the {available} training pairs; lower it")

    def memory_advice(self, clip_seconds: float) -> str:
        """What to lower where memory runs out: batch, precision or clip length."""
        advice = []
        if self.batch_size > 1:
            half = math.ceil(self.batch_size / 2)
            advice.append(f"lower batch_size (now {self.batch_size})")
            advice.append(f"batch_size={half} with accumulate={2 * self.accumulate} trains alike")
        if self.precision == "fp32":
            advice.append("set precision to bf16 (now fp32)")
        return "; ".join([*advice, f"{'or ' if advice else ''}lower clip_seconds (now {clip_seconds:g})"])


@dataclass(frozen=True)
class TrainConfig(LoopConfig):
    """How to train the fusion model."""

    agent_learning_rate: float | None = None  # of the mask generator, which has no residual to start from; None: same
    loss: LossConfig = field(default_factory=LossConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    adversary: AdversaryConfig = field(default_factory=AdversaryConfig)

    def __post_init__(self):
        for name, cls in NESTED.items():
            value = getattr(self, name)
            if isinstance(value, dict):
                object.__setattr__(self, name, _partly(cls, name, value))
        super().__post_init__()
        if self.agent_learning_rate is not None:
            check_numbers(self, "agent_learning_rate", above=0)
        if self.loss.adversarial_weight and self.adversary.discriminator_learning_rate is None:
            weight = self.loss.adversarial_weight
            raise UserError(
                f"adversarial_weight={weight:g} needs a discriminator: set discriminator_learning_rate, such as 1e-4"
            )

    @property
    def target_shuffling(self) -> float:
        return self.curriculum.target_shuffling

    def check_masking(self, masking: MaskingConfig) -> None:
        """`UserError` where a term on masks has a weight and there are no masks."""
        if masking.masking == "none" and (terms := self.loss.weighted(MASK_TERMS)):
            raise UserError(f"{terms[0]}_weight needs masks: set masking='learned', or the weight to 0")


def _partly(cls: type, name: str, values: dict[str, Any]) -> Any:
    try:
        return cls(**values)
    except TypeError:
        unknown = sorted(set(values) - set(cls.__dataclass_fields__))
        known = ", ".join(cls.__dataclass_fields__)
        raise UserError(f"{name}: unknown {', '.join(unknown)}; choose from {known}") from None


def resolved_precision(precision: str) -> str:
    """'fp32' or 'bf16'; for 'auto' what this machine's matrix products are fast in."""
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu._is_amx_tile_supported() else "fp32"
