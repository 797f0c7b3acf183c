"""How good a reconstruction or a fusion is, beside baselines that need no model.

Legend: N samples, D latent channels, T frames.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import librosa
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lib.audio.features import HOP, correlation, envelope, log_mel
from lib.audio.files import SAMPLE_RATE
from lib.codec.codec import Codec
from lib.data.latents import LatentPairs
from lib.model.cascade import Cascade, rms
from lib.model.fusion import FusionModel
from lib.model.masks import FIXED_MASKINGS, complementarity, fixed_masks
from lib.training.losses import LossConfig, latent_mse, total_loss
from lib.util.stats import Comparison, paired_comparison


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


def band_rows(ratios: Sequence[float], edges: Sequence[float]) -> list[dict[str, str]]:
    """What `band_snr` measured, as rows of a table."""
    named = zip(itertools.pairwise(edges), ratios, strict=True)
    return [
        {"band (Hz)": f"{low} to {high}", "SNR (dB)": "no signal" if math.isnan(ratio) else f"{ratio:.0f}"}
        for (low, high), ratio in named
    ]


def survival(ratios: Sequence[float], design: float | None = None) -> str:
    """What the worst of some bands' ratios (dB, NaN for an empty band) says of a round trip, against a design's."""
    present = [ratio for ratio in ratios if not math.isnan(ratio)]
    if not present:
        return "no signal"
    words = f"signal to noise at least {min(present):.0f} dB"
    if design is not None:
        words += f"; over {design:g} dB, its design: {'yes' if min(present) > design else 'no'}"
    return words


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
def evaluate_fusion(model: FusionModel, pairs: Dataset) -> dict[str, float]:
    """How a model fuses `pairs`, as means over them, in eval mode on the model's device.

    input_mse, target_mse, mse (their mean)      squared latent units
    input_correlation, target_correlation        Pearson's over all values of a clip: how much of each source leaks
    rms_ratio                                    output's RMS over √((rms_in² + rms_tgt²)/2)
    movement_ratio                               how much the frames' RMS varies in time, over the same of the sources
    complementarity                              of the masks, where there are any
    stage<i>/<field>                             of every stage's trace
    """
    device = next(model.parameters()).device
    sums: dict[str, Tensor] = {}
    model.eval()
    for input, target in DataLoader(pairs, batch_size=8):
        input, target = input.to(device), target.to(device)
        output, traces, masks = model(input, target)
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
        if masks is not None:
            values["complementarity"] = complementarity(masks)
        for i, trace in enumerate(traces):
            for field in dataclasses.fields(trace):
                values[f"stage{i}/{field.name}"] = getattr(trace, field.name)
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value.double().mean() * len(input)
    return {name: value.item() / len(pairs) for name, value in sums.items()}


def movement(latents: Tensor) -> Tensor:
    """Standard deviation over time of the frames' RMS, `[B, D, T] → [B]`: 0 for an output that stands still."""
    return latents.square().mean(dim=1).sqrt().std(dim=1, correction=0)


# --- by ear ----------------------------------------------------------------------------------------------------------

CHROMA_FFT = 4096  # 5.9 Hz a bin
CHROMA_HOP = 4 * HOP  # 53 ms


@dataclass(frozen=True)
class Hearing:
    """What a fusion is judged by, of one clip."""

    onsets: Tensor  # onset strength, 75 frames a second, by librosa
    chroma: Tensor  # share of each pitch class around 1/12, flattened over frames of 53 ms, by librosa
    envelope: Tensor  # RMS of 250 segments
    log_mel: Tensor  # [M, F]
    rms: float
    movement: float  # deviation of the envelope over its mean: 0 for a sound that stands still


def hear(wav: Tensor) -> Hearing:
    """Features of a clip `[1, N]` at 24 kHz. They are librosa's, not those that `lib.training.losses` trains with."""
    samples = wav[0].float().cpu().numpy()
    onsets = librosa.onset.onset_strength(y=samples, sr=SAMPLE_RATE, hop_length=HOP)
    classes = librosa.feature.chroma_stft(
        y=samples, sr=SAMPLE_RATE, n_fft=CHROMA_FFT, hop_length=CHROMA_HOP, tuning=0.0, norm=1
    )  # [12, frames], zeros where there is silence
    share = np.where(classes.sum(axis=0) > 0, classes - 1 / 12, 0.0)  # or silence would go well with silence
    curve = envelope(wav[None].float().cpu())[0]
    return Hearing(
        torch.from_numpy(onsets),
        torch.from_numpy(share.astype(np.float32)).flatten(),
        curve,
        log_mel(wav[None].float().cpu())[0],
        float(wav.square().mean().sqrt()),
        float(curve.std() / curve.mean()),
    )


def judge_fusion(output: Hearing, input: Hearing, target: Hearing) -> dict[str, float]:
    """How a fusion relates to its two clips.

    rhythm           correlation of the onset strengths of output and input, −1 to 1
    harmony          cosine of the chroma of output and target around 1/12, −1 to 1
    merit            the figure of merit: harmonic mean of the two, negative ones counted as 0. It is high only where
                     the output carries the input's rhythm *and* the target's harmony; copying one clip gives about 0
    input_envelope, target_envelope    correlation of the loudness curves: how much of each the output copies
    input_mel, target_mel              mean distance of the log mel powers, dB
    rms_ratio        output's RMS over √((rms_in² + rms_tgt²)/2), of the sound
    movement_ratio   movement of the output over the mean of both clips': 0 where it is constant
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
        "rms_ratio": output.rms / (math.sqrt((input.rms**2 + target.rms**2) / 2) + 1e-8),
        "movement_ratio": 2 * output.movement / (input.movement + target.movement + 1e-8),
    }


def merit(rhythm: float, harmony: float) -> float:
    """Harmonic mean of two similarities, negative ones counted as 0."""
    rhythm, harmony = max(rhythm, 0.0), max(harmony, 0.0)
    return 2 * rhythm * harmony / (rhythm + harmony) if rhythm + harmony else 0.0


@torch.inference_mode()
def fusions(
    input: Tensor, target: Tensor, codec: Codec, models: Mapping[str, FusionModel]
) -> Iterator[tuple[str, Tensor]]:
    """Every baseline's and every model's fusion of two latents `[D, T]`, by name, as sound `[1, N]`.

    Baselines: each clip alone, the plain averages of latents and of waveforms, and what each fixed masking puts
    together without a model. All of them have been through the codec.
    """
    input, target = input[None], target[None]
    sounds = {"input": codec.decode(input), "target": codec.decode(target)}
    sounds["average of waveforms"] = (sounds["input"] + sounds["target"]) / 2
    yield from ((name, wav[0]) for name, wav in sounds.items())
    latents = {"average of latents": (input + target) / 2}
    for kind in FIXED_MASKINGS:
        masks = fixed_masks(kind, input, target)
        latents[f"{kind} masks"] = masks.input * input + masks.target * target
    for name, model in models.items():
        device = next(model.parameters()).device
        latents[name] = model.eval()(input.to(device), target.to(device)).latents.cpu()
    yield from ((name, codec.decode(x)[0]) for name, x in latents.items())


def judge_outputs(
    pairs: Iterable[tuple[Tensor, Tensor]], codec: Codec, models: Mapping[str, FusionModel]
) -> dict[str, list[dict[str, float]]]:
    """`judge_fusion` of every output of `fusions`, one entry a pair: name of the output → metrics of each pair."""
    judged: dict[str, list[dict[str, float]]] = {}
    for input, target in pairs:
        heard = {name: hear(wav) for name, wav in fusions(input, target, codec, models)}
        for name, output in heard.items():
            judged.setdefault(name, []).append(judge_fusion(output, heard["input"], heard["target"]))
    return judged


def mean_judgement(judged: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over pairs of what `judge_outputs` found of one output."""
    return {name: math.fsum(row[name] for row in judged) / len(judged) for name in judged[0]}


def advantage(
    judged: Mapping[str, Sequence[Mapping[str, float]]], name: str, over: str, songs: Sequence[tuple[str, str]]
) -> Comparison:
    """By how much the figure of merit of one output is above another's, over the same pairs. `songs`: what input and
    target of each pair are from."""
    differences = [a["merit"] - b["merit"] for a, b in zip(judged[name], judged[over], strict=True)]
    return paired_comparison(differences, *zip(*songs, strict=True))
