"""Fusing two files: seams that cannot be measured, memory that does not grow, lengths to the sample, and the errors."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import soundfile
import torch
import torchaudio
from conftest import write_weights

import lib.fuse
from lib.audio.decode import AudioError
from lib.audio.files import SAMPLE_RATE, load_audio
from lib.codec.codec import load_codec
from lib.codec.encodec import OFFLINE_VARIABLE
from lib.codec.mdct import MdctCodec
from lib.data.pairs import Clip
from lib.fuse import CHUNK_SECONDS, OVERLAP_SECONDS, fuse_and_restore, fuse_clips, fuse_files, main
from lib.listening.render import Settings, save_with_recipe
from lib.model.cascade import CascadeConfig
from lib.model.fusion import Fusion, FusionModel, load_model
from lib.model.masks import MaskingConfig, Masks
from lib.superres.resolver import SuperResolver, band_edge
from lib.training.run import Run
from lib.util.errors import UserError
from lib.util.files import file_sha256

CHUNK, OVERLAP = CHUNK_SECONDS * SAMPLE_RATE, OVERLAP_SECONDS * SAMPLE_RATE


@pytest.fixture(scope="module")
def codec():
    return MdctCodec()


@pytest.fixture(scope="module")
def run(tmp_path_factory, codec) -> Run:
    """An untrained model in a run directory: full width, one layer a stage, learned masks."""
    return saved_run(tmp_path_factory.mktemp("run") / "a run é", codec, CascadeConfig.reference(num_layers=1))


def saved_run(folder: Path, codec, config: CascadeConfig, steps: int = 1) -> Run:
    """A run with a checkpoint of other weights at every step, the first of them the best."""
    masking = MaskingConfig("learned")
    values = {"cascade": dataclasses.asdict(config), "masking": dataclasses.asdict(masking)}
    run = Run.create(folder, values | {"codec": {"name": codec.name, "fingerprint": codec.fingerprint}})
    for step in range(1, steps + 1):
        torch.manual_seed(step)
        run.save(step, FusionModel(config, masking), {}, is_best=step == 1)
    return run


def music(num_samples: int, rate: int = SAMPLE_RATE, channels: int = 1, seed: int = 0) -> np.ndarray:
    """`[N, C]`: a few tones below 4 kHz, and a little noise."""
    rng = np.random.default_rng(seed)
    time = np.arange(num_samples) / rate
    tones = sum(np.sin(2 * np.pi * f * time + rng.uniform(0, 6)) for f in rng.uniform(100, 4000, 4))
    return 0.1 * tones[:, None] + 0.01 * rng.standard_normal((num_samples, channels))


@pytest.fixture
def clip(tmp_path):
    """`clip(name, num_samples, rate, channels, seed)` writes a music file in the format of its suffix."""

    def write(
        name: str, num_samples: int = 12_000, rate: int = SAMPLE_RATE, channels: int = 1, seed: int = 0, **options
    ) -> Path:
        path = tmp_path / name
        soundfile.write(path, music(num_samples, rate, channels, seed), rate, **options)
        return path

    return write


# --- chunks -----------------------------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_files(tmp_path, run, codec, monkeypatch):
    """Twelve minutes: the output alone would take 69 MB, and so would each input."""
    path = tmp_path / "long.flac"
    with soundfile.SoundFile(path, "w", SAMPLE_RATE, 1) as file:
        minute = music(60 * SAMPLE_RATE)[:, 0]
        for _ in range(12):
            file.write(minute)
    used = []

    def average(input, target, model, codec, whole_band):
        used.append(psutil.Process().memory_info().rss)
        return (input + target) / 2

    monkeypatch.setattr(lib.fuse, "fuse_clips", average)
    report = fuse_files(path, path, tmp_path / "out.flac", run, codec)
    assert report.num_samples == soundfile.info(tmp_path / "out.flac").frames == 720 * SAMPLE_RATE
    assert len(used) == 48
    assert max(used[8:]) - used[8] < 30e6  # the allocator settles within 22 MB, at any length
    (out,), (wav,) = (load_audio(p, 29 * SAMPLE_RATE, 4 * SAMPLE_RATE) for p in (tmp_path / "out.flac", path))
    assert torch.allclose(out, wav, atol=1e-5)  # the average of a file with itself, across a seam


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_short_file_equals_fuse_clips(tmp_path, clip, run, codec):
    paths = clip("a.wav", 12_345, subtype="FLOAT"), clip("b.wav", 12_345, seed=1, subtype="FLOAT")
    report = fuse_files(*paths, tmp_path / "out.wav", run, codec)
    wanted = fuse_clips(*(load_audio(path)[None] for path in paths), load_model(run, "best"), codec)[0]
    written = load_audio(report.path)
    assert torch.equal(written, wanted)
    assert report.num_samples == 12_345
    assert wanted.isfinite().all()
    assert wanted.square().mean().sqrt() > 0.01


def test_fuse_clips_is_encode_model_decode(run, codec):
    model = load_model(run, "best")
    input, target = (torch.from_numpy(music(1000, seed=seed).T[None]).float() for seed in (0, 1))  # [1, 1, N]
    with torch.no_grad():
        latents = model(codec.encode(input), codec.encode(target)).latents
        wanted = codec.decode(latents, length=1000)
    assert torch.allclose(fuse_clips(input, target, model, codec, False), wanted, atol=1e-5)  # two clips in one batch
    assert not torch.allclose(fuse_clips(target, input, model, codec, False), wanted, atol=1e-3)
    assert not torch.allclose(fuse_clips(input, target, model, codec), wanted, atol=1e-3)  # has noise above the band


def test_the_order_of_the_clips_and_the_weights_matter(tmp_path, clip, run, codec):
    a, b = clip("a.wav"), clip("b.wav", seed=1)
    wavs = []
    for number, pair in enumerate(((a, b), (b, a), (a, a))):
        fuse_files(*pair, tmp_path / f"{number}.wav", run, codec)
        wavs.append(load_audio(tmp_path / f"{number}.wav"))
    assert not torch.allclose(wavs[0], wavs[1], atol=1e-3)
    assert not torch.allclose(wavs[0], wavs[2], atol=1e-3)


def test_a_long_file_is_fused_chunk_by_chunk(tmp_path, clip, run, codec):
    num_samples = CHUNK + 40_001
    a, b = clip("a.wav", num_samples), clip("b.wav", num_samples + 999, seed=1)
    report = fuse_files(a, b, tmp_path / "out.wav", run, codec)
    written = load_audio(report.path)
    assert (report.num_samples, written.shape) == (num_samples, (1, num_samples))
    model = load_model(run, "best")

    def chunk(start, end):
        return fuse_clips(*(load_audio(path, start, end - start)[None] for path in (a, b)), model, codec)[0]

    seam = CHUNK - OVERLAP
    assert torch.allclose(written[:, :seam], chunk(0, CHUNK)[:, :seam], atol=1e-6)
    assert torch.allclose(written[:, CHUNK:], chunk(seam, num_samples)[:, OVERLAP:], atol=1e-6)
    middle = CHUNK - OVERLAP // 2
    between = (chunk(0, CHUNK)[:, middle] + chunk(seam, num_samples)[:, OVERLAP // 2]) / 2
    assert torch.allclose(written[:, middle], between, atol=1e-4)


@pytest.mark.parametrize(
    ("first", "second", "wanted"),
    [
        (("a.wav", 10_007, 24_000, 1), ("b.wav", 10_009, 24_000, 2), 10_007),
        # 20,001 frames at 44.1 kHz are 10,884.9 samples at 24 kHz
        (("a.flac", 20_001, 44_100, 2), ("b.wav", 30_000, 24_000, 1), 10_885),
        (("a.wav", 30_000, 24_000, 1), ("b.ogg", 20_001, 44_100, 2), 10_885),
        (("a.mp3", 44_100, 44_100, 2), ("b.flac", 9_999, 48_000, 1), 5_000),
        (("a.mp3", 44_100, 44_100, 2), ("b.wav", 8_000, 8_000, 1), 24_000),
        (("a.wav", 320, 24_000, 1), ("b.wav", 24_000, 24_000, 1), 320),  # one frame
    ],
)
def test_the_output_is_as_long_as_the_shorter_file(tmp_path, clip, run, codec, first, second, wanted):
    report = fuse_files(clip(*first), clip(*second, seed=1), tmp_path / "out.wav", run, codec)
    info = soundfile.info(report.path)
    assert report.num_samples == info.frames == wanted
    assert (info.samplerate, info.channels, info.subtype) == (24_000, max(first[3], second[3]), "FLOAT")


class TakingTurns(torch.nn.Module):
    """Takes one clip whole, the target in every third second: chunks begin at multiples of 15 s, so all agree on it."""

    cascade = SimpleNamespace(stages=())

    def make_masks(self, input, target):
        self.seen = input, target
        of_target = (torch.arange(input.shape[-1]) // 75 % 3 == 0).float().expand_as(input)
        return Masks(1 - of_target, of_target)

    def forward(self, input, target, masks=None, stages=None):
        masks = masks or self.make_masks(input, target)
        return Fusion(input * masks.input + target * masks.target, (), masks)


@pytest.mark.parametrize("num_samples", [24_321, 2 * CHUNK - OVERLAP + 54_321])
def test_stereo_is_fused_to_12_khz_without_seams_by_the_masks_of_the_mid_signal(
    tmp_path, clip, run, codec, monkeypatch, num_samples
):
    model = TakingTurns()
    monkeypatch.setattr(lib.fuse, "load_model", lambda *args, **options: model)
    a, b = clip("a.wav", num_samples, channels=2, subtype="FLOAT"), clip("b.wav", num_samples, seed=1, subtype="FLOAT")
    report = fuse_files(a, b, tmp_path / "out.wav", run, codec)
    written, input, target = (load_audio(path, channels=None) for path in (report.path, a, b))
    assert (written.shape, report.num_samples) == ((2, num_samples), num_samples)
    begin = (num_samples - OVERLAP) // (CHUNK - OVERLAP) * (CHUNK - OVERLAP)  # of the last chunk
    for latents, wav in zip(model.seen, (load_audio(a), load_audio(b)), strict=True):
        torch.testing.assert_close(latents, codec.encode(wav[None, :, begin:]), rtol=0, atol=1e-2)
    second, within = torch.arange(num_samples) // SAMPLE_RATE, torch.arange(num_samples) % SAMPLE_RATE
    wanted = torch.where(second % 3 == 0, target, input)
    steady = (within > codec.hop) & (within < SAMPLE_RATE - codec.hop)  # a turn takes a frame
    torch.testing.assert_close(written[:, steady], wanted[:, steady], rtol=0, atol=1e-5)
    assert written.abs().max() < 1.25 * wanted.abs().max()
    fuse_files(a, b, tmp_path / "narrow.wav", run, codec, whole_band=False)
    narrow = load_audio(tmp_path / "narrow.wav", channels=None)
    assert (narrow - wanted)[:, steady].abs().max() > 0.01


@pytest.mark.parametrize("masking", ["none", "wide", "learned"])
def test_channels_are_fused_one_by_one_with_the_masks_of_their_mean(codec, masking):
    torch.manual_seed(0)
    model = FusionModel(CascadeConfig.reference(1, num_layers=1), MaskingConfig(masking)).eval()
    clips = [torch.from_numpy(music(4 * 5_000, seed=seed)).float().reshape(2, 2, -1) for seed in (0, 1)]  # [2, 2, N]
    fused = fuse_clips(*clips, model, codec, False)
    with torch.no_grad():
        masks = model.make_masks(*(codec.encode(clip.mean(1, keepdim=True)) for clip in clips))
        for i in range(2):
            latents = model(*(codec.encode(clip[:, i : i + 1]) for clip in clips), masks=masks).latents
            torch.testing.assert_close(
                fused[:, i : i + 1], codec.decode(latents, 5_000)[..., :5_000], rtol=0, atol=1e-4
            )


def test_equal_channels_are_mono_twice_and_mono_is_as_the_codec_alone(tmp_path, clip, run, codec):
    a, b = clip("a.wav", 12_345), clip("b.wav", 12_345, seed=1)
    for path in (a, b):
        samples, _ = soundfile.read(path, always_2d=True)
        soundfile.write(path.with_stem(f"{path.stem}2"), np.hstack([samples, samples]), SAMPLE_RATE)
    stereo = [path.with_stem(f"{path.stem}2") for path in (a, b)]
    wavs = []
    for number, (pair, options) in enumerate(
        (((a, b), {}), (stereo, {}), ((stereo[0], b), {}), (stereo, {"mono": True}))
    ):
        fuse_files(*pair, tmp_path / f"{number}.wav", run, codec, **options)
        wavs.append(load_audio(tmp_path / f"{number}.wav", channels=None))
    assert [len(wav) for wav in wavs] == [1, 2, 2, 1]
    for wav in wavs[1:]:
        torch.testing.assert_close(wav, wavs[0].expand_as(wav), rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"mono": True}])
@pytest.mark.parametrize("channels", [2, 4])
def test_channels_that_cancel_are_named(tmp_path, clip, run, codec, channels, options):
    """The masks, and what has not two channels, are of their mean."""
    wav = music(12_000).astype(np.float32)
    soundfile.write(tmp_path / "anti.wav", np.hstack(channels // 2 * [wav, -wav]), SAMPLE_RATE, subtype="FLOAT")
    with pytest.raises(AudioError, match=r"anti\.wav: its channels cancel in the mono mix"):
        fuse_files(tmp_path / "anti.wav", clip("b.wav", seed=1), tmp_path / "out.wav", run, codec, **options)
    assert not (tmp_path / "out.wav").exists()


def test_three_channels_are_mixed(tmp_path, clip, run, codec):
    fuse_files(clip("c.wav", channels=3), clip("b.wav", seed=1), tmp_path / "out.wav", run, codec)
    assert soundfile.info(tmp_path / "out.wav").channels == 1


def test_best_and_last_are_different_checkpoints(tmp_path, clip, codec):
    run = saved_run(tmp_path / "run", codec, CascadeConfig.reference(1, num_layers=1), steps=2)
    a, b = clip("a.wav"), clip("b.wav", seed=1)
    wavs = {}
    for which in ("best", "last"):
        fuse_files(a, b, tmp_path / f"{which}.wav", run, codec, which=which)
        wavs[which] = load_audio(tmp_path / f"{which}.wav")
    assert not torch.allclose(wavs["best"], wavs["last"], atol=1e-3)


@pytest.mark.parametrize("suffix", [".flac", ".ogg", ".mp3"])
def test_an_output_that_would_clip_is_lowered(tmp_path, clip, run, codec, monkeypatch, suffix):
    monkeypatch.setattr(lib.fuse, "fuse_clips", lambda input, target, *_: 50 * input)
    a, b, out = clip("a.wav"), clip("b.wav"), tmp_path / f"out{suffix}"
    loud = fuse_files(a, b, tmp_path / "out.wav", run, codec)  # a float file holds it
    report = fuse_files(a, b, out, run, codec)
    peak = load_audio(tmp_path / "out.wav").abs().max().item()
    assert peak > 1
    assert loud.change == 0
    assert report.change == pytest.approx(-20 * np.log10(peak) - 1, abs=0.8)
    assert soundfile.info(out).frames == soundfile.info(tmp_path / "out.wav").frames
    assert 0.5 < load_audio(out).abs().max() <= 1


def test_a_fusion_is_as_loud_as_both_clips_are_on_average(tmp_path, run, codec, call):
    """In every format, whatever the channels; long enough for a seam."""
    time = np.arange(CHUNK + 3 * SAMPLE_RATE) / SAMPLE_RATE
    for name, amplitude, channels in (("a.wav", 0.2, 2), ("b.wav", 0.05, 1)):
        wav = amplitude * np.sin(2 * np.pi * 997 * time) * np.where(time < CHUNK_SECONDS, 1, 0.1)
        soundfile.write(tmp_path / name, np.tile(wav[:, None], channels), SAMPLE_RATE, subtype="FLOAT")
    a, b = tmp_path / "a.wav", tmp_path / "b.wav"
    wanted = 10 * np.log10((0.2**2 + 0.05**2) / 2)  # in stereo; the quiet end is below the gate
    for suffix in (".wav", ".flac", ".mp3", ".ogg"):
        out = tmp_path / f"out{suffix}"
        code, said, errors = call(a, b, "-o", out, "--run", run.path)
        assert code == 0, errors
        words = (
            r"19\.00 s, stereo, band up to \d+\.\d kHz, (-?\d+\.\d) LUFS, true peak -\d+\.\d dBTP.*, in 2 chunk\(s\)"
        )
        assert float(re.search(words, said)[1]) == pytest.approx(wanted, abs=0.2)
        heard = torchaudio.functional.loudness(load_audio(out, channels=None), SAMPLE_RATE)
        assert heard == pytest.approx(wanted, abs=0.2)
    assert call(a, b, "-o", tmp_path / "mono.wav", "--run", run.path, "--mono")[0] == 0
    mono = load_audio(tmp_path / "mono.wav", channels=None)
    assert len(mono) == 1
    assert torchaudio.functional.loudness(mono.expand(2, -1), SAMPLE_RATE) == pytest.approx(wanted, abs=0.2)
    levels = {}
    for level in ("peak", "none"):
        assert call(a, b, "-o", tmp_path / "out.wav", "--run", run.path, "--level", level)[0] == 0
        levels[level] = load_audio(tmp_path / "out.wav", channels=None)
    assert levels["peak"].abs().max() == pytest.approx(10 ** (-1 / 20), rel=0.01)
    torch.testing.assert_close(levels["none"] / levels["none"].abs().max(), levels["peak"] / levels["peak"].abs().max())
    exact = fuse_files(a, b, tmp_path / "exact.wav", run, codec)
    assert torch.equal(load_audio(exact.path, channels=None), levels["none"])


def test_no_file_is_left_of_a_fusion_that_is_not_finite(tmp_path, clip, run, codec, monkeypatch):
    monkeypatch.setattr(lib.fuse, "fuse_clips", lambda input, target, *_: input / 0)
    a, b = clip("a.wav"), clip("b.wav")
    with pytest.raises(AudioError, match="NaN or infinite"):
        fuse_files(a, b, tmp_path / "out.flac", run, codec)
    assert {path.name for path in tmp_path.iterdir()} == {"a.wav", "b.wav"}


def test_a_run_of_another_codec_is_refused(tmp_path, clip, run):
    class Other(MdctCodec):
        fingerprint = "0" * 64

    with pytest.raises(UserError, match="trained on latents of codec 'mdct'"):
        fuse_files(clip("a.wav"), clip("b.wav"), tmp_path / "out.wav", run, Other())
    assert not (tmp_path / "out.wav").exists()


# --- command line -----------------------------------------------------------------------------------------------------


@pytest.fixture
def call(monkeypatch, capsys):
    """`call(*argv)` runs the command; returns its exit code, stdout and stderr. A traceback would fail the test."""

    def run(*argv: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lib.fuse", *map(str, argv)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_the_command_fuses_files_with_odd_names(tmp_path, clip, run, call):
    a, b = clip("drums & bass.wav"), clip("мелодия 'é'.flac", seed=1)
    out = tmp_path / "fused {à}  2.wav"
    code, said, errors = call(a, b, "-o", out, "--run", run.path)
    assert (code, errors) == (0, "")
    assert re.match(
        rf"{re.escape(str(out))}: 0\.50 s, mono, band up to .* kHz, .* LUFS, true peak .* dBTP.*, in 1 chunk\(s\)\n",
        said,
    )
    assert soundfile.info(out).frames == 12_000


def changed_copy(run: Run, folder: Path, **config) -> Path:
    shutil.copytree(run.path, folder, symlinks=True)
    (folder / "config.json").write_text(json.dumps(run.config | config))
    return folder


def wrong_samples(path: Path, samples: np.ndarray) -> Path:
    soundfile.write(path, samples, SAMPLE_RATE, subtype="FLOAT")
    return path


# name → (what is wrong, with which option, and the words that the one line must hold)
INPUTS = {
    "missing": (lambda folder: folder / "no such.wav", "no such file; check the path"),
    "a folder": (lambda folder: folder, "a folder, not an audio file; name a file"),
    "zero bytes": (lambda folder: (folder / "x.wav", (folder / "x.wav").write_bytes(b""))[0], "empty (0 bytes); copy"),
    "text": (lambda folder: (folder / "x.wav", (folder / "x.wav").write_text("la la"))[0], "not audio.*; use WAV"),
    "NaN": (lambda folder: wrong_samples(folder / "x.wav", np.r_[np.ones(900), np.nan]), "NaN or inf.*; export"),
    "silence": (lambda folder: wrong_samples(folder / "x.wav", np.zeros(24_000)), "silent throughout.*; use a"),
    "too short": (lambda folder: wrong_samples(folder / "x.wav", np.ones(319)), "only 319 samples.*; use a longer"),
}


@pytest.mark.parametrize("role", ["input", "target"])
@pytest.mark.parametrize("fault", INPUTS)
def test_a_bad_file_is_one_line_and_exit_code_2(tmp_path, clip, run, call, fault, role):
    make, words = INPUTS[fault]
    (tmp_path / "bad files é").mkdir()
    bad, good = make(tmp_path / "bad files é"), clip("good.wav")
    pair = (bad, good) if role == "input" else (good, bad)
    check_one_line(call(*pair, "-o", tmp_path / "out.wav", "--run", run.path), bad, words)
    assert not (tmp_path / "out.wav").exists()


def check_one_line(result: tuple[int, str, str], where: object, words: str) -> None:
    code, said, errors = result
    assert (code, said) == (2, ""), errors
    assert re.fullmatch(r"error: [^\n]+\n", errors), errors
    assert str(where) in errors
    assert re.search(words if ".*" in words else re.escape(words), errors), errors


def test_a_truncated_file_is_one_line(tmp_path, clip, run, call):
    bad = clip("cut.flac", 48_000)
    bad.write_bytes(bad.read_bytes()[:-20_000])
    check_one_line(call(bad, clip("b.wav"), "-o", tmp_path / "o.wav", "--run", run.path), bad, "truncated.*; copy")


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("no such folder/out.wav", "cannot be written (No such file or directory); choose an existing folder"),
        ("b.wav/out.wav", "cannot be written (Not a directory); choose an existing folder"),
        ("/proc/out.wav", "cannot be written.*; choose an existing folder"),  # root may not write there either
        ("out.xyz", "cannot write .xyz; use .flac, .mp3, .ogg, .wav"),
        ("out", "cannot write a file without suffix; use"),
        ("a.wav", "is one of the two clips; choose another output file"),
        ("sub/../b.wav", "is one of the two clips; choose another output file"),
        ("link.wav", "is one of the two clips; choose another output file"),
    ],
)
def test_a_bad_output_is_one_line_and_the_clips_stay(tmp_path, clip, run, call, out, words):
    a, b = clip("a.wav"), clip("b.wav", seed=1)
    (tmp_path / "sub").mkdir()
    (tmp_path / "link.wav").symlink_to(a)
    before = a.read_bytes(), b.read_bytes()
    check_one_line(call(a, b, "-o", tmp_path / out, "--run", run.path), tmp_path / out, words)
    assert (a.read_bytes(), b.read_bytes()) == before
    assert {path.name for path in tmp_path.iterdir()} == {"a.wav", "b.wav", "link.wav", "sub"}


def test_a_bad_run_is_one_line(tmp_path, clip, run, call, monkeypatch):
    monkeypatch.setenv(OFFLINE_VARIABLE, "1")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))  # no weights, whatever this machine holds
    a, b = clip("a.wav"), clip("b.wav")

    def fails(path: Path, where: object, words: str, *options: str) -> None:
        check_one_line(call(a, b, "-o", tmp_path / "out.wav", "--run", path, *options), where, words)
        assert not (tmp_path / "out.wav").exists()

    fails(tmp_path / "none", tmp_path / "none", "no run here (no config.json); `make demo` trains one")
    fails(a, a, "cannot be read.*; check|no run here")

    config = tmp_path / "text" / "config.json"
    config.parent.mkdir()
    for content in ("{", "", "[]", "\x00"):
        config.write_text(content)
        fails(config.parent, config, "damaged.*; restore it or train again")
    for number, codec in enumerate((None, {}, "mdct", {"name": 3})):
        path = changed_copy(run, tmp_path / f"codec{number}", codec=codec)
        fails(path, path / "config.json", "or restore the file")
        fails(path, path / "config.json", "or restore the file", "--codec", "mdct")
    path = changed_copy(run, tmp_path / "cascade", cascade=run.config["cascade"] | {"colour": "red"})
    fails(path, "colour is unknown", "choose from stages, latent_dim")

    path = changed_copy(run, tmp_path / "older", codec={"name": "mdct", "fingerprint": "0" * 64})
    fails(path, path, "trained on latents of codec 'mdct'.*; use that codec, or train again")
    path = changed_copy(run, tmp_path / "encodec", codec={"name": "encodec", "fingerprint": "0" * 64})
    fails(path, "encodec", "its weights are not on this machine.*; give the directory that holds")
    fails(path, path, "trained on latents of codec 'encodec'.*; use that codec", "--codec", "mdct")
    path = changed_copy(run, tmp_path / "unknown", codec={"name": "lpc", "fingerprint": "0" * 64})
    fails(path, "'lpc'", "unknown; choose mdct or encodec")

    path = changed_copy(run, tmp_path / "cut")
    weights = path / "best" / "model.safetensors"
    os.truncate(weights, 1000)
    fails(path, weights, "truncated or changed since it was written; restore it")
    (path / "best").unlink()
    fails(path, path / "best", "no checkpoint here; train this run first")


def test_a_run_finds_its_codec_where_it_came_from(tmp_path, clip, call, monkeypatch):
    """EnCodec's weights in a folder of the user's: never those of the hub, whose name is the same."""
    monkeypatch.setenv(OFFLINE_VARIABLE, "1")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    folder, elsewhere, a, b = tmp_path / "weights", tmp_path / "elsewhere", clip("a.wav"), clip("b.wav", seed=1)
    write_weights(folder)
    monkeypatch.chdir(tmp_path)
    codec = load_codec("weights")
    run = saved_run(tmp_path / "run", codec, CascadeConfig.reference(1, num_layers=1))
    older = call(a, b, "-o", tmp_path / "out.wav", "--run", run.path)
    check_one_line(older, "encodec", "its weights are not on this machine.*; give the directory that holds")
    path = changed_copy(run, tmp_path / "noted", codec_source=codec.source)
    assert call(a, b, "-o", tmp_path / "out.wav", "--run", path)[0] == 0
    folder.rename(elsewhere)
    assert call(a, b, "-o", tmp_path / "out.wav", "--run", path)[0] == 2
    assert call(a, b, "-o", tmp_path / "out.wav", "--run", path, "--codec", elsewhere)[0] == 0


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(clip, run, codec, tmp_path) -> Path:
    """A favourite of two clips in `tmp_path`, its WAV beside it, with settings that are not the defaults."""
    paths = clip("a.wav"), clip("b.flac", 9_000, 16_000, seed=1)
    cuts = [Clip(str(path), offset, 5_000, file_sha256(path)) for path, offset in zip(paths, (0, 777), strict=True)]
    (tmp_path / "kept é").mkdir()
    settings = Settings(residual_weight=0.7, noise=0.3, mask_hardness=4.0, seed=6)
    return save_with_recipe(tmp_path / "kept é" / "1.wav", run, codec, *cuts, settings)


def test_a_recipe_reproduces_its_samples_in_another_process(tmp_path, recipe):
    """One that starts with a thread a core, without this one's caches and random state."""
    out = tmp_path / "again.wav"
    program = [sys.executable, "-m", "lib.fuse", "--recipe", recipe, "-o", out]
    root = Path(lib.fuse.__file__).parents[1]
    done = subprocess.run(program, cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{out}: 0.21 s, equal to the recipe's output bit for bit\n"
    again, first = (soundfile.read(path, dtype="float32")[0] for path in (out, recipe.with_suffix(".wav")))
    assert np.array_equal(again, first)
    assert again.shape == (5_000,)
    assert np.sqrt(np.mean(again**2)) > 0.01


def test_samples_that_differ_from_the_recipe_exit_with_1_and_still_written(tmp_path, recipe, call, monkeypatch):
    values = json.loads(recipe.read_text())
    values["output"]["samples_sha256"] = "0" * 64
    values["versions"] = {"torch": "1.0.0", "commit": "abc1234"}
    recipe.write_text(json.dumps(values))
    monkeypatch.setattr(lib.fuse, "versions", lambda: {"torch": "2.0.0", "commit": "def5678+"})
    code, said, errors = call("--recipe", recipe, "-o", tmp_path / "again.wav")
    assert (code, errors) == (1, "")
    assert said == (
        f"{tmp_path / 'again.wav'}: 0.21 s, NOT equal to the recipe's output: it is from torch 1.0.0, commit "
        "abc1234, this from torch 2.0.0, commit def5678+; or the processor differs, or the recipe was edited\n"
    )
    assert torch.equal(load_audio(tmp_path / "again.wav"), load_audio(recipe.with_suffix(".wav")))
    values["versions"] = {}
    recipe.write_text(json.dumps(values))
    assert "from torch None, commit None" in call("--recipe", recipe, "-o", tmp_path / "again.wav")[1]


def test_a_recipe_takes_run_and_codec_from_the_options(tmp_path, run, recipe, call):
    values = json.loads(recipe.read_text())
    recipe.write_text(json.dumps(values | {"run": "gone"}))
    result = call("--recipe", recipe, "-o", tmp_path / "again.wav")
    check_one_line(result, recipe, "its run .*gone is not there; say where it is now, by --run")
    result = call("--recipe", recipe, "-o", tmp_path / "again.wav", "--run", run.path, "--codec", "lpc")
    check_one_line(result, "'lpc'", "unknown; choose mdct or encodec")
    result = call("--recipe", recipe, "-o", tmp_path / "again.wav", "--run", tmp_path)
    check_one_line(result, tmp_path, "no run here (no config.json)")
    assert not (tmp_path / "again.wav").exists()
    options = ("--run", run.path, "--codec", "mdct")
    assert call("--recipe", recipe, "-o", tmp_path / "again.wav", *options)[0] == 0
    assert torch.equal(load_audio(tmp_path / "again.wav"), load_audio(recipe.with_suffix(".wav")))


def test_a_recipe_that_cannot_be_followed_is_one_line(tmp_path, recipe, call):
    text = recipe.read_text()

    def fails(where: object, words: str) -> None:
        check_one_line(call("--recipe", recipe, "-o", tmp_path / "out.wav"), where, words)
        assert not (tmp_path / "out.wav").exists()

    for damaged in ("", "{", text[: len(text) // 2], "[]"):
        recipe.write_text(damaged)
        fails(recipe, "damaged.*; name the .json beside a saved .wav")
    recipe.write_text(text)
    with open(tmp_path / "b.flac", "ab") as file:
        file.write(b"\0")
    fails("b.flac", "not the file that .*1.json was made of; restore that file")
    (tmp_path / "b.flac").unlink()
    fails(recipe, "its target .*b.flac is not there; put the file back")
    recipe.unlink()
    fails(recipe, "no such file; name the .json beside a saved .wav")
    recipe.mkdir()
    fails(recipe, "cannot be read (Is a directory); check the path")


def test_a_recipe_is_never_written_over_its_own_clips(tmp_path, recipe, call):
    (tmp_path / "link.wav").symlink_to(tmp_path / "a.wav")
    before = {name: (tmp_path / name).read_bytes() for name in ("a.wav", "b.flac")}
    for out in ("a.wav", "link.wav", "kept é/../a.wav"):
        result = call("--recipe", recipe, "-o", tmp_path / out)
        check_one_line(result, tmp_path / out, "is one of the two clips; choose another output file")
    for out in (recipe, tmp_path / "b.flac", tmp_path / "x.mp3"):
        result = call("--recipe", recipe, "-o", out)
        check_one_line(result, out, "only a .wav holds the samples as they are; choose a name that ends in .wav")
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ((), "the following arguments are required: -o/--out"),
        (("--recipe", "r.json"), "the following arguments are required: -o/--out"),
        (("-o", "x.wav"), "give INPUT, TARGET and --run, or --recipe"),
        (("a.wav", "-o", "x.wav", "--run", "r"), "give INPUT, TARGET and --run, or --recipe"),
        (("a.wav", "b.wav", "-o", "x.wav"), "give INPUT, TARGET and --run, or --recipe"),
        (("--recipe", "", "-o", "x.wav"), "give INPUT, TARGET and --run, or --recipe"),
        (("--run", "r", "--checkpoint", "last", "-o", "x.wav"), "give INPUT, TARGET and --run, or --recipe"),
        (("a.wav", "--recipe", "r.json", "-o", "x.wav"), "give it -o, --run and --codec only"),
        (
            ("a.wav", "b.wav", "--recipe", "r.json", "-o", "x.wav", "--run", "r"),
            "give it -o, --run and --codec only",
        ),
        (
            ("--recipe", "r.json", "-o", "x.wav", "--superres", "s"),
            "give it -o, --run and --codec only",
        ),
        (
            ("--recipe", "r.json", "-o", "x.wav", "--checkpoint", "best"),
            "give it -o, --run and --codec only",
        ),
        (("a.wav", "b.wav", "--run", "r", "-o", "x.wav", "--checkpoint", "first"), "invalid choice: 'first'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path, call, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    code, said, errors = call(*argv)
    assert (code, said) == (2, "")
    assert errors.startswith("usage: python -m lib.fuse")
    assert words in errors
    assert list(tmp_path.iterdir()) == []


def test_the_checkpoint_is_best_unless_last_is_asked_for(tmp_path, clip, codec, call):
    run = saved_run(tmp_path / "run", codec, CascadeConfig.reference(1, num_layers=1), steps=2)
    a, b = clip("a.wav"), clip("b.wav", seed=1)
    wavs = {}
    for name, options in {"none": (), "best": ("--checkpoint", "best"), "last": ("--checkpoint", "last")}.items():
        assert call(a, b, "-o", tmp_path / f"{name}.wav", "--run", run.path, *options)[0] == 0
        wavs[name] = load_audio(tmp_path / f"{name}.wav")
    assert torch.equal(wavs["none"], wavs["best"])
    assert not torch.allclose(wavs["best"], wavs["last"], atol=1e-3)


# --- with an upper band -----------------------------------------------------------------------------------------------


def test_a_super_resolver_takes_the_fusion_to_48_khz(tmp_path, clip, run, tiny_superres, monkeypatch, capsys):
    """As long as the shorter file, the fusion itself below its own band's end, and something above it."""
    paths = [str(clip(name, n, seed=n)) for name, n in (("a.wav", 30_000), ("b.wav", 26_000))]
    plain, restored = tmp_path / "plain.wav", tmp_path / "restored.wav"
    for out, more in ((plain, ()), (restored, ("--superres", str(tiny_superres)))):
        monkeypatch.setattr(sys, "argv", ["fuse", *paths, "-o", str(out), "--run", str(run.path), "--narrow", *more])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
    assert re.search(r"1\.08 s, mono, .*, at 48 kHz, restored above", capsys.readouterr().out)
    assert soundfile.info(restored).samplerate == 48_000
    assert soundfile.info(restored).frames == 52_000
    assert band_edge(load_audio(plain), SAMPLE_RATE) < 5_000  # `--narrow`
    before, after = load_audio(plain, sample_rate=48_000)[0], load_audio(restored, sample_rate=48_000)[0]
    below, above = (slice(0, 4500 * 52_000 // 48_000), slice(6000 * 52_000 // 48_000, None))
    spectra = [torch.fft.rfft(wav).abs() for wav in (before, after)]
    assert (spectra[1][below] - spectra[0][below]).norm() < 0.01 * spectra[0][below].norm()
    assert spectra[1][above].norm() > 10 * spectra[0][above].norm()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.wav", "b.wav", "plain.wav", "restored.wav"]


def test_a_super_resolver_begins_where_the_whole_band_ends(tmp_path, clip, run, tiny_superres, call):
    paths, out = (
        [clip(name, 48_000, 44_100, 2, seed) for seed, name in enumerate(("a.wav", "b.wav"))],
        tmp_path / "o.wav",
    )
    options = ("-o", out, "--run", run.path, "--superres", tiny_superres)
    for more, edge, channels in (((), (11.5, 12.1), 2), (("--mono",), (11.5, 12.1), 1), (("--narrow",), (4.7, 5.1), 2)):
        code, said, errors = call(*paths, *options, *more)
        assert code == 0, errors
        assert edge[0] < float(re.search(r"restored above (\S+) kHz", said)[1]) < edge[1]
        assert (soundfile.info(out).channels, soundfile.info(out).samplerate) == (channels, 48_000)


def test_no_file_is_left_when_the_super_resolver_cannot_be_used(tmp_path, clip, run, tiny_superres, codec, monkeypatch):
    paths = [clip(name) for name in ("a.wav", "b.wav")]
    resolver = SuperResolver(tiny_superres)
    with pytest.raises(UserError, match=r"missing/out\.wav: cannot be written"):
        fuse_and_restore(*paths, tmp_path / "missing" / "out.wav", run, codec, resolver)
    with pytest.raises(UserError, match="one of the two clips"):
        fuse_and_restore(*paths, paths[0], run, codec, resolver)
    with pytest.raises(AudioError, match=r"cannot write \.xyz"):
        fuse_and_restore(*paths, tmp_path / "out.xyz", run, codec, resolver)

    def full(draft: Path, *given: object, **options: object):
        raise AudioError(draft, "its band reaches 22.1 kHz already; leave it as it is, or give --cutoff")

    monkeypatch.setattr(lib.fuse, "restore_file", full)
    with pytest.raises(AudioError, match=r"out\.wav: its band .*; leave it as it is, without --superres"):
        fuse_and_restore(*paths, tmp_path / "out.wav", run, codec, resolver)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.wav", "b.wav"]
