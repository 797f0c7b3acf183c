"""The autoencoder of mel spectrograms: its stride, its normal scale, its posterior."""

import pytest
import torch

from lib.superres.vae import MelVae, VaeConfig


def tiny(seed: int = 0, **changes) -> MelVae:
    torch.manual_seed(seed)
    sizes = {"channels": (4, 8, 8), "num_res_blocks": 1, "latent_channels": 3, "norm_groups": 2}
    return MelVae(VaeConfig(**sizes | changes)).eval()


def mels(F: int = 16, T: int = 24, seed: int = 1) -> torch.Tensor:
    return torch.randn(2, 1, F, T, generator=torch.Generator().manual_seed(seed))


def moments(vae: MelVae, mel: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log variance of the posterior, `[B, Z, H, W]` each, from the layers themselves."""
    return vae.autoencoder.quant_conv(vae.autoencoder.encoder(mel)).chunk(2, dim=1)


@pytest.mark.parametrize(("channels", "stride"), [((4,), 1), ((4, 8), 2), ((4, 8, 8), 4), ((4, 4, 8, 8), 8)])
def test_each_level_but_the_last_halves_both_sides(channels, stride):
    vae, mel = tiny(channels=channels), mels()
    with torch.no_grad():
        latents = vae.encode(mel)
        assert latents.shape == (2, 3, 16 // stride, 24 // stride)
        assert vae.decode(latents).shape == mel.shape


def test_mel_is_taken_to_a_normal_scale_and_back():
    """A shifted and stretched picture, with its own mean and deviation in the config, is the same to the layers."""
    plain, shifted = tiny(), tiny(mel_mean=-5.0, mel_std=2.5)
    mel = mels()
    with torch.no_grad():
        latents, divergence = plain.encode(mel), plain(mel)[1]
        torch.testing.assert_close(shifted.encode(2.5 * mel - 5), latents, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(shifted.decode(latents), 2.5 * plain.decode(latents) - 5, atol=1e-5, rtol=1e-4)
        made, of_shifted = shifted(2.5 * mel - 5, sampled=False)
        torch.testing.assert_close(made, 2.5 * plain(mel, sampled=False)[0] - 5, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(of_shifted, divergence, atol=1e-5, rtol=1e-4)
    assert latents.std() > 1e-3


def test_encoding_is_the_posterior_s_mean_and_a_pass_its_sample():
    vae, mel = tiny(), mels()
    with torch.no_grad():
        mean, logvar = moments(vae, mel)
        torch.testing.assert_close(vae.encode(mel), mean)
        torch.testing.assert_close(vae(mel, sampled=False)[0], vae.decode(mean))
        torch.manual_seed(3)
        made, divergence = vae(mel)
        torch.manual_seed(3)
        expected = vae.decode(mean + (logvar / 2).exp() * torch.randn(mean.shape))
    assert (made.shape, divergence.shape) == (mel.shape, (2,))
    torch.testing.assert_close(made, expected)


def test_only_the_sampled_pass_needs_random_numbers():
    vae, mel = tiny(), mels()
    with torch.no_grad():
        means = [vae(mel, sampled=False)[0] for _ in range(2)]
        samples = [vae(mel)[0] for _ in range(2)]
    assert torch.equal(*means)
    assert (samples[0] - samples[1]).abs().mean() > 1e-3
    assert (samples[0] - means[0]).abs().mean() > 1e-3


def test_divergence_against_the_closed_formula():
    """KL(N(μ, σ²) ‖ N(0, 1)) = (μ² + σ² − 1 − log σ²) / 2, a mean over a clip's latents."""
    vae, mel = tiny(), 3 * mels()
    with torch.no_grad():
        vae.autoencoder.quant_conv.weight.mul_(3)
        mean, logvar = (x.double() for x in moments(vae, mel))
        expected = ((mean**2 + logvar.exp() - 1 - logvar) / 2).mean(dim=(1, 2, 3))
        for sampled in (True, False):
            torch.testing.assert_close(vae(mel, sampled=sampled)[1].double(), expected, atol=0, rtol=1e-5)
    assert expected.min() > 0.05
    assert (expected[0] / expected[1] - 1).abs() > 1e-3  # each clip's own
    distribution = torch.distributions.Normal(mean, (logvar / 2).exp())
    by_torch = torch.distributions.kl_divergence(distribution, torch.distributions.Normal(0.0, 1.0)).mean(dim=(1, 2, 3))
    torch.testing.assert_close(expected, by_torch)


def test_clips_do_not_mix_and_every_parameter_learns():
    vae, mel = tiny(), mels().requires_grad_()
    made, divergence = vae(mel)
    (gradient,) = torch.autograd.grad(made[0].square().sum(), mel, retain_graph=True)
    assert gradient[0].abs().min() > 0  # attention in the middle: every value sees every other
    assert gradient[1].abs().max() == 0
    (made.square().mean() + divergence.mean()).backward()
    gradients = {name: p.grad.abs().max() for name, p in vae.named_parameters()}
    keys = {name for name in gradients if name.endswith("to_k.bias")}  # adds the same to all of a place's scores
    assert len(keys) == 2
    assert min(gradients[name] for name in gradients.keys() - keys) > 1e-7


def test_under_autocast_the_posterior_and_the_log_mel_are_float32():
    """In bf16 a log mel of −11.5, which is silence, has steps of 0.06."""
    vae, mel = tiny(mel_mean=-11.5, mel_std=0.01), 0.01 * mels() - 11.5
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        made, divergence = vae(mel)
        latents = vae.encode(mel)
        assert moments(vae, mel)[0].dtype == torch.bfloat16
    assert {x.dtype for x in (made, divergence, latents)} == {torch.float32}
    assert len(made.unique()) > 20 * len(made.bfloat16().unique())


def test_full_configuration():
    with torch.device("meta"):
        vae, mel = MelVae(), torch.zeros(1, 1, 256, 1024)
        latents = vae.encode(mel)
        assert latents.shape == (1, 16, 32, 128)
        assert vae.decode(latents).shape == mel.shape
    assert sum(p.numel() for p in vae.parameters()) == 223_535_569
