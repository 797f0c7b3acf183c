"""Figures of a training: losses, gradients, stages, masks. Each function returns a matplotlib figure."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from lib.audio.plots import AVERAGE, INPUT, OUTPUT, STAGES, STYLE

HEALTHY = {"color": "#009E73", "alpha": 0.08, "linewidth": 0}  # the bands of claim C15


def loss_curve(train: Sequence[Mapping[str, Any]], val: Sequence[Mapping[str, Any]]) -> Figure:
    """Training and validation loss over steps."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7, 3.2))
        axes.plot(*_series(train, "loss"), color=AVERAGE, linewidth=0.8, label="training, each batch")
        axes.plot(*_series(val, "loss"), color=OUTPUT, marker="o", label="validation")
        axes.set(xlabel="step", ylabel="loss")
        axes.legend()
    return figure


def gradient_curve(train: Sequence[Mapping[str, Any]], clip: float | None) -> Figure:
    """Gradient norm before clipping over steps."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7, 3.2))
        axes.plot(*_series(train, "grad_norm"), color=INPUT, linewidth=1, label="gradient norm before clipping")
        if clip:
            axes.axhline(clip, color="black", linestyle=":", label=f"clipped above {clip:g}")
        axes.set(xlabel="step", ylabel="gradient norm", yscale="log")
        axes.legend()
    return figure


def stage_curves(train: Sequence[Mapping[str, Any]], num_stages: int, clamp: tuple[float, float] | None) -> Figure:
    """Per stage over steps: RMS of projection and output, wanted and applied factor, clamped share."""
    with plt.rc_context(STYLE):
        figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.6))
        for stage in range(num_stages):
            colour = STAGES[stage % len(STAGES)]
            key = f"stage{stage}"
            left.plot(*_series(train, f"{key}/output_rms"), color=colour, label=f"stage {stage} output")
            left.plot(
                *_series(train, f"{key}/projection_rms"), color=colour, ls="--", label=f"stage {stage} projection"
            )
            middle.plot(*_series(train, f"{key}/target_scale"), color=colour, ls="--", label=f"stage {stage} wanted")
            middle.plot(*_series(train, f"{key}/applied_scale"), color=colour, label=f"stage {stage} applied")
            right.plot(*_series(train, f"{key}/clamped"), color=colour, label=f"stage {stage}")
        middle.axhline(1.3, color="black", linestyle=":", label="warning at 1.3")
        if clamp:
            middle.axhspan(*clamp, color="black", alpha=0.05, label="clamp range")
        left.set(xlabel="step", ylabel="RMS (latent units)", ylim=(0, None))
        middle.set(xlabel="step", ylabel="RMS factor")
        right.set(xlabel="step", ylabel="share of clips clamped", ylim=(-0.05, 1.05))
        for axes in (left, middle, right):
            axes.legend(fontsize=8)
    return figure


def discriminator_curve(train: Sequence[Mapping[str, Any]]) -> Figure:
    """Mean logits of the discriminator for music and for fusions, over steps; hinge wants them beyond ±1."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7, 3.2))
        axes.plot(*_series(train, "discriminator/real"), color=INPUT, label="the clips' own latents")
        axes.plot(*_series(train, "discriminator/made"), color=OUTPUT, label="fusions")
        for limit in (-1, 1):
            axes.axhline(limit, color="black", linestyle=":", linewidth=1)
        axes.set(xlabel="step", ylabel="mean logit")
        axes.legend()
    return figure


def complementarity_curve(train: Sequence[Mapping[str, Any]], val: Sequence[Mapping[str, Any]]) -> Figure:
    """Complementarity of the masks over steps, above that of two constant masks of 0.5."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7, 3.2))
        axes.plot(*_series(train, "masks/complementarity"), color=AVERAGE, linewidth=0.8, label="training, each step")
        axes.plot(*_series(val, "masks/complementarity"), color=OUTPUT, marker="o", label="validation")
        axes.axhline(0.75, color="black", linestyle=":", label="constant masks of 0.5")
        axes.set(xlabel="step", ylabel="1 − mean(m_in · m_tgt)")
        axes.legend()
    return figure


def mask_pictures(input_mask: Tensor, target_mask: Tensor, frame_rate: float) -> Figure:
    """What is taken from each clip, masks `[D, T]`: over channels and time, 0 dark, 1 bright."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(11, 3.4), sharex=True, sharey=True)
        for ax, mask, name in zip(axes, (input_mask, target_mask), ("input", "target"), strict=True):
            extent = (0, mask.shape[1] / frame_rate, 0, mask.shape[0])
            picture = ax.imshow(
                mask.numpy(), origin="lower", aspect="auto", cmap="viridis", vmin=0, vmax=1, extent=extent
            )
            ax.set(title=f"taken from the {name}", xlabel="time (s)")
            ax.grid(False)
        axes[0].set_ylabel("latent channel")
        figure.colorbar(picture, ax=axes, label="mask")
    return figure


def training_dashboard(
    train: Sequence[Mapping[str, Any]],
    val: Sequence[Mapping[str, Any]],
    clamps: Sequence[tuple[float, float] | None],
) -> Figure:
    """A training at a glance, over steps: loss, gradient norm, RMS and factor of every stage.

    Shaded is what claim C15 calls healthy: a gradient norm below 100, a level of 0.8 to 1.2 of the wanted one. A stage
    keeps to that while the wanted factor is within its clamp, or beyond it by no more: lo / 1.2 to hi / 0.8.
    `clamps`: of each stage.
    """
    with plt.rc_context(STYLE):
        figure, ((top, norms), (levels, factors)) = plt.subplots(2, 2, figsize=(11, 6), sharex=True)
        top.plot(*_series(train, "loss"), color=AVERAGE, linewidth=0.8, label="training, each step")
        top.plot(*_series(val, "loss"), color=OUTPUT, marker="o", label="validation")
        steps, sizes = _series(train, "grad_norm")
        norms.plot(steps, sizes, color=INPUT, linewidth=1, label="before clipping")
        for stage in range(len(clamps)):
            colour = STAGES[stage % len(STAGES)]
            levels.plot(*_series(train, f"stage{stage}/output_rms"), color=colour, label=f"stage {stage} output")
            factors.plot(*_series(train, f"stage{stage}/target_scale"), color=colour, label=f"stage {stage} wanted")
        goals = [
            row["stage0/target_scale"] * row["stage0/rms_before_scaling"]
            for row in train
            if row.get("stage0/rms_before_scaling")
        ]
        if goals:
            goal = float(np.median(goals))
            levels.axhspan(0.8 * goal, 1.2 * goal, **HEALTHY, label="0.8 to 1.2 of the wanted RMS")
        clamped = [clamp for clamp in clamps if clamp is not None]
        if clamped:
            least, most = max(low for low, _ in clamped), min(high for _, high in clamped)
            factors.axhspan(least / 1.2, most / 0.8, **HEALTHY, label="level stays within 0.8 to 1.2")
        norms.axhspan(min((s for s in sizes if 0 < s < 100), default=3) / 3, 100, **HEALTHY, label="below 100")
        top.set(ylabel="loss")
        norms.set(ylabel="gradient norm", yscale="log")
        levels.set(ylabel="RMS (latent units)", xlabel="step", ylim=(0, None))
        factors.set(ylabel="RMS factor", xlabel="step", ylim=(0, None))
        for axes in (top, norms, levels, factors):
            axes.legend(fontsize=8)
    return figure


def runs_side_by_side(runs: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> Figure:
    """Validation loss, gradient norm and the last stage's level over steps; `runs`: name → split → rows."""
    with plt.rc_context(STYLE):
        figure, (losses, norms, levels) = plt.subplots(1, 3, figsize=(13, 3.6))
        for (name, rows), colour in zip(runs.items(), itertools.cycle(STAGES), strict=False):
            losses.plot(*_series(rows["val"], "loss"), color=colour, marker="o", label=name)
            norms.plot(*_series(rows["train"], "grad_norm"), color=colour, linewidth=1, label=name)
            stages = [key for key in (rows["train"] or [{}])[0] if key.endswith("/applied_scale")]
            if stages:
                applied, wanted = max(stages), max(stages).replace("applied", "target")
                found = [(row["step"], row[applied] / row[wanted]) for row in rows["train"] if row.get(wanted)]
                levels.plot(*zip(*found, strict=True), color=colour, label=name)
        levels.axhspan(0.8, 1.2, **HEALTHY, label="0.8 to 1.2")
        losses.set(xlabel="step", ylabel="validation loss")
        norms.set(xlabel="step", ylabel="gradient norm", yscale="log")
        levels.set(xlabel="step", ylabel="output / wanted RMS, last stage", ylim=(0, None))
        for axes in (losses, norms, levels):
            axes.legend(fontsize=8)
    return figure


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    found = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [step for step, _ in found], [value for _, value in found]
