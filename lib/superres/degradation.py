"""How a clip is made to sound like a low-resolution one: a random low-pass filter, and a lower sample rate."""

from dataclasses import dataclass

import numpy as np
import torch
from scipy import signal
from torch import Tensor

from lib.superres.mel import SAMPLE_RATE
from lib.util.configs import check

KINDS = ("butter", "cheby1", "ellip", "bessel")
ORDERS = (2, 10)  # of one pass; it goes forth and back, which doubles it and leaves no delay
LOWEST, HIGHEST = 2_000, 16_000  # Hz
GRID = 250  # Hz between cutoffs: rates whose ratio to 48 kHz has small terms
RIPPLE, STOP = 0.05, 40.0  # dB, in the pass band and below it, where the kind of filter has them


@dataclass(frozen=True)
class Degradation:
    """One way to lose the upper band. Without a `kind` the clip is resampled only, with a sharp filter (sinc)."""

    cutoff: int  # Hz
    kind: str | None = None
    order: int = 8

    def __post_init__(self):
        fits = isinstance(self.cutoff, int) and GRID <= self.cutoff <= SAMPLE_RATE // 2 and self.cutoff % GRID == 0
        check(fits, "cutoff", self.cutoff, f"a multiple of {GRID} Hz up to {SAMPLE_RATE // 2}")
        check(self.kind in (None, *KINDS), "kind", self.kind, f"one of {', '.join(KINDS)}, or none")
        check(isinstance(self.order, int) and 1 <= self.order <= 20, "order", self.order, "a whole number, 1 to 20")

    @classmethod
    def draw(cls, generator: np.random.Generator) -> "Degradation":
        """Any kind, order and cutoff, each as likely as the others."""
        cutoff = GRID * int(generator.integers(LOWEST // GRID, HIGHEST // GRID + 1))
        return cls(cutoff, KINDS[generator.integers(len(KINDS))], int(generator.integers(ORDERS[0], ORDERS[1] + 1)))

    def __call__(self, wav: Tensor) -> Tensor:
        """A clip `[1, N]` at 48 kHz, without what lies above the cutoff, at 48 kHz still and as long."""
        samples = wav.numpy()
        if self.kind is not None and self.cutoff < SAMPLE_RATE // 2:
            limits = {"cheby1": {"rp": RIPPLE}, "ellip": {"rp": RIPPLE, "rs": STOP}, "bessel": {}, "butter": {}}
            sections = signal.iirfilter(
                self.order, self.cutoff, btype="low", ftype=self.kind, output="sos", fs=SAMPLE_RATE, **limits[self.kind]
            )
            samples = signal.sosfiltfilt(sections, samples, padlen=min(3 * 2 * self.order, samples.shape[-1] - 1))
        down = signal.resample_poly(samples, 2 * self.cutoff // GRID, SAMPLE_RATE // GRID, axis=-1)
        up = signal.resample_poly(down, SAMPLE_RATE // GRID, 2 * self.cutoff // GRID, axis=-1)
        return torch.from_numpy(np.ascontiguousarray(up[..., : wav.shape[-1]], dtype=np.float32))
