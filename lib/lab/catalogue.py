"""Every operation of the source documents' model, objective and training that can leave the finite numbers: the state
in which it does, what it gives there and on the way there, and the form that stays finite (catalogue.toml). Each is
measured in float32, by autograd, at a state x(t) that is reached as t goes to 0."""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.audio.features import correlation
from lib.util.configs import read_entries

DISTANCES = tuple(10.0**-k for k in range(1, 8))
ASTRONOMIC, GROWING = 1e4, 30.0  # growth of the gradient on the way, from t = 0.1 to the largest finite one


def scaled(x: Tensor, epsilon: float, clamp: tuple[float, float] = (0.0, math.inf)) -> Tensor:
    """x at an RMS of 5.7, with its scale clamped; the part of it along a fixed direction."""
    return ((5.7 / ((x.square().mean() + epsilon).sqrt() + epsilon)).clamp(*clamp) * x) @ NAMES["d"]


NAMES = vars(torch) | {
    "source": torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0]),  # whose sums are exact
    "d": torch.tensor([0.2, -0.6, 0.4, 0.9, -0.3, 0.1, -0.7, 0.5]),
    "correlation": correlation,
    "pearson": partial(correlation, guarded=False),
    "cosine_similarity": F.cosine_similarity,
    "matrix_norm": torch.linalg.matrix_norm,
    "scaled": scaled,
}


@dataclass(frozen=True)
class Entry:
    """One of them; its expressions are those of the file."""

    name: str
    part: str
    state: str
    x: str
    plain: str
    guarded: str

    def at(self, form: str, t: float) -> tuple[float, float]:
        """Value, and largest element of the gradient, of one of both forms at x(t); NaN wins."""
        x = torch.as_tensor(eval(self.x, NAMES | {"t": torch.tensor(t)})).detach().requires_grad_()
        value = eval(form, NAMES | {"x": x})
        (gradient,) = torch.autograd.grad(value, x)
        return value.item(), gradient.abs().max().item()

    def measure(self) -> dict[str, str]:
        """A row of the table: both forms in the state, and the signature."""
        row: dict[str, Any] = {"operation": self.name, "state": self.state}
        for name, form in (("plain", self.plain), ("guarded", self.guarded)):
            value, gradient = self.at(form, 0.0)
            row |= {name: form, f"{name}: value, gradient": f"{value:.3g}, {gradient:.3g}"}
        return {"part": self.part} | row | {"signature": self.signature()}

    def signature(self) -> str:
        """What a training sees of it: whether gradients grow on the way to the state."""
        found = [gradient for t in DISTANCES if math.isfinite(gradient := self.at(self.plain, t)[1])]
        growth = max(found) / max(found[0], 1e-4) if found else 1.0
        way = "astronomic" if growth > ASTRONOMIC else "growing" if growth > GROWING else "sudden"
        return way + ", finite at the end" * all(map(math.isfinite, self.at(self.plain, 0.0)))


ENTRIES: tuple[Entry, ...] = tuple(read_entries(Path(__file__).with_suffix(".toml"), Entry).values())
