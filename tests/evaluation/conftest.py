"""What the tests of metrics and baselines share: four songs, and a model whose output is known."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from lib.audio.synth import render_song
from lib.codec.mdct import MdctCodec
from lib.model.fusion import Fusion

RATE, SECONDS = 24_000, 4


class KnownModel(nn.Module):
    """A model without stages, whose output is a function of its latents."""

    def __init__(self, output):
        super().__init__()
        self.output = output
        self.weight = nn.Parameter(torch.zeros(()))  # says which device it is on

    def forward(self, input, target):
        return Fusion(self.output(input, target), (), None)


@pytest.fixture(scope="session")
def known_model() -> Callable[..., nn.Module]:
    """Builds a model from its output as a function of both latents."""
    return KnownModel


@pytest.fixture(scope="session")
def clips() -> list[torch.Tensor]:
    """Four songs through the codec, as latents `[128, 300]`."""
    songs = np.stack([render_song(0, i, SECONDS * RATE) for i in range(4)])
    return list(MdctCodec().encode(torch.from_numpy(songs).float()[:, None]))


@pytest.fixture(scope="session")
def wavs(clips) -> list[torch.Tensor]:
    """The same as sound `[1, N]`."""
    return [MdctCodec().decode(clip[None])[0] for clip in clips]
