"""The variants of the ablation, as data: each is a change of the two-stage reference, with a name.

To add one, add a `Variant` to the tuple of its group. `factor` names the group: what its members change, or 'named',
the settings that the seeds describe; 'protection', a 2×2×2 of the three protections on the exploding cascade; 'cause',
a 2×2×2 of the three causes that the seeds name; 'weak residual', ways to keep one; 'schedule', whole training runs.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lib.model.cascade import CascadeConfig
from lib.model.projection import rms_ceiling
from lib.model.rms_law import LATENT_RMS, initial_projection_rms
from lib.training.config import TrainConfig

REFERENCE = "final 2-stage"
EXPLODING = "exploding 3-stage"
REPAIR = "0.3× repair"
LEARNABLE = "learnable scalars"


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
        config = CascadeConfig.reference(self.stages, num_layers=num_layers, **self.every)
        return config.with_stage(-1, **self.last)

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


WEAK = {"residual_weight": 0.1, "residual_source": "previous"}  # the third stage of seeds 001 and 002
NO_MSE = {"input_weight": 0.0, "target_weight": 0.0}

# Seed 003 names neither spectral norm nor a clamp: both came after it, with the 'triple protection' of seed 002.
SEED_003 = {"rms_scaling": "learnable", "clamp": None, "spectral_norm": False}

NAMED = (
    Variant(REFERENCE, "named"),
    Variant(EXPLODING, "named", stages=3, last=WEAK),
    Variant(REPAIR, "named", stages=3, last=WEAK | {"residual_weight": 0.3}, train={"clip": 5.0}),
    Variant(LEARNABLE, "named", every=SEED_003, last={"residual_weight": 0.1}, train={"clip": 1.0}),
)

SINGLE_CHANGES = (
    *(Variant(f"{count} stages", "stages", stages=count) for count in (3, 4, 5)),
    *(Variant(f"last residual {w}", "last residual", last={"residual_weight": w}) for w in (0.1, 0.2, 0.3)),
    Variant("residual from previous", "residual source", last={"residual_source": "previous"}),
    Variant("no spectral norm", "spectral norm", every={"spectral_norm": False}),
    Variant("no clamp", "clamp", every={"clamp": None}),
    Variant("learnable RMS", "RMS scaling", every={"rms_scaling": "learnable"}),
    Variant("no RMS scaling", "RMS scaling", every={"rms_scaling": "off"}),
    Variant("clip 1", "clipping", train={"clip": 1.0}),
    Variant("clip 5", "clipping", train={"clip": 5.0}),
    Variant("no clipping", "clipping", train={"clip": None}),
    Variant("stage 1 at 512", "width", last={"width": 512}),
    Variant("learning rate 3e-4", "learning rate", train={"learning_rate": 3e-4}),
    Variant("learning rate 1e-3", "learning rate", train={"learning_rate": 1e-3}),
    Variant("RMS loss", "objective", loss=NO_MSE | {"input_rms_weight": 0.3, "target_rms_weight": 0.3}),
    Variant("anti-modulation corr²", "objective", loss={"anti_modulation_weight": 1.0}),
    Variant("anti-modulation log", "objective", loss={"anti_modulation_weight": 1.0, "anti_modulation": "log"}),
)


def _protection(norm: bool, clamp: bool, clip: bool) -> Variant:
    on = " + ".join(itertools.compress(PROTECTION_NAMES, (norm, clamp, clip))) or "no protection"
    every = ({} if norm else {"spectral_norm": False}) | ({} if clamp else {"clamp": None})
    train = {} if clip else {"clip": None}
    return Variant(f"exploding, {on}", "protection", stages=3, every=every, last=WEAK, train=train)


PROTECTION_NAMES = ("norm", "clamp", "clipping")
PROTECTIONS = {cell: _protection(*cell) for cell in itertools.product((False, True), repeat=3)}


def _cause(weak: bool, learnable: bool, log_penalty: bool) -> Variant:
    """Three stages without a clamp: a clamped scale passes no gradient to the learnable scalars."""
    on = " + ".join(itertools.compress(("weak", "learnable", "log penalty"), (weak, learnable, log_penalty))) or "none"
    every = {"clamp": None} | ({"rms_scaling": "learnable"} if learnable else {})
    loss = {"anti_modulation_weight": 1.0, "anti_modulation": "log"} if log_penalty else {}
    return Variant(f"causes: {on}", "cause", stages=3, every=every, last=WEAK if weak else {}, loss=loss)


CAUSE_NAMES = ("weak residual", "learnable scalars", "log penalty")
CAUSES = {cell: _cause(*cell) for cell in itertools.product((False, True), repeat=3)}

# A weak residual without the collapse: the third stage stays at 0.1×, a gain on its projection brings the missing RMS.
CEILING_GAIN = LATENT_RMS / rms_ceiling(384, 128)  # full RMS once training has lifted the projection to its ceiling
START_GAIN = LATENT_RMS / initial_projection_rms(384, 128)  # full RMS from the first step

PRESERVING = {"projection_gain": START_GAIN, "mixing": "preserving"}

WEAK_RESIDUALS = (
    Variant("weak, gain to the ceiling", "weak residual", stages=3, last=WEAK | {"projection_gain": CEILING_GAIN}),
    Variant("weak, gain from the start", "weak residual", stages=3, last=WEAK | {"projection_gain": START_GAIN}),
    Variant("weak, RMS-preserving", "weak residual", stages=3, last=WEAK | PRESERVING),
    Variant("weak, no clamp in stage 2", "weak residual", stages=3, last=WEAK | {"clamp": None}),
)

# The whole system, trained over a whole schedule: masks, losses in three domains, discriminator, curriculum. 'Creative
# terms alone' is the model of seed 003, with a 0.1× residual in the last of two stages; the others are its cures.
WHOLE, WHOLE_3 = "whole system", "whole system, 3 stages"
CREATIVE, RECONSTRUCTION = "creative terms alone", "creative terms, reconstruction"
NOVELTY, RESIDUAL = "creative terms, novelty 0.6", "creative terms, residual 0.3"
CREATIVE_TERMS = NO_MSE | {"novelty_weight": 0.85, "anti_modulation_weight": 0.5}
CREATIVE_TERMS |= dict.fromkeys(("stft_weight", "mel_weight", "rhythm_weight", "harmony_weight"), 0.0)
CLOSE_TERMS = CREATIVE_TERMS | {"input_weight": 0.03, "target_weight": 0.03}
WEAK_LAST = {"residual_weight": 0.1}

SCHEDULED = (
    Variant(WHOLE, "schedule"),
    Variant(WHOLE_3, "schedule", stages=3, last=WEAK),
    Variant(CREATIVE, "schedule", last=WEAK_LAST, loss=CREATIVE_TERMS),
    Variant(RECONSTRUCTION, "schedule", last=WEAK_LAST, loss=CLOSE_TERMS),
    Variant(NOVELTY, "schedule", last=WEAK_LAST, loss=CREATIVE_TERMS | {"novelty_weight": 0.6}),
    Variant(RESIDUAL, "schedule", last={"residual_weight": 0.3}, loss=CREATIVE_TERMS),
)

VARIANTS = (*NAMED, *SINGLE_CHANGES, *PROTECTIONS.values(), *CAUSES.values(), *WEAK_RESIDUALS)
SETS = {"named": NAMED, "all": VARIANTS}
