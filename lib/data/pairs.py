"""Folders of music → pairs of clips, split into train and validation by source file, written as a manifest (JSON).

A pair is an *input* clip and a *target* clip. The mode says where they come from (data/README.md shows the folders):

- `named`: pairs of files; those longer than a clip give one pair per clip, cut at the same positions.
- `continuation`: a file is cut into clips, each the input for the next one: [0, L) → [L, 2L), [L, 2L) → [2L, 3L), …
- `cross`: a clip of one file and a clip of another file of the same split, drawn with the seed.
- `both`: continuation and cross. `auto`: named if that layout is found, else both.

Files are identified by the hash of their bytes, so a copy under another name cannot leak from train to val. The
manifest, which gives the reason for every file that is not used, is built again only when something has changed.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

from pydantic import Field
from torch import Tensor

from lib.audio.decode import NAMES, AudioError
from lib.audio.files import MIN_SAMPLES, SAMPLE_RATE, Check, Skipped, check_audio, check_files, load_audio, walk_audio
from lib.util.configs import Count, Whole, check, checked_dataclass, choice
from lib.util.errors import UserError
from lib.util.files import naming, read_json, write_file
from lib.util.provenance import code_fingerprint

MODES = ("auto", "named", "continuation", "cross", "both")
SPLITS = ("train", "val")
SPLIT_FOLDERS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
MANIFEST_VERSION = 2
AGAIN = "build the manifest again"
MIN_FILL = 0.9  # a clip that is filled to at least this fraction is used, and padded with zeros later
CROSS_PER_FILE = 4
VAL_FRACTION = 0.2
IN_VAL = "is in val/ too, and train must not see it; remove one of them"

_NAMED = re.compile(r"(?P<id>pair_.+)_(?P<role>input|target|output)", re.IGNORECASE)


@checked_dataclass
class Clip:
    """A window of a file. `offset` and `length` are samples at its `sample_rate`; `length` does not count padding."""

    path: str  # posix, relative to the data root
    offset: Whole
    length: Count
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]  # of the file's bytes
    sample_rate: Count = SAMPLE_RATE  # Hz, the codec's

    @property
    def key(self) -> str:
        """Identity of the content (64 bits, hex): the same for a copy of the file under another name."""
        return hashlib.sha256(f"{self.sha256}:{self.offset}:{self.length}".encode()).hexdigest()[:16]

    def cut(self, length: int) -> list["Clip"]:
        """Consecutive clips of a whole file; the last one may be up to 10 % short."""
        clips = [replace(self, offset=at, length=min(length, self.length - at)) for at in range(0, self.length, length)]
        return [clip for clip in clips if clip.fills(length)]

    def fills(self, length: int) -> bool:
        """Whether it is long enough for a clip of that length."""
        return self.length >= MIN_FILL * length


@checked_dataclass
class Pair:
    id: str  # unique in the manifest
    split: choice(SPLITS)
    mode: choice(("named", "continuation", "cross"))
    input: Clip
    target: Clip


@checked_dataclass
class Manifest:
    root: Path  # the data folder
    clip_length: Count  # samples at `sample_rate`
    sample_rate: Count
    seed: int
    pairs: Annotated[tuple[Pair, ...], Field(min_length=1)]
    skipped: tuple[Skipped, ...] = ()
    made_of: str = ""  # hash of the settings, the code, and the name, size and time of every file

    def split(self, name: str) -> tuple[Pair, ...]:
        """The pairs of "train" or "val"."""
        if name not in SPLITS:
            raise ValueError(f"unknown split {name!r}; choose one of {', '.join(SPLITS)}")
        return tuple(pair for pair in self.pairs if pair.split == name)

    @property
    def index_name(self) -> str:
        """Names the pairs by their content; the index of their latents is called so."""
        identity = [[pair.id, pair.split, pair.input.key, pair.target.key] for pair in self.pairs]
        return f"index-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]}"

    @property
    def split_by(self) -> str:
        """What decided about the split, in words."""
        by_folder = all(split_of(pair.input.path) == pair.split for pair in self.pairs)
        return "the folders train/ and val/" if by_folder else "a hash of each song"

    def songs(self, split: str) -> set[str]:
        """Hashes of the files that the clips of a split are from."""
        return {clip.sha256 for pair in self.split(split) for clip in (pair.input, pair.target)}

    def path(self, clip: Clip) -> Path:
        """The clip's file."""
        return self.root / clip.path


def whole_clip(manifest: Manifest, clip: Clip) -> Clip:
    """The clip with the full path of its file instead of the path within the data folder."""
    return replace(clip, path=str(manifest.path(clip)))


def cut_to_shorter(input: Clip, target: Clip) -> tuple[Clip, Clip]:
    length = min(input.length, target.length)
    return replace(input, length=length), replace(target, length=length)


def load_pair(input: Clip, target: Clip, channels: int = 1) -> tuple[Tensor, Tensor]:
    """Both clips `[channels, N]`, cut to the shorter one. They are whole ones: each `path` is that of the file."""
    clips = cut_to_shorter(input, target)
    wavs = tuple(load_audio(clip.path, clip.offset, clip.length, clip.sample_rate, channels) for clip in clips)
    for clip, wav in zip(clips, wavs, strict=True):
        if wav.shape[-1] < clip.length:
            raise UserError(f"{clip.path}: ends before sample {clip.offset + clip.length}; restore the file")
    return wavs


def build_manifest(
    data_dir: str | Path,
    out_path: str | Path,
    clip_seconds: float = 16.0,
    mode: str = "auto",
    seed: int = 0,
    check_file: Check = check_audio,
    before_writing: Callable[["Manifest"], None] = lambda manifest: None,
    sample_rate: int = SAMPLE_RATE,
) -> Manifest:
    """Check every file under `data_dir`, make pairs and write the manifest, or read it if nothing has changed. Split,
    unless by folders: contents in the order of sha256(seed, hash); the first ceil(n / 5) are validation. Each
    split has at least one file, with four files or more two, as a cross pair needs. `UserError` if one has no pair, or
    from `before_writing`, which may refuse to replace an earlier manifest. `sample_rate`: Hz, the codec's."""
    root, out_path = Path(data_dir), Path(out_path)
    check(mode in MODES, "mode", mode, f"one of {', '.join(MODES)}")
    long_enough = math.isfinite(clip_seconds) and round(clip_seconds * SAMPLE_RATE) >= MIN_SAMPLES
    check(long_enough, "clip_seconds", clip_seconds, f"{MIN_SAMPLES / SAMPLE_RATE:.4f} or more, one codec frame")
    if not root.is_dir():
        fault = "a file, not a folder; name the folder it is in" if root.exists() else "no such folder; check the path"
        raise UserError(f"{root}: {fault}")
    clip_length = round(clip_seconds * sample_rate)
    files, skipped = walk_audio(root, ignore=[out_path])
    if not files:
        others = f" (only {len(skipped)} other files)" if skipped else ""
        raise UserError(f"{root}: no music in this folder{others}; put {NAMES} files there")
    made_of = _made_of(root, files, [clip_length, sample_rate, mode, seed])
    with contextlib.suppress(UserError):  # there is none, or a damaged one
        if (manifest := read_manifest(out_path)).made_of == made_of and manifest.root == root.resolve():
            return manifest
    found = list(zip(files, check_files(root, files, check_file, "checking audio"), strict=True))
    reasons = {path: what.problem for path, what in found if isinstance(what, AudioError)}  # why files are in no pair
    good = [(path, what) for path, what in found if not isinstance(what, AudioError)]
    sources = [Clip(path, 0, what.samples_at(sample_rate), what.sha256, sample_rate) for path, what in good]
    named = _named_files(sources) if mode in ("auto", "named") else {}
    if mode == "named" and not named:
        layout = "train/ and val/ with pair_XXXX_input.* and pair_XXXX_target.*"
        raise UserError(f"{root}: no usable {layout}; check the names, or use mode continuation, cross or both")
    if named:
        pairs = _named_pairs(sources, named, clip_length, reasons)
    else:
        kinds = ("continuation", "cross") if mode in ("auto", "both") else (mode,)
        pairs = _tree_pairs(root, sources, kinds, clip_length, seed, reasons)
    skipped = sorted([*skipped, *itertools.starmap(Skipped, reasons.items())], key=lambda item: item.path)
    for split in SPLITS:
        if not any(pair.split == split for pair in pairs):
            first = "; ".join(f"{path}: {reason}" for path, reason in sorted(reasons.items())[:3])
            found = f"no usable pair for {split} among {len(files)} music files"
            raise UserError(f"{root}: {found}; first reasons: {first or 'too few files'}")
    manifest = Manifest(root.resolve(), clip_length, sample_rate, seed, tuple(pairs), tuple(skipped), made_of)
    before_writing(manifest)
    write_manifest(manifest, out_path)
    return manifest


def _made_of(root: Path, files: list[str], settings: list[int | str]) -> str:
    listing = []
    for name in files:
        with contextlib.suppress(OSError):  # a broken link
            status = (root / name).stat()
            listing.append([name, status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps([settings, code_fingerprint("lib.data.pairs"), listing]).encode()).hexdigest()


def _named_files(sources: list[Clip]) -> dict[tuple[str, str], dict[str, Clip]]:
    """(split, id) → role → file; empty if the folder has no named pairs."""
    named = defaultdict(dict)
    for role in ("input", "target", "output"):  # in this order: a pair with both keeps its target
        for source in sources:
            split, (_, _, name) = split_of(source.path), source.path.partition("/")
            match = _NAMED.fullmatch(Path(name).stem)
            if split and "/" not in name and match and match["role"].lower() == role:
                named[split, match["id"]].setdefault("input" if role == "input" else "target", source)
    return named


def split_of(path: str) -> str | None:
    """The split that a path's first folder names: Train/ and validation/ count as well as train/ and val/."""
    folder, slash, _ = path.partition("/")
    return SPLIT_FOLDERS.get(folder.lower()) if slash else None


def _named_pairs(
    sources: list[Clip], named: dict[tuple[str, str], dict[str, Clip]], clip_length: int, reasons: dict[str, str]
) -> list[Pair]:
    """Pairs of files; `reasons` gets every file that is in none."""
    validation = {file.sha256 for (split, _), files in named.items() if split == "val" for file in files.values()}
    pairs = []
    for (split, name), files in sorted(named.items()):
        halves = list(files.values())
        leaking = [file.path for file in halves if split == "train" and file.sha256 in validation]
        if len(halves) < 2:
            missing = "target" if "input" in files else "input"
            reasons[halves[0].path] = f"its pair has no usable {missing}; add {name}_{missing}.* to {split}/"
        elif leaking:
            for file in halves:
                whose = "its content" if file.path in leaking else "the other half of its pair"
                reasons[file.path] = f"{whose} {IN_VAL}"
        elif cuts := list(zip(files["input"].cut(clip_length), files["target"].cut(clip_length), strict=False)):
            for number, (source, target) in enumerate(cuts):
                pairs.append(Pair(f"{split}_{name}" + f"_{number}" * (len(cuts) > 1), split, "named", source, target))
        else:
            reasons |= {file.path: _too_short(min(halves, key=lambda f: f.length), clip_length) for file in halves}
    unnamed = {source.path for source in sources} - {file.path for files in named.values() for file in files.values()}
    reasons |= dict.fromkeys(unnamed, "neither train/ nor val/ pair_XXXX_input.* or _target.*, or one too many of them")
    return pairs


def _tree_pairs(
    root: Path, sources: list[Clip], kinds: tuple[str, ...], clip_length: int, seed: int, reasons: dict[str, str]
) -> list[Pair]:
    """Continuation and cross pairs of any folder tree; `reasons` gets every file that is in none."""
    tops = {source.path: split_of(source.path) for source in sources}
    given = {split_of(f"{folder.name}/") for folder in root.iterdir() if folder.is_dir()} >= set(SPLITS)
    if given:  # songs of any name in train/ and val/
        if unused := [split for split in SPLITS if split not in tops.values()]:
            fix = "put music there, or remove that folder"
            raise UserError(f"{root}: is split into train/ and val/, but no file of {unused[0]}/ is usable; {fix}")
        outside = [path for path, split in tops.items() if split is None]
        reasons |= dict.fromkeys(outside, "neither in train/ nor in val/; move it into one")
        sources = [source for split in ("val", "train") for source in sources if tops[source.path] == split]
    distinct: dict[str, Clip] = {}
    for source in sources:
        first = distinct.setdefault(source.sha256, source)
        if given and tops[first.path] != tops[source.path]:
            reasons[source.path] = f"its content {IN_VAL}"
        elif first is not source:
            reasons[source.path] = f"same content as {first.path}, which is used; remove one of them"
    if len(distinct) == 1:
        raise UserError(f"{root}: only one usable file ({sources[0].path}), and validation needs another; add a file")
    ordered = sorted(distinct, key=lambda sha256: hashlib.sha256(f"{seed}:{sha256}".encode()).hexdigest())
    least = min(2, len(ordered) // 2)
    validation = set(ordered[: min(max(math.ceil(VAL_FRACTION * len(ordered)), least), len(ordered) - least)])
    if given:
        validation = {sha256 for sha256, source in distinct.items() if tops[source.path] == "val"}
    pairs, used = [], set()
    for split in SPLITS:
        files = [source for source in distinct.values() if (source.sha256 in validation) == (split == "val")]
        clips = [source.cut(clip_length) for source in files]
        for kind in kinds:
            consecutive = itertools.chain.from_iterable(map(itertools.pairwise, clips))
            couples = consecutive if kind == "continuation" else _crossings(clips, seed)
            for number, (source, target) in enumerate(couples):
                pairs.append(Pair(f"{split}_{kind}_{number:05d}", split, kind, source, target))
                used |= {source.path, target.path}
    needs = {"continuation": "a second clip in the same file", "cross": "a second file in the same split"}
    alone = f"no partner: it needs {' or '.join(needs[kind] for kind in kinds)}; add files or shorten the clips"
    for source in distinct.values():
        if source.path not in used:
            reasons[source.path] = alone if source.cut(clip_length) else _too_short(source, clip_length)
    return pairs


def _crossings(clips: list[list[Clip]], seed: int) -> Iterator[tuple[Clip, Clip]]:
    """For each file, up to four distinct pairs of one of its clips with a clip of another file."""
    usable = [pieces for pieces in clips if pieces]
    for pieces in usable:
        # seeded and sorted by content, so that the draw does not depend on what the files are called
        rng = random.Random(f"{seed}:{pieces[0].sha256}")
        others = sorted((other for other in usable if other is not pieces), key=lambda other: other[0].sha256)
        rng.shuffle(others)  # one partner after another: a long file is not drawn more often than a short one
        partners = itertools.islice(itertools.cycle(others), CROSS_PER_FILE)
        yield from dict.fromkeys((rng.choice(pieces), rng.choice(partner)) for partner in partners)


def _too_short(source: Clip, clip_length: int) -> str:
    has, needs = source.length / source.sample_rate, MIN_FILL * clip_length / source.sample_rate
    return f"too short: {has:.2f} s, a clip needs {needs:.2f} s; use a longer recording or a smaller clip_seconds"


def read_manifest(path: str | Path) -> Manifest:
    """Read a manifest; `UserError` with file and field if it is missing or damaged."""
    path = Path(path)
    content = read_json(path, fix=AGAIN, errors="surrogateescape")
    with naming(path, AGAIN):
        if (version := content.pop("version")) != MANIFEST_VERSION:
            raise ValueError(f"version {version!r} is not {MANIFEST_VERSION}")
        manifest = Manifest(**content)
    return replace(manifest, root=Path(os.path.normpath(path.resolve().parent / manifest.root)))


def write_manifest(manifest: Manifest, path: Path) -> None:
    # the root is relative to the manifest, so that data and outputs can be moved together
    root = Path(os.path.relpath(manifest.root, path.resolve().parent)).as_posix()
    content = {"version": MANIFEST_VERSION} | asdict(manifest) | {"root": root}
    content["pairs"] = content.pop("pairs")  # last, as they are many
    write_file(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
