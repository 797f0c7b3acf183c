"""What a notebook runs with: the presets, and the project folder that one of them works in.

`load_preset` gives the settings, `open_project` the data, codec and latents that go with them. Every notebook starts
with both, so that each can be run alone; what an earlier notebook has prepared is found and reused.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from lib.lab.ablation import Plan
from lib.lab.variants import SCHEDULED, chosen_variants
from lib.model.cascade import CascadeConfig
from lib.model.masks import MaskingConfig
from lib.superres.training import FULL_PLAN, SMALL_PLAN
from lib.superres.training import Plan as SuperresPlan
from lib.training.adversary import AdversaryConfig
from lib.training.config import NESTED, TrainConfig
from lib.training.curriculum import CurriculumConfig
from lib.training.losses import LossConfig
from lib.util.configs import check, check_counts
from lib.util.errors import UserError

PLANS = {"small": SMALL_PLAN, "full": FULL_PLAN}


@dataclass(frozen=True)
class Preset:
    """All settings of a run of the notebooks. Fields of the configs in it can be overridden by their own names."""

    name: str
    codec: str  # a name, or a folder with weights
    clip_seconds: float  # of training clips
    listen_seconds: float  # of the clips to listen to
    num_layers: int
    train: TrainConfig
    masking: MaskingConfig = field(default_factory=lambda: MaskingConfig("learned"))
    demo_every: int = 1  # epochs between clips to listen to, which training writes
    judged_pairs: int = 24  # validation pairs, spread evenly, on which outputs are compared by ear
    pair_mode: str = "auto"
    listen_pairs: int = 3
    num_stages: int = 2
    anti_cheating: float = 0.0
    data_seed: int = 0  # of the pairs, and of the demo songs
    # notebook 02: which variants, at which depth, for how long, on clips of which length
    ablation_variants: str = "named"
    ablation_layers: int = 2
    ablation_steps: int = 50
    ablation_seeds: int = 3
    ablation_clip_seconds: float = 1.0
    ablation_batch_size: int = 4
    ablation_val_pairs: int = 32
    # the whole system over a whole schedule, in miniature: 200 epochs on few and short clips
    schedule_epochs: int = 200
    schedule_pairs: int = 8
    schedule_batch_size: int = 2
    schedule_layers: int = 1
    schedule_seeds: int = 2
    # notebook 06: super-resolution
    superres_plan: str = "small"  # sizes of its parts, in PLANS
    superres_vae_steps: int = 140
    superres_steps: int = 280  # of the diffusion model
    superres_vocoder_steps: int = 10
    superres_sampler_steps: int = 10
    superres_clips: int = 16  # at each cutoff, on which methods are compared
    # of `make record`, whose runs are longer; it adds the named settings at full depth
    record_variants: str = "all"
    record_steps: int = 100
    record_superres_vae_steps: int = 600
    record_superres_steps: int = 800
    record_superres_seeds: int = 3  # with which both contexts are compared
    record_data_seeds: int = 3  # each with songs of its own, with each of
    record_seeds: int = 2  # training seeds; 1 and 1: no variations

    @property
    def plan(self) -> Plan:
        """The ablation. Its reference trains like the seeds' model, in float32, whatever `train` says."""
        reference = TrainConfig(
            epochs=1_000_000,  # the steps decide
            max_steps=self.ablation_steps,
            batch_size=self.ablation_batch_size,
            checkpoint_every=min(self.ablation_steps, 500),
            max_val_pairs=self.ablation_val_pairs,
        )
        variants = chosen_variants(self.ablation_variants)
        return Plan(variants, self.ablation_layers, self.ablation_seeds, reference)

    @property
    def schedule(self) -> Plan:
        """The preset's objective, discriminator and curriculum over `schedule_epochs`, with the longest schedule's
        settings: a warm-up, cosine, averaged weights, noise that reaches its ceiling, targets that change places."""
        train = dataclasses.replace(
            self.train,
            epochs=self.schedule_epochs,
            max_steps=None,
            patience=None,
            batch_size=self.schedule_batch_size,
            accumulate=1,
            warmup_steps=20,
            schedule="cosine",
            ema=0.99,
            precision="fp32",
            checkpoint_every=500,
            max_train_pairs=self.schedule_pairs,
            max_val_pairs=self.ablation_val_pairs,
            curriculum=CurriculumConfig(noise_rate=0.002, noise_start=10, target_shuffling=0.25),
        )
        return Plan(SCHEDULED, self.schedule_layers, self.schedule_seeds, train, MaskingConfig("learned"))

    @property
    def superres(self) -> SuperresPlan:
        """What notebook 06 trains."""
        steps = (self.superres_vae_steps, self.superres_steps, self.superres_vocoder_steps)
        return PLANS[self.superres_plan].lasting(*steps, seed=self.train.seed)

    @property
    def recorded_superres(self) -> SuperresPlan:
        """The same, autoencoder and diffusion models for as long as `make record` trains them."""
        steps = (self.record_superres_vae_steps, self.record_superres_steps, self.superres_vocoder_steps)
        return PLANS[self.superres_plan].lasting(*steps, seed=self.train.seed)

    @property
    def cascade(self) -> CascadeConfig:
        return CascadeConfig.reference(self.num_stages, anti_cheating=self.anti_cheating, num_layers=self.num_layers)


# What the notebooks train with. Squared errors alone are smallest at the plain average of both clips, with masks or
# without; small weights keep them as an anchor, and rhythm and harmony say what is to be taken from which clip.
OBJECTIVE = LossConfig(
    input_weight=0.03,
    target_weight=0.03,
    novelty_weight=1.0,
    adversarial_weight=0.05,
    stft_weight=0.1,
    mel_weight=0.1,
    rhythm_weight=1.0,
    harmony_weight=1.0,
    anti_modulation_weight=0.1,
    outlier_weight=0.1,
    overlap_weight=1.0,
    coverage_weight=1.0,
    balance_weight=1.0,
    temporal_diversity_weight=0.1,
)

PRESETS = {
    # seconds a cell: what the notebooks store and what nbval runs
    "smoke": Preset(
        name="smoke",
        codec="mdct",
        clip_seconds=2.0,
        listen_seconds=2.0,
        listen_pairs=1,
        num_layers=2,
        train=TrainConfig(
            max_steps=24,
            batch_size=4,
            agent_learning_rate=1e-3,
            warmup_steps=4,
            ema=0.9,
            checkpoint_every=12,
            max_val_pairs=16,
            loss=OBJECTIVE,
            adversary=AdversaryConfig(discriminator_learning_rate=1e-4, discriminator_warmup=8),
        ),
        judged_pairs=4,
        ablation_layers=1,
        ablation_steps=10,
        ablation_seeds=2,
        ablation_val_pairs=8,
        schedule_epochs=2,
        schedule_seeds=1,
        superres_vae_steps=4,
        superres_steps=4,
        superres_vocoder_steps=2,
        superres_sampler_steps=3,
        superres_clips=2,
        record_variants="named",
        record_steps=10,
        record_superres_vae_steps=6,
        record_superres_steps=6,
        record_superres_seeds=2,
        record_data_seeds=2,
        record_seeds=1,
    ),
    # the full model on short clips: a few minutes on two cores
    "demo": Preset(
        name="demo",
        codec="mdct",
        clip_seconds=4.0,
        listen_seconds=16.0,
        num_layers=6,
        train=TrainConfig(
            max_steps=60,
            batch_size=4,
            agent_learning_rate=1e-3,
            warmup_steps=5,
            ema=0.9,
            checkpoint_every=30,
            max_val_pairs=24,
            loss=OBJECTIVE,
            curriculum=CurriculumConfig(noise_rate=0.1),
            adversary=AdversaryConfig(discriminator_learning_rate=1e-4, discriminator_warmup=20),
        ),
    ),
    # a GPU server: the seeds' own setting
    "full": Preset(
        name="full",
        codec="encodec",
        clip_seconds=16.0,
        listen_seconds=16.0,
        listen_pairs=6,
        num_layers=6,
        train=TrainConfig(
            epochs=200,
            patience=20,
            batch_size=8,
            agent_learning_rate=1e-3,
            warmup_steps=500,
            schedule="cosine",
            ema=0.999,
            precision="auto",
            checkpoint_every=500,
            max_val_pairs=256,
            num_workers=4,
            gather_every=10,
            loss=OBJECTIVE,
            curriculum=CurriculumConfig(noise_rate=0.002, noise_start=10, target_shuffling=0.25),
            adversary=AdversaryConfig(discriminator_learning_rate=1e-4, discriminator_warmup=1000),
        ),
        demo_every=10,
        judged_pairs=128,
        ablation_variants="all",
        ablation_layers=6,
        ablation_steps=2000,
        ablation_seeds=5,
        ablation_clip_seconds=16.0,
        ablation_batch_size=8,
        ablation_val_pairs=64,
        schedule_pairs=256,
        schedule_batch_size=8,
        schedule_layers=6,
        superres_plan="full",
        superres_vae_steps=200_000,
        superres_steps=500_000,
        superres_vocoder_steps=500_000,
        superres_sampler_steps=50,
        superres_clips=64,
        record_steps=2000,
        record_superres_vae_steps=200_000,
        record_superres_steps=500_000,
        record_superres_seeds=1,
        record_data_seeds=1,
        record_seeds=1,
    ),
}


def load_preset(name: str, /, **overrides: Any) -> Preset:
    """A preset with some settings changed: `load_preset("demo", max_steps=40, codec="encodec")`.

    Unknown names and values of the wrong kind raise `UserError` with the choices.
    """
    if name not in PRESETS:
        raise UserError(f"preset: unknown {name!r}; choose one of {', '.join(PRESETS)}")
    preset = PRESETS[name]
    rooms = {"preset": preset, "masking": preset.masking, "train": preset.train}
    rooms |= {name: getattr(preset.train, name) for name in NESTED}
    where = {
        field.name: (room, field)
        for room, holder in rooms.items()
        for field in dataclasses.fields(holder)
        if not (room in ("preset", "train") and field.name in ("name", *rooms))
    }
    changes: dict[str, dict[str, Any]] = {room: {} for room in rooms}
    for key, value in overrides.items():
        if key not in where:
            raise UserError(f"setting: unknown {key!r}; choose from {', '.join(sorted(where))}")
        room, field = where[key]
        changes[room][key] = _as_type(key, value, field.type)
    nested = {name: dataclasses.replace(rooms[name], **changes[name]) for name in NESTED}
    train = dataclasses.replace(preset.train, **nested, **changes["train"])
    masking = dataclasses.replace(preset.masking, **changes["masking"])
    changed = dataclasses.replace(preset, train=train, masking=masking, **changes["preset"])
    train.check_masking(masking)
    for key, least in (
        ("clip_seconds", 0.0),
        ("listen_seconds", 0.0),
        ("listen_pairs", 0),
        ("demo_every", 0),
        ("judged_pairs", 0),
        ("ablation_clip_seconds", 0.0),
    ):
        if not getattr(changed, key) > least:
            raise UserError(f"{key}={getattr(changed, key)!r} is not allowed; use more than {least:g}")
    for field in dataclasses.fields(Preset):
        key = field.name
        counts = key.startswith(("ablation_", "record_", "schedule_", "superres_")) and field.type is int
        if counts and getattr(changed, key) < 1:
            raise UserError(f"{key}={getattr(changed, key)!r} is not allowed; use 1 or more")
    check_counts(changed, "data_seed", least=0)
    chosen_variants(changed.record_variants, "record_variants")
    check(changed.superres_plan in PLANS, "superres_plan", changed.superres_plan, f"one of {', '.join(PLANS)}")
    _ = changed.cascade, changed.plan, changed.schedule  # refuses what no cascade can be built from
    return changed


def _as_type(key: str, value: Any, annotation: Any) -> Any:
    """`value` as the field's type: 1 is a float too, 1e-4 read by YAML as text is a number."""
    kinds = getattr(annotation, "__args__", (annotation,))
    if value is None and type(None) in kinds:
        return None
    for kind in kinds:
        if kind is float and not isinstance(value, bool):
            try:
                return float(value)
            except (TypeError, ValueError, OverflowError):
                continue
        if kind is bool and isinstance(value, bool):
            return value
        if kind in (int, str) and isinstance(value, kind) and not isinstance(value, bool):
            return value
    wanted = " or ".join("none" if kind is type(None) else kind.__name__ for kind in kinds)
    raise UserError(f"setting {key}={value!r} is not allowed; use a value of type {wanted}")
