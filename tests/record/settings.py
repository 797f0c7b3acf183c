"""The settings of a record: section 'record' of a preset."""

import dataclasses

from lib.lab.ablation import Plan
from lib.lab.variants import SCHEDULED, SETS
from lib.presets import Preset, load_preset
from lib.training.config import CurriculumConfig
from lib.util.configs import Count, checked_dataclass, choice, from_fields


@checked_dataclass
class ScheduleSettings:
    """The whole system over a whole schedule in miniature, on few and short clips."""

    epochs: Count
    pairs: Count
    batch_size: Count
    layers: Count
    seeds: Count
    val_pairs: Count

    @property
    def plan(self) -> Plan:
        """The objective and discriminator of the source documents' system with everything that their schedule has."""
        sizes = {"batch_size": self.batch_size, "max_train_pairs": self.pairs, "max_val_pairs": self.val_pairs}
        length = {"epochs": self.epochs, "max_steps": None, "patience": None, "accumulate": 1, "checkpoint_every": 500}
        schedule = {"warmup_steps": 20, "schedule": "cosine", "ema": 0.99}
        # noise that reaches its ceiling after 160 epochs, targets that change places
        schedule["curriculum"] = CurriculumConfig(noise_rate=0.002, noise_start=10, target_shuffling=0.25)
        reference = load_preset("reference")
        scheduled = dataclasses.replace(reference.train, precision="fp32", **sizes, **length, **schedule)
        return Plan(SCHEDULED, self.layers, self.seeds, scheduled, reference.model.masking)


@checked_dataclass
class ExplosionSettings:
    """What ends a training, and what does not."""

    steps: Count
    longer: Count  # steps of the runs that follow source document 003
    seeds: Count


@checked_dataclass
class RecordSettings:
    """Section 'record' of a preset: runs are longer, and the named settings are added at full depth."""

    variants: choice(SETS)
    steps: Count
    superres_completion_steps: Count
    superres_vae_steps: Count
    superres_steps: Count  # of each diffusion model
    superres_seeds: Count
    superres_clips: Count
    data_seeds: Count  # each with its own songs, combined with each of `seeds`
    seeds: Count  # training seeds; 1 and 1: no variations
    seeds_on_music: Count  # training seeds on real music, each trained for ...
    steps_on_music: Count  # ... so many steps
    schedule: ScheduleSettings
    explosion: ExplosionSettings


def settings_of(preset: Preset) -> RecordSettings:
    """`UserError` names a setting that is unknown, or a value that is not allowed."""
    return from_fields(RecordSettings, preset.record)
