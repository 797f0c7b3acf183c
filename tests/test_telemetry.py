"""What a step reports: names that metrics.jsonl and the figures use, values worked out a second time."""

import dataclasses
import math

import pytest
import torch

from lib.agent import MaskingConfig, Masks
from lib.cascade import StageTrace
from lib.fusion import Fusion, FusionModel
from lib.telemetry import gradient_norms, step_metrics, to_floats

TRACE = [field.name for field in dataclasses.fields(StageTrace)]


def trace(start: float) -> StageTrace:
    """Field k of two clips: start + k and start + k + 1."""
    return StageTrace(*(torch.tensor([start + k, start + k + 1.0]) for k in range(len(TRACE))))


def test_step_metrics_are_the_terms_and_the_means_of_the_traces():
    masks = Masks(torch.tensor([0.5, 1.0])[:, None, None].expand(2, 3, 4), torch.full((2, 3, 4), 0.5))
    fusion = Fusion(torch.zeros(2, 3, 4), (trace(0), trace(10)), masks)
    terms = {"input_mse": torch.tensor(2.0), "novelty": torch.tensor(0.25)}
    found = {name: value.item() for name, value in step_metrics(terms, fusion).items()}
    stages = {f"stage{i}/{name}": 10 * i + k + 0.5 for i in range(2) for k, name in enumerate(TRACE)}
    wanted = {"loss/input_mse": 2.0, "loss/novelty": 0.25, "masks/complementarity": 1 - (0.25 + 0.5) / 2} | stages
    assert found == pytest.approx(wanted)


def test_without_masks_there_is_no_complementarity():
    found = step_metrics({}, Fusion(torch.zeros(2, 3, 4), (trace(0),), None))
    assert set(found) == {f"stage0/{name}" for name in TRACE}


def test_metrics_keep_no_graph():
    terms = {"input_mse": torch.tensor(2.0, requires_grad=True) * 3}
    masks = Masks(*(torch.rand(2, 3, 4, requires_grad=True) for _ in range(2)))
    found = step_metrics(terms, Fusion(torch.zeros(2, 3, 4), (trace(0),), masks))
    assert not found["masks/complementarity"].requires_grad
    assert all(isinstance(value, float) for value in to_floats(found).values())


def test_gradient_norms_of_every_part(tiny_cascade):
    torch.manual_seed(0)
    model = FusionModel(tiny_cascade(width=20), MaskingConfig("learned"))
    model(*torch.randn(2, 2, 8, 6)).latents.square().sum().backward()
    found = to_floats(gradient_norms(model))
    squares: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        part = f"stage{parts[2]}/{parts[3]}" if parts[0] == "cascade" else parts[0]
        squares[part] = squares.get(part, 0.0) + parameter.grad.double().square().sum().item()
    wanted = {f"grad_norm/{part}": math.sqrt(square) for part, square in squares.items()}
    assert found == pytest.approx(wanted, rel=1e-4)
    names = ("input_projection", "input_norm", "layers", "post_norm", "output_projection")
    wide = {f"grad_norm/stage{i}/{name}" for i in range(2) for name in names}
    assert wide | {"grad_norm/mask_generator"} == set(found)
    total = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
    assert math.sqrt(sum(norm**2 for norm in found.values())) == pytest.approx(total, rel=1e-5)  # nothing is left out


def test_parts_without_gradients_are_left_out(tiny_cascade):
    model = FusionModel(tiny_cascade())
    assert gradient_norms(model) == {}
    model.cascade.stages[1].post_norm.bias.grad = torch.full((24,), 2.0)
    assert to_floats(gradient_norms(model)) == pytest.approx({"grad_norm/stage1/post_norm": math.sqrt(24 * 4)})


def test_to_floats_keeps_names_values_and_order():
    values = {"b": torch.tensor(1.5, dtype=torch.float64), "a": torch.tensor(2), "c": torch.tensor(math.inf)}
    found = to_floats(values | {"d": torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True)})
    assert list(found.items()) == [("b", 1.5), ("a", 2.0), ("c", math.inf), ("d", 0.5)]
    assert to_floats({}) == {}
    assert math.isnan(to_floats({"x": torch.tensor(math.nan)})["x"])
