"""Rows of the tables: every number where it belongs, against counts and values by hand."""

import pytest
import torch

from lib.evaluation.tables import (
    advantage_rows,
    count_parameters,
    fusion_rows,
    mask_rows,
    overtaken_rows,
    part_rows,
    rows_of,
    stage_rows,
    term_rows,
)
from lib.model.discriminator import Discriminator
from lib.model.fusion import FusionModel
from lib.model.masks import MaskingConfig, Masks
from lib.util.stats import Comparison


@pytest.mark.parametrize("masking", ["learned", "none"])
def test_parts_are_all_of_the_model_and_the_discriminator(tiny_cascade, masking):
    model, discriminator = FusionModel(tiny_cascade(), MaskingConfig(masking)), Discriminator(8)
    rows = part_rows(model, discriminator)
    names = ["stage 0", "stage 1", *["mask generator"] * (masking == "learned"), "discriminator"]
    assert [row["part"] for row in rows] == names
    total = sum(int(row["parameters"].replace(",", "")) for row in rows)
    assert total == count_parameters(model) + count_parameters(discriminator)
    assert rows[1]["reads"] == "noisy_input, previous, noisy_target"


def test_rows_of_a_mapping():
    assert rows_of({"a": 1.005, "b": 20.0}, "output", "loss") == [
        {"output": "a", "loss": "1.00"},
        {"output": "b", "loss": "20.00"},
    ]
    assert rows_of({"a": 0.03}, "term", "weight", "g") == [{"term": "a", "weight": "0.03"}]


def test_masks_that_are_not_there_have_no_row():
    masks = Masks(torch.full((2, 3, 4), 0.25), torch.full((2, 3, 4), 0.5))
    assert mask_rows({"some": masks, "none": None}) == [
        {"masks": "some", "complementarity": "0.88", "taken of the input": "0.25"}
    ]


def test_terms_in_two_validations():
    first = {"step": 2, "loss": 9.0, "loss/mel": 2.0, "stage0/output_rms": 1.0}
    last = {"step": 8, "loss": 8.0, "loss/mel": 1.0, "stage0/output_rms": 1.0}
    assert term_rows(first, last) == [{"term": "mel", "step 2": "2.000", "step 8": "1.000"}]
    assert term_rows(last, last) == [{"term": "mel", "step 8": "1.000"}]


def test_stages_by_their_columns():
    names = ("projection_rms", "rms_before_scaling", "output_rms", "target_scale", "applied_scale", "clamped")
    row = {f"stage{i}/{name}": i + k / 10 for i in range(2) for k, name in enumerate(names)}
    rows = stage_rows(row, 2)
    assert [entry["stage"] for entry in rows] == [0, 1]
    assert list(rows[1].values())[1:] == ["1.00", "1.10", "1.20", "1.30", "1.40", "1.50"]
    assert "rms before scaling" in rows[0]


def test_fusions_are_means_and_advantages_count_the_pairs_won():
    measured = {
        "model": [{"merit": 0.5, "level": 1.0}, {"merit": 0.3, "level": 3.0}],
        "average": [{"merit": 0.4, "level": 1.0}, {"merit": 0.4, "level": 1.0}],
    }
    for name, (onsets, notes) in {"model": (0.5, 0.25), "average": (0.25, 0.5)}.items():
        measured[name] = [row | {"onset_score": onsets, "note_score": notes} for row in measured[name]]
    assert fusion_rows(measured, ("level", "merit"))[0] == {"output": "model", "level": "2.00", "merit": "0.40"}
    songs = [("a", "b"), ("c", "d")]
    (row,) = advantage_rows(measured, "model", {"average": Comparison(0.1, 0.01, 9)}, songs)
    assert row == {
        "baseline": "average",
        "advantage in merit": "+0.100 ± 0.010",
        "in onset score": "+0.250 ± 0.000",
        "in note score": "-0.250 ± 0.000",
        "pairs won": "1 of 2",
        "verdict": "better than the baseline",
    }


def test_without_a_discriminator_it_has_no_row(tiny_cascade):
    assert [row["part"] for row in part_rows(FusionModel(tiny_cascade()))] == ["stage 0", "stage 1"]


def test_a_mark_is_overtaken_when_the_curve_is_above_it_for_the_first_time():
    curve = [{"seconds": s, "merit": m} for s, m in ((0.0, 0.3), (9.6, 0.5), (20.0, 0.4), (30.0, 0.6))]
    rows = overtaken_rows(curve, {"lower": 0.2, "higher": 0.45, "equal": 0.6})
    assert [row["above it after"] for row in rows] == ["0 s", "10 s", "–"]
    assert rows[1] == {"mark": "higher", "merit on these pairs": "0.450", "above it after": "10 s"}
