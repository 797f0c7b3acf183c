"""The discriminator: its size, what it sees, and its dropout."""

import math

import pytest
import torch
from torch import nn

from lib.model.discriminator import Discriminator
from model.test_masks import clips


def test_discriminator_parameter_count_against_arithmetic():
    convolutions = [(128, 256, 3), (256, 512, 5), (512, 512, 7), (512, 256, 9)]
    wanted = sum(a * b * k + b for a, b, k in convolutions) + (256 * 128 + 128) + (128 + 1)
    assert wanted == 3_802_881
    assert sum(p.numel() for p in Discriminator().parameters()) == 3_802_881


@pytest.mark.parametrize("T", [1, 2, 3, 7, 8, 75])
def test_the_discriminator_judges_clips_of_any_length(T):
    torch.manual_seed(0)
    discriminator = Discriminator(8)
    frames = []
    for i in (0, 3, 6, 9):
        discriminator.conv_layers[i].register_forward_hook(
            lambda module, inputs, output: frames.append(output.shape[2])
        )
    x = clips(3, 8, T)[0].requires_grad_()
    logits = discriminator(x)
    assert logits.shape == (3,)
    assert frames == [math.ceil(T / stride) for stride in (2, 4, 8, 8)]
    logits.sum().backward()
    assert x.grad.isfinite().all()
    assert (x.grad.abs().sum(dim=(1, 2)) > 0).all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in discriminator.parameters())


@torch.no_grad()
def test_the_discriminator_judges_every_clip_by_itself():
    torch.manual_seed(0)
    discriminator = Discriminator(8).eval()
    x = clips(3, 8, 40)[0]
    together = discriminator(x)
    torch.testing.assert_close(torch.cat([discriminator(x[b : b + 1]) for b in range(3)]), together)
    assert (together - together.mean()).abs().min() > 1e-5


@torch.no_grad()
def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    discriminator = Discriminator(8)
    x = clips(4, 8, 40)[0]
    assert not torch.equal(discriminator(x), discriminator(x))
    discriminator.eval()
    assert torch.equal(discriminator(x), discriminator(x))


@torch.no_grad()
def test_three_tenths_are_dropped_after_every_layer_but_the_last():
    torch.manual_seed(0)
    discriminator = Discriminator(8)
    dropped = []
    for layer in discriminator.modules():
        if isinstance(layer, nn.LeakyReLU):
            layer.register_forward_hook(lambda module, inputs, output: torch.ones_like(output))
        elif isinstance(layer, nn.Dropout):
            layer.register_forward_hook(lambda module, inputs, output: dropped.append((output == 0).float().mean()))
    discriminator(clips(20, 8, 40)[0])
    assert dropped == pytest.approx([0.3] * 5, abs=0.04)
