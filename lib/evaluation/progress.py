"""How the figure of merit grows with the time that training takes."""

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lib.codec.codec import Codec, decoded
from lib.evaluation.baselines import features_of
from lib.evaluation.fusion_metrics import SoundFeatures, sound_metrics
from lib.training.learner import evaluating
from lib.training.trainer import Callback, Trainer
from lib.util.errors import UserError
from lib.util.provenance import gpu_name

SPLIT = "merit"  # of its rows in metrics.jsonl
Rows = Sequence[Mapping[str, Any]]


class MeritOverTime(Callback):
    """Measures the model before the first step and at every validation, on a few pairs of latents `[D, T]`, and logs
    the mean figure of merit beside the seconds since the start, its own time left out. A resumed clock goes on from the
    last validation before the stop. `UserError` where a run follows another number of pairs."""

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]], codec: Codec):
        self.pairs, self.codec = pairs, codec

    def on_start(self, trainer: Trainer) -> None:
        device = trainer.learner.accelerator.device  # of a codec with weights, too
        self.latents = [[x[None].to(device) for x in pair] for pair in self.pairs]
        self.clips = self.features([x for pair in self.latents for x in pair])
        rows = trainer.run.metrics(SPLIT)
        if rows and rows[-1]["pairs"] != len(self.pairs):
            counts = f"follows {rows[-1]['pairs']} pairs, not {len(self.pairs)}"
            raise UserError(f"{trainer.run.path}: {counts}; follow as many, or start another run")
        self.begun = time.perf_counter() - (rows[-1]["seconds"] if rows else 0.0)
        if not rows:
            self.on_validation(trainer, {})

    def on_validation(self, trainer: Trainer, row: dict[str, Any]) -> None:
        paused = time.perf_counter()
        with torch.random.fork_rng(devices=[]), torch.inference_mode(), evaluating(trainer.learner.eval_model) as model:
            outputs = self.features([model(*pair).latents.float() for pair in self.latents])
        clips = zip(self.clips[::2], self.clips[1::2], strict=True)
        merit = statistics.fmean(sound_metrics(x, *pair)["merit"] for x, pair in zip(outputs, clips, strict=True))
        when = {"step": trainer.step, "epoch": trainer.order.epoch, "seconds": paused - self.begun}
        trainer.run.log({"split": SPLIT, "merit": merit, "pairs": len(self.pairs), "gpu": gpu_name()} | when)
        self.begun += time.perf_counter() - paused

    def features(self, latents: Sequence[Tensor]) -> list[SoundFeatures]:
        """Features of each of the latents `[1, D, T]` as sound."""
        with torch.inference_mode():
            return features_of([decoded(self.codec, x)[0].cpu() for x in latents])
