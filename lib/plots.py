"""The figures. Every function returns a matplotlib figure with labelled axes and units; none computes a result.

Colours are Okabe and Ito's, which colour-blind readers tell apart and which print well. Legend: N samples, D latent
channels, T frames.
"""

import functools
import io
import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import torchaudio
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from lib.audio import SAMPLE_RATE

logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # it names every font that it did not need

INPUT, TARGET, OUTPUT, AVERAGE = "#0072B2", "#E69F00", "#009E73", "#777777"
STAGES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")
SHADES = 48  # of a small mel picture: steps of 1.7 dB
HEALTHY = {"color": "#009E73", "alpha": 0.08, "linewidth": 0}  # the bands of claim C15
STYLE = {
    "figure.dpi": 80,
    "savefig.dpi": 110,
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "font.size": 10,
}


def mel_power(wav: Tensor, sample_rate: int = SAMPLE_RATE) -> Tensor:
    """Power in 80 mel bands of `[1, N]`: `[80, frames]`, hop 256 samples."""
    n_fft = 1024
    if wav.shape[-1] < n_fft:
        wav = torch.nn.functional.pad(wav, (0, n_fft - wav.shape[-1]))
    return torchaudio.transforms.MelSpectrogram(sample_rate, n_fft=n_fft, hop_length=256, n_mels=80)(wav)[0]


def decibels_below_peak(power: Tensor) -> Tensor:
    """A picture of powers in dB relative to its own maximum, floor -80; silence is all floor."""
    if power.max() <= 1e-10:
        return torch.full_like(power, -80.0)
    decibels = torchaudio.functional.amplitude_to_DB(power, 10.0, 1e-10, 0.0, top_db=80.0)
    return decibels - decibels.max()


def mel_db(wav: Tensor, sample_rate: int = SAMPLE_RATE) -> Tensor:
    """Log-mel picture of `[1, N]` in dB relative to its own maximum, floor -80: `[80, frames]`, hop 256 samples."""
    return decibels_below_peak(mel_power(wav, sample_rate))


def clip_picture(wav: Tensor, colour: str = INPUT, sample_rate: int = SAMPLE_RATE) -> bytes:
    """The outline of `[1, N]` (full height: full scale) above its mel picture, as a PNG as wide as the clip is long:
    no axes, for players whose cursor moves over it."""
    width, height = 480, 60
    levels = ((mel_db(wav, sample_rate).flip(0) + 80) * ((SHADES - 1) / 80)).round().byte()  # [80, frames]
    mel = Image.fromarray(levels.numpy()).resize((width, len(levels)), Image.Resampling.BOX)
    edges = np.linspace(0, wav.shape[-1], width + 1).astype(int)
    samples = wav[0].numpy()
    slices = [samples[a : max(a + 1, b)] for a, b in itertools.pairwise(edges)]
    low, high = np.array([s.min() for s in slices]), np.array([s.max() for s in slices])
    rows = 1 - 2 * (np.arange(height)[:, None] + 0.5) / height  # amplitude of each row, 1 to -1
    reach = 1.01 / height  # half a row, and a little for what lies between two
    outline = (rows <= high + reach) & (rows >= low - reach)
    picture = Image.fromarray(np.concatenate([np.where(outline, SHADES, SHADES + 1), np.asarray(mel)]).astype(np.uint8))
    picture.putpalette(_clip_palette(colour))
    content = io.BytesIO()
    picture.save(content, format="png", transparency=SHADES + 1, optimize=True)
    return content.getvalue()


@functools.cache
def _clip_palette(colour: str) -> bytes:
    """The shades of the mel picture, the colour of the outline, and what is transparent."""
    shades = (plt.get_cmap("magma", SHADES)(np.arange(SHADES))[:, :3] * 255).astype(np.uint8)
    return shades.tobytes() + bytes.fromhex(colour.removeprefix("#")) + b"\xff\xff\xff"


def waveform_and_latents(wav: Tensor, latents: Tensor, title: str, sample_rate: int = SAMPLE_RATE) -> Figure:
    """One clip three ways: waveform `[1, N]`, mel picture, latents `[D, T]`."""
    seconds = wav.shape[-1] / sample_rate
    with plt.rc_context(STYLE):
        figure, (top, middle, bottom) = plt.subplots(3, 1, figsize=(9, 6.5), height_ratios=(1, 1.5, 1.5), sharex=True)
        _draw_waveform(top, wav, sample_rate, INPUT)
        top.set_title(title)
        _draw_mel(figure, middle, wav, sample_rate)
        limit = float(latents.abs().quantile(0.995)) if latents.numel() < 1e7 else float(latents.abs().max())
        extent = (0, seconds, 0, latents.shape[0])
        picture = bottom.imshow(
            latents.numpy(), origin="lower", aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit, extent=extent
        )
        bottom.set(ylabel="latent channel", xlabel="time (s)")
        bottom.grid(False)
        figure.colorbar(picture, ax=bottom, label="latent value")
    return figure


def latent_histogram(latents: Mapping[str, Tensor]) -> Figure:
    """Distribution of latent values by name, on a log scale, beside a normal one of the same RMS."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7, 3.2))
        for (name, values), colour in zip(latents.items(), (INPUT, TARGET), strict=False):
            flat = values.flatten().numpy()
            level = np.sqrt(np.mean(flat**2))
            counts, edges = np.histogram(flat, bins=120, density=True)
            axes.step(edges[:-1], counts, where="post", color=colour, label=f"{name}, RMS {level:.2f}")
        x = np.linspace(edges[0], edges[-1], 400)
        normal = np.exp(-((x / level) ** 2) / 2) / (level * np.sqrt(2 * np.pi))
        axes.plot(x, normal, color=AVERAGE, linestyle="--", label="normal distribution")
        axes.set(yscale="log", ylim=(1e-6, None), xlabel="latent value", ylabel="density")
        axes.legend()
    return figure


def spectra(wavs: Mapping[str, Tensor], band_edge: float | None = None, sample_rate: int = SAMPLE_RATE) -> Figure:
    """Mean power spectra of `[1, N]` clips in dB, with the upper edge of the codec's band."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7, 3.2))
        for (name, wav), colour in zip(wavs.items(), (INPUT, OUTPUT, TARGET), strict=False):
            power = torch.stft(wav[0], 2048, window=torch.hann_window(2048), return_complex=True).abs().square().mean(1)
            frequencies = torch.linspace(0, sample_rate / 2000, len(power))
            axes.plot(frequencies, 10 * torch.log10(power + 1e-10), color=colour, label=name, linewidth=1)
        if band_edge:
            axes.axvline(
                band_edge / 1000, color="black", linestyle=":", label=f"codec's edge, {band_edge / 1000:g} kHz"
            )
        axes.set(xlabel="frequency (kHz)", ylabel="power (dB)")
        axes.legend()
    return figure


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
            middle.plot(*_series(train, f"{key}/wanted_factor"), color=colour, ls="--", label=f"stage {stage} wanted")
            middle.plot(*_series(train, f"{key}/applied_factor"), color=colour, label=f"stage {stage} applied")
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


def taken_pictures(taken: Mapping[str, tuple[Tensor, Tensor]], seconds: float) -> Figure:
    """Which clip what is heard comes from, over time and mel bands `[80, frames]`, by name: powers of what was taken
    from the input and from the target. Blue: all input, orange: all target, grey: both; the paler, the quieter."""
    colours = LinearSegmentedColormap.from_list("taken", (TARGET, "#BBBBBB", INPUT))
    with plt.rc_context(STYLE):
        columns = min(3, len(taken))
        rows = -(-len(taken) // columns)
        figure, axes = plt.subplots(
            rows, columns, figsize=(4.2 * columns, 3.1 * rows), sharex=True, sharey=True, squeeze=False
        )
        for ax in axes.flat[len(taken) :]:
            ax.set_visible(False)
        for ax, (name, (of_input, of_target)) in zip(axes.flat, taken.items(), strict=False):
            share = of_input / (of_input + of_target).clamp_min(1e-20)
            picture = colours(share.numpy())
            picture[..., 3] = (decibels_below_peak(of_input + of_target).numpy() / 60 + 1).clip(0, 1)
            ax.imshow(picture, origin="lower", aspect="auto", extent=(0, seconds, 0, len(share)))
            ax.set(title=name, xlabel="time (s)")
            ax.grid(False)
        for ax in axes[:, 0]:
            ax.set_ylabel("mel band")
        scale = plt.cm.ScalarMappable(plt.Normalize(0, 1), colours)
        bar = figure.colorbar(scale, ax=axes, label="from", ticks=(0, 0.5, 1))
        bar.ax.set_yticklabels(("target", "both", "input"))
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
            factors.plot(*_series(train, f"stage{stage}/wanted_factor"), color=colour, label=f"stage {stage} wanted")
        goals = [row["stage0/wanted_factor"] * row["stage0/mixed_rms"] for row in train if row.get("stage0/mixed_rms")]
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
            stages = [key for key in (rows["train"] or [{}])[0] if key.endswith("/applied_factor")]
            if stages:
                applied, wanted = max(stages), max(stages).replace("applied", "wanted")
                found = [(row["step"], row[applied] / row[wanted]) for row in rows["train"] if row.get(wanted)]
                levels.plot(*zip(*found, strict=True), color=colour, label=name)
        levels.axhspan(0.8, 1.2, **HEALTHY, label="0.8 to 1.2")
        losses.set(xlabel="step", ylabel="validation loss")
        norms.set(xlabel="step", ylabel="gradient norm", yscale="log")
        levels.set(xlabel="step", ylabel="output / wanted RMS, last stage", ylim=(0, None))
        for axes in (losses, norms, levels):
            axes.legend(fontsize=8)
    return figure


def waveforms_and_mels(wavs: Mapping[str, Tensor], sample_rate: int = SAMPLE_RATE) -> Figure:
    """Clips `[1, N]` side by side on one scale: waveform above, mel picture below."""
    colours = dict(zip(wavs, itertools.cycle((INPUT, TARGET, OUTPUT, AVERAGE)), strict=False))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            2, len(wavs), figsize=(3.4 * len(wavs), 4.2), sharex=True, sharey="row", squeeze=False
        )
        for column, (name, wav) in enumerate(wavs.items()):
            _draw_waveform(axes[0, column], wav, sample_rate, colours[name])
            axes[0, column].set_title(name)
            _draw_mel(figure if column == len(wavs) - 1 else None, axes[1, column], wav, sample_rate)
            axes[1, column].set_xlabel("time (s)")
            if column:
                axes[0, column].set_ylabel("")
                axes[1, column].set_ylabel("")
    return figure


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    found = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [step for step, _ in found], [value for _, value in found]


def _draw_waveform(axes: plt.Axes, wav: Tensor, sample_rate: int, colour: str) -> None:
    """Minimum and maximum of each of about 1,000 slices: what an ear would call the outline."""
    samples = wav[0].numpy()
    width = max(1, len(samples) // 1000)
    slices = samples[: len(samples) // width * width].reshape(-1, width)
    time = np.arange(len(slices)) * width / sample_rate
    axes.fill_between(time, slices.min(1), slices.max(1), color=colour, linewidth=0.3)
    axes.set_ylabel("amplitude")


def _draw_mel(figure: Figure | None, axes: plt.Axes, wav: Tensor, sample_rate: int) -> None:
    decibels = mel_db(wav, sample_rate)
    extent = (0, wav.shape[-1] / sample_rate, 0, len(decibels))
    picture = axes.imshow(
        decibels.numpy(), origin="lower", aspect="auto", cmap="magma", vmin=-80, vmax=0, extent=extent
    )
    axes.set_ylabel("mel band")
    axes.grid(False)
    if figure is not None:
        figure.colorbar(picture, ax=axes, label="dB below the clip's peak")
