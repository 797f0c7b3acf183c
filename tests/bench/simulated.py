"""A data set of any size that takes no room on disk: its latents are holes in sparse files, and read as zeros."""

import hashlib
import math
import zlib
from pathlib import Path

import numpy as np

from lib.audio.files import SAMPLE_RATE
from lib.codec.mdct import DIM
from lib.data.latents import SHARD_BYTES, write_array, write_checked

FRAMES = 1200  # of a clip of 16 s


def simulated_index(folder: Path, num_pairs: int) -> Path:
    """An index of so many training pairs of two clips each, in shards as large as real ones."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = SHARD_BYTES // (4 * DIM * FRAMES)
    clips = np.arange(2 * num_pairs)
    shards = [{"file": f"{i}.npy", "rows": rows, "sha256": "0" * 64} for i in range(math.ceil(len(clips) / rows))]
    np.lib.format.open_memmap(folder / "0.npy", mode="w+", dtype=np.float32, shape=(rows, DIM, FRAMES)).flush()
    header, size = (folder / "0.npy").read_bytes()[:128], (folder / "0.npy").stat().st_size
    for shard in shards[1:]:
        with open(folder / shard["file"], "wb") as file:
            file.write(header)
            file.truncate(size)
    crc = np.full_like(clips, zlib.crc32(np.zeros((DIM, FRAMES), np.float32)))
    table = np.stack([*np.divmod(clips, rows), crc], axis=1).reshape(num_pairs, 6).astype(np.uint32)
    ids = np.array([f"train_cross_{i:07d}".encode() for i in range(num_pairs)])
    index = {
        "codec": "mdct",
        "fingerprint": hashlib.sha256(b"simulated").hexdigest(),
        "dim": DIM,
        "frames": FRAMES,
        "clip_length": FRAMES * 320,
        "sample_rate": SAMPLE_RATE,
        "shards": shards,
        "splits": {"train": {"pairs": write_array(folder, table), "ids": write_array(folder, ids)}},
    }
    path = folder / "index-simulated.json"
    write_checked(path, index)
    return path
