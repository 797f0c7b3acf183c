"""The loss terms against cases worked out by hand."""

import math

import pytest
import torch

from lib.errors import UserError
from lib.losses import LossConfig, latent_mse, total_loss


def constant(value: float) -> torch.Tensor:
    return torch.full((2, 3, 4), value)


def test_latent_mse_is_the_mean_of_squares():
    assert latent_mse(constant(3.0), constant(1.0)).item() == 4.0
    output = torch.zeros(1, 2, 2)
    output[0, 1, 1] = 6.0
    assert latent_mse(output, torch.zeros(1, 2, 2)).item() == 9.0  # 36 over four elements, not their sum


def test_total_is_the_weighted_sum_of_both_terms():
    loss, terms = total_loss(constant(1.0), constant(3.0), constant(-2.0), LossConfig())
    assert {name: term.item() for name, term in terms.items()} == {"input_mse": 4.0, "target_mse": 9.0}
    assert loss.item() == pytest.approx(0.3 * 4 + 0.3 * 9)
    loss, _ = total_loss(constant(1.0), constant(3.0), constant(-2.0), LossConfig(0.5, 2.0))
    assert loss.item() == pytest.approx(0.5 * 4 + 2 * 9)  # input and target are not swapped


def test_weight_zero_leaves_a_term_out_of_the_gradient():
    output = constant(1.0).requires_grad_()
    total_loss(output, constant(3.0), constant(-2.0), LossConfig(0.0, 1.0))[0].backward()
    assert torch.allclose(output.grad, 2 * constant(3.0) / output.numel())


def test_equal_weights_are_least_at_the_mean_of_both():
    """What the default objective pulls to: the plain average of the two latents."""
    input, target = torch.randn(2, 1, 3, 4)
    output = ((input + target) / 2).requires_grad_()
    total_loss(output, input, target, LossConfig())[0].backward()
    assert output.grad.abs().max() < 1e-7
    output = (0.6 * input + 0.4 * target).requires_grad_()
    total_loss(output, input, target, LossConfig())[0].backward()
    assert output.grad.abs().max() > 1e-3


@pytest.mark.parametrize("name", ["input_weight", "target_weight"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_bad_weights_name_the_field(name, value):
    with pytest.raises(UserError, match=name):
        LossConfig(**{name: value})


def test_all_weights_zero_is_refused():
    with pytest.raises(UserError, match="input_weight and target_weight are both 0"):
        LossConfig(0.0, 0.0)
