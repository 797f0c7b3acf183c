"""The figures of super-resolution: what they show is what they were given."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from lib.superres import plots as superres_plots
from lib.superres.evaluation import METHODS, Score
from lib.superres.mel import SILENCE


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def test_mel_pictures_share_one_scale():
    mels = {f"clip {i}": torch.full((256, 50), -float(i)) for i in range(4)}
    figure = superres_plots.mel_pictures(mels)
    axes = [axis for axis in figure.axes if axis.images and axis.get_visible() and axis.get_title()]
    assert [axis.get_title() for axis in axes] == list(mels)
    for axis, mel in zip(axes, mels.values(), strict=True):
        (image,) = axis.images
        assert np.array_equal(image.get_array(), mel.numpy())
        assert image.get_clim() == (SILENCE, superres_plots.LOUDEST)
        assert image.get_extent()[1] == pytest.approx(0.5)  # seconds


def test_filter_responses_in_decibels():
    figure = superres_plots.filter_responses({"half": torch.full((5,), 0.5), "none": torch.zeros(5)}, 4000)
    half, none, edge = figure.axes[0].lines
    assert half.get_ydata() == pytest.approx(np.full(5, 20 * math.log10(0.5)))
    assert np.isfinite(none.get_ydata()).all()
    assert half.get_xdata()[-1] == 24
    assert edge.get_xdata()[0] == 4


def test_places_are_shown_on_one_scale():
    figure = superres_plots.received_by_place({"a": torch.zeros(4, 6), "b": torch.full((4, 6), 3.0)})
    images = [axis.images[0] for axis in figure.axes if axis.images and axis.get_title()]
    assert [image.get_clim() for image in images] == [(0, 3), (0, 3)]


def test_loss_curves():
    rows = [{"split": s, "step": i, "loss": 1 / i} for s, i in (("train", 1), ("train", 2), ("val", 2), ("train", 4))]
    figure = superres_plots.loss_curves({"a part": rows, "another": rows[:1]})
    assert [axes.get_title() for axes in figure.axes] == ["a part", "another"]
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[0].lines}
    assert lines == {"train": ([1, 2, 4], [1, 0.5, 0.25]), "val": ([2], [0.5])}


def test_distances_show_every_method_and_what_is_a_bound():
    pair = (0.0, 0.0)
    scores = [
        Score(m, c, 4, 2, pair, pair, (i + c / 1e4, math.inf), pair, pair)
        for c in (2000, 8000)
        for i, m in enumerate(METHODS)
    ]
    figure = superres_plots.distances(scores)
    lines = {container.get_label(): container.lines[0] for container in figure.axes[0].containers}
    assert {label.split(" (")[0] for label in lines} == set(METHODS)
    for label, line in lines.items():
        place = list(METHODS).index(label.split(" (")[0])
        assert line.get_ydata() == pytest.approx([place + 0.2, place + 0.8])
        assert (line.get_linestyle() == "--") == label.endswith("(a bound)") == (place > 4)
