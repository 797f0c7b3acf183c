"""What HiFi-GAN is trained against: discriminators of a waveform's periods and of its scales (Kong et al. 2020, arXiv
2010.05646, and Kumar et al. 2019, arXiv 1910.06711), at the papers' sizes.

A judgement is a map of logits and the feature maps on the way to it.
"""

import itertools

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

Judgement = tuple[Tensor, list[Tensor]]
PERIODS = (2, 3, 5, 7, 11)
SLOPE = 0.1


class PeriodDiscriminator(nn.Module):
    """Sees every `period`-th sample beside its neighbours in time: `[B, 1, N]` → logits `[B, n]`."""

    def __init__(self, period: int, channels: int = 32):
        super().__init__()
        self.period = period
        widths = (1, channels, 4 * channels, 16 * channels, 32 * channels, 32 * channels)
        self.layers = nn.ModuleList(
            weight_norm(nn.Conv2d(a, b, (5, 1), (3 if i < 4 else 1, 1), (2, 0)))
            for i, (a, b) in enumerate(itertools.pairwise(widths))
        )
        self.last = weight_norm(nn.Conv2d(widths[-1], 1, (3, 1), 1, (1, 0)))

    def forward(self, wav: Tensor) -> Judgement:
        x = nn.functional.pad(wav, (0, -wav.shape[-1] % self.period), mode="reflect")
        return judge(x.unflatten(2, (-1, self.period)), self.layers, self.last)


class ScaleDiscriminator(nn.Module):
    """Sees the waveform, or a slower copy of it, in long windows: `[B, 1, N]` → logits `[B, n]`."""

    def __init__(self, norm, channels: int = 128):
        super().__init__()
        c = channels
        sizes = (  # in, out, kernel, stride, groups
            (1, c, 15, 1, 1),
            (c, c, 41, 2, 4),
            (c, 2 * c, 41, 2, 16),
            (2 * c, 4 * c, 41, 4, 16),
            (4 * c, 8 * c, 41, 4, 16),
            (8 * c, 8 * c, 41, 1, 16),
            (8 * c, 8 * c, 5, 1, 1),
        )
        self.layers = nn.ModuleList(
            norm(nn.Conv1d(a, b, k, stride, k // 2, groups=groups)) for a, b, k, stride, groups in sizes
        )
        self.last = norm(nn.Conv1d(8 * c, 1, 3, 1, 1))

    def forward(self, wav: Tensor) -> Judgement:
        return judge(wav, self.layers, self.last)


class Discriminators(nn.Module):
    """Five periods and three scales, each half as fast as the one before: `[B, 1, N]` → eight judgements."""

    def __init__(self, period_channels: int = 32, scale_channels: int = 128):
        super().__init__()
        self.periods = nn.ModuleList(PeriodDiscriminator(period, period_channels) for period in PERIODS)
        norms = (spectral_norm, weight_norm, weight_norm)
        self.scales = nn.ModuleList(ScaleDiscriminator(norm, scale_channels) for norm in norms)
        self.slower = nn.AvgPool1d(4, 2, padding=2)

    def forward(self, wav: Tensor) -> list[Judgement]:
        judgements = [discriminator(wav) for discriminator in self.periods]
        for i, discriminator in enumerate(self.scales):
            wav = self.slower(wav) if i else wav
            judgements.append(discriminator(wav))
        return judgements


def judge(x: Tensor, layers: nn.ModuleList, last: nn.Module) -> Judgement:
    features = []
    for layer in layers:
        x = nn.functional.leaky_relu(layer(x), SLOPE)
        features.append(x)
    return last(x).flatten(1), features


def discriminator_loss(of_real: list[Judgement], of_made: list[Judgement]) -> Tensor:
    """Least squares, 1 for real and 0 for made, summed over the discriminators."""
    return sum((1 - r).square().mean() + m.square().mean() for (r, _), (m, _) in zip(of_real, of_made, strict=True))


def generator_loss(of_made: list[Judgement]) -> Tensor:
    """Least squares to 1, summed over the discriminators."""
    return sum((1 - logits).square().mean() for logits, _ in of_made)


def feature_distance(of_real: list[Judgement], of_made: list[Judgement]) -> Tensor:
    """Mean absolute difference of the feature maps, summed over layers and discriminators."""
    pairs = zip(of_real, of_made, strict=True)
    return sum((r - m).abs().mean() for (_, rs), (_, ms) in pairs for r, m in zip(rs, ms, strict=True))


def judge_both(discriminators: nn.Module, real: Tensor, made: Tensor) -> tuple[list[Judgement], list[Judgement]]:
    """Judgements of real and made waveforms, `[B, 1, N]` each, in one pass."""
    both = discriminators(torch.cat([real, made]))
    first, second = slice(len(real)), slice(len(real), None)
    return tuple([(logits[part], [f[part] for f in features]) for logits, features in both] for part in (first, second))
