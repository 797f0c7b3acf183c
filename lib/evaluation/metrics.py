"""Objective metrics of a reconstruction, of a model's fused latents, and of fused sound.

Legend: N samples, D latent channels, T frames, M mel bands, F frames of a spectrogram.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import librosa
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lib.audio.features import HOP, Sound, correlation
from lib.audio.files import SAMPLE_RATE
from lib.model.cascade import rms
from lib.model.fusion import FusionModel
from lib.model.masks import complementarity
from lib.model.rms_law import pair_rms
from lib.training.losses import latent_mse

CHROMA_FFT = 4096  # 5.9 Hz a bin
CHROMA_HOP = 4 * HOP  # 53 ms


def band_snr(reference: Tensor, estimate: Tensor, edges: Sequence[float]) -> list[float]:
    """Signal-to-noise ratio in dB of `estimate [1, N]` within each band between neighbouring `edges` (Hz), by one
    Fourier transform of the whole clip. NaN for a band in which the reference has no energy."""
    signal, noise = (torch.fft.rfft(x[0].double()).abs().square() for x in (reference, reference - estimate))
    frequencies = torch.fft.rfftfreq(reference.shape[-1], 1 / SAMPLE_RATE)
    bands = [(frequencies >= low) & (frequencies < high) for low, high in itertools.pairwise(edges)]
    powers = [(signal[band].sum(), noise[band].sum().clamp_min(1e-30)) for band in bands]
    return [10 * torch.log10(power / error).item() if power > 0 else math.nan for power, error in powers]


def band_rows(ratios: Sequence[float], edges: Sequence[float]) -> list[dict[str, str]]:
    """What `band_snr` measured, as rows of a table."""
    return [
        {"band (Hz)": f"{low} to {high}", "SNR (dB)": "no signal" if math.isnan(ratio) else f"{ratio:.0f}"}
        for (low, high), ratio in zip(itertools.pairwise(edges), ratios, strict=True)
    ]


def survival(ratios: Sequence[float], design: float | None = None) -> str:
    """The lowest of some bands' signal-to-noise ratios (dB, NaN for an empty band) in words, beside the design's."""
    present = [ratio for ratio in ratios if not math.isnan(ratio)]
    if not present:
        return "no signal"
    goal = "" if design is None else f"; over {design:g} dB, its design: {'yes' if min(present) > design else 'no'}"
    return f"signal to noise at least {min(present):.0f} dB{goal}"


def kurtosis(x: Tensor) -> float:
    """Fourth standardised moment of all values: 3 for a normal distribution, larger for heavier tails."""
    centred = x.double() - x.double().mean()
    return (centred.pow(4).mean() / centred.square().mean().square()).item()


@torch.no_grad()
def evaluate_fusion(model: FusionModel, pairs: Dataset) -> dict[str, float]:
    """Metrics of the latents that a model fuses from `pairs`, as means over them, in eval mode on the model's device.

    input_mse, target_mse, mse (their mean)    squared latent units
    input_correlation, target_correlation      Pearson's over all values of a clip: how much of each source leaks
    rms_ratio, movement_ratio                  RMS over `pair_rms` of the clips; `movement` over the clips' mean
    complementarity, stage<i>/<field>          of the masks, where there are any; of every stage's trace
    """
    device = next(model.parameters()).device
    sums: dict[str, Tensor] = {}
    model.eval()
    for input, target in DataLoader(pairs, batch_size=8):
        input, target = input.to(device), target.to(device)
        output, traces, masks = model(input, target)
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


@dataclass(frozen=True)
class SoundFeatures:
    """The features of one clip that `sound_metrics` compares."""

    onsets: Tensor  # librosa's onset strength, 75 frames a second
    chroma: Tensor  # librosa's share of each pitch class minus 1/12, flattened over frames of 53 ms
    envelope: Tensor  # RMS of 250 segments
    log_mel: Tensor  # [M, F]
    rms: float
    movement: float  # standard deviation of the envelope over its mean: 0 for a sound of constant level


def sound_features(wav: Tensor) -> SoundFeatures:
    """Features of a clip `[1, N]` at 24 kHz. Rhythm and harmony are librosa's, unlike the terms of the objective."""
    samples = wav[0].float().cpu().numpy()
    onsets = librosa.onset.onset_strength(y=samples, sr=SAMPLE_RATE, hop_length=HOP)
    classes = librosa.feature.chroma_stft(
        y=samples, sr=SAMPLE_RATE, n_fft=CHROMA_FFT, hop_length=CHROMA_HOP, tuning=0.0, norm=1
    )  # [12, frames], zeros where there is silence
    share = np.where(classes.sum(axis=0) > 0, classes - 1 / 12, 0.0)  # or two silent passages would match
    sound = Sound(wav[None].float().cpu())
    curve = sound.envelope[0]
    chroma = torch.from_numpy(share.astype(np.float32)).flatten()
    level, change = float(wav.square().mean().sqrt()), float(curve.std() / curve.mean())
    return SoundFeatures(torch.from_numpy(onsets), chroma, curve, sound.log_mel[0], level, change)


def sound_metrics(output: SoundFeatures, input: SoundFeatures, target: SoundFeatures) -> dict[str, float]:
    """Objective metrics of a fusion against its two clips.

    rhythm           correlation of the onset strengths of output and input, −1 to 1
    harmony          cosine of the chroma of output and target, each minus 1/12, −1 to 1
    merit            the figure of merit: harmonic mean of the two, negative values counted as 0. It is high only if the
                     output has the input's rhythm *and* the target's harmony; a copy of one clip has about 0
    input_envelope, target_envelope    correlation of the loudness curves: how much of each the output copies
    input_mel, target_mel              mean absolute difference of the log mel spectrograms, dB
    rms_ratio, movement_ratio          RMS over `pair_rms` of the clips; movement over the clips' mean
    """
    rhythm = float(correlation(output.onsets, input.onsets))
    harmony = float(torch.nn.functional.cosine_similarity(output.chroma, target.chroma, dim=0))
    decibels = 10 / math.log(10)
    return {
        "rhythm": rhythm,
        "harmony": harmony,
        "merit": merit(rhythm, harmony),
        "input_envelope": float(correlation(output.envelope, input.envelope)),
        "target_envelope": float(correlation(output.envelope, target.envelope)),
        "input_mel": decibels * float((output.log_mel - input.log_mel).abs().mean()),
        "target_mel": decibels * float((output.log_mel - target.log_mel).abs().mean()),
        "rms_ratio": output.rms / (pair_rms(input.rms, target.rms) + 1e-8),
        "movement_ratio": 2 * output.movement / (input.movement + target.movement + 1e-8),
    }


def merit(rhythm: float, harmony: float) -> float:
    """Harmonic mean of two similarities, negative values counted as 0."""
    rhythm, harmony = max(rhythm, 0.0), max(harmony, 0.0)
    return 2 * rhythm * harmony / (rhythm + harmony) if rhythm + harmony else 0.0
