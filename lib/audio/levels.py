"""What a sound measures: loudness and true peak, by FFmpeg's filter ebur128 (ITU-R BS.1770, EBU R 128), and how far its
band reaches; and the policies by which its level is set."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import av
import numpy as np
import torch
from torch import Tensor

CEILING = 10 ** (-1 / 20)  # −1 dBTP: the highest true peak of a file that is written
POLICIES = ("lufs", "peak", "none")
BAND_FRAME, BAND_HOP = 2048, 480  # samples
EDGE = 70.0  # dB below the loudest bin: where a clip's own band ends, and only rounding to 16 bits is left
QUIETEST = -70.0  # LUFS: below it the standard counts nothing, and ebur128 says this


class Level(NamedTuple):
    lufs: float  # integrated loudness; −∞ for silence, and for less than 0.4 s
    true_peak: float  # highest value of the waveform between the samples; full scale is 1

    def __str__(self) -> str:
        return f"{self.lufs:.1f} LUFS, true peak {decibels(self.true_peak):.1f} dBTP"

    def factor(self, policy: str, loudness: float) -> float:
        """What brings a sound to its level by a policy: 'lufs', as loud as `loudness` (LUFS); 'peak', a true peak of
        −1 dBTP; 'none', the level that it has. Never to a higher true peak."""
        most = CEILING / self.true_peak if self.true_peak else 1.0
        if policy == "peak":
            return most
        wanted = loudness - self.lufs if policy == "lufs" else 0.0
        return min(most, 10 ** (wanted / 20) if math.isfinite(wanted) else 1.0)


def decibels(value: float) -> float:
    return 20 * math.log10(value) if value else -math.inf


def mean_loudness(*lufs: float) -> float:
    """The loudness (LUFS) of the mean of powers."""
    return 10 * math.log10(power) if (power := sum(10 ** (value / 10) for value in lufs) / len(lufs)) else -math.inf


class Meter:
    """The level of a signal that comes in pieces."""

    def __init__(self, sample_rate: int, channels: int):
        self.sample_rate, self.layout = sample_rate, f"{channels} channels"
        self._found: dict[str, str] = {}
        self._graph = av.filter.Graph()
        parts = (
            self._graph.add_abuffer(format="flt", sample_rate=sample_rate, layout=self.layout),
            self._graph.add("ebur128", "peak=true:metadata=1:framelog=quiet"),
            self._graph.add("abuffersink"),
        )
        self._graph.link_nodes(*parts).configure()

    def add(self, samples: np.ndarray) -> None:
        """The next samples, `[N, C]` of any length, float32."""
        if samples.size:
            packed = np.ascontiguousarray(samples, np.float32).reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(packed, "flt", self.layout)
            frame.sample_rate = self.sample_rate
            self._push(frame)

    def level(self) -> Level:
        """Of all that was added; nothing can be added after."""
        self._push(None)
        found = {"I": QUIETEST, "true_peak": 0.0}
        lufs, true_peak = (float(self._found.get(f"lavfi.r128.{name}", value)) for name, value in found.items())
        return Level(lufs if lufs > QUIETEST else -math.inf, true_peak)

    def _push(self, frame: av.AudioFrame | None) -> None:
        self._graph.push(frame)
        while True:
            try:
                self._found = self._graph.pull().metadata or self._found
            except (av.error.BlockingIOError, av.error.EOFError):
                return


def level_of(pieces: Iterable[np.ndarray], sample_rate: int, channels: int) -> Level:
    """Of a signal in pieces `[N, C]`."""
    meter = Meter(sample_rate, channels)
    for piece in pieces:
        meter.add(piece)
    return meter.level()


def band_edge(wav: Tensor | Iterable[Tensor], rate: int = 48_000) -> float:
    """Upper edge (Hz) of the band of a signal `[C, N]`, whole or in clips: the highest bin whose peak over time is
    within 70 dB of the loudest bin's; 0 for silence. Give the signal's own `rate`: resampling leaves faint images."""
    peaks = torch.zeros(BAND_FRAME // 2 + 1)
    for clip in [wav] if isinstance(wav, Tensor) else wav:
        if size := min(BAND_FRAME, clip.shape[-1]):  # a shorter clip is one frame
            # only frames inside the clip: one across its end would have power everywhere. A Kaiser window: leakage to
            # bins more than five away is 100 dB down
            window = torch.kaiser_window(size, periodic=True, beta=14.0)
            frames = clip.unfold(-1, size, BAND_HOP) * window  # [C, T, size]
            peaks = torch.maximum(peaks, torch.fft.rfft(frames, BAND_FRAME).abs().square().amax(dim=(0, 1)))
    within = (peaks > peaks.max() * 10 ** (-EDGE / 10)).nonzero()
    return within.max().item() * rate / BAND_FRAME if len(within) else 0.0
