"""Audio files: find, read, validate, and write by soundfile. Inside the project audio is mono float32 at 24 kHz,
`[C, N]` (C channels, N samples); files may have any rate."""

import contextlib
import itertools
import math
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from scipy.signal import resample_poly
from soundfile import SoundFile, SoundFileError
from torch.utils.data import DataLoader
from tqdm import tqdm

from lib.audio.decode import NAMES, AudioError, Decoder, Marks, rate_ratio, read_windows
from lib.util.errors import UserError
from lib.util.files import file_sha256, fsync
from lib.util.signals import StopSignals
from lib.util.tensors import torch_threads

SAMPLE_RATE = 24_000
SUBTYPES = {".flac": "PCM_24", ".mp3": "MPEG_LAYER_III", ".ogg": "VORBIS", ".wav": "FLOAT"}  # as files are written
AUDIO_SUFFIXES = (*SUBTYPES, ".aac", ".aif", ".aiff", ".m4a", ".oga", ".opus", ".w64")  # as they are read
MIN_SAMPLES = 320  # one codec frame: less than this cannot be encoded
SILENCE_PEAK = 1e-4  # -80 dBFS: inaudible, and an RMS that the cascade would divide by

CEILING = 10 ** (-1 / 20)  # true peak, where more would clip
GAIN = "dB, before writing; formats other than .wav are still lowered where they would clip (default: %(default)g)"
_BLOCK = 1 << 16  # frames per write: libsndfile's Vorbis encoder overflows its stack on much larger ones
_TAPS = 16  # samples on either side that the value between two depends on, at most


@dataclass(frozen=True)
class AudioReport:
    """What `check_audio` found in a good file."""

    path: Path
    sample_rate: int
    channels: int
    num_frames: int  # at the file's own rate, as decoded
    sha256: str  # of the file's bytes, hex
    marks: Marks = field(default=(), repr=False)

    def samples_at(self, sample_rate: int) -> int:
        """Number of samples that `load_audio` returns for the whole file at `sample_rate`."""
        return math.ceil(self.num_frames / rate_ratio(self.sample_rate, sample_rate))

    @property
    def num_samples(self) -> int:
        """At 24 kHz."""
        return self.samples_at(SAMPLE_RATE)


Check = Callable[[Path], AudioReport]  # `check_audio`, or what does more in the same decode


def load_audio(
    source: str | Path | AudioReport,
    offset: int = 0,
    length: int | None = None,
    sample_rate: int = SAMPLE_RATE,
    *,
    mix: bool = True,
) -> torch.Tensor:
    """One of `read_windows`: float32 `[1, N]`, the mean of the channels, or `[C, N]` without `mix`. A file is decoded
    up to the window's end; with its report, from shortly before it on. `AudioError` if damaged or not finite."""
    path, known = (source.path, source.marks) if isinstance(source, AudioReport) else (source, ())
    return next(read_windows(path, [(offset, length)], sample_rate, mix=mix, known=known))


def check_audio(path: str | Path, min_samples: int = MIN_SAMPLES, *, mix: bool = True) -> AudioReport:
    """Decode a whole file in constant memory. `AudioError` for what `load_audio` refuses, and as in `report_on`."""
    with Decoder(path) as file:
        for _ in file.blocks(mix=mix):
            pass
        return report_on(file, file_sha256(file.path), min_samples)


def report_on(file: Decoder, sha256: str, min_samples: int = MIN_SAMPLES) -> AudioReport:
    """What a decoder found that has come to the end of its file. `AudioError` for a truncated file, a peak below 1e-4
    (of the mean of its channels or, unmixed, of all), and fewer than `min_samples` at 24 kHz."""
    if file.is_truncated():
        raise AudioError(file.path, f"truncated: only {file.seconds:.2f} s are left; copy it again or export it again")
    report = AudioReport(file.path, file.rate, file.channels, file.num_frames, sha256, tuple(file.marks))
    if report.num_samples < min_samples:
        fault = f"only {report.num_samples} samples at 24 kHz, less than one codec frame ({MIN_SAMPLES})"
        raise AudioError(file.path, f"{fault}; use a longer recording")
    if file.loudest < SILENCE_PEAK:
        fault = f"silent throughout (peak {file.loudest:.1e})"
        raise AudioError(file.path, f"{fault}; use a recording with sound in it")
    if file.peak < SILENCE_PEAK:
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
    is a hidden temporary file, removed if the block raises. A .wav holds 32-bit floats, any value. Another format is
    brought to a true peak of −1 dBFS (ITU-R BS.1770: of the waveform between the samples) if that exceeds 0 dBFS, where
    it would clip; `lowered` then says by how many dB. `gain`, dB, comes first. `AudioError` if it cannot be written,
    for non-finite samples, and for channels or rates that a format cannot hold."""

    def __init__(self, path: str | Path, sample_rate: int = SAMPLE_RATE, channels: int = 1, gain: float = 0.0):
        if not abs(gain) <= 200:
            raise UserError(f"gain={gain:g} is not allowed; use -200 to 200 dB")
        self.path, self.sample_rate, self.channels = Path(path), sample_rate, channels
        self.num_samples, self.peak, self.true_peak, self.lowered = 0, 0.0, 0.0, 0.0  # of what is written
        suffix = self.path.suffix.lower()
        if suffix not in SUBTYPES:
            raise AudioError(path, f"cannot write {suffix or 'a file without suffix'}; use {', '.join(SUBTYPES)}")
        self.subtype, self._factor = SUBTYPES[suffix], 10 ** (gain / 20)
        self._last = np.zeros((0, channels), dtype=np.float32)  # of the samples before, for the peaks between them
        self._temp, self._draft = (self.path.with_name(f".{secrets.token_hex(6)}.tmp") for _ in range(2))

    def __enter__(self) -> "AudioWriter":
        try:
            open(self._temp, "xb").close()  # Python's own error says why a folder cannot be written, libsndfile's not
            self._file = self._create(self._temp, self.path.suffix[1:].upper(), self.subtype)
            if self.subtype != "FLOAT":  # floats, until the peak of all is known
                self._file, self._encoded = self._create(self._draft, "W64", "FLOAT"), self._file
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
        samples = wav.detach().to("cpu", torch.float32).numpy().T * np.float32(self._factor)
        peak = float(np.abs(samples).max(initial=0.0))
        if not math.isfinite(peak):
            first = self.num_samples + int(np.argmin(np.isfinite(samples).all(axis=1)))
            raise AudioError(self.path, f"not written: sample {first} is NaN or infinite; fix what computed it")
        self._append(self._file, samples)
        self.num_samples += len(samples)
        self.peak = max(self.peak, peak)
        if self.subtype != "FLOAT":
            around = np.concatenate([self._last, samples])
            between = resample_poly(around, 4, 1, axis=0)[4 * _TAPS : -4 * _TAPS]  # what the filter sees whole
            self.true_peak = max(self.true_peak, peak, float(np.abs(between).max(initial=0.0)))
            self._last = around[-2 * _TAPS :]

    def __exit__(self, error_type: type | None, *_: object) -> None:
        try:
            self._file.close()
            if self.subtype != "FLOAT":
                with self._encoded as file:
                    if error_type is None:
                        self._encode(file)
            if error_type is None:
                with open(self._temp, "r+b") as stream:
                    place = stream.read(256).find(b"PEAK")
                    if self.subtype == "FLOAT" and place >= 0:  # this chunk of a .wav holds the time of writing after
                        stream.seek(place + 12)  # its name, size and version; zeroed, equal samples make equal files
                        stream.write(bytes(4))
                fsync(self._temp)
                os.replace(self._temp, self.path)
        except (OSError, SoundFileError) as error:
            raise self._cannot_write(error) from error
        finally:
            self._remove()

    @property
    def level(self) -> str:
        """'peak 0.891, lowered by 1.3 dB, or it would clip'."""
        lowered = f", lowered by {self.lowered:.1f} dB, or it would clip" if self.lowered else ""
        return f"peak {self.peak:.3f}{lowered}"

    def _encode(self, file: SoundFile) -> None:
        """From the draft, as loud as the format allows."""
        factor = CEILING / self.true_peak if self.true_peak > 1 else 1.0
        with SoundFile(os.fsencode(self._draft)) as draft:
            while len(samples := draft.read(_BLOCK, dtype="float32", always_2d=True)):
                self._append(file, samples * np.float32(factor))
        self.peak, self.true_peak = self.peak * factor, self.true_peak * factor
        self.lowered = -20 * math.log10(factor)

    def _create(self, path: Path, kind: str, subtype: str) -> SoundFile:
        return SoundFile(os.fsencode(path), "w", self.sample_rate, self.channels, subtype, format=kind)

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
