"""The loss terms against cases worked out by hand."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from lib.codec import MdctCodec
from lib.errors import UserError
from lib.losses import LossConfig, anti_modulation, correlation, envelope, latent_mse, rms_error, total_loss


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


WEIGHTS = [field.name for field in dataclasses.fields(LossConfig) if field.name.endswith("_weight")]


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_bad_weights_name_the_field(name, value):
    with pytest.raises(UserError, match=f"^loss {name}=.* is not allowed; use a finite number, 0 or more"):
        LossConfig(**{name: value})


def test_all_weights_zero_is_refused():
    assert len(WEIGHTS) == 5
    with pytest.raises(UserError, match=f"loss: {', '.join(WEIGHTS)} are all 0; give at least one term a weight"):
        LossConfig(0.0, 0.0)


@pytest.mark.parametrize("name", WEIGHTS)
def test_one_weight_is_enough(name):
    assert getattr(LossConfig(**(dict.fromkeys(WEIGHTS, 0.0) | {name: 0.5})), name) == 0.5


def test_an_unknown_form_lists_the_choices():
    with pytest.raises(UserError, match="loss anti_modulation='cubic' is not allowed; use one of squared, log"):
        LossConfig(anti_modulation="cubic")


# --- root of the squared error ----------------------------------------------------------------------------------------


def test_rms_error_is_the_mean_over_clips_of_each_ones_root():
    rng = np.random.default_rng(0)
    output, reference = rng.standard_normal((2, 3, 4, 5)) * np.array([1.0, 2.0, 9.0])[:, None, None]
    roots = np.sqrt(((output - reference) ** 2).mean(axis=(1, 2)))
    value = rms_error(torch.tensor(output), torch.tensor(reference)).item()
    assert value == pytest.approx(roots.mean(), rel=1e-7)
    assert abs(np.sqrt(((output - reference) ** 2).mean()) / value - 1) > 0.05  # one root over the batch is another


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_the_gradient_of_rms_error_does_not_grow_with_the_error(scale):
    reference = torch.zeros(1, 3, 4, dtype=torch.float64)
    lengths = []
    for loss in (rms_error, latent_mse):
        output = (scale * torch.ones(1, 3, 4, dtype=torch.float64)).requires_grad_()
        loss(output, reference).backward()
        lengths.append(output.grad.norm().item())
    assert lengths[0] == pytest.approx(1 / math.sqrt(12), rel=1e-4)
    assert lengths[1] == pytest.approx(2 * scale / math.sqrt(12), rel=1e-4)


def test_rms_error_of_a_perfect_copy_has_a_finite_gradient():
    output = constant(2.0).requires_grad_()
    rms_error(output, constant(2.0)).backward()
    assert torch.equal(output.grad, constant(0.0))


# --- envelopes and their correlation ----------------------------------------------------------------------------------


def test_envelope_is_the_rms_of_250_equal_segments():
    wav = torch.zeros(2, 1, 501)  # segments of two samples; the last sample is left over
    wav[0, 0, :2] = torch.tensor([3.0, -4.0])
    wav[1, 0, 498:500] = 2.0
    wav[:, 0, 500] = 100.0
    wanted = torch.zeros(2, 250)
    wanted[0, 0], wanted[1, 249] = math.sqrt(12.5), 2.0
    assert envelope(wav).shape == (2, 250)
    torch.testing.assert_close(envelope(wav), wanted, rtol=1e-6, atol=2e-5)


def test_an_envelope_needs_a_sample_a_segment():
    assert torch.equal(envelope(torch.full((1, 1, 250), 2.0)), torch.full((1, 250), 2.0))
    with pytest.raises(ValueError, match="at least 250 samples, got 249"):
        envelope(torch.ones(1, 1, 249))


def test_silence_has_an_envelope_with_a_finite_gradient():
    wav = torch.zeros(1, 1, 500, requires_grad=True)
    envelope(wav).sum().backward()
    assert wav.grad.isfinite().all()


def test_correlation_is_pearsons():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((3, 50)) + 7
    y = np.array([1.0, -1.0, 0.0])[:, None] * x + rng.standard_normal((3, 50))
    wanted = [np.corrcoef(a, b)[0, 1] for a, b in zip(x, y, strict=True)]
    assert correlation(torch.tensor(x), torch.tensor(y)).tolist() == pytest.approx(wanted, rel=1e-9)
    assert min(wanted) < -0.3
    assert max(wanted) > 0.3


def test_correlation_with_a_constant_is_0():
    assert correlation(torch.full((1, 50), 3.0), torch.randn(1, 50)).item() == 0


# --- anti-modulation --------------------------------------------------------------------------------------------------


def sounds(*angles: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Two batches `[B, 1, 250]` of positive samples, each its own envelope; envelopes correlate as cos(angle)."""
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(250, 2, generator=generator, dtype=torch.float64)
    first, second = torch.linalg.qr(parts - parts.mean(dim=0)).Q.T  # orthonormal, each of mean 0
    source = (2 + first).expand(len(angles), 1, 250)
    output = torch.stack([2 + math.cos(angle) * first + math.sin(angle) * second for angle in angles])[:, None]
    return output.clone(), source.clone()


def test_both_forms_of_anti_modulation_are_their_formulas():
    angles = (0.3, 1.2, 2.5)
    cosines = np.cos(angles)
    assert cosines[2] < -0.5  # a curve turned upside down is punished too
    output, source = sounds(*angles)
    assert anti_modulation(output, source, "squared").item() == pytest.approx((cosines**2).mean(), rel=1e-6)
    logs = -np.log(1 - np.abs(cosines))
    assert anti_modulation(output, source, "log").item() == pytest.approx(logs.mean(), rel=1e-6)


def test_anti_modulation_of_an_unrelated_output_is_0():
    output, source = sounds(math.pi / 2)
    for form in ("squared", "log"):
        assert anti_modulation(output, source, form).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("angle", [0.5, 0.05, 0.005])
def test_the_gradient_of_the_logarithm_has_no_bound_and_that_of_the_square_has(angle):
    """Along the sphere of envelopes d(corr)/d(angle) = −sin: cot(angle / 2) against |sin(2 · angle)|, both over 1."""
    lengths = []
    for form in ("log", "squared"):
        output, source = sounds(angle)
        anti_modulation(output.requires_grad_(), source, form).backward()
        lengths.append(output.grad.norm().item())
    assert lengths[0] == pytest.approx(1 / math.tan(angle / 2), rel=1e-4)
    assert lengths[1] == pytest.approx(math.sin(2 * angle), rel=1e-4)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("factor", [1.0, -0.5])
def test_the_logarithm_of_the_same_envelope_is_huge_or_infinite_and_never_nan(seed, factor):
    """Rounding leaves 1 − |corr| within a few 1e-7 of 0; below 0 the logarithm would be no number."""
    wav = torch.randn(1, 1, 12_000, generator=torch.Generator().manual_seed(seed)) * torch.linspace(0.1, 1, 12_000)
    assert anti_modulation(factor * wav, wav, "squared").item() == pytest.approx(1, abs=1e-5)
    assert anti_modulation(factor * wav, wav, "log").item() > 13


def test_the_logarithm_is_infinite_at_a_correlation_of_1():
    wav = torch.full((1, 1, 250), 2.0)
    wav[..., :2], wav[..., 2:4] = 1.0, 3.0  # deviations of length 2: every step of the computation is exact
    assert anti_modulation(wav, wav, "log").item() == math.inf


# --- the sum ----------------------------------------------------------------------------------------------------------

EVERY = LossConfig(0.1, 0.2, 0.3, 0.4, 0.5)


def hold(latents: torch.Tensor) -> torch.Tensor:
    """A stand-in for a codec: every value becomes one sample."""
    return latents.flatten(1)[:, None]


@pytest.fixture
def latents() -> list[torch.Tensor]:
    """Output, input and target `[2, 8, 40]`: 320 samples of sound."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(2, 8, 40, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("form", ["squared", "log"])
def test_total_is_the_weighted_sum_of_all_terms(latents, form):
    output, input, target = latents
    loss, terms = total_loss(*latents, dataclasses.replace(EVERY, anti_modulation=form), hold)
    penalty = sum(anti_modulation(hold(output), hold(source), form) for source in (input, target))
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(
        {
            "input_mse": latent_mse(output, input).item(),
            "target_mse": latent_mse(output, target).item(),
            "input_rms": rms_error(output, input).item(),
            "target_rms": rms_error(output, target).item(),
            "anti_modulation": penalty.item(),
        }
    )
    assert len({round(term.item(), 5) for term in terms.values()}) == 5  # or terms could be swapped unseen
    weights = {"input_mse": 0.1, "target_mse": 0.2, "input_rms": 0.3, "target_rms": 0.4, "anti_modulation": 0.5}
    assert loss.item() == pytest.approx(sum(weights[name] * term.item() for name, term in terms.items()))


@pytest.mark.parametrize("name", WEIGHTS)
def test_each_term_alone(latents, name):
    config = LossConfig(**(dict.fromkeys(WEIGHTS, 0.0) | {name: 2.0}))
    loss, terms = total_loss(*latents, config, hold)
    term = name.removesuffix("_weight")
    term = f"{term}_mse" if term in ("input", "target") else term
    assert set(terms) == {"input_mse", "target_mse", term}  # runs of different objectives compare by the two errors
    assert loss.item() == pytest.approx(2 * terms[term].item())


def test_sound_is_made_only_for_terms_that_need_it(latents):
    def broken(latents):
        raise RuntimeError("decoded")

    total_loss(*latents, dataclasses.replace(EVERY, anti_modulation_weight=0.0), broken)
    with pytest.raises(RuntimeError, match="decoded"):
        total_loss(*latents, EVERY, broken)


def test_a_term_on_sound_without_decode_is_refused(latents):
    with pytest.raises(ValueError, match="anti_modulation_weight needs sound: give total_loss the codec's decode"):
        total_loss(*latents, EVERY)


@pytest.mark.parametrize("form", ["squared", "log"])
def test_the_gradient_flows_through_a_codec_to_the_latents(form):
    """Against the difference quotient along the gradient, in float64."""
    generator = torch.Generator().manual_seed(4)
    output, input, target = 5 * torch.randn(3, 1, 128, 8, generator=generator, dtype=torch.float64)
    config = LossConfig(0.0, 0.0, anti_modulation_weight=1.0, anti_modulation=form)
    decode = MdctCodec().decode
    output.requires_grad_()
    total_loss(output, input, target, config, decode)[0].backward()
    direction = output.grad / output.grad.norm()
    with torch.no_grad():
        ends = [total_loss(output + h * direction, input, target, config, decode)[0].item() for h in (1e-5, -1e-5)]
    assert output.grad.norm() > 1e-4
    assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(output.grad.norm().item(), rel=1e-3)


def test_the_sources_get_no_gradient_from_their_sound(latents):
    output, input, target = latents
    target.requires_grad_()
    config = LossConfig(0.0, 0.0, anti_modulation_weight=1.0)
    total_loss(output.requires_grad_(), input, target, config, hold)[0].backward()
    assert target.grad is None or target.grad.abs().max() == 0
    assert output.grad.abs().max() > 0
