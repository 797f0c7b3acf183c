"""Players that tell the truth about level: embedded audio, never normalised, with RMS, peak and loudness beside each.

What is written here is plain HTML that works anywhere. Where scripts run, `player.js` makes one panel of it: clips that
change places without losing the position, true levels or equal loudness, a moving cursor, a blind test.
"""

import base64
import html
import io
import math
from collections.abc import Mapping
from pathlib import Path

import anywidget
import soundfile
import torchaudio
import traitlets
from torch import Tensor

from lib.audio.files import SAMPLE_RATE
from lib.audio.plots import AVERAGE, INPUT, OUTPUT, STAGES, TARGET, clip_picture
from lib.listening.widgets import can_show_widgets

HEADROOM = 0.99  # of full scale, where a clip that passes it is turned down to
BLOCK = 0.4  # seconds: the least that loudness is measured over
SCRIPT, STYLE = (Path(__file__).with_name(f"player.{suffix}") for suffix in ("js", "css"))
COLOURS = {"input": INPUT, "target": TARGET, "output": OUTPUT, "plain average": AVERAGE}
OTHERS = (OUTPUT, *STAGES[3:], STAGES[1])  # of clips with other names: neither the input's colour nor the target's


def loudness(wav: Tensor, sample_rate: int = SAMPLE_RATE) -> float:
    """Loudness of `[1, N]` in LUFS by ITU-R BS.1770-4; −∞ for silence. A clip that is shorter than the 0.4 s over which
    it is measured is repeated."""
    repeats = math.ceil(2 * BLOCK * sample_rate / wav.shape[-1]) if wav.shape[-1] < BLOCK * sample_rate else 1
    scale = max(1.0, 4 * float(wav.abs().max()))  # torchaudio's filters raise peaks by up to 3.4 and clip them at 1
    value = float(torchaudio.functional.loudness(wav.repeat(1, repeats) / scale, sample_rate))
    return value + 20 * math.log10(scale) if math.isfinite(value) else -math.inf


class Players:
    """Clips `[1, N]` by name, to compare by ear: one player each, all at one gain, so that their levels compare.

    The gain is 1 unless a clip would pass full scale; then all are turned down alike, and the heading says so. In a
    notebook this shows as players; as text, as the table of levels.
    """

    def __init__(self, wavs: Mapping[str, Tensor], sample_rate: int = SAMPLE_RATE):
        self.wavs = dict(wavs)
        self.sample_rate = sample_rate
        self.peaks = {name: float(wav.abs().max()) for name, wav in self.wavs.items()}
        self.loudness = {name: loudness(wav, sample_rate) for name, wav in self.wavs.items()}
        loudest = max(self.peaks.values())
        self.gain = HEADROOM / loudest if loudest > 1 else 1.0

    def levels(self) -> list[dict[str, object]]:
        """Name, RMS, peak and loudness of each clip, before the common gain."""
        return [
            {
                "clip": name,
                "RMS": f"{float(wav.square().mean().sqrt()):.4f}",
                "peak": f"{self.peaks[name]:.3f}",
                "LUFS": f"{self.loudness[name]:.1f}",
            }
            for name, wav in self.wavs.items()
        ]

    def matching_gains(self) -> dict[str, float]:
        """Name → the gain, on top of the common one, that makes all clips equally loud: the loudness is the highest at
        which none passes full scale. Silence keeps 1."""
        heard = [name for name, level in self.loudness.items() if level > -math.inf]
        room = {name: 20 * math.log10(HEADROOM / self.peaks[name]) for name in heard}
        goal = min((self.loudness[name] + room[name] for name in heard), default=0.0)
        return {
            name: 10 ** ((goal - level) / 20) / self.gain if name in heard else 1.0
            for name, level in self.loudness.items()
        }

    def show(self) -> "Players | PlayerWidget":
        """The panel where the front end can show widgets, else the plain players."""
        return PlayerWidget(html=self._repr_html_()) if can_show_widgets() else self

    def _repr_html_(self) -> str:
        note = "true levels"
        if self.gain < 1:
            note = f"true levels, all turned down by {-20 * math.log10(self.gain):.1f} dB to avoid clipping"
        seconds = max(wav.shape[-1] for wav in self.wavs.values()) / self.sample_rate
        gains = self.matching_gains()
        players = "".join(self._figure(row, gains[row["clip"]], seconds) for row in self.levels())
        return f'<div class="players" data-seconds="{seconds:.6f}"><small class="note">{note}</small>{players}</div>'

    def _figure(self, row: Mapping[str, object], gain: float, seconds: float) -> str:
        wav, name = self.wavs[row["clip"]], html.escape(row["clip"], quote=True)
        others = [clip for clip in self.wavs if clip not in COLOURS]
        colour = COLOURS.get(row["clip"]) or OTHERS[others.index(row["clip"]) % len(OTHERS)]
        picture = base64.b64encode(clip_picture(wav, colour, self.sample_rate)).decode()
        width = 100 * wav.shape[-1] / self.sample_rate / seconds  # %: pictures of one panel share a time axis
        return (
            f'<figure class="player" data-name="{name}" data-gain="{gain:.6g}"><figcaption>{name} '
            f"<small>RMS {row['RMS']}, peak {row['peak']}, {row['LUFS']} LUFS</small></figcaption>"
            f'<div class="picture"><img src="data:image/png;base64,{picture}" style="width: {width:.3f}%" '
            f'alt="outline and mel picture of {name}"></div>'
            f'<audio controls preload="metadata" aria-label="{name}" src="{self._data_uri(wav)}"></audio></figure>'
        )

    def __repr__(self) -> str:
        return "\n".join(
            f"{row['clip']}: RMS {row['RMS']}, peak {row['peak']}, {row['LUFS']} LUFS" for row in self.levels()
        )

    def _data_uri(self, wav: Tensor) -> str:
        content = io.BytesIO()
        soundfile.write(content, (wav[0] * self.gain).numpy(), self.sample_rate, format="FLAC", subtype="PCM_16")
        return "data:audio/flac;base64," + base64.b64encode(content.getvalue()).decode()


class PlayerWidget(anywidget.AnyWidget):
    """The panel of `player.js` over the HTML of `Players`; new HTML takes over the position, the clip and the level."""

    _esm = SCRIPT
    _css = STYLE
    html = traitlets.Unicode().tag(sync=True)
