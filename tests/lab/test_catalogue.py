"""The catalogue says what is measured: each operation leaves the finite numbers, its bounded form does not."""

import math

import pytest

from lib.lab.catalogue import ASTRONOMIC, DISTANCES, ENTRIES, GROWING, Entry

BY_NAME = {entry.name: entry for entry in ENTRIES}


@pytest.mark.parametrize("name", BY_NAME)
def test_the_bounded_form_stays_finite_at_the_state_and_on_the_way(name):
    for t in (0.0, *DISTANCES):
        assert all(map(math.isfinite, BY_NAME[name].at(BY_NAME[name].bounded, t))), t


@pytest.mark.parametrize("name", BY_NAME)
def test_each_operation_leaves_the_finite_numbers_in_its_state(name):
    entry = BY_NAME[name]
    assert all(map(math.isfinite, entry.at(entry.seeds, 0.1))) or name == "correlation with silence"  # on no way
    value, gradient = entry.at(entry.seeds, 0.0)
    safe = name == "std of a mask over time"  # torch gives it the gradient 0
    assert (math.isfinite(value) and math.isfinite(gradient)) is safe


@pytest.mark.parametrize(
    ("name", "signature"),
    [
        ("penalty on a copied envelope", "growing"),
        ("correlation of envelopes", "astronomic"),
        ("correlation with silence", "sudden"),
        ("root of the mean squared error", "sudden"),
    ],
)
def test_signatures_of_the_leads(name, signature):
    assert BY_NAME[name].signature() == signature


@pytest.mark.parametrize(
    ("power", "signature"), [(0.0, "sudden"), (0.4, "growing"), (1.0, "astronomic")], ids=["flat", "slow", "fast"]
)
def test_signatures_are_measured(power, signature):
    """A function whose gradient grows as t to a power, and is NaN at 0."""
    integral = "x.log()" if power == 1 else f"x ** {1 - power} / {1 - power}"
    entry = Entry("", "", "", "t", f"{integral} + 0 / x.detach()", "x")
    assert entry.signature() == signature
    assert GROWING < ASTRONOMIC
    assert Entry("", "", "", "t", "x.square()", "x").signature() == "sudden, finite at the end"


def test_a_row_has_both_forms():
    row = BY_NAME["clipping by the norm"].measure()
    assert row["as the seeds had it: value, gradient"] == "0, nan"
    assert row["bounded: value, gradient"] == "1, 0"
    assert row["bounded"] in (entry.bounded for entry in ENTRIES)
