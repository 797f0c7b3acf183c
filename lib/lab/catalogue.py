"""Every operation of the source documents' model, objective and training that can leave the finite numbers: the state
in which it does, what it gives there and on the way there, and the form that stays finite. Each is measured in float32,
by autograd, at a state x(t) that is reached as t goes to 0."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.audio.features import FLOOR, correlation

Function = Callable[[Tensor], Tensor]
DISTANCES = tuple(10.0**-k for k in range(1, 8))
ASTRONOMIC, GROWING = 1e4, 30.0  # growth of the gradient on the way, from t = 0.1 to the last finite one


@dataclass(frozen=True)
class Entry:
    """`seeds`: the operation as the documents have it, x → a scalar; `bounded`: as it stays finite."""

    part: str  # of the system
    operation: str
    state: str  # x(0), in words
    path: Function  # t → x(t)
    seeds: Function
    bounded: Function

    def measure(self) -> dict[str, Any]:
        """Value and largest element of the gradient at t = 0, of both forms, and the signature."""
        (value, gradient), (held, bound) = (at(f, self.path(torch.tensor(0.0))) for f in (self.seeds, self.bounded))
        return {
            "part": self.part,
            "operation": self.operation,
            "state": self.state,
            "value": f"{value:.3g}",
            "gradient": f"{gradient:.3g}",
            "signature": self.signature(),
            "bounded: value": f"{held:.3g}",
            "gradient there": f"{bound:.3g}",
        }

    def signature(self) -> str:
        """What a training sees of it: whether gradients grow on the way to the state."""
        found = [
            gradient for t in DISTANCES if math.isfinite(gradient := at(self.seeds, self.path(torch.tensor(t)))[1])
        ]
        ends = all(map(math.isfinite, at(self.seeds, self.path(torch.tensor(0.0)))))
        growth = found[-1] / max(found[0], 1e-30) if found else 1.0
        way = "astronomic" if growth > ASTRONOMIC else "growing" if growth > GROWING else "sudden"
        return f"{way}, finite at the end" if ends else way


def at(function: Function, x: Tensor) -> tuple[float, float]:
    """A function's value, and the largest element of its gradient; NaN wins."""
    x = x.detach().requires_grad_()
    value = function(x)
    (gradient,) = torch.autograd.grad(value, x, allow_unused=True)
    return value.item(), (torch.zeros(1) if gradient is None else gradient.abs()).max().item()


def _pearson(x: Tensor, y: Tensor) -> Tensor:
    """By roots for the deviations, as the documents have it."""
    return correlation(x, y, guarded=False)


def _scaled(x: Tensor, epsilon: float, clamp: tuple[float, float] | None = None) -> Tensor:
    """x at an RMS of 5.7; the part of it along a fixed direction."""
    scale = 5.7 / ((x.square().mean() + epsilon).sqrt() + epsilon)
    return ((scale if clamp is None else scale.clamp(*clamp)) * x) @ ELSEWHERE


def _clipped(x: Tensor) -> Tensor:
    """The second of two gradients after clipping at 10, of which the first is x."""
    both = torch.stack([x.sum(), torch.ones(())])
    return (both * (10 / (both.norm() + 1e-6)).clamp(max=1))[1]


SOURCE = torch.tensor([0.9, 0.3, 0.7, 0.1, 0.5, 0.4, 0.8, 0.2])  # an envelope, or a clip
ELSEWHERE = torch.tensor([0.2, -0.6, 0.4, 0.9, -0.3, 0.1, -0.7, 0.5])  # no multiple of it
HALF = torch.float16

ENTRIES = (
    Entry(
        "objective",
        "−ln(1 − |corr|)",
        "the output's envelope is a source's",
        lambda t: SOURCE + t * ELSEWHERE,
        lambda x: -torch.log(1 - _pearson(x, SOURCE).clamp(-1, 1).abs()),
        lambda x: _pearson(x, SOURCE).square(),
    ),
    Entry(
        "objective",
        "corr², deviations by roots",
        "the output's envelope is constant",
        lambda t: 0.5 + t * ELSEWHERE,
        lambda x: _pearson(x, SOURCE).square(),
        lambda x: correlation(x, SOURCE).square(),
    ),
    Entry(
        "objective",
        "corr², deviations by roots",
        "the source is silent (x: the output)",
        lambda t: SOURCE + t * ELSEWHERE,
        lambda x: _pearson(x, torch.zeros(8)).square(),
        lambda x: correlation(x, torch.zeros(8)).square(),
    ),
    Entry(
        "objective",
        "envelope: root of the mean square",
        "a silent segment",
        lambda t: t * ELSEWHERE,
        lambda x: x.square().mean().sqrt(),
        lambda x: (x.square().mean() + 1e-10).sqrt(),
    ),
    Entry(
        "objective",
        "root of the mean squared error",
        "the output is the source",
        lambda t: SOURCE + t * ELSEWHERE,
        lambda x: (x - SOURCE).square().mean().sqrt(),
        lambda x: ((x - SOURCE).square().mean() + 1e-8).sqrt(),
    ),
    Entry(
        "objective",
        "cosine: x·y / (‖x‖ ‖y‖)",
        "the output is silent",
        lambda t: t * ELSEWHERE,
        lambda x: (x @ SOURCE) / (x.norm() * SOURCE.norm()),
        lambda x: F.cosine_similarity(x, SOURCE, dim=0),
    ),
    Entry(
        "objective",
        "log of a magnitude",
        "the output is silent",
        lambda t: t * ELSEWHERE.abs(),
        lambda x: x.log().sum(),
        lambda x: (x.square() + FLOOR).sqrt().log().sum(),
    ),
    Entry(
        "objective",
        "deviation of a mask over time",
        "a constant mask",
        lambda t: 0.5 + t * ELSEWHERE,
        lambda x: (x - x.mean()).square().mean().sqrt(),
        lambda x: (x.var(correction=0) + 1e-8).sqrt(),
    ),
    Entry(
        "model",
        "RMS scaling: target / RMS",
        "a silent output",
        lambda t: t * ELSEWHERE,
        lambda x: _scaled(x, 0.0),
        lambda x: _scaled(x, 1e-8, (0.7, 1.5)),
    ),
    Entry(
        "model",
        "learnable scale: exp(s)",
        "s above 88.7",
        lambda t: 89 - 200 * t,
        lambda x: x.exp(),
        lambda x: x.clamp(math.log(0.7), math.log(1.5)).exp(),  # clamped after it, the gradient would be 0 · inf
    ),
    Entry(
        "model",
        "learnable weights: |a| / (|a| + |b| + 1e-8)",
        "both are 0 (x: a, b = 0)",
        lambda t: t,
        lambda x: x.abs() / (x.abs() + 1e-8),
        lambda x: x.sigmoid(),
    ),
    Entry(
        "model",
        "spectral norm: W / σ",
        "W is 0",
        lambda t: t * ELSEWHERE.view(2, 4),
        lambda x: (x / torch.linalg.matrix_norm(x, 2)).sum(),
        lambda x: (x / torch.linalg.matrix_norm(x, 2).clamp_min(1e-12)).sum(),
    ),
    Entry(
        "half precision",
        "1e-8 under a root, float16",
        "a silent output",
        lambda t: t * ELSEWHERE,
        lambda x: (x.to(HALF).square().mean() + 1e-8).sqrt().float(),
        lambda x: (x.square().mean() + 1e-8).sqrt(),
    ),
    Entry(
        "half precision",
        "sum of squares, float16",
        "latents of RMS 5.7, 2,048 of them",
        lambda t: 5.7 * (1 - t) * torch.ones(2048),
        lambda x: x.to(HALF).square().sum().float(),
        lambda x: x.square().sum(),
    ),
    Entry(
        "training",
        "clipping by the norm",
        "one gradient is infinite (x: that one)",
        lambda t: 1 / t,
        _clipped,
        lambda x: torch.where(x.isfinite(), 1.0, 0.0) * torch.ones(()) + 0 * x.nan_to_num(),
    ),
)
