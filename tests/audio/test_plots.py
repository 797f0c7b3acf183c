"""Figures: labelled axes, the data that was given, and no trace in matplotlib's global state."""

import io

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torchaudio
from matplotlib.colors import to_rgb
from PIL import Image
from training.test_plots import assert_labelled, curve

from lib.audio import plots

RATE = 24_000


def sine(frequency: float, seconds: float = 0.5, amplitude: float = 0.5) -> torch.Tensor:
    """`[1, N]`."""
    return amplitude * torch.sin(2 * torch.pi * frequency * torch.arange(round(seconds * RATE)) / RATE)[None]


torch.manual_seed(0)
LATENTS = 5 * torch.randn(128, 40)
POWER = torch.rand(80, 40)
FIGURES = {
    "waveform_and_latents": lambda: plots.waveform_and_latents(sine(440), LATENTS, "a song"),
    "spectra": lambda: plots.spectra({"original": sine(440), "decoded": sine(880)}, 4800.0),
    "mixing_maps": lambda: plots.mixing_maps({str(i): (POWER, POWER.flip(1)) for i in range(5)}, 0.5),
    "waveforms_and_mels": lambda: plots.waveforms_and_mels({"input": sine(440), "output": sine(880)}),
}


def decoded(png: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The drawn pixels of the waveform `[60, 480]`, and the colours of the mel spectrogram `[80, 480, 4]`."""
    picture = np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))
    assert picture.shape == (140, 480, 4)
    return picture[:60, :, 3] > 0, picture[60:]


def test_every_figure_of_the_module_is_tested():
    public = {
        name for name, f in vars(plots).items() if getattr(f, "__module__", "") == "lib.audio.plots" and name[0] != "_"
    }
    helpers = {
        "mel_power",
        "decibels_below_peak",
        "clip_image",
        "draw_image",
        "label_bands",
        "mel_axes",
        "darken",
    }
    assert public - helpers == set(FIGURES)


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_labelled_and_leaves_the_global_state_alone(name):
    assert_labelled(FIGURES[name])


def decibels(wav):
    return plots.decibels_below_peak(plots.mel_power(wav))


def test_the_mel_spectrogram_is_relative_to_its_maximum_with_a_floor():
    picture = decibels(sine(1000) + sine(5000, amplitude=0.05))
    assert picture.shape == (80, round(0.5 * RATE) // 256 + 1)
    assert picture.max() == 0
    assert picture.min() == pytest.approx(-80, abs=1e-4)
    assert torch.allclose(picture, decibels(0.1 * (sine(1000) + sine(5000, amplitude=0.05))), atol=1e-2)


@pytest.mark.parametrize("frequency", [500.0, 1000.0, 5000.0])
def test_the_mel_spectrogram_of_a_sine_peaks_in_its_band(frequency):
    peak = int(decibels(sine(frequency)).mean(1).argmax())
    # the filter that answers loudest to this frequency, by torchaudio's own triangles
    filters = torchaudio.functional.melscale_fbanks(513, 0.0, RATE / 2, 80, RATE)  # [bins, bands]
    assert abs(peak - int(filters[round(frequency / (RATE / 1024))].argmax())) <= 1


def test_the_mel_spectrogram_pads_a_clip_shorter_than_its_window():
    assert decibels(sine(1000, seconds=0.02)).isfinite().all()


def test_spectra_peak_at_the_clips_frequency():
    assert len(plots.spectra({"a": sine(3000)}, None).axes[0].lines) == 1  # EnCodec's band has no edge
    (axes,) = plots.spectra({"a": sine(3000)}, 4800.0).axes
    x, y = curve(axes, "a")
    assert x[int(np.argmax(y))] == pytest.approx(3.0, abs=0.02)  # kHz
    assert x[-1] == pytest.approx(12.0)
    assert curve(axes, "edge of the codec's band, 4.8 kHz")[0] == [4.8, 4.8]
    (axes,) = plots.spectra({"a": sine(3000)}, None).axes
    assert len(axes.lines) == 1


def test_waveform_outline_reaches_the_extremes():
    wav = sine(440)
    wav[0, 6000] = 0.9  # one click
    top = plots.waveform_and_latents(wav, LATENTS, "a song").axes[0]
    (outline,) = top.collections
    vertices = outline.get_paths()[0].vertices
    assert vertices[:, 1].max() == pytest.approx(0.9)
    assert vertices[:, 1].min() == pytest.approx(-0.5, abs=1e-3)
    assert vertices[:, 0].max() == pytest.approx(0.5, abs=0.01)  # seconds
    assert top.get_title() == "a song"


def test_latents_are_drawn_bottom_up_over_the_clips_seconds():
    picture = plots.waveform_and_latents(sine(440), LATENTS, "a song").axes[2].images[0]
    assert np.array_equal(picture.get_array(), LATENTS.numpy())
    assert picture.origin == "lower"
    assert picture.get_extent() == [0, 0.5, 0, 128]
    assert -picture.norm.vmin == picture.norm.vmax > 0  # zero is the middle of the colours


@pytest.mark.parametrize("count", [1, 4, 7])
def test_waveforms_and_mels_share_a_scale(count):
    wavs = {f"clip {i}": sine(440, amplitude=0.2 * (i + 1)) for i in range(count)}
    figure = plots.waveforms_and_mels(wavs)
    tops = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in tops] == list(wavs)
    assert len({axes.get_ylim() for axes in tops}) == 1
    wanted = [plots.INPUT, plots.TARGET, plots.OUTPUT, plots.AVERAGE, plots.AVERAGE] * 2
    found = [tuple(axes.collections[0].get_facecolor()[0][:3]) for axes in tops]
    assert found == [to_rgb(colour) for colour in wanted[:count]]


def test_a_dark_figure_turns_black_and_white_over_and_keeps_colours():
    figure, axes = plt.subplots()
    (line,) = axes.plot([1, 2], color="black", marker="o", label="a line")
    (coloured,) = axes.plot([2, 1], color=plots.INPUT, marker="s")
    (grey,) = axes.plot([2, 2], color="#777777")
    band = axes.fill_between([0, 1], [1, 1], color="black", alpha=0.25)
    image = axes.imshow(torch.rand(2, 2))
    axes.set_title("a title")
    axes.legend()
    figure.canvas.draw()
    before = image.get_array().copy()
    plots.darken(figure)
    white, dark = pytest.approx((1, 1, 1), abs=0.01), pytest.approx((0.07,) * 3, abs=0.01)
    ticks = [axis.get_ticklabels()[0] for axis in (axes.xaxis, axes.yaxis)]
    for text in (axes.title, *ticks, axes.get_legend().get_texts()[0]):
        assert to_rgb(text.get_color()) == white
    for colour in (line.get_color(), line.get_markerfacecolor(), axes.spines["left"].get_edgecolor()):
        assert to_rgb(colour) == white
    for background in (figure.get_facecolor(), axes.get_facecolor()):
        assert to_rgb(background) == dark
    assert tuple(band.get_facecolor()[0]) == pytest.approx((1, 1, 1, 0.25), abs=0.01)
    assert to_rgb(coloured.get_color()) == to_rgb(coloured.get_markerfacecolor()) == to_rgb(plots.INPUT)
    assert 0.5 < to_rgb(grey.get_color())[0] < 0.6
    assert np.array_equal(image.get_array(), before)


# --- images of clips --------------------------------------------------------------------------------------------------


def test_mel_power_is_a_power_and_decibels_are_below_its_peak():
    wav = sine(1000) + sine(5000, amplitude=0.05)
    power = plots.mel_power(wav)
    assert power.shape == (80, round(0.5 * RATE) // 256 + 1)
    torch.testing.assert_close(plots.mel_power(2 * wav), 4 * power)
    found = plots.decibels_below_peak(torch.tensor([[1e4, 1e3, 1.0], [1e-5, 0.0, 5e3]]))
    torch.testing.assert_close(found, torch.tensor([[0.0, -10.0, -40.0], [-80.0, -80.0, -3.0103]]))


@pytest.mark.parametrize("level", [0.0, 1e-12])
def test_silence_is_not_bright(level):
    assert (plots.decibels_below_peak(torch.full((80, 4), level)) == -80).all()


@pytest.mark.parametrize("level", [0.51, -0.27, 0.98, -0.98])
def test_the_outline_is_at_the_height_of_the_waveform(level):
    """Sixty rows from full scale at the top to full scale at the bottom."""
    outline, _ = decoded(plots.clip_image(torch.full((1, 4800), level)))
    row = int((1 - level) / 2 * 60)
    drawn = np.flatnonzero(outline[:, 0])
    assert row in drawn
    assert drawn.min() >= row - 1
    assert drawn.max() <= row + 1
    assert (outline == outline[:, :1]).all()


def test_the_outline_spans_minimum_to_maximum_of_each_column():
    wav = torch.zeros(1, 48_000)  # 100 samples a column
    wav[0, 12_000:24_000:2] = 0.75
    wav[0, 12_001:24_000:2] = -0.25
    wav[0, 36_050] = 3.0  # beyond full scale
    outline, _ = decoded(plots.clip_image(wav))
    heights = outline.sum(0)
    assert heights[0] == heights[479] == 2  # silence is a line in the middle
    assert outline[29:31, 0].all()
    block = np.flatnonzero(outline[:, 180])
    assert (block.min(), block.max()) == pytest.approx((7.5, 37.5), abs=1)  # (1 ∓ level) · 30
    assert len(block) == block.max() - block.min() + 1
    assert (heights[120:240] == len(block)).all()
    assert np.flatnonzero(heights > 2).tolist() == [*range(120, 240), 360]
    assert outline[:30, 360].all()


def test_a_clips_image_has_its_colour_on_a_transparent_background():
    content = plots.clip_image(sine(440), plots.TARGET)
    picture = Image.open(io.BytesIO(content))
    assert picture.format == "PNG"
    assert len(picture.getpalette()) == 3 * 50  # few, for a small file
    pixels = np.asarray(picture.convert("RGBA"))
    outline = pixels[:60].reshape(-1, 4)
    colour = (*bytes.fromhex(plots.TARGET[1:]), 255)
    assert {tuple(pixel) for pixel in outline[outline[:, 3] > 0]} == {colour}
    assert set(np.unique(outline[:, 3])) == {0, 255}
    assert (pixels[60:, :, 3] == 255).all()


def test_a_clips_mel_spectrogram_is_bright_where_it_sounds():
    """Low bands at the bottom, and time from left to right."""
    wav = torch.cat([torch.zeros(1, RATE), sine(200, 1.0)], 1)
    _, mel = decoded(plots.clip_image(wav))
    brightness = mel[..., :3].sum(2)
    assert brightness[:, 300:].mean(1).argmax() >= 70
    assert (brightness[:, :200] == brightness.min()).all()
    _, high = decoded(plots.clip_image(sine(9000, 1.0)))
    assert high[..., :3].sum(2).mean(1).argmax() <= 20
    magma = (np.array(plt.get_cmap("magma", plots.SHADES)([0, plots.SHADES - 1])) * 255).astype(np.uint8)
    assert (mel[0, 0] == magma[0]).all()
    assert (high.reshape(-1, 4) == magma[1]).all(1).any()


@pytest.mark.parametrize("num_samples", [1, 4, 479, 481])
def test_a_clip_of_few_samples_has_an_image_too(num_samples):
    outline, _ = decoded(plots.clip_image(torch.linspace(0.9, -0.9, num_samples)[None]))
    assert outline.any(0).all()
    assert outline[3, 0]
    assert num_samples == 1 or outline[56, 479]


def test_a_column_of_one_sample_shows_that_one():
    wav = torch.tensor([0.8, -0.8]).repeat(240)[None]
    outline, _ = decoded(plots.clip_image(wav))
    assert not outline[30:, ::2].any()
    assert not outline[:30, 1::2].any()
    assert outline.any(0).all()


def test_a_silent_clips_image_is_dark():
    outline, mel = decoded(plots.clip_image(torch.zeros(1, 4800)))
    assert (outline.sum(0) == 2).all()
    assert (mel[..., :3].sum(2) < 20).all()


# --- what is taken from which clip ------------------------------------------------------------------------------------


def test_mixing_maps_distinguish_input_and_target_and_fade_with_level():
    of_input, of_target = torch.zeros(2, 80, 8)
    of_input[:, 0], of_target[:, 1] = 1.0, 1.0
    of_input[:, 2], of_target[:, 2] = 0.5, 0.5
    of_input[:, 3], of_input[:, 4], of_target[:, 5] = 1e-3, 1e-6, 1e-8  # 30, 60 and 80 dB below; then silence
    axes, bar = plots.mixing_maps({"a": (of_input, of_target)}, 2.5).axes
    picture = np.asarray(axes.images[0].get_array())
    assert picture.shape == (80, 8, 4)
    assert picture[40, 0] == pytest.approx((*to_rgb(plots.INPUT), 1), abs=0.01)
    assert picture[40, 1] == pytest.approx((*to_rgb(plots.TARGET), 1), abs=0.01)
    assert picture[40, 2] == pytest.approx((*to_rgb("#BBBBBB"), 1), abs=0.01)
    assert picture[40, :, 3] == pytest.approx([1, 1, 1, 0.5, 0, 0, 0, 0], abs=1e-4)
    assert picture[40, 3, :3] == pytest.approx(to_rgb(plots.INPUT), abs=0.01)  # the colour says whose, at any level
    assert axes.images[0].origin == "lower"
    assert axes.images[0].get_extent() == [0, 2.5, 0, 80]
    assert [text.get_text() for text in bar.get_yticklabels()] == ["target", "both", "input"]


@pytest.mark.parametrize(("count", "shape"), [(1, (1, 1)), (3, (1, 3)), (4, (2, 3))])
def test_mixing_maps_are_three_in_a_row_and_the_rest_is_empty(count, shape):
    figure = plots.mixing_maps({f"clip {i}": (POWER, POWER) for i in range(count)}, 1.0)
    pictures = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    assert figure.axes[0].get_gridspec().get_geometry() == shape
    assert [axes.get_title() for axes in pictures if axes.get_visible()] == [f"clip {i}" for i in range(count)]


def test_a_fusion_of_silence_is_empty():
    silence = torch.zeros(80, 8)
    picture = plots.mixing_maps({"a": (silence, silence)}, 1.0).axes[0].images[0].get_array()
    assert (picture[..., 3] == 0).all()


@pytest.mark.parametrize("frequency", [300.0, 1000.0, 3000.0])
def test_a_mel_spectrograms_axis_names_the_frequency_of_a_sine(frequency):
    _, bottom = plots.waveforms_and_mels({"sine": sine(frequency)}).axes[:2]
    ticks = {label.get_text(): at for at, label in zip(bottom.get_yticks(), bottom.get_yticklabels(), strict=True)}
    peak = int(decibels(sine(frequency)).mean(1).argmax()) + 0.5
    assert ticks[f"{frequency:,.0f}"] == pytest.approx(peak, abs=1)
    assert bottom.get_ylabel() == "frequency (Hz)"


@pytest.mark.parametrize(
    "drawn",
    [
        lambda wav: plots.waveform_and_latents(wav, LATENTS, "a song"),
        lambda wav: plots.spectra({"original": wav}, None),
        lambda wav: plots.waveforms_and_mels({"input": wav}),
    ],
)
def test_of_a_stereo_clip_the_mean_of_its_channels_is_drawn(drawn):
    def png(wav: torch.Tensor) -> bytes:
        content = io.BytesIO()
        figure = drawn(wav)
        figure.savefig(content)
        plt.close(figure)
        return content.getvalue()

    wav = torch.cat([sine(440), sine(3000, amplitude=0.1)])
    assert png(wav) == png(wav.mean(0, keepdim=True))
    assert png(wav) != png(wav[:1])


def test_the_mel_power_of_a_stereo_clip_is_that_of_the_mean():
    wav = torch.cat([sine(440), sine(3000)])
    assert torch.equal(plots.mel_power(wav), plots.mel_power(wav.mean(0, keepdim=True)))
    assert not torch.allclose(plots.mel_power(wav), plots.mel_power(wav[:1]))
