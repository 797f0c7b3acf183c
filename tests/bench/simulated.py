"""A data set of any size that takes little room on disk: its latents are holes in sparse files, and read as zeros."""

import hashlib
import json
import zlib
from pathlib import Path

import numpy as np

from lib.audio.files import SAMPLE_RATE
from lib.codec.mdct import DIM

FRAMES = 1200  # of a clip of 16 s
FILES = 10_000  # pairs take turns with them


def simulated_index(folder: Path, num_pairs: int) -> Path:
    """An index of so many training pairs of two clips each."""
    folder.mkdir(parents=True, exist_ok=True)
    crc = zlib.crc32(np.zeros((DIM, FRAMES), np.float32))
    names = [f"{i:016x}-{crc:08x}" for i in range(min(2 * num_pairs, FILES))]
    for name in names:
        with open(folder / f"{name}.npy", "wb") as file:
            file.truncate(128 + 4 * DIM * FRAMES)
    clips = np.array(names, "S")[np.arange(2 * num_pairs) % len(names)].reshape(num_pairs, 2)
    ids = np.array([f"train_cross_{i:07d}".encode() for i in range(num_pairs)])
    facts = {"codec": "mdct", "fingerprint": hashlib.sha256(b"simulated").hexdigest(), "dim": DIM, "frames": FRAMES}
    facts |= {"clip_length": FRAMES * 320, "sample_rate": SAMPLE_RATE}
    path, table = folder / "index-simulated.npz", np.column_stack([ids, clips])
    np.savez(path, allow_pickle=False, facts=json.dumps(facts), train=table)
    return path
