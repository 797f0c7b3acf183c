"""The transcriber: known notes, the seams between its windows, and clips shorter than one."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

import lib.evaluation.transcriber
from lib.evaluation.transcriber import note_posteriors

RATE = 24_000
FOLDER = Path(lib.evaluation.transcriber.__file__).parent


def notes(*pitches: int, seconds: float = 4) -> np.ndarray:
    """MIDI notes together, each with five harmonics."""
    time = np.arange(round(seconds * RATE)) / RATE
    frequencies = [440 * 2 ** ((pitch - 69) / 12) for pitch in pitches]
    return sum(0.1 / n * np.sin(2 * np.pi * n * f * time) for f in frequencies for n in range(1, 6))


def test_the_network_is_the_one_that_its_licence_names():
    found = hashlib.sha256((FOLDER / "basic_pitch.onnx").read_bytes()).hexdigest()
    licence = (FOLDER / "basic_pitch.LICENSE").read_text()
    assert found in licence
    assert "Apache License" in licence
    assert "Copyright 2022 Spotify AB" in licence


@pytest.mark.parametrize("pitches", [(60,), (48, 64), (57, 61, 64)])
def test_it_finds_the_notes_of_a_chord(pitches):
    posteriors = note_posteriors(notes(*pitches))
    assert posteriors.shape == (344, 88)
    assert (posteriors >= 0).all()
    assert (posteriors <= 1).all()
    held = posteriors[20:-20].mean(axis=0)
    assert sorted(np.argsort(held)[-len(pitches) :] + 21) == sorted(pitches)


def test_time_does_not_drift_over_the_windows():
    """A note that changes after 0.9 s, 2.9 s, … changes there in the posteriors, over ten windows."""
    high, low = notes(72, seconds=1), notes(60, seconds=1)
    posteriors = note_posteriors(np.concatenate([part for _ in range(8) for part in (low, high)]))
    is_high = posteriors[:, 72 - 21] > posteriors[:, 60 - 21]
    changes = np.flatnonzero(np.diff(is_high.astype(int)) == 1) * 256 / 22_050
    assert len(changes) == 8
    assert changes == pytest.approx(np.arange(1, 16, 2), abs=0.06)


def test_windows_do_not_depend_on_what_follows():
    sound = notes(57, 64, seconds=6)
    whole, part = note_posteriors(sound), note_posteriors(sound[: 4 * RATE])
    assert np.abs(whole[:280] - part[:280]).max() < 0.02


@pytest.mark.parametrize("length", [1, 300, 20_000])
def test_short_and_silent_clips_have_frames_without_notes(length):
    found = note_posteriors(np.zeros(length))
    assert len(found) == max(1, int(length * 22_050 / RATE) // 256)
    assert (found < 0.3).all()
