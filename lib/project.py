"""What notebooks and commands work with: a preset's folder, codec, manifest and latents, opened once."""

import contextlib
import dataclasses
import hashlib
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState

from lib.audio.synth import make_demo_dataset
from lib.codec.codec import Codec, load_codec
from lib.data.latents import encode_manifest, encoding_check
from lib.data.pairs import Manifest, build_manifest
from lib.lab.ablation import Plan, run_plan
from lib.lab.results import Result, read_record
from lib.lab.variants import NAMED, Variant
from lib.presets import Preset, with_changes
from lib.superres.degradation import Library, read_library
from lib.superres.training import Plan as SuperresPlan
from lib.training.run import LOCK, Run, find_runs
from lib.util.configs import check, from_fields
from lib.util.errors import UserError
from lib.util.files import make_folder, naming, only_one, read_json, write_file

ROOT = Path(__file__).resolve().parents[1]  # relative paths in notebooks mean this folder, wherever a kernel starts
OUTPUTS = ROOT / "outputs"
OPENED = "project.json"  # in a run's folder: the settings and the music that its project was opened with last
RECORD = OUTPUTS / "record"  # what `make record` wrote
RECORDED = ("ablation", "schedule", "explosion", "constructed", "fusion", "superres", "full_size")  # notebooks show
DEMO_SONGS = 64
UPPER_BAND = {"num_songs": 24, "seconds": 8.0, "sample_rate": 48_000}  # demo songs for super-resolution


@dataclass(frozen=True)
class Project:
    """An opened project: a preset with its folder, codec, pairs and latents."""

    preset: Preset
    out_dir: Path
    codec: Codec
    manifest: Manifest
    index: Path  # of the latents

    def in_words(self) -> Iterator[str]:
        """How many pairs there are, what split them, the model for them, and what is not used."""
        train, val = (len(self.manifest.split(split)) for split in ("train", "val"))
        by = self.manifest.split_by
        yield f"{train} training and {val} validation pairs, split by {by}; codec {self.codec.name}"
        stages, masking = self.preset.model.num_stages, self.preset.model.masking.masking
        yield f"masks: {masking}; stages behind them: {stages}"
        if skipped := self.manifest.skipped:
            yield f"{len(skipped)} files were skipped, listed in {self.out_dir / 'manifest.json'}"
            yield from (f"  {item.path}: {item.reason}" for item in skipped[:5])

    def ablation(self, plan: Plan | None = None) -> tuple[Result, ...]:
        """The results of a plan, by default of the preset's ablation. Finished runs are reused."""
        folder, settings = self.out_dir / "ablation", self.preset.ablation
        where = (self.manifest.root, folder / "manifest.json", settings.clip_seconds)
        manifest = _manifest(*where, self.preset, self.codec)
        index = encode_manifest(manifest, self.codec, ROOT / "data" / "latents")
        return run_plan(plan or settings.plan, index, self.preset.codec, folder / "runs")

    @property
    def superres_plan(self) -> SuperresPlan:
        """What notebook 06 trains."""
        return self.preset.superres.training_plan(self.preset.train.seed)

    def upper_band(self) -> tuple[Library, str]:
        """Training music for super-resolution, and its source in words: the project's own songs, or generated ones if
        those are generated too or have no upper band."""
        clip_length, root, why = self.superres_plan.training.clip_length, self.manifest.root, ""
        if root.parent != ROOT / "data" or not re.fullmatch(r"demo(_seed\d+)?", root.name):
            try:
                return read_library(root, clip_length), f"the music in {root}"
            except UserError as error:
                why = f", because of {error}"
        folder = demo_folder("demo_48k", self.preset.data.seed)
        make_demo_dataset(folder, **UPPER_BAND, seed=self.preset.data.seed)
        return read_library(folder, clip_length), f"generated songs{why}"

    def grid(self) -> tuple[tuple[Result, ...], str]:
        """The whole ablation grid and its source: this preset's runs if it has all variants, else the record."""
        if self.preset.ablation.variants == "all":
            return self.ablation(), f"preset {self.preset.name}, this run"
        results, facts = self.recorded("ablation", NAMED)
        return results, facts["source"]

    def recorded(self, name: str, variants: Sequence[Variant]) -> tuple[tuple[Result, ...], dict[str, Any]]:
        """The results that `make record` wrote, and their facts; 'source' names their preset, steps and codec."""
        results, facts = read_record(path := RECORD / f"{name}.json")
        lacking = {variant.name for variant in variants} - {result.variant for result in results}
        if lacking := lacking | {"preset", "steps", "codec"} - set(facts):
            raise UserError(f"{path}: lacks {', '.join(sorted(lacking))}; restore it or run `make record`")
        source = f"recorded: preset {facts['preset']}, {facts['steps']} steps, codec {facts['codec']}"
        return results, facts | {"source": source}

    def recorded_rows(self, name: str, kind: type = dict) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Another file of the record: its rows, of one `kind`, and their facts; none while they are being recorded."""
        path = RECORD / f"{name}.json"
        return read_record(path, kind) if path.exists() else ((), {})

    def listening(self) -> Manifest:
        """Pairs of the listening length, split by source file as for training."""
        seconds = self.preset.listening.seconds
        try:
            return _manifest(self.manifest.root, self.out_dir / "listening.json", seconds, self.preset, self.codec)
        except UserError as error:
            raise UserError(f"listening.seconds={seconds:g} is too long for this music; lower it ({error})") from None


def open_project(
    preset: Preset,
    data_dir: str | Path = "",
    out_dir: str | Path = "",
    processes: PartialState | None = None,
    *,
    resume: bool = False,
) -> Project:
    """Find or make everything that training needs; `UserError` for bad data, codec or folders. `data_dir`: a folder of
    music, empty: generated demo songs; `out_dir`: the run's folder, empty: outputs/<preset>; both relative to the
    repository. Latents are cached in data/latents, by content; of `processes` that call this together, one encodes. To
    `resume` the run in `out_dir`, its data must be the same."""
    out = ROOT / (out_dir or f"outputs/{preset.name}")
    codec = load_codec(preset.codec)
    data = ROOT / data_dir if data_dir else demo_folder("demo", preset.data.seed)
    if out.resolve().is_relative_to(data.resolve()):
        raise UserError(f"{out}: is inside the data folder, where its audio would become training data; choose another")
    check(str(out).encode(errors="ignore").decode() == str(out), "folder", str(out), "a name in UTF-8")
    make_folder(out)

    def before_writing(manifest: Manifest) -> None:
        with only_one(out / LOCK):  # what trains here was begun with the manifest that is here
            if not (resume and (out / "config.json").exists()):
                return
            (run := Run.open(out)).check_codec(codec.fingerprint)
            if run.config.get("data") not in (None, manifest.index_name):
                fix = "resume with its own data, start again without resume, or choose another output folder"
                raise UserError(f"{out}: holds a run that was trained on other pairs than {data} gives; {fix}")

    with processes.main_process_first() if processes else contextlib.nullcontext():  # its workers use all cores
        seconds, cache = preset.data.clip_seconds, ROOT / "data" / "latents"
        name = hashlib.sha256(str(data.resolve()).encode(errors="surrogateescape")).hexdigest()[:12]
        with only_one(cache / f".{name}.lock", wait=True):  # who waits finds what the other has encoded
            if not data_dir:
                make_demo_dataset(data, num_songs=DEMO_SONGS, seed=preset.data.seed)
            check_file = encoding_check(codec, cache, round(seconds * codec.sample_rate))
            manifest = _manifest(data, out / "manifest.json", seconds, preset, codec, check_file, before_writing)
            index = encode_manifest(manifest, codec, cache)
        of_codec = {"codec": str(Path(preset.codec).resolve())} if Path(preset.codec).is_dir() else {}
        opened = {"preset": dataclasses.asdict(preset) | of_codec, "data_dir": str(data_dir)}
        write_file(out / OPENED, json.dumps(opened, indent=1))
        return Project(preset, out, codec, manifest, index)


def reopen_project(out_dir: str | Path, overrides: Mapping[str, Any] = {}) -> Project:
    """The project of a run's folder, with the music and the settings, but for `overrides`, that it was opened with
    last. `UserError` as in `open_project`, and where the folder does not say what they were."""
    path, fix = ROOT / out_dir / OPENED, "open the project with its preset and its folder of music"
    with naming(path, fix):
        opened = read_json(path, {"preset": dict, "data_dir": str}, fix=fix)
        preset = from_fields(Preset, opened["preset"])
    return open_project(with_changes(preset, overrides), opened["data_dir"], out_dir)


def trained_runs(out_dir: str | Path = "", outputs: Path = OUTPUTS) -> dict[str, Run]:
    """What notebook 05 can play, in words → run: the one in `out_dir` or, where no folder is given, all in `outputs`
    whose project can be reopened, the newest first. `UserError` if there is none."""
    if out_dir:
        return {str(out_dir): Run.open(ROOT / out_dir)}
    runs = [run for run in find_runs(outputs).values() if (run.path / OPENED).exists()]
    if not runs:
        raise UserError(f"{outputs}: no trained run here yet; `make demo` trains one, and so does notebook 04")
    saved = {run.path.name: time.localtime((run.path / "best").lstat().st_mtime) for run in runs}
    runs.sort(key=lambda run: saved[run.path.name], reverse=True)
    return {f"{run.path.name}, saved {time.strftime('%d %B %H:%M', saved[run.path.name])}": run for run in runs}


def demo_folder(name: str, seed: int) -> Path:
    return ROOT / "data" / (f"{name}_seed{seed}" if seed else name)


def _manifest(data: Path, path: Path, clip_seconds: float, preset: Preset, codec: Codec, *functions) -> Manifest:
    chosen = (clip_seconds, preset.data.pair_mode, preset.data.seed)
    return build_manifest(data, path, *chosen, *functions, sample_rate=codec.sample_rate)
