"""Degradation: what is lost, what stays, where it stays, and what is drawn."""

from collections import Counter

import numpy as np
import pytest
import torch

from lib.superres.degradation import GRID, HIGHEST, KINDS, LOWEST, ORDERS, Degradation
from lib.util.errors import UserError
from superres.conftest import band, decibels, white

CUTOFFS = (2_000, 4_750, 8_000, 16_000)
EVERY = [(None, 8), *((kind, order) for kind in KINDS for order in ORDERS)]


@pytest.mark.parametrize(("kind", "order"), EVERY)
def test_what_lies_above_the_cutoff_is_lost_and_what_lies_well_below_it_is_kept(kind, order):
    wav = white(48_000)
    for cutoff in CUTOFFS:
        low = Degradation(cutoff, kind, order)(wav)
        assert low.shape == wav.shape
        assert low.dtype == torch.float32
        assert decibels(band(low, 1.15 * cutoff), band(wav, 1.15 * cutoff)) < -40
        # a Bessel filter falls slowly: at half its cutoff it has lost 2 to 7 dB
        kept = cutoff / (10 if kind == "bessel" else 2)
        for highest in (kept / 4, kept):
            lowest = highest - kept / 4  # in narrow bands: a loss in one of them is not made up for by the others
            assert abs(decibels(band(low, lowest, highest), band(wav, lowest, highest))) < 1


@pytest.mark.parametrize(("kind", "order"), EVERY)
def test_nothing_is_delayed(kind, order):
    wav = white(24_001)  # no multiple of anything
    low = Degradation(3_000, kind, order)(wav)
    assert low.shape == wav.shape
    lags = torch.fft.irfft(torch.fft.rfft(low[0]) * torch.fft.rfft(wav[0]).conj(), wav.shape[1])
    assert lags.argmax() == 0
    assert decibels(band(low - wav, 0, 150), band(wav, 0, 150)) < -20  # a delay by 8 samples would be -16 dB


def test_kinds_and_orders_differ():
    wav = white(9_600)
    lows = {(kind, order): Degradation(8_000, kind, order)(wav) for kind, order in EVERY}
    for kind in KINDS:
        assert decibels(lows[kind, 2] - lows[kind, 10], wav) > -40
        others = [lows[other, 10] for other in KINDS if other != kind] + [lows[None, 8]]
        assert all(decibels(lows[kind, 10] - other, wav) > -40 for other in others)


def test_the_whole_band_is_left_alone():
    wav = white(9_600)
    for order in (2, 10):
        assert decibels(Degradation(24_000, None, order)(wav) - wav, wav) < -100
        assert decibels(Degradation(24_000, "butter", order)(wav) - wav, wav) < -100
    assert decibels(Degradation(23_750)(wav) - wav, wav) > -40  # the tolerance tells


def test_short_clips_keep_their_length():
    for length in (1, 2, 50, 480):
        for kind in (None, *KINDS):
            assert Degradation(4_000, kind, 10)(white(length)).shape == (1, length)


def test_what_is_drawn_covers_the_ranges_and_nothing_else():
    drawn = [Degradation.draw(np.random.default_rng(seed)) for seed in range(3_000)]
    cutoffs = Counter(d.cutoff for d in drawn)
    assert set(cutoffs) == set(range(LOWEST, HIGHEST + 1, GRID))
    assert (min(cutoffs), max(cutoffs)) == (2_000, 16_000)
    assert max(cutoffs.values()) < 3_000 / 57 * 1.8  # all alike: 53 each, with a deviation of 7
    kinds, orders = Counter(d.kind for d in drawn), Counter(d.order for d in drawn)
    assert set(kinds) == {"butter", "cheby1", "ellip", "bessel"}
    assert set(orders) == set(range(2, 11))
    assert all(abs(count - 750) < 100 for count in kinds.values())
    assert all(abs(count - 333) < 80 for count in orders.values())


def test_the_same_seed_draws_the_same():
    first, second = (np.random.default_rng(5) for _ in range(2))
    draws = [(Degradation.draw(first), Degradation.draw(second)) for _ in range(20)]
    assert all(a == b for a, b in draws)
    assert len({a for a, _ in draws}) > 15


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"cutoff": 4_100}, "cutoff=4100"),
        ({"cutoff": 0}, "cutoff=0"),
        ({"cutoff": 24_250}, "cutoff=24250"),
        ({"cutoff": 4_000.0}, "cutoff=4000.0"),
        ({"cutoff": 4_000, "kind": "cheby2"}, "kind='cheby2'.*butter, cheby1, ellip, bessel"),
        ({"cutoff": 4_000, "kind": "butter", "order": 0}, "order=0"),
        ({"cutoff": 4_000, "kind": "butter", "order": 21}, "order=21"),
        ({"cutoff": 4_000, "kind": "butter", "order": 2.0}, "order=2.0"),
    ],
)
def test_impossible_fields_are_refused(fields, words):
    with pytest.raises(UserError, match=words):
        Degradation(**fields)
