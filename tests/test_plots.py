"""Figures: labelled axes, the data that was given, and no trace in matplotlib's global state."""

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torchaudio

from lib import plots

RATE = 24_000


def sine(frequency: float, seconds: float = 0.5, amplitude: float = 0.5) -> torch.Tensor:
    """`[1, N]`."""
    return amplitude * torch.sin(2 * torch.pi * frequency * torch.arange(round(seconds * RATE)) / RATE)[None]


def training_rows(num_stages: int = 2) -> list[dict]:
    """Metrics of three steps; every curve of every stage has values of its own."""
    names = ("output_rms", "projection_rms", "wanted_factor", "applied_factor", "clamped")
    rows = []
    for step in (1, 2, 5):
        row = {"step": step, "loss": 10.0 / step, "grad_norm": 2.0 * step, "masks/complementarity": 0.7 + 0.01 * step}
        row |= {"discriminator/real": 0.1 * step, "discriminator/made": -0.2 * step}
        for stage in range(num_stages):
            row |= {f"stage{stage}/{name}": 0.1 * i + 0.01 * step + 0.002 * stage for i, name in enumerate(names)}
        rows.append(row)
    return rows


def val_rows() -> list[dict]:
    return [{"step": s, "loss": loss, "masks/complementarity": 0.9} for s, loss in ((2, 7.0), (5, 6.0))]


torch.manual_seed(0)
LATENTS = 5 * torch.randn(128, 40)
FIGURES = {
    "waveform_and_latents": lambda: plots.waveform_and_latents(sine(440), LATENTS, "a song"),
    "latent_histogram": lambda: plots.latent_histogram({"input": LATENTS, "target": 2 * LATENTS}),
    "spectra": lambda: plots.spectra({"original": sine(440), "decoded": sine(880)}, 4800.0),
    "loss_curve": lambda: plots.loss_curve(training_rows(), val_rows()),
    "gradient_curve": lambda: plots.gradient_curve(training_rows(), 10.0),
    "stage_curves": lambda: plots.stage_curves(training_rows(), 2, (0.7, 1.5)),
    "discriminator_curve": lambda: plots.discriminator_curve(training_rows()),
    "complementarity_curve": lambda: plots.complementarity_curve(training_rows(), val_rows()),
    "mask_pictures": lambda: plots.mask_pictures(torch.rand(128, 40), torch.rand(128, 40), 75.0),
    "training_dashboard": lambda: plots.training_dashboard(training_rows(), val_rows(), 2, "step 5 of 9"),
    "waveforms_and_mels": lambda: plots.waveforms_and_mels({"input": sine(440), "output": sine(880)}),
}


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def curve(axes, label: str) -> tuple[list, list]:
    """x and y of the line with that label."""
    line = next(line for line in axes.get_lines() if line.get_label() == label)
    return list(line.get_xdata()), list(line.get_ydata())


def test_every_figure_of_the_module_is_tested():
    public = {name for name, f in vars(plots).items() if getattr(f, "__module__", "") == "lib.plots" and name[0] != "_"}
    assert public - {"mel_db"} == set(FIGURES)


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_labelled_and_leaves_the_global_state_alone(name):
    mine = plt.figure()
    before = dict(plt.rcParams)
    figure = FIGURES[name]()
    assert isinstance(figure, plt.Figure)
    assert dict(plt.rcParams) == before
    assert {mine.number, figure.number} <= set(plt.get_fignums())  # closing is the caller's business
    for axes in figure.axes:
        subplot = axes.get_subplotspec()
        if subplot is None or subplot.is_first_col():  # the others share the label to their left
            assert axes.get_ylabel(), axes
        if subplot is not None and subplot.is_last_row() and axes.get_label() != "<colorbar>":
            assert axes.get_xlabel(), axes
    figure.canvas.draw()


def test_mel_db_is_relative_to_its_maximum_with_a_floor():
    picture = plots.mel_db(sine(1000) + sine(5000, amplitude=0.05))
    assert picture.shape == (80, round(0.5 * RATE) // 256 + 1)
    assert picture.max() == 0
    assert picture.min() == pytest.approx(-80, abs=1e-4)
    assert torch.allclose(picture, plots.mel_db(0.1 * (sine(1000) + sine(5000, amplitude=0.05))), atol=1e-2)


@pytest.mark.parametrize("frequency", [500.0, 1000.0, 5000.0])
def test_mel_db_of_a_sine_peaks_in_its_band(frequency):
    peak = int(plots.mel_db(sine(frequency)).mean(1).argmax())
    # the filter that answers loudest to this frequency, by torchaudio's own triangles
    filters = torchaudio.functional.melscale_fbanks(513, 0.0, RATE / 2, 80, RATE)  # [bins, bands]
    assert abs(peak - int(filters[round(frequency / (RATE / 1024))].argmax())) <= 1


def test_mel_db_pads_a_clip_shorter_than_its_window():
    assert plots.mel_db(sine(1000, seconds=0.02)).isfinite().all()


def test_stage_curves_plots_the_rows_given():
    rows = training_rows()
    left, middle, right = plots.stage_curves(rows, 2, (0.7, 1.5)).axes
    for axes, label, key in (
        (left, "stage 1 output", "stage1/output_rms"),
        (left, "stage 1 projection", "stage1/projection_rms"),
        (middle, "stage 0 wanted", "stage0/wanted_factor"),
        (middle, "stage 1 applied", "stage1/applied_factor"),
        (right, "stage 0", "stage0/clamped"),
    ):
        assert curve(axes, label) == ([1, 2, 5], [row[key] for row in rows]), label
    assert curve(middle, "warning at 1.3")[1] == [1.3, 1.3]
    (span,) = middle.patches
    assert span.get_extents().transformed(middle.transData.inverted()).intervaly.tolist() == pytest.approx([0.7, 1.5])


def test_stage_curves_without_a_clamp_shows_no_range_and_takes_more_stages_than_colours():
    _, middle, right = plots.stage_curves(training_rows(7), 7, None).axes
    assert not middle.patches
    assert len(right.get_lines()) == 7


def test_loss_curve_plots_both_and_leaves_out_what_was_not_finite():
    rows = training_rows()
    rows[1]["loss"] = None  # how metrics.jsonl writes NaN
    (axes,) = plots.loss_curve(rows, val_rows()).axes
    assert curve(axes, "training, each batch") == ([1, 5], [10.0, 2.0])
    assert curve(axes, "validation") == ([2, 5], [7.0, 6.0])


@pytest.mark.parametrize(("clip", "lines"), [(10.0, 2), (None, 1)])
def test_gradient_curve_marks_the_clip(clip, lines):
    (axes,) = plots.gradient_curve(training_rows(), clip).axes
    assert curve(axes, "gradient norm before clipping") == ([1, 2, 5], [2.0, 4.0, 10.0])
    assert len(axes.get_lines()) == lines
    assert axes.get_yscale() == "log"


def test_spectra_peak_at_the_clips_frequency():
    (axes,) = plots.spectra({"a": sine(3000)}, 4800.0).axes
    x, y = curve(axes, "a")
    assert x[int(np.argmax(y))] == pytest.approx(3.0, abs=0.02)  # kHz
    assert x[-1] == pytest.approx(12.0)
    assert curve(axes, "codec's edge, 4.8 kHz")[0] == [4.8, 4.8]


def test_latent_histogram_says_the_rms_and_draws_a_normal_one_beside_it():
    torch.manual_seed(0)
    values = torch.randn(20_000)
    values = 3 + 4 * (values - values.mean()) / values.std()  # RMS 5, standard deviation 4
    (axes,) = plots.latent_histogram({"input": values}).axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels[0].startswith("input, RMS 5.00")
    x, y = curve(axes, "normal distribution")
    assert max(y) == pytest.approx(1 / (5 * np.sqrt(2 * np.pi)), rel=0.05)
    assert abs(x[int(np.argmax(y))]) < 0.2


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


@pytest.mark.parametrize("count", [1, 4])
def test_waveforms_and_mels_puts_clips_on_one_scale(count):
    wavs = {f"clip {i}": sine(440, amplitude=0.2 * (i + 1)) for i in range(count)}
    figure = plots.waveforms_and_mels(wavs)
    tops = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in tops] == list(wavs)
    assert len({axes.get_ylim() for axes in tops}) == 1


def test_the_discriminator_curve_shows_both_logits():
    (axes,) = plots.discriminator_curve(training_rows()).axes
    assert curve(axes, "the clips' own latents") == ([1, 2, 5], [0.1, 0.2, 0.5])
    assert curve(axes, "fusions") == ([1, 2, 5], [-0.2, -0.4, -1.0])


def test_complementarity_stands_above_its_baseline():
    (axes,) = plots.complementarity_curve(training_rows(), val_rows()).axes
    assert curve(axes, "training, each step")[1] == pytest.approx([0.71, 0.72, 0.75])
    assert curve(axes, "validation") == ([2, 5], [0.9, 0.9])
    assert set(curve(axes, "constant masks of 0.5")[1]) == {0.75}


def test_mask_pictures_share_one_scale_from_0_to_1():
    input, target = torch.zeros(128, 75), torch.full((128, 75), 0.25)
    left, right = (ax.images[0] for ax in plots.mask_pictures(input, target, 75.0).axes[:2])
    assert left.get_clim() == right.get_clim() == (0, 1)
    assert (right.get_array() == 0.25).all()
    assert left.get_extent() == [0, 1, 0, 128]


def test_the_dashboard_holds_every_stage():
    top, norms, levels, factors = plots.training_dashboard(training_rows(3), val_rows(), 3, "step 5 of 9").axes
    assert curve(top, "validation") == ([2, 5], [7.0, 6.0])
    assert curve(norms, "before clipping") == ([1, 2, 5], [2.0, 4.0, 10.0])
    for stage in range(3):
        rows = training_rows(3)
        assert curve(levels, f"stage {stage} output")[1] == [row[f"stage{stage}/output_rms"] for row in rows]
        assert curve(factors, f"stage {stage} wanted")[1] == [row[f"stage{stage}/wanted_factor"] for row in rows]
