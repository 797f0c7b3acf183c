"""The RMS explorer: what it draws is what a cascade does, live in a browser and still elsewhere."""

import io

import ipywidgets
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread

from lib.lab.variants import EXPLODING, VARIANTS
from lib.listening.explorer import GRID, RmsExplorer
from lib.model.cascade import Cascade, cosine, rms
from lib.model.rms_law import Clips


@pytest.fixture(scope="module")
def clips():
    torch.manual_seed(1)
    input, target = 5.7 * torch.randn(2, 1, 128, 12)
    return input, 0.5 * target + 0.3 * input


@pytest.fixture(scope="module")
def explorer(clips):
    return RmsExplorer(*clips, num_layers=1)


def test_it_shows_what_the_exploding_cascade_does(explorer, clips):
    variant = next(v for v in VARIANTS if v.name == EXPLODING)
    torch.manual_seed(0)
    cascade = Cascade(variant.cascade(1)).eval()
    target = explorer.across  # cosine 0
    with torch.no_grad():
        _, traces = cascade(clips[0], target)
    rows = explorer.traces()
    assert explorer.goal == pytest.approx(((rms(clips[0]) ** 2 + rms(target) ** 2) / 2).sqrt().item(), rel=1e-5)
    for row, trace in zip(rows, traces, strict=True):
        assert row["projection_rms"] == pytest.approx(trace.projection_rms.item(), rel=1e-4)
        assert row["output_rms"] == pytest.approx(trace.output_rms.item(), rel=1e-4)
    assert rows[2]["weighted_residual"] == pytest.approx(0.1 * traces[1].output_rms.item(), rel=1e-4)
    assert rows[2]["applied_scale"] == pytest.approx(1.5)


@pytest.mark.parametrize("similarity", [0.0, 0.5, 1.0])
def test_similarity_is_the_cosine_at_the_targets_level(explorer, clips, similarity):
    target = similarity * explorer.along + (1 - similarity**2) ** 0.5 * explorer.across
    assert cosine(clips[0], target).item() == pytest.approx(similarity, abs=1e-5)
    assert rms(target).item() == pytest.approx(rms(clips[1]).item(), rel=1e-5)


def test_every_control_moves_the_last_stage(explorer):
    start = explorer.traces()[2]
    for changes in ({"weight": 0.5}, {"clamp": False}, {"spectral_norm": False}):
        assert explorer.traces(**changes)[2]["output_rms"] != pytest.approx(start["output_rms"], rel=1e-3)
    alike, unlike = explorer.traces(similarity=1.0), explorer.traces(similarity=0.0)
    assert alike[0]["target_scale"] < 1.05 < unlike[0]["target_scale"]
    assert explorer.traces()[2] == start  # and moving back restores it
    assert explorer.traces(clamp=False)[2]["output_rms"] == pytest.approx(explorer.goal, rel=1e-3)


@pytest.mark.parametrize(
    "changes", [{}, {"weight": 0.7}, {"clamp": False}, {"similarity": 0.5}, {"spectral_norm": False}]
)
def test_the_law_is_that_of_the_drawn_cascade_and_near_what_is_measured(explorer, clips, changes):
    rows, weight = explorer.traces(**changes), changes.get("weight", 0.1)
    config = explorer.cascades[changes.get("spectral_norm", True)].config
    config = config.with_stage(-1, residual_weight=weight, **({"clamp": None} if "clamp" in changes else {}))
    law = config.predict_rms(Clips(*(rms(clip).item() for clip in clips), changes.get("similarity", 0.0)))
    assert [row["law"] for row in rows] == [stage.output_rms for stage in law]
    assert rows[-1]["safe_weight"] == law[-1].smallest_safe_weight
    assert [row["law"] for row in rows] == pytest.approx([row["output_rms"] for row in rows], rel=0.15)


def test_a_slider_redraws_the_picture(explorer):
    box = explorer.sliders()
    assert isinstance(box, ipywidgets.VBox)
    *controls, picture = box.children
    assert [type(control).__name__ for control in controls] == ["FloatSlider"] * 2 + ["Checkbox"] * 2
    before = bytes(picture.value)
    assert controls[0].description == "last residual weight"
    for control, value in zip(controls, (0.2, 0.5, False, False), strict=True):
        control.value = value
        assert bytes(picture.value) != before
        before = bytes(picture.value)
    controls[0].value = 0.1
    expected = imread(io.BytesIO(explorer.png(weight=0.1, similarity=0.5, clamp=False, spectral_norm=False)))
    assert np.array_equal(imread(io.BytesIO(bytes(picture.value))), expected)


def test_the_grid_has_every_setting(explorer):
    figure = explorer.grid()
    assert isinstance(figure, Figure)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[: len(GRID)] == list(GRID)
    heights = [max(bar.get_height() for bar in axes.patches if bar.get_x() > 1.5) for axes in figure.axes[:3]]
    assert heights == sorted(heights)  # the last stage is the louder, the larger its weight
