"""Baselines without a network, against data whose statistics are known."""

import pytest
import torch

from lib.superres.baselines import SPAN, MelStatistics, neighbours
from lib.superres.degradation import Degradation, Examples
from lib.superres.mel import KNOWN, MELS, N_FFT, SAMPLE_RATE, bin_of, filters, known_bands, log_mel, spectrum
from lib.superres.resolver import join_bands
from superres.conftest import CLIP, band, decibels, white

WIDTH = (2 * SPAN + 1) * MELS


@pytest.fixture(scope="module")
def statistics(library) -> MelStatistics:
    return MelStatistics.of(library, CLIP, clips=12)


def test_statistics_are_those_of_the_training_frames(library, statistics):
    examples = Examples(library, "train", 12, CLIP)
    frames = torch.cat([log_mel(examples[i][0][None])[0, 0] for i in range(12)], dim=1)  # [256, n]
    torch.testing.assert_close(statistics.mean, frames.mean(dim=1), rtol=1e-4, atol=1e-4)
    assert statistics.covariance.shape == (WIDTH, WIDTH)
    own = statistics.covariance[SPAN * MELS :][:MELS, SPAN * MELS :][:, :MELS]
    torch.testing.assert_close(own, torch.cov(frames), rtol=1e-3, atol=1e-3)


def test_each_frame_has_its_neighbours():
    mel = torch.arange(4.0)[:, None] + torch.zeros(MELS)  # [T, F]: each frame its number
    found = neighbours(mel.T[None, None])
    assert found.shape == (1, 4, WIDTH)
    assert found.view(4, -1, MELS)[:, :, 7].tolist() == [
        [0, 0, 0, 1, 2],
        [0, 0, 1, 2, 3],
        [0, 1, 2, 3, 3],
        [1, 2, 3, 3, 3],
    ]


def test_known_bands_end_below_the_cutoff():
    for cutoff in (2_000, 4_000, 8_000, 12_000, 16_000):
        known, bank = known_bands(cutoff), filters(torch.device("cpu"))
        ends = [(row > 0).nonzero().max().item() * SAMPLE_RATE / N_FFT for row in bank]
        assert ends[known - 1] <= KNOWN * cutoff < ends[known + 1]


def of_frames(frames: torch.Tensor) -> MelStatistics:
    """Statistics of frames with their neighbours, `[n, 5 · 256]`."""
    return MelStatistics(frames.mean(dim=0).view(-1, MELS)[SPAN].float(), torch.cov(frames.double().mT).float())


def test_what_depends_on_the_lower_bands_is_predicted_from_them():
    """Each band above the cutoff is the band that many below it of the next frame, twice."""
    generator = torch.Generator().manual_seed(0)
    mel = 3 * torch.randn(8, 1, MELS, 1_000, generator=generator)
    known = known_bands(8_000)
    mel[:, :, known:, :-1] = 2 * mel[:, :, : MELS - known, 1:]
    statistics = of_frames(neighbours(mel).flatten(0, 1))
    low = mel.clone()
    low[:, :, known:] = -11.5
    made = statistics.predicted(low, 8_000, "bands")
    assert torch.equal(made[:, :, :known], low[:, :, :known])
    inside = slice(SPAN, -SPAN)
    error = (made - mel)[:, :, known:, inside].square().mean() / mel[:, :, known:].var()
    assert error < 0.5  # shrunk by the ridge, as predictors of variance 9 are by one of 10: (10 / 19)² of it is left
    blind = MelStatistics(statistics.mean, torch.diag(statistics.covariance.diag()))
    assert (blind.predicted(low, 8_000, "bands") - mel)[:, :, known:, inside].square().mean() > 1.9 * error


def test_a_tilt_is_continued():
    """Frames are straight lines over the bands, of random level and slope, with a mean that is none."""
    generator = torch.Generator().manual_seed(0)
    level, slope = 3 * torch.randn(2, 1, 4_000, generator=generator)
    bands, shape = torch.linspace(-1, 1, MELS)[:, None], torch.linspace(0, 1, MELS)[:, None] ** 2
    mel = (100 * level + 100 * slope * bands + shape)[None, None]  # large beside the ridge
    statistics = of_frames(neighbours(mel).flatten(0, 1))
    low = mel.clone()
    low[:, :, known_bands(4_000) :] = -11.5
    made = statistics.predicted(low, 4_000, "tilt")
    torch.testing.assert_close(made, mel, rtol=0, atol=2.0)
    assert (mel - mel.mean()).abs().mean() > 100


@pytest.mark.parametrize("cutoff", [2_000, 4_000, 8_000])
def test_replication_copies_the_octave_below(statistics, cutoff):
    """A tone comes back an octave's width higher; the copy's level is the prediction's, whatever its own."""
    clip = white(CLIP) + 0.0
    low = Degradation(cutoff)(clip)[None]
    made = statistics.replicated(low, cutoff)
    last = bin_of(KNOWN * cutoff)
    octave = last - last // 2
    source, copy = (spectrum(made)[0, first : first + octave, 2:-2].abs() for first in (last - octave, last))
    alike = torch.corrcoef(torch.stack([source.log().flatten(), copy.log().flatten()]))[0, 1]
    assert alike > 0.5
    assert decibels(band(join_bands(low, made, cutoff)[0] - low[0], 0, 0.8 * cutoff), low[0]) < -40
    wanted = statistics.predicted(log_mel(low), cutoff, "tilt")
    found = log_mel(made)
    known = known_bands(cutoff)
    assert (found - wanted)[:, :, known + 3 :, 2:-2].mean().abs() < 0.5
    louder = statistics.replicated(4 * low, cutoff)
    assert not torch.allclose(louder, 4 * made, rtol=0.05)  # the prediction knows what loud clips have above
