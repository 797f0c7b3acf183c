"""What a step reports: values worked out a second time."""

import math

import pytest
import torch
from torch import nn

from lib.training.telemetry import gradient_norms, to_floats


def test_gradient_norms_of_the_parts():
    parts = {"first": nn.Linear(3, 2), "frozen": nn.Linear(3, 2).requires_grad_(False), "last/of two": nn.Linear(2, 1)}
    for name in ("first", "last/of two"):
        parts[name].weight.grad = torch.full_like(parts[name].weight, 2.0)
    parts["first"].bias.grad = torch.full((2,), 3.0)
    wanted = {"grad_norm/first": math.sqrt(6 * 4 + 2 * 9), "grad_norm/last/of two": math.sqrt(2 * 4)}
    assert to_floats(gradient_norms(parts)) == pytest.approx(wanted)  # nothing of a part without gradients


def test_to_floats_keeps_names_values_and_order():
    values = {"b": torch.tensor(1.5, dtype=torch.float64), "a": torch.tensor(2), "c": torch.tensor(math.inf)}
    found = to_floats(values | {"d": torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True)})
    assert list(found.items()) == [("b", 1.5), ("a", 2.0), ("c", math.inf), ("d", 0.5)]
    assert to_floats({}) == {}
    assert math.isnan(to_floats({"x": torch.tensor(math.nan)})["x"])
