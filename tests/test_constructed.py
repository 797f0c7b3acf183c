"""The figure of merit on outputs whose worth is known."""

import numpy as np
import pytest
from constructed import CROSSOVERS, PAIRS, as_rows, constructed_cases, measure_cases, measured_in, stem, tables

from lib.audio.synth import PEAK
from lib.lab.results import read_record
from lib.project import RECORD

RECIPES = {*CROSSOVERS, "HPSS"}


@pytest.fixture(scope="module")
def measured():
    return measure_cases(PAIRS[:3])


@pytest.mark.parametrize("reference", [0, 1])
def test_the_perfect_fusion_has_the_highest_merit(measured, reference):
    merits = {name: [row["merit"] for row in rows] for name, rows in measured[reference].items()}
    assert set(merits) >= RECIPES | {"input", "target", "silence", "white noise", "half and half"}
    perfect = merits.pop("perfect fusion")
    for name, values in merits.items():
        assert all(best > value + 0.01 for best, value in zip(perfect, values, strict=True)), name
        assert np.mean(values) < 0.15 or name in RECIPES | {"half and half", "its drums 10 ms late"}, name
    assert max(merits["half and half"]) < 0.35
    late = merits["its drums 10 ms late"]  # in time means within a few ms
    assert all(0.25 * best < value < 0.8 * best for best, value in zip(perfect, late, strict=True))


def test_with_the_stems_as_references_the_perfect_fusion_scores_near_1(measured):
    (by_clips, by_stems) = measured
    assert min(row["merit"] for row in by_stems["perfect fusion"]) > 0.9
    assert min(row["merit"] for row in by_clips["perfect fusion"]) > 0.8
    for row in by_stems["perfect fusion"]:
        assert max(row["onsets_left"], row["notes_left"]) < 0.1


@pytest.mark.parametrize("metric", ["plain_merit", "beats"])
def test_neither_the_plain_figure_of_merit_nor_beats_rank_them_right(measured, metric):
    means = {name: np.mean([row[metric] for row in rows]) for name, rows in measured[0].items()}
    assert means["crossover"] > means["perfect fusion"]


@pytest.mark.parametrize("pair", PAIRS)
def test_all_parts_of_every_pair_play(pair):
    cases = constructed_cases(*pair)
    for song, name in zip(pair, ("input", "target"), strict=True):
        drums, harmony = stem(song, "d"), stem(song, "bcm")
        assert min(wav.square().mean().sqrt() for wav in (drums, harmony)) > 0.01 * PEAK
        assert (drums + harmony - cases[name]).abs().max() < 0.6  # but for the compression
        assert (drums + harmony - cases[name]).square().mean() < 0.05 * cases[name].square().mean()
    assert cases["input above 2 kHz"].abs().max() < cases["input"].abs().max()


def test_what_is_recorded_is_what_the_code_measures(measured):
    rows, facts = read_record(RECORD / "constructed.json", dict)
    recorded = {(row["case"], *row["songs"]): row for row in rows}
    assert len(recorded) == len(rows) == len(PAIRS) * len(measured[0])
    for row in as_rows(*measured, PAIRS[:3]):
        found = recorded[row["case"], *row["songs"]]
        for reference in ("by_clips", "by_stems"):
            assert found[reference] == pytest.approx(row[reference], abs=0.002), row
    assert facts == {"crossovers": CROSSOVERS} | tables(*measured_in(rows))
