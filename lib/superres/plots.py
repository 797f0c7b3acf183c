"""The figures of super-resolution. Every function returns a figure; none computes a result."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from lib.audio.plots import STAGES, STYLE
from lib.superres.evaluation import Score
from lib.superres.mel import HOP, SAMPLE_RATE, SILENCE

METHOD_COLOURS = {
    "sinc": "#BBBBBB",
    "envelope": "#777777",
    "no condition": "#56B4E9",
    "no context": "#CC79A7",
    "model": "#D55E00",
    "autoencoder": "#009E73",
    "vocoder": "#000000",
}
LOUDEST = 2.5  # of a log mel, about


def mel_pictures(mels: Mapping[str, Tensor]) -> Figure:
    """Log mels `[256, T]` side by side on one scale, three in a row."""
    columns = min(3, len(mels))
    rows = -(-len(mels) // columns)
    with plt.rc_context(STYLE | {"axes.grid": False}):
        size = (3.6 * columns + 0.6, 2.7 * rows)
        figure, axes = plt.subplots(rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False)
        for axis, item in itertools.zip_longest(axes.flat, mels.items()):
            if item is None:
                axis.set_visible(False)
                continue
            name, mel = item
            extent = (0, mel.shape[1] * HOP / SAMPLE_RATE, 0, mel.shape[0])
            picture = axis.imshow(
                mel.cpu(), origin="lower", aspect="auto", extent=extent, vmin=SILENCE, vmax=LOUDEST, cmap="magma"
            )
            axis.set(title=name, xlabel="time (s)", ylabel="mel band")
            axis.label_outer()
        figure.colorbar(picture, ax=axes, label="ln of the magnitude")
    return figure


def filter_responses(responses: Mapping[str, Tensor], cutoff: float) -> Figure:
    """Gain over frequency of several ways to lose the upper band: name → `[bins]`, linear, 0 to 24 kHz."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7, 3.2))
        for (name, gain), colour in zip(responses.items(), itertools.cycle((*STAGES, "black")), strict=False):
            kilohertz = np.linspace(0, SAMPLE_RATE / 2000, len(gain))
            axes.plot(kilohertz, 20 * np.log10(np.maximum(gain.numpy(), 1e-5)), color=colour, label=name)
        axes.axvline(cutoff / 1000, color="black", linestyle=":", linewidth=1)
        axes.set(xlabel="frequency (kHz)", ylabel="gain (dB)", ylim=(-90, 5), xlim=(0, 2.5 * cutoff / 1000))
        axes.legend()
    return figure


def received_by_place(received: Mapping[str, Tensor]) -> Figure:
    """What each place of a map receives of the context, as its distance from the places' mean: name → `[H, W]`, on one
    scale."""
    with plt.rc_context(STYLE | {"axes.grid": False}):
        figure, axes = plt.subplots(1, len(received), figsize=(4.2 * len(received), 3), squeeze=False)
        top = max(float(values.max()) for values in received.values())
        for axis, (name, values) in zip(axes.flat, received.items(), strict=True):
            picture = axis.imshow(values, origin="lower", aspect="auto", vmin=0, vmax=top, cmap="viridis")
            axis.set(title=name, xlabel="place in time", ylabel="place in frequency")
        figure.colorbar(picture, ax=axes, label="distance from the mean over all places")
    return figure


def loss_curves(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Losses over steps, trainings side by side: title → rows of metrics of both splits."""
    with plt.rc_context(STYLE):
        figure, row = plt.subplots(1, len(curves), figsize=(4.6 * len(curves), 3.2), squeeze=False)
        for axes, (title, rows) in zip(row.flat, curves.items(), strict=True):
            for split, style in (("train", {"linewidth": 1}), ("val", {"marker": "o"})):
                own = [r for r in rows if r["split"] == split]
                axes.plot([r["step"] for r in own], [r["loss"] for r in own], label=split, **style)
            axes.set(title=title, xlabel="step", ylabel="loss", yscale="log")
            axes.legend()
    return figure


def distances(scores: Sequence[Score]) -> Figure:
    """LSD above the cutoff over cutoffs, a line a method, with standard errors."""
    methods = list(dict.fromkeys(score.method for score in scores))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8.5, 4))
        for method in methods:
            own = [score for score in scores if score.method == method]
            bound = method in ("autoencoder", "vocoder")
            axes.errorbar(
                [score.cutoff / 1000 for score in own],
                [score.upper[0] for score in own],
                [score.upper[1] if np.isfinite(score.upper[1]) else 0 for score in own],
                color=METHOD_COLOURS[method],
                marker="o",
                linestyle="--" if bound else "-",
                capsize=3,
                label=f"{method} (a bound)" if bound else method,
            )
        axes.set(xlabel="cutoff (kHz)", ylabel="LSD above the cutoff", ylim=(0, None))
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
