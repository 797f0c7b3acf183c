"""Log-spectral distance of restored clips to the originals, beside baselines without a model. LSD = mean over frames of
√(mean over bins of (log₁₀ |X|² − log₁₀ |Y|²)²) (Gray and Markel 1976; in this form in Wang and Wang 2021, doi
10.1109/TASLP.2021.3054302, and in AudioSR), powers floored at the rounding noise of 16 bits. Energy-matched: after
scaling the estimate to the reference's mean magnitude in the lowest tenth of the bins, as AudioSR's authors advise."""

import itertools
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lib.audio.features import hann
from lib.superres.degradation import Degradation, Examples, Library
from lib.superres.mel import N_FFT, bin_of, log_mel
from lib.superres.resolver import DEFAULTS, SuperResolver, join_bands
from lib.util.stats import Comparison, in_words, mean_and_error

CUTOFFS = (2_000, 4_000, 8_000, 12_000, 16_000)  # Hz
LSD_HOP = 512
SEED = 2**31 - 1  # of the clips
FLOOR = 2**-30 / 12 * 0.375 * N_FFT  # power of a bin: rounding to 16 bits, through a Hann window
LOWEST_TENTH = (N_FFT // 2 + 1) // 10

METHODS = tomllib.loads(Path(__file__).with_name("methods.toml").read_text())
BOUNDS = ("autoencoder", "vocoder", "griffin-lim")


def lsd(estimate: Tensor, reference: Tensor, *, above: float = 0.0, matched: bool = False) -> Tensor:
    """Log-spectral distance of `[B, 1, N]` twice, in decades: `[B]`. `above`: lowest Hz. `matched`: in energy."""
    first, second = (_magnitudes(wav) for wav in (estimate, reference))
    if matched:
        levels = [x[:, :LOWEST_TENTH].mean(dim=(1, 2), keepdim=True) for x in (first, second)]
        first = first * levels[1] / levels[0].clamp_min(FLOOR**0.5)
    a, b = (x[:, bin_of(above) :].square().clamp_min(FLOOR).log10() for x in (first, second))
    return (a - b).square().mean(dim=1).sqrt().mean(dim=1)


def _magnitudes(wav: Tensor) -> Tensor:
    return torch.stft(wav[:, 0], N_FFT, LSD_HOP, window=hann(N_FFT, wav.device), return_complex=True).abs()


@dataclass(frozen=True)
class Score:
    """One method at one cutoff, over the same clips as the others: (mean, standard error clustered by song) each."""

    method: str
    cutoff: int  # Hz
    clips: int
    songs: int  # that the clips are from
    lsd: tuple[float, float]  # whole spectrum
    lsd_matched: tuple[float, float]
    upper: tuple[float, float]  # above the cutoff
    upper_matched: tuple[float, float]
    gain: tuple[float, float]  # the envelope's `upper` minus this one, clip by clip: positive if closer to the original

    @property
    def comparison(self) -> Comparison:
        return Comparison(*self.gain, self.songs)


def gains_in_words(scores: Sequence[Score]) -> str:
    """How the model compares with the mean envelope, at every cutoff."""
    verdicts = {1: "beats", -1: "loses to", 0: "no statistically significant difference from"}
    wordings = {verdict: words + " the mean envelope at {names} kHz" for verdict, words in verdicts.items()}
    return in_words({f"{s.cutoff / 1000:g}": s.comparison for s in scores if s.method == "model"}, wordings)


class Evaluation(NamedTuple):
    """`scores` by cutoff, then method; `sounds`: cutoff → method or 'original' → waveforms `[B, 1, N]`."""

    scores: tuple[Score, ...]
    sounds: dict[int, dict[str, Tensor]]


def evaluate(resolver: SuperResolver, library: Library, settings=DEFAULTS, *, clips=16, cutoffs=CUTOFFS) -> Evaluation:
    """Score every method on the same clips, not those that chose the checkpoint, resampled to twice each cutoff."""
    whole = Examples(library, "val", clips, resolver.clip_length, SEED)
    songs = [whole.song(i).sha256 for i in range(clips)]
    original = torch.stack([whole[i][0] for i in range(clips)])
    mel, none = log_mel(original), torch.zeros(clips, dtype=torch.bool, device=resolver.device)
    with torch.inference_mode():
        coded = resolver.vae.decode(resolver.vae.encode(mel.to(resolver.device))).to(mel.device)
    envelope = mean_envelope(library, resolver.clip_length)[:, None].expand_as(mel)
    # mels of the methods that do not see the low band
    known = {"envelope": envelope, "autoencoder": coded, "vocoder": mel}
    scores, sounds = [], {}
    for cutoff in cutoffs:
        examples = Examples(library, "val", clips, resolver.clip_length, SEED, Degradation(cutoff))
        low = torch.stack([examples[i][1] for i in range(clips)])
        without_context = resolver.predict_mel(low, settings, keeps_context=none)
        mels = {**known, "no context": without_context, "model": resolver.predict_mel(low, settings)}
        full = {name: resolver.vocode(mel, low, cutoff, settings) for name, mel in mels.items()}
        if resolver.vocoder is not None:
            full["griffin-lim"] = resolver.vocode(mel, low, cutoff, settings, neural=False)
        restored = {"sinc": low} | {name: join_bands(low, wav, cutoff) for name, wav in full.items()}
        scores += [score(method, cutoff, restored, original, songs) for method in METHODS if method in restored]
        sounds[cutoff] = {"original": original} | restored
    return Evaluation(tuple(scores), sounds)


def mean_envelope(library: Library, clip_length: int, clips: int = 64) -> Tensor:
    """The training set's mean log mel, `[256]`, over the frames of `clips` clips."""
    examples = Examples(library, "train", clips, clip_length)
    return torch.stack([log_mel(examples[i][0][None]).mean(dim=(0, 1, 3)) for i in range(clips)]).mean(dim=0)


def score(method: str, cutoff: int, restored: Mapping[str, Tensor], original: Tensor, songs: Sequence[str]) -> Score:
    """A method's waveforms `[B, 1, N]` against the originals; `songs`: the song of each clip."""
    ways = itertools.product((0, cutoff), (False, True))
    distances = [lsd(restored[method], original, above=above, matched=matched) for above, matched in ways]
    distances.append(lsd(restored["envelope"], original, above=cutoff) - distances[2])
    pairs = (mean_and_error(each.tolist(), songs) for each in distances)
    return Score(method, cutoff, len(original), len(set(songs)), *pairs)
