"""The record: a small file that gives back its results, or says what is wrong with it."""

import math
from dataclasses import dataclass

import pytest

from lib.lab.results import Result, read_record, write_record
from lib.util.errors import UserError


def made_up(**changes) -> Result:
    values = {"start": {"grad_norm": 1.23456}, "end": {"grad_norm": 98765.4321}, "final": {"mse": 1e-7 / 3}}
    values |= {"grad_norm": tuple(float(i) for i in range(100)), "run": "/somewhere/runs/0123abcd", "non_finite": None}
    return Result(**{"variant": "0.3× repair", "seed": 1, "num_layers": 6, "steps": 100} | values | changes)


def test_a_record_keeps_four_digits_and_forty_norms(tmp_path):
    write_record(tmp_path / "record.json", [made_up().for_record()], {"clips": "4 s"})
    (result,), facts = read_record(tmp_path / "record.json")
    assert (result.variant, result.seed, result.num_layers, result.steps) == ("0.3× repair", 1, 6, 100)
    assert result.start == {"grad_norm": 1.235}
    assert result.end == {"grad_norm": 98770.0}
    assert result.final == {"mse": 3.333e-08}
    assert result.run == "0123abcd"
    assert facts == {"clips": "4 s"}
    assert len(result.grad_norm) == 40
    assert result.grad_norm[:4] == (0.5, 3.0, 6.0, 8.5)  # medians of 0–1, 2–4, 5–7, 8–9
    assert result.grad_norm[-1] == 98.5
    text = (tmp_path / "record.json").read_text()
    assert "somewhere" not in text
    assert "×" in text


def test_few_norms_and_missing_values_are_kept(tmp_path):
    broken = {"step": 3, "stage": None, "tensor": "loss"}
    given = [made_up(grad_norm=(1.0, 2.0), run="a"), made_up(final=None, non_finite=broken, grad_norm=(), run="b")]
    write_record(tmp_path / "record.json", [r.for_record() for r in given], {})
    once = read_record(tmp_path / "record.json")[0]
    assert [r.grad_norm for r in once] == [(1.0, 2.0), ()]
    assert (once[1].final, once[1].non_finite) == (None, broken)
    write_record(tmp_path / "again.json", [r.for_record() for r in once], {})
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "record.json").read_bytes()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"results": []}',
        '{"results": [1], "facts": {}}',
        '{"results": [{"variant": 1}], "facts": {}}',
        "\x00",
    ],
)
def test_a_damaged_record_is_named(tmp_path, content):
    (tmp_path / "record.json").write_text(content)
    with pytest.raises(UserError, match=r"record\.json: damaged .*; restore it from the repository or run `make"):
        read_record(tmp_path / "record.json")


def test_a_missing_record_is_named(tmp_path):
    with pytest.raises(UserError, match=r"record\.json: no such record; `make record` writes one"):
        read_record(tmp_path / "record.json")


@dataclass(frozen=True)
class Distance:
    method: str
    lsd: tuple[float, float]


def test_a_record_keeps_other_results_to_the_last_digit(tmp_path):
    given = [Distance("model", (1 / 3, math.inf)), Distance("sinc", (2 / 3, 0.1))]
    write_record(tmp_path / "record.json", given, {})
    assert read_record(tmp_path / "record.json", Distance) == (tuple(given), {})
    with pytest.raises(UserError, match=r"record\.json: damaged"):
        read_record(tmp_path / "record.json")
