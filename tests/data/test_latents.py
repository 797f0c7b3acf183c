"""The latent cache: right rows, nothing encoded twice, nothing damaged ever returned, small when it is large."""

import errno
import hashlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from simulated import simulated_index
from torch.utils.data import DataLoader

import lib.codec.mdct
import lib.data.latents
from lib.audio.files import SAMPLE_RATE, load_audio
from lib.codec.mdct import DIM, HOP, MdctCodec
from lib.data.latents import LatentPairs, encode_manifest
from lib.data.pairs import Clip, Manifest, Pair
from lib.util.errors import UserError

CLIP = 10 * HOP


class CountingCodec(MdctCodec):
    """Counts what it encodes, in whichever process, and can die like a killed process at one of the clips."""

    def __init__(self, die_at=None):
        super().__init__()
        self.counted, self.die_at = multiprocessing.Value("i", 0), die_at

    @property
    def count(self):
        return self.counted.value

    def encode(self, wav):
        with self.counted:
            self.counted.value += 1
            if self.counted.value == self.die_at:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(wav)


def write_song(root: Path, name: str, clips: int, seed: int) -> None:
    root.mkdir(exist_ok=True)
    wav = 0.1 * np.random.default_rng(seed).standard_normal(clips * CLIP)
    soundfile.write(root / name, wav, SAMPLE_RATE, subtype="FLOAT")


def make_manifest(root: Path) -> Manifest:
    """Continuation pairs of every song under `root`; the last song in order of name is the validation."""
    songs = sorted(root.glob("*.wav"))
    pairs = []
    for song in songs:
        sha256 = hashlib.sha256(song.read_bytes()).hexdigest()
        frames = soundfile.info(song).frames
        starts = range(0, frames, CLIP)
        clips = [Clip(song.name, start, min(CLIP, frames - start), sha256) for start in starts]
        for i in range(len(clips) - 1):
            split = "val" if song == songs[-1] else "train"
            pairs.append(Pair(f"{song.stem}_{i}", split, "continuation", clips[i], clips[i + 1]))
    return Manifest(root, CLIP, SAMPLE_RATE, 0, tuple(pairs))


@pytest.fixture
def songs(tmp_path):
    root = tmp_path / "songs of José"
    write_song(root, "a.wav", 6, 1)
    write_song(root, "b.wav", 5, 2)
    write_song(root, "c.wav", 3, 3)
    return root  # 14 clips


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def encode(manifest, cache, codec=None):
    """The index, and how many clips were encoded for it."""
    codec = codec or CountingCodec()
    before = codec.count
    index = encode_manifest(manifest, codec, cache)
    return index, codec.count - before


def latent_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*-*.npy"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_right(index, manifest):
    """Every pair of the manifest is there, in order, and equals the codec's latents of its two clips."""
    codec = MdctCodec()
    for split in ("train", "val"):
        latent_pairs, wanted = LatentPairs(index, split, codec.fingerprint), manifest.split(split)
        assert len(latent_pairs) == len(wanted)
        for i, (got, pair) in enumerate(zip(latent_pairs, wanted, strict=True)):
            assert latent_pairs.pair_id(i) == pair.id
            for latents, clip in zip(got, (pair.input, pair.target), strict=True):
                wav = load_audio(manifest.path(clip), clip.offset, clip.length)
                wav = torch.nn.functional.pad(wav, (0, CLIP - wav.shape[1]))
                assert latents.dtype == torch.float32
                # of amplitudes: near zero a cube root magnifies what processors round differently
                assert torch.allclose(latents**3, codec.encode(wav[None])[0] ** 3, rtol=1e-4, atol=1e-3)


# --- writing ----------------------------------------------------------------------------------------------------------


def test_every_pair_comes_back_in_order_with_its_latents(songs, cache):
    short = soundfile.read(songs / "c.wav", dtype="float32")[0][: -HOP // 2]  # its last clip is padded with zeros
    soundfile.write(songs / "c.wav", short, SAMPLE_RATE, subtype="FLOAT")
    manifest = make_manifest(songs)
    index, encoded = encode(manifest, cache)
    assert encoded == 14
    assert_right(index, manifest)
    latent_pairs = LatentPairs(index, "train")
    assert (latent_pairs.dim, latent_pairs.frames, latent_pairs.clip_length) == (DIM, 10, CLIP)
    assert latent_pairs.fingerprint == MdctCodec().fingerprint


def test_every_file_is_named_by_its_clip_and_its_checksum(songs, cache):
    manifest = make_manifest(songs)
    index, _ = encode(manifest, cache)
    found = dict(file.stem.split("-") for file in latent_files(index.parent))
    assert found.keys() == {clip.key for pair in manifest.pairs for clip in (pair.input, pair.target)}
    for file in latent_files(index.parent):
        latents = np.load(file)
        assert (latents.shape, latents.dtype) == ((DIM, 10), np.float32)
        assert f"{zlib.crc32(latents):08x}" == file.stem.split("-")[1]


def test_the_cache_does_not_depend_on_the_number_of_cores(songs, tmp_path, monkeypatch):
    manifest, folders = make_manifest(songs), []
    for cores in (1, 5):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: range(cores))
        folders.append(encode(manifest, tmp_path / str(cores))[0].parent)
    one, many = folders
    assert contents(one) == contents(many)


def test_encoding_leaves_torchs_threads_as_they_were(songs, cache):
    torch.set_num_threads(2)
    try:
        encode(make_manifest(songs), cache)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_a_second_run_encodes_nothing_and_a_new_song_only_itself(songs, cache):
    index, _ = encode(make_manifest(songs), cache)
    assert encode(make_manifest(songs), cache) == (index, 0)
    (songs / "a.wav").rename(songs / "aa.wav")  # known by its content, not by its name
    write_song(songs, "d.wav", 3, 4)
    manifest = make_manifest(songs)
    index, encoded = encode(manifest, cache)
    assert encoded == 3
    assert_right(index, manifest)


def test_another_codec_or_clip_length_does_not_share_the_cache(songs, cache, edit_code):
    encode(make_manifest(songs), cache)
    edit_code("lib.codec.mdct")
    assert encode(make_manifest(songs), cache)[1] == 14
    assert len(list(cache.iterdir())) == 2


def test_other_code_does_not_share_the_cache(songs, cache, edit_code):
    encode(make_manifest(songs), cache)
    for module in ("lib.data.latents", "lib.codec.encodec", "lib.audio.files"):
        edit_code(module)
        assert encode(make_manifest(songs), cache)[1] == 14
        assert encode(make_manifest(songs), cache)[1] == 0
    assert len(list(cache.iterdir())) == 4


@pytest.mark.parametrize("die_at", [1, 6, 14])
def test_a_killed_run_resumes_with_what_is_missing(songs, cache, die_at, monkeypatch):
    manifest = make_manifest(songs)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: [0])
    process = multiprocessing.get_context("fork").Process(target=encode, args=(manifest, cache, CountingCodec(die_at)))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not list(cache.glob("*/index-*"))
    kept = len(list(cache.glob("*/*-*.npy")))
    assert kept == die_at - 1
    index, encoded = encode(manifest, cache)
    assert encoded == 14 - kept
    assert_right(index, manifest)


def test_two_processes_may_encode_at_once(songs, cache):
    manifest = make_manifest(songs)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=encode, args=(manifest, cache)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    index, encoded = encode(manifest, cache)
    assert encoded == 0
    assert_right(index, manifest)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1000)


def empty(path: Path) -> None:
    os.truncate(path, 0)


@pytest.mark.parametrize("damage", [flip_a_byte, cut_short, empty, Path.unlink])
def test_damaged_latents_are_never_read_and_only_they_are_rebuilt(songs, cache, damage):
    """Also when the damage comes after they have been read once."""
    manifest = make_manifest(songs)
    index, _ = encode(manifest, cache)
    before, latent_pairs = contents(index.parent), LatentPairs(index, "train")
    good = [latent_pairs[i] for i in range(len(latent_pairs))]
    victim = index.with_name(f"{latent_pairs._table[1, 1].decode()}.npy")  # the target of pair 0, too
    written = {file: file.stat().st_mtime_ns for file in latent_files(index.parent) if file != victim}
    damage(victim)

    errors = {}
    for i in range(len(latent_pairs)):
        try:
            assert all(torch.equal(x, y) for x, y in zip(latent_pairs[i], good[i], strict=True))
        except UserError as error:
            errors[i] = str(error)
    assert errors.keys() == {0, 1}
    assert all(victim.name in error and "encode the manifest again" in error for error in errors.values())

    assert encode(manifest, cache) == (index, 1)
    assert contents(index.parent) == before  # the same bits, so indexes of other manifests still hold
    assert {file: file.stat().st_mtime_ns for file in written} == written
    assert_right(index, manifest)


def test_a_damaged_file_is_removed(songs, cache):
    manifest = make_manifest(songs)
    index, _ = encode(manifest, cache)
    file = latent_files(index.parent)[0]
    other = file.rename(file.with_name(file.stem.split("-")[0] + "-00000000.npy"))  # as of another processor's bits
    assert encode(manifest, cache) == (index, 1)
    assert not other.exists()
    assert_right(index, manifest)


def test_another_manifests_clips_are_left_alone(songs, cache):
    index, _ = encode(make_manifest(songs), cache)
    (songs / "a.wav").unlink()
    for file in latent_files(index.parent):
        flip_a_byte(file)
    before, manifest = contents(index.parent), make_manifest(songs)
    index, encoded = encode(manifest, cache)
    assert encoded == 8
    assert_right(index, manifest)
    changed = {name for name, content in contents(index.parent).items() if before.get(name, content) != content}
    assert len(changed) == 8  # and the six clips of the removed song are not this manifest's to check or rebuild


def test_clips_that_cannot_be_used_are_dropped_with_their_pairs(songs, cache, caplog):
    manifest = make_manifest(songs)
    (songs / "a.wav").write_bytes(b"not audio")
    write_song(songs, "b.wav", 5, 99)  # other music than the manifest saw
    index, encoded = encode(manifest, cache)
    assert encoded == 3 + 5  # what the other music would need has been encoded too
    assert "11 of 14 clips are left out with their pairs: a.wav at sample 0: " in caplog.text
    assert "and 8 more" in caplog.text
    assert [LatentPairs(index, "val").pair_id(i) for i in range(2)] == ["c_0", "c_1"]
    with pytest.raises(UserError, match="split 'train' has no pairs; there are val"):
        LatentPairs(index, "train")


def test_a_file_that_changed_since_the_manifest_is_dropped(songs, cache, caplog):
    manifest = make_manifest(songs)
    write_song(songs, "b.wav", 5, 99)  # other music than the manifest saw
    encode(manifest, cache)
    assert "b.wav at sample 0: changed since the manifest was built; build the manifest again" in caplog.text


def test_a_song_is_encoded_up_to_its_first_bad_clip(songs, cache, caplog):
    wav = soundfile.read(songs / "a.wav", dtype="float32")[0]
    wav[2 * CLIP + 5] = np.nan
    soundfile.write(songs / "a.wav", wav, SAMPLE_RATE, subtype="FLOAT")
    index, _ = encode(make_manifest(songs), cache)
    assert f"4 of 14 clips are left out with their pairs: a.wav at sample {2 * CLIP}: " in caplog.text
    ids = LatentPairs(index, "train")
    assert [ids.pair_id(i) for i in range(len(ids))] == ["a_0", "b_0", "b_1", "b_2", "b_3"]


def test_no_pair_left_is_one_line(songs, cache):
    manifest = make_manifest(songs)
    for song in songs.iterdir():
        song.unlink()
    with pytest.raises(UserError, match="no pair of the manifest can be encoded") as caught:
        encode(manifest, cache)
    assert "\n" not in str(caught.value)


def test_a_cache_folder_that_cannot_be_written_is_one_line(songs, cache, monkeypatch):
    manifest = make_manifest(songs)
    cache.write_text("a file")
    with pytest.raises(UserError, match=r"cannot be written .*choose a cache folder"):
        encode(manifest, cache)
    cache.unlink()

    def refuse(source, target):
        raise PermissionError(errno.EACCES, "Permission denied", str(target))

    monkeypatch.setattr(os, "replace", refuse)  # not chmod: the superuser may write anywhere
    with pytest.raises(UserError, match=r"cannot be written \(Permission denied\)"):
        encode(manifest, cache)
    assert not list(cache.rglob("*.tmp"))


def test_a_codec_of_another_sample_rate_is_refused(songs, cache):
    codec = CountingCodec()
    codec.sample_rate = 48_000
    with pytest.raises(UserError, match=r"48000 Hz.*24000 Hz"):
        encode(make_manifest(songs), cache, codec)


# --- reading ----------------------------------------------------------------------------------------------------------


def test_another_codecs_fingerprint_is_refused(songs, cache):
    path, _ = encode(make_manifest(songs), cache)
    with pytest.raises(UserError, match=r"holds latents of codec mdct .*, not of 000000"):
        LatentPairs(path, "train", "0" * 64)


def test_a_missing_or_damaged_index_is_named(songs, cache):
    path, _ = encode(make_manifest(songs), cache)
    with pytest.raises(UserError, match=r"absent\.npz: no such file; encode the manifest again"):
        LatentPairs(cache / "absent.npz", "train")
    whole = path.read_bytes()
    table = whole.index(b"a_0")  # within the pairs of 'train'
    for content in (b"", b"{", whole[:100], whole[:-10], whole[:table] + b"b" + whole[table + 1 :]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"damaged .*encode the manifest again"):
            LatentPairs(path, "train")
    assert encode(make_manifest(songs), cache) == (path, 0)
    assert path.read_bytes() == whole


def test_reading_keeps_no_file_open(songs, cache):
    latent_pairs = LatentPairs(encode(make_manifest(songs), cache)[0], "train")
    open_before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else None
    first = [latent_pairs[i] for i in range(len(latent_pairs))]
    again = [latent_pairs[i] for i in range(len(latent_pairs))]
    assert all(torch.equal(x, y) for one, two in zip(first, again, strict=True) for x, y in zip(one, two, strict=True))
    if open_before is not None:
        assert len(os.listdir("/proc/self/fd")) == open_before


def test_threads_read_the_same_rows_as_one(songs, cache):
    latent_pairs = LatentPairs(encode(make_manifest(songs), cache)[0], "train")
    wanted = [latent_pairs[i] for i in range(len(latent_pairs))]
    with ThreadPoolExecutor(8) as pool:
        places = [i % len(wanted) for i in range(400)]
        got = list(pool.map(latent_pairs.__getitem__, places))
    for i, pair in zip(places, got, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(pair, wanted[i], strict=True))


def test_a_dataloaders_workers_read_the_same_rows(songs, cache):
    latent_pairs = LatentPairs(encode(make_manifest(songs), cache)[0], "train")
    latent_pairs[0]
    copy = pickle.loads(pickle.dumps(latent_pairs))
    assert torch.equal(copy[3][1], latent_pairs[3][1])
    batches = list(DataLoader(latent_pairs, batch_size=2, num_workers=2))
    got = torch.cat([inputs for inputs, _ in batches])
    assert torch.equal(got, torch.stack([inputs for inputs, _ in latent_pairs]))


def test_rows_are_copies_that_may_be_changed(songs, cache):
    latent_pairs = LatentPairs(encode(make_manifest(songs), cache)[0], "train")
    before = latent_pairs[0][0].clone()
    latent_pairs[0][0].add_(1)
    assert torch.equal(latent_pairs[0][0], before)


OPEN_AND_MEASURE = """
import sys
import lib.data.latents

def resident():
    return [int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmRSS")][0]

before = resident()
latent_pairs = lib.data.latents.LatentPairs(sys.argv[1], "train")
assert len(latent_pairs) == 1_000_000 and latent_pairs.pair_id(999_999) == "train_cross_0999999"
assert latent_pairs[0][0].shape == latent_pairs[999_999][1].shape == (128, 1200)
print(resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures memory the Linux way")
def test_a_million_pairs_open_in_little_memory(tmp_path):
    command = [sys.executable, "-c", OPEN_AND_MEASURE, str(simulated_index(tmp_path, 1_000_000))]
    root = Path(lib.data.latents.__file__).parents[2]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert float(result.stdout) < 200  # MiB; a Python object for every pair would take more
