"""The form of a record's files, which `lib.lab.results.read_record` reads."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from lib.util.files import write_atomic


def write_record(path: Path, results: Sequence[Any], facts: Mapping[str, Any]) -> None:
    """Dataclass instances or rows as one JSON file, one per line, after the facts that hold for all of them."""
    rows = (asdict(result) if is_dataclass(result) else result for result in results)
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    write_atomic(path, f'{{"facts": {json.dumps(dict(facts))},\n"results": [\n{lines}\n]}}\n')
