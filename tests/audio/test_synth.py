"""The demo music: reproducible, varied, in the key and the tempo that it claims, and inside the codec's band."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import lib.audio.synth
from lib.audio.files import SAMPLE_RATE, load_audio, save_audio
from lib.audio.synth import (
    PEAK,
    Song,
    _exp,
    _frequency,
    _harmonics,
    _noise,
    _sin,
    make_demo_dataset,
    render_song,
)
from lib.data.pairs import build_manifest
from lib.project import DEMO_SONGS, UPPER_BAND
from lib.util.errors import UserError
from lib.util.files import file_sha256

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
        beat = 60 / Song(0, index).tempo * 100  # in lags of 10 ms
        correlation = _onset_correlation(wav)
        at_beat = correlation[round(beat) - 2 : round(beat) + 3].max()
        off_beat = correlation[round(beat * 1.13)], correlation[round(beat * 0.87)]
        assert at_beat > 0.12
        assert at_beat > 2 * max(off_beat)


def test_the_notes_are_in_the_key(songs):
    for index, wav in enumerate(songs):
        song = Song(0, index)
        chroma = _chroma(wav, song.tonic)
        inside = np.array([key == "1" for key in SCALES[song.scale]])
        assert chroma[inside].sum() > 0.8
        assert chroma[~inside].max() < chroma[inside].mean()
        assert chroma[inside].sum() > np.roll(chroma, 6)[inside].sum() + 0.2  # the key farthest away


def test_songs_differ_and_depend_on_seed_and_index_alone(songs):
    drawn = [Song(0, index) for index in range(12)]
    assert len({(song.tempo, song.tonic, song.scale) for song in drawn}) >= 10
    assert {song.scale for song in drawn} == {"major", "minor"}
    assert all(80 <= song.tempo <= 140 for song in drawn)
    for index, wav in enumerate(songs[1:], start=1):
        assert abs(np.corrcoef(songs[0], wav)[0, 1]) < 0.3, index
    assert not np.array_equal(songs[0], render_song(1, 0, len(songs[0])))


def test_drums_drop_out_in_some_section():
    song = Song(0, 0)
    assert any("d" not in section for section in song.arrangement)
    assert any("d" in section for section in song.arrangement)


def test_same_bytes_for_any_number_of_songs(tmp_path):
    few = make_demo_dataset(tmp_path / "few", num_songs=2, seconds=3)
    many = make_demo_dataset(tmp_path / "many ü", num_songs=4, seconds=3)
    assert [path.name for path in many] == ["song_00.wav", "song_01.wav", "song_02.wav", "song_03.wav"]
    assert [path.read_bytes() for path in few] == [path.read_bytes() for path in many[:2]]
    info = soundfile.info(many[0])
    assert (info.samplerate, info.channels, info.subtype, info.frames) == (24_000, 1, "PCM_16", 72_000)


def test_songs_already_there_are_kept_and_broken_ones_replaced(tmp_path):
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


def mark_songs(paths):
    """Other sound of the same length."""
    for path in paths:
        content = path.read_bytes()
        path.write_bytes(content[:44] + bytes(len(content) - 44))


def test_songs_of_other_code_are_replaced(tmp_path, edit_code):
    paths = make_demo_dataset(tmp_path, num_songs=2, seconds=1)
    before = [path.read_bytes() for path in paths]
    mark_songs(paths)
    edit_code("lib.codec.encodec")  # which the synthesiser does not import
    make_demo_dataset(tmp_path, num_songs=2, seconds=1)
    assert not any(path.read_bytes() in before for path in paths)
    for module in ("lib.audio.synth", "lib.audio.files"):
        edit_code(module)
        mine = tmp_path / "song_of_mine.wav"
        mine.write_bytes(b"mine")
        make_demo_dataset(tmp_path, num_songs=2, seconds=1)
        assert [path.read_bytes() for path in paths] == before
        assert mine.read_bytes() == b"mine"
        mark_songs(paths)


@pytest.mark.parametrize("where", ["unlink", "render_song"])
def test_no_song_of_other_code_survives_an_interruption(tmp_path, edit_code, monkeypatch, where):
    paths = make_demo_dataset(tmp_path, num_songs=3, seconds=1)
    before = [path.read_bytes() for path in paths]
    mark_songs(paths)
    edit_code("lib.audio.synth")
    calls, (holder, function) = [], (Path, Path.unlink) if where == "unlink" else (lib.audio.synth, render_song)

    def stop_at_the_second(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return function(*args, **options)

    monkeypatch.setattr(holder, where, stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        make_demo_dataset(tmp_path, num_songs=3, seconds=1)
    monkeypatch.setattr(holder, where, function)
    make_demo_dataset(tmp_path, num_songs=3, seconds=1)
    assert [path.read_bytes() for path in paths] == before


def test_songs_from_elsewhere_are_never_overwritten(tmp_path):
    mine = tmp_path / "song_00.wav"
    save_audio(mine, torch.rand(1, 1000) * 0.5)
    before = mine.read_bytes()
    with pytest.raises(UserError, match=r"song_00\.wav: not a generated demo song"):
        make_demo_dataset(tmp_path, num_songs=1, seconds=2)
    assert mine.read_bytes() == before


def test_a_folder_that_cannot_be_created(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="choose another folder"):
        make_demo_dataset(tmp_path / "file" / "demo", num_songs=1, seconds=2)


# --- the same bits everywhere -----------------------------------------------------------------------------------------

HASHES = """
import hashlib, json
from lib.audio.synth import render_song
songs = [render_song(0, index, 3 * rate, rate) for rate in (24_000, 48_000) for index in (0, 1)]
print(json.dumps([hashlib.sha256(song.tobytes()).hexdigest() for song in songs]))
"""


def test_songs_are_the_same_to_the_bit_without_the_processors_extensions():
    names = np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])
    plain = {"NPY_DISABLE_CPU_FEATURES": " ".join(names), "ATEN_CPU_CAPABILITY": "default"}
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", HASHES]
    found = subprocess.run(command, env=os.environ | plain, capture_output=True, text=True, check=True).stdout
    songs = [render_song(0, index, 3 * rate, rate) for rate in (24_000, 48_000) for index in (0, 1)]
    assert json.loads(found) == [hashlib.sha256(song.tobytes()).hexdigest() for song in songs]


def test_the_demo_songs_and_their_pairs_are_these(tmp_path):
    """After an intended change of the synthesiser, the split or the pairs, pin the new hashes."""
    first, *_ = make_demo_dataset(tmp_path / "demo", num_songs=DEMO_SONGS)
    assert file_sha256(first) == "1d0df6e7ce792a00e95ff2fc89e8484ae3a3eef53929fd91ad463f8041cbc855"
    (upper,) = make_demo_dataset(tmp_path / "demo_48k", **UPPER_BAND | {"num_songs": 1})
    assert file_sha256(upper) == "739ab3c8c519ce8d95fb47990defc07c77a7047d6377cd8fa2fa871911ef13d3"
    manifest = build_manifest(tmp_path / "demo", tmp_path / "manifest.json", 4.0)
    pairs = json.dumps([asdict(pair) for pair in manifest.pairs]).encode()
    assert hashlib.sha256(pairs).hexdigest() == "0a872189bf4a9d5cbcc6323f40a580cdf30e7e3e8ec129add7f14fd08e283b9a"


def test_files_hold_the_rounded_samples(tmp_path):
    for rate in (24_000, 48_000):
        (path,) = make_demo_dataset(tmp_path / str(rate), num_songs=1, seconds=1, sample_rate=rate)
        samples, found = soundfile.read(path, dtype="int16")
        assert found == rate
        np.testing.assert_array_equal(samples, np.rint(2**15 * render_song(0, 0, rate, rate)))
        assert path.stat().st_size == 44 + 2 * rate  # a plain header


def test_elementary_functions_are_numpys():
    x = np.concatenate([np.linspace(-40, 40, 100_001), [0.0, 0.25, -0.5, 1e-9, 1000.125]])
    assert np.abs(_sin(x) - np.sin(2 * np.pi * x)).max() < 1e-11
    assert np.abs(_sin(20_000 + x) - np.sin(2 * np.pi * x)).max() < 1e-9
    assert np.abs(_exp(x[:-1]) / np.exp(x[:-1]) - 1).max() < 1e-12
    assert [_frequency(note) for note in range(24, 100)] == pytest.approx(
        [440 * 2 ** ((note - 69) / 12) for note in range(24, 100)], rel=1e-14
    )
    assert [lib.audio.synth._power(n, "0.7") for n in range(1, 17)] == pytest.approx(
        [n**0.7 for n in range(1, 17)], rel=1e-14
    )
    noise, drawn = _noise(np.random.default_rng(0), 10_000), np.random.default_rng(0).standard_normal(10_000)
    assert 0 < np.abs(noise - drawn).max() <= 2**-21


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
    assert np.abs(_harmonics(phase / (2 * np.pi), 7, 159) - wanted).max() < 1e-9
    assert not _harmonics(phase, 9, 8).any()


def test_songs_of_another_rate_are_replaced(tmp_path):
    (path,) = make_demo_dataset(tmp_path, num_songs=1, seconds=1.0)
    assert soundfile.info(path).samplerate == SAMPLE_RATE
    make_demo_dataset(tmp_path, num_songs=1, seconds=1.0, sample_rate=48_000)
    assert soundfile.info(path).samplerate == 48_000
    assert soundfile.info(path).frames == 48_000


def test_stems_are_the_parts_of_a_song_at_their_level():
    """Each part plays what it plays in the whole song; all parts are the song."""
    length = 8 * SAMPLE_RATE
    song, drums, rest = (render_song(0, 1, length, parts=parts) for parts in ("dbcm", "d", "bcm"))
    assert np.array_equal(song, render_song(0, 1, length))
    error = np.square(drums + rest - song).mean() / np.square(song).mean()
    assert error < 0.05  # the song's compression
    assert (
        np.square(render_song(0, 1, length, parts="d") + 0.5 * rest - song).mean() > 2 * error * np.square(song).mean()
    )
    assert np.abs(render_song(0, 1, length, parts="")).max() == 0
    assert min(np.abs(drums).max(), np.abs(rest).max()) > 0.2
    assert abs(np.corrcoef(drums, rest)[0, 1]) < 0.2


def test_other_tables_make_the_songs_anew(tmp_path, monkeypatch):
    (song,) = make_demo_dataset(tmp_path / "songs", num_songs=1, seconds=1.0)
    written = song.stat().st_mtime_ns
    other = tmp_path / "other.toml"
    other.write_text(lib.audio.synth.MUSIC.read_text() + "# changed\n")
    make_demo_dataset(tmp_path / "songs", num_songs=1, seconds=1.0)
    assert song.stat().st_mtime_ns == written
    monkeypatch.setattr(lib.audio.synth, "MUSIC", other)
    make_demo_dataset(tmp_path / "songs", num_songs=1, seconds=1.0)
    assert song.stat().st_mtime_ns > written
