"""Decoding: every format front to back, whatever its header says; windows, and what is refused."""

import os
import struct
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch

from lib.audio.decode import AudioError, Decoder, read_windows
from lib.audio.files import check_audio, load_audio

RATE, SECONDS = 44_100, 6


def music(seconds: float = SECONDS, rate: int = RATE, channels: int = 2, seed: int = 0) -> np.ndarray:
    """Chirps with bursts of noise between rests, so that bit rates vary, `[C, N]`."""
    time = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).standard_normal((channels, len(time)))
    sweep = np.stack([np.sin(2 * np.pi * (200 + 300 * c + 150 * time) * time) for c in range(channels)])
    return (0.3 * sweep * (time % 2 > 0.7) + 0.1 * noise * (time % 1 < 0.2)).astype(np.float32)


def encode(path: Path, codec: str, samples: np.ndarray | None = None, rate: int = RATE, muxer=None, **options) -> Path:
    samples = music(rate=rate) if samples is None else samples
    layout = {1: "mono", 2: "stereo", 6: "5.1"}[len(samples)]
    with av.open(str(path), "w", options=muxer or {}) as container:
        stream = container.add_stream(codec, rate=rate, layout=layout, options=options)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
        frame.sample_rate = rate
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return path


def by_soundfile(path: Path, subtype: str, rate: int = RATE) -> Path:
    soundfile.write(path, music(rate=rate).T, rate, subtype=subtype)
    return path


VARIABLE = {"flags": "+qscale", "global_quality": str(6 * 118)}  # LAME's -V 6
FILES = {
    "pcm16.wav": lambda path: by_soundfile(path, "PCM_16"),
    "pcm24.wav": lambda path: by_soundfile(path, "PCM_24"),
    "8bit.wav": lambda path: by_soundfile(path, "PCM_U8"),
    "float.wav": lambda path: by_soundfile(path, "FLOAT"),
    "double.wav": lambda path: by_soundfile(path, "DOUBLE"),
    "rf64.wav": lambda path: encode(path, "pcm_s16le", muxer={"rf64": "always"}),
    "a.w64": lambda path: encode(path, "pcm_s24le"),
    "a.aiff": lambda path: by_soundfile(path, "PCM_24"),
    "a.flac": lambda path: by_soundfile(path, "PCM_16"),
    "vorbis.ogg": lambda path: by_soundfile(path, "VORBIS"),
    "opus.ogg": lambda path: encode(path, "libopus", rate=48_000),
    "a.opus": lambda path: encode(path, "libopus", rate=48_000),
    "constant.mp3": lambda path: encode(path, "libmp3lame"),
    "variable.mp3": lambda path: encode(path, "libmp3lame", **VARIABLE),
    "no_xing.mp3": lambda path: encode(path, "libmp3lame", muxer={"write_xing": "0"}, **VARIABLE),
    "a.m4a": lambda path: encode(path, "aac"),
    "a.aac": lambda path: encode(path, "aac"),
}
LOSSLESS = [name for name in FILES if name.endswith((".wav", ".w64", ".aiff", ".flac"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("formats")
    for name, write in FILES.items():
        write(folder / name)
    return folder


# --- what is decoded --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_files_are_decoded_as_by_libsndfile(folder, name):
    found = load_audio(folder / name, sample_rate=RATE, channels=None)
    wanted = soundfile.read(folder / name, dtype="float32")[0].T
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("name", "decibels"), [("vorbis.ogg", 90), ("constant.mp3", 90), ("opus.ogg", 30)])
def test_lossy_files_are_decoded_as_by_another_decoder(folder, name, decibels):
    """At once: libsndfile's own blocks and seeks of an MP3 differ from its decode of the whole."""
    wanted, rate = soundfile.read(folder / name)
    found = load_audio(folder / name, sample_rate=rate, channels=None).numpy().T
    assert found.shape == wanted.shape
    assert 10 * np.log10(np.square(wanted).sum() / np.square(found - wanted).sum()) > decibels


@pytest.mark.parametrize("name", FILES)
def test_every_file_has_the_length_of_what_was_written(folder, name):
    """Encoders pad; what says how much (Xing, Opus, MP4) is followed."""
    report = check_audio(folder / name)
    seconds = report.num_frames / report.sample_rate
    padding = 0.06 if name in ("no_xing.mp3", "a.m4a", "a.aac") else 0
    assert SECONDS <= seconds <= SECONDS + padding
    assert report.channels == 2


@pytest.mark.parametrize("rate", [None, 24_000, 48_000])
@pytest.mark.parametrize("name", FILES)
def test_every_window_is_a_slice_of_one_decode(folder, name, rate):
    rate = rate or check_audio(folder / name).sample_rate
    whole = load_audio(folder / name, sample_rate=rate, channels=None)
    draw = np.random.default_rng(0)
    offsets = sorted(map(int, draw.integers(0, whole.shape[1] - 500, 20)))
    windows = [(offset, int(draw.integers(1, rate))) for offset in offsets]
    windows += [(whole.shape[1] - 500, 400), (whole.shape[1] - 300, None), (whole.shape[1] + 5, 10)]
    found = list(read_windows(folder / name, windows, rate, mix=False))
    report = check_audio(folder / name)
    for (offset, length), window in zip(windows, found, strict=True):
        wanted = whole[:, offset : None if length is None else offset + length]
        torch.testing.assert_close(window, wanted, rtol=0, atol=1e-6)
        torch.testing.assert_close(load_audio(report, offset, length, rate, channels=None), wanted, rtol=0, atol=1e-6)
    for offset, length in windows[:20:7]:
        wanted = whole[:, offset : offset + length].mean(dim=0, keepdim=True)
        torch.testing.assert_close(load_audio(folder / name, offset, length, rate), wanted, rtol=0, atol=1e-6)


def test_windows_are_read_in_one_decode_and_go_forward_only(folder, monkeypatch):
    opened, open_container = [], av.open
    monkeypatch.setattr(av, "open", lambda *args, **options: opened.append(args) or open_container(*args, **options))
    windows = [(0, 10), (0, 20), (5, 30_000), (60_000, 5)]
    assert [window.shape for window in read_windows(folder / "a.flac", windows, 24_000)] == [
        (1, length) for _, length in windows
    ]
    assert len(opened) == 1
    with pytest.raises(ValueError, match="must follow each other"):
        list(read_windows(folder / "a.flac", [(100, 10), (99, 10)], 24_000))


# --- lengths that a header does not say, or says wrongly --------------------------------------------------------------


def test_an_mp3_without_a_xing_header_is_as_long_as_it_is(tmp_path):
    """It begins with silence, so that its length cannot be guessed from the first frames' bit rate."""
    samples = np.concatenate([np.zeros((2, 2 * RATE), np.float32), music(20)], axis=1)
    path = encode(tmp_path / "a.mp3", "libmp3lame", samples, muxer={"write_xing": "0"}, **VARIABLE)
    assert abs(soundfile.info(path).duration - 22) > 1
    report = check_audio(path)
    assert report.num_frames == pytest.approx(22 * RATE, abs=3 * 1152)


@pytest.mark.parametrize("name", ["constant.mp3", "variable.mp3", "no_xing.mp3"])
def test_joined_files_are_read_to_their_end(folder, tmp_path, name):
    path = tmp_path / name
    path.write_bytes(2 * (folder / name).read_bytes())
    once, twice = (check_audio(where).num_frames for where in (folder / name, path))
    assert abs(twice - 2 * once) <= 3 * 1152  # what encoders pad; the first frame after the seam may lack its reservoir
    first, both = load_audio(folder / name, sample_rate=RATE), load_audio(path, sample_rate=RATE)
    torch.testing.assert_close(both[:, : once - 3000], first[:, : once - 3000], rtol=0, atol=1e-6)
    second, middle = both[0, once:], first[0, 3 * RATE : 4 * RATE]
    differences = [float((second[3 * RATE + lag :][:RATE] - middle).abs().max()) for lag in range(-1152, 2 * 1152)]
    assert min(differences) < 1e-3


@pytest.mark.parametrize(
    ("first", "second"), [((RATE, 2), (22_050, 2)), ((RATE, 2), (RATE, 1)), ((RATE, 1), (RATE, 2))]
)
@pytest.mark.parametrize(("suffix", "codec"), [("mp3", "libmp3lame"), ("aac", "aac")])
def test_a_file_whose_second_part_is_of_another_kind_is_refused(tmp_path, first, second, suffix, codec):
    parts = [
        encode(tmp_path / f"{i}.{suffix}", codec, music(rate=rate, channels=channels), rate)
        for i, (rate, channels) in enumerate((first, second))
    ]
    path = tmp_path / f"joined.{suffix}"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    becomes = rf"at 6\.\d\d s it becomes {second[0]} Hz with {second[1]} channel\(s\); split it"
    with pytest.raises(AudioError, match=rf"joined\.{suffix}: {becomes}"):
        check_audio(path)


def test_chained_ogg_is_read_to_its_end_or_refused(folder, tmp_path):
    """FFmpeg's Vorbis decoder keeps the first part's codebooks: what follows would be noise."""
    path = tmp_path / "chained.ogg"
    for name in ("opus.ogg", "vorbis.ogg"):
        path.write_bytes((folder / name).read_bytes() + (folder / name).read_bytes())
        if name == "opus.ogg":
            assert check_audio(path).num_frames == 2 * check_audio(folder / name).num_frames
    with pytest.raises(AudioError, match=r"chained\.ogg: several Ogg Vorbis recordings in one; split them"):
        check_audio(path)


@pytest.mark.parametrize("name", ["a.mka", "a.caf"])
def test_containers_that_do_not_tell_half_a_file_are_refused(tmp_path, name):
    path = encode(tmp_path / name, "pcm_s16le")
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(AudioError, match=r"not audio, or truncated in its header; use WAV"):
        check_audio(path)


def test_a_flac_from_a_pipe_is_good(folder, tmp_path):
    content = bytearray((folder / "a.flac").read_bytes())
    content[21] &= 0xF0  # of STREAMINFO's total, 36 bits
    content[22:26] = bytes(4)
    (tmp_path / "pipe.flac").write_bytes(content)
    assert check_audio(tmp_path / "pipe.flac").num_frames == SECONDS * RATE


@pytest.mark.parametrize("size", [0, 0x7FFF_F000, 0x7FFF_EFFC, 0x7FFF_EFFF, 0x7FFF_FFFF, 0xFFFF_FFFF])
def test_a_wav_from_a_pipe_is_good(folder, tmp_path, size):
    content = bytearray((folder / "pcm16.wav").read_bytes())
    for at in (4, content.index(b"data") + 4):
        content[at : at + 4] = struct.pack("<I", size)
    (tmp_path / "pipe.wav").write_bytes(content)
    assert check_audio(tmp_path / "pipe.wav").num_frames == SECONDS * RATE


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0.995, 0.5, 0.2])
@pytest.mark.parametrize("name", [name for name in FILES if name not in ("no_xing.mp3", "a.aac")])  # which do not say
def test_a_part_of_a_file_is_refused(folder, tmp_path, name, kept):
    if name.endswith(".mp3") and kept > 0.9:
        pytest.skip("an MP3 may lack its last second")
    content = (folder / name).read_bytes()
    path = tmp_path / ("named.wav" if name == "a.aiff" else name)
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(AudioError, match=r"truncated"):
        check_audio(path)


def test_the_container_decides_and_not_the_name(folder, tmp_path):
    path = tmp_path / "m4a.mp3"
    path.write_bytes((folder / "a.m4a").read_bytes())
    assert check_audio(path).num_frames == check_audio(folder / "a.m4a").num_frames


@pytest.mark.parametrize(
    "content", ["#EXTM3U\n#EXTINF:6,\n{}\n#EXT-X-ENDLIST\n", "ffconcat version 1.0\nfile '{}'\n", "v=0\nm=audio {}\n"]
)
@pytest.mark.parametrize("suffix", [".mp3", ".wav", ".m3u8"])
def test_a_file_never_opens_another_one(folder, tmp_path, content, suffix):
    path = tmp_path / f"list{suffix}"
    path.write_text(content.format(folder / "pcm16.wav"))
    with pytest.raises(AudioError, match="not audio"):
        check_audio(path)


def test_channels_that_cancel_are_named_where_they_are_mixed(tmp_path):
    left = music(channels=1)
    soundfile.write(tmp_path / "a.wav", np.concatenate([left, -left]).T, RATE, subtype="FLOAT")
    with pytest.raises(AudioError, match=r"a\.wav: its channels cancel in the mono mix .*; invert one of them"):
        check_audio(tmp_path / "a.wav")
    assert check_audio(tmp_path / "a.wav", mix=False).channels == 2
    soundfile.write(tmp_path / "silent.wav", 0 * left.T, RATE, subtype="FLOAT")
    with pytest.raises(AudioError, match="silent throughout"):
        check_audio(tmp_path / "silent.wav")


def test_six_channels_are_read_from_every_container(tmp_path):
    samples = music(channels=6)
    for name, codec in (("a.wav", "pcm_f32le"), ("a.m4a", "aac"), ("a.opus", "libopus")):
        rate = 48_000 if codec == "libopus" else RATE
        path = encode(tmp_path / name, codec, samples, rate)
        assert load_audio(path, sample_rate=rate, channels=None).shape[0] == check_audio(path).channels == 6


def test_a_decoder_closes_its_file(folder):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with Decoder(folder / "a.m4a") as file:
            next(file.blocks())
        next(read_windows(folder / "variable.mp3", [(0, 10)], RATE))
    assert len(os.listdir("/proc/self/fd")) <= before + 1
