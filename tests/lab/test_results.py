"""The record: a small file that gives back its results, or says what is wrong with it."""

import math
from dataclasses import dataclass

import pytest
from parts import shortened
from writing import write_record

from lab.test_audit import VARIANT, result
from lib.lab.results import (
    Result,
    at_level,
    first_non_finite,
    last_projection_share,
    peak,
    read_record,
    scalar_ratio,
    stable,
)
from lib.lab.variants import EXPLODING, LEARNABLE, REPAIR
from lib.model.cascade import Cascade
from lib.util.errors import UserError


def made_up(**changes) -> Result:
    values = {"start": {"grad_norm": 1.23456}, "end": {"grad_norm": 98765.4321}, "final": {"mse": 1e-7 / 3}}
    values |= {"grad_norm": tuple(float(i) for i in range(100)), "run": "/somewhere/runs/0123abcd", "non_finite": None}
    return Result(**{"variant": "0.3× repair", "seed": 1, "num_layers": 6, "steps": 100} | values | changes)


def test_a_record_keeps_four_digits_and_forty_norms(tmp_path):
    write_record(tmp_path / "record.json", [shortened(made_up())], {"clips": "4 s"})
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
    write_record(tmp_path / "record.json", [shortened(r) for r in given], {})
    once = read_record(tmp_path / "record.json")[0]
    assert [r.grad_norm for r in once] == [(1.0, 2.0), ()]
    assert (once[1].final, once[1].non_finite) == (None, broken)
    write_record(tmp_path / "again.json", [shortened(r) for r in once], {})
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


# --- what is measured of results --------------------------------------------------------------------------------------


def test_measures():
    run = result(EXPLODING, norms=(1, 7))
    assert peak(run) == 7
    assert math.isinf(peak(result(EXPLODING, bad_step=3)))
    assert last_projection_share(run) == pytest.approx(0.25 / 3.75)
    assert at_level([run, run])
    assert not at_level([run, result(EXPLODING, bad_step=3)])
    assert not stable([result(REPAIR), result(REPAIR, bad_step=3)])
    assert first_non_finite([run]) == "no non-finite value in 100 steps"
    assert first_non_finite([run, result(EXPLODING, bad_step=3)]) == "non-finite in 1 of 2 runs, first at step 3"


def test_the_ratio_of_the_scalars_is_by_element():
    """Ones everywhere: every element of every parameter has the gradient 1, so the ratio is 1."""
    run = result(LEARNABLE)
    model = Cascade(VARIANT[LEARNABLE].cascade(2))
    norms = {
        f"grad_norm/stage{i}/{name}": math.sqrt(sum(p.numel() for p in part.parameters()))
        for i, stage in enumerate(model.stages)
        for name, part in stage.named_children()
        if list(part.parameters())
    }
    kept = {k: v for k, v in run.start.items() if not k.startswith("grad_norm/")}
    run.start.clear()
    run.start.update(kept | norms)
    assert scalar_ratio(run) == pytest.approx(1.0, rel=1e-6)
    run.start["grad_norm/stage0/rms_scaling"] *= 100
    run.start["grad_norm/stage1/rms_scaling"] *= 100
    assert scalar_ratio(run) == pytest.approx(100.0, rel=1e-6)
