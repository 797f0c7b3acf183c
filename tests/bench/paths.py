"""What surrounds the model: codecs, folders taken in, two long files fused, pairs read from disk."""

import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import av
import encodec.model
import numpy as np
import psutil
import soundfile
import torch
from measure import ROUNDS, alternate, device, synchronize, timed
from simulated import simulated_index

import lib.fuse
from lib.audio.files import SAMPLE_RATE, check_files
from lib.audio.synth import render_song
from lib.codec.codec import load_codec
from lib.codec.encodec import EncodecCodec
from lib.codec.mdct import MdctCodec
from lib.data.latents import LatentPairs, encode_manifest, encoding_check
from lib.data.pairs import build_manifest
from lib.model.cascade import CascadeConfig
from lib.model.fusion import FusionModel
from lib.model.masks import MaskingConfig
from lib.training.batches import TrainingOrder, prefetch_batches
from lib.training.config import TrainConfig
from lib.training.run import Run

CLIP = 16  # seconds


# --- codecs -----------------------------------------------------------------------------------------------------------


def codecs() -> list[dict[str, Any]]:
    """Times real time. EnCodec has random weights, which cost what trained ones do; 'plain' is the package as its
    documentation calls it, a clip at a time."""
    wavs = torch.stack([torch.from_numpy(render_song(0, i, CLIP * SAMPLE_RATE)).float() for i in range(4)])[:, None]
    mdct = MdctCodec()
    latents = mdct.encode(wavs)
    encode, decode = alternate(lambda: mdct.encode(wavs), lambda: mdct.decode(latents))
    rows = [
        {"codec": "mdct", "what": what, "times_real_time": 4 * CLIP / seconds}
        for what, seconds in (("encode", encode), ("decode", decode))
    ]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", FutureWarning)
        plain = encodec.model.EncodecModel.encodec_model_24khz(pretrained=False).eval()
        here = EncodecCodec(encodec.model.EncodecModel.encodec_model_24khz(pretrained=False), "random")
        latents = plain.encoder(wavs)

        def by_package(network, x):
            return [network(clip) for clip in x.split(1)]

        for what, network, run, x in (
            ("encode", plain.encoder, here.encode, wavs),
            ("decode", plain.decoder, here.decode, latents),
        ):
            stock, mine = alternate(lambda n=network, x=x: by_package(n, x), lambda r=run, x=x: r(x))
            stock_alone, alone = alternate(lambda n=network, x=x: n(x[:1]), lambda r=run, x=x: r(x[:1]), rounds=5)
            rows.append({"codec": "encodec", "what": f"{what}, four clips", "times_real_time": 4 * CLIP / mine})
            rows[-1]["ratio"] = stock / mine
            rows.append({"codec": "encodec", "what": f"{what}, one clip", "times_real_time": CLIP / alone})
            rows[-1]["ratio"] = stock_alone / alone
    return rows


def intake(minutes: float = 2.0, count: int = 8) -> list[dict[str, Any]]:
    """A folder of stereo songs at 44.1 kHz: checked, hashed, paired and encoded by mdct into an empty cache, beside
    what decodes the same files in as many processes and does nothing else. Times real time, by format; 'of the decode'
    compares with FFmpeg, which decodes here too."""
    songs = [render_song(2, i, round(minutes * 60 * 44_100)) for i in range(count)]
    return [_intake(suffix, songs) for suffix in ("wav", "flac", "ogg", "mp3")]


def _intake(suffix: str, songs: list[np.ndarray]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        root, codec = Path(name), load_codec("mdct")
        for i, song in enumerate(songs):
            with soundfile.SoundFile(root / f"{i}.{suffix}", "w", 44_100, 2) as file:
                for part in np.array_split(np.stack([song, 0.9 * song], axis=1), 100):
                    file.write(part)  # its Vorbis encoder overflows the stack on a whole song
        names = [path.name for path in root.iterdir()]

        def decode_all(decode: Callable[[Path], None]) -> None:
            check_files(root, names, decode, "decoding")

        def take_in() -> None:
            with tempfile.TemporaryDirectory() as cache:
                check = encoding_check(codec, cache, 4 * SAMPLE_RATE)
                manifest = build_manifest(root, Path(cache, "manifest.json"), 4.0, check_file=check)
                encode_manifest(manifest, codec, cache)

        runs = (lambda: decode_all(_read), lambda: decode_all(_decode), take_in)
        seconds = alternate(*runs, rounds=3)
    what = ("libsndfile alone", "FFmpeg alone", "taken in")
    speeds = {name: sum(map(len, songs)) / 44_100 / value for name, value in zip(what, seconds, strict=True)}
    return {"format": suffix} | speeds | {"of the decode": seconds[1] / seconds[2]}


def _read(path: Path) -> None:
    soundfile.read(path, dtype="float32")


def _decode(path: Path) -> None:
    with av.open(str(path)) as file:
        for _ in file.decode(audio=0):
            pass


# --- fusing -----------------------------------------------------------------------------------------------------------


def fusing(minutes: float = 3.0) -> dict[str, Any]:
    """`lib.fuse` on two stereo FLAC files at 44.1 kHz: total time, the seconds of every stage, and its memory."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        codec = MdctCodec()
        config, masking = CascadeConfig.reference(), MaskingConfig("learned")
        values = {"cascade": asdict(config), "masking": asdict(masking), "codec": {"name": codec.name}}
        values["codec"]["fingerprint"] = codec.fingerprint
        run = Run.create(root / "run", values)
        torch.manual_seed(0)
        run.save(1, FusionModel(config, masking), {}, is_best=True)
        files = []
        for i in range(2):
            song = render_song(1, i, round(minutes * 60 * 44_100))
            files.append(root / f"{i}.flac")
            soundfile.write(files[-1], torch.from_numpy(song)[:, None].expand(-1, 2).numpy(), 44_100)
        spent: dict[str, float] = defaultdict(float)
        watched = (
            (lib.fuse, "check_audio", "check"),
            (lib.fuse, "load_audio", "read"),
            (MdctCodec, "encode", "encode"),
            (FusionModel, "forward", "model"),
            (MdctCodec, "decode", "decode"),
            (lib.fuse.AudioWriter, "write", "write"),
        )
        memory: list[float] = []
        with watch(watched, spent), sampled_memory(memory):
            seconds = timed(lambda: lib.fuse.fuse_files(*files, root / "out.wav", run, codec), repeats=1)
    third = len(memory) // 3
    return {
        "minutes": minutes,
        "seconds": seconds,
        "times_real_time": 60 * minutes / seconds,
        "stages_times_real_time": {name: 60 * minutes / value for name, value in spent.items()},
        "stages_seconds": dict(spent),
        "memory_growth_mib": max(memory[-third:]) - max(memory[third : 2 * third]),
    }


@contextmanager
def watch(places: tuple, spent: dict[str, float]) -> Iterator[None]:
    """Add up the seconds of each function by its name, in whichever thread it runs."""
    patches, adding = [], threading.Lock()
    for owner, name, key in places:
        function = getattr(owner, name)

        def timed_call(*args, function=function, key=key, **options):
            started = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                synchronize()
                with adding:
                    spent[key] += time.perf_counter() - started

        patches.append(mock.patch.object(owner, name, timed_call))
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


@contextmanager
def sampled_memory(into: list[float]) -> Iterator[None]:
    """Resident MiB, ten times a second."""
    over = threading.Event()

    def sample() -> None:
        while not over.wait(0.1):
            into.append(psutil.Process().memory_info().rss / 2**20)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


# --- data -------------------------------------------------------------------------------------------------------------

STEP = 0.05 if torch.cuda.is_available() else 0.5  # seconds: less than any step of so many clips takes there
OPEN_AND_SHUFFLE = """
import sys, time
import psutil, torch
from lib.training.batches import TrainingOrder
from lib.data.latents import LatentPairs
from lib.training.config import TrainConfig
before, started = psutil.Process().memory_info().rss, time.perf_counter()
pairs = LatentPairs(sys.argv[1], "train")
next(TrainingOrder(len(pairs), TrainConfig(batch_size=8)).steps())
print(time.perf_counter() - started, (psutil.Process().memory_info().rss - before) / 2**20)
"""


def data(sizes: tuple[int, ...] = (1_000, 1_000_000), batch_size: int = 8, steps: int = 30) -> list[dict[str, Any]]:
    """Simulated pairs of 16 s: what opening and shuffling cost, what reading a step costs, and how long a step that
    computes for `STEP` seconds waits for the next. The shards are holes in sparse files: a disk's own time is left out.
    """
    rows = [{"pairs": size, "step_s": STEP} for size in sizes]
    config = TrainConfig(batch_size=batch_size, epochs=1000)
    with tempfile.TemporaryDirectory() as name:
        indices = [simulated_index(Path(name, str(size)), size) for size in sizes]
        found: list[dict[str, list[float]]] = [defaultdict(list) for _ in sizes]
        for _ in range(ROUNDS):  # in turn
            for index, values in zip(indices, found, strict=True):
                command = [sys.executable, "-c", OPEN_AND_SHUFFLE, str(index)]
                root = Path(lib.fuse.__file__).parents[1]
                said = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
                for key, value in zip(("open_and_shuffle_s", "open_and_shuffle_mib"), said.split(), strict=True):
                    values[key].append(float(value))
                pairs = LatentPairs(index, "train")
                values["read_ms"].append(1000 * statistics.median(waits(pairs, config, steps, busy=0.0)))
                waited = statistics.mean(waits(pairs, config, steps, busy=STEP))
                values["stall"].append(waited / (STEP + waited))
    return [
        row | {key: statistics.median(v) for key, v in values.items()} for row, values in zip(rows, found, strict=True)
    ]


def waits(pairs: LatentPairs, config: TrainConfig, steps: int, busy: float) -> list[float]:
    """Seconds that each step waits for its batch, the first few left out, while a step computes for `busy` seconds."""
    chosen, x = torch.arange(len(pairs)), torch.randn(512, 512, device=device())
    order = TrainingOrder(len(pairs), config).steps()
    batches = prefetch_batches(pairs, chosen, order, threads=config.num_workers, pin_memory=torch.cuda.is_available())
    found = []
    for _ in range(steps):
        started = time.perf_counter()
        next(batches)
        began = time.perf_counter()
        found.append(began - started)
        while time.perf_counter() < began + busy:
            torch.mm(x, x)
            synchronize()
    batches.close()
    return found[10:]
