"""Training pairs: clips of music at 48 kHz, and the same after a random low-pass filter and a lower sample rate."""

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
from pydantic import Field
from scipy import signal
from torch import Tensor

from lib.audio.decode import AudioError
from lib.audio.files import AudioReport, check_audio, check_files, load_audio, walk_audio
from lib.superres.mel import SAMPLE_RATE
from lib.util.configs import checked_dataclass, choice, whole
from lib.util.errors import UserError

logger = logging.getLogger(__name__)

RIPPLE, STOP = {"rp": 0.05}, {"rs": 40.0}  # dB, pass-band ripple and stop-band attenuation
KINDS = {"butter": {}, "cheby1": RIPPLE, "ellip": RIPPLE | STOP, "bessel": {}}  # of filters, with their limits
ORDERS = (2, 10)  # of one pass; filtering forwards and backwards doubles the order and cancels the delay
LOWEST, HIGHEST = 2_000, 16_000  # Hz
LOWEST_RATE = 44_100  # Hz: files below it have no upper band to learn from
GRID = 250  # Hz between cutoffs: the ratios of such sample rates to 48 kHz have small terms


@checked_dataclass
class Degradation:
    """A way to remove the upper band. Without a `kind` the clip is only resampled, with a sharp filter (sinc)."""

    cutoff: Annotated[int, Field(strict=True, ge=GRID, le=SAMPLE_RATE // 2, multiple_of=GRID)]  # Hz
    kind: choice(KINDS) | None = None
    order: whole(1, 20) = 8

    @classmethod
    def draw(cls, generator: np.random.Generator) -> "Degradation":
        """A random order and cutoff, uniformly, and for half of the clips a random kind."""
        cutoff = GRID * int(generator.integers(LOWEST // GRID, HIGHEST // GRID, endpoint=True))
        kind = ([None] * len(KINDS) + list(KINDS))[generator.integers(2 * len(KINDS))]
        return cls(cutoff, kind, int(generator.integers(*ORDERS, endpoint=True)))

    def __call__(self, wav: Tensor) -> Tensor:
        """A clip `[1, N]` at 48 kHz without the band above the cutoff, at the same rate and length."""
        samples = wav.numpy()
        if self.kind is not None and self.cutoff < SAMPLE_RATE // 2:
            options = KINDS[self.kind] | {"btype": "low", "ftype": self.kind, "output": "sos", "fs": SAMPLE_RATE}
            sections = signal.iirfilter(self.order, self.cutoff, **options)
            samples = signal.sosfiltfilt(sections, samples, padlen=min(3 * 2 * self.order, samples.shape[-1] - 1))
        down = signal.resample_poly(samples, 2 * self.cutoff // GRID, SAMPLE_RATE // GRID, axis=-1)
        up = signal.resample_poly(down, SAMPLE_RATE // GRID, 2 * self.cutoff // GRID, axis=-1)
        return torch.from_numpy(np.ascontiguousarray(up[..., : wav.shape[-1]], dtype=np.float32))


class Library(NamedTuple):
    """The songs of a folder, split by file."""

    songs: dict[str, tuple[AudioReport, ...]]  # 'train' and 'val'

    @property
    def fingerprint(self) -> str:
        """Hash of the songs' content and split."""
        content = {split: [song.sha256 for song in songs] for split, songs in self.songs.items()}
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def read_library(folder: str | Path, clip_length: int) -> Library:
    """Every song below `folder` of at least `clip_length` samples at 48 kHz; `UserError` for fewer than two. A quarter,
    at least one, is for validation; which, depends on the files' content alone."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name one with music at 44.1 kHz or more")

    def check(path: Path) -> AudioReport:
        report, seconds = check_audio(path), clip_length / SAMPLE_RATE
        if (rate := report.sample_rate) < LOWEST_RATE:
            raise AudioError(path, f"its sample rate of {rate} Hz leaves no upper band; use 44.1 kHz or more")
        if report.samples_at(SAMPLE_RATE) < clip_length:
            raise AudioError(path, f"shorter than a clip of {seconds:g} s; use longer music or shorter clips")
        return report

    files, _ = walk_audio(folder)
    found = check_files(folder, files, check, "checking audio")
    songs = {report.sha256: report for report in found[::-1] if isinstance(report, AudioReport)}  # copies count once
    skipped = [f"{error.path.name}: {error.problem}" for error in found if isinstance(error, AudioError)]
    reasons = "; ".join(skipped[:3]) + f"; and {len(skipped) - 3} more" * (len(skipped) > 3)
    if len(songs) < 2:
        raise UserError(f"{folder}: {len(songs)} usable song(s), two are needed ({reasons or 'no audio files'})")
    if skipped:
        logger.warning("%s: %d of %d files are not used: %s", folder, len(skipped), len(files), reasons)
    ordered = [songs[key] for key in sorted(songs)]
    held_out = max(1, round(len(ordered) / 4))
    return Library({"val": tuple(ordered[:held_out]), "train": tuple(ordered[held_out:])})


@dataclass(eq=False)
class Examples:
    """`examples[i]` is (clip `[1, N]`, degraded clip `[1, N]`) at 48 kHz, float32. Song, offset and degradation, unless
    given, depend on `seed`, split and `i` alone, so that a resumed training sees the same."""

    library: Library
    split: str
    count: int
    clip_length: int
    seed: int = 0
    degradation: Degradation | None = None
    sample_rate = SAMPLE_RATE

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        clip = self.clip(i)
        return clip, self._draw(i)[2](clip)

    def clip(self, i: int) -> Tensor:
        song, offset, _ = self._draw(i)
        return load_audio(song, offset, self.clip_length, SAMPLE_RATE)

    def cutoff(self, i: int) -> int:
        return self._draw(i)[2].cutoff

    def song(self, i: int) -> AudioReport:
        return self._draw(i)[0]

    def clip_names(self, i: int) -> tuple[str, str]:
        """File and offset of the clip, for itself and its degraded version."""
        song, offset, _ = self._draw(i)
        return (f"{song.path.name} at {offset / SAMPLE_RATE:.2f} s",) * 2

    def _draw(self, i: int) -> tuple[AudioReport, int, Degradation]:
        """Song, offset in samples and degradation of example `i`."""
        if not 0 <= i < self.count:
            raise IndexError(f"example {i} of {self.count}")
        generator = np.random.default_rng([self.seed, self.split == "val", i])
        songs = self.library.songs[self.split]
        song = songs[i % len(songs)]  # every song as often as the others, every offset in it equally likely
        offset = int(generator.integers(song.samples_at(SAMPLE_RATE) - self.clip_length + 1))
        return song, offset, self.degradation or Degradation.draw(generator)
