"""The cascade: transformer stages that fuse two latents into one (source document 000 has the two-stage reference).

Read it top to bottom: parts (positions, dropout, transformer layer, RMS scaling), stage, configs, cascade.

Legend: B batch, D latent channels (128), T frames (75 a second), d width of a stage's transformer.
    a clip's latents   [B, D, T]
    inside a stage     [B, T, D · sources] → [B, T, d] → [B, T, D]
    an RMS or a scale  [B]
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from lib.model.projection import SpectralLinear
from lib.model.rms_law import INPUT, TARGET, UNLIKE, Clips, StagePrediction, mean_of, pair_rms, predict_stage
from lib.util.configs import Count, Flag, Fraction, NonNegative, Number, Positive, check, checked_dataclass, choice
from lib.util.tensors import cached_table

LATENT_DIM = 128
SOURCES = ("input", "noisy_input", "target", "noisy_target", "previous")
RESIDUAL_SOURCES = ("mean", "previous")
RMS_SCALINGS = ("fixed", "learnable", "off")
MIXINGS = ("add", "preserving")
MOST = 2**16  # dimensions of a stage
DRAWS = 2**16  # of 16 random bits: a dropout probability is met to within 8e-6


def rms(x: Tensor) -> Tensor:
    """Root mean square per sample, `[B, D, T] → [B]`, float32 or wider, with 1e-8 under the root."""
    return (x.to(torch.promote_types(x.dtype, torch.float32)).square().mean(dim=(1, 2)) + 1e-8).sqrt()


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """Cosine of two signals as vectors, per sample, two `[B, D, T]` → `[B]`; 0 where one is silent."""
    return F.cosine_similarity(x.flatten(1).float(), y.flatten(1).float(), dim=1)


@cached_table
def sinusoidal_positions(T: int, d: int, device: torch.device) -> Tensor:
    """Sinusoidal positions `[T, d]`, even channels sine, odd cosine (Vaswani et al. 2017, arXiv 1706.03762)."""
    frames = torch.arange(T, dtype=torch.float32, device=device).unsqueeze(1)  # [T, 1]
    rates = torch.exp(torch.arange(0, d, 2, dtype=torch.float32, device=device) * (-math.log(10_000.0) / d))  # [d/2]
    return torch.stack([(frames * rates).sin(), (frames * rates).cos()], dim=2).flatten(1)  # [T, d/2, 2] → [T, d]


class Dropout(nn.Dropout):
    """`nn.Dropout` by 16 random bits an element: the stock one took a fifth of a step on a CPU. The mean is exact."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return F.dropout(x, self.p, self.training)
        words = torch.randint(-(2**63), 2**63 - 1, ((x.numel() + 3) // 4,))  # 64 random bits each
        draws = words.view(torch.int16)[: x.numel()].view(x.shape)
        dropped = min(round(self.p * DRAWS), DRAWS - 1)
        return (x * (draws >= dropped - DRAWS // 2)).mul_(DRAWS / (DRAWS - dropped))


class TransformerLayer(nn.Module):
    """One post-norm encoder layer, `[B, T, d] → [B, T, d]`: `nn.TransformerEncoderLayer` with exact GELU, but without
    dropout on the attention weights, which would leave the fused path and take several times as long."""

    def __init__(self, d: int, num_heads: int, ffn_mult: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(d, 3 * d)
        self.attention_out = nn.Linear(d, d)
        self.ffn_in = nn.Linear(d, ffn_mult * d)
        self.ffn_out = nn.Linear(ffn_mult * d, d)
        self.norm1 = nn.LayerNorm(d)
        self.norm2 = nn.LayerNorm(d)
        self.dropout = Dropout(dropout)
        # initialised as nn.MultiheadAttention is: the RMS at the start is part of what this project measures
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
        attended = F.scaled_dot_product_attention(q, k, v)  # [B, heads, T, d / heads]
        return self.attention_out(attended.transpose(1, 2).reshape(B, T, d))


class RmsScaling(nn.Module):
    """Scale a stage's output towards the RMS of its two clips. fixed: target scale √((rms_in² + rms_tgt²)/2) / rms.
    learnable (source document 003): two learned weights average the clips' RMS values, and a learned log-scale
    multiplies the result. off: the target scale is measured but not applied."""

    def __init__(self, config: "StageConfig"):
        super().__init__()
        self.config = config
        if config.rms_scaling == "learnable":
            self.log_scale = nn.Parameter(torch.zeros(()))
            self.input_weight = nn.Parameter(torch.tensor(0.5))
            self.target_weight = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, input_rms: Tensor, target_rms: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`x [B, D, T]` and the clips' RMS `[B]` → scaled x; RMS before scaling, target and applied scale, `[B]`."""
        before = rms(x)
        if self.config.rms_scaling == "learnable":
            w_in, w_tgt = self.input_weight.abs(), self.target_weight.abs()
            goal = (w_in * input_rms + w_tgt * target_rms) / (w_in + w_tgt + 1e-8) * self.log_scale.exp()
        else:
            goal = pair_rms(input_rms, target_rms)
        target_scale = goal / (before + 1e-8)
        if self.config.rms_scaling == "off":
            return x, before, target_scale, torch.ones_like(target_scale)
        applied = target_scale if self.config.clamp is None else target_scale.clamp(*self.config.clamp)
        return x * applied[:, None, None], before, target_scale, applied


@dataclass(frozen=True)
class StageTrace:
    """What one stage did to the RMS, per sample: tensors `[B]`, detached, on the model's device."""

    projection_rms: Tensor  # of the projection alone, its gain included
    residual_rms: Tensor  # of the residual, before its weight
    alignment: Tensor  # cosine of projection and residual, −1 to 1
    rms_before_scaling: Tensor  # of projection and weighted residual together
    output_rms: Tensor  # after scaling
    target_scale: Tensor  # would bring the output to the RMS of both clips
    applied_scale: Tensor  # after the clamp; 1 where scaling is off
    clamped: Tensor  # 1.0 where the clamp changed the scale, else 0.0


class Stage(nn.Module):
    """One stage: concat → positions → transformer → projection → + w · residual → RMS scaling."""

    # read at every pass
    OVERRIDABLE = ("residual_weight", "residual_source", "mixing", "projection_gain", "projection_level", "clamp")

    def __init__(self, config: "StageConfig", width: int, latent_dim: int):
        super().__init__()
        self.config = config
        concat = latent_dim * len(config.sources)
        self.input_projection = nn.Identity() if width == concat else nn.Linear(concat, width)
        self.dropout = Dropout(config.dropout)
        self.input_norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(
            TransformerLayer(width, config.num_heads, config.ffn_mult, config.dropout) for _ in range(config.num_layers)
        )
        self.post_norm = nn.LayerNorm(width)
        linear = SpectralLinear if config.spectral_norm else nn.Linear
        self.output_projection = linear(width, latent_dim)
        self.rms_scaling = RmsScaling(config)

    def forward(self, signals: dict[str, Tensor]) -> tuple[Tensor, StageTrace]:
        """`signals`: name → `[B, D, T]`, every name of `SOURCES` that this stage uses, noisy and clean."""
        config = self.config
        x = torch.cat([signals[name] for name in config.sources], dim=1).transpose(1, 2)  # [B, T, D · sources]
        x = self.input_projection(x)  # [B, T, d]
        x = self.dropout(x + sinusoidal_positions(x.shape[1], x.shape[2], x.device).to(x.dtype))
        x = self.input_norm(x)
        for layer in self.layers:
            x = layer(x)
        projection = config.projection_gain * self.output_projection(self.post_norm(x)).transpose(1, 2)  # [B, D, T]
        clips_rms = rms(signals["input"]), rms(signals["target"])
        if config.projection_level is not None:
            level = config.projection_level * pair_rms(*clips_rms) / rms(projection)
            projection = projection * level[:, None, None]
        residual = sum(signals[name] for name in config.residual_names) / len(config.residual_names)
        mixed = config.projection_weight * projection + config.residual_weight * residual
        output, before, target_scale, applied = self.rms_scaling(mixed, *clips_rms)
        with torch.no_grad():
            clamped = (target_scale != applied).float() if config.rms_scaling != "off" else torch.zeros_like(applied)
            own = (rms(projection), rms(residual), cosine(projection, residual))
            measured = (*own, before, rms(output), target_scale, applied, clamped)
        return output, StageTrace(*(value.detach() for value in measured))

    @contextlib.contextmanager
    def override(self, **changes: Any) -> Iterator[None]:
        """Change settings of `OVERRIDABLE`, on which no tensor depends, while the context lasts."""
        assert set(changes) <= set(self.OVERRIDABLE), (changes, self.OVERRIDABLE)
        config = self.config
        self.config = self.rms_scaling.config = dataclasses.replace(config, **changes)
        try:
            yield
        finally:
            self.config = self.rms_scaling.config = config


@checked_dataclass
class StageConfig:
    """One stage. Every mechanism that the ablation varies is a field here."""

    # concatenated in this order; 'previous': the stage before
    sources: Annotated[tuple[choice(SOURCES), ...], Field(min_length=1)] = ("noisy_input", "target")
    width: Count | None = None  # None: D · number of sources; another width gets an input projection
    num_layers: Count = 6
    num_heads: Count = 8
    ffn_mult: Count = 4
    dropout: Fraction = 0.1
    residual_weight: Number = 1.0  # 0.1 in a third stage collapses the RMS
    residual_source: choice(RESIDUAL_SOURCES) = "mean"  # mean of the clean sources, or the previous stage's output
    # projection + w · residual, or RMS-'preserving': √(1 − w²) · projection + w · residual
    mixing: choice(MIXINGS) = "add"
    projection_gain: Positive = 1.0  # multiplies the projection: the σ that it then has
    # RMS, of both clips', to which the projection is brought outside the weights, so that training cannot change it
    projection_level: Positive | None = None
    spectral_norm: Flag = True
    rms_scaling: choice(RMS_SCALINGS) = "fixed"  # 'learnable' is the model of source document 003
    clamp: tuple[Positive, Positive] | None = (0.7, 1.5)  # range of the applied scale; None: unlimited

    def __post_init__(self):
        fits = self.mixing != "preserving" or 0 <= self.residual_weight <= 1
        check(fits, "residual_weight", self.residual_weight, "0 to 1 where mixing is 'preserving'")
        ordered = self.clamp is None or self.clamp[0] <= self.clamp[1]
        check(ordered, "clamp", self.clamp, "None or (low, high) with low ≤ high")

    @property
    def projection_weight(self) -> float:
        """Weight of the projection beside a residual of weight w: 1, or √(1 − w²) in RMS-preserving mixing."""
        return math.sqrt(1 - self.residual_weight**2) if self.mixing == "preserving" else 1.0

    @property
    def residual_names(self) -> tuple[str, ...]:
        """The signals whose mean is the residual."""
        clean = tuple(name.removeprefix("noisy_") for name in self.sources)
        return clean if self.residual_source == "mean" else ("previous",)


@checked_dataclass
class CascadeConfig:
    """A cascade: its stages from first to last, and what they share. `rms_law.check_collapse` judges its weights."""

    stages: tuple[StageConfig, ...]
    latent_dim: Count = LATENT_DIM
    anti_cheating: NonNegative = 0.0  # noise level, in standard deviations of the clip, added in training only

    def __post_init__(self):
        for first in self.stages[:1]:
            check("previous" not in first.sources, "stages[0].sources", first.sources, "no 'previous' in stage 0")
            check(first.residual_source != "previous", "stages[0].residual_source", "previous", "'mean' in stage 0")
        for i, stage in enumerate(self.stages):
            width, rule = self.width(i), f"a multiple of num_heads ({stage.num_heads}), even, at most {MOST}"
            possible = width % stage.num_heads == 0 and width % 2 == 0 and width <= MOST
            check(possible, f"stages[{i}].width", width, rule)

    def predict_rms(self, clips: Clips = UNLIKE) -> tuple[StagePrediction, ...]:
        """The RMS of every stage of an untrained cascade by the law of `rms_law`."""
        signals, predictions = {"input": INPUT, "target": TARGET}, []
        for i, stage in enumerate(self.stages):
            residual = mean_of([signals[name] for name in stage.residual_names])
            prediction, output = predict_stage(stage, residual, clips, d=self.width(i), D=self.latent_dim)
            predictions.append(prediction)
            signals["previous"] = output
        return tuple(predictions)

    @classmethod
    def reference(cls, num_stages: int = 2, *, anti_cheating: float = 0.0, **changes: Any) -> "CascadeConfig":
        """Document 000's reference: stage 0 fuses (input, target), each later one (input, previous, target). `changes`
        are `StageConfig` fields of every stage: `CascadeConfig.reference(3, num_layers=2)`."""
        check(num_stages >= 0, "num_stages", num_stages, "0 or more")
        later = StageConfig(sources=("noisy_input", "previous", "noisy_target"), **changes)
        stages = (StageConfig(**changes), *[later] * (num_stages - 1))
        return cls(stages[:num_stages], anti_cheating=anti_cheating)

    def with_stage(self, index: int, **changes: Any) -> "CascadeConfig":
        """A copy with some fields of one stage changed: `config.with_stage(-1, residual_weight=0.1)`."""
        stages = list(self.stages)
        stages[index] = dataclasses.replace(stages[index], **changes)
        return dataclasses.replace(self, stages=tuple(stages))

    def width(self, index: int) -> int:
        """Width d of a stage's transformer."""
        return self.stages[index].width or self.latent_dim * len(self.stages[index].sources)


class Cascade(nn.Module):
    """Fuse two latents into one. The reference has 4,772,480 + 10,697,600 parameters in its two stages."""

    def __init__(self, config: CascadeConfig | None = None):
        super().__init__()
        self.config = config or CascadeConfig.reference()
        self.stages = nn.ModuleList(
            Stage(stage, self.config.width(i), self.config.latent_dim) for i, stage in enumerate(self.config.stages)
        )

    def forward(self, input: Tensor, target: Tensor) -> tuple[Tensor, tuple[StageTrace, ...]]:
        """`input`, `target` `[B, D, T]`, any T ≥ 1 → fused latents `[B, D, T]` and one trace per stage."""
        signals, traces = self.run_stages(input, target)
        return signals["previous"], traces

    def run_stages(
        self, input: Tensor, target: Tensor, stages: int | None = None
    ) -> tuple[dict[str, Tensor], tuple[StageTrace, ...]]:
        """All signals by the names of `SOURCES`, `[B, D, T]`, as the next stage reads them, and each stage's output as
        'stage0' and so on; and one trace for each of the `stages` that are applied, from the first; None: all."""
        self.check_shapes(input, target)
        signals = {"input": input, "target": target}
        signals["noisy_input"], signals["noisy_target"] = self.add_noise(input), self.add_noise(target)
        traces = []
        for i, stage in enumerate(self.stages[:stages]):
            signals["previous"], trace = stage(signals)
            signals[f"stage{i}"] = signals["previous"]
            traces.append(trace)
        return signals, tuple(traces)

    def check_shapes(self, input: Tensor, target: Tensor) -> None:
        """`ValueError` unless both are latents that this cascade can fuse."""
        D = self.config.latent_dim
        if input.shape != target.shape or input.ndim != 3 or input.shape[1] != D or input.shape[2] < 1:
            found = f"{list(input.shape)} and {list(target.shape)}"
            raise ValueError(f"input and target must both be [B, {D}, T] with T ≥ 1, got {found}")

    def add_noise(self, x: Tensor) -> Tensor:
        """Anti-cheating noise, `level · std · randn`, in training only; std of each clip (000: of the batch)."""
        if not self.training or self.config.anti_cheating == 0:
            return x
        return x + self.config.anti_cheating * x.std(dim=(1, 2), keepdim=True) * torch.randn_like(x)
