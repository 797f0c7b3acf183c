"""The figures. Every function returns a matplotlib figure with labelled axes and units; none computes a result.

Colours are Okabe and Ito's, which colour-blind readers tell apart and which print well. Legend: N samples, D latent
channels, T frames.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import torchaudio
from matplotlib.figure import Figure
from torch import Tensor

from lib.audio import SAMPLE_RATE

logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # it names every font that it did not need

INPUT, TARGET, OUTPUT, AVERAGE = "#0072B2", "#E69F00", "#009E73", "#777777"
STAGES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")
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


def mel_db(wav: Tensor, sample_rate: int = SAMPLE_RATE) -> Tensor:
    """Log-mel picture of `[1, N]` in dB relative to its own maximum, floor -80: `[80, frames]`, hop 256 samples."""
    n_fft = 1024
    if wav.shape[-1] < n_fft:
        wav = torch.nn.functional.pad(wav, (0, n_fft - wav.shape[-1]))
    mel = torchaudio.transforms.MelSpectrogram(sample_rate, n_fft=n_fft, hop_length=256, n_mels=80)
    decibels = torchaudio.functional.amplitude_to_DB(mel(wav)[0], 10.0, 1e-10, 0.0, top_db=80.0)
    return decibels - decibels.max()


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


def training_dashboard(
    train: Sequence[Mapping[str, Any]], val: Sequence[Mapping[str, Any]], num_stages: int, title: str
) -> Figure:
    """A training at a glance: loss, gradient norm, RMS and factor of every stage, over steps."""
    with plt.rc_context(STYLE):
        figure, ((top, norms), (levels, factors)) = plt.subplots(2, 2, figsize=(11, 6), sharex=True)
        figure.suptitle(title)
        top.plot(*_series(train, "loss"), color=AVERAGE, linewidth=0.8, label="training, each step")
        top.plot(*_series(val, "loss"), color=OUTPUT, marker="o", label="validation")
        norms.plot(*_series(train, "grad_norm"), color=INPUT, linewidth=1, label="before clipping")
        for stage in range(num_stages):
            colour = STAGES[stage % len(STAGES)]
            levels.plot(*_series(train, f"stage{stage}/output_rms"), color=colour, label=f"stage {stage} output")
            factors.plot(*_series(train, f"stage{stage}/wanted_factor"), color=colour, label=f"stage {stage} wanted")
        top.set(ylabel="loss")
        norms.set(ylabel="gradient norm", yscale="log")
        levels.set(ylabel="RMS (latent units)", xlabel="step", ylim=(0, None))
        factors.set(ylabel="RMS factor", xlabel="step")
        for axes in (top, norms, levels, factors):
            axes.legend(fontsize=8)
    return figure


def waveforms_and_mels(wavs: Mapping[str, Tensor], sample_rate: int = SAMPLE_RATE) -> Figure:
    """Clips `[1, N]` side by side on one scale: waveform above, mel picture below."""
    colours = dict(zip(wavs, (INPUT, TARGET, OUTPUT, AVERAGE), strict=False))
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
