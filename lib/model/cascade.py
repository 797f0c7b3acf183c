"""The cascade: stages of transformers that fuse two latents into one, each ending in a spectral-norm projection,
a residual and RMS scaling (seed 000 describes the two-stage reference).

Legend: B batch, D latent channels (128), T frames (75 a second), d width of a stage, S stages.
"""

import dataclasses
import math
import sys
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.model.dropout import Dropout
from lib.model.projection import SpectralLinear
from lib.model.rms_law import (
    INPUT,
    LATENT_RMS,
    TARGET,
    Clips,
    StagePrediction,
    mean_of,
    predict_stage,
    preserving_weight,
)
from lib.util.configs import check, from_fields
from lib.util.errors import UserError
from lib.util.tensors import cached_table

LATENT_DIM = 128
SOURCES = ("input", "noisy_input", "target", "noisy_target", "previous")
RESIDUAL_SOURCES = ("mean", "previous")
RMS_SCALINGS = ("fixed", "learnable", "off")
MIXINGS = ("add", "preserving")


class CollapseWarning(UserWarning):
    """A stage whose RMS collapses by design: the law says that it must be amplified beyond its clamp."""


@dataclass(frozen=True)
class StageConfig:
    """One stage. Every mechanism that the ablation varies is a field here."""

    sources: tuple[str, ...] = ("noisy_input", "target")  # concatenated in this order; 'previous' is the stage before
    width: int | None = None  # None: D · number of sources; another width gets an input projection
    num_layers: int = 6
    num_heads: int = 8
    ffn_mult: int = 4
    dropout: float = 0.1
    attention_dropout: float = 0.0  # above 0 attention leaves the fused path and is several times slower
    residual_weight: float = 1.0  # 0.1 on a third stage is what collapses the RMS
    residual_source: str = "mean"  # mean of the clean sources, or the previous stage's output
    mixing: str = "add"  # projection + w · residual, or RMS-'preserving': √(1 − w²) · projection + w · residual
    projection_gain: float = 1.0  # multiplies the projection, whose σ is then no longer 1 but this
    spectral_norm: bool = True
    rms_scaling: str = "fixed"  # 'learnable' is the model of seed 003
    clamp: tuple[float, float] | None = (0.7, 1.5)  # range of the RMS factor; None: unlimited

    def __post_init__(self):
        # JSON has lists only; a config read back must equal the one that was written
        object.__setattr__(self, "sources", tuple(self.sources))
        if self.clamp is not None:
            object.__setattr__(self, "clamp", tuple(self.clamp))
        check(self.sources and all(s in SOURCES for s in self.sources), "sources", self.sources, f"some of {SOURCES}")
        check(self.residual_source in RESIDUAL_SOURCES, "residual_source", self.residual_source, RESIDUAL_SOURCES)
        check(self.mixing in MIXINGS, "mixing", self.mixing, MIXINGS)
        check(self.rms_scaling in RMS_SCALINGS, "rms_scaling", self.rms_scaling, RMS_SCALINGS)
        check(self.num_layers >= 1, "num_layers", self.num_layers, "1 or more")
        check(self.ffn_mult >= 1, "ffn_mult", self.ffn_mult, "1 or more")
        check(self.width is None or self.width >= 2, "width", self.width, "None or 2 or more")
        check(math.isfinite(self.residual_weight), "residual_weight", self.residual_weight, "a finite number")
        fits = self.mixing != "preserving" or 0 <= self.residual_weight <= 1
        check(fits, "residual_weight", self.residual_weight, "0 to 1 where mixing is 'preserving'")
        gain_is_positive = math.isfinite(self.projection_gain) and self.projection_gain > 0
        check(gain_is_positive, "projection_gain", self.projection_gain, "a finite number above 0")
        for name in ("dropout", "attention_dropout"):
            check(0 <= getattr(self, name) < 1, name, getattr(self, name), "a share from 0 to below 1")
        clamp_is_range = self.clamp is None or (len(self.clamp) == 2 and 0 < self.clamp[0] <= self.clamp[1])
        check(clamp_is_range, "clamp", self.clamp, "None or (low, high) with 0 < low ≤ high")

    @property
    def residual_names(self) -> tuple[str, ...]:
        """The signals whose mean is the residual: the clean sources of this stage, or the previous stage's output."""
        if self.residual_source == "previous":
            return ("previous",)
        return tuple(name.removeprefix("noisy_") for name in self.sources)


@dataclass(frozen=True)
class CascadeConfig:
    """A cascade: its stages, from the first to the last, and what they share.

    Warns with `CollapseWarning` where the law of `rms_law` predicts that a stage wants more amplification than its
    clamp allows (1.5 without a clamp), for two unlike clips of RMS `latent_rms`.
    """

    stages: tuple[StageConfig, ...]
    latent_dim: int = LATENT_DIM
    anti_cheating: float = 0.0  # noise level, in standard deviations of the clip, added in training only
    latent_rms: float = LATENT_RMS  # of the codec's latents; only the design rule reads it

    def __post_init__(self):
        object.__setattr__(self, "stages", tuple(self.stages))
        check(len(self.stages) >= 1, "stages", self.stages, "at least one stage")
        check(self.latent_dim >= 1, "latent_dim", self.latent_dim, "1 or more")
        check(self.anti_cheating >= 0, "anti_cheating", self.anti_cheating, "0 or more")
        first = self.stages[0]
        check("previous" not in first.sources, "stages[0].sources", first.sources, "no 'previous' in the first stage")
        check(first.residual_source != "previous", "stages[0].residual_source", "previous", "'mean' in stage 0")
        for i, stage in enumerate(self.stages):
            width = self.width(i)
            rule = f"a multiple of num_heads ({stage.num_heads}), and even"
            fits = stage.num_heads >= 1 and width % stage.num_heads == 0 and width % 2 == 0
            check(fits, f"stages[{i}].width", width, rule)
        check(0 < self.latent_rms < math.inf, "latent_rms", self.latent_rms, "a finite number above 0")
        self._warn_of_collapse()

    def _warn_of_collapse(self) -> None:
        for i, (stage, found) in enumerate(zip(self.stages, self.predict_rms(), strict=True)):
            if found.target_scale > found.safe_factor * (1 + 1e-9):
                weight = found.smallest_safe_weight
                if weight > stage.residual_weight:
                    safe = "no weight is safe"
                    if math.isfinite(weight):  # rounded up, or the weight that the message names would warn again
                        safe = f"the smallest safe weight is {math.ceil(100 * weight) / 100:.2f}"
                else:
                    safe = "a smaller weight is safe"
                warnings.warn(
                    f"stage {i}: residual_weight={stage.residual_weight:g} lets the RMS collapse: predicted "
                    f"{found.rms_before_scaling:.2f} before scaling, of {self.latent_rms:.2f} wanted, needs the factor "
                    f"{found.target_scale:.1f}; {safe} at width {self.width(i)}",
                    CollapseWarning,
                    stacklevel=_frames_to_caller(),
                )

    def predict_rms(self, clips: Clips | None = None) -> tuple[StagePrediction, ...]:
        """The RMS of every stage of an untrained cascade by the law of `rms_law`; `clips`: unlike ones by default."""
        clips = clips or Clips(self.latent_rms, self.latent_rms)
        signals, predictions = {"input": INPUT, "target": TARGET}, []
        for i, stage in enumerate(self.stages):
            prediction, signals["previous"] = predict_stage(
                mean_of([signals[name] for name in stage.residual_names]),
                clips,
                d=self.width(i),
                D=self.latent_dim,
                weight=stage.residual_weight,
                gain=stage.projection_gain,
                spectral_norm=stage.spectral_norm,
                preserving=stage.mixing == "preserving",
                clamp=stage.clamp,
                scaling=stage.rms_scaling,
            )
            predictions.append(prediction)
        return tuple(predictions)

    @classmethod
    def reference(cls, num_stages: int = 2, *, anti_cheating: float = 0.0, **changes: Any) -> "CascadeConfig":
        """The reference of seed 000: stage 0 fuses (input, target), each later one (input, previous, target).

        `changes` are `StageConfig` fields and apply to every stage: `CascadeConfig.reference(3, num_layers=2)`.
        """
        check(num_stages >= 1, "num_stages", num_stages, "1 or more")
        later = ("noisy_input", "previous", "noisy_target")
        stages = [StageConfig(**changes)] + [StageConfig(sources=later, **changes) for _ in range(num_stages - 1)]
        return cls(tuple(stages), anti_cheating=anti_cheating)

    def with_stage(self, index: int, **changes: Any) -> "CascadeConfig":
        """A copy with some fields of one stage changed: `config.with_stage(-1, residual_weight=0.1)`."""
        stages = list(self.stages)
        stages[index] = dataclasses.replace(stages[index], **changes)
        return dataclasses.replace(self, stages=tuple(stages))

    def width(self, index: int) -> int:
        """Width d of a stage's transformer."""
        stage = self.stages[index]
        return stage.width or self.latent_dim * len(stage.sources)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "CascadeConfig":
        """The config that `to_dict` wrote. Unknown, missing or malformed fields raise `UserError`."""
        try:
            if "stages" in values:
                values = values | {"stages": tuple(from_fields(StageConfig, stage) for stage in values["stages"])}
            return from_fields(cls, values)
        except (TypeError, AttributeError) as error:  # a number where there was text, and the like
            raise UserError(f"cascade config: damaged ({error}); restore the config that was written") from None


def _frames_to_caller() -> int:
    """How far up the code is that asked for a config: `with_stage` and `dataclasses.replace` lie between."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__") in (__name__, "dataclasses", "lib.util.configs"):
        level, frame = level + 1, frame.f_back
    return level


@dataclass(frozen=True)
class StageTrace:
    """What one stage did to the RMS, per sample: tensors `[B]`, detached, on the model's device."""

    projection_rms: Tensor  # of the projection alone, its gain included
    residual_rms: Tensor  # of the residual, before its weight
    alignment: Tensor  # cosine between projection and residual, -1 to 1
    rms_before_scaling: Tensor  # after the residual, before scaling
    output_rms: Tensor  # after scaling
    target_scale: Tensor  # what would bring the RMS to the wanted one
    applied_scale: Tensor  # after the clamp; 1 where scaling is off
    clamped: Tensor  # 1.0 where the clamp changed the factor, else 0.0


def rms(x: Tensor) -> Tensor:
    """Root mean square per sample, `[B, D, T] → [B]`, float32 or wider, with 1e-8 under the root."""
    return (x.to(torch.promote_types(x.dtype, torch.float32)).square().mean(dim=(1, 2)) + 1e-8).sqrt()


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """Cosine between two signals as vectors, per sample, `[B, D, T]` twice → `[B]`; 0 where one is silent."""
    return F.cosine_similarity(x.flatten(1).float(), y.flatten(1).float(), dim=1)


@cached_table
def sinusoidal_positions(T: int, d: int, device: torch.device) -> Tensor:
    """Sinusoidal positions `[T, d]`, even channels sine, odd cosine (Vaswani et al. 2017, arXiv 1706.03762)."""
    frames = torch.arange(T, dtype=torch.float32, device=device).unsqueeze(1)  # [T, 1]
    rates = torch.exp(torch.arange(0, d, 2, dtype=torch.float32, device=device) * (-math.log(10_000.0) / d))  # [d/2]
    return torch.stack([(frames * rates).sin(), (frames * rates).cos()], dim=2).flatten(1)  # [T, d/2, 2] → [T, d]


class TransformerLayer(nn.Module):
    """One post-norm encoder layer, `[B, T, d] → [B, T, d]`: the arithmetic of `nn.TransformerEncoderLayer` with exact
    GELU, but with attention dropout as a switch of its own, so that by default attention runs on the fused path."""

    def __init__(self, d: int, config: StageConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.attention_dropout = config.attention_dropout
        self.qkv = nn.Linear(d, 3 * d)
        self.attention_out = nn.Linear(d, d)
        self.ffn_in = nn.Linear(d, config.ffn_mult * d)
        self.ffn_out = nn.Linear(config.ffn_mult * d, d)
        self.norm1 = nn.LayerNorm(d)
        self.norm2 = nn.LayerNorm(d)
        self.dropout = Dropout(config.dropout)
        # as nn.MultiheadAttention starts: the RMS at initialisation is part of what this project measures
        nn.init.xavier_uniform_(self.qkv.weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.attention_out.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.dropout(self.attend(x)))
        return self.norm2(x + self.dropout(self.ffn_out(self.dropout(F.gelu(self.ffn_in(x))))))

    def attend(self, x: Tensor) -> Tensor:
        B, T, d = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.num_heads, d // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, T, d / heads]
        dropout = self.attention_dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return self.attention_out(attended.transpose(1, 2).reshape(B, T, d))


class RmsScaling(nn.Module):
    """Bring a stage's output towards the RMS of its two clips.

    fixed: √((rms_in² + rms_tgt²)/2) / rms_out. learnable (seed 003): two learned weights mix the RMS values and a
    learned log-scale multiplies the factor. off: the factor is measured but not applied.
    """

    def __init__(self, config: StageConfig):
        super().__init__()
        self.mode = config.rms_scaling
        self.clamp = config.clamp
        if self.mode == "learnable":
            self.log_scale = nn.Parameter(torch.zeros(()))
            self.input_weight = nn.Parameter(torch.tensor(0.5))
            self.target_weight = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, input_rms: Tensor, target_rms: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`x [B, D, T]` and both RMS `[B]` → scaled x, its RMS before, the wanted and the applied factor, `[B]`."""
        rms_before_scaling = rms(x)
        if self.mode == "learnable":
            w_in, w_tgt = self.input_weight.abs(), self.target_weight.abs()
            goal = (w_in * input_rms + w_tgt * target_rms) / (w_in + w_tgt + 1e-8) * self.log_scale.exp()
        else:
            goal = ((input_rms.square() + target_rms.square()) / 2).sqrt()
        wanted = goal / (rms_before_scaling + 1e-8)
        if self.mode == "off":
            return x, rms_before_scaling, wanted, torch.ones_like(wanted)
        applied = wanted if self.clamp is None else wanted.clamp(*self.clamp)
        return x * applied[:, None, None], rms_before_scaling, wanted, applied


class Stage(nn.Module):
    """One stage: concat → positions → transformer → projection → + w · residual → RMS scaling."""

    def __init__(self, config: StageConfig, width: int, latent_dim: int):
        super().__init__()
        self.config = config
        concat = latent_dim * len(config.sources)
        self.input_projection = nn.Identity() if width == concat else nn.Linear(concat, width)
        self.dropout = Dropout(config.dropout)
        self.input_norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(TransformerLayer(width, config) for _ in range(config.num_layers))
        self.post_norm = nn.LayerNorm(width)
        linear = SpectralLinear if config.spectral_norm else nn.Linear
        self.output_projection = linear(width, latent_dim)
        self.rms_scaling = RmsScaling(config)

    def forward(self, sources: dict[str, Tensor]) -> tuple[Tensor, StageTrace]:
        """`sources`: name → `[B, D, T]`, every name of `SOURCES` that this stage uses, noisy and clean."""
        x = torch.cat([sources[name] for name in self.config.sources], dim=1).transpose(1, 2)  # [B, T, concat]
        x = self.input_projection(x)  # [B, T, d]
        x = self.dropout(x + sinusoidal_positions(x.shape[1], x.shape[2], x.device).to(x.dtype))
        x = self.input_norm(x)
        for layer in self.layers:
            x = layer(x)
        projected = self.output_projection(self.post_norm(x)).transpose(1, 2)  # [B, D, T]
        if self.config.projection_gain != 1:
            projected = self.config.projection_gain * projected
        residual = sum(sources[name] for name in self.config.residual_names) / len(self.config.residual_names)
        weight = self.config.residual_weight
        mixed = (
            projected if self.config.mixing == "add" else preserving_weight(weight) * projected
        ) + weight * residual
        scaling = self.rms_scaling(mixed, rms(sources["input"]), rms(sources["target"]))
        output, rms_before_scaling, wanted, applied = scaling
        with torch.no_grad():
            clamped = (wanted != applied).float() if self.config.rms_scaling != "off" else torch.zeros_like(wanted)
            own = (rms(projected), rms(residual), cosine(projected, residual))
            measured = (*own, rms_before_scaling, rms(output), wanted, applied, clamped)
        return output, StageTrace(*(value.detach() for value in measured))


class Cascade(nn.Module):
    """Fuse two latents into one. The reference has 4,772,480 + 10,697,600 parameters."""

    def __init__(self, config: CascadeConfig | None = None):
        super().__init__()
        self.config = config or CascadeConfig.reference()
        self.stages = nn.ModuleList(
            Stage(stage, self.config.width(i), self.config.latent_dim) for i, stage in enumerate(self.config.stages)
        )

    def forward(
        self, input: Tensor, target: Tensor, stages: int | None = None
    ) -> tuple[Tensor, tuple[StageTrace, ...]]:
        """`input`, `target` `[B, D, T]`, any T ≥ 1 → fused latents `[B, D, T]` and one trace per stage.

        `stages`: apply only so many, from the first; None: all."""
        self.check_shapes(input, target)
        assert stages is None or 1 <= stages <= len(self.stages), (stages, len(self.stages))
        sources = {"input": input, "target": target}
        sources["noisy_input"], sources["noisy_target"] = self.add_noise(input), self.add_noise(target)
        traces = []
        for stage in self.stages[:stages]:
            sources["previous"], trace = stage(sources)
            traces.append(trace)
        return sources["previous"], tuple(traces)

    def check_shapes(self, input: Tensor, target: Tensor) -> None:
        """`ValueError` unless both are latents that this cascade can fuse."""
        D = self.config.latent_dim
        if input.shape != target.shape or input.ndim != 3 or input.shape[1] != D or input.shape[2] < 1:
            shapes = f"{list(input.shape)} and {list(target.shape)}"
            raise ValueError(f"input and target must both be [B, {D}, T] with T ≥ 1, got {shapes}")

    def add_noise(self, x: Tensor) -> Tensor:
        """Anti-cheating noise, `level · std · randn` in training. The std is the clip's own, so that a sample's noise
        does not depend on its neighbours in the batch (seed 000 takes it over the batch)."""
        if not self.training or self.config.anti_cheating == 0:
            return x
        return x + self.config.anti_cheating * x.std(dim=(1, 2), keepdim=True) * torch.randn_like(x)
