"""A run directory: its config, metrics and checkpoints.

    config.json                    what was trained, on which codec, by which code, with which versions
    metrics.jsonl                  one line a training step or validation
    plan.json                      the step at which training ends
    checkpoints/step_00000120/     model.safetensors, training.pt (optimizer, RNG, data position), meta.json (checksums)
    best, last                     links to the checkpoint with the lowest validation loss, and to the newest

A checkpoint is written under a temporary name, fsynced and renamed, so that a kill at any moment leaves the last
complete one. Everything is loaded without running code from the file.
"""

import contextlib
import io
import itertools
import json
import logging
import math
import os
import shutil
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate import Accelerator
from torch import nn

from lib.training.config import LENGTH, WITHOUT_EFFECT
from lib.util.configs import differing_fields
from lib.util.errors import UserError
from lib.util.files import file_sha256, fsync, make_folder, naming, only_one, read_json, read_json_lines, write_file
from lib.util.provenance import versions
from lib.util.tensors import load_weights, safe_torch_load

logger = logging.getLogger(__name__)

FILES = ("model.safetensors", "training.pt")
LOCK = ".lock"  # in a run's folder: who trains it
ROUNDING = 1e-3  # share by which a measured number differs with the number of threads, or from a GPU to another


class Run:
    """A run directory that exists. `Run.create` starts one, `Run.open` finds one."""

    def __init__(self, path: Path, config: dict[str, Any]):
        self.path, self.config = path, config

    @classmethod
    def create(cls, path: str | Path, config: dict[str, Any]) -> "Run":
        """Start a run. An earlier run in the same folder is moved to `replaced/`, never mixed in; those before it are
        in `replaced-1/`, `replaced-2/`, …"""
        make_folder(path := Path(path))
        if (path / "config.json").exists() and (path / "replaced").exists():
            kept = next(place for i in itertools.count(1) if not (place := path / f"replaced-{i}").exists())
            os.rename(path / "replaced", kept)
        # an earlier run without its config.json was left half-moved to replaced/ by a kill
        for item in (path / name for name in ("config.json", "metrics.jsonl", "checkpoints", "best", "last")):
            if item.is_symlink() or item.exists():
                (path / "replaced").mkdir(exist_ok=True)
                os.rename(item, path / "replaced" / item.name)
        write_file(path / "config.json", json.dumps(config | {"versions": versions()}, indent=1))
        (path / "checkpoints").mkdir()
        return cls.open(path)

    @classmethod
    def start(
        cls,
        path: str | Path,
        config: dict[str, Any],
        *,
        resume: bool,
        code: list[str],
        measured: Sequence[str] = (),
        notes: dict[str, Any] | None = None,
    ) -> "Run":
        """With `resume` the run in `path`, if there is one with this config; otherwise a new one. `code`: fingerprints
        of the code that trains the run now, and of what it is trained on. If other code finished the run, a new one
        starts; if other code began it, it resumes and remembers both. Of the section 'train', what is in `LENGTH` and
        `WITHOUT_EFFECT` may differ; the values in `config` apply. `measured`: fields that may follow from the code; if
        only they differ, and the code does too, a new run starts; numbers among them may always differ by `ROUNDING`.
        Any other difference raises `UserError`. `notes` are added to the config, and replace those of an earlier
        start."""
        path, notes = Path(path), notes or {}
        if not (resume and (path / "config.json").exists()):
            return cls.create(path, config | {"code": code} | notes)
        run = cls.open(path)
        fields, finished = run.differences(config, measured), (run.saved_step or 0) >= (run.total_steps or math.inf)
        if run.trained_by != code and fields <= set(measured) and (fields or finished):
            logger.warning("%s: was trained by other code and is trained again; the old run is in replaced/", path)
            return cls.create(path, config | {"code": code} | notes)
        run.differences(config, measured, refused=True)
        if missing := [part for part in code if part not in run.trained_by]:
            logger.warning("%s: was started by other code; it resumes, but will not be reused when finished", path)
        # where a kill or a copy has lost `best` and `last`
        newest = max((path / "checkpoints").glob("step_*"), default=None)  # names sort by their step
        for name in ("best", "last") if newest else ():
            if not (path / name).exists():
                run._point(name, newest)
        run.metrics()  # a damaged file is refused before anything is written
        if run.has_checkpoint():
            run._verified("last", FILES)
        now = run.config | {"train": config["train"], "code": [*run.trained_by, *missing]} | notes
        if now != run.config:
            write_file(path / "config.json", json.dumps(now, indent=1))
        run.config = now
        return run

    def differences(self, config: dict[str, Any], measured: Sequence[str] = (), *, refused: bool = False) -> set[str]:
        """The fields in which a config differs from the run's, but for those that may; `UserError` if `refused`."""
        had = {key: self.config.get(key) for key in config}
        train = had["train"] if isinstance(had["train"], dict) else {}
        had["train"] = train | {name: config["train"][name] for name in LENGTH + WITHOUT_EFFECT}
        found = [
            (field, old, new)
            for field, old, new in differing_fields(had, config)
            if not (field in measured and type(old) is type(new) is float and math.isclose(old, new, rel_tol=ROUNDING))
        ]
        if found and refused:
            said = "; ".join(f"{field}: {old!r} → {new!r}" for field, old, new in found[:4])
            fix = "resume with its own config, start again without resume, or choose another output folder"
            if any(field.startswith("train.loss.own.") for field, *_ in found):
                fix = f"give train.loss.own as in its config.json, each function's module as it was; {fix}"
            raise UserError(f"{self.path}: holds a run with another config ({said}); {fix}")
        return {field for field, *_ in found}

    @classmethod
    @contextlib.contextmanager
    def started(cls, path: str | Path, config: dict[str, Any], launcher: Accelerator, *, resume: bool, **how: Any):
        """`start` by the main process of a launcher, which the others join, for as long as it trains: another training
        of this folder is refused meanwhile."""
        is_main = launcher.is_main_process
        with only_one(Path(path) / LOCK) if is_main else contextlib.nullcontext():
            with launcher.main_process_first():  # it creates the run that the others open
                run = cls.start(path, config, resume=resume or not is_main, **how)
            yield run
            launcher.wait_for_everyone()

    @classmethod
    def open(cls, path: str | Path) -> "Run":
        """The run in `path`; `UserError` where there is none."""
        path = Path(path)
        missing = f"{path.absolute()}: no run here (no config.json); `make demo` trains one, and notebooks 04 and 06 do"
        return cls(path, read_json(path / "config.json", missing=missing, fix="restore it or train again"))

    @property
    def stop_file(self) -> Path:
        """A training of this run saves and stops while this file exists."""
        return self.path / "stop"

    @property
    def total_steps(self) -> int | None:
        """The step at which the current or the last training ends; None before the first."""
        return self._number("plan.json", "total_steps")

    def plan(self, total_steps: int) -> None:
        """Note the step at which the training that begins will end."""
        write_file(self.path / "plan.json", json.dumps({"total_steps": total_steps}))

    @property
    def trained_by(self) -> list[str]:
        """Fingerprints of the code that has trained it, and of what it was trained on."""
        return self.config.get("code") or ["unknown"]

    @property
    def saved_step(self) -> int | None:
        """The step of the newest checkpoint; None before the first."""
        return self._number("last/meta.json", "step")

    def _number(self, file: str, field: str) -> int | None:
        with contextlib.suppress(UserError):
            return read_json(self.path / file, {field: int})[field]
        return None

    def log(self, row: dict[str, Any]) -> None:
        """Append one row to metrics.jsonl. JSON has no NaN: non-finite numbers become null."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(finite) + "\n")

    def metrics(self, split: str | None = None) -> list[dict[str, Any]]:
        """All rows in order, or those of one split ('train' or 'val'). A half-written last line is left out."""
        file = self.path / "metrics.jsonl"
        rows = read_json_lines(file, fix="delete that line, or train again") if file.exists() else []
        return [row for row in rows if split in (None, row.get("split"))]

    def forget_metrics_after(self, step: int) -> None:
        """Drop the rows of steps that a resumed training will repeat."""
        kept = [row for row in self.metrics() if row["step"] <= step]
        write_file(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))

    def save(self, step: int, model: nn.Module, training: dict[str, Any], *, is_best: bool) -> None:
        """Write a checkpoint, point `last` (and `best`) at it, and delete the checkpoints that neither points at."""
        folder = self.path / "checkpoints" / f"step_{step:08d}"
        temporary = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        torch.save(training, state := io.BytesIO())  # to a full disk, torch's own writer fails without the reason
        try:
            temporary.mkdir(parents=True)
            (temporary / FILES[0]).write_bytes(safetensors.torch.save(weights))  # save_file hides it from other users
            (temporary / FILES[1]).write_bytes(state.getbuffer())
            meta = {"step": step, "sha256": {name: file_sha256(temporary / name) for name in FILES}}
            (temporary / "meta.json").write_text(json.dumps(meta, indent=1))
            for path in (*temporary.iterdir(), temporary):
                fsync(path)
            if not folder.exists():  # else stopped again at the step it resumed from, whose checkpoint is the same
                os.rename(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        fsync(folder.parent)
        # best first: a run that resumes from `last` expects the lowest loss that it knows of in `best`
        for name in ("best", "last") if is_best else ("last",):
            self._point(name, folder)
        keep = {(self.path / name).resolve() for name in ("best", "last")}
        for other in folder.parent.iterdir():
            if other.resolve() not in keep:
                shutil.rmtree(other, ignore_errors=True)

    def has_checkpoint(self) -> bool:
        return (self.path / "last").exists()

    def _point(self, name: str, folder: Path) -> None:
        """Make `best` or `last` a link to a checkpoint."""
        if (self.path / name).is_dir() and not (self.path / name).is_symlink():  # a copy that followed links
            shutil.rmtree(self.path / name)
        link = self.path / f".{name}-{uuid.uuid4().hex}"
        link.symlink_to(folder.relative_to(self.path))
        os.replace(link, self.path / name)

    def load_weights(self, model: nn.Module, which: str = "best") -> None:
        """Load a checkpoint's weights into any `model`, and leave it in eval mode."""
        load_weights(model.eval(), self._verified(which, FILES[:1])[0] / FILES[0])

    def load_training(self, model: nn.Module) -> tuple[int, dict[str, Any]]:
        """Load the newest checkpoint's weights into `model`; returns its step and the trainer's state."""
        folder, meta = self._verified("last", FILES)
        load_weights(model, folder / FILES[0])
        return meta["step"], safe_torch_load(folder / FILES[1])

    def weights_sha256(self, which: str = "best") -> str:
        """Hash of the checkpoint's weights, which are verified against it."""
        return self._verified(which, FILES[:1])[1]["sha256"][FILES[0]]

    @property
    def codec(self) -> dict[str, str]:
        """Name and fingerprint of the codec that it was trained with."""
        codec = self.config.get("codec")  # another program's config.json may mean something else
        if not isinstance(codec, dict) or not all(isinstance(codec.get(key), str) for key in ("name", "fingerprint")):
            fault = "names no codec, as a run of the fusion model does; name such a run's folder, or restore the file"
            raise UserError(f"{self.path / 'config.json'}: {fault}")
        return codec

    @property
    def codec_source(self) -> str:
        """From where `load_codec` loads that codec: its name, the directory of its weights, or module:Class."""
        return self.config.get("codec_source", self.codec["name"])

    def check_codec(self, fingerprint: str | None) -> None:
        if fingerprint is not None and fingerprint != self.codec["fingerprint"]:
            codec = f"codec {self.codec['name']!r} ({self.codec['fingerprint']})"
            fix = "use that codec, or train again with this one"
            raise UserError(f"{self.path}: this run was trained on latents of {codec}, not {fingerprint}; {fix}")

    def _verified(self, which: str, names: Iterable[str]) -> tuple[Path, dict[str, Any]]:
        folder = self.path / which
        others = [path for path in self.path.glob("checkpoints/step_*") if path != folder.resolve()]
        fix = f"restore it, {f'point {which!r} at {others[0]}, ' if others else ''}or train again"
        missing = f"{folder}: no checkpoint here; train this run first"
        meta = read_json(folder / "meta.json", {"step": int, "sha256": dict}, missing=missing, fix=fix)
        for name in names:
            with naming(folder / "meta.json", fix):
                wanted = meta["sha256"][name]
            if not (folder / name).exists() or file_sha256(folder / name) != wanted:
                raise UserError(f"{folder / name}: truncated or changed since it was written; {fix}")
        return folder, meta


def find_runs(folder: str | Path, codec_fingerprint: str | None = None) -> dict[str, Run]:
    """Name → run, for every trained run in a subfolder that was trained on this codec's latents, None: on any's."""
    runs = {}
    for config in sorted(Path(folder).glob("*/config.json")):
        with contextlib.suppress(UserError):  # not a run, or a damaged one
            run = Run.open(config.parent)
            run.check_codec(codec_fingerprint)
            if (run.path / "best").exists() and {"cascade", "masking"} <= set(run.config):
                runs[run.path.name] = run
    return runs
