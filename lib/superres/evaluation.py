"""Log-spectral distance of restored clips to the originals, beside baselines without a model. LSD = mean over frames of
√(mean over bins of (log₁₀ |X|² − log₁₀ |Y|²)²) (Gray and Markel 1976; in this form in Wang and Wang 2021, doi
10.1109/TASLP.2021.3054302, and in AudioSR), powers floored at the rounding noise of 16 bits. Energy-matched: after
scaling the estimate to the reference's mean magnitude in the lowest tenth of the bins, as AudioSR's authors advise."""

import functools
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lib.audio.features import hann
from lib.audio.plots import STYLE, draw_image, mel_axes
from lib.lab.claims import Verdict, decide
from lib.superres.degradation import Degradation, Examples, Library
from lib.superres.mel import CENTRES, HOP, MELS, N_FFT, SAMPLE_RATE, SILENCE, bin_of, log_mel
from lib.superres.resolver import DEFAULTS, Restoration, SuperResolver, file_band, join_bands
from lib.util.stats import Comparison, in_words, mean_and_error

CUTOFFS = (2_000, 4_000, 8_000, 12_000, 16_000)  # Hz
LSD_HOP = 512
SEED = 2**31 - 1  # of the clips
FLOOR = 2**-30 / 12 * 0.375 * N_FFT  # power of a bin: rounding to 16 bits, through a Hann window
LOWEST_TENTH = (N_FFT // 2 + 1) // 10

METHODS = tomllib.loads(Path(__file__).with_name("methods.toml").read_text())
BASELINES = ("sinc", "envelope", "replication", "ridge")
DRAWS = 4  # of the sampler, of which the mean is taken
LEAST = 1_000  # Hz of a file's own band above a cutoff, to be judged there
LOUDEST = 2.5  # of a log mel, about
ALIKE = 1e-5  # relative spread over positions, below which all of them receive the same
VERBS = {1: "beats", -1: "loses to", 0: "no statistically significant difference from"}  # by verdict


def lsd(estimate: Tensor, reference: Tensor, *, above=0.0, below=SAMPLE_RATE / 2, matched=False) -> Tensor:
    """Log-spectral distance of `[B, 1, N]` twice, in decades: `[B]`. `above`, and `below`, one for all or each clip's
    `[B]`: in Hz. `matched`: in energy."""
    first, second = (_magnitudes(wav) for wav in (estimate, reference))
    if matched:
        levels = [x[:, :LOWEST_TENTH].mean(dim=(1, 2), keepdim=True) for x in (first, second)]
        first = first * levels[1] / levels[0].clamp_min(FLOOR**0.5)
    a, b = (x[:, bin_of(above) :].square().clamp_min(FLOOR).log10() for x in (first, second))
    bins = torch.arange(bin_of(above), N_FFT // 2 + 1, device=a.device)[:, None]
    counted = bins <= torch.as_tensor(below, device=a.device).view(-1, 1, 1) * N_FFT / SAMPLE_RATE
    squares = ((a - b).square() * counted).sum(dim=1) / counted.sum(dim=1)
    return squares.sqrt().mean(dim=1)


def _magnitudes(wav: Tensor) -> Tensor:
    return torch.stft(wav[:, 0], N_FFT, LSD_HOP, window=hann(N_FFT, wav.device), return_complex=True).abs()


@dataclass(frozen=True)
class Score:
    """One method at one cutoff, over the same clips as the others: (mean, standard error clustered by song) each."""

    method: str
    cutoff: int  # Hz
    clips: int
    songs: int  # that the clips are from
    upper: tuple[float, float]  # LSD above the cutoff
    upper_matched: tuple[float, float]
    gains: dict[str, tuple[float, float]]  # a baseline's `upper` minus this one, clip by clip: positive if closer

    def against(self, baseline: str) -> Comparison:
        return Comparison(*self.gains[baseline], self.songs)


def gains_in_words(scores: Sequence[Score], method: str = "model") -> str:
    """How a method compares with every baseline, at every cutoff."""
    own, said = [s for s in scores if s.method == method], []
    for baseline in own[0].gains:
        words = {verdict: f"{words} {baseline} at {{names}} kHz" for verdict, words in VERBS.items()}
        said.append(in_words({f"{s.cutoff / 1000:g}": s.against(baseline) for s in own}, words))
    return "; ".join(said)


def nearer_than_all(scores: Sequence[Score], method: str = "model") -> list[Score]:
    """The scores of a method that is significantly nearer than every baseline."""
    return [s for s in scores if s.method == method and all(s.against(name).verdict == 1 for name in s.gains)]


class Evaluation(NamedTuple):
    """`scores` by cutoff, then method; `sounds`: cutoff → method or 'original' → waveforms `[B, 1, N]`."""

    scores: tuple[Score, ...]
    sounds: dict[int, dict[str, Tensor]]


def evaluate(resolver: SuperResolver, library: Library, settings=DEFAULTS, *, clips=16, cutoffs=CUTOFFS) -> Evaluation:
    """Score every method on the same clips, not those that chose the checkpoint, resampled to twice each cutoff. Only
    up to where a clip's file has a band, and only clips that have at least `LEAST` above the cutoff."""
    examples = Examples(library, "val", clips, resolver.clip_length, SEED)
    original = torch.stack([examples.clip(i) for i in range(clips)])
    songs = [examples.song(i) for i in range(clips)]
    tops = torch.tensor([file_band(song) for song in songs])
    scores, sounds = [], {}
    for cutoff in cutoffs:
        reaching = (tops >= cutoff + LEAST).nonzero().flatten().tolist()
        if not reaching:
            continue
        low = torch.stack([Degradation(cutoff)(clip) for clip in original[reaching]])
        sounds[cutoff] = restorations(resolver, original[reaching], low, cutoff, settings)
        scores += score(cutoff, sounds[cutoff], tops[reaching], [songs[i].sha256 for i in reaching])
    return Evaluation(tuple(scores), sounds)


@torch.inference_mode()
def restorations(
    resolver: SuperResolver, original: Tensor, low: Tensor, cutoff: int, settings: Restoration
) -> dict[str, Tensor]:
    """The original, and what each method makes of its low band, `[B, 1, N]` each; draws if `settings` have steps."""
    statistics, made = resolver.completion.statistics, []
    for clips in torch.arange(len(low)).split(resolver.batch_size):
        own = low[clips].to(resolver.device)
        mel, numbers = log_mel(original[clips].to(resolver.device)), clips.tolist()
        predict = functools.partial(resolver.predict_mel, own, cutoff, numbers=numbers)
        vocode = functools.partial(resolver.vocode, low=own, cutoff=cutoff, settings=settings, numbers=numbers)
        mels = {
            "envelope": statistics.mean[:, None].expand_as(mel),
            "ridge": statistics.predicted(log_mel(own), cutoff),
            "model": predict(replace(settings, steps=0)),
            "autoencoder": resolver.vae.decode(resolver.vae.encode(mel)),
            "vocoder": mel,
        }
        if settings.steps:
            draws = [predict(replace(settings, seed=settings.seed + i)) for i in range(DRAWS)]
            mels |= {"draw": draws[0], "mean of draws": torch.stack(draws).mean(dim=0)}
        full = {name: vocode(mel) for name, mel in mels.items()}
        if resolver.vocoder is not None:
            full["griffin-lim"] = vocode(mel, neural=False)
        full["replication"] = statistics.replicated(own, cutoff)
        made.append({name: join_bands(low[clips], wav.cpu(), cutoff) for name, wav in full.items()})
    joined = {name: torch.cat([sounds[name] for sounds in made]) for name in made[0]}
    return {"original": original, "sinc": low} | joined


def score(cutoff: int, sounds: Mapping[str, Tensor], tops: Tensor, songs: Sequence[str]) -> list[Score]:
    """Every method's waveforms `[B, 1, N]` against the originals, from the cutoff up to each clip's `tops [B]`, Hz;
    `songs`: the song of each clip."""
    found, band = [], {"above": cutoff, "below": tops}

    def in_songs(values: Tensor) -> tuple[float, float]:
        return mean_and_error(values.tolist(), songs)

    methods = {name: sounds[name] for name in METHODS if name in sounds}
    apart = {name: lsd(wav, sounds["original"], **band) for name, wav in methods.items()}
    for method, wav in methods.items():
        gains = {name: in_songs(apart[name] - apart[method]) for name in BASELINES}
        ways = in_songs(apart[method]), in_songs(lsd(wav, sounds["original"], **band, matched=True))
        found.append(Score(method, cutoff, len(songs), len(set(songs)), *ways, gains))
    return found


@plt.rc_context(STYLE)
def mel_spectrograms(mels: Mapping[str, Tensor]) -> Figure:
    """Log mels `[256, T]` side by side on one scale, three in a row."""
    figure, axes = mel_axes(list(mels))
    for axis, mel in zip(axes, mels.values(), strict=True):
        seconds = mel.shape[1] * HOP / SAMPLE_RATE
        image = draw_image(axis, mel.cpu().numpy(), seconds, vmin=SILENCE, vmax=LOUDEST, cmap="magma")
        axis.set_yticks(np.interp(CUTOFFS, CENTRES, np.arange(MELS)) + 0.5, [f"{hertz:,}" for hertz in CUTOFFS])
    figure.colorbar(image, ax=axes, label="ln of the magnitude")
    return figure


def upper_rows(scores: Sequence[Score], which: str = "upper") -> list[dict[str, str]]:
    """LSD above the cutoff, `upper` or `upper_matched`: a row for each method, a column for each cutoff."""
    rows: dict[str, dict[str, str]] = {}
    for s in scores:
        rows.setdefault(s.method, {"method": s.method})[kilohertz(s)] = "{:.2f} ± {:.2f}".format(*getattr(s, which))
    return list(rows.values())


def kilohertz(score: Score) -> str:
    return f"{score.cutoff / 1000:g} kHz"


def audit_attention(pooled: Tensor, sequence: Tensor) -> list[Verdict]:
    """C18, from the attention outputs `[C, H, W]` for one pooled vector and for a sequence as context."""
    verdicts = []
    for part, received, why in (("pooled", pooled, ""), ("sequence", sequence, "the repair that is the default here")):
        differ = (spread := spread_over_places(received)) > ALIKE
        found = f"places differ by {spread:.0%} of what they receive" if differ else "every place receives the same"
        verdicts.append(decide(f"C18.{part}", holds=differ, found=found, why=why))
    return verdicts


def spread_over_places(received: Tensor) -> float:
    """RMS distance of `[C, H, W]` from its mean over places, relative to its RMS."""
    deviation = received - received.mean(dim=(1, 2), keepdim=True)
    return float(deviation.square().mean().sqrt() / received.square().mean().sqrt())
