"""Rows for the tables of notebook 04, numbers as text: the model's parts, masks, losses, fusions and baselines."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lib.evaluation.baselines import Measured, advantage, mean_metrics
from lib.model.discriminator import Discriminator
from lib.model.fusion import FusionModel
from lib.model.masks import Masks, complementarity
from lib.util.stats import Comparison

Row = dict[str, Any]
JUDGED = ("merit", "onsets", "notes", "onsets_left", "notes_left", "beats", "artifacts", "level", "peak")
PLAIN = ("plain_merit", "rhythm", "harmony")
SOURCE_SYSTEM, MASKS_ALONE, WITH_CASCADE = "the source documents' system", "wide masks", "wide masks and a cascade"
ALONE = "its masks without the stages"  # an output, of a trained model with both
STAGE_COLUMNS = "projection_rms", "rms_before_scaling", "output_rms", "target_scale", "applied_scale", "clamped"


def number_row(head: Row, numbers: Mapping[str, Any], form: str = ".2f") -> Row:
    """`head`, and the numbers as text under their names in words."""
    return head | {name.replace("_", " "): f"{number:{form}}" for name, number in numbers.items()}


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def part_rows(model: FusionModel, discriminator: Discriminator | None = None) -> list[Row]:
    """What every part reads, and how many parameters it has."""
    parts = [(f"stage {i}", ", ".join(stage.config.sources), stage) for i, stage in enumerate(model.cascade.stages)]
    if model.mask_generator is not None:
        parts.append(("mask generator", "input, target", model.mask_generator))
    if discriminator is not None:
        parts.append(("discriminator", "clips and fusions", discriminator))
    return [{"part": name, "reads": reads, "parameters": f"{count_parameters(part):,}"} for name, reads, part in parts]


def rows_of(values: Mapping[str, float], name: str, value: str, form: str = ".2f") -> list[Row]:
    """A row for every entry: its key in the column `name`, its number in the column `value`."""
    return [number_row({name: key}, {value: number}, form) for key, number in values.items()]


def mask_rows(masks: Mapping[str, Masks | None]) -> list[Row]:
    """Complementarity, and the share that is taken of the input."""
    rows = []
    for name, m in masks.items():
        if m is not None:
            found = {"complementarity": complementarity(m).mean(), "taken of the input": m.input.mean()}
            rows.append(number_row({"masks": name}, found))
    return rows


def term_rows(first: Mapping[str, Any], last: Mapping[str, Any]) -> list[Row]:
    """Every term of the objective, in two validations of metrics.jsonl."""
    return [
        {"term": name.removeprefix("loss/")} | {f"step {row['step']}": f"{row[name]:.3f}" for row in (first, last)}
        for name in last
        if name.startswith("loss/")
    ]


def stage_rows(row: Mapping[str, Any], num_stages: int) -> list[Row]:
    """RMS values and scales of every stage, from a row of metrics.jsonl."""
    return [number_row({"stage": i}, {c: row[f"stage{i}/{c}"] for c in STAGE_COLUMNS}) for i in range(num_stages)]


def fusion_rows(measured: Measured, metrics: Sequence[str] = JUDGED, head: str = "output") -> list[Row]:
    """Means of some objective metrics of every output."""
    means = {name: mean_metrics(rows) for name, rows in measured.items()}
    return [number_row({head: name}, {metric: mean[metric] for metric in metrics}) for name, mean in means.items()]


def advantage_rows(
    measured: Measured, name: str, found: Mapping[str, Comparison], songs: Sequence[tuple[str, str]]
) -> list[Row]:
    """The output `name` beside each baseline: the advantage in merit that was found and in each of the two scores that
    it is the mean of, and how many pairs it won. `songs`: both songs of each pair."""
    rows = []
    for other, comparison in found.items():
        won = [a["merit"] > b["merit"] for a, b in zip(measured[name], measured[other], strict=True)]
        row = {"baseline": other, "advantage in merit": str(comparison)}
        for score in ("onset_score", "note_score"):
            row[f"in {score.replace('_', ' ')}"] = str(advantage(measured, name, other, songs, score))
        row["pairs won"] = f"{sum(won)} of {len(won)}"
        rows.append(row | {"verdict": comparison.in_words("the baseline")})
    return rows


def overtaken_rows(curve: Sequence[Mapping[str, float]], marks: Mapping[str, float]) -> list[Row]:
    """The merit of each mark, and after how many seconds of training the curve is above it for the first time."""
    above = {name: [f"{row['seconds']:.0f} s" for row in curve if row["merit"] > mark] for name, mark in marks.items()}
    rows = rows_of(marks, "mark", "merit on these pairs", ".3f")
    return [row | {"above it after": (above[row["mark"]] or ["–"])[0]} for row in rows]
