"""The figures of the laboratory: labelled, one colour a variant, and true to their numbers."""

import itertools
import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
from training.test_plots import assert_legible

from lib.lab.plots import (
    COLOURS,
    MARKERS,
    factorial,
    predicted_and_measured,
    trajectories,
    variant_ranges,
    waterfalls,
)
from lib.lab.results import Result
from lib.lab.variants import EXPLODING, NAMED, REFERENCE


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def result(variant: str, seed: int, norms, non_finite=None) -> Result:
    parts = {"grad_norm/stage0/layers": 1.0, "grad_norm/stage1/layers": 2.0, "grad_norm/stage1/output_projection": 2.0}
    steps = sum(map(math.isfinite, norms))
    return Result(variant, seed, 2, steps, non_finite, parts, parts, None, tuple(norms), "r")


@pytest.fixture
def groups():
    return {
        REFERENCE: [result(REFERENCE, s, [1.0 + s, 2.0 + s, 3.0 + s]) for s in range(3)],
        EXPLODING: [result(EXPLODING, 0, [5.0, 6.0, math.inf], {"step": 3}), result(EXPLODING, 1, [7.0, 8.0, 9.0])],
    }


def labelled(figure):
    return all(axes.get_xlabel() or axes.get_ylabel() for axes in figure.axes)


def test_every_variant_has_its_own_look():
    looks = [(COLOURS[v.name], MARKERS[v.name]) for v in NAMED]
    assert len(set(looks)) == len({colour for colour, _ in looks}) == len(looks)
    assert set(COLOURS) == set(MARKERS) == {v.name for v in NAMED}


def test_trajectories_are_medians_with_ranges(groups):
    figure = trajectories(groups)
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    assert axes.get_xlabel() == "step"
    line = next(line for line in axes.lines if line.get_label() == REFERENCE)
    assert list(line.get_ydata()) == [2.0, 3.0, 4.0]
    assert line.get_color() == COLOURS[REFERENCE]
    low, high = (f(path.vertices[:, 1]) for path in axes.collections[0].get_paths() for f in (np.min, np.max))
    assert (low, high) == (1.0, 5.0)
    ended = next(line for line in axes.lines if line.get_label() == EXPLODING)
    assert list(ended.get_ydata()) == [6.0, 7.0, 9.0]  # after its end, a run has no say in the median
    crosses = [line for line in axes.lines if line.get_marker() == "x"]
    assert [cross.get_ydata()[0] for cross in crosses] == [6.0]  # where the first run ended


def test_a_run_without_a_step_is_left_out(groups):
    figure = trajectories({EXPLODING: [result(EXPLODING, 0, [])]} | groups)
    assert REFERENCE in figure.axes[0].get_legend_handles_labels()[1]


def test_ranges_have_a_row_a_variant_and_a_panel_a_measure(groups):
    values = {REFERENCE: [1.0, 2.0, 3.0], EXPLODING: []}
    figure = variant_ranges(groups, {"error (units)": values, "norm": values}, log=("norm",))
    assert [axes.get_xlabel() for axes in figure.axes] == ["error (units)", "norm"]
    assert [axes.get_xscale() for axes in figure.axes] == ["linear", "log"]
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == [REFERENCE, EXPLODING]
    assert "non-finite" in [text.get_text() for text in figure.axes[0].texts]
    assert list(figure.axes[0].lines[0].get_xdata()) == [1.0, 3.0]


def test_the_names_of_a_whole_grid_are_legible_and_do_not_touch():
    names = [REFERENCE, *(f"causes: weak + learnable + log penalty {i}" for i in range(43))]
    values = dict.fromkeys(names, (1.0, 2.0, 3.0))
    labels = ("validation MSE (squared latent units)", "gradient growth (last / first tenth)", "norm", "level")
    figure = variant_ranges(dict.fromkeys(names, ()), dict.fromkeys(labels, values))
    figure.canvas.draw()
    assert_legible(figure)
    boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert len(boxes) == 44
    assert all(upper.y0 > lower.y1 for upper, lower in itertools.pairwise(boxes))
    below = [axes.xaxis.label.get_window_extent() for axes in figure.axes]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(below))
    assert figure.axes[0].get_xlabel().replace("\n", " ") == labels[0]


def test_the_scales_above_a_waterfall_do_not_touch():
    stage = dict.fromkeys(("projection_rms", "weighted_residual", "rms_before_scaling", "output_rms"), 0.9)
    stage |= {"target_scale": 6.6, "applied_scale": 1.5, "clamped": 1.0, "law": 0.9}
    figure = waterfalls({f"w = {i}": [stage] * 3 for i in range(3)}, 5.7)
    figure.canvas.draw()
    assert_legible(figure)
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


def test_effects_that_seeds_disagree_on_are_grey_crosses():
    figure = factorial({"decades": {"norm": [1.0, 2.0], "clamp": [-1.0, 1.0]}})
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["norm", "clamp"]
    assert [line.get_marker() for line in axes.lines if line.get_marker() in "ox"] == ["o", "x"]
    assert labelled(figure)


def test_the_law_beside_the_measurement():
    panel = {"x": [0, 1], "predicted": [1.0, 2.0], "measured": [[1.0, 2.1], [1.2, 2.3], [1.1, 2.2]], "bound": [3, 3]}
    figure = predicted_and_measured({"a": panel, "b": panel}, "weight", "RMS", goal=5.7)
    assert [axes.get_title() for axes in figure.axes] == ["a", "b"]
    measured, predicted = figure.axes[0].lines[:2]
    assert list(measured.get_ydata()) == pytest.approx([1.1, 2.2])
    assert list(predicted.get_ydata()) == [1.0, 2.0]
    assert labelled(figure)


def test_a_waterfall_shows_the_target_scale_and_the_applied_one():
    stage = {
        "projection_rms": 0.6,
        "weighted_residual": 0.6,
        "rms_before_scaling": 0.9,
        "output_rms": 1.3,
        "target_scale": 6.6,
        "applied_scale": 1.5,
        "clamped": 1.0,
        "law": 1.2,
    }
    figure = waterfalls({"with": [stage], "without": [stage | {"clamped": 0.0}]}, 5.7)
    texts = [[text.get_text() for text in axes.texts] for axes in figure.axes[:2]]
    assert texts == [["target ×6.6\napplied ×1.5"], ["target ×6.6"]]
    assert sorted(bar.get_height() for bar in figure.axes[0].patches) == [0.6, 0.6, 0.9, 1.3]
    assert [line.get_xydata().tolist() for line in figure.axes[0].lines[:1]] == [[[0.3, 1.2]]]
    assert figure.axes[0].get_ylabel() == "RMS (latent units)"
