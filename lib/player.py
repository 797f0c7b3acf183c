"""Players that tell the truth about level: embedded audio, never normalised, with RMS and peak beside each."""

import base64
import html
import io
import math
from collections.abc import Mapping

import soundfile
from torch import Tensor

from lib.audio import SAMPLE_RATE

HEADROOM = 0.99  # of full scale, where a clip that passes it is turned down to


class Players:
    """Clips `[1, N]` by name, to compare by ear: one player each, all at one gain, so that their levels compare.

    The gain is 1 unless a clip would pass full scale; then all are turned down alike, and the heading says so.
    In a notebook this shows as players; as text, as the table of levels.
    """

    def __init__(self, wavs: Mapping[str, Tensor], sample_rate: int = SAMPLE_RATE):
        self.wavs = dict(wavs)
        self.sample_rate = sample_rate
        peak = max(float(wav.abs().max()) for wav in self.wavs.values())
        self.gain = HEADROOM / peak if peak > 1 else 1.0

    def levels(self) -> list[dict[str, object]]:
        """Name, RMS and peak of each clip, linear, before the common gain."""
        return [
            {"clip": name, "RMS": f"{float(wav.square().mean().sqrt()):.4f}", "peak": f"{float(wav.abs().max()):.3f}"}
            for name, wav in self.wavs.items()
        ]

    def _repr_html_(self) -> str:
        note = "true levels"
        if self.gain < 1:
            note = f"true levels, all turned down by {-20 * math.log10(self.gain):.1f} dB to avoid clipping"
        players = "".join(
            f'<figure class="player"><figcaption>{html.escape(row["clip"])} <small>RMS {row["RMS"]}, '
            f"peak {row['peak']}</small></figcaption>"
            f'<audio controls preload="metadata" aria-label="{html.escape(row["clip"], quote=True)}" '
            f'src="{self._data_uri(self.wavs[row["clip"]])}"></audio></figure>'
            for row in self.levels()
        )
        return f'<div class="players"><small>{note}</small>{players}</div>'

    def __repr__(self) -> str:
        return "\n".join(f"{row['clip']}: RMS {row['RMS']}, peak {row['peak']}" for row in self.levels())

    def _data_uri(self, wav: Tensor) -> str:
        content = io.BytesIO()
        soundfile.write(content, (wav[0] * self.gain).numpy(), self.sample_rate, format="FLAC", subtype="PCM_16")
        return "data:audio/flac;base64," + base64.b64encode(content.getvalue()).decode()
