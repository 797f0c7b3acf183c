"""The global encoder: its sizes derived by hand, and what each output depends on."""

import pytest
import torch
from torch import nn

from lib.superres.encoder import EncoderConfig, GlobalAudioEncoder

TINY = EncoderConfig((3, 4, 8), 16, num_layers=1, num_heads=2, ffn_dim=24, context_dim=6, positions=16, dropout=0.0)


def tiny(seed: int = 0) -> GlobalAudioEncoder:
    torch.manual_seed(seed)
    return GlobalAudioEncoder(TINY).eval()


def mels(T: int, B: int = 2) -> torch.Tensor:
    return torch.randn(B, 1, 256, T, generator=torch.Generator().manual_seed(1))


# --- size -------------------------------------------------------------------------------------------------------------


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
    # the seed's lines are these; its sum of the first two is 746,552, and so its total 1,000 less
    assert wanted["convolutions"] + wanted["frame_projection"] == 747_552
    assert (wanted["transformer"], wanted["output_projection"] + wanted["global_projection"]) == (2_108_416, 115_200)


@pytest.mark.parametrize("T", [1024, 100, 1])
def test_shapes_of_the_default(T):
    with torch.device("meta"):
        pooled, sequence = GlobalAudioEncoder()(torch.zeros(2, 1, 256, T))
    assert (pooled.shape, sequence.shape) == ((2, 128), (2, T, 128))


def test_kernels_leave_4096_values_a_frame_and_pooling_2048():
    """The seed's kernels and strides take 256 bands to 16, not to the 8 of its table."""
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


# --- what it computes -------------------------------------------------------------------------------------------------


def test_positions_of_another_length_are_straight_lines_between_the_learned():
    encoder = tiny()
    positions = encoder.positions
    assert encoder.positions_for(16) is positions
    twice = encoder.positions_for(31)
    torch.testing.assert_close(twice[:, ::2], positions)
    torch.testing.assert_close(twice[:, 1::2], (positions[:, 1:] + positions[:, :-1]) / 2)
    torch.testing.assert_close(encoder.positions_for(6), positions[:, ::3])
    for length in (2, 7, 100):
        torch.testing.assert_close(encoder.positions_for(length)[:, [0, -1]], positions[:, [0, -1]])


def test_output_is_the_composition_of_its_parts():
    """Of the parts' definition: frames, positions, transformer, projection, and the mean projected once more."""
    encoder, mel = tiny(), mels(16)
    with torch.no_grad():
        pooled, sequence = encoder(mel)
        frames = [encoder.convolutions(mel)[..., t].reshape(2, -1) for t in range(16)]
        frames = torch.stack([encoder.frame_projection(frame) for frame in frames], dim=1) + encoder.positions
        first, relu, _, second = encoder.output_projection
        expected = second(relu(first(encoder.transformer(frames))))
        torch.testing.assert_close(sequence, expected)
        torch.testing.assert_close(pooled, encoder.global_projection(expected.mean(1)))


def test_convolutions_keep_time_and_see_three_frames_to_either_side():
    encoder, mel = tiny(), mels(16, B=1).requires_grad_()
    encoder.convolutions(mel)[..., 8].sum().backward()
    seen = mel.grad.abs().amax(dim=(0, 1, 2)).nonzero()[:, 0]
    assert seen.tolist() == [5, 6, 7, 8, 9, 10, 11]


def test_pooled_context_depends_on_every_frame_and_on_no_other_clip():
    encoder, mel = tiny(), mels(20).requires_grad_()
    encoder(mel)[0][0].square().sum().backward()
    of_frames = mel.grad.abs().amax(dim=(1, 2))  # [B, T]
    assert of_frames[0].min() > 1e-6
    assert of_frames[1].max() == 0


@pytest.mark.parametrize("T", [16, 9])
def test_every_parameter_gets_a_gradient(T):
    encoder = tiny()
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
