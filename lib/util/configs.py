"""What all configs share: a field's check before anything runs, and reading back what was saved."""

import dataclasses
import math
import numbers
from typing import Any

from lib.util.errors import UserError


def check(ok: Any, field: str, value: Any, wanted: Any) -> None:
    """`UserError` that names the field, its value and what is allowed, unless `ok`."""
    if not ok:
        raise UserError(f"{field}={value!r} is not allowed; use {wanted}")


def is_finite(value: Any) -> bool:
    """Whether it is a number, and neither NaN nor infinite. A truth value is none, nor is text that looks like one."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def check_counts(config: Any, *names: str, least: int = 1, optional: bool = False) -> None:
    """Fields that must be whole numbers of at least `least`, or None where that is `optional`."""
    wanted = f"a whole number, {least} or more" + ", or none" * optional
    for name in names:
        value = getattr(config, name)
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
        check(whole or (optional and value is None), name, value, wanted)


def check_numbers(config: Any, *names: str, above: float | None = None, most: float = math.inf) -> None:
    """Fields that must be finite numbers, 0 or more, or more than `above`, and at most `most`."""
    wanted = "a finite number, " + ("0 or more" if above is None else f"above {above:g}")
    wanted += f", at most {most:g}" if most < math.inf else ""
    for name in names:
        value = getattr(config, name)
        fits = is_finite(value) and (value >= 0 if above is None else value > above) and value <= most
        check(fits, name, value, wanted)


def from_fields(cls: type, values: dict[str, Any]) -> Any:
    """A config from all of its fields, nested ones as dicts; unknown or missing ones raise `UserError`."""
    known = {field.name: field.type for field in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - set(known)):
        raise UserError(f"{cls.__name__} has no field {', '.join(unknown)}; its fields are {', '.join(sorted(known))}")
    if missing := sorted(set(known) - set(values)):
        raise UserError(f"{cls.__name__} lacks the field {', '.join(missing)}; restore the config that was written")
    parts = {
        name: from_fields(known[name], value)
        for name, value in values.items()
        if dataclasses.is_dataclass(known[name]) and isinstance(value, dict)
    }
    return cls(**values | parts)


def settings(config: Any, prefix: str = "") -> dict[str, dataclasses.Field]:
    """Every field of a nested config by its address, such as 'train.loss.rhythm_weight'."""
    found = {}
    for field in dataclasses.fields(config):
        value, address = getattr(config, field.name), prefix + field.name
        found |= settings(value, f"{address}.") if dataclasses.is_dataclass(value) else {address: field}
    return found


def with_settings(config: Any, changes: dict[str, Any], prefix: str = "") -> Any:
    """A copy of a nested config with the settings at these addresses changed. Values that a setting does not take raise
    `UserError`."""
    own: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    types = {field.name: field.type for field in dataclasses.fields(config)}
    for address, value in changes.items():
        name, _, rest = address.partition(".")
        if rest:
            nested.setdefault(name, {})[rest] = value
        else:
            own[name] = _as_type(prefix + name, value, types[name])
    for name, inner in nested.items():
        own[name] = with_settings(getattr(config, name), inner, f"{prefix}{name}.")
    return dataclasses.replace(config, **own)


def _as_type(address: str, value: Any, annotation: Any) -> Any:
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
    raise UserError(f"setting {address}={value!r} is not allowed; use a value of type {wanted}")


def config_differences(a: Any, b: Any) -> list[str]:
    """Fields in which two nested configs differ, as 'train.learning_rate: 0.0001 → 0.001'."""
    return [f"{field}: {of_a!r} → {of_b!r}" for field, of_a, of_b in differing_fields(a, b)]


def differing_fields(a: Any, b: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Fields in which two nested configs differ, with both values; None where a config has no such field."""
    if dataclasses.is_dataclass(a):
        a = dataclasses.asdict(a)
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted(set(a) | set(b))
        return [d for key in keys for d in differing_fields(a.get(key), b.get(key), f"{prefix}{key}.")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):  # JSON knows lists only
        a, b = list(a), list(b)
        if len(a) == len(b) and any(isinstance(item, dict) for item in a):
            stem = prefix.rstrip(".")
            return [d for i in range(len(a)) for d in differing_fields(a[i], b[i], f"{stem}[{i}].")]
    return [] if a == b else [(prefix.rstrip("."), a, b)]
