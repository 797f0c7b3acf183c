"""How long a slider of the RMS explorer takes to move its picture."""

import itertools
from typing import Any

import torch
from measure import alternate

from lib.listening.explorer import RmsExplorer


def redraws() -> list[dict[str, Any]]:
    explorer = RmsExplorer(*torch.randn(2, 1, 128, 75) * 5.7, num_layers=6)
    places = itertools.count()
    weight, similarity = alternate(
        lambda: explorer.png(weight=next(places) / 100), lambda: explorer.png(similarity=next(places) / 100)
    )
    return [{"slider": "residual weight", "ms": 1000 * weight}, {"slider": "similarity", "ms": 1000 * similarity}]
