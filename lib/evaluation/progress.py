"""How the figure of merit grows with the time that training takes."""

import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lib.audio.plots import OUTPUT, STAGES, STYLE
from lib.codec.codec import Codec
from lib.evaluation.fusion_metrics import SoundFeatures, sound_features, sound_metrics
from lib.model.fusion import FusionModel
from lib.training.learner import evaluating
from lib.training.trainer import Callback, Trainer

SPLIT = "merit"  # of its rows in metrics.jsonl
Rows = Sequence[Mapping[str, Any]]


class MeritOverTime(Callback):
    """Measures the model before the first step and at every validation, on a few pairs of latents `[D, T]`, and logs
    the mean figure of merit beside the seconds of training, before a resume too, its own time left out."""

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]], codec: Codec):
        self.pairs, self.codec = pairs, codec

    def on_start(self, trainer: Trainer) -> None:
        self.clips = [[sound_features(self.codec.decode(x[None])[0]) for x in pair] for pair in self.pairs]
        rows = trainer.run.metrics(SPLIT)
        self.begun = time.perf_counter() - (rows[-1]["seconds"] if rows else 0.0)
        if not rows:
            self.on_validation(trainer, {})

    def on_validation(self, trainer: Trainer, row: dict[str, Any]) -> None:
        paused = time.perf_counter()
        with torch.random.fork_rng(devices=[]), evaluating(trainer.learner.eval_model) as model:
            merit = statistics.fmean(map(self.measure, itertools.repeat(model), self.pairs, self.clips))
        trainer.run.log({"split": SPLIT, "step": trainer.step, "seconds": paused - self.begun, "merit": merit})
        self.begun += time.perf_counter() - paused

    @torch.inference_mode()
    def measure(self, model: FusionModel, pair: Sequence[Tensor], clips: Sequence[SoundFeatures]) -> float:
        device = next(model.parameters()).device
        fused = model(*(x[None].to(device) for x in pair)).latents.float()
        return sound_metrics(sound_features(self.codec.decode(fused)[0].cpu()), *clips)["merit"]


def merit_over_time(runs: Mapping[str, Rows], marks: Mapping[str, float]) -> Figure:
    """The figure of merit over seconds of training, a curve for each run; `marks`: what needs no training, dotted."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7, 3.2))
        for (name, rows), colour in zip(runs.items(), (OUTPUT, *STAGES), strict=False):
            seconds, merits = ([row[key] for row in rows] for key in ("seconds", "merit"))
            axes.plot(seconds, merits, marker="o", color=colour, label=name)
        for i, (name, merit) in enumerate(marks.items()):
            axes.axhline(merit, color="black", linestyle=":", linewidth=1 + 0.5 * i, label=name)
        axes.set(xlabel="seconds of training", ylabel="figure of merit", ylim=(0, 1))
        axes.legend(fontsize=8, loc="lower right")
    return figure
