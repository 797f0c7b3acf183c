"""From log mel to waveform: HiFi-GAN (Kong et al. 2020, arXiv 2010.05646), and a way that has no parameters.

HiFi-GAN is transformers' `SpeechT5HifiGan` at the sizes of the public AudioSR vocoder.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lib.superres.mel import HOP, MELS, inverse_spectrum, magnitudes_of, spectrum

ITERATIONS = 32  # of Griffin and Lim


@dataclass(frozen=True)
class VocoderConfig:
    """Sizes; the defaults are seed 004's. The rates' product is the mel hop, 480."""

    channels: int = 1536
    upsample_rates: tuple[int, ...] = (6, 5, 4, 2, 2)
    upsample_kernels: tuple[int, ...] = (12, 10, 8, 4, 4)
    resblock_kernels: tuple[int, ...] = (3, 7, 11, 15)
    dilations: tuple[int, ...] = (1, 3, 5)


class Vocoder(nn.Module):
    """Log mel `[B, 1, 256, T]` → waveform `[B, 1, 480 · T]`."""

    def __init__(self, config: VocoderConfig | None = None, *, weight_norm: bool = False):
        from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig  # a second, which only those pay who build one

        super().__init__()
        config = config or VocoderConfig()
        self.config = config
        self.generator = SpeechT5HifiGan(
            SpeechT5HifiGanConfig(
                model_in_dim=MELS,
                upsample_initial_channel=config.channels,
                upsample_rates=list(config.upsample_rates),
                upsample_kernel_sizes=list(config.upsample_kernels),
                resblock_kernel_sizes=list(config.resblock_kernels),
                resblock_dilation_sizes=[list(config.dilations)] * len(config.resblock_kernels),
                normalize_before=False,
            )
        )
        if weight_norm:
            self.generator.apply_weight_norm()

    def forward(self, mel: Tensor) -> Tensor:
        # a stage whose kernel and rate differ by an odd number makes one sample more than its share
        return self.generator(mel[:, 0].mT)[:, None, : mel.shape[-1] * HOP]

    def fold_weight_norm(self) -> None:
        """Each weight as one tensor again: the same function, one multiplication less."""
        for layer in self.modules():
            if parametrize.is_parametrized(layer, "weight"):
                parametrize.remove_parametrizations(layer, "weight")


def griffin_lim(mel: Tensor, known: Tensor, bins: int, *, noise: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """A waveform `[B, 1, N]` for a log mel `[B, 1, 256, N / 480]`, without parameters.

    The first `bins` bins of the spectrum are those of the waveform `known [B, 1, N]`, magnitude and phase. The others
    have the mel's magnitudes, with the phases that agree best with their neighbours in time and frequency (Griffin and
    Lim 1984), found from the start `noise [B, N_FFT / 2 + 1, N / 480]`, in turns.
    """
    low, magnitudes = spectrum(known)[:, :bins], magnitudes_of(mel)[:, bins:]
    phases = torch.polar(torch.ones_like(noise), 2 * torch.pi * noise)[:, bins:]
    for _ in range(iterations):
        wav = inverse_spectrum(torch.cat([low, magnitudes * phases], dim=1))
        phases = spectrum(wav)[:, bins:].sgn()
    return inverse_spectrum(torch.cat([low, magnitudes * phases], dim=1))
