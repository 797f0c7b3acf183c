"""Folders of music → pairs of clips, split into train and validation by source file, written as a manifest.

A pair is an *input* clip and a *target* clip. Where they come from is the mode:

- `named`: `train/` and `val/` hold `pair_XXXX_input.*` and `pair_XXXX_target.*` (or `_output`); the folder is the
  split. Files longer than a clip give one pair per clip, cut at the same places.
- `continuation`: a file is cut into consecutive clips, and each clip is the input to the one after it:
  [0, L) → [L, 2L), [L, 2L) → [2L, 3L), and so on. Neighbouring pairs share a clip, which is encoded once.
- `cross`: a clip of one file and a clip of another file of the same split, drawn with the seed.
- `both`: continuation and cross. `auto`: named where that layout is found, else both.

Source files are told apart by the hash of their bytes, so a copy under another name cannot leak from train to val. The
same recording in another format has other bytes and is not recognised.
"""

import hashlib
import itertools
import math
import os
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from lib.audio.files import AUDIO_SUFFIXES, MIN_SAMPLES, SAMPLE_RATE, AudioError, check_audio
from lib.data.manifest import MODES, SPLITS, Clip, Manifest, Pair, Skipped, read_manifest, report_path, write_manifest
from lib.util.errors import UserError

__all__ = ["Clip", "Manifest", "Pair", "build_manifest", "read_manifest"]

MIN_FILL = 0.9  # a clip with at least this part of its length is used and padded with zeros later

_NAMED = re.compile(r"(?P<id>pair_.+)_(?P<role>input|target|output)", re.IGNORECASE)
_PROGRESS_FROM = 8  # files; below that a bar is noise


@dataclass(frozen=True)
class _Source:
    """A file that passed `check_audio`."""

    path: str
    sha256: str
    num_samples: int

    def clips(self, clip_length: int) -> list[Clip]:
        """Consecutive clips from the start; the last one may be up to 10 % short."""
        offsets = range(0, self.num_samples, clip_length)
        lengths = [min(clip_length, self.num_samples - offset) for offset in offsets]
        pieces = zip(offsets, lengths, strict=True)
        return [Clip(self.path, start, n, self.sha256) for start, n in pieces if n >= MIN_FILL * clip_length]


def build_manifest(
    data_dir: str | Path,
    out_path: str | Path,
    clip_seconds: float = 16.0,
    mode: str = "auto",
    cross_per_file: int = 4,
    val_fraction: float = 0.2,
    seed: int = 0,
    workers: int | None = None,
) -> Manifest:
    """Check every file under `data_dir`, make pairs, and write the manifest and its report of skipped files.

    `out_path` gets JSON Lines: a header, then one pair a line. Beside it, `<stem>.skipped.json` lists every skipped
    file with the reason. The result depends on the files, the options and the seed, not on listing order or `workers`.

    Split, outside mode `named`: distinct contents are ordered by sha256(seed, hash); the first ceil(val_fraction · n)
    are validation. Each split gets at least one file, from four files on at least two (a cross pair needs two). Clip
    length plays no part, so manifests of different clip lengths agree on it.

    Raises `UserError` for a folder without one usable pair in each split (`val_fraction=0`: none in val, by choice).
    """
    root, out_path = Path(data_dir), Path(out_path)
    clip_length = _check_options(root, clip_seconds, mode, cross_per_file, val_fraction)
    files, skipped = _list_files(root, ignore=(out_path, report_path(out_path)))
    if not files:
        others = f" (only {len(skipped)} other files)" if skipped else ""
        raise UserError(f"{root}: no music in this folder{others}; put WAV, FLAC, OGG or MP3 files there")
    sources = _check_files(root, files, skipped, workers)
    named = _named_files(sources) if mode in ("auto", "named") else {}
    if mode == "named" and not named:
        layout = "train/ and val/ with pair_XXXX_input.* and pair_XXXX_target.*"
        raise UserError(f"{root}: no usable {layout}; check the names, or use mode continuation, cross or both")
    if named:
        pairs = _named_pairs(sources, named, clip_length, skipped)
    else:
        kinds = ("continuation", "cross") if mode in ("auto", "both") else (mode,)
        pairs = _tree_pairs(root, sources, kinds, clip_length, cross_per_file, val_fraction, seed, skipped)
    skipped.sort(key=lambda item: item.path)
    for split in SPLITS if val_fraction else SPLITS[:1]:
        if not any(pair.split == split for pair in pairs):
            raise UserError(_no_pairs(root, split, files, skipped))
    manifest = Manifest(root.resolve(), clip_length, SAMPLE_RATE, seed, tuple(pairs), tuple(skipped))
    write_manifest(manifest, out_path, mode)
    return manifest


def _check_options(root: Path, clip_seconds: float, mode: str, cross_per_file: int, val_fraction: float) -> int:
    """Refuse what makes no sense; return the clip length in samples."""
    if mode not in MODES:
        raise UserError(f"mode: unknown {mode!r}; choose one of {', '.join(MODES)}")
    if not math.isfinite(clip_seconds) or round(clip_seconds * SAMPLE_RATE) < MIN_SAMPLES:
        raise UserError(
            f"clip_seconds: {clip_seconds} is shorter than one codec frame; use {MIN_SAMPLES / 24_000:.4f}+"
        )
    if not 0 <= val_fraction < 1:
        raise UserError(f"val_fraction: {val_fraction} is outside 0 to 1; use 0.2, or 0 for no validation")
    if cross_per_file < 1:
        raise UserError(f"cross_per_file: {cross_per_file} is below 1; use 1 or more, or mode continuation")
    if not root.is_dir():
        fault = "a file, not a folder; name the folder it is in" if root.exists() else "no such folder; check the path"
        raise UserError(f"{root}: {fault}")
    return round(clip_seconds * SAMPLE_RATE)


def _list_files(root: Path, ignore: Sequence[Path]) -> tuple[list[str], list[Skipped]]:
    """Music files under `root`, relative and sorted, and the rest as skipped. Hidden files and folders are ignored.

    Links are followed, but no folder is entered twice, so a loop of links ends.
    """
    files, skipped, seen = [], [], set()
    ignored = {path.resolve() for path in ignore}

    def unreadable(error: OSError) -> None:
        relative = Path(error.filename).relative_to(root).as_posix()
        skipped.append(Skipped(relative, f"folder cannot be read ({error.strerror}); check its permissions"))

    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=unreadable):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in names:
            path = Path(folder, name)
            relative = path.relative_to(root).as_posix()
            if name.startswith(".") or path.resolve() in ignored:
                continue
            if path.suffix.lower() in AUDIO_SUFFIXES:
                files.append(relative)
            else:
                skipped.append(Skipped(relative, "not WAV, FLAC, OGG or MP3 by its name; convert it if it is music"))
    return sorted(files), skipped


def _check_files(root: Path, files: list[str], skipped: list[Skipped], workers: int | None) -> list[_Source]:
    """Decode and hash every file, in threads (libsndfile and hashlib release the GIL), keeping the order."""

    def check(relative: str) -> _Source | Skipped:
        try:
            report = check_audio(root / relative)
        except AudioError as error:
            return Skipped(relative, error.problem)
        return _Source(relative, report.sha256, report.num_samples)

    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        hidden = len(files) < _PROGRESS_FROM
        results = list(tqdm(pool.map(check, files), total=len(files), desc="checking audio", disable=hidden))
    skipped.extend(result for result in results if isinstance(result, Skipped))
    return [result for result in results if isinstance(result, _Source)]


def _named_files(sources: list[_Source]) -> dict[tuple[str, str], dict[str, _Source]]:
    """(split, id) → role → file, for the layout with named pairs; empty if that layout is absent."""
    named = defaultdict(dict)
    for role in ("input", "target", "output"):  # in this order: a pair that has both keeps its target
        for source in sources:
            split, _, name = source.path.partition("/")
            match = _NAMED.fullmatch(Path(name).stem)
            if split in SPLITS and "/" not in name and match and match["role"].lower() == role:
                named[split, match["id"]].setdefault("input" if role == "input" else "target", source)
    return named


def _named_pairs(
    sources: list[_Source],
    named: dict[tuple[str, str], dict[str, _Source]],
    clip_length: int,
    skipped: list[Skipped],
) -> list[Pair]:
    validation = {file.sha256 for (split, _), files in named.items() if split == "val" for file in files.values()}
    pairs, reasons = [], {}
    for (split, name), files in sorted(named.items()):
        halves = list(files.values())
        leaking = [file.path for file in halves if split == "train" and file.sha256 in validation]
        if len(halves) < 2:
            missing = "target" if "input" in files else "input"
            reasons[halves[0].path] = f"its pair has no usable {missing}; add {name}_{missing}.* to {split}/"
            continue
        if leaking:
            for file in halves:
                whose = "its content" if file.path in leaking else "the other half of its pair"
                reasons[file.path] = f"{whose} is in val/ too, and train must not see it; remove one of them"
            continue
        cuts = list(zip(files["input"].clips(clip_length), files["target"].clips(clip_length), strict=False))
        for number, (source, target) in enumerate(cuts):
            pairs.append(Pair(f"{split}_{name}" + f"_{number}" * (len(cuts) > 1), split, "named", source, target))
        if not cuts:
            reasons |= {file.path: _too_short(min(halves, key=lambda f: f.num_samples), clip_length) for file in halves}
    used = {file.path for files in named.values() for file in files.values()}
    for source in sources:
        if source.path not in used:
            reasons[source.path] = "neither train/ nor val/ pair_XXXX_input.* or _target.*, or one too many of them"
    skipped.extend(Skipped(path, reason) for path, reason in reasons.items())
    return pairs


def _tree_pairs(
    root: Path,
    sources: list[_Source],
    kinds: tuple[str, ...],
    clip_length: int,
    cross_per_file: int,
    val_fraction: float,
    seed: int,
    skipped: list[Skipped],
) -> list[Pair]:
    """Continuation and cross pairs of any folder tree; every file that ends in no pair is listed as skipped."""
    distinct: dict[str, _Source] = {}
    for source in sources:
        first = distinct.setdefault(source.sha256, source)
        if first is not source:
            skipped.append(Skipped(source.path, f"same content as {first.path}, which is used; remove one of them"))
    if len(distinct) == 1 and val_fraction:
        fault = f"only one usable file ({sources[0].path}), and validation needs another"
        raise UserError(f"{root}: {fault}; add a second file, or use val_fraction=0")
    split_of = _split_by_content(distinct, val_fraction, seed)
    pairs, used = [], set()
    for split in SPLITS:
        files = [source for source in distinct.values() if split_of[source.sha256] == split]
        clips = [source.clips(clip_length) for source in files]
        for kind in kinds:
            couples = _continuations(clips) if kind == "continuation" else _crossings(clips, cross_per_file, seed)
            for number, (source, target) in enumerate(couples):
                pairs.append(Pair(f"{split}_{kind}_{number:05d}", split, kind, source, target))
                used |= {source.path, target.path}
    for source in distinct.values():
        if source.path in used:
            continue
        reason = _too_short(source, clip_length)
        if source.clips(clip_length):
            needs = {"continuation": "a second clip in the same file", "cross": "a second file in the same split"}
            reason = f"no partner: it needs {' or '.join(needs[kind] for kind in kinds)}; "
            reason += "add files, shorten the clips or change val_fraction"
        skipped.append(Skipped(source.path, reason))
    return pairs


def _split_by_content(hashes: Iterable[str], val_fraction: float, seed: int) -> dict[str, str]:
    """Hash → split. The order is by a hash of the seed and the content: names and listing order play no part."""
    ordered = sorted(hashes, key=lambda sha256: hashlib.sha256(f"{seed}:{sha256}".encode()).hexdigest())
    total = len(ordered)
    least = min(2, total // 2)
    num_val = min(max(math.ceil(val_fraction * total), least), total - least) if val_fraction else 0
    return {sha256: "val" if index < num_val else "train" for index, sha256 in enumerate(ordered)}


def _continuations(clips: list[list[Clip]]) -> Iterator[tuple[Clip, Clip]]:
    for pieces in clips:
        yield from itertools.pairwise(pieces)


def _crossings(clips: list[list[Clip]], per_file: int, seed: int) -> Iterator[tuple[Clip, Clip]]:
    """For each file, up to `per_file` distinct pairs of one of its clips with a clip of another file."""
    usable = [pieces for pieces in clips if pieces]
    if len(usable) < 2:
        return
    for pieces in usable:
        # seeded and sorted by content, so that the draw does not depend on what the files are called
        rng = random.Random(f"{seed}:{pieces[0].sha256}")
        others = sorted((other for other in usable if other is not pieces), key=lambda other: other[0].sha256)
        rng.shuffle(others)  # partners in turn, so that a long file is not drawn more often than a short one
        partners = itertools.islice(itertools.cycle(others), per_file)
        yield from dict.fromkeys((rng.choice(pieces), rng.choice(partner)) for partner in partners)


def _too_short(source: _Source, clip_length: int) -> str:
    has, needs = source.num_samples / SAMPLE_RATE, MIN_FILL * clip_length / SAMPLE_RATE
    return f"too short: {has:.2f} s, a clip needs {needs:.2f} s; use a longer recording or a smaller clip_seconds"


def _no_pairs(root: Path, split: str, files: list[str], skipped: list[Skipped]) -> str:
    reasons = [f"{item.path}: {item.reason}" for item in skipped if item.path in set(files)]
    first = "; ".join(reasons[:3]) or "too few files"
    return f"{root}: no usable pair for {split} among {len(files)} music files; first reasons: {first}"
