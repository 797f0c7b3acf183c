"""How good a reconstruction or a fusion is, beside baselines that need no model.

Legend: N samples, D latent channels, T frames.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lib.audio import SAMPLE_RATE
from lib.cascade import Cascade, rms
from lib.latents import LatentPairs
from lib.losses import LossConfig, correlation, latent_mse, total_loss


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


@torch.no_grad()
def evaluate_fusion(cascade: Cascade, pairs: Dataset) -> dict[str, float]:
    """How a cascade fuses `pairs`, as means over them, in eval mode on the cascade's device.

    input_mse, target_mse, mse (their mean)      squared latent units
    input_correlation, target_correlation        Pearson's over all values of a clip: how much of each source leaks
    rms_ratio                                    output's RMS over √((rms_in² + rms_tgt²)/2)
    movement_ratio                               how much the frames' RMS varies in time, over the same of the sources
    stage<i>/<field>                             of every stage's trace
    """
    device = next(cascade.parameters()).device
    sums: dict[str, Tensor] = {}
    cascade.eval()
    for input, target in DataLoader(pairs, batch_size=8):
        input, target = input.to(device), target.to(device)
        output, traces = cascade(input, target)
        goal = ((rms(input).square() + rms(target).square()) / 2).sqrt()
        values = {
            "input_mse": latent_mse(output, input),
            "target_mse": latent_mse(output, target),
            "input_correlation": correlation(output.flatten(1), input.flatten(1)),
            "target_correlation": correlation(output.flatten(1), target.flatten(1)),
            "rms_ratio": rms(output) / goal,
            "movement_ratio": movement(output) / ((movement(input) + movement(target)) / 2 + 1e-8),
        }
        values["mse"] = (values["input_mse"] + values["target_mse"]) / 2
        for i, trace in enumerate(traces):
            for field in dataclasses.fields(trace):
                values[f"stage{i}/{field.name}"] = getattr(trace, field.name)
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value.double().mean() * len(input)
    return {name: value.item() / len(pairs) for name, value in sums.items()}


def movement(latents: Tensor) -> Tensor:
    """Standard deviation over time of the frames' RMS, `[B, D, T] → [B]`: 0 for an output that stands still."""
    return latents.square().mean(dim=1).sqrt().std(dim=1, correction=0)
