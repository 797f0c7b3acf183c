"""Files in, files at 48 kHz out: any rate and length, no seam, bounded memory, and errors that leave nothing behind."""

import os
import shutil

import numpy as np
import psutil
import pytest
import soundfile
import torch
from torch import Tensor

from lib.audio.files import AudioError, load_audio, probe_audio, save_audio
from lib.superres.files import Restored, file_band, restore_file, restore_folder
from lib.superres.resolver import Restoration
from lib.util.errors import UserError
from superres.conftest import CLIP, NoiseResolver, band, decibels, inner, white, write_music
from superres.test_resolver import high_levels

QUICK = Restoration(steps=1)


@pytest.fixture
def low_file(tmp_path):
    """`low_file(name, seconds=, edge=, rate=, channels=)`: noise whose band ends at `edge` Hz."""

    def write(name: str = "in.wav", seconds: float = 0.5, edge: float = 5_000, rate: int = 48_000, channels: int = 1):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save_audio(path, band(white(round(seconds * rate), channels=channels), 0, edge, rate), rate)
        return path

    return write


# --- a file -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "edge", "channels"), [(8_000, 3_500, 1), (24_000, 6_000, 2), (44_100, 6_000, 1), (48_000, 6_000, 2)]
)
def test_a_file_of_any_rate_becomes_one_at_48_khz(resolver, low_file, tmp_path, rate, edge, channels):
    path, out = low_file("in.wav", 0.3101, edge, rate, channels), tmp_path / "out.wav"
    restored = restore_file(path, out, resolver, QUICK)
    info, made = probe_audio(out), load_audio(out, sample_rate=48_000, mix=False)
    expected = load_audio(path, sample_rate=48_000, mix=False)
    assert (info.sample_rate, info.channels, info.num_samples) == (48_000, channels, expected.shape[1])
    assert restored == Restored(out, expected.shape[1], channels, restored.cutoff, made.abs().max().item())
    assert restored.cutoff == pytest.approx(edge, abs=600)
    assert restored.cutoff <= rate / 2
    assert decibels(band(inner(made - expected), 0, edge - 400), expected) < -60
    assert decibels(band(inner(made), restored.cutoff + 300), expected) > -60


@pytest.mark.parametrize("kind", ["sine", "noise"])
def test_a_long_file_has_no_seam(tmp_path, kind):
    clip, seconds = 12_000, 5
    time = torch.arange(seconds * 48_000).double() / 48_000
    sine = 0.3 * torch.sin(2 * torch.pi * 441 * time)[None].float()
    wav = sine if kind == "sine" else band(white(len(time)), 0, 4_000)
    save_audio(tmp_path / "in.wav", wav, 48_000)
    restore_file(tmp_path / "in.wav", tmp_path / "plain.wav", NoiseResolver(clip, rms=0.0), Restoration(cutoff=4_000))
    plain = load_audio(tmp_path / "plain.wav", sample_rate=48_000)
    assert decibels(plain - wav, wav) < -120  # where nothing is added nothing is heard at the seams
    restore_file(tmp_path / "in.wav", tmp_path / "out.wav", NoiseResolver(clip), Restoration(cutoff=4_000))
    made = load_audio(tmp_path / "out.wav", sample_rate=48_000)
    faded, between = high_levels(made, clip, 4_300)
    assert faded == pytest.approx(between, abs=0.6)
    flux = band(made, 4_300)[0].unfold(0, 250, 250).square().mean(dim=1).log10().diff().abs()  # every 5 ms
    seams = torch.zeros(len(flux), dtype=torch.bool)
    for start in range(7_500, len(time) - clip, 7_500):
        seams[start // 250 - 1 : (start + 1_500) // 250 + 1] = True
    assert flux[seams].mean() == pytest.approx(flux[~seams].mean().item(), rel=0.3)
    assert flux[seams].max() < 1.5 * flux[~seams].max()


def test_memory_does_not_grow_with_the_file(tmp_path):
    """Two channels of ten minutes at 48 kHz are 230 MB in memory."""
    process, peaks = psutil.Process(), []

    class Watching(NoiseResolver):
        def restore(self, low: Tensor, *args, **options) -> Tensor:
            peaks.append(process.memory_info().rss)
            return super().restore(low, *args, **options)

    highest, resolver = {}, Watching(480_000, rms=0.0)
    minute = 0.1 * np.random.default_rng(0).standard_normal((60 * 8_000, 2))
    for minutes in (1, 10):
        path = tmp_path / f"{minutes}.wav"
        with soundfile.SoundFile(path, "w", 8_000, 2, "PCM_16") as file:
            for _ in range(minutes):
                file.write(minute)
        peaks.clear()
        restored = restore_file(path, tmp_path / "out.wav", resolver, Restoration(cutoff=4_000))
        assert restored.num_samples == minutes * 60 * 48_000
        highest[minutes] = max(peaks)
        assert probe_audio(tmp_path / "out.wav").num_samples == restored.num_samples
    assert highest[10] - highest[1] < 150e6


def test_the_band_is_looked_for_minute_by_minute(low_file, tmp_path, monkeypatch):
    monkeypatch.setattr("lib.superres.files.BLOCK_SECONDS", 1)
    quiet, loud = band(white(96_000), 0, 3_000), band(white(48_000, seed=1), 0, 9_000)
    for wav in (torch.cat([quiet, loud], dim=1), torch.cat([loud, quiet], dim=1)):
        save_audio(tmp_path / "in.wav", wav, 48_000)
        assert file_band(probe_audio(tmp_path / "in.wav")) == pytest.approx(9_000, abs=200)
    # what the rounding to 16 bits leaves of a minute's silence has the whole band, and is no band of the music
    silence = torch.zeros(1, 48_000) + (torch.rand(1, 48_000) < 0.5) / 2**15
    for tail in (silence, quiet[:, :48], quiet[:, :1_000]):  # nor has a last minute that is soon over
        wav = torch.cat([quiet, tail], dim=1)
        save_audio(tmp_path / "in.wav", wav, 48_000)
        assert file_band(probe_audio(tmp_path / "in.wav")) == pytest.approx(3_000, abs=300)
    assert file_band(probe_audio(low_file(edge=4_000, rate=8_000))) == 4_000  # the rate holds no more


def test_a_cutoff_that_is_given_is_used(low_file, tmp_path):
    fake = NoiseResolver(12_000)
    path = low_file(seconds=0.5, edge=5_000)
    assert restore_file(path, tmp_path / "out.wav", fake, Restoration(cutoff=8_000)).cutoff == 8_000
    assert {cutoff for _, cutoff, _ in fake.seen} == {8_000}
    fake.seen.clear()
    restored = restore_file(path, tmp_path / "out.wav", fake, Restoration())
    assert {cutoff for _, cutoff, _ in fake.seen} == {restored.cutoff}
    assert restored.cutoff == pytest.approx(5_000, abs=200)


def test_a_file_whose_band_is_full_is_refused_with_the_fix(low_file, tmp_path):
    fake = NoiseResolver(12_000)
    path = low_file("full.wav", edge=24_000)
    with pytest.raises(AudioError, match=r"full.wav: its band, or .* reaches 24.0 kHz already; leave it as it is"):
        restore_file(path, tmp_path / "out.wav", fake, Restoration())
    assert sorted(os.listdir(tmp_path)) == ["full.wav"]
    restore_file(path, tmp_path / "out.wav", fake, Restoration(cutoff=8_000))


def test_a_cutoff_that_the_file_cannot_have_is_refused(low_file, tmp_path):
    path = low_file("low.wav", edge=3_000, rate=8_000)
    with pytest.raises(AudioError, match=r"low.wav: cutoff=5000 is not allowed: at 8000 Hz nothing above 4 kHz"):
        restore_file(path, tmp_path / "out.wav", NoiseResolver(12_000), Restoration(cutoff=5_000))


@pytest.mark.parametrize("num_samples", [1, 100])
def test_a_file_of_some_samples_is_restored(tmp_path, num_samples):
    save_audio(tmp_path / "in.wav", white(num_samples, rms=0.2) + 0.1, 24_000)
    restored = restore_file(tmp_path / "in.wav", tmp_path / "out.wav", NoiseResolver(12_000), Restoration(cutoff=4_000))
    assert restored.num_samples == 2 * num_samples


def test_no_band_edge_is_below_what_models_learn_from(tmp_path):
    time = torch.arange(24_000) / 24_000
    save_audio(tmp_path / "in.wav", 0.3 * torch.sin(2 * torch.pi * 440 * time)[None], 24_000, subtype="FLOAT")
    fake = NoiseResolver(12_000)
    assert restore_file(tmp_path / "in.wav", tmp_path / "out.wav", fake, Restoration()).cutoff == 2_000


def test_no_result_is_written_among_the_files(low_file, tmp_path):
    """`a/a/x.flac` would become `a/x.wav`, which is there."""
    for name in ("a/a/x.flac", "a/x.wav"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        save_audio(tmp_path / name, band(white(24_000), 0, 4_000), 48_000)
    before = {path: path.read_bytes() for path in tmp_path.rglob("x.*")}
    with pytest.raises(UserError, match="results would lie among the files"):
        restore_folder(tmp_path / "a", tmp_path, NoiseResolver(12_000), Restoration())
    assert {path: path.read_bytes() for path in tmp_path.rglob("x.*")} == before


def test_each_file_is_reported_as_soon_as_it_is_written(low_file, tmp_path):
    (tmp_path / "in").mkdir()
    for name in "ab":
        save_audio(tmp_path / "in" / f"{name}.wav", band(white(24_000), 0, 4_000), 48_000)
    seen = []

    def report(restored):
        seen.append((restored, sorted(path.name for path in (tmp_path / "out").iterdir())))

    done, _ = restore_folder(tmp_path / "in", tmp_path / "out", NoiseResolver(12_000), Restoration(), report)
    assert seen == [(done[0], ["a.wav"]), (done[1], ["a.wav", "b.wav"])]


def test_the_input_is_never_written_over(low_file, tmp_path):
    path = low_file()
    before = path.read_bytes()
    (tmp_path / "link.wav").symlink_to(path)
    (tmp_path / "sub").mkdir()
    for out in (path, tmp_path / "link.wav", tmp_path / "sub" / ".." / "in.wav"):
        with pytest.raises(UserError, match="is the input itself; choose another output file"):
            restore_file(path, out, NoiseResolver(CLIP), QUICK)
    assert path.read_bytes() == before


def test_an_error_leaves_nothing_behind(low_file, tmp_path):
    class Failing(NoiseResolver):
        def restore(self, low: Tensor, *args, numbers=(), **options) -> Tensor:
            if 2 in numbers:
                raise RuntimeError("as if killed")
            return low

    path = low_file(seconds=1)
    (tmp_path / "out.wav").write_text("of an earlier run")
    with pytest.raises(RuntimeError, match="as if killed"):
        restore_file(path, tmp_path / "out.wav", Failing(CLIP), QUICK)
    assert (tmp_path / "out.wav").read_text() == "of an earlier run"
    for out, words in (("none/out.wav", "No such file"), ("out.xyz", "cannot write .xyz"), ("out", "without suffix")):
        with pytest.raises(AudioError, match=words):
            restore_file(path, tmp_path / out, NoiseResolver(CLIP), QUICK)
    with pytest.raises(AudioError, match="no such file"):
        restore_file(tmp_path / "none.wav", tmp_path / "out.wav", NoiseResolver(CLIP), QUICK)
    assert sorted(os.listdir(tmp_path)) == ["in.wav", "out.wav"]


# --- a folder ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(low_file, tmp_path):
    """Two good files of five that are not, and one that is no audio by its name."""
    low_file("in/a.wav")
    low_file("in/more/b.flac", rate=24_000, channels=2)
    low_file("in/a.flac", edge=3_000)
    write_music(tmp_path / "in" / "full.wav", 0.3)
    soundfile.write(tmp_path / "in" / "silent.wav", np.zeros(20_000), 48_000)
    (tmp_path / "in" / "broken.wav").write_bytes((tmp_path / "in" / "a.wav").read_bytes()[:5_000])
    (tmp_path / "in" / "text.mp3").write_text("no audio")
    (tmp_path / "in" / "notes.txt").write_text("no audio file by its name")
    return tmp_path / "in"


def test_a_folder_is_restored_file_by_file(folder, tmp_path):
    done, skipped = restore_folder(folder, tmp_path / "out", NoiseResolver(CLIP), Restoration())
    assert [restored.path.relative_to(tmp_path / "out").as_posix() for restored in done] == ["a.wav", "more/b.wav"]
    assert all(probe_audio(restored.path).sample_rate == 48_000 for restored in done)
    assert [restored.channels for restored in done] == [1, 2]
    assert done[0].cutoff == pytest.approx(3_000, abs=200)  # that of a.flac, the first by name
    reasons = {path.relative_to(folder).as_posix(): reason for path, reason in skipped}
    assert set(reasons) == {"a.wav", "full.wav", "silent.wav", "broken.wav", "text.mp3"}
    assert reasons["a.wav"] == "a.flac goes by the same name; rename one of them"
    assert "its band, or what a resampler left" in reasons["full.wav"]
    assert "silent" in reasons["silent.wav"]
    assert "truncated" in reasons["broken.wav"]
    assert "not audio" in reasons["text.mp3"]
    assert {p.name for p in (tmp_path / "out").rglob("*") if p.is_file()} == {"a.wav", "b.wav"}


def test_a_bad_file_does_not_take_the_name_of_a_good_one(folder, tmp_path):
    (folder / "a.flac").write_text("no audio")
    done, skipped = restore_folder(folder, tmp_path / "out", NoiseResolver(CLIP), Restoration())
    assert done[0].cutoff == pytest.approx(5_000, abs=200)
    assert (folder / "a.flac", folder / "a.wav") != tuple(path for path, _ in skipped[:2])


def test_a_folder_without_a_good_file_is_refused(folder, tmp_path):
    for path in (folder / "a.wav", folder / "a.flac", folder / "more" / "b.flac", folder / "full.wav"):
        path.unlink()
    with pytest.raises(UserError, match=r"in: no usable audio file \(broken.wav: .*truncated.*; silent.wav: .*; text"):
        restore_folder(folder, tmp_path / "out", NoiseResolver(CLIP), Restoration())
    shutil.rmtree(folder)
    folder.mkdir()
    with pytest.raises(UserError, match=r"in: no usable audio file \(none there\)"):
        restore_folder(folder, tmp_path / "out", NoiseResolver(CLIP), Restoration())


def test_an_output_folder_inside_the_input_or_not_writable_is_refused(folder, tmp_path):
    before = sorted(folder.rglob("*"))
    for out in (folder, folder / "out", tmp_path / "x" / ".." / "in" / "out"):
        with pytest.raises(UserError, match=r"results would lie among the files of .*; choose another output folder"):
            restore_folder(folder, out, NoiseResolver(CLIP), Restoration())
    assert sorted(folder.rglob("*")) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file: cannot be written \(.*\); choose another output folder"):
        restore_folder(folder, tmp_path / "file", NoiseResolver(CLIP), Restoration())
