"""What a notebook runs with: the presets, and the project folder that one of them works in.

`load_preset` gives the settings, `open_project` the data, codec and latents that go with them. Every notebook starts
with both, so that each can be run alone; what an earlier notebook has prepared is found and reused.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState

from lib.ablation import Plan, Result, read_record, run_plan
from lib.adversary import AdversaryConfig
from lib.agent import MaskingConfig
from lib.audio import AUDIO_SUFFIXES
from lib.cascade import CascadeConfig
from lib.codec import Codec, load_codec
from lib.configs import check, check_counts
from lib.curriculum import CurriculumConfig
from lib.errors import UserError
from lib.files import make_folder, write_atomic
from lib.latents import EncodeReport, encode_manifest
from lib.losses import LossConfig
from lib.pairs import Manifest, build_manifest, read_manifest
from lib.provenance import code_fingerprint
from lib.superres.data import Library, read_library
from lib.superres.evaluation import Score, read_scores
from lib.superres.plans import FULL_PLAN, SMALL_PLAN
from lib.superres.plans import Plan as SuperresPlan
from lib.synth import make_demo_dataset
from lib.train_config import NESTED, TrainConfig
from lib.variants import NAMED, SCHEDULED, Variant, chosen_variants

ROOT = Path(__file__).resolve().parents[1]  # relative paths in notebooks mean this folder, wherever a kernel starts
RECORD = ROOT / "outputs" / "record"  # what `make record` wrote
DEMO_SONGS = 16
UPPER_BAND = {"num_songs": 24, "seconds": 8.0, "sample_rate": 48_000}  # demo songs for super-resolution
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


@dataclass(frozen=True)
class Project:
    """A preset at work: its folder, codec, pairs and latents."""

    preset: Preset
    out_dir: Path
    codec: Codec
    manifest: Manifest
    latents: EncodeReport

    def ablation(self) -> tuple[Result, ...]:
        """The results of the preset's ablation, on clips of its own length; runs that were made before are reused."""
        return self._results(self.preset.plan)

    def schedule(self) -> tuple[Result, ...]:
        """The same of the whole schedule in miniature."""
        return self._results(self.preset.schedule)

    def _results(self, plan: Plan) -> tuple[Result, ...]:
        folder = self.out_dir / "ablation"
        make_folder(folder)
        seconds = self.preset.ablation_clip_seconds
        manifest = _manifest(self.manifest.root, folder / "manifest.jsonl", seconds, self.preset)
        latents = encode_manifest(manifest, self.codec, ROOT / "data" / "latents")
        return run_plan(plan, latents.index, self.preset.codec, folder / "runs")

    def upper_band(self) -> tuple[Library, str]:
        """Music to learn super-resolution from, and in words where it comes from: the project's own songs, or generated
        ones where those are generated too or hold no upper band."""
        clip_length, why = self.preset.superres.training.clip_length, ""
        root = self.manifest.root
        if root.parent != ROOT / "data" or not re.fullmatch(r"demo(_seed\d+)?", root.name):
            try:
                return read_library(root, clip_length), f"the music in {root}"
            except UserError as error:
                why = f", because of {error}"
        seed = self.preset.data_seed
        folder = demo_folder("demo_48k", seed)
        make_demo_dataset(folder, **UPPER_BAND, seed=seed)
        return read_library(folder, clip_length), f"generated songs{why}"

    def grid(self) -> tuple[tuple[Result, ...], str]:
        """The whole ablation grid and where it comes from: the preset's own if it runs all variants, else the record
        that `make record` wrote."""
        if self.preset.ablation_variants == "all":
            return self.ablation(), f"preset {self.preset.name}, this run"
        results, facts = self.recorded("ablation", NAMED)
        return results, facts["source"]

    def recorded(self, name: str, variants: Sequence[Variant]) -> tuple[tuple[Result, ...], dict[str, Any]]:
        """The results that `make record` wrote and their facts; 'source' says in words where they come from."""
        path = RECORD / f"{name}.json"
        results, facts = read_record(path)
        lacking = {variant.name for variant in variants} - {result.variant for result in results}
        lacking |= {"preset", "steps", "codec"} - set(facts)
        if lacking:
            raise UserError(f"{path}: lacks {', '.join(sorted(lacking))}; restore it or run `make record`")
        source = f"recorded: preset {facts['preset']}, {facts['steps']} steps, codec {facts['codec']}"
        return results, facts | {"source": source}

    def recorded_superres(self) -> tuple[tuple[Score, ...], dict[str, Any]]:
        """The distances that `make record` measured of a super-resolver trained for longer, and their facts; 'source'
        as in `recorded`."""
        scores, facts = read_scores(RECORD / "superres.json")
        steps = f"{facts['vae_steps']} and {facts['steps']} steps"
        return scores, facts | {"source": f"recorded: preset {facts['preset']}, {steps}, {scores[0].clips} clips"}

    def listening(self) -> Manifest:
        """Pairs of the listening length; the split by source file is the one of training."""
        seconds = self.preset.listen_seconds
        try:
            return _manifest(self.manifest.root, self.out_dir / "listening.jsonl", seconds, self.preset)
        except UserError as error:
            raise UserError(f"listen_seconds={seconds:g} is too long for this music; lower it ({error})") from None


def open_project(
    preset: Preset, data_dir: str | Path = "", out_dir: str | Path = "", processes: PartialState | None = None
) -> Project:
    """Find or make everything that training needs.

    `data_dir`: a folder of music (see data/README.md); empty: the demo songs of the data seed, generated in data/demo
    or data/demo_seed<N>. `out_dir`: the run's folder; empty: outputs/<preset>. Relative paths are taken from the
    repository. Latents are cached in data/latents, by content. Several `processes` that call this together encode
    together. Raises `UserError` for bad data, codec or folders.
    """
    out = ROOT / (out_dir or f"outputs/{preset.name}")
    codec = load_codec(preset.codec)
    data = ROOT / data_dir if data_dir else demo_folder("demo", preset.data_seed)
    if out.resolve().is_relative_to(data.resolve()):
        raise UserError(f"{out}: is inside the data folder, whose music it would add to; choose another output folder")
    make_folder(out)
    main_first = processes.main_process_first if processes else contextlib.nullcontext
    cache = ROOT / "data" / "latents"
    with main_first():
        if not data_dir:
            make_demo_dataset(data, num_songs=DEMO_SONGS, seed=preset.data_seed)
        manifest = _manifest(data, out / "manifest.jsonl", preset.clip_seconds, preset)
    if processes and processes.num_processes > 1:
        encode_manifest(manifest, codec, cache, share=(processes.process_index, processes.num_processes))
        processes.wait_for_everyone()
    with main_first():
        return Project(preset, out, codec, manifest, encode_manifest(manifest, codec, cache))


def demo_folder(name: str, seed: int) -> Path:
    return ROOT / "data" / (f"{name}_seed{seed}" if seed else name)


def _manifest(data: Path, path: Path, clip_seconds: float, preset: Preset) -> Manifest:
    """The manifest at `path`, built again when the settings, the code or any file's name, size or time has changed."""
    wanted = {"clip_seconds": clip_seconds, "mode": preset.pair_mode, "seed": preset.data_seed}
    stamp = json.dumps(wanted | {"files": _listing_hash(data), "code": code_fingerprint("lib.pairs")})
    stamp_path = path.with_suffix(".stamp.json")
    if path.exists() and stamp_path.exists() and stamp_path.read_text() == stamp:
        return read_manifest(path)
    stamp_path.unlink(missing_ok=True)  # a kill before the new one is written must not leave the old one in force
    manifest = build_manifest(data, path, clip_seconds, mode=preset.pair_mode, seed=preset.data_seed)
    write_atomic(stamp_path, stamp)
    return manifest


def _listing_hash(data: Path) -> str:
    digest = hashlib.sha256(str(data.resolve()).encode(errors="surrogateescape"))
    seen = set()
    for folder, subfolders, names in os.walk(data, followlinks=True):  # links as in `build_manifest`
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders.sort()
        for path in (Path(folder, name) for name in sorted(names)):
            if path.suffix.lower() in AUDIO_SUFFIXES and path.is_file():
                status = path.stat()
                digest.update(f"{path}:{status.st_size}:{status.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()
