"""A run directory: its config, metrics and checkpoints.

    config.json                    what was trained, on which codec, with which versions
    metrics.jsonl                  one line a training step or validation
    checkpoints/step_00000120/     model.safetensors, training.pt (optimizer, RNG, data position), meta.json (checksums)
    best, last                     links to the checkpoint with the lowest validation loss, and to the newest

A checkpoint is written under a temporary name, fsynced and renamed, so that a kill at any moment leaves the last
complete one. Everything is loaded without running code from the file.
"""

import argparse
import dataclasses
import json
import logging
import math
import os
import re
import shutil
import subprocess
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from lib.cascade import Cascade, CascadeConfig, sinusoidal_positions
from lib.errors import UserError
from lib.files import file_sha256, fsync, make_folder, safe_torch_load, write_atomic

logger = logging.getLogger(__name__)

FILES = ("model.safetensors", "training.pt")


class Run:
    """A run directory that exists. `Run.create` starts one, `Run.open` finds one."""

    def __init__(self, path: Path, config: dict[str, Any]):
        self.path = path
        self.config = config

    @classmethod
    def create(cls, path: str | Path, config: dict[str, Any]) -> "Run":
        """Start a run. An earlier run in the same folder is moved to `replaced/` (one is kept), never mixed in."""
        path = Path(path)
        make_folder(path)
        earlier = [path / name for name in ("config.json", "metrics.jsonl", "checkpoints", "best", "last")]
        if (path / "config.json").exists():
            shutil.rmtree(path / "replaced", ignore_errors=True)
        for item in earlier:  # without its config.json, it is what a kill left of a run on its way to replaced/
            if item.is_symlink() or item.exists():
                (path / "replaced").mkdir(exist_ok=True)
                os.rename(item, path / "replaced" / item.name)
        config = json.loads(json.dumps(config | {"versions": versions()}))  # what a later open reads
        write_atomic(path / "config.json", json.dumps(config, indent=1))
        (path / "checkpoints").mkdir()
        return cls(path, config)

    @classmethod
    def open(cls, path: str | Path) -> "Run":
        """The run in `path`; `UserError` where there is none."""
        path = Path(path)
        try:
            config = json.loads((path / "config.json").read_text())
            if not isinstance(config, dict):
                raise ValueError("not a JSON object")
        except FileNotFoundError:
            raise UserError(
                f"{path}: no run here (no config.json); train one with `make demo` or notebook 04"
            ) from None
        except ValueError as error:
            raise UserError(f"{path / 'config.json'}: damaged ({error}); restore it or train again") from None
        except OSError as error:
            raise UserError(
                f"{path / 'config.json'}: cannot be read ({error.strerror}); check its permissions"
            ) from None
        return cls(path, config)

    # --- metrics -------------------------------------------------------------------------------------------------

    def log(self, row: dict[str, Any]) -> None:
        """Append one row to metrics.jsonl. JSON has no NaN: non-finite numbers become null."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(finite) + "\n")

    def metrics(self, split: str | None = None) -> list[dict[str, Any]]:
        """All rows in order, or those of one split ('train' or 'val'). A half-written last line is left out."""
        try:
            lines = (self.path / "metrics.jsonl").read_text().split("\n")
        except FileNotFoundError:
            return []
        rows = []
        for number, line in enumerate(lines[:-1], 1):  # a complete line ends in a newline
            try:
                rows.append(json.loads(line))
            except ValueError:
                file = self.path / "metrics.jsonl"
                raise UserError(f"{file}: line {number} is damaged; delete that line, or train again") from None
        return [row for row in rows if split in (None, row.get("split"))]

    def forget_metrics_after(self, step: int) -> None:
        """Drop rows of steps that a resumed training will take again."""
        kept = [row for row in self.metrics() if row["step"] <= step]
        write_atomic(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))

    # --- checkpoints ---------------------------------------------------------------------------------------------

    def save(self, step: int, model: Cascade, training: dict[str, Any], *, is_best: bool) -> Path:
        """Write a checkpoint, point `last` (and `best`) at it, and delete those that neither names."""
        folder = self.path / "checkpoints" / f"step_{step:08d}"
        temporary = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
        temporary.mkdir(parents=True)
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        (temporary / FILES[0]).write_bytes(safetensors.torch.save(weights))  # save_file would hide it from other users
        torch.save(training, temporary / FILES[1])
        meta = {"step": step, "sha256": {name: file_sha256(temporary / name) for name in FILES}}
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1))
        for name in (*FILES, "meta.json"):
            fsync(temporary / name)
        fsync(temporary)
        if folder.exists():  # stopped again at the step that it resumed from: the file there is the same
            shutil.rmtree(temporary)
        else:
            os.rename(temporary, folder)
        fsync(folder.parent)
        # best first: a resume from `last` trusts that what it remembers as the lowest loss is in `best`
        for name in ("best", "last") if is_best else ("last",):
            self._point(name, folder)
        self._prune()
        return folder

    def _point(self, name: str, folder: Path) -> None:
        link = self.path / f".{name}-{uuid.uuid4().hex}"
        link.symlink_to(folder.relative_to(self.path))
        os.replace(link, self.path / name)

    def _prune(self) -> None:
        keep = {(self.path / name).resolve() for name in ("best", "last")}
        for folder in (self.path / "checkpoints").iterdir():
            if folder.resolve() not in keep:
                shutil.rmtree(folder, ignore_errors=True)

    def has_checkpoint(self) -> bool:
        return (self.path / "last").exists()

    def load_model(self, which: str = "best", *, codec_fingerprint: str | None = None) -> Cascade:
        """The trained cascade in eval mode, on the CPU. `which`: 'best' or 'last'.

        With `codec_fingerprint`, a run trained on another codec's latents is refused.
        """
        if "cascade" not in self.config:
            raise UserError(f"{self.path / 'config.json'}: describes no cascade; give a run that this project trained")
        self.check_codec(codec_fingerprint)
        folder, _ = self._verified(which, ("model.safetensors",))
        model = Cascade(CascadeConfig.from_dict(self.config["cascade"])).eval()
        load_weights(model, folder / "model.safetensors")
        return model

    def load_training(self, model: Cascade, which: str = "last") -> tuple[int, dict[str, Any]]:
        """Load a checkpoint's weights into `model`; returns its step and the trainer's state."""
        folder, meta = self._verified(which, FILES)
        load_weights(model, folder / "model.safetensors")
        return meta["step"], safe_torch_load(folder / "training.pt")

    def check_codec(self, fingerprint: str | None) -> None:
        trained_on = self.config.get("codec", {})
        if fingerprint is not None and trained_on.get("fingerprint") != fingerprint:
            raise UserError(
                f"{self.path}: this run was trained on latents of codec {trained_on.get('name')!r} "
                f"({trained_on.get('fingerprint')}), not {fingerprint}; use that codec, or train again with this one"
            )

    def _verified(self, which: str, names: Iterable[str]) -> tuple[Path, dict[str, Any]]:
        folder = self.path / which
        try:
            meta = json.loads((folder / "meta.json").read_text())
            sums = {name: meta["sha256"][name] for name in names}
        except FileNotFoundError:
            raise UserError(f"{folder}: no checkpoint here; train this run first") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{folder / 'meta.json'}: damaged; {_other(which)}") from None
        for name in names:
            if not (folder / name).exists() or file_sha256(folder / name) != sums[name]:
                raise UserError(f"{folder / name}: truncated or changed since it was written; {_other(which)}")
        return folder, meta


def _other(which: str) -> str:
    return f"restore it, point {which!r} at the run's other checkpoint, or train again"


def load_weights(model: torch.nn.Module, path: Path) -> None:
    """Load a safetensors file into `model`, every tensor in its place; `UserError` lists what does not fit."""
    try:
        weights = safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); restore it or train again") from None
    check_tensors(path, weights, model.state_dict())
    model.load_state_dict(weights)


def check_tensors(path: Path, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """`UserError` that lists missing and unknown tensors and wrong shapes."""
    problems = [f"missing {name}" for name in wanted if name not in found]
    problems += [f"unknown {name}" for name in found if name not in wanted]
    problems += [
        f"{name} is {list(found[name].shape)} instead of {list(wanted[name].shape)}"
        for name in wanted
        if name in found and found[name].shape != wanted[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        listed = "; ".join(problems[:8]) + more
        raise UserError(f"{path}: does not fit this model: {listed}; use the config that the file was trained with")


def versions() -> dict[str, str]:
    """What a number must be quoted with: torch's version and this repository's commit, '+' where lib/ has changed."""
    root = Path(__file__).parent
    git = {"cwd": root, "capture_output": True, "text": True, "check": False}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **git).stdout.strip()
    changed = subprocess.run(["git", "status", "--porcelain", "--", "."], **git).stdout.strip()
    return {"torch": torch.__version__, "commit": commit + "+" * bool(changed) if commit else "unknown"}


def config_differences(a: Any, b: Any, prefix: str = "") -> list[str]:
    """Fields in which two nested configs differ, as 'train.learning_rate: 0.0001 → 0.001'."""
    if dataclasses.is_dataclass(a):
        a = dataclasses.asdict(a)
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted(set(a) | set(b))
        return [d for key in keys for d in config_differences(a.get(key), b.get(key), f"{prefix}{key}.")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):  # JSON knows lists only
        a, b = list(a), list(b)
        if len(a) == len(b) and any(isinstance(item, dict) for item in a):
            stem = prefix.rstrip(".")
            return [d for i in range(len(a)) for d in config_differences(a[i], b[i], f"{stem}[{i}].")]
    return [] if a == b else [f"{prefix.rstrip('.')}: {a!r} → {b!r}"]


# --- checkpoints of the original implementation --------------------------------------------------------------------

LAYER_NAMES = {  # original name → ours, within a transformer layer
    "self_attn.in_proj_weight": "qkv.weight",
    "self_attn.in_proj_bias": "qkv.bias",
    "self_attn.out_proj": "attention_out",
    "linear1": "ffn_in",
    "linear2": "ffn_out",
    "norm1": "norm1",
    "norm2": "norm2",
}
PROJECTION_NAMES = {
    "weight_orig": "parametrizations.weight.original",
    "weight_u": "parametrizations.weight.0._u",
    "weight_v": "parametrizations.weight.0._v",
    "bias": "bias",
}


@dataclass(frozen=True)
class OriginalCheckpoint:
    """What `import_original_checkpoint` found in the file."""

    cascade: Cascade  # in eval mode; its outputs equal the original's
    epoch: int | None
    best_val_loss: float | None
    ignored: tuple[str, ...]  # parts of the file that this import does not use


def import_original_checkpoint(path: str | Path, *, last_residual_weight: float | None = None) -> OriginalCheckpoint:
    """Read a file that the original implementation wrote with `torch.save`.

    Widths, layers and stages are inferred from the tensors. The residual weight of a third stage is not in the file:
    with three stages or more `last_residual_weight` must say it (seed 001: 0.1, its repair 0.3); the last stage's
    residual is then the previous stage's output, as in seed 002. Raises `UserError` that lists unknown or missing keys.
    """
    path = Path(path)
    content = safe_torch_load(path, allowed=(argparse.Namespace,))  # its `args` holds numbers and strings only
    if not isinstance(content, dict) or not isinstance(content.get("model_state_dict"), dict):
        raise UserError(f"{path}: holds no 'model_state_dict'; give a checkpoint of the original training script")
    tensors = {str(name).removeprefix("module."): value for name, value in content["model_state_dict"].items()}
    if others := [name for name, value in tensors.items() if not isinstance(value, Tensor)]:
        raise UserError(
            f"{path}: model_state_dict holds what is not a tensor: {', '.join(others[:8])}; export it again"
        )
    agent = [name for name in tensors if name.startswith("creative_agent.")]
    ignored = tuple(
        part
        for part, found in (
            ("creative_agent: outputs equal the original's without its masks", agent),
            ("discriminator_state_dict", "discriminator_state_dict" in content),
        )
        if found
    )
    for part in ignored:
        logger.warning("%s: not imported: %s", path, part)
    tensors = {name: value for name, value in tensors.items() if name not in agent}
    config = _original_config(path, tensors, last_residual_weight)
    cascade = Cascade(config).eval()
    renamed = _rename_original(path, tensors, config)
    check_tensors(path, renamed, cascade.state_dict())
    cascade.load_state_dict(renamed)
    return OriginalCheckpoint(cascade, content.get("epoch"), content.get("best_val_loss"), ignored)


def _original_config(path: Path, tensors: dict[str, Tensor], last_residual_weight: float | None) -> CascadeConfig:
    layers = {}  # stage → number of layers
    for name in tensors:
        if match := re.match(r"cascade_stages\.(\d+)\.transformer\.layers\.(\d+)\.", name):
            stage, layer = int(match[1]), int(match[2])
            layers[stage] = max(layers.get(stage, 0), layer + 1)
    if not layers or sorted(layers) != list(range(len(layers))):
        raise UserError(
            f"{path}: has no keys cascade_stages.0.transformer.layers.0.*; is it another model's checkpoint?"
        )
    config = CascadeConfig.reference(len(layers))
    for stage, num_layers in layers.items():
        config = config.with_stage(stage, num_layers=num_layers)
    if len(layers) > 2:
        if last_residual_weight is None:
            raise UserError(
                f"{path}: has {len(layers)} stages, and the file does not say the last residual weight; "
                "pass last_residual_weight=0.1 (seed 001) or 0.3 (its repair)"
            )
        config = config.with_stage(-1, residual_weight=last_residual_weight, residual_source="previous")
    return config


def _rename_original(path: Path, tensors: dict[str, Tensor], config: CascadeConfig) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in tensors.items():
        match = re.match(r"cascade_stages\.(\d+)\.(.+)", name)
        stage, rest = (f"stages.{match[1]}.", match[2]) if match else ("", name)
        if rest == "pos_encoding.pe":
            if tensor.ndim != 3:
                raise UserError(f"{path}: {name} is not [1, T, d]; this model's positions cannot be imported")
            T, d = tensor.shape[1:]
            if not torch.allclose(tensor[0].float(), sinusoidal_positions(T, d, torch.device("cpu")), atol=1e-4):
                raise UserError(f"{path}: {name} is not sinusoidal; this model's positions cannot be imported")
        elif part := re.match(r"transformer\.(layers\.\d+\.)(.+)", rest):
            own = next(
                (to + part[2].removeprefix(o) for o, to in LAYER_NAMES.items() if part[2].startswith(o)), part[2]
            )
            renamed[stage + part[1] + own] = tensor
        elif rest.startswith("output_proj."):
            own = rest.removeprefix("output_proj.")
            renamed[f"{stage}output_projection.{PROJECTION_NAMES.get(own, own)}"] = tensor
        else:
            renamed[stage + rest] = tensor
    return renamed
