"""Upper bands without a network, from the training songs' log mels: their mean; spectral band replication, the recipe
of audio codecs (Dietz et al. 2002, AES 5553); and ridge regression of the upper bands on the lower ones."""

import functools
from typing import Literal

import torch
from torch import Tensor, nn

from lib.superres.degradation import Examples, Library
from lib.superres.mel import (
    HOP,
    KNOWN,
    MELS,
    N_FFT,
    bin_of,
    inverse_spectrum,
    known_bands,
    log_mel,
    magnitudes_of,
    spectrum,
)

SPAN = 2  # frames on either side from which a frame's upper bands are predicted
RIDGE = 10.0  # added to the variance of each predictor, squared nepers; 1 to 10 did best on training songs left out


class MelStatistics(nn.Module):
    """Mean `[256]` of the training songs' frames, and covariance `[W · 256, W · 256]` of W = 5 neighbouring frames."""

    def __init__(self, mean: Tensor | None = None, covariance: Tensor | None = None):
        super().__init__()
        self.register_buffer("mean", torch.zeros(MELS) if mean is None else mean)
        self.register_buffer("covariance", torch.eye((2 * SPAN + 1) * MELS) if covariance is None else covariance)

    @classmethod
    def of(cls, library: Library, clip_length: int, clips: int) -> "MelStatistics":
        examples = Examples(library, "train", clips, clip_length)
        frames = torch.cat([neighbours(log_mel(examples.clip(i)[None])) for i in range(clips)]).flatten(0, 1).double()
        return cls(frames.mean(dim=0).view(-1, MELS)[SPAN].float(), torch.cov(frames.mT).float())

    def predicted(self, mel: Tensor, cutoff: float, by: Literal["tilt", "bands"] = "bands") -> Tensor:
        """A log mel `[B, 1, 256, T]` with its bands above the cutoff (Hz) predicted, in least squares, from those below
        it: from their `tilt`, a straight line over the bands of a frame, or from all `bands` of W frames."""
        known = known_bands(cutoff)
        added = neighbours(mel - self.mean[:, None]) @ self.weights(known, by)
        return torch.cat([mel[:, :, :known], (self.mean[known:, None] + added.mT)[:, None]], dim=2)

    @functools.lru_cache(maxsize=64)  # noqa: B019 - few instances, and solving takes longer than a training step
    def weights(self, known: int, by: str) -> Tensor:
        """`[W · 256, 256 − known]`: of a frame with its neighbours, for each band from the `known` lowest ones."""
        covariance = self.covariance.double()
        whole = torch.eye(len(covariance), dtype=torch.double, device=covariance.device).unflatten(0, (-1, MELS))
        line = torch.linspace(-1, 1, known, dtype=torch.double, device=covariance.device)
        straight = torch.stack([torch.ones_like(line) / known, line / line.square().sum()])
        rows = straight @ whole[SPAN, :known] if by == "tilt" else whole[:, :known].flatten(0, 1)  # [P, W · 256]
        ridge = (by == "bands") * RIDGE * torch.eye(len(rows), dtype=torch.double, device=covariance.device)
        within, across = rows @ covariance @ rows.mT + ridge, rows @ covariance @ whole[SPAN, known:].mT
        return (rows.mT @ torch.linalg.solve(within, across)).float()

    def replicated(self, low: Tensor, cutoff: float) -> Tensor:
        """A waveform `[B, 1, N]` whose spectrum above the cutoff is that of the octave below it, copied as often as
        needed, with the envelope that is predicted from the tilt in place of its own."""
        last = bin_of(KNOWN * cutoff)
        bins = torch.arange(N_FFT // 2 + 1, device=low.device)
        octave = last - last // 2
        sources = torch.where(bins < last, bins, last - octave + (bins - last) % octave)
        mel = log_mel(low)
        own, wanted = magnitudes_of(mel), magnitudes_of(self.predicted(mel, cutoff, by="tilt"))
        frames = torch.arange(mel.shape[-1], device=low.device)
        turns = (bins - sources)[:, None] * frames * HOP / N_FFT % 1  # of the phase, by a shift in frequency
        shift = torch.polar(torch.ones_like(turns), 2 * torch.pi * turns)
        return inverse_spectrum(spectrum(low)[:, sources] * shift * (wanted / own[:, sources]))


def neighbours(mel: Tensor) -> Tensor:
    """Log mel `[B, 1, 256, T]` → each frame with those beside it, at the ends repeated: `[B, T, W · 256]`."""
    padded = torch.nn.functional.pad(mel[:, 0], (SPAN, SPAN), mode="replicate")
    return padded.unfold(2, 2 * SPAN + 1, 1).permute(0, 2, 3, 1).flatten(2)
