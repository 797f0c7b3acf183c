"""Reading, writing and checking audio files. Every file is written by the test that needs it."""

import hashlib
import math
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import soundfile
import torch
import torchaudio

from lib.audio import decode
from lib.audio import files as audio
from lib.audio.files import (
    SAMPLE_RATE,
    AudioError,
    AudioWriter,
    Skipped,
    check_audio,
    load_audio,
    save_audio,
    walk_audio,
)
from lib.audio.levels import CEILING
from lib.audio.synth import make_demo_dataset
from lib.util.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def tone(seconds=1.0, rate=SAMPLE_RATE, channels=1, frequency=440.0, seed=0):
    """A sine with a little noise, `[n, channels]`, peak about 0.5; each channel a little softer than the one before."""
    time = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).standard_normal(len(time))
    mono = 0.4 * np.sin(2 * np.pi * frequency * time) + 0.01 * noise
    return mono[:, None] * np.linspace(1, 0.5, channels)


def write(path, samples, rate=SAMPLE_RATE, **options):
    """In pieces: libsndfile's Vorbis encoder crashes on one large write."""
    with soundfile.SoundFile(path, "w", rate, samples.shape[1], **options) as file:
        for start in range(0, len(samples), 10_000):
            file.write(samples[start : start + 10_000])
    return path


def snr(reference, estimate):
    return 10 * torch.log10((reference**2).mean() / ((reference - estimate) ** 2).mean()).item()


# ---- reading


@pytest.mark.parametrize(
    ("name", "subtype", "min_snr"),
    [
        ("a.wav", "PCM_16", 70),
        ("a.wav", "PCM_24", 110),
        ("a.wav", "FLOAT", 130),
        ("a.wav", "DOUBLE", 130),
        ("a.flac", "PCM_16", 70),
        ("a.flac", "PCM_24", 110),
        ("a.ogg", "VORBIS", 20),
        ("a.mp3", "MPEG_LAYER_III", 20),
    ],
)
@pytest.mark.parametrize("channels", [1, 2])
def test_formats_come_back_as_the_mono_mix(tmp_path, name, subtype, min_snr, channels):
    samples = tone(2, channels=channels)
    wav = load_audio(write(tmp_path / name, samples, subtype=subtype))
    assert wav.shape == (1, 48_000)
    assert wav.dtype == torch.float32
    assert snr(torch.from_numpy(samples.mean(axis=1)).float()[None], wav) > min_snr


def test_six_channels_are_averaged(tmp_path):
    samples = tone(channels=6)
    wav = load_audio(write(tmp_path / "surround.wav", samples, subtype="FLOAT"))
    torch.testing.assert_close(wav[0], torch.from_numpy(samples.mean(axis=1)).float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 24_000, 44_100, 44_099, 48_000, 96_000])
def test_any_rate_gives_the_same_tone_at_24_khz(tmp_path, rate):
    path = write(tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * 440 * np.arange(2 * rate) / rate)[:, None], rate)
    wav = load_audio(path)
    assert wav.shape[1] == check_audio(path).samples_at() == pytest.approx(48_000, abs=2)
    expected = 0.5 * torch.sin(2 * torch.pi * 440 * torch.arange(wav.shape[1]) / 24_000)
    assert snr(expected[1000:-1000], wav[0, 1000:-1000]) > 40


@pytest.mark.parametrize("rate", [8_000, 11_025, 24_000, 44_100, 44_099, 48_000, 96_000])
def test_a_window_equals_the_slice_of_the_whole_file(tmp_path, rate):
    path = write(tmp_path / "a.wav", tone(3, rate, channels=2), rate, subtype="FLOAT")
    whole = load_audio(path)
    for offset, length in [(0, 1), (0, 24_000), (1, 5_000), (31_007, 12_345), (60_000, None), (whole.shape[1] - 1, 9)]:
        end = None if length is None else offset + length
        torch.testing.assert_close(load_audio(path, offset, length), whole[:, offset:end], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "rates", [(44_100, 24_000), (48_000, 24_000), (8_000, 24_000), (22_050, 48_000), (44_099, 24_000)]
)
@pytest.mark.parametrize("length", [0, 1, 999, 70_001])
def test_resampling_equals_torchaudios_at_any_rate_and_length(rates, length):
    """To the sample, also where torchaudio alone would round the length."""
    ratio = decode.rate_ratio(*rates)
    native, target = ratio.as_integer_ratio()
    wav = torch.randn(2, length, generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(wav, (0, native * math.ceil(64 / target)))
    expected = torchaudio.transforms.Resample(native, target)(padded)[:, : math.ceil(length / ratio)]
    torch.testing.assert_close(decode.resample(wav, *rates), expected, rtol=0, atol=1e-6)


def test_the_whole_file_equals_torchaudios_resample(tmp_path):
    samples = tone(1, 44_100)
    path = write(tmp_path / "a.wav", samples, 44_100, subtype="FLOAT")
    expected = torchaudio.functional.resample(torch.from_numpy(samples.T).double(), 44_100, SAMPLE_RATE).float()
    torch.testing.assert_close(load_audio(path), expected, atol=1e-6, rtol=0)


def test_the_length_is_exact_past_the_precision_of_float32(tmp_path):
    """torchaudio computes its output length in float32, which has no odd numbers past 2**24 (12 minutes)."""
    path = write(tmp_path / "a.wav", tone(750, 8_000)[:-1], 8_000)
    assert load_audio(path).shape[1] == check_audio(path).samples_at() == 3 * 5_999_999


@pytest.mark.parametrize("name", ["a.flac", "a.ogg", "a.mp3"])
def test_windows_of_compressed_files_are_exact(tmp_path, name):
    """libsndfile alone is not: its Vorbis seek is wrong inside the last page of the file."""
    path = write(tmp_path / name, tone(20, 44_100), 44_100)
    whole = load_audio(path, sample_rate=44_100)
    near_end = range(whole.shape[1] - 25_000, whole.shape[1] - 1_000, 1_500)
    for offset in [1, 44_100, 300_001, *near_end]:
        window = load_audio(path, offset, 900, sample_rate=44_100)
        torch.testing.assert_close(window, whole[:, offset : offset + 900], atol=1e-5, rtol=0)


def test_a_window_past_the_end_returns_what_there_is(tmp_path):
    path = write(tmp_path / "a.wav", tone(1))
    assert load_audio(path, 23_000, 5_000).shape == (1, 1_000)
    assert load_audio(path, 24_000, 10).shape == (1, 0)
    assert load_audio(path, 10**9).shape == (1, 0)
    with pytest.raises(ValueError, match="must not be negative"):
        load_audio(path, -1)


def test_paths_with_spaces_and_other_alphabets(tmp_path):
    folder = tmp_path / "Meine Müsik 音楽"
    folder.mkdir()
    for name in ["a b ü.wav", "ж.flac", "日本.ogg", "é.mp3"]:
        save_audio(folder / name, torch.from_numpy(tone().T) * 0.9)
        assert load_audio(str(folder / name)).shape == (1, 24_000)
        assert check_audio(folder / name).samples_at() == 24_000


def test_a_name_that_is_not_utf8(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.wav"))
    save_audio(path, torch.from_numpy(tone().T))
    assert load_audio(path).shape == (1, 24_000)


# ---- writing


def test_float_wav_keeps_what_would_clip(tmp_path):
    wav = torch.tensor([[0.0, 1.5, -3.0, 0.1]])
    save_audio(tmp_path / "a.wav", wav)
    assert torch.equal(load_audio(tmp_path / "a.wav"), wav)


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_equal_samples_make_equal_files(tmp_path, suffix):
    """libsndfile puts the second of writing into a float WAV file, beside its peak."""
    wav = torch.from_numpy(tone(channels=2).T).float()
    save_audio(tmp_path / f"a{suffix}", wav)
    time.sleep(1.1)
    with AudioWriter(tmp_path / f"b{suffix}", channels=2) as writer:
        for piece in wav.split(7_001, dim=1):
            writer.write(piece)
    first, second = ((tmp_path / f"{name}{suffix}").read_bytes() for name in "ab")
    assert first == second
    torch.testing.assert_close(load_audio(tmp_path / f"a{suffix}"), wav.mean(0, keepdim=True), atol=2**-15, rtol=0)


FORMATS = ["a.wav", "a.flac", "a.mp3", "a.ogg"]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_decodes_to_minus_one_dbtp_at_most(tmp_path, name):
    """In one piece or many. A sine between whose samples the waveform is √2 times as high counts by its waveform."""
    sine = torch.sin(torch.pi / 2 * torch.arange(48_000) + torch.pi / 4)[None]  # samples of ± 0.71
    wav = 1.2 * sine * torch.hann_window(48_000).clamp_max(0.5) * 2  # fades, as an abrupt end has a peak of its own
    loud = 4 * torch.from_numpy(tone(2, channels=2).T).float() * torch.hann_window(48_000).sqrt()
    for number, sound in enumerate((wav, loud, 0.2 * loud)):
        with AudioWriter(tmp_path / name, channels=len(sound), policy="none") as writer:
            for piece in (*sound.split(7_001, dim=1), sound[:, :0]):
                writer.write(piece)
        made = load_audio(tmp_path / name, channels=None)
        peak = true_peak(made)
        assert peak == pytest.approx(writer.level.true_peak, rel=5e-3)
        if number == 2:
            assert writer.change == 0
            assert peak == pytest.approx(true_peak(sound), rel=0.05)
            continue
        assert 0.97 * CEILING < peak < 1.005 * CEILING
        assert writer.change == pytest.approx(-20 * math.log10(true_peak(sound) / CEILING), abs=0.5)
        factor = 10 ** (writer.change / 20)
        if name in ("a.wav", "a.flac"):
            torch.testing.assert_close(made, factor * sound, rtol=1e-5, atol=2**-22)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("rate", [24_000, 48_000])
def test_loud_music_as_mp3_stays_below_the_ceiling_and_prints_nothing(tmp_path, capfd, rate):
    """Its peak is another at every level, and does not settle."""
    make_demo_dataset(tmp_path / "songs", num_songs=2, seconds=8)
    for path in sorted((tmp_path / "songs").glob("*.wav")):
        with AudioWriter(tmp_path / "a.mp3", rate, policy="none") as writer:
            writer.write(1.3 * load_audio(path, 0, 8 * rate, rate))
        assert 0.9 * CEILING < writer.level.true_peak < 1.001 * CEILING
    assert capfd.readouterr().err == ""  # mpg123 prints faults of good files


def true_peak(wav: torch.Tensor) -> float:
    """By interpolation of the whole spectrum, 8 values to a sample."""
    return np.abs(scipy.signal.resample(wav.numpy(), 8 * wav.shape[1], axis=1)).max()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("gain", [0.01, 0.3])
def test_a_file_is_as_loud_as_is_wanted_or_as_its_peak_allows(tmp_path, name, gain):
    """The loudness by another implementation of the standard."""
    sound = gain * torch.from_numpy(tone(2, channels=2).T).float()
    with AudioWriter(tmp_path / name, channels=2, policy="lufs") as writer:
        writer.write(sound)
        writer.loudness = -20.0
    made = load_audio(tmp_path / name, channels=None)
    assert torchaudio.functional.loudness(made, SAMPLE_RATE) == pytest.approx(-20, abs=0.2)
    assert writer.level.lufs == pytest.approx(-20, abs=0.1)
    assert writer.change == pytest.approx(-20 - torchaudio.functional.loudness(sound, SAMPLE_RATE).item(), abs=0.2)
    with AudioWriter(tmp_path / name, channels=2, policy="lufs") as writer:
        writer.write(sound)
        writer.loudness = 3.0
    assert writer.level.lufs < 0
    assert true_peak(load_audio(tmp_path / name, channels=None)) == pytest.approx(CEILING, rel=0.02)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("gain", [0.01, 3])
def test_a_peak_is_brought_to_the_ceiling_from_either_side(tmp_path, name, gain):
    with AudioWriter(tmp_path / name, policy="peak") as writer:
        writer.write(gain * torch.from_numpy(tone().T).float())
    assert true_peak(load_audio(tmp_path / name)) == pytest.approx(CEILING, rel=0.02)
    assert writer.change == pytest.approx(
        -20 * math.log10(gain * true_peak(torch.from_numpy(tone().T)) / CEILING), abs=0.3
    )


def test_silence_and_less_than_the_meters_window_keep_their_level(tmp_path):
    for wav in (torch.zeros(1, 48_000), 0.1 * torch.ones(1, 9_000), torch.zeros(1, 0)):
        with AudioWriter(tmp_path / "a.wav", policy="lufs") as writer:
            writer.write(wav)
            writer.loudness = -20.0
        assert torch.equal(load_audio(tmp_path / "a.wav"), wav)
        assert writer.level.lufs == -math.inf
        assert writer.change == 0


def test_the_closing_line_says_what_is_in_the_file(tmp_path):
    time = torch.arange(2 * SAMPLE_RATE) / SAMPLE_RATE
    sine = torch.sin(2 * torch.pi * 997 * time).expand(2, -1)  # 0.0 LUFS as stereo
    with AudioWriter(tmp_path / "a.flac", channels=2, policy="none") as writer:
        writer.write(sine)
    said = (
        f"{tmp_path / 'a.flac'}: 2.00 s, stereo, band up to 1.0 kHz, -1.0 LUFS, true peak -1.0 dBTP (lowered by 1.0 dB)"
    )
    assert str(writer) == said
    with AudioWriter(tmp_path / "b.wav", policy="lufs") as writer:
        writer.write(sine[:1] / 100)
        writer.loudness = -23.0
    said = "2.00 s, mono, band up to 1.0 kHz, -23.0 LUFS, true peak -20.0 dBTP (raised by 20.0 dB)"
    assert str(writer) == f"{tmp_path / 'b.wav'}: {said}"
    with AudioWriter(tmp_path / "c.wav", channels=2, policy="lufs") as writer:
        writer.write(sine / 2)
        writer.loudness = 3.0
    assert str(writer).endswith(", -1.0 LUFS, true peak -1.0 dBTP (raised by 5.0 dB, not to 3.0 LUFS, for its peaks)")
    with pytest.raises(UserError, match="level='loud' is not allowed; use one of lufs, peak, none"):
        AudioWriter(tmp_path / "a.wav", policy="loud")


@pytest.mark.parametrize(
    ("name", "channels", "rate"), [("a.mp3", 6, 24_000), ("a.mp3", 1, 96_000), ("a.flac", 9, 24_000)]
)
def test_channels_and_rates_that_a_format_cannot_hold_are_named(tmp_path, name, channels, rate):
    words = rf"{name}: cannot hold {channels} channel\(s\) at {rate} Hz as \{name[1:]}; write a \.wav"
    with pytest.raises(AudioError, match=words):
        save_audio(tmp_path / name, torch.zeros(channels, 100), rate)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_samples_are_not_written(tmp_path, bad):
    wav = torch.zeros(1, 100)
    wav[0, 7] = bad
    with pytest.raises(AudioError, match="sample 7 is NaN or infinite"):
        save_audio(tmp_path / "a.wav", wav)
    assert list(tmp_path.iterdir()) == []


def test_the_writer_joins_pieces_and_shows_the_file_only_when_complete(tmp_path):
    wav = torch.from_numpy(tone(channels=2).T).float()
    with AudioWriter(tmp_path / "a.wav", channels=2) as writer:
        for piece in wav.split(7_001, dim=1):
            writer.write(piece)
        assert not (tmp_path / "a.wav").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]
    assert np.array_equal(soundfile.read(tmp_path / "a.wav", dtype="float32")[0].T, wav.numpy())


def test_an_interrupted_writer_leaves_the_old_file_and_no_temporary_one(tmp_path):
    save_audio(tmp_path / "a.wav", torch.full((1, 10), 0.5))

    def interrupted():
        with AudioWriter(tmp_path / "a.wav") as writer:
            writer.write(torch.zeros(1, 99))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]
    assert torch.equal(load_audio(tmp_path / "a.wav"), torch.full((1, 10), 0.5))


def test_a_long_ogg_can_be_written_at_once(tmp_path):
    """libsndfile's Vorbis encoder crashes the process on one write of this size."""
    save_audio(tmp_path / "a.ogg", torch.from_numpy(tone(120).T))
    assert soundfile.info(tmp_path / "a.ogg").frames == 120 * SAMPLE_RATE


def test_wrong_shapes_and_suffixes(tmp_path):
    with pytest.raises(ValueError, match=r"\[C, N\]"):
        save_audio(tmp_path / "a.wav", torch.zeros(10))
    with pytest.raises(AudioError, match=r"cannot write \.m4a; use \.flac"):
        save_audio(tmp_path / "a.m4a", torch.zeros(1, 10))


def test_folders_that_cannot_be_written(tmp_path, monkeypatch):
    with pytest.raises(AudioError, match=r"gone/a\.wav: cannot be written \(No such file or directory\)"):
        save_audio(tmp_path / "gone" / "a.wav", torch.zeros(1, 10))
    (tmp_path / "file").write_text("x")
    with pytest.raises(AudioError, match="Not a directory"):
        save_audio(tmp_path / "file" / "a.wav", torch.zeros(1, 10))
    monkeypatch.setattr(
        audio, "open", _deny, raising=False
    )  # the superuser may write anywhere, so chmod proves nothing
    with pytest.raises(AudioError, match=r"cannot be written \(Permission denied\); choose an existing folder"):
        save_audio(tmp_path / "a.wav", torch.zeros(1, 10))


def _deny(*_):
    raise PermissionError(13, "Permission denied")


# ---- bad files: each is refused by check_audio, with the file's name, the fault and the fix


def refusal(path, function=check_audio):
    with pytest.raises(AudioError) as caught:
        function(path)
    message = str(caught.value)
    assert isinstance(caught.value, UserError)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert ";" in message  # what is wrong; how to fix it
    return message


@pytest.mark.parametrize("function", [check_audio, load_audio])
def test_files_that_cannot_be_opened(tmp_path, monkeypatch, function):
    assert "no such file" in refusal(tmp_path / "gone.wav", function)
    assert "a folder" in refusal(tmp_path, function)
    (tmp_path / "empty.wav").touch()
    assert "0 bytes" in refusal(tmp_path / "empty.wav", function)
    for name in ("text.wav", "text.mp3", "text.raw"):
        (tmp_path / name).write_text("this is not music\n" * 500)
        assert "not audio" in refusal(tmp_path / name, function)
    os.mkfifo(tmp_path / "pipe.wav")
    assert "not a regular file" in refusal(tmp_path / "pipe.wav", function)
    write(tmp_path / "slow.wav", tone(1, 100), 100)
    assert "sample rate 100 Hz" in refusal(tmp_path / "slow.wav", function)
    write(tmp_path / "secret.wav", tone())
    monkeypatch.setattr(decode, "open", _deny, raising=False)
    assert "cannot be read (Permission denied)" in refusal(tmp_path / "secret.wav", function)


@pytest.mark.parametrize("kept", [0.999, 0.6, 0.05])
@pytest.mark.parametrize("name", ["a.wav", "float.wav", "24.wav", "a.flac", "a.ogg", "a.mp3"])
def test_truncated_files(tmp_path, name, kept):
    subtype = {"float.wav": "FLOAT", "24.wav": "PCM_24"}.get(name)
    path = write(tmp_path / name, tone(10, 44_100, channels=2), 44_100, subtype=subtype)
    check_audio(path)
    size = path.stat().st_size
    if name == "a.mp3" and kept > 0.9:
        pytest.skip("an MP3 has no exact frame count: the last second may be missing")
    os.truncate(path, int(size * kept))
    assert "truncated" in refusal(path)


def test_a_damaged_flac_is_refused_also_by_load(tmp_path):
    path = write(tmp_path / "a.flac", tone(10))
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 2000] = np.random.default_rng(0).bytes(2000)
    path.write_bytes(data)
    assert "damaged" in refusal(path)
    assert "damaged" in refusal(path, load_audio)
    assert load_audio(path, 0, 24_000).shape == (1, 24_000)  # the good part stays usable


def test_a_wav_from_a_pipe_announces_an_unknown_size_and_is_good(tmp_path):
    path = write(tmp_path / "a.wav", tone())
    data = bytearray(path.read_bytes())
    for at in (4, data.index(b"data") + 4):
        data[at : at + 4] = struct.pack("<I", 0xFFFF_FFFF)
    path.write_bytes(data)
    assert check_audio(path).samples_at() == 24_000


def test_tags_after_the_samples_do_not_count_as_truncation(tmp_path):
    for name in ("a.wav", "a.mp3"):
        path = write(tmp_path / name, tone(3))
        with open(path, "ab") as stream:
            stream.write(b"TAG" + bytes(125))
        assert check_audio(path).samples_at() == pytest.approx(72_000, abs=2_500)


@pytest.mark.parametrize("function", [check_audio, load_audio])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_samples_are_named_by_their_time(tmp_path, function, bad):
    samples = tone(4, channels=2)
    samples[60_000:60_010, 1] = bad
    path = write(tmp_path / "a.wav", samples, subtype="FLOAT")
    assert "NaN or infinite sample at 2.500 s" in refusal(path, function)
    assert load_audio(path, 0, 48_000).shape == (1, 48_000)


def test_silence(tmp_path):
    assert "silent" in refusal(write(tmp_path / "zero.wav", np.zeros((24_000, 1))))
    assert "silent" in refusal(write(tmp_path / "faint.wav", tone() * 1e-4))
    left = tone()
    opposite = write(tmp_path / "opposite.wav", np.hstack([left, -left]), subtype="FLOAT")
    assert "channels cancel" in refusal(opposite)  # its mono mix is what would be used
    assert check_audio(opposite, mix=False).channels == 2
    click = np.zeros((24_000, 1))
    click[12_000] = 0.01
    assert check_audio(write(tmp_path / "click.wav", click)).samples_at() == 24_000


def test_shorter_than_a_codec_frame(tmp_path):
    assert "only 319 samples at 24 kHz" in refusal(write(tmp_path / "a.wav", tone()[:319]))
    assert "only 0 samples" in refusal(write(tmp_path / "none.wav", tone()[:0]))
    assert check_audio(write(tmp_path / "b.wav", tone()[:320])).samples_at() == 320
    assert check_audio(write(tmp_path / "c.wav", tone(1, 48_000)[:640], 48_000)).samples_at() == 320


def test_a_good_file_is_reported(tmp_path):
    path = write(tmp_path / "a.flac", tone(2, 44_100, channels=2), 44_100)
    report = check_audio(path)
    assert report.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert report.samples_at() == load_audio(path).shape[1] == 48_000
    assert (report.sample_rate, report.channels, report.num_frames) == (44_100, 2, soundfile.info(path).frames)


def test_an_hour_is_checked_and_read_in_constant_memory(tmp_path):
    path = tmp_path / "hour.wav"
    with soundfile.SoundFile(path, "w", 8_000, 1, "PCM_16") as file:
        for _ in range(60):
            file.write(tone(60, 8_000))
    program = """
import resource, sys
from lib.audio.files import check_audio, load_audio
load_audio(sys.argv[1], 0, 24_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert check_audio(sys.argv[1]).samples_at() == 3600 * 24_000
assert load_audio(sys.argv[1], 3000 * 24_000, 16 * 24_000).shape == (1, 384_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    grown = int(done.stdout) / 1024
    assert grown < 40, f"{grown:.0f} MiB"  # the hour is 110 MiB as float32 at 8 kHz


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.timeout(60)
def test_ctrl_c_ends_a_check_of_many_files_at_once(tmp_path, cores):
    """As a terminal sends it, to the processes that check as well; it was lost, or left a traceback."""
    program = """
import os, sys, time
from pathlib import Path
from lib.audio.files import check_files
from lib.util.errors import exit_on_user_error

os.sched_getaffinity = lambda _: range(int(sys.argv[2]))

def slow(path):
    Path(sys.argv[1], "begun").touch()
    time.sleep(0.1)

with exit_on_user_error():
    check_files(Path(), [str(i) for i in range(500)], slow, "checking")
"""
    asked = [sys.executable, "-c", program, str(tmp_path), str(cores)]
    with subprocess.Popen(asked, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        while not (tmp_path / "begun").exists():
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said.split("\r")[-1].splitlines()[-1] == "error: interrupted"
    assert "Traceback" not in said
    with pytest.raises(ProcessLookupError):  # nobody is left
        os.killpg(process.pid, 0)


# ---- the walk over a folder


@pytest.fixture
def music(tmp_path):
    """A folder with music, hidden files and others."""
    root = tmp_path / "Mein Ordner"
    for name in ("b/z.wav", "b/A.FLAC", "b-/y.ogg", "a.mp3", ".hidden.wav", ".cache/x.wav", "b/cover.jpg", "notes"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_music_is_listed_sorted_and_the_rest_with_a_reason(music):
    files, skipped = walk_audio(music)
    assert files == ["a.mp3", "b-/y.ogg", "b/A.FLAC", "b/z.wav"]
    assert {item.path for item in skipped} == {"b/cover.jpg", "notes"}
    assert all("not WAV, FLAC, OGG, MP3, M4A, Opus or AIFF" in item.reason and ";" in item.reason for item in skipped)


def test_ignored_files_are_not_named(music):
    _, skipped = walk_audio(music, ignore=(music / "b" / ".." / "b" / "cover.jpg",))
    assert [item.path for item in skipped] == ["notes"]


@pytest.mark.timeout(20)
def test_links_are_followed_and_loops_of_links_end(music, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "linked.wav").touch()
    (music / "b" / "loop").symlink_to(music)
    (music / "b" / "itself").symlink_to(music / "b")
    (music / "more").symlink_to(tmp_path / "elsewhere")
    (music / "broken.wav").symlink_to("gone.wav")
    assert walk_audio(music)[0] == ["a.mp3", "b-/y.ogg", "b/A.FLAC", "b/z.wav", "broken.wav", "more/linked.wav"]


def test_a_real_folder_keeps_its_name_whatever_links_to_it(music):
    """A link that sorts before train/ took its name, and the split with it."""
    (music / "a").symlink_to("b")
    (music / "c").symlink_to("b-")
    assert walk_audio(music)[0] == ["a.mp3", "b-/y.ogg", "b/A.FLAC", "b/z.wav"]


def test_a_folder_that_cannot_be_read_is_skipped_with_its_reason(music, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    files, skipped = walk_audio(music)
    assert files == ["a.mp3", "b-/y.ogg"]
    assert Skipped("b", "folder cannot be read (Permission denied); check its permissions") in skipped
