"""The manifest: which clips make which pairs, as JSON Lines, and the report of files that were skipped.

The first line is a header with the data folder, the clip length and the seed; every other line is a pair.
"""

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from lib.util.errors import UserError
from lib.util.files import naming, read_json, read_json_lines, write_atomic

MODES = ("auto", "named", "continuation", "cross", "both")
SPLITS = ("train", "val")
MANIFEST_VERSION = 1
AGAIN = "build the manifest again"


@dataclass(frozen=True)
class Clip:
    """A window of a file. `offset` and `length` are samples at 24 kHz; `length` counts real ones, before padding."""

    path: str  # posix, relative to the data root
    offset: int
    length: int
    sha256: str  # of the file's bytes

    @property
    def key(self) -> str:
        """Identity of the content (64 bits, hex): the same for a copy of the file under another name."""
        return hashlib.sha256(f"{self.sha256}:{self.offset}:{self.length}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Pair:
    id: str  # unique in the manifest
    split: str  # "train" or "val"
    mode: str  # "named", "continuation" or "cross"
    input: Clip
    target: Clip


@dataclass(frozen=True)
class Skipped:
    path: str
    reason: str


@dataclass(frozen=True)
class Manifest:
    root: Path  # the data folder
    clip_length: int  # samples at `sample_rate`
    sample_rate: int
    seed: int
    pairs: tuple[Pair, ...]
    skipped: tuple[Skipped, ...]

    def split(self, name: str) -> tuple[Pair, ...]:
        """The pairs of "train" or "val"."""
        if name not in SPLITS:
            raise ValueError(f"unknown split {name!r}; choose one of {', '.join(SPLITS)}")
        return tuple(pair for pair in self.pairs if pair.split == name)

    def path(self, clip: Clip) -> Path:
        """Where a clip's file is."""
        return self.root / clip.path


def read_manifest(path: str | Path) -> Manifest:
    """Read what `build_manifest` wrote. Raises `UserError` with file and line if it is missing or damaged."""
    path = Path(path)
    header, *rows = read_json_lines(path, fix=AGAIN, errors="surrogateescape") or [{}]
    pairs = []
    for number, row in enumerate(rows, 2):
        with naming(f"{path}, line {number}", AGAIN):
            pairs.append(_pair_from_json(row))
    with naming(f"{path}, line 1", AGAIN):
        if header["version"] != MANIFEST_VERSION:
            raise ValueError(f"version {header['version']!r} is not {MANIFEST_VERSION}")
        fields = {name: header[name] for name in ("clip_length", "sample_rate", "seed")}
        if not all(type(value) is int for value in fields.values()):
            raise ValueError(f"{fields} are not all whole numbers")
        root = Path(os.path.normpath(path.resolve().parent / header["root"]))
        if header["num_pairs"] != len(pairs):
            raise ValueError(f"the file ends after {len(pairs)} pairs of {header['num_pairs']}")
    return Manifest(root=root, pairs=tuple(pairs), skipped=_read_report(report_path(path)), **fields)


def report_path(manifest_path: Path) -> Path:
    return manifest_path.with_name(manifest_path.stem + ".skipped.json")


def write_manifest(manifest: Manifest, path: Path, mode: str) -> None:
    # the root is relative to the manifest, so that data and outputs can be moved together
    header = {
        "version": MANIFEST_VERSION,
        "root": Path(os.path.relpath(manifest.root, path.resolve().parent)).as_posix(),
        "sample_rate": manifest.sample_rate,
        "clip_length": manifest.clip_length,
        "mode": mode,
        "seed": manifest.seed,
        "num_pairs": len(manifest.pairs),  # tells a manifest that was cut off at the end of a line
    }
    lines = [json.dumps(line, ensure_ascii=False) for line in (header, *map(asdict, manifest.pairs))]
    report = json.dumps([asdict(item) for item in manifest.skipped], ensure_ascii=False, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(report_path(path), report + "\n")
        write_atomic(path, "\n".join(lines) + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose a folder you may write to") from error


def _read_report(path: Path) -> tuple[Skipped, ...]:
    if not path.exists():
        return ()
    with naming(path, AGAIN):
        return tuple(Skipped(**item) for item in read_json(path, list, fix=AGAIN, errors="surrogateescape"))


def _pair_from_json(fields: dict) -> Pair:
    pair = Pair(**fields | {half: Clip(**fields[half]) for half in ("input", "target")})
    if pair.split not in SPLITS or pair.mode not in MODES:
        raise ValueError(f"split {pair.split!r} or mode {pair.mode!r} is unknown")
    for clip in (pair.input, pair.target):
        if not (type(clip.offset) is type(clip.length) is int and clip.offset >= 0 < clip.length):
            raise ValueError(f"offset {clip.offset!r} or length {clip.length!r} is no sample count")
        if not (isinstance(clip.path, str) and re.fullmatch("[0-9a-f]{64}", str(clip.sha256))):
            raise ValueError(f"path {clip.path!r} or sha256 {clip.sha256!r} is malformed")
    return pair
