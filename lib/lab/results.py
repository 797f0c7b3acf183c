"""How the ablation's runs went: a result for each run, and the record, a small file of results in the repository."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from lib.training.run import Run
from lib.util.files import naming, read_json, write_atomic

DIGITS, POINTS = 4, 40  # of a number, and gradient norms of a run, in a record


@dataclass(frozen=True)
class Result:
    """How one run went. Metrics have the names of metrics.jsonl and `evaluate_fusion`."""

    variant: str
    seed: int
    num_layers: int
    steps: int  # taken
    non_finite: dict[str, Any] | None  # step, stage and tensor of the first non-finite value
    start: dict[str, float]  # medians over the first tenth of the steps ...
    end: dict[str, float]  # ... and over the last
    final: dict[str, float] | None  # on the validation pairs, after the last step; None after a non-finite value
    grad_norm: tuple[float, ...]  # before clipping, one a step, inf for a non-finite one; recorded: medians of parts
    run: str  # its folder
    quarter: dict[str, float] = field(default_factory=dict)  # medians over the tenth before a quarter of the steps

    def for_record(self) -> "Result":
        """With `DIGITS` digits a number, gradient norms as medians of `POINTS` equal parts, and no path."""
        norms, count = self.grad_norm, len(self.grad_norm)
        if count > POINTS:
            cuts = [round(i * count / POINTS) for i in range(POINTS + 1)]
            norms = tuple(statistics.median(norms[a:b]) for a, b in pairwise(cuts))
        return replace(self, **_rounded(asdict(self) | {"grad_norm": norms, "run": Path(self.run).name}))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, tuple):
        return tuple(map(_rounded, value))
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


Item = TypeVar("Item")


def summarize(folder: Path, variant: str, seed: int, num_layers: int) -> Result:
    """The result of the finished run in `folder`, from its result.json and metrics."""
    kinds = {"non_finite": object, "final": object}
    stored = read_json(folder / "result.json", kinds, fix=f"delete {folder} and run again")
    end, rows = {name: stored[name] for name in kinds}, training_steps(folder)
    tenth, quarter = max(1, len(rows) // 10), len(rows) // 4
    parts = {"start": rows[:tenth], "end": rows[-tenth:], "quarter": rows[quarter - tenth : quarter]}
    end |= {name: medians(part) for name, part in parts.items()}
    norms = tuple(row["grad_norm"] for row in rows) + ((math.inf,) if stored["non_finite"] else ())
    return Result(variant, seed, num_layers, len(rows), **end, grad_norm=norms, run=str(folder))


def training_steps(run: str | Path) -> list[dict[str, Any]]:
    """Its metrics, one row a step."""
    return [row for row in Run.open(run).metrics("train") if "event" not in row]


def medians(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    names = dict.fromkeys(name for row in rows for name in row if name not in ("split", "step", "epoch"))
    values = {name: [row[name] for row in rows if row.get(name) is not None] for name in names}  # null: not finite
    return {name: statistics.median(found) for name, found in values.items() if found}


def by_variant(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Variant → its results in order of seeds."""
    names = dict.fromkeys(result.variant for result in results)
    return {name: [result for result in results if result.variant == name] for name in names}


def write_record(path: Path, results: Sequence[Any], facts: Mapping[str, Any]) -> None:
    """Dataclass instances as one JSON file, one a line, after the facts that hold for all of them."""
    lines = ",\n".join(json.dumps(asdict(result), ensure_ascii=False) for result in results)
    write_atomic(path, f'{{"facts": {json.dumps(dict(facts))},\n"results": [\n{lines}\n]}}\n')


def read_record(path: Path, kind: type[Item] = Result) -> tuple[tuple[Item, ...], dict[str, Any]]:
    """What `write_record` wrote: results of one `kind`, and facts. `UserError` where it is missing or damaged."""
    missing = f"{path}: no such record; `make record` writes one"
    fix = "restore it from the repository or run `make record`"
    content = read_json(path, {"results": list, "facts": dict}, missing=missing, fix=fix)
    with naming(path, fix):
        rows = [{k: tuple(v) if isinstance(v, list) else v for k, v in dict(row).items()} for row in content["results"]]
        if not rows:
            raise ValueError("no results")
        return tuple(kind(**row) for row in rows), content["facts"]
