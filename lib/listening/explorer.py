"""The RMS of a real cascade, redrawn by sliders: residual weight, clamp, similarity of the clips, spectral norm."""

import dataclasses
import functools
from typing import Any

import torch
from ipywidgets import Image, VBox
from matplotlib.figure import Figure
from torch import Tensor

from lib.lab.plots import waterfalls
from lib.lab.probes import untrained
from lib.lab.variants import EXPLODING, VARIANTS
from lib.listening.widgets import TABLES, controls, figure_png, observe
from lib.model.cascade import StageTrace, rms
from lib.model.rms_law import Clips, pair_rms

GRID = TABLES["grid"]  # what a headless run shows


class RmsExplorer:
    """The exploding three-stage cascade on a pair of latents `[1, D, T]`; the sliders change its last stage."""

    def __init__(self, input: Tensor, target: Tensor, num_layers: int):
        self.input, self.levels = input, (rms(input).item(), rms(target).item())
        self.goal = pair_rms(*self.levels)
        direction = input / input.norm()
        across = target - (target * direction).sum() * direction
        self.across = across / across.norm() * target.norm()  # orthogonal to the input, at the target's RMS
        self.along = direction * target.norm()
        variant = next(variant for variant in VARIANTS if variant.name == EXPLODING)
        variants = {on: dataclasses.replace(variant, every={"spectral_norm": on}) for on in (True, False)}
        replace, D = dataclasses.replace, input.shape[1]
        self.cascades = {on: untrained(replace(v.cascade(num_layers), latent_dim=D), 0) for on, v in variants.items()}
        self.before_last = functools.lru_cache(maxsize=8)(self._before_last)

    @torch.inference_mode()
    def traces(
        self, weight: float = 0.1, clamp: bool = True, similarity: float = 0.0, spectral_norm: bool = True
    ) -> list[dict[str, float]]:
        """RMS by stage, for `waterfall`. `similarity`: the clips' cosine; `clamp`: whether the last has one."""
        stages = self.cascades[spectral_norm].stages
        signals, traces = self.before_last(similarity, spectral_norm)
        changed = {"residual_weight": weight} | ({} if clamp else {"clamp": None})
        with stages[-1].override(**changed):
            traces = (*traces, stages[-1](signals)[1])
            rows = [{name: value.item() for name, value in vars(trace).items()} for trace in traces]
            for stage, row in zip(stages, rows, strict=True):
                row["weighted_residual"] = stage.config.residual_weight * row["residual_rms"]
        law = self.cascades[spectral_norm].config.with_stage(-1, **changed).predict_rms(Clips(*self.levels, similarity))
        for row, stage in zip(rows, law, strict=True):
            row |= {"law": stage.output_rms, "safe_weight": stage.smallest_safe_weight}
        return rows

    @torch.inference_mode()
    def _before_last(self, similarity: float, spectral_norm: bool) -> tuple[dict[str, Tensor], tuple[StageTrace, ...]]:
        """What the last stage reads, and the traces of the stages before it."""
        target = similarity * self.along + (1 - similarity**2) ** 0.5 * self.across
        cascade = self.cascades[spectral_norm]
        return cascade.run_stages(self.input, target, len(cascade.stages) - 1)

    def png(self, **settings: Any) -> bytes:
        """The waterfall of one setting as a PNG: what a slider redraws, in under 200 ms."""
        traces = self.traces(**settings)
        safe = f"smallest safe last residual weight by the law: {traces[-1]['safe_weight']:.2f}"
        return figure_png(waterfalls({safe: traces}, self.goal))

    def grid(self) -> Figure:
        """The settings of `GRID` side by side."""
        return waterfalls({title: self.traces(**settings) for title, settings in GRID.items()}, self.goal)

    def sliders(self) -> VBox:
        """The live explorer."""
        shown = controls("explorer")
        picture = Image(format="png", value=self.png(), layout={"width": "630px", "max_width": "100%"})

        def redraw(change: Any) -> None:
            picture.value = self.png(**{name: control.value for name, control in shown.items()})

        observe(shown.values(), redraw)
        return VBox([*shown.values(), picture])
