"""Configs: what each type of field takes, that a refusal names address, value and what is allowed, and copies."""

import dataclasses
import json
import math
import pickle
from dataclasses import field
from typing import Any

import numpy as np
import pytest

from lib.util.configs import (
    Count,
    Flag,
    Fraction,
    NonNegative,
    Number,
    Positive,
    Share,
    Whole,
    check,
    checked_dataclass,
    choice,
    flat,
    from_fields,
    number,
    read_entries,
    whole,
)
from lib.util.errors import UserError


@checked_dataclass
class Inner:
    count: Count = 1
    share: Share = 0.5

    def __post_init__(self):
        check(self.count != 7, "count", self.count, "another")


@checked_dataclass
class Outer:
    kind: choice(("a", "b"))
    inner: Inner = field(default_factory=Inner)
    stages: tuple[Inner, ...] = ()
    size: Count | None = None


def refused(action, message: str) -> None:
    with pytest.raises(UserError) as caught:
        action()
    assert str(caught.value) == message


def test_check_names_field_value_and_choices():
    check(True, "kind", "a", "one of a, b")
    check([1], "kind", "a", "one of a, b")  # anything true
    refused(lambda: check("c" in ("a", "b"), "kind", "c", "one of a, b"), "kind='c' is not allowed; use one of a, b")
    refused(lambda: check([], "kind", [], "some"), "kind=[] is not allowed; use some")


NO_NUMBER = (math.nan, math.inf, -math.inf, "0.5", None, False, [1.0], 10**400)


@pytest.mark.parametrize(
    ("kind", "good", "bad", "wanted"),
    [
        (Count, (1, 7, 10**12), (0, -1, 1.0, True, "3", None, math.inf), "a whole number, 1 or more"),
        (Whole, (0, 7), (-1, 0.0, False, "0", None), "a whole number, 0 or more"),
        (whole(2, 5), (2, 5), (1, 6), "a whole number, 2 or more, at most 5"),
        (Number, (-1.5, 0, 1e300), NO_NUMBER, "a finite number"),
        (NonNegative, (0, 0.5, np.float64(2)), (-1e-9, *NO_NUMBER), "a finite number, 0 or more"),
        (Positive, (1e-9, 3), (0, -1.0, *NO_NUMBER), "a finite number, above 0"),
        (Share, (0, 1, 0.3), (-0.1, 1.01, *NO_NUMBER), "a finite number, 0 or more, at most 1"),
        (Fraction, (0, 0.999), (-0.1, 1, *NO_NUMBER), "a finite number, 0 or more, below 1"),
        (number(-2, 5), (-2, 5), (-2.1, 5.1), "a finite number, -2 or more, at most 5"),
        (Flag, (True, False), (0, 1, "true", None), "true or false"),
        (choice(("a", "b")), ("a", "b"), ("c", "", None, 1), "one of a, b"),
    ],
)
def test_what_a_field_takes(kind: Any, good: tuple, bad: tuple, wanted: str):
    @checked_dataclass
    class One:
        value: kind

    for value in good:
        assert One(value).value == value
    for value in bad:
        refused(lambda value=value: One(value), f"value={value!r} is not allowed; use {wanted}")


def test_a_refusal_names_the_address():
    refused(lambda: Inner(count=0), "count=0 is not allowed; use a whole number, 1 or more")
    refused(lambda: Inner(0), "count=0 is not allowed; use a whole number, 1 or more")  # by position, too
    two = "inner.count=0 is not allowed; use a whole number, 1 or more; stages[1].share=2 is not allowed; use a finite "
    two += "number, 0 or more, at most 1"
    refused(lambda: Outer("a", inner={"count": 0}, stages=[{}, {"share": 2}]), two)


def test_unknown_and_missing_fields_are_named():
    refused(lambda: Inner(counts=1), "counts is unknown; choose from count, share")
    refused(lambda: Outer("a", inner={"counts": 1}), "inner.counts is unknown; check its name")
    refused(Outer, "kind is missing; restore the field")


def test_what_several_fields_must_fit_is_refused_at_its_address():
    refused(lambda: Inner(count=7), "count=7 is not allowed; use another")
    refused(lambda: Outer("a", inner={"count": 7}), "inner: count=7 is not allowed; use another")
    refused(lambda: dataclasses.replace(Inner(), count=7), "count=7 is not allowed; use another")


def test_a_config_is_a_frozen_value():
    config = Outer("a", stages=[Inner(2), {"share": 1}], size=3)
    assert config.stages == (Inner(2), Inner(share=1.0))
    assert hash(config) == hash(Outer("a", stages=(Inner(2), Inner(share=1.0)), size=3))
    assert pickle.loads(pickle.dumps(config)) == config
    assert dataclasses.replace(config, size=None).size is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.size = 4


def test_from_fields_is_the_config_that_was_written():
    config = Outer("b", stages=(Inner(2), Inner(3)))
    assert from_fields(Outer, json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_from_fields_names_what_is_unknown_or_missing():
    written = dataclasses.asdict(Outer("b", stages=(Inner(2), Inner(3))))
    refused(lambda: from_fields(Outer, written | {"zeta": 0}), "zeta is unknown; choose from kind, inner, stages, size")
    lacks = "Outer lacks the field {}; restore the config that was written"
    del written["size"]
    refused(lambda: from_fields(Outer, written), lacks.format("size"))  # its default plays no part
    del written["stages"][1]["share"]
    refused(lambda: from_fields(Outer, written), lacks.format("stages[1].share, size"))
    refused(lambda: from_fields(Inner, 3), "Inner: 3 holds no fields; restore the config that was written")


def test_every_value_has_an_address():
    config = Outer("a", stages=(Inner(2), Inner(3)))
    inner = {"inner.count": 1, "inner.share": 0.5}
    stages = {"stages[0].count": 2, "stages[0].share": 0.5, "stages[1].count": 3, "stages[1].share": 0.5}
    assert flat(config) == {"kind": "a"} | inner | stages | {"size": None}
    assert flat({"a": (1, 2), "b": {}}) == {"a": [1, 2]}


def test_entries_of_a_file_are_named_where_they_do_not_fit(tmp_path):
    file = tmp_path / "sizes.toml"
    file.write_text("[small]\nleast = 1\n[large]\nleast = 0\n")

    @checked_dataclass
    class Size:
        name: str
        least: Count

    with pytest.raises(UserError, match=r"sizes\.toml, large: least=0 is not allowed"):
        read_entries(file, Size)
    file.write_text("[small\n")
    with pytest.raises(UserError, match=r"sizes\.toml: damaged"):
        read_entries(file, Size)
    file.write_text("[small]\nleast = 1\n")
    assert read_entries(file, Size) == {"small": Size("small", 1)}
