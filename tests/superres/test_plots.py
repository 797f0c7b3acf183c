"""The figures of super-resolution: what they show is what they were given."""

import numpy as np
import pytest
import torch

from lib.superres import plots as superres_plots
from lib.superres.evaluation import Score
from lib.superres.mel import SILENCE


def test_mel_spectrograms_share_one_scale():
    mels = {f"clip {i}": torch.full((256, 50), -float(i)) for i in range(4)}
    figure = superres_plots.mel_spectrograms(mels)
    axes = [axis for axis in figure.axes if axis.images and axis.get_visible() and axis.get_title()]
    assert [axis.get_title() for axis in axes] == list(mels)
    for axis, mel in zip(axes, mels.values(), strict=True):
        (image,) = axis.images
        assert np.array_equal(image.get_array(), mel.numpy())
        assert image.get_clim() == (SILENCE, superres_plots.LOUDEST)
        assert image.get_extent()[1] == pytest.approx(0.5)  # seconds


def test_tables_show_every_score():
    scores = [
        Score(method, c, 4, 6, (3.0 + c / 1e4, 0.125), (4.0, 0.1), {"sinc": (0.5, 0.1), "ridge": (-c / 1e4, 0.1)})
        for c in (2_000, 12_000)
        for method in ("sinc", "model")
    ]
    assert superres_plots.upper_rows(scores) == [
        {"method": method, "2 kHz": "3.20 ± 0.12", "12 kHz": "4.20 ± 0.12"} for method in ("sinc", "model")
    ]
    matched = superres_plots.upper_rows(scores, "upper_matched")
    assert matched[0] == {"method": "sinc", "2 kHz": "4.00 ± 0.10", "12 kHz": "4.00 ± 0.10"}
