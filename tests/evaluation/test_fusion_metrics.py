"""Metrics of fused sound: formulas by hand, sounds whose values are known, and input that is no music."""

import ast
import hashlib
import math
from pathlib import Path

import librosa
import mir_eval
import numpy as np
import pytest
import torch

import lib.evaluation.fusion_metrics
from lib.evaluation.fusion_metrics import EDGES, harmonic_mean, note_posteriors, sound_features, sound_metrics

RATE, N = 24_000, 24_000  # a whole second
JUDGED = (
    "onsets",
    "beats",
    "notes",
    "onsets_left",
    "notes_left",
    "artifacts",
    "level",
    "peak",
    "onset_score",
    "note_score",
    "merit",
)
PLAIN = ("rhythm", "harmony", "plain_merit")


def sine(frequency: float, amplitude: float, seconds: float = 1) -> torch.Tensor:
    return amplitude * torch.sin(2 * torch.pi * frequency * torch.arange(round(seconds * RATE)) / RATE)[None]


def bursts(times, low: float, high: float, seconds: float = 4) -> torch.Tensor:
    """Noise of 50 ms within a band, at some times in seconds."""
    noise = torch.randn(round(seconds * RATE), generator=torch.Generator().manual_seed(0))
    frequencies = torch.fft.rfftfreq(len(noise), 1 / RATE)
    gate = torch.zeros_like(noise)
    for time in times:
        gate[round(time * RATE) : round(time * RATE) + 1200] = 1
    spectrum = torch.fft.rfft(noise * gate)
    outside = (frequencies < low) | (frequencies >= high)
    return 0.2 * torch.fft.irfft(spectrum.masked_fill(outside, 0), len(noise))[None]


def compare(*wavs: torch.Tensor) -> dict[str, float]:
    return sound_metrics(*map(sound_features, wavs))


# --- what judges ------------------------------------------------------------------------------------------------------


def test_no_feature_of_the_judge_is_one_that_training_uses():
    tree = ast.parse(Path(lib.evaluation.fusion_metrics.__file__).read_text())
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name for name in names if name.startswith("lib.")} == {"lib.audio.files", "lib.model.rms_law"}


def test_metrics_by_hand(wavs):
    """Against code written another way, on an output that has something of three clips."""
    output, input, target = 0.5 * wavs[0] + 0.3 * wavs[1] + 0.4 * wavs[2], wavs[0], wavs[1]
    features = [sound_features(wav) for wav in (output, input, target)]
    found = sound_metrics(*features)
    out, own, other = (x.notes for x in features)
    both = np.logical_and(out, other).sum()
    precision, recall = both / out.sum(), both / other.sum()
    assert found["notes"] == pytest.approx(2 * precision * recall / (precision + recall))
    only = [(t, p) for t in range(len(own)) for p in range(88) if own[t, p] and not other[t, p]]
    assert found["notes_left"] == pytest.approx(np.mean([out[t, p] for t, p in only]))
    assert 0.1 < found["notes_left"] < 0.9
    kept, left = [], []
    for band in range(len(EDGES) - 1):
        if not (features[1].full[band] or features[2].full[band]):
            continue
        rises = np.stack([x.rises[band] for x in features])
        r, s, c = (np.corrcoef(rises)[i, j] for i, j in ((0, 1), (0, 2), (1, 2)))
        kept.append(r)
        unit = (rises - rises.mean(axis=1, keepdims=True)) / rises.std(axis=1, keepdims=True)
        weight = np.linalg.lstsq(unit[1:].T, unit[0], rcond=None)[0][1]  # the target's, beside the input's
        assert weight == pytest.approx((s - r * c) / (1 - c**2))
        left.append(min(max(weight, 0), 1))
    assert len(kept) == 3  # the codec ends at 4.8 kHz
    assert found["onsets"] == pytest.approx(np.mean(kept))
    assert found["onsets_left"] == pytest.approx(np.mean(left))
    parts = found["onsets"] * (1 - found["onsets_left"]), found["notes"] * (1 - found["notes_left"])
    assert found["merit"] == pytest.approx(2 / (1 / parts[0] + 1 / parts[1]))
    assert found["beats"] == pytest.approx(mir_eval.beat.f_measure(features[1].beats, features[0].beats))
    assert list(found) == [*JUDGED, *PLAIN, "movement_ratio"]


def test_a_copy_of_either_clip_keeps_all_of_it_and_has_no_merit(wavs):
    for input, target in ((wavs[0], wavs[1]), (wavs[2], wavs[3]), (wavs[3], wavs[0])):
        copy, other = compare(input, input, target), compare(target, input, target)
        assert (copy["onsets"], copy["beats"], copy["notes_left"]) == pytest.approx((1, 1, 1))
        assert (other["notes"], other["notes_left"], other["onsets_left"]) == pytest.approx((1, 0, 1))
        assert copy["onsets_left"] == pytest.approx(0, abs=1e-9)
        assert max(copy["merit"], other["merit"]) < 1e-3
        for wav in (input, target, (input + target) / 2):
            assert compare(wav, input, target)["artifacts"] == 0


def test_alike_rhythms_leave_nothing_of_the_target_in_a_copy_of_the_input(wavs):
    input = bursts([0.5, 1, 1.5, 2, 3], 500, 2000)
    target = bursts([0.5, 1, 1.5, 2.5, 3], 500, 2000)
    found = compare(input, input, target)
    assert found["onsets_left"] == pytest.approx(0, abs=1e-9)
    assert compare(target, input, target)["onsets"] > 0.5  # they are alike
    assert compare(target, input, target)["onsets_left"] > 0.9


@pytest.mark.parametrize(("low", "high", "share"), [(20, 140, 1), (200, 2000, 1), (2600, 4500, 1), (5000, 11000, 1)])
def test_every_band_with_hits_counts_alike(low, high, share):
    """The input hits in two bands; an output with the hits of one of them agrees by half."""
    other = (200, 2000) if low != 200 else (2600, 4500)
    hits, lost = bursts([0.5, 1.2, 2, 3.1], low, high), bursts([0.7, 1.5, 2.6, 3.4], *other)
    found = compare(hits, hits + lost, hits + lost)
    assert found["onsets"] == pytest.approx(0.5 * share, abs=0.06)
    assert compare(hits + lost, hits + lost, lost)["onsets"] == pytest.approx(1)


def test_a_band_that_is_empty_in_both_clips_does_not_count():
    hits = bursts([0.5, 1.2, 2, 3.1], 200, 2000)
    assert sound_features(hits).full.tolist() == [False, True, False, False]
    quiet = bursts([0.7, 2.5], 5000, 11000)
    assert sound_features(hits + 0.1 * quiet).full.tolist() == [False, True, False, True]
    assert not sound_features(hits + 1e-4 * quiet).full[3]
    assert compare(hits + quiet, hits, hits)["onsets"] == pytest.approx(1, abs=0.01)
    assert compare(hits + quiet, hits, hits + quiet)["onsets"] < 0.7  # the target fills it


def test_a_band_that_is_empty_in_the_output_has_no_onsets_but_its_rounding():
    target = bursts(np.arange(0.2, 4, 0.5), 100, 8000)
    low = bursts(np.arange(0.2, 4, 0.5), 50, 180)
    found = []
    for seed in range(2):
        noise = torch.randn(low.shape, generator=torch.Generator().manual_seed(seed))
        found.append(compare(low + 2e-8 * noise, target, target)["onsets"])
    assert found[0] == pytest.approx(found[1], abs=1e-6)
    assert 0 < found[0] < 0.5  # of five bands it has the lowest


def test_notes_are_no_hits():
    """The beginnings and ends of held notes, each in its own place, louder than the hits."""
    hits = bursts([0.63, 1.2, 2.1, 3.1], 200, 2400)
    fade = torch.minimum(torch.linspace(0, 40, N // 2), torch.linspace(40, 0, N // 2)).clamp(max=1)
    melody = torch.cat([sine(f, 0.3, 0.5) * fade for f in (330, 440, 550, 392, 660, 494, 587, 349)], dim=1)
    found = compare(hits + melody, hits, melody)
    assert found["onsets"] > 0.97
    assert found["onsets_left"] < 0.03
    assert found["notes"] > 0.95  # soft ones too
    assert compare(melody, hits, melody)["onsets"] < 0.1


def test_the_ends_of_a_clip_are_no_hits():
    """Of clips cut out of held notes nothing begins or ends: a copy of the target has none of the input's rhythm."""
    input, target = (sum(sine(f, 0.1, 4) for f in chord) for chord in ((262, 330, 392), (220, 277, 370)))
    found = compare(target, input, target)
    assert found["onsets"] < 0.2
    assert found["merit"] < 0.05


def test_artifacts_are_what_neither_clip_has():
    low, high, foreign = sine(300, 0.1), sine(3000, 0.1), sine(1000, 0.1)
    assert compare(low + high + foreign, low, high)["artifacts"] == pytest.approx(1 / 3, abs=0.05)
    assert compare(low + high, low, high)["artifacts"] < 1e-3
    assert compare(foreign, low, high)["artifacts"] > 0.95
    assert compare(4 * low, low, high)["artifacts"] == pytest.approx(0.75, abs=0.01)  # 16 times the power, 4 allowed


def test_level_is_of_the_pair_and_peak_absolute():
    loud, soft = sine(500, 0.7), sine(500, 0.1)  # together an RMS of 0.5 / √2
    found = compare(sine(500, 0.25), loud, soft)
    assert found["level"] == pytest.approx(-20 * math.log10(2), abs=1e-3)
    assert found["peak"] == pytest.approx(0.25, abs=1e-3)
    assert compare(-1.5 * loud, loud, loud)["peak"] == pytest.approx(1.05, abs=1e-3)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_sample_that_is_not_finite_makes_silence(wavs, broken):
    bad = wavs[0].clone()
    bad[0, 100] = broken
    assert compare(bad, *wavs[1:3]) == compare(0 * wavs[0], *wavs[1:3])


@pytest.mark.parametrize("length", [320, 1000, 5000])
def test_clips_shorter_than_a_window_or_a_beat_have_metrics(wavs, length):
    found = compare(*(wav[:, :length] for wav in wavs[:3]))
    assert all(math.isfinite(value) for value in found.values())
    with pytest.raises(ValueError, match="at least 320 samples, got 319"):
        sound_features(wavs[0][:, :319])


def test_features_do_not_depend_on_the_level_of_the_clip(wavs):
    """A quiet output is judged like a loud one."""
    whole, soft = (compare(gain * wavs[0], wavs[0], wavs[1]) for gain in (1, 1e-2))
    assert soft["onsets"] == pytest.approx(whole["onsets"], abs=1e-3)
    assert soft["level"] == pytest.approx(whole["level"] - 40, abs=0.01)


# --- the older figures ------------------------------------------------------------------------------------------------


def harmony_by_hand(x: torch.Tensor, y: torch.Tensor) -> float:
    shares = []
    for wav in (x, y):
        power = np.abs(librosa.stft(wav[0].numpy(), n_fft=4096, hop_length=1280)) ** 2
        classes = librosa.filters.chroma(sr=RATE, n_fft=4096) @ power
        shares.append((classes / classes.sum(axis=0) - 1 / 12).ravel())
    return shares[0] @ shares[1] / np.linalg.norm(shares[0]) / np.linalg.norm(shares[1])


def rhythm_by_hand(x: torch.Tensor, y: torch.Tensor) -> float:
    strengths = []
    for wav in (x, y):
        decibels = librosa.power_to_db(librosa.feature.melspectrogram(y=wav[0].numpy(), sr=RATE, hop_length=320))
        strengths.append(np.maximum(np.diff(decibels), 0).mean(axis=0)[:-3])  # librosa delays by three frames
    return np.corrcoef(*strengths)[0, 1]


def test_sound_metrics_are_what_the_formulas_give(wavs):
    input, target, output = wavs[0], wavs[1], 0.5 * wavs[0] + 0.3 * wavs[1] + 0.4 * wavs[2]
    found = sound_metrics(*(sound_features(wav) for wav in (output, input, target)))

    def curve(wav):
        return np.sqrt((wav[0].double().numpy().reshape(250, -1) ** 2).mean(axis=1))

    moves = [np.std(curve(wav), ddof=1) / curve(wav).mean() for wav in (output, input, target)]
    wanted = {
        "harmony": harmony_by_hand(output, target),
        "movement_ratio": moves[0] / ((moves[1] + moves[2]) / 2),
    }
    wanted["plain_merit"] = 2 * found["rhythm"] * wanted["harmony"] / (found["rhythm"] + wanted["harmony"])
    assert {*wanted, "rhythm"} == {*PLAIN, "movement_ratio"}
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=2e-3)
    # librosa cuts quiet bands 80 dB below the loudest one and pads the start, hence no closer
    assert found["rhythm"] == pytest.approx(rhythm_by_hand(output, input), abs=0.02)
    assert abs(rhythm_by_hand(output, target) - found["rhythm"]) > 0.1
    assert abs(harmony_by_hand(output, input) - found["harmony"]) > 0.05


def test_a_copy_of_the_input_has_its_rhythm_and_the_harmony_of_an_unrelated_song(wavs):
    """So its plain merit is near 0, and that of a copy of the target likewise."""
    features = [sound_features(wav) for wav in wavs]
    for input in range(4):
        target = (input + 1) % 4
        copy = sound_metrics(features[input], features[input], features[target])
        assert copy["rhythm"] == pytest.approx(1, abs=1e-6)
        assert copy["harmony"] == pytest.approx(harmony_by_hand(wavs[input], wavs[target]), abs=1e-3)
        assert copy["harmony"] < 0.35
        other = sound_metrics(features[target], features[input], features[target])
        assert other["harmony"] == pytest.approx(1, abs=1e-6)
        assert other["rhythm"] < 0.5
        assert max(copy["plain_merit"], other["plain_merit"]) < 0.6


@pytest.mark.parametrize(
    ("rhythm", "harmony", "wanted"),
    [
        (1.0, 1.0, 1.0),
        (0.5, 0.5, 0.5),
        (1.0, 0.5, 2 / 3),
        (0.9, 0.1, 0.18),
        (1.0, 0.0, 0.0),
        (-0.5, 0.9, 0.0),
        (0.9, -0.5, 0.0),
        (-0.9, -0.8, 0.0),
        (0.0, 0.0, 0.0),
    ],
)
def test_merit_is_the_harmonic_mean(rhythm, harmony, wanted):
    assert harmonic_mean(rhythm, harmony) == pytest.approx(wanted)


def test_a_constant_tone_does_not_move(wavs):
    steady = sine(1000, 0.3)
    swelling = sine(1000, 0.3) * torch.linspace(0, 2, N)  # deviates from its mean by 1/√3 of it
    assert sound_features(steady).movement < 1e-4
    assert sound_features(swelling).movement == pytest.approx(1 / math.sqrt(3), rel=0.01)
    still = sound_metrics(sound_features(steady), sound_features(swelling), sound_features(swelling))
    assert still["movement_ratio"] < 1e-3


def test_twice_the_sound_has_twice_the_rms_and_the_same_shape(wavs):
    input = sound_features(wavs[0])
    found = sound_metrics(sound_features(2 * wavs[0]), input, input)
    assert found["level"] == pytest.approx(20 * math.log10(2), abs=1e-4)
    assert found["movement_ratio"] == pytest.approx(1, rel=1e-4)
    assert found["rhythm"] == pytest.approx(1, abs=1e-3)
    assert found["harmony"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("silent", [(0,), (1,), (0, 1), (0, 1, 2)])
def test_metrics_of_silence_are_finite_and_find_nothing_alike(wavs, silent):
    features = [sound_features(torch.zeros_like(wav) if i in silent else wav) for i, wav in enumerate(wavs[:3])]
    found = sound_metrics(*features)
    assert all(math.isfinite(value) for value in found.values())
    if 0 in silent:
        assert found["rhythm"] == found["harmony"] == found["merit"] == 0
        assert found["level"] == -120
        assert (
            found["onsets"] == found["notes"] == found["onsets_left"] == found["notes_left"] == found["artifacts"] == 0
        )


def test_silence_at_the_same_time_is_no_common_harmony(wavs):
    """Two songs that pause together are as alike as before."""
    pause = torch.cat([torch.ones(N), torch.zeros(3 * N)])
    whole, paused = (sound_metrics(*(sound_features(gate * wav) for wav in wavs[:3])) for gate in (1, pause))
    first = sound_metrics(*(sound_features(wav[:, :N]) for wav in wavs[:3]))
    assert paused["harmony"] == pytest.approx(first["harmony"], abs=0.1)
    assert whole["harmony"] < 0.5


# --- the transcriber: known notes, the seams between its windows, and clips shorter than one --------------------------


def notes(*pitches: int, seconds: float = 4) -> np.ndarray:
    """MIDI notes together, each with five harmonics."""
    time = np.arange(round(seconds * RATE)) / RATE
    frequencies = [440 * 2 ** ((pitch - 69) / 12) for pitch in pitches]
    return sum(0.1 / n * np.sin(2 * np.pi * n * f * time) for f in frequencies for n in range(1, 6))


def test_the_network_is_the_one_that_its_licence_names():
    folder = Path(lib.evaluation.fusion_metrics.__file__).parent
    found = hashlib.sha256((folder / "basic_pitch.onnx").read_bytes()).hexdigest()
    licence = (folder / "basic_pitch.LICENSE").read_text()
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


def test_a_stereo_clip_is_judged_by_the_mean_of_its_channels():
    wav = torch.cat([bursts((1, 2, 3), 200, 2000), sine(440, 0.2, 4)])
    judged = [sound_features(x) for x in (wav, wav.mean(0, keepdim=True), wav[:1])]
    (stereo, mono, left) = (sound_metrics(features, judged[1], judged[1]) for features in judged)
    assert stereo == mono != left
