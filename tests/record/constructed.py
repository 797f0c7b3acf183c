"""Outputs whose worth is known, from the stems of demo songs: whether the figure of merit ranks them right. The perfect
fusion is the input's drums with the target's harmony (bass, chords and melody). No run changes what is found here:
notebook 04 shows it as it is recorded."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from writing import write_record

from lib.audio.files import SAMPLE_RATE
from lib.audio.synth import render_song
from lib.evaluation.baselines import Measured, crossover, features_of, recipes
from lib.evaluation.fusion_metrics import sound_metrics
from lib.evaluation.tables import JUDGED, fusion_rows

PAIRS = (0, 1), (4, 5), (8, 9), (1, 8), (5, 2), (10, 11)  # songs of seed 0 whose parts all play from `START` on
START, SECONDS = 10, 4
CROSSOVERS = {"crossover": 750, "crossover, input below": 200, "HPSS with crossover": 2600}  # Hz, best on real music
METRICS = (*JUDGED, "plain_merit")
Songs = Sequence[tuple[int, int]]


def stem(song: int, parts: str = "dbcm") -> Tensor:
    """Parts of a demo song, `[1, N]`."""
    start, length = START * SAMPLE_RATE, SECONDS * SAMPLE_RATE
    samples = render_song(0, song, start + length + SAMPLE_RATE, parts=parts)[start : start + length]
    return torch.from_numpy(samples).float()[None]


def constructed_cases(input: int, target: int) -> dict[str, Tensor]:
    """Outputs `[1, N]` for two demo songs by name, from the perfect fusion to silence."""
    clips = first, second = stem(input), stem(target)
    silence, drums, harmony = torch.zeros_like(first), stem(input, "d"), stem(target, "bcm")
    return {
        "perfect fusion": drums + harmony,
        "its drums 10 ms late": drums.roll(SAMPLE_RATE // 100) + harmony,
        "input": first,
        "target": second,
        "half and half": sum(clips) / 2,
        "input above 2 kHz": crossover(silence, first, 2000),
        "input below 200 Hz": crossover(first, silence, 200),
        "input's drums": drums,
        "silence": silence,
        "white noise": 0.1 * torch.randn(first.shape, generator=torch.Generator().manual_seed(0)),
    }


def measure_cases(pairs: Songs = PAIRS) -> tuple[Measured, Measured]:
    """`sound_metrics` of cases and recipes against both clips; and by stems: onsets of drums, notes of the others."""
    by_clips, by_stems = {}, {}
    for pair in pairs:
        wavs = constructed_cases(*pair)
        wavs |= recipes(wavs["input"], wavs["target"], CROSSOVERS)
        stems = [stem(song, parts) for song in pair for parts in ("d", "bcm")]
        *found, drums, harmony, target_drums, target_harmony = features_of([*wavs.values(), *stems])
        features = dict(zip(wavs, found, strict=True))
        clips = [features["input"], features["target"]]
        references = [
            dataclasses.replace(clip, rises=hits.rises, full=hits.full, notes=tones.notes)
            for clip, hits, tones in zip(clips, (drums, target_drums), (harmony, target_harmony), strict=True)
        ]
        for name, output in features.items():
            by_clips.setdefault(name, []).append(sound_metrics(output, *clips))
            by_stems.setdefault(name, []).append(sound_metrics(output, *references))
    return by_clips, by_stems


def tables(by_clips: Measured, by_stems: Measured) -> dict[str, Any]:
    """The means over pairs, as notebook 04 shows them."""
    of = {"by_clips": by_clips, "by_stems": by_stems}
    return {name: fusion_rows(measured, METRICS, "case") for name, measured in of.items()}


def as_rows(by_clips: Measured, by_stems: Measured, pairs: Songs = PAIRS) -> list[dict[str, Any]]:
    """A row for each case and pair: its metrics, rounded, against the clips and against stems."""
    rows = []
    for name in by_clips:
        for pair, *found in zip(pairs, by_clips[name], by_stems[name], strict=True):
            clips, stems = ({metric: round(row[metric], 4) + 0.0 for metric in METRICS} for row in found)
            rows.append({"case": name, "songs": list(pair), "by_clips": clips, "by_stems": stems})
    return rows


def measured_in(rows: Sequence[dict[str, Any]]) -> tuple[Measured, Measured]:
    """What `as_rows` made rows of."""
    by_clips, by_stems = {}, {}
    for row in rows:
        by_clips.setdefault(row["case"], []).append(row["by_clips"])
        by_stems.setdefault(row["case"], []).append(row["by_stems"])
    return by_clips, by_stems


def record_constructed(folder: Path) -> None:
    """constructed.json: every case on every pair, and the tables that notebook 04 shows."""
    rows = as_rows(*measure_cases())
    write_record(folder / "constructed.json", rows, {"crossovers": CROSSOVERS} | tables(*measured_in(rows)))
