"""Encode a manifest's clips once, into one file each; read them back as pairs.

The cache has one folder for each codec fingerprint, clip length and hash of the code that reads and encodes clips.
Every file in it is written atomically and carries a checksum.

    <clip key>-<crc32>.npy    the latents of a clip, float32 [D, T], with the checksum of their bytes
    index-*.npz               one for each manifest: codec and sizes as JSON, and for each split a table of pairs, bytes
                              [P, 5]: a pair's id, the names of its input's and its target's latents, and of their clips

So a killed run loses at most the clips in flight, a new song adds its own clips, a damaged one is encoded again alone.
Reading verifies the two clips of a pair, whatever the size of the cache. P pairs, D latent channels, T frames.
"""

import io
import itertools
import json
import logging
import os
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from lib.audio.decode import AudioError, Decoder, mixed
from lib.audio.files import AudioReport, Check, check_files, report_on
from lib.codec.codec import Codec
from lib.data.pairs import Clip, Manifest
from lib.util.errors import UserError
from lib.util.files import file_sha256, naming, write_atomic, writing
from lib.util.provenance import code_fingerprint

logger = logging.getLogger(__name__)

AGAIN = "encode the manifest again, which rebuilds only what is missing or damaged"
WRITABLE = "choose a cache folder you may write to"


def encode_manifest(manifest: Manifest, codec: Codec, cache_dir: str | Path) -> Path:
    """Bring the latents of every clip into the cache, encoding only what it lacks; returns the manifest's index. Clips
    shorter than `clip_length` are padded with zeros. One that cannot be read, or whose file changed since the manifest,
    is dropped with its pairs, and a warning says why. `UserError` if no pair is left, if the codec has another sample
    rate than the manifest, or if the cache cannot be written."""
    if codec.sample_rate != manifest.sample_rate:
        rates = f"takes {codec.sample_rate} Hz, the clips have {manifest.sample_rate} Hz"
        raise UserError(f"codec {codec.name}: {rates}; build the manifest with the codec's sample_rate")
    store, shape = _store(cache_dir, codec, manifest.clip_length), (codec.dim, -(-manifest.clip_length // codec.hop))
    clips = {clip.key: clip for pair in manifest.pairs for clip in (pair.input, pair.target)}
    with writing(store, WRITABLE):
        names = _find_latents(store, clips, shape)
        songs = {clip.path: clip.sha256 for key, clip in clips.items() if key not in names}
        check, doing = encoding_check(codec, cache_dir, manifest.clip_length), f"encoding ({codec.name})"
        found = dict(zip(songs, check_files(manifest.root, list(songs), check, doing), strict=True))
        names |= _find_latents(store, {key: clip for key, clip in clips.items() if key not in names}, shape)
        facts = {"codec": codec.name, "fingerprint": codec.fingerprint, "dim": shape[0], "frames": shape[1]}
        facts |= {"clip_length": manifest.clip_length, "sample_rate": manifest.sample_rate}
        index, num_pairs = _write_index(store, manifest, names, facts)
    changed = "changed since the manifest was built; build the manifest again"
    reasons = {path: what if isinstance(what, AudioError) else changed for path, what in found.items()}
    dropped = [f"{c.path} at sample {c.offset}: {reasons[c.path]}" for key, c in clips.items() if key not in names]
    first = "; ".join(dropped[:3]) + f"; and {len(dropped) - 3} more" * (len(dropped) > 3)
    if not num_pairs:
        raise UserError(f"{manifest.root}: no pair of the manifest can be encoded; first reasons: {first}")
    if dropped:
        left_out = f"{len(dropped)} of {len(clips)} clips are left out with their pairs"
        logger.warning("%s: %s: %s", manifest.root, left_out, first)
    return index


def encoding_check(codec: Codec, cache_dir: str | Path, clip_length: int) -> Check:
    """A `check_audio` that, in the same decode, brings the latents of all clips of the file into the cache."""
    store = _store(cache_dir, codec, clip_length)
    there = {path.name.partition("-")[0] for path in store.glob("*-*.npy")}

    def check(path: Path) -> AudioReport:
        with Decoder(path) as file, writing(store, WRITABLE):
            sha256 = file_sha256(path)
            windows = zip(itertools.count(0, clip_length), itertools.repeat(clip_length))
            wavs = file.windows(windows, codec.sample_rate, mix=codec.channels == 1)
            for offset, wav in zip(itertools.count(0, clip_length), wavs):
                if not (length := wav.shape[1]):
                    return report_on(file, sha256)
                clip = Clip(path.name, offset, length, sha256)
                if clip.fills(clip_length) and clip.key not in there:
                    _encode(clip.key, mixed(wav, codec.channels), clip_length, codec, store)

    return check


def _store(cache_dir: str | Path, codec: Codec, clip_length: int) -> Path:
    """The codec's folder in the cache."""
    code = code_fingerprint("lib.data.latents")
    store = Path(cache_dir) / f"{codec.name}-{codec.fingerprint[:12]}-{clip_length}-{code[:12]}"
    with writing(store, WRITABLE):
        store.mkdir(parents=True, exist_ok=True)
    return store


def _find_latents(store: Path, clips: dict[str, Clip], shape: tuple[int, int]) -> dict[str, str]:
    """Key → name of the latents that are there for one of `clips`. Damaged files are deleted."""
    paths, names = [path for path in sorted(store.glob("*-*.npy")) if path.stem.split("-")[0] in clips], {}
    for path in tqdm(paths, desc="checking latents", delay=1):
        try:
            _read_latents(path, shape)
            names[path.stem.split("-")[0]] = path.stem
        except UserError:
            path.unlink(missing_ok=True)
    return names


def _encode(key: str, wav: Tensor, clip_length: int, codec: Codec, store: Path) -> None:
    """Encode a clip `[C, N]` into its file."""
    wav = torch.nn.functional.pad(wav, (0, clip_length - wav.shape[1]))
    latents = np.ascontiguousarray(codec.encode(wav[None])[0].float().cpu().numpy())  # [D, T]
    content = io.BytesIO()
    np.save(content, latents, allow_pickle=False)
    write_atomic(store / f"{key}-{zlib.crc32(latents):08x}.npy", content.getbuffer(), sync=False)


def _write_index(store: Path, manifest: Manifest, names: dict[str, str], facts: dict) -> tuple[Path, int]:
    """Returns the index's path and the number of pairs. Pairs that lack a clip are left out."""
    splits: dict[str, list[tuple[bytes, ...]]] = {}
    for pair in manifest.pairs:
        if pair.input.key in names and pair.target.key in names:
            clips = [f"{clip.path} at {clip.offset / clip.sample_rate:.2f} s" for clip in (pair.input, pair.target)]
            row = (pair.id, names[pair.input.key], names[pair.target.key], *clips)
            splits.setdefault(pair.split, []).append(tuple(part.encode(errors="surrogateescape") for part in row))
    tables = {split: np.array(rows) for split, rows in splits.items()}
    path = store / f"{manifest.index_name}.npz"
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, facts=json.dumps(facts), **tables)
    write_atomic(path, content.getbuffer())
    return path, sum(map(len, tables.values()))


def _read_latents(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """The latents `[D, T]` in a file, whose name ends with their checksum."""
    latents = np.empty(shape, dtype=np.float32)
    try:
        with open(path, "rb") as file:
            file.seek(-latents.nbytes, os.SEEK_END)  # after the header
            file.readinto(latents)
    except OSError as error:  # also if it is shorter than the latents
        raise UserError(f"{path}: cannot be read ({error.strerror}); {AGAIN}") from error
    if f"{zlib.crc32(latents):08x}" != path.stem.split("-")[1]:
        raise UserError(f"{path}: damaged (its checksum is wrong); {AGAIN}")
    return latents


class LatentPairs(Dataset):
    """The pairs of one split of an index: `pairs[i]` is (input `[D, T]`, target `[D, T]`), float32. Every clip is
    verified when it is read, also by several threads. `UserError` for a clip or an index that is missing or damaged, an
    unknown split, or latents of a codec other than `codec_fingerprint`."""

    def __init__(self, index_path: str | Path, split: str, codec_fingerprint: str | None = None):
        self.path = Path(index_path)
        with naming(self.path, AGAIN), np.load(self.path, allow_pickle=False) as index:  # which verifies checksums
            facts = json.loads(str(index["facts"]))
            splits = [name for name in index if name != "facts"]
            self._table = index[split] if split in splits else None
        self.codec, self.fingerprint = facts["codec"], facts["fingerprint"]
        self.dim, self.frames = facts["dim"], facts["frames"]
        self.clip_length, self.sample_rate = facts["clip_length"], facts["sample_rate"]
        if self._table is None:
            raise UserError(f"{self.path}: split {split!r} has no pairs; there are {', '.join(splits) or 'none'}")
        if codec_fingerprint not in (None, self.fingerprint):
            fault = f"holds latents of codec {self.codec} {self.fingerprint[:12]}, not of {codec_fingerprint[:12]}"
            raise UserError(f"{self.path}: {fault}; encode with the codec you train with")

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        paths = (self.path.with_name(f"{name.decode()}.npy") for name in self._table[i, 1:3])
        input, target = (torch.from_numpy(_read_latents(path, (self.dim, self.frames))) for path in paths)
        return input, target

    def clip_names(self, i: int) -> tuple[str, str]:
        """File and offset of the pair's input and target."""
        return tuple(name.decode(errors="surrogateescape") for name in self._table[i, 3:])

    def pair_id(self, i: int) -> str:
        """The pair's id in the manifest."""
        return self._table[i, 0].decode(errors="surrogateescape")
