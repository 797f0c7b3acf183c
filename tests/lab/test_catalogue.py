"""The catalogue says what is measured: each operation leaves the finite numbers, its guarded form does not."""

import math

import pytest
import torch

from lib.lab.catalogue import ASTRONOMIC, DISTANCES, ENTRIES, GROWING, Entry

BY_NAME = {entry.name: entry for entry in ENTRIES}


@pytest.mark.parametrize("name", BY_NAME)
def test_the_guarded_form_stays_finite_at_the_state_and_on_the_way(name):
    for t in (0.0, *DISTANCES):
        assert all(map(math.isfinite, BY_NAME[name].at(BY_NAME[name].guarded, t))), t


@pytest.mark.parametrize("name", BY_NAME)
def test_each_operation_leaves_the_finite_numbers_in_its_state(name):
    entry = BY_NAME[name]
    assert all(map(math.isfinite, entry.at(entry.plain, 0.1))) or name == "correlation with silence"  # on no way
    value, gradient = entry.at(entry.plain, 0.0)
    safe = name in ("std of a mask over time", "learnable weights")  # torch has the gradient 0; the document's epsilon
    assert (math.isfinite(value) and math.isfinite(gradient)) is safe


@pytest.mark.parametrize(
    ("name", "signature"),
    [
        ("penalty on a copied envelope", "growing"),
        ("correlation of envelopes", "astronomic"),
        ("correlation with silence", "sudden"),
        ("root of the mean squared error", "sudden"),
        ("RMS scaling", "astronomic"),
        ("learnable weights", "astronomic, finite at the end"),
        ("clipping by the norm", "sudden"),
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
    assert row["plain: value, gradient"] == "nan, nan"
    assert row["guarded: value, gradient"].startswith("0, ")
    assert row["guarded"] in (entry.guarded for entry in ENTRIES)


def test_clipping_does_to_an_infinite_gradient_what_torch_does():
    parameter = torch.nn.Parameter(torch.zeros(2))
    for t in (0.0, 1e-3):
        parameter.grad = torch.tensor([1.0, 1 / t if t else math.inf])
        torch.nn.utils.clip_grad_norm_(parameter, 10.0)
        entry = BY_NAME["clipping by the norm"]
        assert entry.at(entry.plain, t)[0] == pytest.approx(parameter.grad[1].item(), rel=1e-4, nan_ok=True)
