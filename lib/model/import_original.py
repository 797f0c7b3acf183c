"""Checkpoints that the original training script wrote with `torch.save`. Nothing from the file is run."""

import argparse
import logging
import re
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lib.model.cascade import CascadeConfig, sinusoidal_positions
from lib.model.discriminator import Discriminator
from lib.model.fusion import FusionModel
from lib.model.masks import MaskingConfig
from lib.util.errors import UserError
from lib.util.tensors import check_tensors, safe_torch_load

logger = logging.getLogger(__name__)

NAMES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())  # part of our name → the original's
STYLE_DISCRIMINATOR = "creative_agent.discriminator."


class OriginalCheckpoint(NamedTuple):
    """What `import_original_checkpoint` found in the file."""

    model: FusionModel  # in eval mode; its outputs and masks equal the original's
    discriminator: Discriminator | None  # likewise; None unless the file is from adversarial training
    epoch: int | None
    best_val_loss: float | None


def import_original_checkpoint(path: str | Path, *, last_residual_weight: float | None = None) -> OriginalCheckpoint:
    """Widths, layers, stages and the creative agent are inferred from the tensors. The residual weight of a third stage
    is not in the file: pass it as `last_residual_weight` (document 001: 0.1, its repair 0.3); its residual is then
    the previous stage's output, as in 002. `UserError` lists unknown, missing and misshapen tensors."""
    path = Path(path)
    content = safe_torch_load(path, allowed=(argparse.Namespace,))  # its `args` holds numbers and strings only
    if not isinstance(content, dict) or not isinstance(content.get("model_state_dict"), dict):
        raise UserError(f"{path}: holds no 'model_state_dict'; give a checkpoint of the original training script")
    tensors = _tensors(path, content, "model_state_dict")
    if style := [name for name in tensors if name.startswith(STYLE_DISCRIMINATOR)]:
        logger.warning("%s: not imported: %s* (a style discriminator, never trained)", path, STYLE_DISCRIMINATOR)
    tensors = {name: tensor for name, tensor in tensors.items() if name not in style}
    config = _original_config(path, tensors, last_residual_weight)
    learned = any(name.startswith("creative_agent.mask_generator.") for name in tensors)
    model = FusionModel(config, MaskingConfig("learned" if learned else "none"))
    positions = {}  # ours, [1, T, d], under the original's names, with as many frames as the file has
    for i in range(len(config.stages)):
        name = f"cascade_stages.{i}.pos_encoding.pe"
        T = tensors[name].shape[1] if name in tensors and tensors[name].ndim == 3 else 2000
        positions[name] = sinusoidal_positions(T, config.width(i), torch.device("cpu"))[None]
    _load(path, model, tensors, positions)
    for name, wanted in positions.items():
        if not torch.allclose(tensors[name].float(), wanted, atol=1e-4):
            raise UserError(f"{path}: {name} is not sinusoidal; this model's positions cannot be imported")
    discriminator = None
    if content.get("discriminator_state_dict") is not None:
        discriminator = Discriminator()
        _load(f"{path}: discriminator_state_dict", discriminator, _tensors(path, content, "discriminator_state_dict"))
    return OriginalCheckpoint(model, discriminator, content.get("epoch"), content.get("best_val_loss"))


def _tensors(path: Path, content: dict[str, Any], part: str) -> dict[str, Tensor]:
    """One state dict of the file, without the prefix that parallel training leaves."""
    if not isinstance(content[part], dict):
        raise UserError(f"{path}: {part} is not a dict of tensors; give a checkpoint of the original training script")
    tensors = {str(name).removeprefix("module."): value for name, value in content[part].items()}
    if others := [name for name, value in tensors.items() if not isinstance(value, Tensor)]:
        raise UserError(f"{path}: {part} holds what is not a tensor: {', '.join(others[:8])}; export it again")
    return tensors


def _original_config(path: Path, tensors: dict[str, Tensor], last_residual_weight: float | None) -> CascadeConfig:
    pattern = r"cascade_stages\.(\d+)\.transformer\.layers\.(\d+)\."
    found = {(int(match[1]), int(match[2])) for name in tensors if (match := re.match(pattern, name))}
    layers = {stage: layer + 1 for stage, layer in sorted(found)}  # stage → number of layers
    if not layers or sorted(layers) != list(range(len(layers))):
        raise UserError(f"{path}: has no keys cascade_stages.0.transformer.layers.0.*; is it another model's?")
    config = CascadeConfig.reference(len(layers))
    for stage, num_layers in layers.items():
        config = config.with_stage(stage, num_layers=num_layers)
    if len(layers) > 2:
        if last_residual_weight is None:
            fix = "pass last_residual_weight=0.1 (source document 001) or 0.3 (its repair)"
            raise UserError(f"{path}: does not say the residual weight of the last of its {len(layers)} stages; {fix}")
        config = config.with_stage(-1, residual_weight=last_residual_weight, residual_source="previous")
    return config


def _load(path: Path | str, module: nn.Module, tensors: dict[str, Tensor], besides: dict[str, Tensor] | None = None):
    """Load every tensor of the file except those `besides`, which it must have too. The file's u and v are kept."""
    own, names = module.state_dict(), {name: name for name in module.state_dict()}  # the original's → ours
    for ours, original in NAMES.items():
        names = {re.sub(ours, original, theirs): name for theirs, name in names.items()}
    wanted = {original: own[name] for original, name in names.items()} | (besides or {})
    check_tensors(path, tensors, wanted, fix="give a file that the original training script wrote")
    module.eval().load_state_dict({name: tensors[original] for original, name in names.items()})
