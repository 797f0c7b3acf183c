"""Audio files: find, read, validate, and write by soundfile. Inside the project audio is mono float32 at 24 kHz,
`[C, N]` (C channels, N samples); files may have any rate."""

import contextlib
import gc
import itertools
import math
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from soundfile import SoundFile, SoundFileError
from torch.utils.data import DataLoader
from tqdm import tqdm

from lib.audio.decode import NAMES, AudioError, Decoder, Marks, mixed, rate_ratio, read_windows
from lib.audio.levels import BAND_FRAME, POLICIES, Meter, band_edge, decibels, level_of
from lib.util.configs import check
from lib.util.errors import UserError
from lib.util.files import file_sha256, fsync
from lib.util.signals import StopSignals
from lib.util.tensors import torch_threads

SAMPLE_RATE = 24_000
SUBTYPES = {".flac": "PCM_24", ".mp3": "MPEG_LAYER_III", ".ogg": "VORBIS", ".wav": "FLOAT"}  # as files are written
AUDIO_SUFFIXES = (*SUBTYPES, ".aac", ".aif", ".aiff", ".m4a", ".oga", ".opus", ".w64")  # as they are read
MIN_SAMPLES = 320  # one codec frame: less than this cannot be encoded
SILENCE_PEAK = 1e-4  # -80 dBFS: inaudible, and an RMS that the cascade would divide by

_BLOCK = 1 << 16  # frames per write: libsndfile's Vorbis encoder overflows its stack on much larger ones
_TRIES = 12  # to encode at a level: what a lossy format adds to a peak is known when it is decoded


@dataclass(frozen=True)
class AudioReport:
    """What `check_audio` found in a good file."""

    path: Path
    sample_rate: int
    channels: int
    num_frames: int  # at the file's own rate, as decoded
    sha256: str  # of the file's bytes, hex
    marks: Marks = field(default=(), repr=False)

    def samples_at(self, sample_rate: int = SAMPLE_RATE) -> int:
        """Number of samples that `load_audio` returns for the whole file at `sample_rate`."""
        return math.ceil(self.num_frames / rate_ratio(self.sample_rate, sample_rate))


Check = Callable[[Path], AudioReport]  # `check_audio`, or what does more in the same decode


def load_audio(
    source: str | Path | AudioReport,
    offset: int = 0,
    length: int | None = None,
    sample_rate: int = SAMPLE_RATE,
    channels: int | None = 1,
) -> torch.Tensor:
    """One of `read_windows`: float32 `[channels, N]`, as `mixed` makes them, or all with None. A file is decoded
    up to the window's end; with its report, from shortly before it on. `AudioError` if damaged or not finite."""
    path, known = (source.path, source.marks) if isinstance(source, AudioReport) else (source, ())
    wav = next(read_windows(path, [(offset, length)], sample_rate, mix=channels == 1, known=known))
    return mixed(wav, channels or len(wav))


def check_audio(path: str | Path, min_samples: int = MIN_SAMPLES, *, mix: bool = True) -> AudioReport:
    """Decode a whole file in constant memory. `AudioError` for what `load_audio` refuses, and as in `report_on`."""
    with Decoder(path) as file:
        for _ in file.blocks(mix=mix):
            pass
        return report_on(file, file_sha256(file.path), min_samples, mix=mix)


def report_on(file: Decoder, sha256: str, min_samples: int = MIN_SAMPLES, *, mix: bool = True) -> AudioReport:
    """What a decoder found that has come to the end of its file. `AudioError` for a truncated file, a peak below 1e-4
    (of all channels and, with `mix`, of their mean), and fewer than `min_samples` at 24 kHz."""
    if file.is_truncated():
        raise AudioError(file.path, f"truncated: only {file.seconds:.2f} s are left; copy it again or export it again")
    report = AudioReport(file.path, file.rate, file.channels, file.num_frames, sha256, tuple(file.marks))
    if report.samples_at() < min_samples:
        fault = f"only {report.samples_at()} samples at 24 kHz, less than one codec frame ({MIN_SAMPLES})"
        raise AudioError(file.path, f"{fault}; use a longer recording")
    if file.loudest < SILENCE_PEAK:
        fault = f"silent throughout (peak {file.loudest:.1e})"
        raise AudioError(file.path, f"{fault}; use a recording with sound in it")
    if mix and file.peak < SILENCE_PEAK:
        fault = f"its channels cancel in the mono mix (peaks {file.loudest:.1e}, mixed {file.peak:.1e})"
        raise AudioError(file.path, f"{fault}; invert one of them, or export one channel")
    return report


@dataclass(frozen=True)
class Skipped:
    """A file or folder that is not used. `path`: posix, relative to the folder that was walked."""

    path: str
    reason: str


def walk_audio(root: Path, ignore: Iterable[Path] = ()) -> tuple[list[str], list[Skipped]]:
    """Music files below `root`, by suffix, as sorted posix paths relative to it; all other files with the reason,
    except hidden ones and those to `ignore`. Links are followed, but no folder twice, so that a real one keeps its own
    name; a broken link counts as a file."""
    files, skipped, seen, starts = [], [], set(), [root]
    ignored = {path.resolve() for path in ignore}

    def unreadable(error: OSError) -> None:
        relative = Path(error.filename).relative_to(root).as_posix()
        skipped.append(Skipped(relative, f"folder cannot be read ({error.strerror}); check its permissions"))

    for folder, subfolders, names in itertools.chain.from_iterable(os.walk(s, onerror=unreadable) for s in starts):
        if (place := os.path.realpath(folder)) in seen:
            subfolders.clear()
            continue
        seen.add(place)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        starts += [path for name in subfolders if (path := Path(folder, name)).is_symlink()]
        for path in (Path(folder, name) for name in names if not name.startswith(".")):
            relative = path.relative_to(root).as_posix()
            if path.suffix.lower() in AUDIO_SUFFIXES:
                files.append(relative)
            elif path.resolve() not in ignored:
                skipped.append(Skipped(relative, f"not {NAMES} by its name; convert it if it is music"))
    return sorted(files), skipped


def check_files(root: Path, files: Sequence[str], check_file: Check, what: str) -> list[AudioReport | AudioError]:
    """What `check_file` finds in each file below `root`, in processes: threads would wait for the GIL at every packet.
    The same bits come out however many there are."""

    def checked(path: str) -> AudioReport | UserError:
        try:
            return check_file(root / path)
        except UserError as error:  # raised, it would come with the traceback of a worker
            return error

    gc.collect()  # in a forked process it would wait for the threads of FFmpeg's filters, which are not there
    workers = min(len(files), len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1)
    # forked: `check_file` holds a codec, which could not be sent to a process that is started anew
    forked = {"num_workers": workers, "multiprocessing_context": "fork"} if workers > 1 else {}
    loader = DataLoader(files, batch_size=None, collate_fn=checked, **forked)
    found, stop = [], StopSignals()  # raised inside torch's loader, Ctrl-C would be lost, or leave processes
    try:
        with torch_threads(1), stop:
            for report in tqdm(loader, desc=what, unit="file", delay=1):
                found.append(report)
                if stop.asked:
                    raise KeyboardInterrupt
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        fault = "a process that read files here was killed"
        raise UserError(f"{root}: {fault}; free some memory, and run it again") from None
    for error in found:
        if isinstance(error, UserError) and not isinstance(error, AudioError):
            raise error
    return found


class AudioWriter:
    """Write a file piece by piece: `with AudioWriter("out.wav") as writer: writer.write(wav)`. Until it is complete, it
    is a hidden temporary file, removed if the block raises. `policy`: how the whole is brought to its level, one of
    `POLICIES`; None: a .wav, of 32-bit floats, holds the samples as they are, another format is written by 'none'.
    After the block, `level` and `band` (its upper edge in Hz) are what the file decodes to, with a true peak of −1 dBTP
    at most, and `change` says by how many dB it was raised. `AudioError` if it cannot be written, for non-finite
    samples, and for channels or rates that a format cannot hold."""

    loudness = -math.inf  # LUFS, that 'lufs' brings the whole to; it may be set within the block

    def __init__(self, path: str | Path, sample_rate: int = SAMPLE_RATE, channels: int = 1, policy: str | None = None):
        self.path, self.sample_rate, self.channels, self.policy = Path(path), sample_rate, channels, policy
        self.num_samples, self.change = 0, 0.0
        self.suffix = suffix = self.path.suffix.lower()
        if suffix not in SUBTYPES:
            raise AudioError(path, f"cannot write {suffix or 'a file without suffix'}; use {', '.join(SUBTYPES)}")
        check(policy in (None, *POLICIES), "level", policy, f"one of {', '.join(POLICIES)}")
        if policy is None and suffix != ".wav":
            self.policy = "none"
        self._temp, self._draft = (self.path.with_name(f".{secrets.token_hex(6)}.tmp") for _ in range(2))

    def __enter__(self) -> "AudioWriter":
        try:
            open(self._temp, "xb").close()  # Python's own error says why a folder cannot be written, libsndfile's not
            self._file = self._create(self._temp, self.suffix)
            if self.policy:  # floats, until the level of all is known
                self._file.close()
                self._file = self._create(self._draft, ".w64")
                self._meter = Meter(self.sample_rate, self.channels)
        except OSError as error:
            self._remove()
            raise self._cannot_write(error) from error
        except SoundFileError as error:
            self._remove()
            fault = f"cannot hold {self.channels} channel(s) at {self.sample_rate} Hz as {self.path.suffix}"
            raise AudioError(self.path, f"{fault}; write a .wav") from error
        return self

    def write(self, wav: torch.Tensor) -> None:
        """Append `wav [C, N]`."""
        if wav.ndim != 2 or wav.shape[0] != self.channels:
            raise ValueError(f"expected wav [C, N] of {self.channels} channel(s), got {list(wav.shape)}")
        samples = wav.detach().to("cpu", torch.float32).numpy().T
        if not (finite := np.isfinite(samples).all(axis=1)).all():
            first = self.num_samples + int(finite.argmin())
            raise AudioError(self.path, f"not written: sample {first} is NaN or infinite; fix what computed it")
        self._append(self._file, samples)
        self.num_samples += len(samples)
        if self.policy:
            self._meter.add(samples)

    def __exit__(self, error_type: type | None, *_: object) -> None:
        try:
            self._file.close()
            if error_type is None:
                if self.policy:
                    self._encode()
                with open(self._temp, "r+b") as stream:
                    place = stream.read(256).find(b"PEAK")
                    if self.suffix == ".wav" and place >= 0:  # this chunk holds the time of writing after
                        stream.seek(place + 12)  # its name, size and version; zeroed, equal samples make equal files
                        stream.write(bytes(4))
                fsync(self._temp)
                os.replace(self._temp, self.path)
        except (OSError, SoundFileError) as error:
            raise self._cannot_write(error) from error
        finally:
            self._remove()

    def __str__(self) -> str:
        """'out.mp3: 12.00 s, stereo, band up to 11.9 kHz, -18.8 LUFS, true peak -1.0 dBTP (lowered by 1.3 dB)'. Where a
        higher true peak would be needed, the loudness that was wanted, too."""
        channels = {1: "mono", 2: "stereo"}.get(self.channels, f"{self.channels} channels")
        length, band = f"{self.num_samples / self.sample_rate:.2f} s", f"band up to {self.band / 1000:.1f} kHz"
        notes = []
        if round(self.change, 1):
            notes.append(f"{'raised' if self.change > 0 else 'lowered'} by {abs(self.change):.1f} dB")
        if self.policy == "lufs" and self.loudness - self.level.lufs > 0.1:
            notes.append(f"not to {self.loudness:.1f} LUFS, for its peaks")
        return f"{self.path}: {length}, {channels}, {band}, {self.level}" + f" ({', '.join(notes)})" * bool(notes)

    def _encode(self) -> None:
        """From the draft, by the policy; again, if a lossy format is decoded to another level. That need not settle at
        any: from the third time on it is aimed ever lower, and what is below the ceiling will do."""
        level, factor = self._meter.level(), 1.0
        for attempt in range(_TRIES):
            factor *= level.factor(self.policy, self.loudness) * (1 - 0.01 * max(0, attempt - 1))
            with self._create(self._temp, self.suffix) as file:
                for samples in self._blocks(self._draft):
                    self._append(file, samples * np.float32(factor))
            level = level_of(self._decoded(), self.sample_rate, self.channels)
            needed = level.factor(self.policy, self.loudness)
            if needed > 0.999 and (needed < 1.01 or attempt > 1):
                break
        self.level, self.change, self.band = level, decibels(factor), band_edge(self._overlapping(), self.sample_rate)

    def _decoded(self) -> Iterator[np.ndarray]:
        """Pieces `[n, C]` of what was encoded."""
        if self.suffix == ".mp3":  # libsndfile reads it by mpg123, which prints faults that there are none
            with Decoder(self._temp) as file:
                yield from (block.T for block in file.blocks(mix=False))
        else:
            yield from self._blocks(self._temp)

    def _overlapping(self) -> Iterator[torch.Tensor]:
        """The same, `[C, n]`, each with the end of the one before."""
        end = np.zeros((0, self.channels), np.float32)
        for piece in self._decoded():
            piece = np.concatenate([end, piece])
            yield torch.from_numpy(piece.T)
            end = piece[-BAND_FRAME:]

    def _create(self, path: Path, suffix: str) -> SoundFile:
        kind, subtype = suffix[1:].upper(), SUBTYPES.get(suffix, "FLOAT")
        return SoundFile(os.fsencode(path), "w", self.sample_rate, self.channels, subtype, format=kind)

    @staticmethod
    def _blocks(path: Path) -> Iterator[np.ndarray]:
        with SoundFile(os.fsencode(path)) as file:
            yield from file.blocks(_BLOCK, dtype="float32", always_2d=True)

    def _append(self, file: SoundFile, samples: np.ndarray) -> None:
        try:
            for start in range(0, len(samples), _BLOCK):
                file.write(samples[start : start + _BLOCK])
        except (OSError, AssertionError, SoundFileError) as error:  # soundfile asserts on a short write
            raise self._cannot_write(error) from error

    def _remove(self) -> None:
        for path in (self._temp, self._draft):
            with contextlib.suppress(OSError):
                path.unlink()

    def _cannot_write(self, error: Exception) -> AudioError:
        with contextlib.suppress(OSError):
            space = shutil.disk_usage(self.path.parent)
            if space.free < _BLOCK < space.total:  # libsndfile does not say why
                return AudioError(self.path, "cannot be written (the disk is full); free some space on it")
        reason = getattr(error, "strerror", None) or str(error) or "a short write"
        return AudioError(self.path, f"cannot be written ({reason}); choose an existing folder you may write to")


def save_audio(path: str | Path, wav: torch.Tensor, sample_rate: int = SAMPLE_RATE) -> AudioWriter:
    """Write `wav [C, N]` atomically, replacing a file of that name. Levels and errors as in `AudioWriter`, which is
    returned, closed."""
    with AudioWriter(path, sample_rate, channels=wav.shape[0]) as writer:
        writer.write(wav)
    return writer
