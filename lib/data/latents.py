"""Encode a manifest's clips once, into checksummed shards on disk; read them back row by row, as pairs.

The cache has one folder for each codec fingerprint, clip length and hash of the code that reads and encodes clips.
Every array in it is a plain `.npy` file, written atomically and named by its own sha256, which reveals damage. JSON
files hold a checksum of their other fields.

    <sha256>.npy    a shard, float32 [rows, D, T]; or an index's table of pairs, uint32 [P, 6]; or its pair ids
    <sha256>.json   beside a shard, written after it: the clip keys of its rows, and each row's own checksum
    index-*.json    one for each manifest: codec and sizes, its shards, and for each split the table and the ids

So a killed run loses at most the shards in flight, a new song adds a shard, a damaged shard is rebuilt alone, and two
processes that encode at once only do some work twice. Reading verifies only the row it reads: a pair costs the same
among a thousand and among a million. Legend: P pairs, D latent channels, T frames.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import time
import zlib
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from lib.audio.files import load_audio
from lib.codec.codec import Codec
from lib.data.pairs import Clip, Manifest
from lib.util.errors import UserError
from lib.util.files import TEMPORARY, file_sha256, prefetch, read_json, write_atomic
from lib.util.provenance import code_fingerprint
from lib.util.tensors import torch_threads

SHARD_BYTES = 64 << 20  # about 100 clips of 16 s: few files, and little lost to a kill
STALE_SECONDS = 24 * 3600  # a temporary file this old was left by a killed run
AGAIN = "encode the manifest again, which rebuilds only what is missing or damaged"


class CorruptShardError(UserError):
    """A file of the cache that is missing or damaged: one line with its name and the fix."""

    def __init__(self, path: Path, fault: str):
        super().__init__(f"{path}: {fault}; {AGAIN}")


@dataclass(frozen=True)
class EncodeReport:
    """What `encode_manifest` did, in distinct clips."""

    index: Path  # for LatentPairs
    encoded: int  # not in the cache before, or in a damaged shard
    reused: int
    dropped: tuple[tuple[str, str], ...]  # (file and offset, reason)
    pairs: dict[str, int]  # split → remaining pairs


@dataclass(frozen=True)
class _Shard:
    sha256: str
    keys: tuple[str, ...]  # of its rows
    crcs: tuple[int, ...]  # of their bytes


def encode_manifest(
    manifest: Manifest, codec: Codec, cache_dir: str | Path, share: tuple[int, int] = (0, 1)
) -> EncodeReport:
    """Bring the latents of every clip into the cache, encoding only what it lacks, and write the manifest's index.

    Clips shorter than `clip_length` are padded with zeros. A clip that cannot be read, or whose file changed since the
    manifest, is dropped with its pairs. Raises `UserError` if no pair is left, if the codec has another sample rate, or
    if the cache cannot be written.

    `share` (i, n): this is the i-th of n processes that encode the manifest together. Its clips depend on the manifest
    alone, so that none is left out or done twice, whenever each process begins. The index holds what was there when it
    was written; after all have finished, one more call completes it.
    """
    if codec.sample_rate != manifest.sample_rate:
        raise UserError(f"codec {codec.name}: takes {codec.sample_rate} Hz, the manifest has {manifest.sample_rate} Hz")
    code = code_fingerprint("lib.data.latents")
    store = Path(cache_dir) / f"{codec.name}-{codec.fingerprint[:12]}-{manifest.clip_length}-{code[:12]}"
    frames = math.ceil(manifest.clip_length / codec.hop)
    rows_per_shard = max(1, SHARD_BYTES // (4 * codec.dim * frames))
    clips = {clip.key: clip for pair in manifest.pairs for clip in (pair.input, pair.target)}
    number, of = share
    mine = {key for place, key in enumerate(clips) if place // rows_per_shard % of == number}
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        with torch_threads(1):  # each clip on its own core: faster, and the same bits however busy the machine is
            store.mkdir(parents=True, exist_ok=True)
            for temp in store.glob(f".*{TEMPORARY}"):
                with contextlib.suppress(FileNotFoundError):  # another process has just renamed it
                    if time.time() - temp.stat().st_mtime > STALE_SECONDS:
                        temp.unlink()
            shards, damaged = _find_shards(store, clips, pool)
            damaged = [shard for shard in damaged if int(shard.sha256[:8], 16) % of == number]
            cached = {key for shard in shards for key in shard.keys}
            lost = [[key for key in shard.keys if key in clips and key not in cached] for shard in damaged]
            mine -= cached.union(*lost)
            missing = [key for key in clips if key in mine]
            groups = [keys for keys in lost if keys]
            groups += [missing[i : i + rows_per_shard] for i in range(0, len(missing), rows_per_shard)]
            new_shards, dropped = _encode_groups(groups, manifest, clips, codec, store, pool)
        shards += new_shards
        for shard in damaged:
            if not _is_intact(store / f"{shard.sha256}.npy", shard.sha256):  # not replaced under its own name
                (store / f"{shard.sha256}.json").unlink(missing_ok=True)
                (store / f"{shard.sha256}.npy").unlink(missing_ok=True)
        facts = {"codec": codec.name, "fingerprint": codec.fingerprint, "dim": codec.dim, "frames": frames}
        index, pairs = _write_index(store, manifest, shards, facts)
    except OSError as error:
        reason = f"cannot be written ({error.strerror}); choose a cache folder you may write to"
        raise UserError(f"{error.filename or store}: {reason}") from error
    finally:
        pool.shutdown(cancel_futures=True)
    if not pairs and of == 1:
        first = "; ".join(f"{name}: {reason}" for name, reason in list(dropped.values())[:3])
        raise UserError(f"{manifest.root}: no pair of the manifest can be encoded; first reasons: {first}")
    encoded = len({key for shard in new_shards for key in shard.keys})
    return EncodeReport(index, encoded, len(cached & clips.keys()), tuple(dropped.values()), pairs)


def _find_shards(store: Path, clips: dict[str, Clip], pool: Executor) -> tuple[list[_Shard], list[_Shard]]:
    """The shards that hold one of `clips`: intact ones, damaged ones. The checksums are verified in threads."""
    shards = []
    for path in sorted(store.glob("[0-9a-f]*.json")):  # not the indexes
        with contextlib.suppress(UserError):  # the rows of a damaged sidecar are unknown and count as missing
            sidecar = _read_checked(path)
            shard = _Shard(path.stem, tuple(sidecar["keys"]), tuple(sidecar["crc32"]))
            if not clips.keys().isdisjoint(shard.keys):
                shards.append(shard)
    checks = pool.map(lambda shard: _is_intact(store / f"{shard.sha256}.npy", shard.sha256), shards)
    intact = list(tqdm(checks, total=len(shards), desc="checking shards", disable=len(shards) < 8))
    found = {ok: [shard for shard, is_ok in zip(shards, intact, strict=True) if is_ok == ok] for ok in (True, False)}
    return found[True], found[False]


def _encode_groups(
    groups: list[list[str]], manifest: Manifest, clips: dict[str, Clip], codec: Codec, store: Path, pool: Executor
) -> tuple[list[_Shard], dict[str, tuple[str, str]]]:
    """Each group of keys becomes a shard. Returns the shards, and key → (clip, reason) of the clips dropped."""
    wanted = [clips[key] for group in groups for key in group]
    hashes = {clip.path: clip.sha256 for clip in wanted}
    same = pool.map(lambda path: _is_intact(manifest.root / path, hashes[path]), hashes)
    unchanged = dict(zip(hashes, same, strict=True))

    def encode(key: str) -> np.ndarray | str:
        clip = clips[key]
        try:
            wav = load_audio(manifest.path(clip), clip.offset, clip.length, codec.sample_rate)  # [1, N]
            if not unchanged[clip.path]:
                return "changed since the manifest was built; build the manifest again"
            wav = torch.nn.functional.pad(wav, (0, manifest.clip_length - wav.shape[1]))
            return codec.encode(wav[None])[0].float().cpu().numpy()  # [D, T]
        except ValueError as error:  # an AudioError, or samples that the codec refuses
            return str(error)

    shards, dropped = [], {}
    # the next group is encoded while one is written; no more, to bound memory
    encoded = contextlib.closing(prefetch(lambda group: list(pool.map(encode, group)), groups, threads=1))
    bar = tqdm(total=len(wanted), desc=f"encoding ({codec.name})", unit="clip", disable=not wanted)
    with bar as progress, encoded as all_results:
        for group, results in zip(groups, all_results, strict=True):
            progress.update(len(group))
            found = dict(zip(group, results, strict=True))
            failed = {key: reason for key, reason in found.items() if isinstance(reason, str)}
            dropped |= {k: (f"{clips[k].path} at sample {clips[k].offset}", reason) for k, reason in failed.items()}
            if rows := {key: latents for key, latents in found.items() if key not in failed}:
                array = np.ascontiguousarray(np.stack(list(rows.values())))  # row after row
                sha256, crcs = write_array(store, array), [zlib.crc32(row) for row in array]
                sidecar = {"fingerprint": codec.fingerprint, "sha256": sha256, "keys": list(rows), "crc32": crcs}
                write_checked(store / f"{sha256}.json", sidecar)
                shards.append(_Shard(sha256, tuple(rows), tuple(crcs)))
    return shards, dropped


def _write_index(store: Path, manifest: Manifest, shards: list[_Shard], facts: dict) -> tuple[Path, dict[str, int]]:
    """Returns the index's path and the number of pairs of each split. Pairs that lack a clip are left out."""
    shards = sorted(shards, key=lambda shard: shard.sha256)
    place, splits = {}, {}
    for number, shard in enumerate(shards):
        place |= {key: (number, row, crc) for row, (key, crc) in enumerate(zip(shard.keys, shard.crcs, strict=True))}
    for pair in manifest.pairs:
        if pair.input.key in place and pair.target.key in place:
            table, ids = splits.setdefault(pair.split, ([], []))
            table.append(place[pair.input.key] + place[pair.target.key])
            ids.append(pair.id.encode(errors="surrogateescape"))
    index = facts | {
        "clip_length": manifest.clip_length,
        "sample_rate": manifest.sample_rate,
        "shards": [{"file": f"{s.sha256}.npy", "rows": len(s.keys), "sha256": s.sha256} for s in shards],
        "splits": {
            # a pair: shard, row and the row's checksum, of the input and of the target; ids: UTF-8 of fixed width
            split: {"pairs": write_array(store, np.array(table, np.uint32)), "ids": write_array(store, np.array(ids))}
            for split, (table, ids) in splits.items()
        },
    }
    identity = [[pair.id, pair.split, pair.input.key, pair.target.key] for pair in manifest.pairs]
    path = store / f"index-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]}.json"
    write_checked(path, index)
    return path, {split: len(table) for split, (table, _) in splits.items()}


def write_checked(path: Path, facts: dict) -> None:
    write_atomic(path, json.dumps(facts | {"checksum": _checksum(facts)}))


def _read_checked(path: Path) -> dict:
    """What `write_checked` wrote; `UserError` if it is missing or damaged."""
    facts = read_json(path, fix=AGAIN)
    if facts.pop("checksum", None) != _checksum(facts):
        raise UserError(f"{path}: damaged (its checksum is wrong); {AGAIN}")
    return facts


def _checksum(facts: dict) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def write_array(folder: Path, array: np.ndarray) -> str:
    """Write `<sha256>.npy`; returns the sha256. Two writers of one name write the same bytes."""
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    sha256 = hashlib.sha256(content.getbuffer()).hexdigest()
    write_atomic(folder / f"{sha256}.npy", content.getbuffer())
    return sha256


def _is_intact(path: Path, sha256: str) -> bool:
    try:
        return file_sha256(path) == sha256
    except OSError:
        return False


class LatentPairs(Dataset):
    """The pairs of one split of an index: `pairs[i]` is (input `[D, T]`, target `[D, T]`), float32.

    Every row is verified when it is read; several threads may read at once. Raises `UserError` for a missing or damaged
    index, an unknown split, or latents of a codec other than `codec_fingerprint`; `CorruptShardError` for a bad shard.
    """

    def __init__(self, index_path: str | Path, split: str, codec_fingerprint: str | None = None):
        path = Path(index_path)
        index = _read_checked(path)
        self.codec, self.fingerprint = index["codec"], index["fingerprint"]
        self.dim, self.frames = index["dim"], index["frames"]
        self.clip_length, self.sample_rate = index["clip_length"], index["sample_rate"]
        self._shards = [(path.parent / shard["file"], shard["rows"]) for shard in index["shards"]]
        splits = {name: (entry["pairs"], entry["ids"]) for name, entry in index["splits"].items()}
        if split not in splits:
            raise UserError(f"{path}: split {split!r} has no pairs; there are {', '.join(splits) or 'none'}")
        if codec_fingerprint not in (None, self.fingerprint):
            fault = f"holds latents of codec {self.codec} {self.fingerprint[:12]}, not of {codec_fingerprint[:12]}"
            raise UserError(f"{path}: {fault}; encode with the codec you train with")
        self._table, self._ids = (_open_array(path.parent / f"{sha256}.npy", sha256) for sha256 in splits[split])

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        places = self._table[i].tolist()
        return self._row(*places[:3]), self._row(*places[3:])

    def pair_id(self, i: int) -> str:
        """The pair's id in the manifest."""
        return self._ids[i].decode(errors="surrogateescape")

    def _row(self, number: int, row: int, crc: int) -> Tensor:
        path, rows = self._shards[number]
        latents = np.empty((self.dim, self.frames), dtype=np.float32)
        try:
            # read, not mapped: page faults of a map cost ten times as much if the page is not in memory yet
            with open(path, "rb") as file:
                file.seek(os.fstat(file.fileno()).st_size - (rows - row) * latents.nbytes)
                file.readinto(latents)
        except (OSError, ValueError) as error:  # ValueError: it is shorter than its rows
            raise CorruptShardError(path, f"cannot be read ({error})") from error
        if zlib.crc32(latents) != crc:
            raise CorruptShardError(path, f"row {row} is damaged")
        return torch.from_numpy(latents)


def _open_array(path: Path, sha256: str) -> np.ndarray:
    """A memory map of the file, after its checksum was verified."""
    if not _is_intact(path, sha256):
        raise CorruptShardError(path, "its checksum is wrong" if path.exists() else "no such file")
    return np.load(path, mmap_mode="r", allow_pickle=False)
