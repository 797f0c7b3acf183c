"""Files: written so that a kill leaves the old or the new one, loaded without running code from them."""

import hashlib
import os
import pickle
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lib.util.errors import UserError

TEMPORARY = ".tmp"  # ends the name of a file that is being written


def safe_torch_load(path: str | Path, allowed: Iterable[type] = ()) -> Any:
    """`torch.load` on the CPU that never runs code from the file; `UserError` says why a file is refused."""
    path = Path(path)
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path") from None
    except pickle.UnpicklingError as error:
        reason = str(error)
        if "Unsupported global" in reason or "GLOBAL" in reason:
            needs = reason.split("GLOBAL ")[-1].split(" ")[0] if "GLOBAL " in reason else "code"
            raise UserError(
                f"{path}: refused, because loading it would run code from the file (it needs {needs}); "
                "save it again with tensors, numbers, strings, lists and dicts only"
            ) from None
        raise UserError(f"{path}: not a torch checkpoint, or damaged; get the file again") from None
    except Exception as error:  # on damaged bytes the unpickler raises almost anything: IndexError, struct.error, ...
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: truncated or not a torch checkpoint ({first}); get the file again") from None


def make_folder(path: Path) -> None:
    """Create a folder for output and prove that it can be written to; `UserError` if not."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe-{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{path}: cannot write here ({error.strerror}); choose another output folder") from None


def write_atomic(path: Path, content: str | bytes | memoryview) -> None:
    """Write a file under a temporary name, fsync and rename it. Text is UTF-8; surrogates carry odd file names."""
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}{TEMPORARY}")
    try:
        data = content.encode(errors="surrogateescape") if isinstance(content, str) else content
        temporary.write_bytes(data)
        fsync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a safetensors file into `model`, every tensor in its place; `UserError` lists what does not fit."""
    try:
        weights = safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); restore it or train again") from None
    check_tensors(path, weights, model.state_dict())
    model.load_state_dict(weights)


def check_tensors(
    path: Path | str,
    found: dict[str, Tensor],
    wanted: dict[str, Tensor],
    fix: str = "use the config that the file was trained with",
) -> None:
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
        raise UserError(f"{path}: does not fit this model: {listed}; {fix}")
