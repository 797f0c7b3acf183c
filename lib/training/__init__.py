"""Training: one loop for any model, and what the fusion model adds to it.

config          every setting; those of the objective are in `losses`, where a loss is added
learner         one training step of any model
fusion_learner  the fusion model's loss and reports, and `train`
adversary       the discriminator's side of a step
batches         which pairs a step takes, prefetched
trainer         the loop: metrics, validation, checkpoints, resuming, callbacks
run             the run directory
distributed     several processes;  nonfinite  where a NaN appeared first
callbacks       demo clips and TensorBoard;  plots  figures of a training
"""

from importlib import import_module
from typing import Any

_MODULES = {
    "Callback": "trainer",
    "LossConfig": "losses",
    "Run": "run",
    "TrainConfig": "config",
    "Trainer": "trainer",
    "train": "fusion_learner",
}
__all__ = ["Callback", "LossConfig", "Run", "TrainConfig", "Trainer", "train"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is used: super-resolution needs no module that knows of fusing."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
