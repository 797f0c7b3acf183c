"""The settings of a run of the notebooks: four presets, whose sections nest, with their values in presets.toml.

The address of a setting is its attribute path: `load_preset("demo", {"train.max_steps": 40})` or
`--set train.max_steps=40` sets `preset.train.max_steps`.
"""

import dataclasses
import difflib
import functools
import re
import tomllib
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

from lib.data.pairs import MODES
from lib.lab.ablation import Plan
from lib.lab.variants import SETS
from lib.model.cascade import CascadeConfig
from lib.model.masks import MaskingConfig
from lib.superres.training import PLANS
from lib.superres.training import Plan as SuperresPlan
from lib.training.config import TrainConfig
from lib.util.configs import Count, NonNegative, Positive, Whole, check, checked_dataclass, choice, flat
from lib.util.errors import UserError
from lib.util.files import FIX, naming


@checked_dataclass
class DataSettings:
    clip_seconds: Positive  # of training clips
    pair_mode: choice(MODES) = "auto"
    seed: Whole = 0  # of the pairs, and of the demo songs


@checked_dataclass
class ModelSettings:
    num_layers: Count
    num_stages: Whole = 2
    anti_cheating: NonNegative = 0.0
    masking: MaskingConfig = MaskingConfig("learned")

    def __post_init__(self):
        _ = self.cascade  # refuses what no cascade can be built from

    @property
    def cascade(self) -> CascadeConfig:
        return CascadeConfig.reference(self.num_stages, anti_cheating=self.anti_cheating, num_layers=self.num_layers)


@checked_dataclass
class ListeningSettings:
    """The clips that notebook 05 plays, and those that training writes."""

    seconds: Positive
    pairs: Count = 3
    every: Count = 1  # epochs between the clips that training writes


@checked_dataclass
class EvaluationSettings:
    pairs: Count = 24  # validation pairs, spread evenly, on which outputs are measured


@checked_dataclass
class AblationSettings:
    """Notebook 02."""

    variants: choice(SETS) = "named"
    layers: Count = 2
    steps: Count = 50
    seeds: Count = 3
    clip_seconds: Positive = 1.0
    batch_size: Count = 4
    val_pairs: Count = 32

    @property
    def plan(self) -> Plan:
        """Its reference trains as the source documents say, in float32, whatever the preset's own training does."""
        length = {"epochs": 1_000_000, "max_steps": self.steps, "checkpoint_every": min(self.steps, 500)}
        reference = TrainConfig(**length, batch_size=self.batch_size, max_val_pairs=self.val_pairs)
        return Plan(SETS[self.variants], self.layers, self.seeds, reference)


@checked_dataclass
class SuperresSettings:
    """Notebook 06: super-resolution."""

    plan: choice(PLANS) = "small"  # sizes of its parts, in PLANS
    completion_steps: Count = 120
    vae_steps: Count = 60
    steps: Count = 100  # of the diffusion model
    vocoder_steps: Whole = 0  # of HiFi-GAN; 0: Griffin-Lim, which needs no training
    sampler_steps: Count = 10
    clips: Count = 16  # at each cutoff, on which methods are compared
    # the most of every part, where the plan has more
    clip_seconds: Positive | None = None
    batch_size: Count | None = None
    examples: Count | None = None  # for training, and for validation

    def __post_init__(self):
        self.training_plan(seed=0)  # refuses steps of a vocoder that the plan does not train

    def training_plan(self, seed: int) -> SuperresPlan:
        steps = self.completion_steps, self.vae_steps, self.steps, self.vocoder_steps
        most = {"clip_seconds": self.clip_seconds, "batch_size": self.batch_size}
        most |= {"examples": self.examples, "val_examples": self.examples}
        return PLANS[self.plan].lasting(*steps, seed=seed, **{name: x for name, x in most.items() if x is not None})


@checked_dataclass
class Preset:
    """All settings, by section."""

    name: str
    codec: str  # a name, a folder with weights, or module:Class
    data: DataSettings
    model: ModelSettings
    train: TrainConfig
    listening: ListeningSettings
    evaluation: EvaluationSettings = EvaluationSettings()
    ablation: AblationSettings = AblationSettings()
    superres: SuperresSettings = SuperresSettings()
    record: dict[str, Any] = field(default_factory=dict)  # of `make record`: `tests/record` knows them

    def __post_init__(self):
        self.train.check_model(self.model.cascade, self.model.masking)


def _read_presets(codec: str | None = None) -> dict[str, Preset]:
    """All presets, with `codec` instead of their own."""
    path, presets = Path(__file__).with_suffix(".toml"), {}
    with naming(path, FIX):
        content = tomllib.loads(path.read_text())
        common, other_codecs = content.pop("common"), content.pop("other_codecs")
    for name, own in content.items():
        with naming(f"{path}, preset {name}", FIX):
            own |= {"codec": codec or own["codec"]}
            suited = common if own["codec"] == "mdct" else _merged(common, other_codecs)
            presets[name] = Preset(name=name, **_merged(suited, own))
    return presets


def _merged(common: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    both = common.keys() & {name for name, value in own.items() if isinstance(value, dict)}
    return common | own | {name: _merged(common[name], own[name]) for name in both}


PRESETS = _read_presets()


def load_preset(name: str, overrides: Mapping[str, Any] | None = None) -> Preset:
    """A preset `with_changes`; its model is one that suits the codec, unless the preset or the changes say otherwise.
    `UserError` lists the choices for an unknown name or value."""
    overrides = overrides or {}
    check(isinstance(overrides, Mapping), "overrides", overrides, "a mapping: papermill -y 'overrides: {name: value}'")
    if name not in PRESETS:
        raise UserError(f"preset: unknown {name!r}; choose one of {', '.join(PRESETS)}")
    preset = PRESETS[name]
    if (codec := overrides.get("codec", preset.codec)) != preset.codec:
        preset = _read_presets("mdct" if codec == "mdct" else "encodec")[name]
    return with_changes(preset, overrides)


def with_changes(preset: Preset, overrides: Mapping[str, Any]) -> Preset:
    """The preset with some settings changed, by address."""
    values = dataclasses.asdict(preset)
    known = [address for address in flat(values) if address != "name"] + ["train.loss.own"]  # which is empty
    for address, value in overrides.items():
        if address not in known:
            raise UserError(f"setting {address} {_advice(address, known)}")
        # YAML 1.1 takes 1e-4 and 1.0e9 for text, because they lack a dot or a sign
        number = isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value)
        *sections, setting = address.split(".")
        functools.reduce(dict.__getitem__, sections, values)[setting] = float(value) if number else value
    return Preset(**values)


def _advice(name: str, known: list[str]) -> str:
    """What to write instead of a name that is not an address."""
    if inside := [address for address in known if address.startswith(f"{name}.")]:
        return f"is a section; choose from {', '.join(inside)}"
    names = {address.rpartition(".")[2]: address for address in known} | {address: address for address in known}
    if close := difflib.get_close_matches(name, names, n=3):
        return f"is unknown; did you mean {' or '.join(dict.fromkeys(names[match] for match in close))}?"
    return f"is unknown; choose from {', '.join(known)}"
