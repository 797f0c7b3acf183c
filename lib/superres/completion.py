"""The mel spectrogram that is expected of the whole band, given its lower part: ridge regression, and a share of what a
small convolutional network corrects in it. A diffusion model then adds what no expectation has: detail."""

import torch
from torch import Tensor, nn

from lib.superres.baselines import MelStatistics
from lib.superres.mel import MELS, known_bands
from lib.util.configs import Count, checked_dataclass

SHARE = 0.5  # of the correction: all of it gains little more on songs left out of training, and loses on some
SPREAD = 2.0  # nepers, of a band about its mean


@checked_dataclass
class CompletionConfig:
    hidden_dim: Count = 384
    num_layers: Count = 4


class Layer(nn.Module):
    def __init__(self, channels: int, dilation: int):
        super().__init__()
        self.norm = nn.GroupNorm(1, channels)
        self.near = nn.Conv1d(channels, channels, 3, padding=dilation, dilation=dilation)
        self.last = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(nn.functional.silu(self.near(self.norm(x))))


class Completion(nn.Module):
    """Ridge regression by the statistics of the training songs, and convolutions over frames."""

    def __init__(self, config: CompletionConfig | None = None, statistics: MelStatistics | None = None):
        super().__init__()
        self.config = config = config or CompletionConfig()
        self.statistics = statistics or MelStatistics()
        first = nn.Conv1d(2 * MELS, config.hidden_dim, 3, padding=1)
        layers = (Layer(config.hidden_dim, 2**i) for i in range(config.num_layers))
        self.network = nn.Sequential(first, *layers, last := nn.Conv1d(config.hidden_dim, MELS, 1))
        nn.init.zeros_(last.weight)  # untrained, it corrects nothing
        nn.init.zeros_(last.bias)

    def forward(self, linear: Tensor, missing: Tensor) -> Tensor:
        """The correction `[B, 1, 256, T]` of a log mel completed by regression, in the bands where `missing [B, 256]`
        is 1."""
        deviations = (linear[:, 0] - self.statistics.mean[:, None]) / SPREAD
        given = torch.cat([deviations, missing[..., None].expand_as(deviations)], dim=1)
        return (self.network(given) * missing[..., None])[:, None]

    def complete(self, mel: Tensor, cutoff: float) -> Tensor:
        """A log mel `[B, 1, 256, T]` with the bands above the cutoff (Hz) that are expected from those below it."""
        linear = self.statistics.predicted(mel, cutoff)
        return linear + SHARE * self(linear, missing_bands(cutoff).to(mel.device).expand(len(mel), -1))


def missing_bands(cutoff: float) -> Tensor:
    """`[256]`: 1 for a band that is predicted, 0 for one that is known."""
    return (torch.arange(MELS) >= known_bands(cutoff)).float()
