"""Degradations, and training pairs: what is lost, where it is, which songs are used, what an example depends on."""

import shutil
from collections import Counter

import numpy as np
import pytest
import soundfile
import torch

from lib.audio.files import load_audio
from lib.superres.degradation import GRID, HIGHEST, KINDS, LOWEST, ORDERS, Degradation, Examples, Library, read_library
from lib.util.errors import UserError
from superres.conftest import CLIP, band, decibels, white, write_music

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
    assert set(kinds) == {None, "butter", "cheby1", "ellip", "bessel"}  # half of them sharp, as in the comparison
    assert set(orders) == set(range(2, 11))
    assert abs(kinds.pop(None) - 1_500) < 150
    assert all(abs(count - 375) < 80 for count in kinds.values())
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


# --- training pairs ---------------------------------------------------------------------------------------------------


def split_of(library: Library) -> dict[str, list[str]]:
    return {split: [song.sha256 for song in songs] for split, songs in library.songs.items()}


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """A folder of eight short songs, of two rates, one in a subfolder."""
    folder = tmp_path_factory.mktemp("eight")
    for seed in range(8):
        name = f"more/{seed}.flac" if seed == 7 else f"{seed}.wav"
        write_music(folder / name, 0.2 + 0.02 * seed, seed, 44_100 if seed % 2 else 48_000, 1 + seed % 2)
    return folder


# --- the library ------------------------------------------------------------------------------------------------------


def test_every_song_is_in_one_split_with_its_length_at_48_khz(eight):
    library = read_library(eight, CLIP)
    assert {split: len(songs) for split, songs in library.songs.items()} == {"train": 6, "val": 2}
    songs = [song for songs in library.songs.values() for song in songs]
    assert {song.path for song in songs} == {p for p in eight.rglob("*") if p.is_file()}
    for song in songs:
        assert song.samples_at(48_000) == load_audio(song.path, sample_rate=48_000).shape[1]


def test_the_split_depends_on_content_alone(eight, tmp_path):
    names = ["z", "y", "x", "w", "a", "b", "c", "ä ö"]
    for name, path in zip(names, sorted(p for p in eight.rglob("*") if p.is_file()), strict=True):
        (tmp_path / name).mkdir()
        shutil.copy(path, tmp_path / name / f"{name}{path.suffix}")
    library, renamed = read_library(eight, CLIP), read_library(tmp_path, CLIP)
    assert split_of(library) == split_of(renamed)
    assert library.fingerprint == renamed.fingerprint
    for i, path in enumerate(sorted(p for p in tmp_path.rglob("*") if p.is_file())[:4]):  # copies count once
        shutil.copy(path, tmp_path / f"copy {i}{path.suffix}")
    assert split_of(read_library(tmp_path, CLIP)) == split_of(library)
    write_music(tmp_path / "new.wav", 0.3, seed=99)
    assert read_library(tmp_path, CLIP).fingerprint != library.fingerprint


@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (3, 1), (5, 1), (6, 2)])
def test_each_split_has_a_song(eight, tmp_path, count, held_out):
    for path in sorted(p for p in eight.rglob("*") if p.is_file())[:count]:
        shutil.copy(path, tmp_path)
    songs = read_library(tmp_path, CLIP).songs
    assert (len(songs["val"]), len(songs["train"])) == (held_out, count - held_out)


def test_what_cannot_be_used_is_listed_with_its_reason(eight, tmp_path, caplog):
    for i in range(2):
        shutil.copy(eight / f"{i}.wav", tmp_path)
    write_music(tmp_path / "telephone.wav", 0.5, 50, 44_099)
    write_music(tmp_path / "short.wav", 0.159, 51)
    soundfile.write(tmp_path / "silent.wav", np.zeros(20_000), 48_000)
    (tmp_path / "damaged.wav").write_bytes((eight / "2.wav").read_bytes()[:-3_000])
    (tmp_path / "text.mp3").write_text("no music")
    (tmp_path / "notes.txt").write_text("no audio file by its name")
    library = read_library(tmp_path, CLIP)
    assert {song.path.name for songs in library.songs.values() for song in songs} == {"0.wav", "1.wav"}
    assert f"{tmp_path}: 5 of 7 files are not used: damaged.wav: truncated" in caplog.text
    assert "short.wav: shorter than a clip of 0.16 s; use longer music" in caplog.text
    assert "silent.wav: silent" in caplog.text
    assert "and 2 more" in caplog.text
    for name in ("damaged.wav", "short.wav", "silent.wav"):
        (tmp_path / name).unlink()
    read_library(tmp_path, CLIP)
    assert "its sample rate of 44099 Hz leaves no upper band; use 44.1 kHz or more" in caplog.text
    assert "text.mp3: not audio" in caplog.text


def test_a_song_as_long_as_a_clip_will_do(tmp_path):
    for seed in range(2):
        write_music(tmp_path / f"{seed}.wav", CLIP / 48_000, seed)
    library = read_library(tmp_path, CLIP)
    assert Examples(library, "val", 1, CLIP)[0][0].shape == (1, CLIP)


def test_fewer_than_two_songs_are_refused(eight, tmp_path):
    with pytest.raises(UserError, match=r"none: no such folder; name one with music at 44.1 kHz or more"):
        read_library(tmp_path / "none", CLIP)
    with pytest.raises(UserError, match=r"0 usable song\(s\), two are needed \(no audio files\)"):
        read_library(tmp_path, CLIP)
    shutil.copy(eight / "0.wav", tmp_path)
    shutil.copy(eight / "0.wav", tmp_path / "copy.wav")
    write_music(tmp_path / "short.wav", 0.1)
    with pytest.raises(UserError, match=r"1 usable song\(s\), two are needed \(short.wav: shorter than a clip"):
        read_library(tmp_path, CLIP)


# --- examples ---------------------------------------------------------------------------------------------------------


def test_an_example_depends_on_seed_split_and_number_alone(eight):
    library = read_library(eight, CLIP)
    examples = Examples(library, "train", 12, CLIP, seed=3)
    forth = [examples[i] for i in range(12)]
    again = Examples(library, "train", 1_000, CLIP, seed=3)  # as many as you like
    for i in (11, 3, 0, 3):
        assert all(torch.equal(a, b) for a, b in zip(forth[i], again[i], strict=True))
    others = [Examples(library, "train", 1, CLIP, seed=4)[0], Examples(library, "val", 1, CLIP, seed=3)[0], *forth[1:]]
    for clip, low in others:
        assert not torch.equal(clip, forth[0][0])
        assert not torch.equal(low, forth[0][1])
    for bad in (-1, 12):
        for asked in (examples.__getitem__, examples.song):
            with pytest.raises(IndexError):
                asked(bad)


def test_the_split_is_part_of_what_is_drawn_from(library):
    both = Library(dict.fromkeys(("train", "val"), library.songs["train"]))
    train, val = (Examples(both, split, 8, CLIP)[0][0] for split in ("train", "val"))
    assert not torch.equal(train, val)


def test_a_clip_and_its_degraded_one_belong_together(library):
    examples = Examples(library, "train", 20, CLIP)
    for clip, low in (examples[i] for i in range(20)):
        assert clip.shape == low.shape == (1, CLIP)
        assert clip.dtype == low.dtype == torch.float32
        assert decibels(band(low - clip, 50, 200), band(clip, 50, 200)) < -20  # every cutoff is above
        assert decibels(band(low, 19_000), band(clip, 19_000)) < -30


def test_a_given_degradation_is_that_of_all(library):
    drawn, fixed = (Examples(library, "val", 6, CLIP, degradation=d) for d in (None, Degradation(4_000)))
    for i in range(6):
        clip, low = fixed[i]
        assert torch.equal(clip, drawn[i][0])  # the clip is the same
        assert torch.equal(low, Degradation(4_000)(clip))


def test_degradations_vary(library):
    examples = Examples(library, "train", 16, CLIP)
    edges = []
    for i in range(16):
        clip, low = examples[i]
        lost = [decibels(band(low, f, f + 1_000), band(clip, f, f + 1_000)) < -20 for f in range(1_000, 20_000, 1_000)]
        edges.append(lost.index(True))
    assert len(set(edges)) > 5


def test_every_song_is_drawn_as_often_as_the_others(eight):
    library = read_library(eight, CLIP)
    for split, songs in library.songs.items():
        drawn = Counter(Examples(library, split, 3 * len(songs), CLIP, seed=7).song(i) for i in range(3 * len(songs)))
        assert drawn == dict.fromkeys(songs, 3)


def test_clips_match_their_offset_and_cover_the_song(tmp_path):
    """Songs whose samples say where they are: the clip's first sample is its offset."""
    lengths = {"a.wav": CLIP + 3, "b.wav": CLIP + 12, "c.wav": CLIP + 7}
    for number, (name, length) in enumerate(lengths.items()):
        soundfile.write(tmp_path / name, (np.arange(length) + 20_000 * (number + 1)) / 2**17, 48_000, subtype="DOUBLE")
    library = read_library(tmp_path, CLIP)
    examples = Examples(library, "train", 400, CLIP, degradation=Degradation(24_000))
    seen = []
    for clip, _ in (examples[i] for i in range(400)):
        places = (clip[0].double() * 2**17).round()
        assert torch.equal(places.diff(), torch.ones(CLIP - 1, dtype=torch.double))
        seen.append(int(places[0]))
    assert [f"{'abc'[place // 20_000 - 1]}.wav" for place in seen] == [examples.song(i).path.name for i in range(400)]
    expected = []
    for song in library.songs["train"]:
        number = "abc".index(song.path.stem) + 1
        expected += [20_000 * number + place for place in range(song.samples_at(48_000) - CLIP + 1)]
    assert sorted(set(seen)) == sorted(expected)  # every place that a clip fits in, the last one too, and no other
    for song in library.songs["train"]:  # none of its places more than five times as often as the others
        places = [place for place in seen if "abc"[place // 20_000 - 1] == song.path.stem]
        assert max(Counter(places).values()) < 5 * len(places) / (song.samples_at(48_000) - CLIP + 1)
