"""Checks of a config's fields: what passes, and that a refusal names the field, its value and what is allowed."""

import math
from dataclasses import dataclass

import numpy as np
import pytest

from lib.util.configs import check, check_counts, check_numbers, from_fields, is_finite
from lib.util.errors import UserError


@dataclass(frozen=True)
class Size:
    count: object = 1
    share: object = 0.5


def refused(action, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        action()
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert "\n" not in str(caught.value)


def test_check_names_field_value_and_choices():
    check(True, "kind", "a", "one of a, b")
    check([1], "kind", "a", "one of a, b")  # anything true
    with pytest.raises(UserError, match=r"^kind='c' is not allowed; use one of a, b$"):
        check("c" in ("a", "b"), "kind", "c", "one of a, b")
    with pytest.raises(UserError, match=r"^kind=\[\] is not allowed; use some$"):
        check([], "kind", [], "some")


@pytest.mark.parametrize(
    ("value", "finite"),
    [
        (0, True),
        (-1.5, True),
        (np.float32(2), True),
        (np.int64(2), True),
        (math.nan, False),
        (-math.inf, False),
        (True, False),
        ("1e-4", False),  # as YAML reads it
        (None, False),
        ([1.0], False),
    ],
)
def test_what_is_a_finite_number(value, finite):
    assert is_finite(value) is finite


@pytest.mark.parametrize("value", [1, 7, 10**12])
def test_counts_pass(value):
    check_counts(Size(count=value), "count")


@pytest.mark.parametrize("value", [0, -1, 1.0, 2.5, True, "3", None, math.inf])
def test_what_is_no_count_is_refused(value):
    refused(lambda: check_counts(Size(count=value), "count"), f"count={value!r}", "use a whole number, 1 or more")


def test_the_least_count_and_none_where_they_are_allowed():
    check_counts(Size(count=0), "count", least=0)
    check_counts(Size(count=None), "count", optional=True)
    refused(lambda: check_counts(Size(count=2), "count", least=3), "count=2", "use a whole number, 3 or more")
    refused(lambda: check_counts(Size(count=0), "count", optional=True), "1 or more, or none")
    refused(lambda: check_counts(Size(count=-1), "count", least=0), "0 or more")


def test_every_named_field_is_checked():
    refused(lambda: check_counts(Size(count=1, share=0), "count", "share"), "share=0")
    refused(lambda: check_numbers(Size(count=1, share=-1), "count", "share"), "share=-1")


@pytest.mark.parametrize("value", [0, 0.5, 3, 1e300])
def test_numbers_pass(value):
    check_numbers(Size(share=value), "share")


@pytest.mark.parametrize("value", [-1e-9, math.nan, math.inf, -math.inf, "0.5", None, False])
def test_what_is_no_number_is_refused(value):
    refused(lambda: check_numbers(Size(share=value), "share"), f"share={value!r}", "use a finite number, 0 or more")


def test_bounds_of_numbers():
    check_numbers(Size(share=1), "share", most=1)
    refused(lambda: check_numbers(Size(share=1.01), "share", most=1), "share=1.01", "0 or more, at most 1")
    check_numbers(Size(share=1e-9), "share", above=0)
    refused(lambda: check_numbers(Size(share=0), "share", above=0), "share=0", "a finite number, above 0")
    refused(lambda: check_numbers(Size(share=-3), "share", above=-2, most=5), "above -2, at most 5")
    check_numbers(Size(share=-1), "share", above=-2, most=5)


def test_from_fields_is_the_config_that_was_written():
    assert from_fields(Size, {"share": 2, "count": 3}) == Size(3, 2)


def test_from_fields_names_what_is_unknown_or_missing():
    unknown = {"count": 1, "share": 1, "zeta": 0, "colour": 2}
    refused(lambda: from_fields(Size, unknown), "Size has no field colour, zeta; its fields are count, share")
    refused(lambda: from_fields(Size, {"counts": 1, "share": 1}), "no field counts; its fields are count, share")
    refused(lambda: from_fields(Size, {"share": 1}), "Size lacks the field count; restore the config")
    refused(lambda: from_fields(Size, {}), "lacks the field count, share")
