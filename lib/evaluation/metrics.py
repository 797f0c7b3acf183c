"""Objective metrics of reconstructions and of fused latents. B batch, N samples, D latent channels, T frames."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lib.audio.features import correlation
from lib.audio.files import SAMPLE_RATE
from lib.model.cascade import rms
from lib.model.fusion import FusionModel
from lib.model.masks import complementarity
from lib.model.rms_law import pair_rms
from lib.training.losses import latent_mse


def band_snr(reference: Tensor, estimate: Tensor, edges: Sequence[float]) -> list[float]:
    """Signal-to-noise ratio (dB) of `estimate [C, N]` between neighbouring `edges` (Hz); NaN without a signal."""
    parts = reference, reference - estimate
    signal, noise = (torch.fft.rfft(x.double()).abs().square().sum(0) for x in parts)  # of all channels
    frequencies = torch.fft.rfftfreq(reference.shape[-1], 1 / SAMPLE_RATE)
    bands = [(frequencies >= low) & (frequencies < high) for low, high in itertools.pairwise(edges)]
    powers = [(signal[band].sum(), noise[band].sum().clamp_min(1e-30)) for band in bands]
    return [10 * torch.log10(power / error).item() if power > 0 else math.nan for power, error in powers]


def survival(ratios: Sequence[float], design: float | None = None) -> str:
    """The lowest of some bands' signal-to-noise ratios (dB, NaN for an empty band) in words, beside the design's."""
    present = [ratio for ratio in ratios if not math.isnan(ratio)]
    if not present:
        return "no signal"
    goal = "" if design is None else f"; over {design:g} dB, its design: {'yes' if min(present) > design else 'no'}"
    return f"signal to noise at least {min(present):.0f} dB{goal}"


@torch.no_grad()
def evaluate_fusion(model: FusionModel, pairs: Dataset) -> dict[str, float]:
    """Metrics of the latents that a model fuses from pairs of latents `[D, T]` (`encoded` makes them of waveforms), as
    means over them, in eval mode on the model's device.

    input_mse, target_mse, mse (their mean)    squared latent units
    input_correlation, target_correlation      Pearson's over all values of a clip: how much of each source leaks
    rms_ratio, movement_ratio                  RMS over `pair_rms` of the clips; `movement` over the clips' mean
    complementarity, stage<i>/<field>          of the masks, where there are any; of every stage's trace
    """
    device = next(model.parameters()).device
    sums: dict[str, Tensor] = {}
    model.eval()
    for input, target in DataLoader(pairs, batch_size=1 if isinstance(pairs, list) else 8):  # a list's may differ in T
        input, target = input.to(device), target.to(device)
        output, traces, masks, *_ = model(input, target)
        values = {
            "input_mse": latent_mse(output, input),
            "target_mse": latent_mse(output, target),
            "input_correlation": correlation(output.flatten(1), input.flatten(1)),
            "target_correlation": correlation(output.flatten(1), target.flatten(1)),
            "rms_ratio": rms(output) / pair_rms(rms(input), rms(target)),
            "movement_ratio": movement(output) / ((movement(input) + movement(target)) / 2 + 1e-8),
        }
        values["mse"] = (values["input_mse"] + values["target_mse"]) / 2
        if masks is not None:
            values["complementarity"] = complementarity(masks)
        for i, trace in enumerate(traces):
            values |= {f"stage{i}/{name}": value for name, value in vars(trace).items()}
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value.double().mean() * len(input)
    return {name: value.item() / len(pairs) for name, value in sums.items()}


def movement(latents: Tensor) -> Tensor:
    """Standard deviation over time of the frames' RMS, `[B, D, T] → [B]`: 0 for an output of constant level."""
    return latents.square().mean(dim=1).sqrt().std(dim=1, correction=0)
