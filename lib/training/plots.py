"""Figures of a training run. Rows are those of metrics.jsonl; a value that was not finite is null, a gap here."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lib.audio.plots import AVERAGE, INPUT, OUTPUT, STAGES, STYLE, WIDTH, draw_image

Rows = Sequence[Mapping[str, Any]]

EACH_STEP, VALIDATION = {"color": AVERAGE, "linewidth": 0.8}, {"color": OUTPUT, "marker": "o"}
SIGNS = {"copying": "an output follows a source's loudness", "flatness": "a clip with constant loudness, or silent"}
EXTREME = 1e3  # of a sign: unguarded terms come near a division by 0
HEALTHY = {"color": "#009E73", "alpha": 0.08, "linewidth": 0}  # the bands of claim C15


@plt.rc_context(STYLE)
def curves(
    series: Mapping[str, tuple[Rows, str]], marks: Mapping[str, float] = {}, x: str = "step", **axis: Any
) -> Figure:
    """Label → rows and key of each curve over steps, or over another number `x` of the rows; `marks`: label → height of
    each dotted line."""
    figure, axes = plt.subplots(figsize=(7, 3.2))
    for (label, (rows, key)), colour in zip(series.items(), (OUTPUT, *STAGES), strict=False):
        _plot(axes, rows, key, x, color=colour, marker="o" if len(rows) < 50 else "", label=label)
    for i, (label, height) in enumerate(marks.items()):
        axes.axhline(height, color="black", linestyle=":", linewidth=1 + 0.5 * i, label=label)
    axes.set(xlabel=x, **axis)
    figure.legend(fontsize=8, loc="outside upper center", ncols=5)  # where no curve runs
    return figure


@plt.rc_context(STYLE)
def mask_pictures(input_mask: Tensor, target_mask: Tensor, frame_rate: float) -> Figure:
    """Both masks `[D, T]` over channels and time: dark where nothing is taken from a clip, bright where all is."""
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.2), sharex=True, sharey=True)
    for ax, mask, name in zip(axes, (input_mask, target_mask), ("input", "target"), strict=True):
        image = draw_image(ax, mask.numpy(), mask.shape[1] / frame_rate, vmin=0, vmax=1)
        ax.set(title=f"taken from the {name}", xlabel="time (s)")
    axes[0].set_ylabel("latent channel")
    figure.colorbar(image, ax=axes, label="mask")
    return figure


@plt.rc_context(STYLE)
def training_dashboard(train: Rows, val: Rows, clamps: Sequence[tuple[float, float] | None]) -> Figure:
    """A training at a glance: loss, gradient norm, and every stage's RMS and target scale. Claim C15's healthy ranges
    are shaded: a gradient norm below 100, and an RMS of 0.8 to 1.2 of its target. A stage, whose clamp is in `clamps`,
    stays there while its target scale is from lo / 1.2 to hi / 0.8: within the clamp, or not far beyond. Steps in which
    a sign is extreme are marked."""
    rows = 1 + bool(clamps)
    figure, _ = plt.subplots(rows, 2, figsize=(WIDTH, 3 * rows), sharex=True)
    losses, norms, *of_stages = figure.axes
    _plot(losses, train, "loss", **EACH_STEP, label="training, each step")
    _plot(losses, val, "loss", **VALIDATION, label="validation")
    _plot(norms, train, "grad_norm", color=INPUT, linewidth=1, label="before clipping")
    small = (row["grad_norm"] for row in train if 0 < (row.get("grad_norm") or 0) < 100)
    norms.axhspan(min(small, default=3) / 3, 100, **HEALTHY, label="below 100")
    for (sign, words), colour in zip(SIGNS.items(), STAGES, strict=False):
        steps = [row["step"] for row in train if (row.get(f"sign/{sign}") or 0) > EXTREME]
        if steps:
            losses.vlines(steps, 0, 1, colors=colour, alpha=0.3, transform=losses.get_xaxis_transform(), label=words)
    losses.set(ylabel="loss")
    norms.set(ylabel="gradient norm", yscale="log")
    if clamps:
        levels, scales = of_stages
        for i in range(len(clamps)):
            line = {"color": STAGES[i % len(STAGES)], "linewidth": 1.5 * (len(clamps) - i)}  # none hides another
            _plot(levels, train, f"stage{i}/output_rms", **line, label=f"stage {i} output")
            _plot(scales, train, f"stage{i}/target_scale", **line, label=f"stage {i} target")
        before, scale = "stage0/rms_before_scaling", "stage0/target_scale"
        if targets := [row[before] * row[scale] for row in train if row.get(before)]:
            target = statistics.median(targets)
            levels.axhspan(0.8 * target, 1.2 * target, **HEALTHY, label="0.8 to 1.2 of the target RMS")
        if clamped := [clamp for clamp in clamps if clamp is not None]:
            lows, highs = zip(*clamped, strict=True)
            scales.axhspan(max(lows) / 1.2, min(highs) / 0.8, **HEALTHY, label="RMS stays within 0.8 to 1.2")
        levels.set(ylabel="RMS (latent units)", ylim=(0, None))
        scales.set(ylabel="RMS scale", ylim=(0, None))
    for axes in figure.axes:
        axes.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)  # above, where no line runs
    for axes in figure.axes[-2:]:
        axes.set_xlabel("step")
    return figure


def _plot(axes: Axes, rows: Rows, key: str, x: str = "step", **style: Any) -> None:
    found = [row for row in rows if row.get(key) is not None]
    axes.plot([row[x] for row in found], [row[key] for row in found], **style)
