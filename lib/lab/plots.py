"""Figures of the ablation and of the collapse. The settings of the source documents keep one colour and marker each."""

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib.audio.plots import STAGES, STYLE, WIDTH
from lib.lab.results import Groups
from lib.lab.variants import EXPLODING, LEARNABLE, REFERENCE, REPAIR

COLOURS = {REFERENCE: "#0072B2", EXPLODING: "#D55E00", REPAIR: "#E69F00", LEARNABLE: "#CC79A7"}
MARKERS = {REFERENCE: "o", EXPLODING: "s", REPAIR: "^", LEARNABLE: "D"}
OTHER = "#666666"  # of variants that no source document names
Values = Sequence[float]  # one per seed


@contextmanager
def panels(titles: Sequence[str], height: float, rows: Sequence[str] = ()) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure of `height` inches with a panel for each title, on one vertical scale; `rows`: names of y = 0, 1, …,
    downwards."""
    with plt.rc_context(STYLE | {"axes.grid.axis": "x" if rows else "both"}):
        figure, axes = plt.subplots(1, len(titles), figsize=(WIDTH, height), sharey=True, squeeze=False)
        yield figure, list(axes[0])
        if rows:
            axes[0, 0].set_yticks(range(len(rows)), list(rows), fontsize=8)
            axes[0, 0].invert_yaxis()


def trajectories(groups: Groups) -> Figure:
    """Gradient norm before clipping over steps: median over seeds as a line, range as a band, × at a non-finite end."""
    with panels([""], 4) as (figure, (axes,)):
        for name, results in groups.items():
            runs = [(run, finite) for run in results if (finite := [n for n in run.grad_norm if math.isfinite(n)])]
            if not runs:
                continue
            steps = np.linspace(1, max(run.steps for run, _ in runs), max(len(own) for _, own in runs))
            norms = [np.interp(steps, np.linspace(1, r.steps, len(own)), own, right=np.nan) for r, own in runs]
            colour, marker = COLOURS.get(name, OTHER), MARKERS.get(name, "o")
            axes.fill_between(steps, np.nanmin(norms, 0), np.nanmax(norms, 0), color=colour, alpha=0.2, linewidth=0)
            every = max(1, len(steps) // 8)
            axes.plot(steps, np.nanmedian(norms, 0), color=colour, marker=marker, markevery=every, label=name)
            for run, own in runs:
                if run.non_finite:
                    axes.plot(run.steps, own[-1], "x", color=colour, markersize=11)
        axes.set(xlabel="step", ylabel="gradient norm before clipping", yscale="log")
        axes.legend(fontsize=8)
    return figure


def ranges(axes: Axes, rows: Sequence[tuple[Values, str, str]], size: float) -> None:
    """A row for each (values, colour, marker): every seed as a point, the range as a line; or a word without values."""
    for y, (values, colour, marker) in enumerate(rows):
        if values:
            axes.plot([min(values), max(values)], [y, y], color=colour, linewidth=2)
            axes.plot(values, [y] * len(values), marker, color=colour, markersize=size)
        else:
            axes.text(0.5, y, "non-finite", transform=axes.get_yaxis_transform(), va="center", fontsize=8)


def variant_ranges(groups: Groups, measures: Mapping[str, Mapping[str, Values]], log: Sequence[str] = ()) -> Figure:
    """A row per variant, a panel per measure: every seed as a point, the range as a line, the reference's as a band.
    `measures`: axis label with its unit → variant → values. `log`: the labels of logarithmic axes."""
    with panels(list(measures), 1.1 + 0.24 * len(groups), list(groups)) as (figure, row):
        for axes, (label, values) in zip(row, measures.items(), strict=True):
            axes.set(xlabel=textwrap.fill(label, 22), xscale="log" if label in log else "linear")
            if values.get(REFERENCE):
                axes.axvspan(min(values[REFERENCE]), max(values[REFERENCE]), color=COLOURS[REFERENCE], alpha=0.15)
            looks = [(values.get(name), COLOURS.get(name, OTHER), MARKERS.get(name, "o")) for name in groups]
            ranges(axes, looks, 4)
    return figure


def factorial(effects: Mapping[str, Mapping[str, Values]]) -> Figure:
    """Main effects and interactions, a panel per measure; grey crosses where seeds disagree on the sign."""
    sure, unsure = ("#000000", "o"), ("#999999", "x")
    names = list(next(iter(effects.values())))
    with panels(list(effects), 3.2, names) as (figure, row):
        for axes, (label, found) in zip(row, effects.items(), strict=True):
            ranges(axes, [(v, *(sure if min(v) > 0 or max(v) < 0 else unsure)) for v in found.values()], 5)
            axes.axvline(0, color="black", linewidth=1)
            axes.set(xlabel=textwrap.fill(label, 22))
    return figure


def predicted_and_measured(series: Mapping[str, Mapping], xlabel: str, ylabel: str, goal: float) -> Figure:
    """Law against measurement, a panel per setting: `x`, `predicted`, `measured` [seeds, x], optional `bound`."""
    with panels(list(series), 3.4) as (figure, row):
        for axes, (title, data) in zip(row, series.items(), strict=True):
            measured = np.asarray(data["measured"])
            axes.fill_between(data["x"], measured.min(0), measured.max(0), color="#000000", alpha=0.25, linewidth=0)
            axes.plot(data["x"], np.median(measured, 0), color="#000000", label="measured, median and range")
            axes.plot(data["x"], data["predicted"], color="#56B4E9", linestyle="--", label="predicted")
            if "bound" in data:
                axes.plot(data["x"], data["bound"], color="#009E73", linestyle=":", label="bound")
            axes.axhline(goal, color="#999999", linewidth=0.8, label="target RMS")
            axes.set(xlabel=xlabel, title=title, ylim=(0, None))
        row[0].set_ylabel(ylabel)
        figure.legend(*row[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8)
    return figure


def waterfall(axes: Axes, traces: Sequence[Mapping[str, float]], goal: float) -> None:
    """RMS through the stages: of each a `StageTrace`, the weighted residual's RMS and, by the law, the output's."""
    fields = ("projection_rms", "weighted_residual", "rms_before_scaling", "output_rms")
    labels = ("projection", "residual", "before scaling", "output")
    for offset, (field, label, colour) in enumerate(zip(fields, labels, STAGES, strict=False)):
        x = [i + (offset - 1.5) * 0.2 for i in range(len(traces))]
        axes.bar(x, [trace[field] for trace in traces], width=0.18, color=colour, label=label)
    outputs = [i + 0.3 for i in range(len(traces))]
    axes.plot(outputs, [trace["law"] for trace in traces], "D", color="black", markersize=4, label="output by the law")
    axes.axhline(goal, color="black", linewidth=1, linestyle="--", label="target RMS")
    above = {"ha": "center", "va": "bottom", "fontsize": 8, "transform": axes.get_xaxis_transform()}
    for i, trace in enumerate(traces):
        applied = f"\napplied ×{trace['applied_scale']:.1f}" if trace["clamped"] else ""
        axes.text(i, 1.02, f"target ×{trace['target_scale']:.1f}{applied}", **above)
    axes.set_xticks(range(len(traces)), [f"stage {i}" for i in range(len(traces))])
    axes.set(ylabel="RMS (latent units)", ylim=(0, 1.35 * goal))


def waterfalls(settings: Mapping[str, Sequence[Mapping[str, float]]], goal: float) -> Figure:
    """Waterfalls on one scale, at most two in a row, titled by their settings."""
    with plt.rc_context(STYLE | {"axes.grid.axis": "y", "font.size": 9}):
        columns = min(2, len(settings))
        rows = math.ceil(len(settings) / columns)
        figure, grid = plt.subplots(rows, columns, figsize=(WIDTH, 2.9 * rows), sharey=True, squeeze=False)
        for axes, (title, traces) in zip(grid.flat, settings.items(), strict=False):
            waterfall(axes, traces, goal)
            axes.set_title(title, fontsize=9, pad=28)
        figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize=8)
    return figure
