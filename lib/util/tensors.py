"""Torch's side of the tools: threads, cached tables, weights that are loaded without running code from a file."""

import contextlib
import functools
import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lib.util.errors import UserError

Function = TypeVar("Function", bound=Callable)


@contextlib.contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Compute with `count` threads, None: as before. One is best for small matrices: waiting costs more than work."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cached_table(function: Function) -> Function:
    """Cache a function that computes a constant tensor, outside of inference mode: a backward pass may use it."""
    return functools.lru_cache(maxsize=16)(torch.inference_mode(False)(torch.no_grad()(function)))


def safe_torch_load(path: str | Path, allowed: Iterable[type] = ()) -> Any:
    """`torch.load` to the CPU that never runs code from the file; `UserError` says why a file is refused."""
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path") from None
    except pickle.UnpicklingError as error:
        if "GLOBAL " in str(error):
            needs = str(error).split("GLOBAL ")[-1].split(" ")[0]
            raise UserError(
                f"{path}: refused, because loading it would run code from the file (it needs {needs}); "
                "save it again with tensors, numbers, strings, lists and dicts only"
            ) from None
        raise UserError(f"{path}: not a torch checkpoint, or damaged; get the file again") from None
    except Exception as error:  # on damaged bytes the unpickler raises almost anything: IndexError, struct.error, ...
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: truncated or not a torch checkpoint ({first}); get the file again") from None


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a safetensors file into `model`; `UserError` lists the tensors that do not fit."""
    try:
        str(path).encode()
        weights = safetensors.torch.load_file(path)
    except UnicodeEncodeError:  # which safetensors cannot open
        raise UserError(f"{path}: in a folder whose name is not UTF-8; rename that folder") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); restore it or train again") from None
    check_tensors(path, weights, model.state_dict(), fix="use the config that the file was trained with")
    model.load_state_dict(weights)


def check_tensors(path: Path, found: dict[str, Tensor], wanted: dict[str, Tensor], fix: str) -> None:
    """`UserError` that lists missing and unknown tensors and wrong shapes."""
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds a {type(found).__name__} instead of named tensors; {fix}")
    problems = [f"missing {name}" for name in wanted if name not in found]
    problems += [f"unknown {name}" for name in found if name not in wanted]
    problems += [
        f"{name} is {list(found[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if problems:
        listed = "; ".join(problems[:8]) + f" and {len(problems) - 8} more" * (len(problems) > 8)
        raise UserError(f"{path}: does not fit this model: {listed}; {fix}")
