"""Figures and tables of super-resolution, which compute no result. A table is a list of rows, column → text."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

from lib.audio.plots import STYLE, draw_image, mel_axes
from lib.superres.evaluation import Score
from lib.superres.mel import HOP, SAMPLE_RATE, SILENCE

LOUDEST = 2.5  # of a log mel, about


@plt.rc_context(STYLE)
def mel_spectrograms(mels: Mapping[str, Tensor]) -> Figure:
    """Log mels `[256, T]` side by side on one scale, three in a row."""
    figure, axes = mel_axes(list(mels), 3.8, 2.7)
    for axis, mel in zip(axes, mels.values(), strict=True):
        seconds = mel.shape[1] * HOP / SAMPLE_RATE
        image = draw_image(axis, mel.cpu().numpy(), seconds, vmin=SILENCE, vmax=LOUDEST, cmap="magma")
    figure.colorbar(image, ax=axes, label="ln of the magnitude")
    return figure


def upper_rows(scores: Sequence[Score], which: str = "upper") -> list[dict[str, str]]:
    """LSD above the cutoff, `upper` or `upper_matched`: a row for each method, a column for each cutoff."""
    rows: dict[str, dict[str, str]] = {}
    for s in scores:
        rows.setdefault(s.method, {"method": s.method})[kilohertz(s)] = "{:.2f} ± {:.2f}".format(*getattr(s, which))
    return list(rows.values())


def kilohertz(score: Score) -> str:
    return f"{score.cutoff / 1000:g} kHz"
