"""Audio files: find, read, write, resample, validate, by soundfile and torchaudio. Inside the project audio is mono
float32 at 24 kHz, `[C, N]` (C channels, N samples); files may have any rate."""

import contextlib
import math
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torchaudio
from soundfile import SoundFile, SoundFileError

from lib.util.errors import UserError
from lib.util.files import file_sha256, fsync

SAMPLE_RATE = 24_000
SUBTYPES = {".flac": "PCM_24", ".mp3": "MPEG_LAYER_III", ".ogg": "VORBIS", ".wav": "FLOAT"}  # as files are written
AUDIO_SUFFIXES = tuple(SUBTYPES)
MIN_SAMPLES = 320  # one codec frame: less than this cannot be encoded
SILENCE_PEAK = 1e-4  # -80 dBFS: inaudible, and an RMS that the cascade would divide by
MIN_RATE, MAX_RATE = 1_000, 1_000_000  # Hz; outside, the header is damaged or the file is no music

_BLOCK = 1 << 16  # frames per read or write; libsndfile's Vorbis encoder overflows its stack on much larger writes
# libsndfile seeks Vorbis wrongly inside the last Ogg page (255 packets of 1024) and in the first block after a seek:
# https://github.com/libsndfile/libsndfile/issues/885. Seeking earlier and decoding forward is exact.
_VORBIS_LAST_PAGE, _VORBIS_PREROLL = 1 << 18, 1 << 13


class AudioError(UserError):
    """An audio file that cannot be used or written: one line naming the file, what is wrong, and the fix."""

    def __init__(self, path: str | Path, problem: str):
        super().__init__(f"{path}: {problem}")
        self.problem = problem


@dataclass(frozen=True)
class AudioReport:
    """What `check_audio` found in a good file."""

    path: Path
    sample_rate: int
    channels: int
    num_frames: int  # at the file's own rate, as decoded
    sha256: str  # of the file's bytes, hex

    def samples_at(self, sample_rate: int) -> int:
        """Number of samples that `load_audio` returns for the whole file at `sample_rate`."""
        return math.ceil(self.num_frames / _rate_ratio(self.sample_rate, sample_rate))

    @property
    def num_samples(self) -> int:
        """At 24 kHz."""
        return self.samples_at(SAMPLE_RATE)


def load_audio(
    path: str | Path, offset: int = 0, length: int | None = None, sample_rate: int = SAMPLE_RATE, *, mix: bool = True
) -> torch.Tensor:
    """Read a window of a file at `sample_rate` as float32 `[1, N]`, the mean of its channels; `[C, N]` without `mix`.
    `offset` and `length` (None: to the end) count samples at `sample_rate`. The result equals that slice of the whole
    resampled file, of which only it is read, shorter or empty past the end. `AudioError` if damaged or not finite."""
    if offset < 0 or (length is not None and length < 0):
        raise ValueError(f"offset and length must not be negative, got {offset} and {length}")
    with _open(path) as file:
        rate, ratio = file.samplerate, _rate_ratio(file.samplerate, sample_rate)
        native, target = ratio.as_integer_ratio()  # `native` frames make a block of `target` samples
        total = math.ceil(file.frames / ratio)
        end = total if length is None else min(offset + length, total)
        # start on a block boundary, where the polyphase filter has the same phase as from the file's start, with enough
        # blocks on either side for the taps: torchaudio's filter has 6 zero crossings and a rolloff of 0.99
        taps = math.ceil(6 * native / (min(native, target) * 0.99))
        margin = 0 if ratio == 1 else math.ceil(taps / native) + 1
        first = max(0, offset // target - margin)
        last = math.ceil(end / target) + margin
        blocks = list(_blocks(path, file, first * native, (last - first) * native, mix=mix)) if offset < end else []
        if not blocks:
            return torch.zeros(1 if mix else file.channels, 0)
    wav = resample(torch.from_numpy(np.concatenate(blocks, axis=1)), rate, sample_rate)
    return wav[:, offset - first * target : end - first * target].contiguous()


def check_audio(path: str | Path, min_samples: int = MIN_SAMPLES, *, mix: bool = True) -> AudioReport:
    """Decode a whole file in constant memory. `AudioError` for what `load_audio` refuses, truncated files, a peak below
    1e-4 (of the mean of its channels or, without `mix`, of all), and fewer than `min_samples` at 24 kHz."""
    with _open(path) as file:
        announced, decoded, peak = _announced_frames(file), 0, 0.0
        for block in _blocks(path, file, 0, file.frames, mix=mix):
            decoded += block.shape[1]
            peak = max(peak, float(np.abs(block).max()))
        rate, channels, kind = file.samplerate, file.channels, file.format
    # without a Xing header the frame count of an MP3 is an estimate, off by the tags at the end of the file
    if announced - decoded > (rate if kind == "MP3" else 0) or (kind == "OGG" and not _ogg_is_complete(path)):
        raise AudioError(path, f"truncated: only {decoded / rate:.2f} s are left; copy it again or export it again")
    report = AudioReport(Path(path), rate, channels, decoded, file_sha256(Path(path)))
    if report.num_samples < min_samples:
        fault = f"only {report.num_samples} samples at 24 kHz, less than one codec frame ({MIN_SAMPLES})"
        raise AudioError(path, f"{fault}; use a longer recording")
    if peak < SILENCE_PEAK:
        raise AudioError(path, f"silent throughout ({'mono ' * mix}peak {peak:.1e}); use a recording with sound in it")
    return report


@dataclass(frozen=True)
class Skipped:
    """A file or folder that is not used. `path`: posix, relative to the folder that was walked."""

    path: str
    reason: str


def walk_audio(root: Path, ignore: Iterable[Path] = ()) -> tuple[list[str], list[Skipped]]:
    """Music files below `root`, by suffix, as sorted posix paths relative to it; all other files with the reason,
    except hidden ones and those to `ignore`. Links are followed, but no folder twice; a broken one counts as a file."""
    files, skipped, seen = [], [], set()
    ignored = {path.resolve() for path in ignore}

    def unreadable(error: OSError) -> None:
        relative = Path(error.filename).relative_to(root).as_posix()
        skipped.append(Skipped(relative, f"folder cannot be read ({error.strerror}); check its permissions"))

    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=unreadable):
        if (place := os.path.realpath(folder)) in seen:
            subfolders.clear()
            continue
        seen.add(place)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for path in (Path(folder, name) for name in names if not name.startswith(".")):
            relative = path.relative_to(root).as_posix()
            if path.suffix.lower() in AUDIO_SUFFIXES:
                files.append(relative)
            elif path.resolve() not in ignored:
                skipped.append(Skipped(relative, "not WAV, FLAC, OGG or MP3 by its name; convert it if it is music"))
    return sorted(files), skipped


class AudioWriter:
    """Write a file piece by piece: `with AudioWriter("out.wav") as writer: writer.write(wav)`. Until it is complete, it
    is a hidden temporary file, removed if the block raises. A .wav holds 32-bit floats, any value; a .flac 24 bits.
    `AudioError` if it cannot be written, for non-finite samples, and for |x| > 1 in a .flac, which would clip."""

    def __init__(self, path: str | Path, sample_rate: int = SAMPLE_RATE, channels: int = 1):
        self.path, self.sample_rate, self.channels = Path(path), sample_rate, channels
        self.num_samples, self.peak = 0, 0.0  # written so far
        suffix = self.path.suffix.lower()
        if suffix not in SUBTYPES:
            raise AudioError(path, f"cannot write {suffix or 'a file without suffix'}; use {', '.join(AUDIO_SUFFIXES)}")
        self.subtype = SUBTYPES[suffix]
        self._temp = self.path.with_name(f".{secrets.token_hex(6)}.tmp")

    def __enter__(self) -> "AudioWriter":
        try:
            open(self._temp, "xb").close()  # Python's own error says why a folder cannot be written, libsndfile's not
            name, kind = os.fsencode(self._temp), self.path.suffix[1:].upper()
            self._file = SoundFile(name, "w", self.sample_rate, self.channels, self.subtype, format=kind)
        except (OSError, SoundFileError) as error:
            with contextlib.suppress(OSError):
                self._temp.unlink()
            raise self._cannot_write(error) from error
        return self

    def write(self, wav: torch.Tensor) -> None:
        """Append `wav [C, N]`."""
        if wav.ndim != 2 or wav.shape[0] != self.channels:
            raise ValueError(f"expected wav [C, N] of {self.channels} channel(s), got {list(wav.shape)}")
        samples = wav.detach().to("cpu", torch.float32).numpy().T
        peak = float(np.abs(samples).max(initial=0.0))
        if not math.isfinite(peak):
            first = self.num_samples + int(np.argmin(np.isfinite(samples).all(axis=1)))
            raise AudioError(self.path, f"not written: sample {first} is NaN or infinite; fix what computed it")
        if peak > 1 and self.subtype.startswith("PCM"):
            fault = f"not written: peak {peak:.3f} would clip in {self.subtype}"
            raise AudioError(self.path, f"{fault}; scale it to at most 1 or write a float .wav")
        try:
            for start in range(0, len(samples), _BLOCK):
                self._file.write(samples[start : start + _BLOCK])
        except (OSError, AssertionError, SoundFileError) as error:  # soundfile asserts on a short write
            raise self._cannot_write(error) from error
        self.num_samples += len(samples)
        self.peak = max(self.peak, peak)

    def __exit__(self, error_type: type | None, *_: object) -> None:
        try:
            self._file.close()
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
            self._temp.unlink(missing_ok=True)

    def _cannot_write(self, error: Exception) -> AudioError:
        reason = getattr(error, "strerror", None) or str(error) or "the disk may be full"
        return AudioError(self.path, f"cannot be written ({reason}); choose an existing folder you may write to")


def save_audio(path: str | Path, wav: torch.Tensor, sample_rate: int = SAMPLE_RATE) -> None:
    """Write `wav [C, N]` atomically, replacing a file of that name. Formats and errors as in `AudioWriter`."""
    with AudioWriter(path, sample_rate, channels=wav.shape[0]) as writer:
        writer.write(wav)


def _open(path: str | Path) -> SoundFile:
    path = Path(path)
    try:
        if path.is_dir():
            raise AudioError(path, "a folder, not an audio file; name a file inside it")
        if path.exists() and not path.is_file():  # reading a pipe would wait forever
            raise AudioError(path, "not a regular file; name an audio file")
        with open(path, "rb") as stream:
            if not stream.read(1):
                raise AudioError(path, "empty (0 bytes); copy it again or remove it")
    except FileNotFoundError as error:
        raise AudioError(path, "no such file; check the path") from error
    except OSError as error:
        raise AudioError(path, f"cannot be read ({error.strerror}); check the disk and its permissions") from error
    try:
        file = SoundFile(os.fsencode(path))  # as bytes: any file name is allowed, UTF-8 or not
    except (SoundFileError, TypeError) as error:  # TypeError: libsndfile wants the format of headerless .raw
        raise AudioError(path, "not audio, or truncated in its header; use WAV, FLAC, OGG or MP3") from error
    if not MIN_RATE <= file.samplerate <= MAX_RATE:
        file.close()
        fault = f"sample rate {file.samplerate} Hz is outside {MIN_RATE} to {MAX_RATE} Hz"
        raise AudioError(path, f"{fault}; convert it to 24000 Hz")
    return file


def _blocks(path: str | Path, file: SoundFile, start: int, count: int, mix: bool = True) -> Iterator[np.ndarray]:
    """Up to `count` native frames from `start`, in finite blocks `[C, n]`, mixed to one channel or as they are."""
    position, end = min(start, file.frames), min(start + count, file.frames)
    if file.subtype == "VORBIS" and position:
        position = max(0, min(position - _VORBIS_PREROLL, file.frames - _VORBIS_LAST_PAGE))
    try:
        if position:
            file.seek(position)
        while len(block := file.read(min(_BLOCK, end - position), dtype="float32", always_2d=True)):
            skip = max(0, start - position)
            position += len(block)
            if skip < len(block):
                block = block[skip:].mean(axis=1)[None] if mix else block[skip:].T
                if not np.isfinite(block).all():
                    first = position - block.shape[1] + int(np.argmin(np.isfinite(block).all(axis=0)))
                    fault = f"NaN or infinite sample at {first / file.samplerate:.3f} s"
                    raise AudioError(path, f"{fault}; export the file again or cut that part out")
                yield block
    except SoundFileError as error:
        fault = f"truncated or damaged after {position / file.samplerate:.2f} s"
        raise AudioError(path, f"{fault}; copy it again or export it again") from error


def _announced_frames(file: SoundFile) -> int:
    """Frames that the header announces, even where libsndfile has silently reduced them to what a WAV file holds."""
    found = re.search(r"^data *: *(\d+) \(should be (\d+)\)", file.extra_info, re.MULTILINE)
    # recorders that write to a pipe cannot know the size and announce the largest one
    if not found or not int(found[2]) or not int(found[2]) < int(found[1]) < 0x7FFF_F000:
        return file.frames
    return round(file.frames * int(found[1]) / int(found[2]))


def _ogg_is_complete(path: str | Path) -> bool:
    """Whether the last Ogg page is there in full and carries the end-of-stream flag (RFC 3533, section 6)."""
    with open(path, "rb") as stream:
        stream.seek(max(0, os.path.getsize(path) - 2 * 65_307))  # 65,307: the largest page
        tail = stream.read()
    page = tail[max(0, tail.rfind(b"OggS")) :]
    segments = page[26] if len(page) > 26 else 255
    return len(page) >= 27 + segments + sum(page[27 : 27 + segments]) and bool(page[5] & 4)


def _rate_ratio(native: int, target: int) -> Fraction:
    """Native frames per target sample. Odd rates (44,099 Hz) are rounded, by 0.1 % at most: filters must fit memory."""
    return Fraction(native, target).limit_denominator(1000)


def resample(wav: torch.Tensor, from_rate: int, to_rate: int) -> torch.Tensor:
    """`[C, N]` at another rate, by torchaudio's windowed sinc."""
    ratio = _rate_ratio(from_rate, to_rate)
    if ratio == 1:
        return wav
    native, target = ratio.as_integer_ratio()
    # torchaudio computes its output length in float32, wrong by some samples past 2**24: ask for more and cut
    padded = torch.nn.functional.pad(wav, (0, native * math.ceil(64 / target)))
    return torchaudio.functional.resample(padded, native, target)[:, : math.ceil(wav.shape[-1] / ratio)]
