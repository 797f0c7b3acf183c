"""From log mel to waveform: Griffin-Lim, which has no parameters, and HiFi-GAN (Kong et al. 2020, arXiv 2010.05646)
with its discriminators. The generator is transformers' `SpeechT5HifiGan` at the sizes of the public AudioSR vocoder."""

import itertools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from lib.superres.mel import HOP, MELS, inverse_spectrum, magnitudes_of, spectrum
from lib.util.configs import Count, checked_dataclass


@checked_dataclass
class VocoderConfig:
    """Sizes; the defaults are source document 004's."""

    channels: Count = 1536
    upsample_rates: tuple[Count, ...] = (6, 5, 4, 2, 2)  # their product is the mel hop, 480
    upsample_kernels: tuple[Count, ...] = (12, 10, 8, 4, 4)
    resblock_kernels: tuple[Count, ...] = (3, 7, 11, 15)
    dilations: tuple[Count, ...] = (1, 3, 5)


class Vocoder(nn.Module):
    """Log mel `[B, 1, 256, T]` → waveform `[B, 1, 480 · T]`."""

    def __init__(self, config: VocoderConfig | None = None, *, weight_norm: bool = False):
        from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig  # slow to import

        super().__init__()
        self.config = config = config or VocoderConfig()
        sizes = SpeechT5HifiGanConfig(
            model_in_dim=MELS,
            upsample_initial_channel=config.channels,
            upsample_rates=list(config.upsample_rates),
            upsample_kernel_sizes=list(config.upsample_kernels),
            resblock_kernel_sizes=list(config.resblock_kernels),
            resblock_dilation_sizes=[list(config.dilations)] * len(config.resblock_kernels),
            normalize_before=False,
        )
        self.generator = SpeechT5HifiGan(sizes)
        if weight_norm:
            self.generator.apply_weight_norm()

    def forward(self, mel: Tensor) -> Tensor:
        # a stage whose kernel and rate differ by an odd number adds a sample
        return self.generator(mel[:, 0].mT)[:, None, : mel.shape[-1] * HOP]


def griffin_lim(mel: Tensor, known: Tensor, bins: int, *, noise: Tensor, iterations: int = 32) -> Tensor:
    """A waveform `[B, 1, N]` for a log mel `[B, 1, 256, N / 480]` (Griffin and Lim 1984). The first `bins` of its
    spectrum are those of `known [B, 1, N]`, other phases start from `noise [B, N_FFT / 2 + 1, N / 480]`."""
    low, magnitudes = spectrum(known)[:, :bins], magnitudes_of(mel)[:, bins:]
    phases = torch.polar(torch.ones_like(noise), 2 * torch.pi * noise)[:, bins:]
    for _ in range(iterations):
        phases = spectrum(inverse_spectrum(torch.cat([low, magnitudes * phases], dim=1)))[:, bins:].sgn()
    return inverse_spectrum(torch.cat([low, magnitudes * phases], dim=1))


# Discriminators of Kong et al., and of Kumar et al. 2019, arXiv 1910.06711, at the papers' sizes.
Output = tuple[Tensor, list[Tensor]]  # logits, and the feature maps before them


class Discriminator(nn.Module):
    """Convolutions over a waveform `[B, 1, N]`, or columns of every `period`-th sample: logits `[B, n]`, features."""

    def __init__(self, layers: Iterable[nn.Module], last: nn.Module, period: int | None = None):
        super().__init__()
        self.layers, self.last, self.period = nn.ModuleList(layers), last, period

    def forward(self, x: Tensor) -> Output:
        if self.period:
            padded = nn.functional.pad(x, (0, -x.shape[-1] % self.period), mode="reflect")
            x = padded.unflatten(2, (-1, self.period))
        features = []
        for layer in self.layers:
            x = nn.functional.leaky_relu(layer(x), 0.1)
            features.append(x)
        return self.last(x).flatten(1), features


def period_discriminator(period: int, c: int) -> Discriminator:
    widths = itertools.pairwise((1, c, 4 * c, 16 * c, 32 * c, 32 * c))
    layers = [nn.Conv2d(a, b, (5, 1), (3 if i < 4 else 1, 1), (2, 0)) for i, (a, b) in enumerate(widths)]
    return Discriminator(map(weight_norm, layers), weight_norm(nn.Conv2d(32 * c, 1, (3, 1), 1, (1, 0))), period)


def scale_discriminator(norm: Callable[[nn.Module], nn.Module], c: int) -> Discriminator:
    widths = itertools.pairwise((1, c, c, 2 * c, 4 * c, 8 * c, 8 * c, 8 * c))
    kernels, strides, groups = (15, 41, 41, 41, 41, 41, 5), (1, 2, 2, 4, 4, 1, 1), (1, 4, 16, 16, 16, 16, 1)
    sizes = zip(widths, kernels, strides, groups, strict=True)
    layers = [norm(nn.Conv1d(a, b, k, stride, k // 2, groups=g)) for (a, b), k, stride, g in sizes]
    return Discriminator(layers, norm(nn.Conv1d(8 * c, 1, 3, 1, 1)))


class Discriminators(nn.Module):
    """Five periods, and three scales at the full, half and quarter sample rate: `[B, 1, N]` → eight outputs."""

    def __init__(self, period_channels: int = 32, scale_channels: int = 128):
        super().__init__()
        self.periods = nn.ModuleList(period_discriminator(period, period_channels) for period in (2, 3, 5, 7, 11))
        norms = (spectral_norm, weight_norm, weight_norm)
        self.scales = nn.ModuleList(scale_discriminator(norm, scale_channels) for norm in norms)
        self.slower = nn.AvgPool1d(4, 2, padding=2)

    def forward(self, wav: Tensor) -> list[Output]:
        half = self.slower(wav)
        scales = zip(self.scales, (wav, half, self.slower(half)), strict=True)
        return [period(wav) for period in self.periods] + [scale(slower) for scale, slower in scales]


def outputs_of_both(discriminators: nn.Module, real: Tensor, fake: Tensor) -> list[list[tuple[Tensor, Tensor]]]:
    """For each discriminator its feature maps, and last its logits: (real, fake) each, of waveforms `[B, 1, N]`."""
    outputs = discriminators(torch.cat([real, fake]))
    return [[x.chunk(2) for x in (*features, logits)] for logits, features in outputs]


def discriminator_loss(both: list[list[tuple[Tensor, Tensor]]]) -> Tensor:
    """Least squares, to 1 for real and 0 for fake, summed over the discriminators."""
    return sum((1 - real).square().mean() + fake.square().mean() for *_, (real, fake) in both)


def generator_losses(both: list[list[tuple[Tensor, Tensor]]]) -> tuple[Tensor, Tensor]:
    """Least squares to 1, and the mean absolute difference of the feature maps, summed over all outputs and maps."""
    differences = [(real - fake).abs().mean() for *maps, _ in both for real, fake in maps]
    return sum((1 - fake).square().mean() for *_, (_, fake) in both), sum(differences)
