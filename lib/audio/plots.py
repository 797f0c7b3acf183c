"""Figures of sound, in Okabe and Ito's colours, which colour-blind readers can distinguish; none computes a result.
Legend: N samples, D latent channels, T frames."""

import io
import itertools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import torchaudio
from matplotlib import rc_params_from_file
from matplotlib.collections import Collection
from matplotlib.colors import LinearSegmentedColormap, to_rgba_array
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text
from PIL import Image
from torch import Tensor

from lib.audio.files import SAMPLE_RATE

logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # it lists every font not used

INPUT, TARGET, OUTPUT, AVERAGE = "#0072B2", "#E69F00", "#009E73", "#777777"
STAGES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")
DECIBELS = "dB below the clip's peak"
WIDTH = 9.0  # inches: that of a page, which shows the text of a wider figure smaller than it is drawn
SHADES = 48  # of a small mel spectrogram: steps of 1.7 dB
STYLE = dict(rc_params_from_file(Path(__file__).with_suffix(".mplstyle"), use_default_template=False))


def mel_power(wav: Tensor, sample_rate: int = SAMPLE_RATE) -> Tensor:
    """Mel power spectrogram of `[C, N]`, of the channels' mean: `[80, frames]`, hop 256 samples."""
    wav = torch.nn.functional.pad(wav.mean(0, keepdim=True), (0, max(0, 1024 - wav.shape[-1])))
    return torchaudio.transforms.MelSpectrogram(sample_rate, n_fft=1024, hop_length=256, n_mels=80)(wav)[0]


def decibels_below_peak(power: Tensor) -> Tensor:
    """Powers in dB relative to their maximum, floor -80; silence is all floor."""
    if power.max() <= 1e-10:
        return torch.full_like(power, -80.0)
    decibels = torchaudio.functional.amplitude_to_DB(power, 10.0, 1e-10, 0.0, top_db=80.0)
    return decibels - decibels.max()


def clip_image(wav: Tensor, colour: str = INPUT, sample_rate: int = SAMPLE_RATE) -> bytes:
    """The waveform of `[C, N]`, at full scale, above its mel spectrogram, as a PNG without axes for a player."""
    width, height = 480, 60
    decibels = decibels_below_peak(mel_power(wav, sample_rate))  # [80, frames]
    levels = ((decibels.flip(0) + 80) * ((SHADES - 1) / 80)).round().byte()
    mel = Image.fromarray(levels.numpy()).resize((width, len(levels)), Image.Resampling.BOX)
    edges, mono = np.linspace(0, wav.shape[-1], width + 1).astype(int), wav.mean(0).numpy()
    slices = [mono[a : max(a + 1, b)] for a, b in itertools.pairwise(edges)]
    low, high = np.array([s.min() for s in slices]), np.array([s.max() for s in slices])
    rows = 1 - 2 * (np.arange(height)[:, None] + 0.5) / height  # amplitude of each row, 1 to -1
    reach = 1.01 / height  # half a row, and a little more
    outline = (rows <= high + reach) & (rows >= low - reach)
    picture = Image.fromarray(np.concatenate([np.where(outline, SHADES, SHADES + 1), np.asarray(mel)]).astype(np.uint8))
    # the shades of the mel spectrogram, the colour of the waveform, and the transparent background
    shades = (plt.get_cmap("magma", SHADES)(np.arange(SHADES))[:, :3] * 255).astype(np.uint8)
    picture.putpalette(shades.tobytes() + bytes.fromhex(colour.removeprefix("#")) + b"\xff\xff\xff")
    content = io.BytesIO()
    picture.save(content, format="png", transparency=SHADES + 1, optimize=True)
    return content.getvalue()


@plt.rc_context(STYLE)
def waveform_and_latents(wav: Tensor, latents: Tensor, title: str) -> Figure:
    """A clip as waveform `[C, N]`, mel spectrogram and latents `[D, T]`."""
    figure, (top, middle, bottom) = plt.subplots(3, 1, figsize=(9, 6.5), height_ratios=(1, 1.5, 1.5), sharex=True)
    figure.colorbar(_draw_clip(top, middle, wav, INPUT, title), ax=middle, label=DECIBELS)
    limit = latents.abs().quantile(0.995).item()
    picture = draw_image(bottom, latents.numpy(), wav.shape[-1] / SAMPLE_RATE, cmap="RdBu_r", vmin=-limit, vmax=limit)
    bottom.set(ylabel="latent channel", xlabel="time (s)")
    figure.colorbar(picture, ax=bottom, label="latent value")
    return figure


@plt.rc_context(STYLE)
def spectra(wavs: Mapping[str, Tensor], band_edge: float | None) -> Figure:
    """Mean power spectra of `[C, N]` clips at 24 kHz in dB, and the upper edge of the codec's band (Hz), if any."""
    figure, axes = plt.subplots(figsize=(7, 3.2))
    for (name, wav), colour in zip(wavs.items(), (INPUT, OUTPUT, TARGET), strict=False):
        power = (
            torch.stft(wav.mean(0), 2048, window=torch.hann_window(2048), return_complex=True).abs().square().mean(1)
        )
        frequencies = torch.linspace(0, SAMPLE_RATE / 2000, len(power))
        axes.plot(frequencies, 10 * torch.log10(power + 1e-10), color=colour, label=name, linewidth=1)
    if band_edge:
        label = f"edge of the codec's band, {band_edge / 1000:g} kHz"
        axes.axvline(band_edge / 1000, color="black", linestyle=":", label=label)
    axes.set(xlabel="frequency (kHz)", ylabel="power (dB)")
    axes.legend()
    return figure


@plt.rc_context(STYLE)
def mixing_maps(taken: Mapping[str, tuple[Tensor, Tensor]], seconds: float) -> Figure:
    """Mel powers `[80, frames]` taken from input and target, by name. Blue: input, orange: target, grey: both."""
    colours = LinearSegmentedColormap.from_list("taken", (TARGET, "#BBBBBB", INPUT))
    figure, axes = mel_axes(list(taken))
    for ax, (of_input, of_target) in zip(axes, taken.values(), strict=True):
        picture = colours((of_input / (of_input + of_target).clamp_min(1e-20)).numpy())
        picture[..., 3] = (decibels_below_peak(of_input + of_target).numpy() / 60 + 1).clip(0, 1)
        draw_image(ax, picture, seconds)
        label_bands(ax)
        ax.label_outer()
    bar = figure.colorbar(plt.cm.ScalarMappable(cmap=colours), ax=axes, label="from", ticks=(0, 0.5, 1))
    bar.ax.set_yticklabels(("target", "both", "input"))
    return figure


@plt.rc_context(STYLE)
def waveforms_and_mels(wavs: Mapping[str, Tensor]) -> Figure:
    """Clips `[C, N]` below each other on one time axis and the same scale: the waveform, and its mel spectrogram."""
    size = (WIDTH, 0.6 + 1.5 * len(wavs))
    figure, axes = plt.subplots(len(wavs), 2, figsize=size, sharex=True, sharey="col", squeeze=False)
    colours = itertools.cycle((INPUT, TARGET, OUTPUT, AVERAGE, AVERAGE))
    for (name, wav), (left, right), colour in zip(wavs.items(), axes, colours, strict=False):
        picture = _draw_clip(left, right, wav, colour, name)
    for ax in axes[-1]:
        ax.set_xlabel("time (s)")
    figure.colorbar(picture, ax=axes[:, 1], label=DECIBELS)
    return figure


def darken(figure: Figure) -> None:
    """Turn a figure into its version for a dark page, in place: black becomes white, white nearly black and greys what
    is between; colours and pictures stay."""
    for artist in set(figure.findobj(lambda part: isinstance(part, (Line2D, Text, Patch, Collection)))):
        for name in ("markerfacecolor", "markeredgecolor", "color", "facecolor", "edgecolor"):  # markers follow lines
            if hasattr(artist, f"get_{name}") and len(rgba := to_rgba_array(getattr(artist, f"get_{name}")())):
                grey = np.ptp(rgba[:, :3], axis=1) < 0.02
                rgba[grey, :3] = 1 - 0.93 * rgba[grey, :3]
                getattr(artist, f"set_{name}")(rgba if isinstance(artist, Collection) else rgba[0])


def mel_axes(titles: Sequence[str]) -> tuple[Figure, list[plt.Axes]]:
    """Axes for mel spectrograms of one length, three in a row."""
    columns = min(3, len(titles))
    rows = -(-len(titles) // columns)
    size = (WIDTH * columns / 3, 2.6 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False)
    for ax, title in itertools.zip_longest(axes.flat, titles):
        ax.set(title=title, xlabel="time (s)", ylabel="frequency (Hz)", visible=title is not None)
        ax.label_outer()
    return figure, list(axes.flat[: len(titles)])


def label_bands(axes: plt.Axes) -> None:
    """Frequencies beside the bands of `mel_power`."""
    hertz = np.array((300, 1000, 3000, 10_000))
    axes.set_yticks(81 * np.log1p(hertz / 700) / np.log1p(SAMPLE_RATE / 1400) - 0.5, [f"{f:,}" for f in hertz])
    axes.set_ylabel("frequency (Hz)")


def _draw_clip(top: plt.Axes, bottom: plt.Axes, wav: Tensor, colour: str, title: str) -> AxesImage:
    """Minimum and maximum of each of about 1,000 slices of the waveform, and below them its mel spectrogram."""
    width = max(1, wav.shape[-1] // 1000)
    slices = wav.mean(0)[: wav.shape[-1] // width * width].numpy().reshape(-1, width)
    time = np.arange(len(slices)) * width / SAMPLE_RATE
    top.fill_between(time, slices.min(1), slices.max(1), color=colour, linewidth=0.3)
    top.set(title=title, ylabel="amplitude")
    label_bands(bottom)
    decibels = decibels_below_peak(mel_power(wav)).numpy()
    return draw_image(bottom, decibels, wav.shape[-1] / SAMPLE_RATE, cmap="magma", vmin=-80, vmax=0)


def draw_image(axes: plt.Axes, values: np.ndarray, seconds: float, **options: Any) -> AxesImage:
    """`[rows, frames]`, bottom up, over the seconds of a clip."""
    axes.grid(False)
    return axes.imshow(values, origin="lower", aspect="auto", extent=(0, seconds, 0, len(values)), **options)
