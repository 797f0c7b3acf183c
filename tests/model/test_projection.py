"""The projection's σ by SVD: in eval, in training, after a disturbance, under bf16; and the ceiling that it implies."""

import math

import pytest
import torch
from torch import nn

from lib.model.projection import SpectralLinear, realign_projections, rms_ceiling, spectral_sigma

TOLERANCE = 1e-3  # of σ, what a run may rely on


def svd(weight: torch.Tensor) -> float:
    return torch.linalg.svdvals(weight.detach().double())[0].item()


def stock_linear(d: int, D: int) -> nn.Linear:
    return nn.utils.parametrizations.spectral_norm(nn.Linear(d, D))


@torch.no_grad()
def applied_weight(linear: nn.Linear) -> torch.Tensor:
    """The weight as a forward pass in the present mode applies it, `[D, d]`, without looking at the parametrization."""
    return (linear(torch.eye(linear.in_features)) - linear.bias).T


def train_steps(linear: nn.Linear, learning_rate: float, steps: int = 25) -> list[float]:
    """Fit a random map with AdamW; returns σ of the weight that each training forward applied."""
    optimizer = torch.optim.AdamW(linear.parameters(), lr=learning_rate, weight_decay=0.01)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, linear.in_features, generator=generator)
    y = x @ torch.randn(linear.in_features, linear.out_features, generator=generator)
    sigmas = []
    for _ in range(steps):
        linear.train()
        taps = torch.cat([torch.eye(linear.in_features), torch.zeros(1, linear.in_features), x])
        output = linear(taps)  # one forward is one power iteration in the stock layer: measure in the same pass
        sigmas.append(svd((output[: linear.in_features] - output[linear.in_features]).T))
        loss = (output[linear.in_features + 1 :] - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return sigmas


@pytest.mark.parametrize(("d", "D"), [(256, 128), (384, 128), (16, 8), (8, 16), (1, 1)])
def test_fresh_layer_in_eval_mode_has_sigma_one(d, D):
    torch.manual_seed(d)
    linear = SpectralLinear(d, D).eval()
    assert svd(applied_weight(linear)) == pytest.approx(1, abs=TOLERANCE)
    assert spectral_sigma(linear) == pytest.approx(svd(applied_weight(linear)), abs=1e-5)


def test_a_plain_layer_fails_that_tolerance():
    torch.manual_seed(0)
    linear = nn.Linear(256, 128)
    assert spectral_sigma(linear) == pytest.approx(svd(linear.weight), rel=1e-6)
    assert abs(spectral_sigma(linear) - 1) > 10 * TOLERANCE


@pytest.mark.parametrize("learning_rate", [1e-4, 1e-2])
def test_sigma_stays_one_in_training(learning_rate):
    torch.manual_seed(0)
    linear = SpectralLinear(256, 128)
    before = linear.parametrizations.weight.original.detach().clone()
    sigmas = train_steps(linear, learning_rate)
    assert not torch.equal(before, linear.parametrizations.weight.original)
    assert max(abs(sigma - 1) for sigma in sigmas) < TOLERANCE
    assert linear.training
    assert spectral_sigma(linear) == pytest.approx(1, abs=TOLERANCE)  # reads it without a switch to eval by us
    assert linear.training
    linear.realign()
    assert svd(applied_weight(linear.eval())) == pytest.approx(1, abs=TOLERANCE)


def test_the_singular_vectors_are_where_torch_keeps_them():
    """`_u` and `_v` are private to torch, and part of the names in every checkpoint."""
    names = {name for name, _ in SpectralLinear(6, 4).named_buffers()}
    assert names == {"parametrizations.weight.0._u", "parametrizations.weight.0._v"}


def test_the_stock_parametrization_drifts_in_the_same_experiment():
    torch.manual_seed(0)
    sigmas = train_steps(stock_linear(256, 128), 1e-2)
    assert max(sigmas) > 1 + 10 * TOLERANCE  # why SpectralLinear exists


def test_sigma_is_right_without_a_gap_between_the_singular_values():
    linear = SpectralLinear(32, 16)
    with torch.no_grad():
        u, _, v = torch.linalg.svd(torch.randn(16, 32), full_matrices=False)
        linear.parametrizations.weight.original.copy_(u @ torch.diag(torch.linspace(3, 2.999, 16)) @ v)
    linear.realign()
    assert spectral_sigma(linear) == pytest.approx(1, abs=TOLERANCE)


def test_sigma_recovers_after_the_weight_is_disturbed():
    torch.manual_seed(0)
    linear = SpectralLinear(64, 32).eval()
    with torch.no_grad():
        linear.parametrizations.weight.original.mul_(3).add_(torch.randn(32, 64))
    assert abs(spectral_sigma(linear) - 1) > 10 * TOLERANCE  # eval shows the disturbance ...
    linear.train()
    assert svd(applied_weight(linear)) == pytest.approx(1, abs=TOLERANCE)  # ... one training forward repairs it
    with torch.no_grad():
        linear.parametrizations.weight.original.mul_(3).add_(torch.randn(32, 64))
    assert abs(svd(applied_weight(linear.eval())) - 1) > 10 * TOLERANCE  # a switch to eval does not ...
    realign_projections(nn.Sequential(nn.Linear(2, 2), linear))
    assert svd(applied_weight(linear)) == pytest.approx(1, abs=TOLERANCE)  # ... and a realignment does


def test_nothing_moves_in_eval_mode():
    torch.manual_seed(0)
    linear = SpectralLinear(64, 32)
    with torch.no_grad():  # vectors that a power iteration would move
        linear.parametrizations.weight[0]._u.copy_(nn.functional.normalize(torch.randn(32), dim=0))
    linear.eval()
    before = {name: value.clone() for name, value in linear.state_dict().items()}
    sigma = spectral_sigma(linear)
    assert abs(sigma - 1) > TOLERANCE
    for _ in range(3):
        linear(torch.randn(5, 64))
        linear.eval()
    assert spectral_sigma(linear) == sigma
    assert all(torch.equal(value, before[name]) for name, value in linear.state_dict().items())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda"])  # each has its own list of operations that autocast blurs
def test_sigma_is_right_under_bf16_autocast(training, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    torch.manual_seed(0)
    linear = SpectralLinear(256, 128).to(device).train(training)
    with torch.no_grad():
        linear.parametrizations.weight.original.mul_(1.5)
    linear.train(not training).train(training)
    seen = []
    linear.parametrizations.weight.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.autocast(device, torch.bfloat16):
        output = linear(torch.randn(4, 256, device=device))
    assert output.dtype == torch.bfloat16  # autocast did act on the layer
    assert seen[-1].dtype == torch.float32
    # bf16 keeps 8 bits: for a weight in it σ is off by up to 4e-3, for vectors aligned in it by 2e-6 (its top is flat)
    assert svd(seen[-1]) == pytest.approx(1, abs=5e-7)


def test_gradient_is_that_of_the_normalised_weight():
    torch.manual_seed(0)
    linear = SpectralLinear(6, 4).double()
    linear.realign()
    x = torch.randn(3, 6, dtype=torch.float64)
    linear(x).square().sum().backward()
    raw = linear.parametrizations.weight.original.detach().clone().requires_grad_()
    (x @ (raw / torch.linalg.svdvals(raw)[0]).T + linear.bias.detach()).square().sum().backward()
    torch.testing.assert_close(linear.parametrizations.weight.original.grad, raw.grad, rtol=1e-5, atol=1e-7)


# --- the ceiling ------------------------------------------------------------------------------------------------------


def test_rms_ceiling_values():
    assert rms_ceiling(256, 128) == pytest.approx(math.sqrt(2))
    assert rms_ceiling(384, 128) == pytest.approx(math.sqrt(3))
    assert rms_ceiling(384, 128, gamma=0.5) == pytest.approx(math.sqrt(3) / 2)
    assert rms_ceiling(128, 512) == pytest.approx(0.5)
    assert rms_ceiling(7, 7, gamma=0.0) == 0.0


@pytest.mark.parametrize(("d", "D"), [(256, 128), (384, 128), (16, 8)])
def test_the_ceiling_is_reached_by_an_aligned_input(d, D):
    """σ ≤ 1 allows a projection that keeps the length of LayerNorm's output: all of it on one channel, say."""
    torch.manual_seed(0)
    x = nn.functional.layer_norm(torch.randn(d), (d,), eps=0.0)  # norm √d
    linear = SpectralLinear(d, D)
    with torch.no_grad():
        linear.parametrizations.weight.original.copy_(torch.outer(torch.randn(D), x))  # rank one, along x
        linear.bias.zero_()
    linear.realign()
    output = linear.eval()(x)
    assert output.square().mean().sqrt().item() == pytest.approx(rms_ceiling(d, D), rel=1e-4)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 3.0])
@pytest.mark.parametrize(("d", "D"), [(256, 128), (384, 128), (16, 8), (8, 32)])
def test_no_layer_norm_output_passes_the_ceiling(d, D, gamma):
    torch.manual_seed(0)
    norm = nn.LayerNorm(d)
    nn.init.constant_(norm.weight, gamma)
    ceiling = rms_ceiling(d, D, gamma)
    for spread in (0.01, 1.0, 100.0):
        linear = SpectralLinear(d, D).eval()
        nn.init.zeros_(linear.bias)
        frames = spread * torch.randn(64, d) + torch.randn(d)
        rms = linear(norm(frames)).square().mean(dim=1).sqrt()  # of every frame
        assert rms.max() <= ceiling * 1.00001
        assert rms.max() > 0.1 * ceiling  # the bound is not vacuous
    plain = nn.functional.linear(norm(frames), linear.parametrizations.weight.original * 10)
    assert plain.square().mean(dim=1).sqrt().max() > ceiling  # without the norm it is passed


@pytest.mark.parametrize("arguments", [(0, 128), (256, 0), (-1, 1), (256, 128, -0.1)])
def test_bad_arguments_of_the_ceiling(arguments):
    with pytest.raises(ValueError, match=f"d={arguments[0]}, D={arguments[1]}"):
        rms_ceiling(*arguments)
