"""What all configs share: fields that are checked when a config is built, and the differences between two configs. The
annotations of a `checked_dataclass` say what each field takes; its `__post_init__` checks what depends on several."""

import dataclasses
import functools
import importlib
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StrictBool, ValidationError, WrapValidator
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic_core import PydanticCustomError

from lib.util.errors import UserError
from lib.util.files import FIX, naming

Bound = float | None


def _field_type(kind: Any, wanted: str, **limits: Any) -> Any:
    """A type within these limits of pydantic; a refusal says what is `wanted`."""

    def validate(value: Any, handler: Any) -> Any:
        try:
            return handler(value)
        except ValueError:  # pydantic's is one
            raise PydanticCustomError("refused", "use {wanted}", {"wanted": wanted}) from None

    return Annotated[kind, Field(**limits), WrapValidator(validate)]


def whole(least: int, most: int | None = None) -> Any:
    wanted = f"a whole number, {least} or more" + (f", at most {most}" if most else "")
    return _field_type(int, wanted, strict=True, ge=least, le=most)


def number(least: Bound = None, most: Bound = None, above: Bound = None, below: Bound = None) -> Any:
    bounds = (("{:g} or more", least), ("above {:g}", above), ("at most {:g}", most), ("below {:g}", below))
    wanted = ", ".join(["a finite number", *(words.format(bound) for words, bound in bounds if bound is not None)])
    return _field_type(float, wanted, strict=True, allow_inf_nan=False, ge=least, le=most, gt=above, lt=below)


def choice(names: Sequence[str]) -> Any:
    return _field_type(Literal[tuple(names)], f"one of {', '.join(names)}")


Flag = _field_type(StrictBool, "true or false")
Whole, Count, Seed = whole(0), whole(1), whole(0, 2**31 - 1)
Number, NonNegative, Positive = number(), number(0), number(above=0)
Share, Fraction = number(0, 1), number(0, below=1)


def checked_dataclass(cls: type) -> type:
    """A frozen dataclass with checked fields; dicts become nested configs. `UserError` names each bad field."""
    cls = pydantic_dataclass(frozen=True, config=ConfigDict(extra="forbid"))(cls)
    validate = cls.__init__
    names = dict(enumerate(field.name for field in dataclasses.fields(cls)))

    @functools.wraps(validate)
    def init(self: Any, *args: Any, **values: Any) -> None:
        try:
            validate(self, *args, **values)
        except ValidationError as error:
            raise UserError("; ".join(_explained(problem, names) for problem in error.errors())) from None

    cls.__init__ = init
    return cls


def _explained(problem: Any, names: dict[int, str]) -> str:
    """One of pydantic's errors in words; `names` of arguments that were given by position."""
    path = [names.get(part, part) if i == 0 else part for i, part in enumerate(problem["loc"])]
    address = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
    error = problem.get("ctx", {}).get("error")
    if isinstance(error, UserError):  # from a `__post_init__`
        return f"{address}: {error}" if address else str(error)
    if problem["type"] in ("missing", "missing_argument"):
        return f"{address} is missing; restore the field"
    if problem["type"] == "unexpected_keyword_argument":
        fix = f"choose from {', '.join(names.values())}" if len(path) == 1 else "check its name"
        return f"{address} is unknown; {fix}"
    wanted = problem["msg"].replace("Input should be", "use", 1)
    return f"{address}={problem['input']!r} is not allowed; {wanted}"


def check(ok: Any, field: str, value: Any, wanted: Any) -> None:
    """`UserError` that names the field, its value and what is allowed, unless `ok`."""
    if not ok:
        raise UserError(f"{field}={value!r} is not allowed; use {wanted}")


def from_fields(cls: type, values: dict[str, Any]) -> Any:
    """The config whose fields, all of them, were saved. `UserError` where some are unknown or missing."""
    if not isinstance(values, dict):
        raise UserError(f"{cls.__name__}: {values!r} holds no fields; restore the config that was written")
    config, given = cls(**values), flat(values)
    if lost := [address for address in flat(config) if address not in given]:
        raise UserError(f"{cls.__name__} lacks the field {', '.join(lost)}; restore the config that was written")
    return config


def read_entries(path: Path, make: Callable[..., Any]) -> dict[str, Any]:
    """Name → `make(name, **fields)` for each entry of a TOML file; `UserError` names the entry that does not fit."""
    with naming(path, FIX):
        entries = tomllib.loads(path.read_text())
    configs = {}
    for name, values in entries.items():
        with naming(f"{path}, {name}", FIX):
            configs[name] = make(name, **values)
    return configs


def load_object(address: str) -> tuple[Callable, Path]:
    """The function or class of one's own that 'module:name' means, and its file; `UserError` where there is none."""
    module, _, name = address.partition(":")
    try:
        found = importlib.import_module(module)
        if not callable(named := getattr(found, name)):
            raise TypeError("neither a function nor a class")
        return named, Path(found.__file__)
    except Exception as error:  # of code that is not ours, too
        fix = "write module:name, and run where that module is, or with its folder in PYTHONPATH"
        raise UserError(f"{address!r}: cannot be imported ({type(error).__name__}: {error}); {fix}") from error


def flat(config: Any, address: str = "") -> dict[str, Any]:
    """Address → value of a nested config: 'train.loss.rhythm_weight', 'stages[0].width'; a list of values is one."""
    if dataclasses.is_dataclass(config):
        config = dataclasses.asdict(config)
    if isinstance(config, dict):
        parts = {f"{address}.{name}".removeprefix("."): part for name, part in config.items()}
    elif isinstance(config, list | tuple) and any(isinstance(part, dict) for part in config):
        parts = {f"{address}[{i}]": part for i, part in enumerate(config)}
    else:
        return {address: list(config) if isinstance(config, tuple) else config}  # JSON knows lists only
    return {name: value for own, part in parts.items() for name, value in flat(part, own).items()}


def differing_fields(a: Any, b: Any) -> list[tuple[str, Any, Any]]:
    """Fields in which two nested configs differ, with both values; None where a config has no such field."""
    a, b = flat(a), flat(b)
    fields = sorted(a.keys() | b.keys())
    return [(field, a.get(field), b.get(field)) for field in fields if a.get(field) != b.get(field)]
