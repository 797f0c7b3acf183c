"""Figures and tables of super-resolution, which compute no result. A table is a list of rows, column → text."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

from lib.audio.plots import STYLE, draw_image, mel_axes
from lib.superres.audit import Count
from lib.superres.evaluation import Score
from lib.superres.mel import HOP, SAMPLE_RATE, SILENCE

Rows = list[dict[str, str]]
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


def size_rows(sizes: Sequence[Count]) -> Rows:
    counts = [(s.what, f"{s.counted:,}", f"{s.claimed:,}", f"{s.counted / s.claimed:.2f}") for s in sizes]
    return [dict(zip(("part", "counted", "seed", "ratio"), count, strict=True)) for count in counts]


def cost_rows(costs: Sequence[Count]) -> Rows:
    (step,) = (c.counted for c in costs if c.what == "UNet, one step")
    return [
        {"one pass over 10.24 s": c.what, "counted (GMACs)": f"{c.counted / 1e9:,.1f}"}
        | {"seed": f"{c.claimed / 1e9:,.2f}", "in UNet steps": f"{c.counted / step:.1f}"}
        for c in costs
    ]


def upper_rows(scores: Sequence[Score], which: str = "upper") -> Rows:
    """LSD above the cutoff, `upper` or `upper_matched`: a row for each method, a column for each cutoff."""
    rows: dict[str, dict[str, str]] = {}
    for s in scores:
        rows.setdefault(s.method, {"method": s.method})[kilohertz(s)] = plus_minus(getattr(s, which))
    return list(rows.values())


def gain_rows(scores: Sequence[Score], method: str = "model") -> Rows:
    """What a method gains on each baseline, a column for each cutoff."""
    own = [s for s in scores if s.method == method]
    return [{"against": name} | {kilohertz(s): str(s.against(name)) for s in own} for name in own[0].gains]


def kilohertz(score: Score) -> str:
    return f"{score.cutoff / 1000:g} kHz"


def plus_minus(pair: tuple[float, float]) -> str:
    return "{:.2f} ± {:.2f}".format(*pair)
