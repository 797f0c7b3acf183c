"""Audio players that keep levels as they are: embedded, never normalised, with RMS, peak and loudness beside them.
Where scripts run, `player.js` turns the HTML into a panel: switching clips keeps the position, levels are true or
equally loud, a cursor moves over the pictures, and a blind test keeps score."""

import base64
import io
import math
from collections.abc import Mapping
from pathlib import Path

import anywidget
import soundfile
import traitlets
from markupsafe import Markup
from torch import Tensor

from lib.audio.decode import resample
from lib.audio.files import SAMPLE_RATE
from lib.audio.levels import decibels, level_of
from lib.audio.plots import AVERAGE, INPUT, OUTPUT, STAGES, TARGET, clip_image
from lib.listening.widgets import can_show_widgets

HEADROOM = 0.99  # of full scale: the peak that too loud clips are turned down to
BLOCK = 0.4  # seconds: the shortest window of the loudness standard
SCRIPT, STYLE = (Path(__file__).with_name(f"player.{suffix}") for suffix in ("js", "css"))
COLOURS = {"input": INPUT, "target": TARGET, "output": OUTPUT, "plain average": AVERAGE, "HPSS": AVERAGE}
OTHERS = (OUTPUT, *STAGES[3:], STAGES[1])  # for clips with other names: neither the input's colour nor the target's
PANEL = Markup('<div class="players" data-seconds="{:.6f}" data-rate="{}"><small class="note">{}</small>{}</div>')
PLAYER = Markup(Path(__file__).with_suffix(".html").read_text().replace("\n", ""))


def loudness(wav: Tensor, sample_rate: int = SAMPLE_RATE) -> float:
    """Loudness of `[C, N]` in LUFS by ITU-R BS.1770-4; −∞ for silence. A clip shorter than its window is repeated."""
    repeats = math.ceil(2 * BLOCK * sample_rate / wav.shape[-1]) if wav.shape[-1] < BLOCK * sample_rate else 1
    scale = max(1.0, float(wav.abs().max()))  # the meter ends at 10 LUFS
    return level_of([(wav.T / scale).numpy()] * repeats, sample_rate, len(wav)).lufs + decibels(scale)


def data_uri(kind: str, content: bytes) -> str:
    """A file inside a page; `kind`: its media type."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def flac(wav: Tensor, sample_rate: int) -> bytes:
    content = io.BytesIO()
    soundfile.write(content, wav.T.numpy(), sample_rate, format="FLAC", subtype="PCM_16")
    return content.getvalue()


class Players:
    """Clips `[C, N]` by name, one player each, at one gain, so that levels compare: 1, or less above full scale."""

    def __init__(self, wavs: Mapping[str, Tensor], sample_rate: int = SAMPLE_RATE):
        self.wavs, self.sample_rate = dict(wavs), sample_rate
        self.peaks = {name: float(wav.abs().max()) for name, wav in self.wavs.items()}
        self.loudness = {name: loudness(wav, sample_rate) for name, wav in self.wavs.items()}
        self.seconds = max(wav.shape[-1] for wav in self.wavs.values()) / sample_rate
        self.gain = HEADROOM / peak if (peak := max(self.peaks.values())) > 1 else 1.0

    def resampled(self, sample_rate: int = SAMPLE_RATE) -> dict[str, Tensor]:
        """The clips at another rate, by default at the 24 kHz that figures and metrics take."""
        return {name: resample(wav, self.sample_rate, sample_rate) for name, wav in self.wavs.items()}

    def levels(self) -> dict[str, str]:
        """RMS, peak and loudness of each clip before the common gain."""
        return {
            name: f"RMS {wav.square().mean().sqrt():.4f}, peak {self.peaks[name]:.3f}, {self.loudness[name]:.1f} LUFS"
            for name, wav in self.wavs.items()
        }

    def matching_gains(self) -> dict[str, float]:
        """Gains beside the common one that make all clips equally loud, as loud as full scale allows; 1 for silence."""
        audible = {name: level for name, level in self.loudness.items() if level > -math.inf}
        highest = [level + 20 * math.log10(HEADROOM / self.peaks[name]) for name, level in audible.items()]
        goal = min(highest, default=0.0)
        return {n: 10 ** ((goal - audible[n]) / 20) / self.gain if n in audible else 1.0 for n in self.wavs}

    def show(self) -> "Players | PlayerWidget":
        """The panel where the front end can show widgets, else the plain players."""
        return PlayerWidget(html=self._repr_html_()) if can_show_widgets() else self

    def __repr__(self) -> str:
        return "\n".join(f"{name}: {level}" for name, level in self.levels().items())

    def _repr_html_(self) -> str:
        note = "true levels"
        if self.gain < 1:
            note += f", all turned down by {-20 * math.log10(self.gain):.1f} dB to avoid clipping"
        gains, levels = self.matching_gains(), self.levels()
        others = [name for name in self.wavs if name not in COLOURS]
        colours = COLOURS | {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(others)}
        per_sample = 100 / self.sample_rate / self.seconds  # %: all pictures share a time axis
        players = [
            PLAYER.format(
                name=name,
                gain=gains[name],
                levels=levels[name],
                picture=data_uri("image/png", clip_image(wav, colours[name], self.sample_rate)),
                width=per_sample * wav.shape[-1],
                sound=data_uri("audio/flac", flac(wav * self.gain, self.sample_rate)),
            )
            for name, wav in self.wavs.items()
        ]
        return str(PANEL.format(self.seconds, self.sample_rate, note, Markup().join(players)))


class PlayerWidget(anywidget.AnyWidget):
    """The panel of `player.js` over the HTML of `Players`; new HTML keeps the position, the clip and the level."""

    _esm = SCRIPT
    _css = STYLE
    html = traitlets.Unicode().tag(sync=True)
