"""The catalogue says what is measured: each operation leaves the finite numbers, its bounded form does not."""

import math

import pytest
import torch

from lib.lab.catalogue import ASTRONOMIC, DISTANCES, ENTRIES, GROWING, Entry, at

BY_STATE = {f"{entry.operation}, {entry.state}": entry for entry in ENTRIES}
START = torch.tensor(0.0)


@pytest.mark.parametrize("entry", ENTRIES, ids=list(BY_STATE))
def test_the_bounded_form_stays_finite_at_the_state_and_on_the_way(entry):
    for t in (0.0, *DISTANCES):
        if (x := entry.path(torch.tensor(t))).isfinite().all():
            assert all(map(math.isfinite, at(entry.bounded, x))), t


def test_what_clipping_does_to_an_infinite_gradient():
    (entry,) = (entry for entry in ENTRIES if entry.part == "training")
    assert entry.seeds(torch.tensor(math.inf)) == 0  # the others become 0
    assert torch.nan_to_num(entry.seeds(torch.tensor(math.nan)), nan=-1) == -1  # or NaN


@pytest.mark.parametrize(
    ("power", "signature"), [(0.0, "sudden"), (0.4, "growing"), (1.0, "astronomic")], ids=["flat", "slow", "fast"]
)
def test_signatures_are_measured(power, signature):
    """A function whose gradient grows as t to a power, and is NaN at 0."""
    integral = (lambda x: x.log()) if power == 1 else (lambda x: x ** (1 - power) / (1 - power))
    entry = Entry("", "", "", lambda t: t, lambda x: integral(x) + 0 / x.detach(), lambda x: x)
    assert entry.signature() == signature
    assert GROWING < ASTRONOMIC
    finite = Entry("", "", "", lambda t: t, lambda x: x.square(), lambda x: x)
    assert finite.signature() == "sudden, finite at the end"
