"""Decode audio files front to back, once, by FFmpeg's libraries (PyAV), at a thousand times the speed of music. Nothing
seeks: MP3, Vorbis, Opus and AAC have a memory, so that what is read after a seek differs. Who knows a file from before
may leave out packets, whose samples were counted then. Nor is a header's length believed, but to tell that something is
missing. C channels, N samples."""

import itertools
import math
import mmap
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
import torch
import torchaudio
from torch import Tensor

from lib.util.errors import UserError
from lib.util.tensors import cached_table

MIN_RATE, MAX_RATE = 1_000, 1_000_000  # Hz; outside, the header is damaged or the file is no music
BLOCK = 1 << 16  # frames that are handed on together, about
# without playlists and the like, which open other files or addresses, and those that do not tell half a file
CONTAINERS = "wav,w64,aiff,flac,ogg,mp3,aac,mov"
NAMES = "WAV, FLAC, OGG, MP3, M4A, Opus or AIFF"
MARK_EVERY, WARM_UP = 128, 16  # packets: between two marks, and decoded for their effect on those that follow
NOISY = ("aac",)  # decoders that draw noise: what follows a packet depends on all before it
UNKNOWN = 0x7FFF_0000  # bytes; writers that cannot seek back announce about 2**31 or 2**32, or 0

Windows = Iterable[tuple[int, int | None]]
Marks = Sequence[tuple[int, int]]  # (number of a packet, number of frames that are decoded from those before it)

av.logging.set_level(av.logging.PANIC)  # decoders would write to stderr; what matters is raised


class AudioError(UserError):
    """An audio file that cannot be used or written: one line naming the file, what is wrong, and the fix."""

    def __init__(self, path: str | Path, problem: str):
        super().__init__(f"{path}: {problem}")
        self.path, self.problem = Path(path), problem

    def __reduce__(self) -> tuple:
        return AudioError, (self.path, self.problem)


class Decoder:
    """An open audio file, to be iterated once, in a `with`. `rate` in Hz; found so far: `num_frames` at that rate,
    `loudest`, the peak of all channels, `peak`, that of their mean, and `marks`, at which a later reading may begin,
    which gets them as `known`. `AudioError` if it is no audio, damaged or not finite."""

    def __init__(self, path: str | Path, known: Marks = ()):
        self.path, self.num_frames, self.loudest, self.peak = Path(path), 0, 0.0, 0.0
        self.marks, self._known, self._start = [], known, (0, 0)
        self._file, self._fifo, self._floats = _open(self.path), av.AudioFifo(), av.AudioResampler("fltp")
        try:
            options = {"format_whitelist": CONTAINERS}
            self._container = av.open(self._file, options=options, buffer_size=1 << 18, metadata_errors="replace")
            self.kind = self._container.format.name
            self._stream = self._container.streams.best("audio")
            self._joined = self.kind == "ogg" and not known and _ogg_is_joined(self._file)
            if self._joined and self._stream.codec_context.name == "vorbis":  # it keeps the first one's codebooks
                raise AudioError(path, "several Ogg Vorbis recordings in one; split them, or convert it to FLAC")
            self._frames = frames = self._decoded()
            first = next(frames, None)
            shape = first or self._stream.codec_context  # which does not know what a decoder adds (AAC)
            self.rate, self.channels = shape.sample_rate, shape.layout.nb_channels
            if not MIN_RATE <= self.rate <= MAX_RATE:
                fault = f"sample rate {self.rate} Hz is outside {MIN_RATE} to {MAX_RATE} Hz"
                raise AudioError(path, f"{fault}; convert it to 24000 Hz")
        except (av.FFmpegError, AttributeError, ValueError) as error:
            self._file.close()
            if isinstance(error, AudioError):
                raise
            raise AudioError(path, f"not audio, or truncated in its header; use {NAMES}") from None
        self._frames = itertools.chain([first] if first else [], frames)

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()
        self._file.close()

    @property
    def seconds(self) -> float:
        """Decoded so far."""
        return self.num_frames / self.rate

    def blocks(self, *, mix: bool = True) -> Iterator[np.ndarray]:
        """All of it at its own rate, in finite pieces `[C, n]`, float32, mixed to one channel or as it is. What is good
        is handed on before an error is raised."""
        block, fault = self._gather()
        while block is not None:
            self.loudest = max(self.loudest, float(block.max()), -float(block.min()))
            mean = block
            if len(block) > 1:  # NumPy's mean takes six times as long as a sum of two rows
                mean = sum(block[1:], block[:1]) / np.float32(len(block))
            highest, lowest = float(mean.max()), float(mean.min())
            block = mean if mix else block
            if not math.isfinite(highest - lowest):
                block = block[:, : int(np.argmin(np.isfinite(block).all(axis=0)))]
                at = self.seconds + block.shape[1] / self.rate
                remedy = "export the file again or cut that part out"
                fault = AudioError(self.path, f"NaN or infinite sample at {at:.3f} s; {remedy}")
            self.peak = max(self.peak, highest, -lowest)
            self.num_frames += block.shape[1]
            yield block
            block, fault = (None, fault) if fault else self._gather()
        if fault:
            raise fault

    def samples(self, sample_rate: int, *, mix: bool = True, offset: int = 0) -> Iterator[Tensor]:
        """The same at `sample_rate`, from its sample `offset` on: joined, exactly the resampled file's."""
        ratio = rate_ratio(self.rate, sample_rate)
        native, target = ratio.as_integer_ratio()  # `native` frames make a group of `target` samples
        # where a group begins, the polyphase filter has the same phase as where the file begins; enough groups on
        # either side for the taps: torchaudio's filter has 6 zero crossings and a rolloff of 0.99
        taps = math.ceil(6 * native / (min(native, target) * 0.99))
        margin = 0 if ratio == 1 else math.ceil(taps / native) + 1
        done = offset // target  # groups
        begin, skip = max(0, done - margin), offset - done * target  # `pending` begins with group `begin`
        self._leave_out(begin * native)
        pending, before = torch.zeros(1 if mix else self.channels, 0), begin * native - self.num_frames
        for block in self.blocks(mix=mix):
            wav, before = torch.from_numpy(block[:, before:]), max(0, before - block.shape[1])
            pending = torch.cat([pending, wav], dim=1)
            end = begin + pending.shape[1] // native - margin
            if end > done:
                ready = resample(pending[:, : (end - begin + margin) * native], self.rate, sample_rate)
                yield ready[:, (done - begin) * target + skip : (end - begin) * target]
                done, skip = end, 0
                pending, begin = pending[:, max(0, end - margin - begin) * native :], max(begin, end - margin)
        yield resample(pending, self.rate, sample_rate)[:, (done - begin) * target + skip :]

    def windows(self, windows: Windows, sample_rate: int, *, mix: bool = True) -> Iterator[Tensor]:
        """Windows (offset, length; None: to the end) in samples at `sample_rate`. They may overlap; none begins before
        the last one. Each equals that slice of the whole resampled file, and is shorter, or empty, past its end."""
        held, begin, pieces = torch.zeros(1 if mix else self.channels, 0), 0, None  # `held` begins with sample `begin`
        for offset, length in windows:
            if offset < begin or (length or 0) < 0:
                raise ValueError(f"windows must follow each other and must not be negative, got {(offset, length)}")
            if pieces is None:
                pieces, begin = self.samples(sample_rate, mix=mix, offset=offset), offset
            parts, reached, end = [held], begin + held.shape[1], math.inf if length is None else offset + length
            while reached < end and (piece := next(pieces, None)) is not None:
                parts.append(piece)
                reached += piece.shape[1]
                while len(parts) > 1 and begin + parts[0].shape[1] <= offset:
                    begin += parts.pop(0).shape[1]
            held = torch.cat(parts, dim=1)
            skip = min(offset - begin, held.shape[1])
            held, begin = held[:, skip:], begin + skip
            yield held[:, :length].contiguous()

    def is_truncated(self) -> bool:
        """Whether less was decoded than there should be, to be asked at the end. MP3 without a Xing header, bare AAC
        and what was written into a pipe do not say."""
        if self.kind in ("wav", "w64"):
            return _lacks_data(self._file)
        if self.kind == "ogg":
            return not _ogg_is_complete(self._file)
        announced, slack = (self._stream.duration or 0) * (self._stream.time_base or 0) * self.rate, self.rate
        if self.kind in ("flac", "aiff"):
            slack = 0
        elif self.kind == "mp3":  # whose duration is a guess
            announced = _xing_frames(self._file) * (1152 if self.rate >= 32_000 else 576)
        elif self.kind == "aac":
            announced = 0
        return announced - self.num_frames > slack

    def _gather(self) -> tuple[np.ndarray | None, AudioError | None]:
        """The next samples `[C, n]`, about `BLOCK`, and the error that ends them."""
        fifo, error = self._fifo, None
        try:
            for frame in self._frames:
                rate, channels = frame.sample_rate, frame.layout.nb_channels
                if (rate, channels) != (self.rate, self.channels):  # FFmpeg's FIFO would read past its end
                    at = f"at {self.seconds + fifo.samples / self.rate:.2f} s it becomes {rate} Hz"
                    raise AudioError(self.path, f"{at} with {channels} channel(s); split it there")
                frame.pts = None  # Vorbis has wrong ones
                fifo.write(frame)
                if fifo.samples >= BLOCK:
                    break
        except AudioError as found:
            error = found
        return self._floats.resample(fifo.read())[0].to_ndarray() if fifo.samples else None, error

    def _leave_out(self, frames: int) -> None:
        """Begin at the last known mark before a position."""
        number, count = max((mark for mark in self._known if mark[1] <= frames), default=(0, 0))
        if number > WARM_UP and self._stream.codec_context.name not in NOISY:
            self._start, self.num_frames = (number, count), count
            next(self._frames)  # it was decoded already

    def _decoded(self) -> Iterator[av.AudioFrame]:
        count, kind = 0, self._container.format.name
        packets = enumerate(self._container.demux(self._stream))
        try:
            for number, packet in packets:
                start, before = self._start
                if number < start - WARM_UP:
                    next(itertools.islice(packets, start - WARM_UP - number - 1, None))
                    continue
                if number % MARK_EVERY == 0 and not self._joined:  # whose later headers a reading would leave out
                    self.marks.append((number, count))
                count = before if number == start else count
                try:
                    for frame in packet.decode():
                        if number < start:
                            continue
                        if kind == "flac" and frame.pts != count:  # frames whose checksums are wrong are left out
                            raise self._damaged(count)
                        yield frame
                        count += frame.samples
                except av.InvalidDataError:
                    if kind != "mp3":  # where it is what lies between joined files: tags, and the next header
                        raise
        except av.FFmpegError as error:
            raise self._damaged(count) from error

    def _damaged(self, count: int) -> AudioError:
        place = f"truncated or damaged after {count / self._stream.codec_context.sample_rate:.2f} s"
        return AudioError(self.path, f"{place}; copy it again or export it again")


def read_windows(
    path: str | Path, windows: Windows, sample_rate: int, *, mix: bool = True, known: Marks = ()
) -> Iterator[Tensor]:
    """`Decoder.windows` of a file."""
    with Decoder(path, known) as file:
        yield from file.windows(windows, sample_rate, mix=mix)


def mixed(wav: Tensor, channels: int) -> Tensor:
    """`[C, N]` in this number of channels: as it is, or its mean in each of them."""
    return wav if len(wav) == channels else wav.mean(dim=0, keepdim=True).repeat(channels, 1)


def rate_ratio(native: int, target: int) -> Fraction:
    """Native frames per target sample. Odd rates (44,099 Hz) are rounded, by 0.1 % at most: filters must fit memory."""
    return Fraction(native, target).limit_denominator(1000)


def resample(wav: Tensor, from_rate: int, to_rate: int) -> Tensor:
    """`[…, N]` at another rate, by torchaudio's windowed sinc, on its device; it carries a gradient."""
    ratio = rate_ratio(from_rate, to_rate)
    if ratio == 1:
        return wav
    native, target = ratio.as_integer_ratio()
    # with more silence at the end than torchaudio itself adds: it computes the length in float32
    padded = torch.nn.functional.pad(wav, (0, native * math.ceil(64 / target)))
    return _resampler(native, target, wav.device)(padded)[..., : math.ceil(wav.shape[-1] / ratio)]


@cached_table
def _resampler(native: int, target: int, device: torch.device) -> torchaudio.transforms.Resample:
    return torchaudio.transforms.Resample(native, target).to(device)  # whose filter takes longer than a short clip


def _open(path: Path) -> BinaryIO:
    try:
        if path.is_dir():
            raise AudioError(path, "a folder, not an audio file; name a file inside it")
        if path.exists() and not path.is_file():  # reading a pipe would wait forever
            raise AudioError(path, "not a regular file; name an audio file")
        file = open(path, "rb")  # noqa: SIM115, the decoder closes it; also by a name that is not UTF-8
        if not file.read(1):
            raise AudioError(path, "empty (0 bytes); copy it again or remove it")
        file.seek(0)
        return file
    except FileNotFoundError as error:
        raise AudioError(path, "no such file; check the path") from error
    except OSError as error:
        raise AudioError(path, f"cannot be read ({error.strerror}); check the disk and its permissions") from error


def _lacks_data(file: BinaryIO) -> bool:
    """Whether a WAV, RF64 or W64 file ends within its samples."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    wide = file.read(4) == b"riff"  # W64: names of 16 bytes; sizes of 8 bytes, of the name and themselves too
    place, head, step, total = (40, 24, 8, 0) if wide else (12, 8, 2, 0)
    while place + head <= size:
        file.seek(place)
        name, length = file.read(16 if wide else 4)[:4], int.from_bytes(file.read(head - 16 if wide else 4), "little")
        length -= head if wide else 0
        if name == b"ds64":  # RF64: the sizes that four bytes do not hold
            total = int.from_bytes(file.read(16)[8:], "little")
        if name == b"data":
            length = total if total and length == 0xFFFF_FFFF else 0 if not wide and length >= UNKNOWN else length
            return place + head + length > size
        place += head + max(length, 0) + -length % step
    return False


def _xing_frames(file: BinaryIO) -> int:
    """How many frames of an MP3 its header announces; 0 if there is none."""
    file.seek(0)
    tag = file.read(10)
    if tag[:3] == b"ID3":
        file.seek(10 + sum((byte & 127) << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0), strict=True)))
    found = re.search(rb"(?:Xing|Info)\0\0\0[\x01\x03\x05\x07\x09\x0b\x0d\x0f](.{4})", file.read(4096), re.DOTALL)
    return int.from_bytes(found[1], "big") if found else 0


def _ogg_is_joined(file: BinaryIO) -> bool:
    """Whether a stream begins where another is under way (RFC 3533, section 4: all begin together)."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        begun = re.search(rb"OggS\0[\0\1\4\5]", content)
        return bool(begun and re.compile(rb"OggS\0[\2\3\6\7]").search(content, begun.end()))


def _ogg_is_complete(file: BinaryIO) -> bool:
    """Whether the last Ogg page is there in full and carries the end-of-stream flag (RFC 3533, section 6)."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - 2 * 65_307))  # 65,307: the largest page
    tail = file.read()
    page = tail[max(0, tail.rfind(b"OggS")) :]
    segments = page[26] if len(page) > 26 else 255
    return len(page) >= 27 + segments + sum(page[27 : 27 + segments]) and bool(page[5] & 4)
