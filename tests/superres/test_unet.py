"""The denoiser and its encoder: what each output depends on, and what a condition left out really leaves out; the
schedule of diffusion against its formula, and sampling against models whose answer is known."""

import functools
import math

import pytest
import torch
from torch import Tensor, nn

from lib.superres.unet import (
    CONTEXTS,
    TIMESTEPS,
    Denoiser,
    DenoiserConfig,
    EncoderConfig,
    GlobalAudioEncoder,
    GlobalTransformer,
    add_noise,
    sample,
    schedule,
)
from lib.util.errors import UserError
from superres.conftest import DENOISER

ENCODER = EncoderConfig((2, 3, 4), 8, num_layers=1, num_heads=2, ffn_dim=8, context_dim=6, positions=8, dropout=0.0)


def tiny(seed: int = 0, **changes) -> Denoiser:
    sizes = {"channels": (8, 8, 16), "attention": (False, True, True), "num_res_blocks": 1, "transformers": 1}
    sizes |= {"latent_channels": 2, "head_channels": 4, "norm_groups": 4, "encoder": ENCODER} | changes
    torch.manual_seed(seed)
    denoiser = Denoiser(DenoiserConfig(**sizes)).eval()  # in training, batch normalisation mixes the clips
    nn.init.normal_(denoiser.unet.conv_out.weight, std=0.1)  # which starts at 0
    return denoiser


def inputs(B: int = 3, T: int = 8, seed: int = 1) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    noisy, low = torch.randn(2, B, 2, 8, 4, generator=g)
    timesteps = torch.randint(1000, (B,), generator=g)
    return {"noisy": noisy, "timesteps": timesteps, "low": low, "mel": torch.randn(B, 1, 256, T, generator=g)}


def transformer() -> GlobalTransformer:
    torch.manual_seed(0)
    return GlobalTransformer(8, head_channels=4, context_dim=6, norm_groups=4).eval()


def places_and_context(L: int, B: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(2)
    return 2 * torch.randn(B, 8, 3, 5, generator=g), 2 * torch.randn(B, L, 6, generator=g)


# --- what each place receives of the context --------------------------------------------------------------------------


def test_one_vector_reaches_every_place_alike_whatever_the_place_asks():
    """C18: with one key the softmax is 1 everywhere; what arrives is value and output projection of it, no more."""
    module = transformer()
    x, context = places_and_context(L=1)
    x.requires_grad_()
    received = module.attend(x, context)
    torch.testing.assert_close(received, received[:, :, :1, :1].expand_as(received), atol=1e-6, rtol=0)
    attention = module.global_attention
    value = module.global_projection(context[:, 0]) @ attention.in_proj_weight[16:].T + attention.in_proj_bias[16:]
    torch.testing.assert_close(received[:, :, 1, 2], attention.out_proj(value))
    assert received.abs().max() > 0.1
    (received * torch.randn(received.shape)).sum().backward()
    assert x.grad.abs().max() < 1e-6  # the question does not matter
    assert attention.in_proj_weight.grad[:16].abs().max() < 1e-6  # nor can its projection and the keys' learn
    assert attention.in_proj_weight.grad[16:].abs().max() > 1e-2


def test_of_several_vectors_each_place_receives_its_own_mixture():
    module = transformer()
    x, context = places_and_context(L=5)
    received = module.attend(x, context)
    assert (received - received[:, :, :1, :1]).abs().amax(dim=1).flatten(1)[:, 1:].min() > 1e-3
    # by hand: 2 heads of 4 channels
    keys, places = module.global_projection(context), x.flatten(2).mT
    w, b = module.global_attention.in_proj_weight.chunk(3), module.global_attention.in_proj_bias.chunk(3)
    q, k, v = (
        (a @ w[i].T + b[i]).unflatten(2, (2, 4)).transpose(1, 2) for i, a in enumerate((places, keys, keys))
    )  # [B, 2, places or L, 4]
    mixture = (torch.softmax(q @ k.mT / math.sqrt(4), dim=-1) @ v).transpose(1, 2).flatten(2)
    expected = module.global_attention.out_proj(mixture).mT.unflatten(2, (3, 5))
    torch.testing.assert_close(received, expected)


@pytest.mark.parametrize("L", [1, 5])
def test_gradient_of_one_place_with_respect_to_the_context(L):
    """Of one vector every place has the same Jacobian; of several, each place its own; none sees another clip."""
    module = transformer()
    x, context = places_and_context(L)
    x.requires_grad_()
    context.requires_grad_()
    received = module.attend(x, context)[0].flatten(1).sum(0)  # [places]
    of_context = torch.stack([torch.autograd.grad(r, context, retain_graph=True)[0] for r in received])  # [places, ...]
    assert of_context[:, 0].abs().amax(dim=2).min() > 1e-4  # every place, every vector
    assert of_context[:, 1].abs().max() == 0
    spread = (of_context - of_context[:1]).abs().amax(dim=(1, 2, 3))[1:]
    assert spread.max() < 1e-6 if L == 1 else spread.min() > 1e-3
    of_places = torch.stack([torch.autograd.grad(r, x, retain_graph=True)[0][0].flatten(1) for r in received])
    strength = of_places.abs().amax(dim=1)  # [places, places]
    assert strength.max() < 1e-6 if L == 1 else strength.diag().min() > 1e-4
    assert (strength - strength.diag().diag()).max() == 0  # a place asks for itself only


def test_what_is_received_is_added_before_the_transformer_block():
    module = transformer()
    x, context = places_and_context(L=3)
    with torch.no_grad():
        expected = module.block(x + module.attend(x, context), return_dict=False)[0]
        torch.testing.assert_close(module(x, context), expected)
        for parameter in module.global_attention.out_proj.parameters():
            parameter.zero_()
        torch.testing.assert_close(module(x, context), module.block(x, return_dict=False)[0])


def test_transformer_block_attends_twice_to_the_places_themselves():
    (layer,) = transformer().block.transformer_blocks
    assert (layer.attn1.to_k.in_features, layer.attn2.to_k.in_features) == (8, 8)  # context would have 6
    x, context = places_and_context(L=1, B=1)
    x.requires_grad_()
    transformer()(x, context)[0, :, 0, 0].sum().backward()
    assert x.grad.abs().amax(dim=1).min() > 0


# --- conditions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "T", "length"), [("pooled", 8, 1), ("sequence", 8, 9), ("sequence", 13, 14)])
def test_context_holds_the_pooled_vector_and_one_for_each_frame(kind, T, length):
    denoiser, mel = tiny(context=kind), inputs(T=T)["mel"]
    with torch.no_grad():
        context, (pooled, sequence) = denoiser.context(mel), denoiser.encoder(mel)
    assert context.shape == (3, length, 6)
    torch.testing.assert_close(context[:, 0], pooled)
    if kind == "sequence":
        torch.testing.assert_close(context[:, 1:], sequence)


@pytest.mark.parametrize("kind", CONTEXTS)
def test_the_mel_has_an_influence_unless_there_is_no_context(kind):
    denoiser, batch, other = tiny(context=kind), inputs(B=2), inputs(B=2, seed=5)

    def difference(**changes):
        with torch.no_grad():
            return (denoiser(**batch) - denoiser(**batch | changes)).abs().amax(dim=(1, 2, 3)).min().item()

    by_mel = difference(mel=other["mel"])
    assert by_mel == 0 if kind == "none" else by_mel > 1e-5
    assert min(difference(low=other["low"]), difference(noisy=other["noisy"])) > 1e-5
    assert difference(timesteps=999 - batch["timesteps"]) > 1e-5


def test_an_untrained_denoiser_predicts_zeros_and_learns():
    denoiser, batch = Denoiser(tiny().config), inputs()
    made = denoiser(**batch)
    assert made.abs().max() == 0
    (made - 1).square().sum().backward()
    assert denoiser.unet.conv_out.weight.grad.abs().max() > 0


def test_first_channels_are_the_noisy_latents_and_last_the_low_ones():
    denoiser, batch = tiny(), inputs()
    with torch.no_grad():
        denoiser.unet.conv_in.weight[:, 2:] = 0
        made = denoiser(**batch)
        torch.testing.assert_close(made, denoiser(**batch | {"low": batch["noisy"]}), rtol=0, atol=0)
        assert (made - denoiser(**batch | {"noisy": batch["low"]})).abs().max() > 1e-3


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"context": "pooled"},
        {"context": "sequence"},
        {"num_res_blocks": 2, "transformers": 2},
        {"attention": (True, False, True)},
        {"attention": (False, False, False), "head_channels": 8},
    ],
)
def test_every_option_runs_forward_and_backward(changes):
    """Every parameter gets a gradient; with 'pooled' what compares questions and keys gets none (C18)."""
    denoiser, batch = tiny(**changes), inputs()
    made = denoiser(**batch)
    assert made.shape == batch["noisy"].shape
    made.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in denoiser.parameters())
    for module in denoiser.modules():
        if isinstance(module, GlobalTransformer):
            compared = module.global_attention.in_proj_weight.grad[: 2 * module.global_attention.embed_dim].abs().max()
            assert compared < 1e-6 if denoiser.config.context == "pooled" else compared > 1e-6


def test_what_the_config_refuses_and_rebuilds():
    with pytest.raises(UserError, match="context='both' is not allowed; use one of sequence, pooled, none"):
        DenoiserConfig(context="both")
    with pytest.raises(UserError, match=r"attention=\(True,\) is not allowed; use one value for each of channels"):
        DenoiserConfig(attention=(True,))
    assert DenoiserConfig(encoder={"hidden_dim": 8}).encoder == EncoderConfig(hidden_dim=8)


# --- the source document's sizes --------------------------------------------------------------------------------------


def test_full_configuration():
    with torch.device("meta"):
        denoiser = Denoiser()
        unet, places = denoiser.unet, []
        for module in unet.modules():
            if isinstance(module, GlobalTransformer):
                module.register_forward_hook(lambda m, given, _: places.append(tuple(given[0].shape[1:])))
                heads = module.global_attention.num_heads
                (layer,) = module.block.transformer_blocks
                assert module.global_attention.head_dim == 32
                assert (layer.attn1.heads, layer.attn2.heads) == (heads, heads)
                assert layer.attn1.inner_dim == 32 * heads
        latents = torch.zeros(1, 16, 32, 128)
        made = denoiser(latents, torch.zeros(1), latents, torch.zeros(1, 1, 256, 1024))
    assert made.shape == latents.shape
    assert (unet.conv_in.in_channels, unet.conv_out.out_channels) == (32, 16)
    half, quarter, eighth = (256, 16, 64), (384, 8, 32), (640, 4, 16)  # channels, height, width
    down, middle, up = (half, quarter, eighth), 2 * [eighth], (eighth, quarter, half)
    assert places == [place for place in down for _ in range(4)] + middle + [place for place in up for _ in range(6)]
    assert len(places) == 32


TINY = EncoderConfig((3, 4, 8), 16, num_layers=1, num_heads=2, ffn_dim=24, context_dim=6, positions=16, dropout=0.0)


def tiny_encoder(seed: int = 0) -> GlobalAudioEncoder:
    torch.manual_seed(seed)
    return GlobalAudioEncoder(TINY).eval()


def mels(T: int, B: int = 2) -> torch.Tensor:
    return torch.randn(B, 1, 256, T, generator=torch.Generator().manual_seed(1))


# --- the encoder: size ------------------------------------------------------------------------------------------------


def test_parameter_counts_against_arithmetic():
    def linear(a, b):
        return a * b + b

    def convolution(a, b, height, width):
        return a * b * height * width + b + 2 * b  # with its normalisation

    d = 256
    layer = 4 * linear(d, d) + linear(d, 512) + linear(512, d) + 4 * d
    wanted = {
        "convolutions": convolution(1, 32, 8, 3) + convolution(32, 64, 4, 3) + convolution(64, 256, 4, 3),
        "frame_projection": linear(256 * 8, d),
        "positions": 1024 * d,
        "transformer": 4 * layer,
        "output_projection": linear(d, d) + linear(d, 128),
        "global_projection": linear(128, 128),
    }
    counted = dict.fromkeys(wanted, 0)
    with torch.device("meta"):
        for name, parameter in GlobalAudioEncoder().named_parameters():
            counted[name.split(".")[0]] += parameter.numel()
    assert counted == wanted
    assert sum(wanted.values()) == 3_233_312
    # the source document's lines are these; its sum of the first two is 746,552, and so its total 1,000 less
    assert wanted["convolutions"] + wanted["frame_projection"] == 747_552
    assert (wanted["transformer"], wanted["output_projection"] + wanted["global_projection"]) == (2_108_416, 115_200)


@pytest.mark.parametrize("T", [1024, 100, 1])
def test_shapes_of_the_default(T):
    with torch.device("meta"):
        pooled, sequence = GlobalAudioEncoder()(torch.zeros(2, 1, 256, T))
    assert (pooled.shape, sequence.shape) == ((2, 128), (2, T, 128))


def test_kernels_leave_4096_values_a_frame_and_pooling_2048():
    """The source document's kernels and strides take 256 bands to 16, not to the 8 of its table."""
    with torch.device("meta"):
        encoder = GlobalAudioEncoder()
        maps = encoder.convolutions[:-1](torch.zeros(1, 1, 256, 10))
        assert maps.shape == (1, 256, 16, 10)
        assert encoder.convolutions(torch.zeros(1, 1, 256, 10)).shape == (1, 256, 8, 10)
    assert maps[..., 0].numel() == 4096
    layers = [layer for layer in encoder.convolutions if isinstance(layer, nn.Conv2d)]
    assert [layer.kernel_size for layer in layers] == [(8, 3), (4, 3), (4, 3)]
    assert [layer.stride for layer in layers] == [(4, 1), (2, 1), (2, 1)]
    assert [layer.padding for layer in layers] == [(2, 1), (1, 1), (1, 1)]
    x = torch.randn(1, 2, 16, 5)
    torch.testing.assert_close(encoder.convolutions[-1](x), (x[:, :, ::2] + x[:, :, 1::2]) / 2)


# --- the encoder: what it computes ------------------------------------------------------------------------------------


def test_positions_of_another_length_are_straight_lines_between_the_learned():
    encoder = tiny_encoder()
    positions = encoder.positions
    assert torch.equal(encoder.positions_for(16), positions)
    twice = encoder.positions_for(31)
    torch.testing.assert_close(twice[:, ::2], positions)
    torch.testing.assert_close(twice[:, 1::2], (positions[:, 1:] + positions[:, :-1]) / 2)
    torch.testing.assert_close(encoder.positions_for(6), positions[:, ::3])
    for length in (2, 7, 100):
        torch.testing.assert_close(encoder.positions_for(length)[:, [0, -1]], positions[:, [0, -1]])


def test_output_is_the_composition_of_its_parts():
    """Of the parts' definition: frames, positions, transformer, projection, and the mean projected once more."""
    encoder, mel = tiny_encoder(), mels(16)
    with torch.no_grad():
        pooled, sequence = encoder(mel)
        frames = [encoder.convolutions(mel)[..., t].reshape(2, -1) for t in range(16)]
        frames = torch.stack([encoder.frame_projection(frame) for frame in frames], dim=1) + encoder.positions
        first, relu, _, second = encoder.output_projection
        expected = second(relu(first(encoder.transformer(frames))))
        torch.testing.assert_close(sequence, expected)
        torch.testing.assert_close(pooled, encoder.global_projection(expected.mean(1)))


def test_convolutions_keep_time_and_see_three_frames_to_either_side():
    encoder, mel = tiny_encoder(), mels(16, B=1).requires_grad_()
    encoder.convolutions(mel)[..., 8].sum().backward()
    seen = mel.grad.abs().amax(dim=(0, 1, 2)).nonzero()[:, 0]
    assert seen.tolist() == [5, 6, 7, 8, 9, 10, 11]


def test_pooled_context_depends_on_every_frame_and_on_no_other_clip():
    encoder, mel = tiny_encoder(), mels(20).requires_grad_()
    encoder(mel)[0][0].square().sum().backward()
    of_frames = mel.grad.abs().amax(dim=(1, 2))  # [B, T]
    assert of_frames[0].min() > 1e-6
    assert of_frames[1].max() == 0


@pytest.mark.parametrize("T", [16, 9])
def test_every_parameter_gets_a_gradient(T):
    encoder = tiny_encoder()
    pooled, sequence = encoder(mels(T))
    (pooled.square().sum() + sequence.square().sum()).backward()
    assert all(p.grad.abs().max() > 1e-6 for p in encoder.parameters())


def test_projection_learns_with_an_optimizer_made_before_the_first_pass():
    encoder = GlobalAudioEncoder(TINY)
    before = encoder.frame_projection.weight.detach().clone()
    assert before.shape == (16, 8 * 8)
    optimizer = torch.optim.SGD(encoder.parameters(), 0.1)
    encoder(mels(16))[0].square().sum().backward()
    optimizer.step()
    assert (encoder.frame_projection.weight - before).abs().max() > 1e-6


def test_dropout_is_the_config_s():
    for rate in (0.0, 0.3):
        encoder = GlobalAudioEncoder(EncoderConfig((3, 4, 8), 16, 1, 2, 24, 6, 16, dropout=rate))
        assert {module.p for module in encoder.modules() if isinstance(module, nn.Dropout)} == {rate}


# --- diffusion --------------------------------------------------------------------------------------------------------

SHAPE = (2, 2, 8, 4)
LOW, MEL = torch.zeros(SHAPE), torch.zeros(2, 1, 256, 32)


def noise(seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def shares(timesteps: Tensor) -> Tensor:
    """ᾱ for timesteps `[B]`, as `[B, 1, 1, 1]`, in double precision."""
    return all_shares()[timesteps][:, None, None, None]


@functools.cache
def all_shares() -> Tensor:
    """By the formula of Nichol and Dhariwal."""

    def f(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    products, product = [], 1.0
    for t in range(1_000):
        product *= 1 - min(1 - f((t + 1) / 1_000) / f(t / 1_000), 0.999)
        products.append(product)
    return torch.tensor(products, dtype=torch.double)


class Model:
    """Stands in for a `Denoiser`: `velocity(latents, ᾱ)` is what it predicts. Notes what it was called with."""

    def __init__(self, velocity):
        self.velocity, self.calls = velocity, []

    def context(self, mel: Tensor) -> Tensor:
        return torch.ones(len(mel), 5, 3)

    def denoise(self, latents: Tensor, timesteps: Tensor, low: Tensor, context: Tensor) -> Tensor:
        assert len(latents) == len(timesteps) == len(low) == len(context)
        self.calls.append((latents, timesteps.tolist(), low, context))
        return self.velocity(latents.double(), shares(timesteps), low, context).float()


# --- the schedule -----------------------------------------------------------------------------------------------------


def test_the_schedule_is_the_squared_cosine_and_ends_in_noise():
    table = schedule().alphas_cumprod
    assert table.shape == (TIMESTEPS,) == (1_000,)
    torch.testing.assert_close(table.double(), shares(torch.arange(1_000)).flatten(), rtol=1e-3, atol=1e-9)
    assert 0.99 < table[0] < 1
    assert table[499] == pytest.approx(math.cos(0.508 / 1.008 * math.pi / 2) ** 2, rel=1e-3)  # as much noise as signal
    assert 0 < table[-1].sqrt() < 1e-4
    assert bool((table.diff() < 0).all())


def test_noise_is_added_and_velocity_defined_by_the_schedule():
    latents, unit = 5 * noise(1), noise(2)
    timesteps = torch.tensor([37, 999])
    noisy, velocity = add_noise(latents, unit, timesteps)
    a = shares(timesteps)
    torch.testing.assert_close(noisy.double(), a.sqrt() * latents + (1 - a).sqrt() * unit, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(velocity.double(), a.sqrt() * unit - (1 - a).sqrt() * latents, rtol=1e-4, atol=1e-4)
    assert (velocity[0] + (1 - a[0]).sqrt() * latents[0]).abs().max() > 0.5  # the tolerance tells the noise's share


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 50, 61, 103, 501, 999])
def test_any_number_of_timesteps_goes_evenly_from_the_last_one_down(steps):
    model = Model(lambda latents, a, low, context: latents)
    sample(model, LOW, MEL, noise(), steps=steps)
    first, second = torch.tensor([call[1] for call in model.calls]).T
    assert torch.equal(first, second)
    assert len(first) == steps
    assert (first - 999 * (1 - torch.arange(steps) / steps)).abs().max() <= 0.5 + 1e-3
    assert bool((first.diff() < 0).all())


# --- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 7, 10, 30, 50, 61, 103, 501, 600, 999])
def test_with_the_true_velocity_sampling_gives_the_latents_back(steps):
    """Also for steps that do not divide 1000, and latents far beyond the unit interval, which nothing clips."""
    latents = 5 * noise(3)
    assert latents.abs().max() > 10

    def true_velocity(noisy: Tensor, a: Tensor, low: Tensor, context: Tensor) -> Tensor:
        unit = (noisy - a.sqrt() * latents) / (1 - a).sqrt()
        return a.sqrt() * unit - (1 - a).sqrt() * latents

    made = sample(Model(true_velocity), LOW, MEL, noise(), steps=steps)
    torch.testing.assert_close(made, latents, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("steps", "tolerance"), [(10, 0.15), (20, 0.05), (50, 0.02), (600, 1e-3)])
def test_the_solver_is_of_second_order(steps, tolerance):
    """The velocity of data that are normal with deviation 3 turns a unit normal into those, as steps become small. One
    of first order (DDIM, by its formula) is much further from it."""
    model = Model(lambda z, a, low, context: (a * (1 - a)).sqrt() * (1 - 9) / (9 * a + 1 - a) * z)
    made = sample(model, LOW, MEL, noise(), steps=steps)
    ratio = (made / noise()).flatten()
    assert ratio.std() < 1e-4
    assert ratio.mean().item() == pytest.approx(3, rel=tolerance)
    a = shares(torch.tensor([call[1][0] for call in model.calls])).flatten()
    (first,) = torch.ones(1, dtype=torch.double)
    for now, then in zip(a, [*a[1:], torch.tensor(1.0)], strict=True):  # z = (√ᾱ·√ᾱ' · 9 + √(1-ᾱ)·√(1-ᾱ')) / var · z
        first = first * (9 * (now * then).sqrt() + ((1 - now) * (1 - then)).sqrt()) / (9 * now + 1 - now)
    assert abs(ratio.mean().item() - 3) < 0.7 * abs(first.item() - 3)


def test_one_step_gives_the_expected_latents_whatever_the_noise():
    expected = 5 * noise(3)
    model = Model(
        lambda z, a, low, context: a.sqrt() * z - (1 - a).sqrt() * expected
    )  # it expects these from any noise
    one, other = (sample(model, LOW, MEL, noise(seed), steps=1) for seed in (1, 2))
    torch.testing.assert_close(one, expected, rtol=0, atol=2e-3)
    torch.testing.assert_close(other, one, rtol=0, atol=2e-3)


def test_sampling_needs_no_gradient_and_leaves_its_inputs_alone():
    denoiser = Denoiser(DENOISER).eval()
    unit, low = noise(), noise(4)
    made = sample(denoiser, low, MEL, unit, steps=2)
    assert not made.requires_grad
    assert torch.equal(unit, noise())
    assert torch.equal(low, noise(4))
