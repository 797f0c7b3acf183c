"""Figures of a training show the rows given, labelled."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.text import Text

from lib.audio.plots import WIDTH
from lib.training import plots

PAGE = 992  # pixels: the widest picture on a page


def training_rows(num_stages: int = 2) -> list[dict]:
    """Metrics of three steps; every curve of every stage has values of its own."""
    names = ("output_rms", "projection_rms", "target_scale", "applied_scale", "clamped", "rms_before_scaling")
    rows = []
    for step in (1, 2, 5):
        row = {"step": step, "loss": 10.0 / step, "grad_norm": 2.0 * step, "masks/complementarity": 0.7 + 0.01 * step}
        row |= {"discriminator/real": 0.1 * step, "discriminator/fake": -0.2 * step}
        for stage in range(num_stages):
            row |= {f"stage{stage}/{name}": 0.1 * i + 0.01 * step + 0.002 * stage for i, name in enumerate(names)}
        rows.append(row)
    return rows


def val_rows() -> list[dict]:
    return [{"step": s, "loss": loss, "masks/complementarity": 0.9} for s, loss in ((2, 7.0), (5, 6.0))]


FIGURES = {
    "curves": lambda: plots.curves({"loss": (training_rows(), "loss")}, ylabel="loss"),
    "mask_pictures": lambda: plots.mask_pictures(torch.rand(128, 40), torch.rand(128, 40), 75.0),
    "training_dashboard": lambda: plots.training_dashboard(training_rows(), val_rows(), [(0.7, 1.5), None]),
}


def curve(axes, label: str) -> tuple[list, list]:
    """x and y of the line with that label."""
    line = next(line for line in axes.get_lines() if line.get_label() == label)
    return list(line.get_xdata()), list(line.get_ydata())


def band(axes) -> list[float]:
    """Lower and upper edge of the one shaded band."""
    (span,) = axes.patches
    return span.get_extents().transformed(axes.transData.inverted()).intervaly.tolist()


def test_every_figure_of_the_module_is_tested():
    public = {
        name
        for name, f in vars(plots).items()
        if getattr(f, "__module__", "") == "lib.training.plots" and name[0] != "_"
    }
    assert public == set(FIGURES)


def assert_labelled(draw) -> None:
    """`draw()` is a figure with labelled axes that leaves matplotlib's global state as it was."""
    mine = plt.figure()
    before = dict(plt.rcParams)
    figure = draw()
    assert isinstance(figure, plt.Figure)
    assert dict(plt.rcParams) == before
    assert {mine.number, figure.number} <= set(plt.get_fignums())  # closing is the caller's business
    for axes in figure.axes:
        subplot = axes.get_subplotspec()
        if not axes.get_visible():
            continue
        if subplot is None or subplot.is_first_col():  # the others share the label to their left
            assert axes.get_ylabel(), axes
        if subplot is not None and subplot.is_last_row() and axes.get_label() != "<colorbar>":
            assert axes.get_xlabel(), axes
    figure.canvas.draw()
    assert_legible(figure)


def assert_legible(figure) -> None:
    """On a page no text is smaller than 11 pixels."""
    assert figure.get_figwidth() <= WIDTH
    scale = figure.dpi / 72 * min(1, PAGE / (figure.dpi * figure.get_figwidth()))
    texts = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    assert texts
    assert min(text.get_fontsize() for text in texts) * scale >= 11


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_labelled_and_leaves_the_global_state_alone(name):
    assert_labelled(FIGURES[name])


def test_without_stages_the_dashboard_is_loss_and_gradient_norm_and_leaves_out_what_was_not_finite():
    rows = training_rows()
    rows[1]["loss"] = None  # how metrics.jsonl writes NaN
    losses, norms = plots.training_dashboard(rows, val_rows(), ()).axes
    assert curve(losses, "training, each step") == ([1, 5], [10.0, 2.0])
    assert curve(losses, "validation") == ([2, 5], [7.0, 6.0])
    assert curve(norms, "before clipping") == ([1, 2, 5], [2.0, 4.0, 10.0])
    assert norms.get_yscale() == "log"


def test_the_dashboard_marks_steps_with_an_extreme_sign():
    rows = training_rows()
    rows[0]["sign/flatness"], rows[1]["sign/flatness"], rows[2]["sign/flatness"] = 2.0, 1e8, None
    losses = plots.training_dashboard(rows, val_rows(), ()).axes[0]
    (marks,) = losses.collections
    assert marks.get_label() == plots.SIGNS["flatness"]
    assert [line[0, 0] for line in marks.get_segments()] == [2]
    assert marks.get_label() in [text.get_text() for text in losses.get_legend().get_texts()]


def test_curves_are_over_any_number_of_their_rows_beside_marks():
    rows = [{"step": 1, "seconds": 0.0, "merit": 0.1}, {"step": 2, "seconds": 30.0, "merit": 0.5}]
    series = {"masks alone": (rows, "merit"), "with the cascade": (rows[:1], "merit"), "none": (rows, "harmony")}
    (axes,) = plots.curves(series, {"HPSS": 0.4}, "seconds", ylabel="merit", ylim=(0, 1)).axes
    assert curve(axes, "masks alone") == ([0.0, 30.0], [0.1, 0.5])
    assert curve(axes, "with the cascade") == ([0.0], [0.1])
    assert curve(axes, "none") == ([], [])
    assert set(curve(axes, "HPSS")[1]) == {0.4}
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_ylim()) == ("seconds", "merit", (0, 1))


def test_mask_pictures_share_one_scale_from_0_to_1():
    input, target = torch.zeros(128, 75), torch.full((128, 75), 0.25)
    left, right = (ax.images[0] for ax in plots.mask_pictures(input, target, 75.0).axes[:2])
    assert left.get_clim() == right.get_clim() == (0, 1)
    assert (right.get_array() == 0.25).all()
    assert left.get_extent() == [0, 1, 0, 128]


def test_the_dashboard_holds_every_stage():
    rows = training_rows(3)
    top, norms, levels, scales = plots.training_dashboard(rows, val_rows(), [(0.7, 1.5)] * 3).axes
    assert curve(top, "training, each step") == ([1, 2, 5], [10.0, 5.0, 2.0])
    assert curve(top, "validation") == ([2, 5], [7.0, 6.0])
    assert curve(norms, "before clipping") == ([1, 2, 5], [2.0, 4.0, 10.0])
    for stage in range(3):
        assert curve(levels, f"stage {stage} output")[1] == [row[f"stage{stage}/output_rms"] for row in rows]
        assert curve(scales, f"stage {stage} target")[1] == [row[f"stage{stage}/target_scale"] for row in rows]


def test_the_dashboards_bands_are_what_the_claim_calls_healthy():
    rows = [
        {"step": step, "grad_norm": 9.0, "stage0/target_scale": expected, "stage0/rms_before_scaling": mixed}
        for step, expected, mixed in ((1, 2.0, 2.5), (2, 1.25, 4.0), (3, 4.0, 10.0))  # goals 5, 5 and an odd one of 40
    ]
    clamps = [(0.7, 1.5), None, (0.6, 1.8)]
    _, norms, levels, scales = plots.training_dashboard(rows, [], clamps).axes
    assert band(norms) == pytest.approx([3.0, 100.0])  # from below all of it: a log axis has no zero
    assert band(levels) == pytest.approx([4.0, 6.0])
    assert band(scales) == pytest.approx([0.7 / 1.2, 1.5 / 0.8])  # of the narrowest clamp


@pytest.mark.parametrize("lo_hi", [(0.7, 1.5), (0.5, 1.1)])
def test_within_the_band_of_scales_the_level_stays_within_its_own(lo_hi):
    """At the band's edges the clamped scale leaves exactly 1.2 and 0.8 of the target level."""
    low, high = band(plots.training_dashboard([], [], [lo_hi]).axes[3])
    assert [np.clip(expected, *lo_hi) / expected for expected in (low, high)] == pytest.approx([1.2, 0.8])


def test_the_dashboard_needs_no_rows_and_shows_no_band_without_a_clamp():
    figure = plots.training_dashboard([], [], [None, None])
    _, norms, levels, scales = figure.axes
    assert not levels.patches
    assert not scales.patches
    assert band(norms)[1] == pytest.approx(100)
    figure.canvas.draw()


@pytest.mark.parametrize("norm", [99.0, 400.0, 15_438.0, 0.0])
def test_only_norms_below_100_are_shaded_however_large_they_are(norm):
    low, high = band(plots.training_dashboard([{"step": 1, "grad_norm": norm}], [], [None]).axes[1])
    assert 0 < low < high == pytest.approx(100)


def test_no_legend_and_no_line_hides_a_line():
    figure = plots.training_dashboard(training_rows(3), val_rows(), [(0.7, 1.5)] * 3)
    figure.canvas.draw()
    for axes in figure.axes:
        assert axes.get_legend().get_window_extent().y0 >= axes.get_window_extent().y1 - 1
    for axes in figure.axes[2:]:
        widths = [line.get_linewidth() for line in axes.lines]
        assert widths == sorted(widths, reverse=True)  # the first is below the others
        assert len(set(widths)) == 3
