"""The demo music: reproducible, varied, in the key and the tempo that it claims, and inside the codec's band."""

import numpy as np
import pytest
import soundfile
import torch

from lib.audio import SAMPLE_RATE, load_audio, save_audio
from lib.errors import UserError
from lib.synth import PEAK, _harmonics, draw_song, make_demo_dataset, render_song

SECONDS = 24
SCALES = {"major": "101011010101", "minor": "101101011010"}  # black and white keys from the tonic up


@pytest.fixture(scope="module")
def songs():
    return [render_song(seed=0, index=index, num_samples=SECONDS * SAMPLE_RATE) for index in range(6)]


def _power(wav):
    return np.fft.rfftfreq(len(wav), 1 / SAMPLE_RATE), np.abs(np.fft.rfft(wav)) ** 2


def _onset_correlation(wav, hop=240):
    """Autocorrelation of the spectral flux, one value per 10 ms of lag."""
    frames = wav[: len(wav) // hop * hop].reshape(-1, hop)
    flux = np.maximum(np.diff(np.log1p(20 * np.abs(np.fft.rfft(frames, axis=1))), axis=0), 0).sum(1)
    flux -= flux.mean()
    correlation = np.correlate(flux, flux, "full")[len(flux) - 1 :]
    return correlation / correlation[0]


def _chroma(wav, tonic):
    """Share of the energy between 60 and 2000 Hz in each of the 12 semitones from the tonic up."""
    frequency, power = _power(wav)
    band = (frequency > 60) & (frequency < 2000)
    semitone = np.round(69 + 12 * np.log2(frequency[band] / 440) - tonic).astype(int) % 12
    return np.bincount(semitone, power[band], 12) / power[band].sum()


def test_songs_are_finite_have_the_peak_and_lie_in_the_codecs_band(songs):
    for wav in songs:
        frequency, power = _power(wav)
        assert np.isfinite(wav).all()
        assert np.abs(wav).max() == pytest.approx(PEAK)
        assert 0.1 < wav.std() < 0.4  # neither near silence nor a wall of noise
        assert 0.95 < power[frequency < 4800].sum() / power.sum() < 1
        assert power[frequency < 150].sum() > 0.05 * power.sum()  # there is a bass
        seconds = wav.reshape(SECONDS, -1).std(axis=1)
        assert (seconds[:-1] > 0.02).all()  # no hole in the arrangement


def test_the_tempo_is_audible(songs):
    for index, wav in enumerate(songs):
        beat = 60 / draw_song(0, index)[0].tempo * 100  # in lags of 10 ms
        correlation = _onset_correlation(wav)
        at_beat = correlation[round(beat) - 2 : round(beat) + 3].max()
        off_beat = correlation[round(beat * 1.13)], correlation[round(beat * 0.87)]
        assert at_beat > 0.12
        assert at_beat > 2 * max(off_beat)


def test_the_notes_are_in_the_key(songs):
    for index, wav in enumerate(songs):
        song, _ = draw_song(0, index)
        chroma = _chroma(wav, song.tonic)
        inside = np.array([key == "1" for key in SCALES[song.scale]])
        assert chroma[inside].sum() > 0.8
        assert chroma[~inside].max() < chroma[inside].mean()
        assert chroma[inside].sum() > np.roll(chroma, 6)[inside].sum() + 0.2  # the key farthest away


def test_songs_differ_and_depend_on_seed_and_index_alone(songs):
    drawn = [draw_song(0, index)[0] for index in range(12)]
    assert len({(song.tempo, song.tonic, song.scale) for song in drawn}) >= 10
    assert {song.scale for song in drawn} == {"major", "minor"}
    assert all(80 <= song.tempo <= 140 for song in drawn)
    for index, wav in enumerate(songs[1:], start=1):
        assert abs(np.corrcoef(songs[0], wav)[0, 1]) < 0.3, index
    assert not np.array_equal(songs[0], render_song(1, 0, len(songs[0])))


def test_drums_drop_out_in_some_section():
    song, _ = draw_song(0, 0)
    assert any("d" not in section for section in song.arrangement)
    assert any("d" in section for section in song.arrangement)


def test_same_bytes_whatever_the_number_of_songs(tmp_path):
    few = make_demo_dataset(tmp_path / "few", num_songs=2, seconds=3)
    many = make_demo_dataset(tmp_path / "many ü", num_songs=4, seconds=3)
    assert [path.name for path in many] == ["song_00.wav", "song_01.wav", "song_02.wav", "song_03.wav"]
    assert [path.read_bytes() for path in few] == [path.read_bytes() for path in many[:2]]
    info = soundfile.info(many[0])
    assert (info.samplerate, info.channels, info.subtype, info.frames) == (24_000, 1, "PCM_16", 72_000)


def test_songs_already_there_are_kept_and_broken_ones_made_again(tmp_path):
    paths = make_demo_dataset(tmp_path, num_songs=3, seconds=2)
    before = [path.read_bytes() for path in paths]
    times = [path.stat().st_mtime_ns for path in paths]
    paths[1].write_bytes(before[1][:1000])
    paths[2].unlink()
    make_demo_dataset(tmp_path, num_songs=3, seconds=2)
    assert [path.read_bytes() for path in paths] == before
    assert paths[0].stat().st_mtime_ns == times[0]
    make_demo_dataset(tmp_path, num_songs=3, seconds=3)
    assert load_audio(paths[0]).shape == (1, 72_000)


def test_another_seed_replaces_the_songs(tmp_path):
    (path,) = make_demo_dataset(tmp_path, num_songs=1, seconds=2, seed=0)
    before = path.read_bytes()
    make_demo_dataset(tmp_path, num_songs=1, seconds=2, seed=1)
    assert path.read_bytes() != before


def test_songs_from_elsewhere_are_never_overwritten(tmp_path):
    mine = tmp_path / "song_00.wav"
    save_audio(mine, torch.rand(1, 1000) * 0.5)
    before = mine.read_bytes()
    with pytest.raises(UserError, match=r"song_00\.wav: not a generated demo song"):
        make_demo_dataset(tmp_path, num_songs=1, seconds=2)
    assert mine.read_bytes() == before


@pytest.mark.parametrize("numbers", [{"num_songs": 0}, {"seconds": 0.5}, {"seconds": float("nan")}])
def test_numbers_that_make_no_sense(tmp_path, numbers):
    with pytest.raises(UserError, match="at least one song of 1 to 600 seconds"):
        make_demo_dataset(tmp_path, **numbers)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="choose another folder"):
        make_demo_dataset(tmp_path / "file" / "demo", num_songs=1, seconds=2)


# --- for super-resolution ---------------------------------------------------------------------------------------------


def test_at_48_khz_tones_and_drums_reach_into_the_upper_band():
    wav = render_song(0, 0, 8 * 48_000, 48_000)
    power = np.abs(np.fft.rfft(wav)) ** 2
    kilohertz = np.fft.rfftfreq(len(wav), 1 / 48_000) / 1000
    shares = [power[(kilohertz > a) & (kilohertz < b)].sum() / power.sum() for a, b in ((5, 10), (10, 20))]
    assert min(shares) > 1e-4


def test_a_series_of_harmonics_is_their_sum():
    phase = np.linspace(0, 300, 5000)
    wanted = sum(np.sin(n * phase) / n for n in range(7, 160))
    assert np.abs(_harmonics(phase, 7, 159) - wanted).max() < 1e-9
    assert not _harmonics(phase, 9, 8).any()


def test_songs_of_another_rate_are_made_anew(tmp_path):
    (path,) = make_demo_dataset(tmp_path, num_songs=1, seconds=1.0)
    assert soundfile.info(path).samplerate == SAMPLE_RATE
    make_demo_dataset(tmp_path, num_songs=1, seconds=1.0, sample_rate=48_000)
    assert soundfile.info(path).samplerate == 48_000
    assert soundfile.info(path).frames == 48_000
    with pytest.raises(UserError, match="sample_rate 44100: use 24000 or 48000"):
        make_demo_dataset(tmp_path, sample_rate=44_100)
