"""Baselines that need no training, and the comparison of a model with them on the same pairs.

Legend: B batch, N samples, D latent channels, T frames.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import librosa
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lib.audio.files import SAMPLE_RATE
from lib.codec.codec import Codec
from lib.data.latents import LatentPairs
from lib.evaluation.metrics import sound_features, sound_metrics
from lib.model.cascade import Cascade, rms
from lib.model.fusion import FusionModel
from lib.model.masks import FIXED_MASKINGS, fixed_masks
from lib.model.rms_law import pair_rms
from lib.training.losses import LossConfig, total_loss
from lib.util.stats import Comparison, paired_comparison

CROSSOVER = 900.0  # Hz
Models = Mapping[str, FusionModel]
Measured = Mapping[str, Sequence[Mapping[str, float]]]  # output → one row of metrics per pair


@torch.no_grad()
def baseline_losses(pairs: LatentPairs, loss: LossConfig, untrained: Cascade) -> dict[str, float]:
    """The training objective of outputs without training, as means over `pairs`. The plain average minimises a loss
    with two equal weights; 'at full level' scales it to the RMS that the cascade aims at."""
    sums: dict[str, float] = {}
    untrained.eval()
    for input, target in DataLoader(pairs, batch_size=8):  # each [B, D, T]
        mean = (input + target) / 2
        scale = pair_rms(rms(input), rms(target)) / rms(mean)
        outputs = {
            "input alone": input,
            "target alone": target,
            "plain average": mean,
            "plain average at full level": mean * scale[:, None, None],
            "untrained cascade": untrained(input, target)[0],
        }
        for name, output in outputs.items():
            sums[name] = sums.get(name, 0.0) + total_loss(output, input, target, loss)[0].item() * len(input)
    return {name: value / len(pairs) for name, value in sums.items()}


def recipes(input: Tensor, target: Tensor) -> dict[str, Tensor]:
    """What a musician would do by hand with two waveforms `[1, N]` at 24 kHz, without any training: a crossover, the
    target's lows under the input's highs; HPSS, the input's percussive with the target's harmonic part (librosa's
    median filters); and both, with the input's percussive part at all frequencies."""
    own_tones, hits = map(torch.from_numpy, librosa.effects.hpss(input.numpy()))
    tones = torch.from_numpy(librosa.effects.harmonic(target.numpy()))
    return {
        "crossover": below(target) + input - below(input),
        "HPSS": hits + tones,
        "HPSS with crossover": below(tones) + hits + own_tones - below(own_tones),
    }


def below(wav: Tensor) -> Tensor:
    """The part of a waveform `[1, N]` at 24 kHz below `CROSSOVER`."""
    spectrum = torch.fft.rfft(wav)
    high = torch.fft.rfftfreq(wav.shape[-1], 1 / SAMPLE_RATE) >= CROSSOVER
    return torch.fft.irfft(spectrum.masked_fill(high, 0), wav.shape[-1])


@torch.inference_mode()
def fusions(
    input: Tensor, target: Tensor, codec: Codec, models: Models, by_hand: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """Every fusion of two latents `[D, T]` by name, as sound `[1, N]` from the codec: each clip alone, the averages of
    waveforms and of latents, the recipes if `by_hand`, both clips combined by each fixed masking, and every model's."""
    input, target = input[None], target[None]
    sounds = {"input": codec.decode(input), "target": codec.decode(target)}
    sounds["average of waveforms"] = (sounds["input"] + sounds["target"]) / 2
    yield from ((name, wav[0]) for name, wav in sounds.items())
    if by_hand:
        yield from recipes(sounds["input"][0], sounds["target"][0]).items()
    latents = {"average of latents": (input + target) / 2}
    for kind in FIXED_MASKINGS:
        masks = fixed_masks(kind, input, target)
        latents[f"{kind} masks"] = masks.input * input + masks.target * target
    for name, model in models.items():
        device = next(model.parameters()).device
        latents[name] = model.eval()(input.to(device), target.to(device)).latents.cpu()
    yield from ((name, codec.decode(x)[0]) for name, x in latents.items())


def measure_fusions(
    pairs: Iterable[tuple[Tensor, Tensor]], codec: Codec, models: Models, by_hand: bool = True
) -> Measured:
    """`sound_metrics` of every output of `fusions`."""
    rows: dict[str, list[dict[str, float]]] = {}
    for input, target in pairs:
        features = {name: sound_features(wav) for name, wav in fusions(input, target, codec, models, by_hand)}
        for name, output in features.items():
            rows.setdefault(name, []).append(sound_metrics(output, features["input"], features["target"]))
    return rows


def mean_metrics(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over pairs of one output's rows of `measure_fusions`."""
    return {name: math.fsum(row[name] for row in rows) / len(rows) for name in rows[0]}


def advantage(rows: Measured, name: str, over: str, songs: Sequence[tuple[str, str]]) -> Comparison:
    """How far one output's figure of merit is above another's on the same pairs; `songs`: both songs of each pair."""
    differences = [a["merit"] - b["merit"] for a, b in zip(rows[name], rows[over], strict=True)]
    return paired_comparison(differences, *zip(*songs, strict=True))
