"""What a super-resolver is worth on real music: songs and albums that it was not trained on, by several measures."""

import dataclasses
import hashlib
import itertools
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import librosa
import numpy as np
import torch
from settings import settings_of
from writing import write_record

from lib.audio.files import AudioReport, load_audio
from lib.pipeline import say
from lib.presets import Preset
from lib.superres.degradation import Degradation, Examples, Library, read_library
from lib.superres.evaluation import FLOOR, LEAST, LSD_HOP, SEED, Score, evaluate, lsd, restorations
from lib.superres.mel import N_FFT, SAMPLE_RATE, bin_of
from lib.superres.resolver import Restoration, SuperResolver, file_band
from lib.superres.training import Plan, encode, load_part, train_part
from lib.superres.unet import CONTEXTS
from lib.training.run import Run
from lib.util.stats import mean_and_error

HELD_OUT = 60  # songs, the first by the hash of their content, on which everything is measured
CHOOSING = 12  # of the other songs, those that choose checkpoints
ALBUMS = 4  # the music of a package is an album; the first by the hash of their names are held out as a whole, too
FEWER = (30,)  # songs to train with: what more of them brings
MAIN = ("songs", 0)  # the split and the seed with which all parts are trained
STEPS = (1, 2, 5, 10, 20, 50)  # of the sampler
HEARD_AT, HEARD = (4_000, 12_000), 2.56  # cutoffs in Hz, and seconds of each song, for the models of perception, ...
HEARD_SONGS = 20  # ... of so many of the songs, or of as many as there are clips
KNOWN = 0.5  # share of a clip whose whole band is given, so that a global context should help


class Split(NamedTuple):
    training: Library
    judging: Library  # the same, with the songs to judge by in place of those that choose

    @classmethod
    def of(cls, songs: Sequence[AudioReport], judged: Sequence[AudioReport]) -> "Split":
        own = {"val": tuple(songs[:CHOOSING]), "train": tuple(songs[CHOOSING:])}
        return cls(Library(own), Library(own | {"val": tuple(judged)}))


def splits_of(folders: Sequence[Path], clip_length: int) -> dict[str, Split]:
    read = itertools.chain(*(read_library(folder, clip_length).songs.values() for folder in folders))
    songs = sorted(itertools.chain(*read), key=lambda song: song.sha256)
    judged, others = songs[:HELD_OUT], songs[HELD_OUT:]
    albums = sorted({album_of(song) for song in songs}, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    apart = [song for song in songs if album_of(song) in albums[:ALBUMS]]
    found = {"songs": Split.of(others, judged)}
    found["albums"] = Split.of([song for song in songs if song not in apart], apart)
    return found | {f"{count} songs": Split.of(others[: CHOOSING + count], judged) for count in FEWER}


def album_of(song: AudioReport) -> str:
    return song.path.parent.name


class Study(NamedTuple):
    """Settings, splits of the music, and the folder of runs."""

    preset: Preset
    splits: dict[str, Split]
    out: Path

    def plan(self, seed: int = 0) -> Plan:
        record = settings_of(self.preset)
        steps = {"completion_steps": record.superres_completion_steps, "vae_steps": record.superres_vae_steps}
        longer = dataclasses.replace(self.preset.superres, **steps, steps=record.superres_steps)
        return longer.training_plan(self.preset.train.seed + seed)

    def folder(self, name: str, seed: int) -> Path:
        return self.out / f"{name}-{seed}".replace(" ", "-")

    def resolver(self, name: str, seed: int) -> SuperResolver:
        """The whole system, with the completion of a run."""
        resolver = SuperResolver(self.folder(*MAIN))
        completion = load_part(Run.open(self.folder(name, seed) / "completion"), "completion")
        resolver.completion = completion.to(resolver.device)
        return resolver


def record_superres(preset: Preset, music: Sequence[Path], out: Path, folder: Path) -> None:
    """Train the whole system once, and its completion with other seeds and on other songs, too; measure all.
    `music`: folders."""
    splits = splits_of(music, preset.superres.training_plan(0).completion_training.clip_length)
    study, seeds = Study(preset, splits, out), range(settings_of(preset).superres_seeds)
    plan = study.plan()
    runs = [("songs", seed) for seed in seeds] + [(name, 0) for name in splits if name != "songs"]
    say(f"super-resolution: {len(runs)} runs on the music in {' and '.join(map(str, music))}")
    workers = 1 if torch.cuda.is_available() else os.cpu_count()
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:

        def each(function: Callable, tasks: Sequence[tuple]) -> list[Any]:
            return list(pool.map(function, itertools.repeat(study), *zip(*tasks, strict=True)))

        each(train, [("vae", *MAIN), *(("completion", *run) for run in runs)])
        each(train, [("diffusion", *MAIN)])
        scores = dict(zip(runs, each(judged, runs), strict=True))
        contexts = each(context_losses, [(seed,) for seed in seeds])
        curve, *perceived = each(measured, [(by_steps, None), *((perceptions, cutoff) for cutoff in HEARD_AT)])
    parts = {"completion": plan.completion_training, "vae": plan.vae_training, "diffusion": plan.training}
    facts = {
        "preset": preset.name,
        "sampler_steps": preset.superres.sampler_steps,
        "steps": {part: config.max_steps for part, config in parts.items()},
        "songs": {name: [len(s.training.songs["train"]), len(s.judging.songs["val"])] for name, s in splits.items()},
        "albums": sorted({album_of(song) for song in splits["albums"].judging.songs["val"]}),
        "others": {
            f"{name}, seed {seed}": [dataclasses.asdict(s) for s in found if s.method == "model"]
            for (name, seed), found in scores.items()
            if (name, seed) != MAIN
        },
        "by_steps": curve,
        "perceived": list(itertools.chain(*perceived)),
        "contexts": {context: [losses[context] for losses in contexts] for context in CONTEXTS},
    }
    write_record(folder / "superres.json", scores[MAIN], facts)


def train(study: Study, part: str, name: str, seed: int) -> None:
    torch.set_num_threads(1)  # as many runs as cores
    plan = study.plan(seed)
    sizes, config = {
        "completion": (plan.completion, plan.completion_training),
        "vae": (plan.vae, plan.vae_training),
        "diffusion": (plan.denoiser, plan.training),
    }[part]
    train_part(study.folder(name, seed), part, study.splits[name].training, sizes, config, resume=True)


def judged(study: Study, name: str, seed: int) -> tuple[Score, ...]:
    """Every method on held-out clips; draws are measured with the whole system alone."""
    torch.set_num_threads(1)
    settings = Restoration(steps=study.preset.superres.sampler_steps if (name, seed) == MAIN else 0)
    library, clips = study.splits[name].judging, settings_of(study.preset).superres_clips
    return evaluate(study.resolver(name, seed), library, settings, clips=clips).scores


def context_losses(study: Study, seed: int) -> dict[str, float]:
    """Last validation losses of diffusion models that differ in their context alone, given half of each clip."""
    torch.set_num_threads(1)
    plan, folder, losses = study.plan(seed), study.folder(*MAIN), {}
    library = study.splits["songs"].training
    encoded = encode(folder, library, plan.training, known=KNOWN)
    for context in CONTEXTS:
        sizes, name = dataclasses.replace(plan.denoiser, context=context), f"{context}-{seed}"
        run = train_part(folder, "diffusion", library, sizes, plan.training, name=name, encoded=encoded, resume=True)
        losses[context] = run.metrics("val")[-1]["loss"]
    return losses


def measured(study: Study, measure: Callable, cutoff: int | None) -> list[dict[str, Any]]:
    """What a measure finds with the whole system on the held-out songs."""
    torch.set_num_threads(1)
    return measure(study, study.resolver(*MAIN), study.splits["songs"].judging, cutoff)


def by_steps(study: Study, resolver: SuperResolver, library: Library, _: None) -> list[dict[str, Any]]:
    """LSD above the cutoff of one draw, over steps of the sampler."""
    clips, rows = settings_of(study.preset).superres_clips // 2, []
    for cutoff in HEARD_AT:
        examples = Examples(library, "val", clips, resolver.clip_length, SEED, Degradation(cutoff))
        original, low = (torch.stack(wavs) for wavs in zip(*(examples[i] for i in range(clips)), strict=True))
        songs = [examples.song(i) for i in range(clips)]
        tops = torch.tensor([file_band(song) for song in songs])
        for steps in STEPS:
            settings, batches = Restoration(steps=steps), torch.arange(clips).split(resolver.batch_size)
            drawn = torch.cat([resolver.restore(low[one], cutoff, settings, one.tolist()) for one in batches])
            distances = lsd(drawn, original, above=cutoff, below=tops)[tops >= cutoff + LEAST]
            names = [song.sha256 for song, top in zip(songs, tops, strict=True) if top >= cutoff + LEAST]
            rows.append({"cutoff": cutoff, "steps": steps, "lsd": mean_and_error(distances.tolist(), names)})
    return rows


def perceptions(study: Study, resolver: SuperResolver, library: Library, cutoff: int) -> list[dict[str, Any]]:
    """For an excerpt of each song: ViSQOL's opinion of each method, 1 to 5 (Chinen et al. 2020, arXiv 2004.09584), and
    the spectral convergence of its onsets above the cutoff."""
    from visqol import VisqolApi  # for the record alone: it is compiled when it is installed

    count, length = min(HEARD_SONGS, settings_of(study.preset).superres_clips), round(HEARD * SAMPLE_RATE)
    songs = library.songs["val"][:count]
    original = torch.stack(
        [load_audio(s, (s.samples_at(SAMPLE_RATE) - length) // 2, length, SAMPLE_RATE) for s in songs]
    )
    low = torch.stack([Degradation(cutoff)(wav) for wav in original])
    settings = Restoration(steps=study.preset.superres.sampler_steps)
    sounds, tops = restorations(resolver, original, low, cutoff, settings), [file_band(song) for song in songs]
    opinion, rows = VisqolApi(), []
    opinion.create(mode="audio")
    for method, wavs in sounds.items():
        if method == "original":
            continue
        pairs = list(zip(wavs[:, 0].double().numpy(), original[:, 0].double().numpy(), strict=True))
        opinions = [opinion.measure_from_arrays(ref, wav, sample_rate=SAMPLE_RATE).moslqo for wav, ref in pairs]
        apart = [onset_convergence(*pair, cutoff, top) for pair, top in zip(pairs, tops, strict=True)]
        kept = [value for value, top in zip(apart, tops, strict=True) if top >= cutoff + LEAST]
        row = {"cutoff": cutoff, "method": method, "songs": len(songs)}
        rows.append(row | {"visqol": mean_and_error(opinions), "onsets": mean_and_error(kept)})
    return rows


def onset_convergence(estimate: np.ndarray, reference: np.ndarray, cutoff: float, top: float) -> float:
    """‖a − b‖ / ‖b‖ of the onset strengths of two signals `[N]` in a band (Hz): 0 for the same, 1 for none. Powers
    are floored at the rounding noise of 16 bits."""
    bins = slice(bin_of(cutoff), bin_of(top) + 1)

    def strength(wav: np.ndarray) -> np.ndarray:
        power = np.maximum(np.abs(librosa.stft(wav, n_fft=N_FFT, hop_length=LSD_HOP))[bins] ** 2, FLOOR)
        return librosa.onset.onset_strength(S=librosa.power_to_db(power, ref=1.0, top_db=None), sr=SAMPLE_RATE)

    a, b = strength(estimate), strength(reference)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
