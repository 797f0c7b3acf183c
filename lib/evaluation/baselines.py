"""Baselines that need no training, and a model compared with them on the same pairs. Legend as in `metrics`."""

import importlib
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import librosa
import torch
from torch import Tensor

from lib.audio.decode import mixed
from lib.audio.files import SAMPLE_RATE
from lib.codec.codec import Codec, decoded
from lib.data.latents import LatentPairs
from lib.data.pairs import Manifest
from lib.evaluation.fusion_metrics import SoundFeatures, sound_features, sound_metrics
from lib.model.fusion import FusionModel, check_codec
from lib.training.batches import evenly_spread
from lib.util.errors import UserError
from lib.util.stats import Comparison, paired_comparison

CROSSOVERS = 130.0, 200.0, 320.0, 500.0, 750.0, 1100.0, 1700.0, 2600.0, 4000.0  # Hz, for `best_crossovers`
ORACLE = "best crossover for each pair (oracle)"
Models = Mapping[str, FusionModel]
Measured = Mapping[str, Sequence[Mapping[str, float]]]  # output → one row of metrics per pair


def pairs_to_measure(
    manifest: Manifest, pairs: LatentPairs, count: int, of_two_songs: bool = True
) -> dict[int, tuple[str, str]]:
    """At most `count` pairs, spread evenly: place in `pairs` → both songs, by their hashes. They are of two songs, or
    of any where there are none; or of one song that continues."""
    songs = {pair.id: (pair.input.sha256, pair.target.sha256) for pair in manifest.pairs}
    all_songs = [songs[pairs.pair_id(i)] for i in range(len(pairs))]
    found = [i for i, (input, target) in enumerate(all_songs) if (input != target) is of_two_songs]
    if of_two_songs and not found:  # one song, or continuations alone
        found = list(range(len(all_songs)))
    return {found[k]: all_songs[found[k]] for k in evenly_spread(len(found), max(1, count)).tolist()}


def recipes(input: Tensor, target: Tensor, crossovers: Mapping[str, float]) -> dict[str, Tensor]:
    """What a musician would do by hand with two waveforms `[C, N]`: both crossovers; HPSS, the input's percussive with
    the target's harmonic part (librosa's); and HPSS with a crossover. `crossovers`: Hz, of `best_crossovers`."""
    parts = low_and_high(input, target)
    crossed = {name: crossover(*parts[name], frequency) for name, frequency in crossovers.items()}
    return crossed | {"HPSS": parts["HPSS with crossover"][0]}


def low_and_high(input: Tensor, target: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """What each recipe with a crossover plays below it and above it."""
    own_tones, hits = map(torch.from_numpy, librosa.effects.hpss(input.numpy()))
    tones = torch.from_numpy(librosa.effects.harmonic(target.numpy()))
    return {
        "crossover": (target, input),
        "crossover, input below": (input, target),
        "HPSS with crossover": (hits + tones, hits + own_tones),
    }


def crossover(low: Tensor, high: Tensor, frequency: float) -> Tensor:
    """One waveform `[C, N]` below a frequency (Hz), the other one above."""
    below = torch.fft.rfftfreq(low.shape[-1], 1 / SAMPLE_RATE) < frequency
    return torch.fft.irfft(torch.where(below, torch.fft.rfft(low), torch.fft.rfft(high)), low.shape[-1])


def best_crossovers(pairs: Iterable[tuple[Tensor, Tensor]], codec: Codec) -> dict[str, float]:
    """For each recipe, the frequency of `CROSSOVERS` with the highest mean merit on `pairs` of training latents."""
    merits: Counter[tuple[str, float]] = Counter()  # summed over pairs
    for pair in pairs:
        clips = [decoded(codec, latents[None])[0] for latents in pair]
        wavs = {(name, hz): crossover(*lh, hz) for name, lh in low_and_high(*clips).items() for hz in CROSSOVERS}
        *found, input, target = features_of([*wavs.values(), *clips])
        for key, output in zip(wavs, found, strict=True):
            merits[key] += sound_metrics(output, input, target)["merit"]
    return {name: max(CROSSOVERS, key=lambda hz: merits[name, hz]) for name, _ in merits}


def features_of(wavs: Sequence[Tensor]) -> list[SoundFeatures]:
    """`sound_features` of each, on all processors."""
    importlib.import_module("librosa.beat")  # by one thread: numba compiles meanwhile
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(sound_features, wavs))


@torch.inference_mode()
def fusions(
    input: Tensor, target: Tensor, codec: Codec, models: Models, crossovers: Mapping[str, float] | None = None
) -> dict[str, Tensor]:
    """Every fusion of two latents `[D, T]` by name, as sound `[1, N]` at 24 kHz from the codec: each clip alone, the
    averages of waveforms and of latents, the recipes if there are `crossovers`, and every model's."""
    first, second = decoded(codec, input[None])[0], decoded(codec, target[None])[0]
    wavs = {"input": first, "target": second, "average of waveforms": (first + second) / 2}
    if crossovers:
        wavs |= recipes(first, second, crossovers)
    latents = {"average of latents": (input + target)[None] / 2}
    for name, model in models.items():
        check_codec(model, codec.fingerprint)
        device = next(model.parameters()).device
        latents[name] = model.eval()(input[None].to(device), target[None].to(device)).latents.cpu()
    return wavs | {name: decoded(codec, x)[0] for name, x in latents.items()}


def encoded(pairs: Iterable[tuple[Tensor, Tensor]], codec: Codec) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of latents `[D, T]`, as they are or from pairs of waveforms `[C, N]` at the codec's rate, C 1 or 2.
    `UserError` for a pair of other shapes, or of clips that are not equally long."""
    for i, (input, target) in enumerate(pairs):
        if input.shape != target.shape or input.ndim != 2 or len(input) not in (1, 2, codec.dim):
            wanted = f"two waveforms [1 or 2, N] or two latents [{codec.dim}, T] of one length"
            raise UserError(f"pair {i}: is {list(input.shape)} and {list(target.shape)}; give {wanted}")
        sound = len(input) != codec.dim
        yield (
            tuple(codec.encode(mixed(x, codec.channels)[None])[0] for x in (input, target))
            if sound
            else (input, target)
        )


def measure_fusions(
    pairs: Iterable[tuple[Tensor, Tensor]], codec: Codec, models: Models, crossovers: Mapping[str, float] | None = None
) -> Measured:
    """`sound_metrics` of every output of `fusions`, and with `crossovers` of each pair's own best one, as a mark.
    `pairs`: of latents or waveforms, as `encoded` takes them."""
    rows: dict[str, list[dict[str, float]]] = {}
    for input, target in encoded(pairs, codec):
        wavs = fusions(input, target, codec, models, crossovers)
        marks = [crossover(wavs["target"], wavs["input"], hz) for hz in CROSSOVERS] if crossovers else []
        features = features_of([*wavs.values(), *marks])
        found = [sound_metrics(output, features[0], features[1]) for output in features]  # input and target come first
        for name, row in zip(wavs, found, strict=False):
            rows.setdefault(name, []).append(row)
        if crossovers:
            rows.setdefault(ORACLE, []).append(max(found[len(wavs) :], key=lambda row: row["merit"]))
    return rows


def mean_metrics(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over pairs of one output's rows of `measure_fusions`. `UserError` if there are none."""
    if not rows:
        raise UserError("no pairs were measured; give at least one")
    return {name: math.fsum(row[name] for row in rows) / len(rows) for name in rows[0]}


def advantage(rows: Measured, name: str, over: str, songs: Sequence[tuple[str, str]], by: str = "merit") -> Comparison:
    """How far one output is above another on the same pairs by a metric; `songs`: both songs of each pair."""
    differences = [a[by] - b[by] for a, b in zip(rows[name], rows[over], strict=True)]
    return paired_comparison(differences, *zip(*songs, strict=True))
