"""The variants of the ablation, each a change of the two-stage reference. A new one is an entry in variants.toml."""

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib.model.cascade import CascadeConfig
from lib.model.projection import rms_ceiling
from lib.model.rms_law import LATENT_RMS, initial_projection_rms
from lib.training.config import TrainConfig
from lib.util.configs import read_entries

REFERENCE, EXPLODING = "final 2-stage", "exploding 3-stage"
REPAIR, LEARNABLE = "0.3× repair", "learnable scalars"


@dataclass(frozen=True)
class Variant:
    """One setting, as its differences from the reference."""

    name: str
    factor: str
    stages: int = 2
    every: Mapping[str, Any] = field(default_factory=dict)  # fields of StageConfig
    last: Mapping[str, Any] = field(default_factory=dict)  # fields of StageConfig
    train: Mapping[str, Any] = field(default_factory=dict)  # fields of TrainConfig
    loss: Mapping[str, Any] = field(default_factory=dict)  # fields of LossConfig

    def cascade(self, num_layers: int) -> CascadeConfig:
        """The config; some variants collapse on purpose."""
        return CascadeConfig.reference(self.stages, num_layers=num_layers, **self.every).with_stage(-1, **self.last)

    @property
    def changes(self) -> str:
        """The differences in words: '3 stages; last residual_weight=0.1; clip=5.0'."""
        parts = [f"{self.stages} stages"] if self.stages != 2 else []
        for where, fields in (("every", self.every), ("last", self.last), ("", self.train), ("", self.loss)):
            for name, value in fields.items():
                shown = f"{value:.3g}" if isinstance(value, float) else value
                parts.append(f"{where} {name}={shown}".strip())
        return "; ".join(parts) or "nothing: the reference"

    def training(self, base: TrainConfig) -> TrainConfig:
        return dataclasses.replace(base, loss=dataclasses.replace(base.loss, **self.loss), **self.train)


# A weak residual without the collapse: the third stage stays at 0.1×, a gain on its projection brings the missing RMS.
CEILING_GAIN = LATENT_RMS / rms_ceiling(384, 128)  # full RMS once training has lifted the projection to its ceiling
START_GAIN = LATENT_RMS / initial_projection_rms(384, 128)  # full RMS from the first step
WORDS = {"none": None, "to the ceiling": CEILING_GAIN, "from the start": START_GAIN}  # for values in variants.toml


def _variant(name: str, **fields: Any) -> Variant:
    parts = {part: changes for part, changes in fields.items() if isinstance(changes, dict)}
    return Variant(name, **fields | {p: {k: WORDS.get(v, v) for k, v in part.items()} for p, part in parts.items()})


_READ = tuple(read_entries(Path(__file__).with_suffix(".toml"), _variant).values())
_GROUPS = ("named", "protection", "cause", "weak residual", "schedule")
NAMED, _PROTECTIONS, _CAUSES, WEAK_RESIDUALS, SCHEDULED = (tuple(v for v in _READ if v.factor == g) for g in _GROUPS)
SINGLE_CHANGES = tuple(variant for variant in _READ if variant.factor not in _GROUPS)
VARIANTS = tuple(variant for variant in _READ if variant.factor != "schedule")
SETS = {"named": NAMED, "all": VARIANTS}

# cells of two factorials: which of its factors are on → variant
PROTECTION_NAMES = ("norm", "clamp", "clipping")
CAUSE_NAMES = ("weak residual", "learnable scalars", "log penalty")
_LEVELS = tuple(itertools.product((False, True), repeat=3))
PROTECTIONS, CAUSES = (dict(zip(_LEVELS, variants, strict=True)) for variants in (_PROTECTIONS, _CAUSES))
