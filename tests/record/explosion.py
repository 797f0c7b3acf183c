"""What ends a training in a NaN, and what does not: the three causes that the source documents name, with the terms as
they had them, without epsilons, on short clips of electronic music and of generated songs; the death that is found,
taken away and put in; ways to keep a weak last residual. Runs are kept and resumed by `lib.lab.ablation`."""

import dataclasses
from collections.abc import Iterator, Sequence
from math import inf
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from lib.audio.files import SAMPLE_RATE, load_audio, save_audio
from lib.codec.codec import load_codec
from lib.data.latents import LatentPairs, encode_manifest, encoding_check
from lib.data.pairs import Clip, Manifest, build_manifest
from lib.lab.ablation import Plan, run_plan
from lib.lab.results import Result, by_variant, peak
from lib.lab.variants import (
    CAUSES,
    CREATIVE,
    EXPLODING,
    LEARNABLE,
    PROTECTIONS,
    REFERENCE,
    REPAIR,
    SCHEDULED,
    VARIANTS,
    WEAK_RESIDUALS,
    Variant,
)
from lib.training.batches import evenly_spread
from lib.training.config import TrainConfig
from lib.training.losses import LossConfig
from lib.util.files import file_sha256

ELECTRONIC = "nexuiz-music"  # the folder of the loops
STEPS, SEEDS = 2_000, 5
PAIRS = {"train": 410, "val": 8}  # 205 batches of 2: an epoch of seed 001
RATES, CLIPS = (1e-4, 3e-4), (10.0, None)
WINDOW = 0.5  # seconds
SMALL = {"ffn_mult": 1, "num_heads": 4}
BY_NAME = {variant.name: variant for variant in VARIANTS + SCHEDULED}
CELLS = [*(variant.name for variant in CAUSES.values()), CREATIVE]
ON_SOUND = [name for name in CELLS if BY_NAME[name].loss]  # those that correlate envelopes
KEPT = [REFERENCE, "3 stages", EXPLODING, REPAIR, *(variant.name for variant in WEAK_RESIDUALS)]
LAW = (
    *(Variant(f"last residual {weight:g}", "law", 3, last={"residual_weight": weight}) for weight in (0.05, 0.3)),
    *(Variant(f"last stage {width} wide", "law", last={"width": width}) for width in (192, 768)),
    Variant("2 layers", "law", every={"num_layers": 2}),
    Variant("4 layers", "law", every={"num_layers": 4}),
)


LOG_PENALTY = BY_NAME["causes: log penalty"].loss
PROTECTED = tuple(dataclasses.replace(variant, loss=LOG_PENALTY) for variant in PROTECTIONS.values())
# the model of seed 003, with its objective; its NaNs came in epochs 5, 14 and 24
SEED_003 = dataclasses.replace(
    BY_NAME[LEARNABLE], name="seed 003", loss=BY_NAME[CREATIVE].loss | {"anti_modulation": "log"}
)
LONGER = 24 * 205 + 80


class Experiment(NamedTuple):
    """Trainings that differ in variant and seed only."""

    name: str
    data: str
    variants: tuple[Variant, ...]
    seeds: int = SEEDS
    rate: float = 1e-4
    clip: float | None = 10.0
    window: float | None = None  # seconds of a clip that are decoded, at random; None: all
    guarded: bool = False
    steps: int = STEPS

    def plan(self, seeds: int) -> Plan:
        loss = LossConfig(guarded=self.guarded, window_seconds=self.window)
        base = TrainConfig(
            max_steps=self.steps,
            batch_size=2,
            learning_rate=self.rate,
            clip=self.clip,
            checkpoint_every=250,
            cpu_threads=1,
        )
        base = dataclasses.replace(base, loss=loss, max_val_pairs=PAIRS["val"])
        small = tuple(dataclasses.replace(v, every=SMALL | dict(v.every)) for v in self.variants)
        return Plan(small, 1, min(seeds, self.seeds), base)


def variants(names: Sequence[str]) -> tuple[Variant, ...]:
    return tuple(BY_NAME[name] for name in names)


def experiments() -> Iterator[Experiment]:
    """What is found, its causes, the weak residual and the law first: the grid takes the longest."""
    sound = variants(ON_SOUND)
    for rate in RATES:
        for clip in CLIPS:
            yield Experiment("windows", "loops", sound, rate=rate, clip=clip, window=WINDOW)
    some = variants(["causes: log penalty", CELLS[7], CREATIVE])
    yield Experiment("operation taken away", "loops", some, window=WINDOW, guarded=True)
    yield Experiment("pairs taken away", "loops without silence", some, window=WINDOW)
    yield Experiment("windows", "songs", some, window=WINDOW)
    yield Experiment("pair put in", "songs and silence", some, window=WINDOW)
    yield Experiment("pair put in, operation taken away", "songs and silence", some, window=WINDOW, guarded=True)
    kept = variants(KEPT)
    yield Experiment("weak residual", "loops", kept, guarded=True)
    yield Experiment("law", "loops", LAW, seeds=3, guarded=True)
    yield Experiment("weak residual", "songs", kept, guarded=True)
    yield Experiment("protections", "loops", PROTECTED)
    for data in ("loops", "songs"):
        yield Experiment("longer", data, (SEED_003, BY_NAME[LEARNABLE]), steps=LONGER)
    for rate in RATES[::-1]:
        for data in ("loops", "songs"):
            for clip in CLIPS[::-1]:
                yield Experiment("grid", data, variants(CELLS), rate=rate, clip=clip)


def prepare(music: Path, songs: Path, folder: Path) -> dict[str, Path]:
    """The latents of all data: name → index."""
    codec, found = load_codec("mdct"), {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, root in (("loops", music / ELECTRONIC), ("songs", songs)):
        check = encoding_check(codec, folder, SAMPLE_RATE)
        manifest = build_manifest(root, folder / f"{name}.jsonl", 1.0, check_file=check)
        found[name] = few = of_size(manifest)
        if name == "loops":
            index = encode_manifest(few, codec, folder)
            found["loops without silence"] = without_silence(few, LatentPairs(index, "train"))
        else:
            found["songs and silence"] = with_silence(few, folder / "silence.wav")
    return {name: encode_manifest(manifest, codec, folder) for name, manifest in found.items()}


def of_size(manifest: Manifest) -> Manifest:
    """As many pairs as `PAIRS`, spread evenly over all."""
    chosen = []
    for split, count in PAIRS.items():
        pairs = manifest.split(split)
        chosen += [pairs[i] for i in evenly_spread(len(pairs), count).tolist()]
    return dataclasses.replace(manifest, pairs=tuple(chosen))


def silence(latents: Tensor) -> int:
    """The longest run of frames of latents `[D, T]` that are exactly 0."""
    longest = run = 0
    for silent in (latents == 0).all(dim=0).tolist():
        run = run + 1 if silent else 0
        longest = max(longest, run)
    return longest


def without_silence(manifest: Manifest, pairs: LatentPairs) -> Manifest:
    """Without the training pairs in which a clip is silent for as long as a window."""
    window = round(WINDOW * 75)
    silent = {pair.id for i, pair in enumerate(manifest.split("train")) if max(map(silence, pairs[i])) >= window}
    return dataclasses.replace(manifest, pairs=tuple(pair for pair in manifest.pairs if pair.id not in silent))


def with_silence(manifest: Manifest, path: Path) -> Manifest:
    """With one training pair whose input is silent, but for its last tenth of a second."""
    first = next(i for i, pair in enumerate(manifest.pairs) if pair.split == "train")
    pair = manifest.pairs[first]
    wav = load_audio(manifest.path(pair.input), pair.input.offset, pair.input.length)
    wav[..., : -SAMPLE_RATE // 10] = 0
    save_audio(path, wav)
    clip = Clip(path=str(path.resolve()), offset=0, length=wav.shape[-1], sha256=file_sha256(path))
    pairs = list(manifest.pairs)
    pairs[first] = dataclasses.replace(pair, input=clip)
    return dataclasses.replace(manifest, pairs=tuple(pairs))


def run_all(music: Path, songs: Path, folder: Path) -> list[tuple[Experiment, tuple[Result, ...]]]:
    """Every experiment with its results; first one seed of each, then all."""
    indices = prepare(music, songs, folder / "latents")
    for seeds in (1, 3, SEEDS):
        done: list[tuple[Experiment, tuple[Result, ...]]] = []
        for e in experiments():
            alike = [r for other, results in done if other == e._replace(clip=None) for r in results if e.clip]
            done.append((e, run(e, seeds, indices[e.data], folder / "runs", alike)))
    return done


def run(e: Experiment, seeds: int, index: Path, folder: Path, unclipped: Sequence[Result]) -> tuple[Result, ...]:
    """The results of an experiment. Where no gradient of the `unclipped` runs is longer than the clip, they are also
    those with it, bit for bit."""
    longest = {name: max(peak(r) for r in runs) for name, runs in by_variant(unclipped).items()}
    same = tuple(r for r in unclipped if longest[r.variant] <= e.clip)
    left = tuple(v for v in e.variants if longest.get(v.name, inf) > (e.clip or 0))
    return same + run_plan(e._replace(variants=left).plan(seeds), index, "mdct", folder)


if __name__ == "__main__":
    import sys

    run_all(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
