"""How good a reconstruction or a fusion is, beside baselines that need no model.

Legend: N samples, D latent channels, T frames.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lib.audio import SAMPLE_RATE
from lib.cascade import Cascade, rms
from lib.latents import LatentPairs
from lib.losses import LossConfig, total_loss


def band_snr(
    reference: Tensor, estimate: Tensor, edges: Sequence[float], sample_rate: int = SAMPLE_RATE
) -> list[float]:
    """Signal-to-noise ratio in dB of `estimate [1, N]` within each band between neighbouring `edges` (Hz).

    Energies are sums over the bins of one Fourier transform of the whole clip, reference against difference. A band
    without energy in the reference gives NaN.
    """
    signal, noise = (torch.fft.rfft(x[0].double()).abs().square() for x in (reference, reference - estimate))
    frequencies = torch.fft.rfftfreq(reference.shape[-1], 1 / sample_rate)
    ratios = []
    for low, high in itertools.pairwise(edges):
        band = (frequencies >= low) & (frequencies < high)
        power = signal[band].sum()
        ratio = 10 * torch.log10(power / noise[band].sum().clamp_min(1e-30))
        ratios.append(ratio.item() if power > 0 else float("nan"))
    return ratios


def kurtosis(x: Tensor) -> float:
    """Fourth standardised moment of all values: 3 for a normal distribution, larger for heavier tails."""
    centred = x.double() - x.double().mean()
    return (centred.pow(4).mean() / centred.square().mean().square()).item()


@torch.no_grad()
def baseline_losses(pairs: LatentPairs, loss: LossConfig, untrained: Cascade) -> dict[str, float]:
    """The training objective of outputs that nothing was learned for, as means over `pairs`.

    The mean of both latents minimises a loss with two equal weights; 'at full level' brings it to the RMS that the
    cascade's scaling aims at, which is the best that a cascade in its clamp range can copy.
    """
    sums: dict[str, float] = {}
    untrained.eval()
    for input, target in DataLoader(pairs, batch_size=8):  # each [B, D, T]
        mean = (input + target) / 2
        goal = ((rms(input).square() + rms(target).square()) / 2).sqrt()
        outputs = {
            "input alone": input,
            "target alone": target,
            "plain average": mean,
            "plain average at full level": mean * (goal / rms(mean))[:, None, None],
            "untrained cascade": untrained(input, target)[0],
        }
        for name, output in outputs.items():
            sums[name] = sums.get(name, 0.0) + total_loss(output, input, target, loss)[0].item() * len(input)
    return {name: value / len(pairs) for name, value in sums.items()}
