"""Dropout by random bits: its share, its scale, its independence, its place among torch's random numbers."""

import pytest
import torch

from lib.model.dropout import Dropout


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.999])
def test_it_drops_the_share_it_was_given_and_keeps_the_expectation(p):
    torch.manual_seed(0)
    y = Dropout(p)(torch.ones(2_000_003))
    deviation = (p * (1 - p) / y.numel()) ** 0.5
    assert (y == 0).double().mean() == pytest.approx(p, abs=5 * deviation + 1e-5)
    assert y.double().mean() == pytest.approx(1, abs=5 * deviation / (1 - p))
    assert y.unique().numel() == 2


def test_what_is_left_is_scaled_by_the_share_that_is_really_kept():
    torch.manual_seed(0)
    y = Dropout(0.1)(torch.ones(1000))
    kept = 1 - 6554 / 65536  # 0.1 in steps of 2⁻¹⁶
    assert y.max().item() == pytest.approx(1 / kept, rel=1e-7)
    assert abs(1 / kept - 1 / 0.9) < 1e-4


def test_exactly_the_share_of_all_draws_is_dropped(monkeypatch):
    every_draw = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    monkeypatch.setattr(torch, "randint", lambda low, high, shape: every_draw.view(torch.int64))
    assert (Dropout(0.1)(torch.ones(2**16)) == 0).sum() == 6554


def test_neighbours_and_positions_in_a_word_are_independent():
    torch.manual_seed(1)
    dropped = Dropout(0.5)(torch.ones(4, 250_000)) == 0
    flat = dropped.flatten().double()
    for lag in (1, 2, 3, 4, 8):
        assert abs(torch.corrcoef(torch.stack([flat[:-lag], flat[lag:]]))[0, 1]) < 0.005
    for place in range(4):  # of the four draws that come from one word
        assert flat[place::4].mean().item() == pytest.approx(0.5, abs=0.005)


def test_the_gradient_passes_where_the_value_did():
    torch.manual_seed(0)
    x = torch.randn(3, 5, 7, requires_grad=True)
    y = Dropout(0.4)(x)
    y.sum().backward()
    assert torch.equal(x.grad == 0, y == 0)
    kept = y != 0
    assert torch.allclose(x.grad[kept], (y / x).detach()[kept])


def test_torchs_seed_decides_and_every_call_draws_anew():
    x = torch.ones(1000)
    torch.manual_seed(3)
    first, second = Dropout(0.5)(x), Dropout(0.5)(x)
    torch.manual_seed(3)
    assert torch.equal(Dropout(0.5)(x), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("shape", [(1,), (0,), (3, 5), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_shape_and_dtype_stay(shape, dtype):
    y = Dropout(0.1)(torch.ones(shape, dtype=dtype))
    assert (y.shape, y.dtype) == (shape, dtype)


def test_it_is_a_tensor_of_its_own_and_nothing_in_eval_or_at_0():
    x = torch.ones(100)
    Dropout(0.5)(x)
    assert torch.equal(x, torch.ones(100))
    assert torch.equal(Dropout(0.5).eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)


def test_almost_everything_dropped_stays_finite():
    torch.manual_seed(0)
    assert torch.isfinite(Dropout(1 - 1e-9)(torch.ones(100_000))).all()
