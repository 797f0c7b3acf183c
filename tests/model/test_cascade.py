"""The cascade against an independent build from PyTorch's own parts, formulas worked out by hand, and a golden file."""

import contextlib
import dataclasses
import json
import math
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from lib.model.cascade import (
    MIXINGS,
    RESIDUAL_SOURCES,
    RMS_SCALINGS,
    Cascade,
    CascadeConfig,
    Dropout,
    RmsScaling,
    StageConfig,
    StageTrace,
    cosine,
    rms,
)
from lib.model.projection import SpectralLinear, realign_projections
from lib.util.configs import from_fields
from lib.util.errors import UserError

GOLDEN = Path(__file__).parent / "cascade_golden.safetensors"


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def clips(B: int = 2, T: int = 7, D: int = 8, rms_in: float = 5.0, rms_tgt: float = 4.0, seed: int = 0):
    """Two random latents `[B, D, T]` with exactly these RMS values in every sample."""
    x = torch.randn(2, B, D, T, generator=torch.Generator().manual_seed(seed))
    x = x / x.square().mean(dim=(2, 3), keepdim=True).sqrt()
    return rms_in * x[0], rms_tgt * x[1]


def true_rms(x: torch.Tensor) -> torch.Tensor:
    """`[B, D, T] → [B]`, in float64 and without the 1e-8."""
    return x.detach().double().pow(2).flatten(1).mean(1).sqrt()


# --- size -------------------------------------------------------------------------------------------------------------


def test_parameter_counts_against_arithmetic():
    def stage(d, layers=6, D=128):
        attention = (d * 3 * d + 3 * d) + (d * d + d)
        ffn = (d * 4 * d + 4 * d) + (4 * d * d + d)
        norms = 2 * (d + d)
        return layers * (attention + ffn + norms) + 2 * (d + d) + (d * D + D)

    assert (stage(256), stage(384)) == (4_772_480, 10_697_600)  # the formula gives the design's numbers
    counts = [sum(p.numel() for p in stage.parameters()) for stage in Cascade().stages]
    assert counts == [4_772_480, 10_697_600]


def test_reference_is_the_design():
    first, second = CascadeConfig.reference().stages
    assert first.sources == ("noisy_input", "target")
    assert second.sources == ("noisy_input", "previous", "noisy_target")
    config = CascadeConfig.reference()
    assert [config.width(i) for i in range(2)] == [256, 384]
    for stage in (first, second):
        assert (stage.num_layers, stage.num_heads, stage.ffn_mult, stage.dropout) == (6, 8, 4, 0.1)
        assert (stage.residual_weight, stage.residual_source, stage.rms_scaling) == (1.0, "mean", "fixed")
        assert stage.clamp == (0.7, 1.5)
        assert stage.spectral_norm


# --- parity with a build from nn.TransformerEncoder -------------------------------------------------------------------


class PlainCascade(nn.Module):
    """The two-stage reference from source document 000 and PyTorch's own encoder; it shares no code with lib."""

    def __init__(self, config: CascadeConfig, activation="gelu", norm_first=False, positions=True, sigma=1.0):
        super().__init__()
        self.positions, self.sigma = positions, sigma
        self.encoders, self.input_norms, self.post_norms, self.projections = (nn.ModuleList() for _ in range(4))
        for number, stage in enumerate(config.stages):
            d = config.latent_dim * (2 if number == 0 else 3)
            layer = nn.TransformerEncoderLayer(
                d, stage.num_heads, stage.ffn_mult * d, 0.1, activation, batch_first=True, norm_first=norm_first
            )
            self.encoders.append(nn.TransformerEncoder(layer, stage.num_layers, enable_nested_tensor=False))
            self.input_norms.append(nn.LayerNorm(d))
            self.post_norms.append(nn.LayerNorm(d))
            self.projections.append(nn.Linear(d, config.latent_dim))

    @torch.no_grad()
    def copy_from(self, cascade: Cascade) -> "PlainCascade":
        for i, stage in enumerate(cascade.stages):
            for ours, plain in zip(stage.layers, self.encoders[i].layers, strict=True):
                plain.self_attn.in_proj_weight.copy_(ours.qkv.weight)
                plain.self_attn.in_proj_bias.copy_(ours.qkv.bias)
                pairs = [(plain.self_attn.out_proj, ours.attention_out), (plain.norm1, ours.norm1)]
                pairs += [(plain.linear1, ours.ffn_in), (plain.linear2, ours.ffn_out), (plain.norm2, ours.norm2)]
                for to, source in pairs:
                    to.load_state_dict(source.state_dict())
            self.input_norms[i].load_state_dict(stage.input_norm.state_dict())
            self.post_norms[i].load_state_dict(stage.post_norm.state_dict())
            raw = stage.output_projection.parametrizations.weight.original
            self.projections[i].weight.copy_(raw / torch.linalg.svdvals(raw)[0] * self.sigma)
            self.projections[i].bias.copy_(stage.output_projection.bias)
        return self

    def forward(self, input, target):
        output = None
        for i, encoder in enumerate(self.encoders):
            sources = [input, target] if i == 0 else [input, output, target]
            x = torch.cat(sources, dim=1).transpose(1, 2)
            T, d = x.shape[1:]
            if self.positions:
                for channel in range(0, d, 2):
                    angle = torch.arange(T) / 10_000 ** (channel / d)
                    x[:, :, channel] += torch.sin(angle)
                    x[:, :, channel + 1] += torch.cos(angle)
            x = self.post_norms[i](encoder(self.input_norms[i](x)))
            out = self.projections[i](x).transpose(1, 2) + sum(sources) / len(sources)
            in_ms, tgt_ms, out_ms = ((x**2).mean((1, 2), keepdim=True) + 1e-8 for x in (input, target, out))
            output = out * torch.clamp(torch.sqrt((in_ms + tgt_ms) / 2) / (torch.sqrt(out_ms) + 1e-8), 0.7, 1.5)
        return output


def stirred(cascade: Cascade) -> Cascade:
    """Move every parameter from its start: LayerNorms at 1 and biases at 0 would hide a mix-up."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in cascade.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    realign_projections(cascade)
    return cascade.eval()


@torch.no_grad()
def test_eval_parity_of_the_reference_with_a_plain_build():
    torch.manual_seed(0)
    cascade = stirred(Cascade())
    plain = PlainCascade(cascade.config).copy_from(cascade).eval()
    input, target = clips(2, 40, 128)
    output, _ = cascade(input, target)
    assert output.shape == (2, 128, 40)
    assert relative_error(output, plain(input, target)) < 1e-5
    assert relative_error(cascade(target, input)[0], plain(input, target)) > 1e-2  # the order of the clips matters


@torch.no_grad()
@pytest.mark.parametrize(
    "broken",
    [{"activation": "relu"}, {"norm_first": True}, {"positions": False}, {"sigma": 1.001}, {"activation": "tanh"}, {}],
    ids=lambda broken: " ".join(f"{k}={v}" for k, v in broken.items()) or "unbroken",
)
def test_the_parity_tolerance_fails_on_a_broken_build(tiny_cascade, broken):
    if broken.get("activation") == "tanh":
        broken = {"activation": lambda x: nn.functional.gelu(x, approximate="tanh")}
    cascade = stirred(Cascade(tiny_cascade(num_layers=2)))
    plain = PlainCascade(cascade.config, **broken).copy_from(cascade).eval()
    input, target = clips(T=20)
    error = relative_error(cascade(input, target)[0], plain(input, target))
    assert error > 1e-5 if broken else error < 1e-6


# --- every value of every option --------------------------------------------------------------------------------------

OPTIONS = {
    **{f"stages {n}": (n, {}) for n in range(1, 6)},
    **{f"residual_weight {w}": (2, {"residual_weight": w}) for w in (0.0, 0.1, 0.3, 1.0, 2.0, -1.0)},
    "width 12": (2, {"width": 12}),
    "spectral_norm off": (2, {"spectral_norm": False}),
    **{f"rms_scaling {mode}": (2, {"rms_scaling": mode}) for mode in RMS_SCALINGS},
    **{f"clamp {clamp}": (2, {"clamp": clamp}) for clamp in (None, (0.7, 1.5), (0.9, 0.9))},
    "learnable without clamp": (2, {"rms_scaling": "learnable", "clamp": None}),
    **{f"dropout {p}": (2, {"dropout": p}) for p in (0.0, 0.5)},
    "heads 1": (2, {"num_heads": 1}),
    "layers 3": (2, {"num_layers": 3}),
    "ffn_mult 1": (2, {"ffn_mult": 1}),
    "noise": (2, {"anti_cheating": 0.5}),
}


def one_pass(config: CascadeConfig, T: int = 7) -> None:
    """A training forward and backward: right shape, finite, and a gradient in every parameter that can have one."""
    torch.manual_seed(0)
    cascade = Cascade(config)
    input, target = clips(T=T, D=config.latent_dim)
    output, traces = cascade(input, target)
    assert output.shape == input.shape
    assert len(traces) == len(config.stages)
    assert all(getattr(t, f.name).shape == (2,) for t in traces for f in dataclasses.fields(StageTrace))
    assert all(getattr(t, f.name).isfinite().all() for t in traces for f in dataclasses.fields(StageTrace))
    (output - target).square().mean().backward()
    without = [name for name, p in cascade.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without
    assert sum(p.grad.abs().sum() for p in cascade.stages[0].layers.parameters()) > 0


@pytest.mark.parametrize("option", OPTIONS)
def test_forward_and_backward_of_every_option(tiny_cascade, option):
    num_stages, changes = OPTIONS[option]
    one_pass(tiny_cascade(num_stages, **changes))


@pytest.mark.parametrize("source", RESIDUAL_SOURCES)
def test_forward_and_backward_of_every_residual_source(tiny_cascade, source):
    one_pass(tiny_cascade(3).with_stage(-1, residual_source=source))


@pytest.mark.parametrize(
    "sources",
    [("input",), ("noisy_input",), ("target",), ("noisy_target",), ("previous",), ("target", "previous", "input"),
     ("noisy_input", "previous"), ("input", "noisy_input", "target", "noisy_target", "previous")],
)  # fmt: skip
def test_forward_and_backward_of_sources(tiny_cascade, sources):
    last = 1 if "previous" in sources else 0
    config = tiny_cascade(last + 1).with_stage(last, sources=sources)
    assert config.width(last) == 8 * len(sources)
    one_pass(config)


def test_width_512_gets_an_input_projection():
    config = CascadeConfig.reference(1, width=512, num_layers=1)
    cascade = Cascade(config)
    assert cascade.stages[0].input_projection.weight.shape == (512, 256)
    assert cascade.stages[0].output_projection.weight.shape == (128, 512)
    one_pass(config)
    assert isinstance(Cascade(CascadeConfig.reference(1, num_layers=1)).stages[0].input_projection, nn.Identity)


def test_spectral_norm_is_a_switch(tiny_cascade):
    on, off = (Cascade(tiny_cascade(spectral_norm=value)) for value in (True, False))
    assert all(isinstance(stage.output_projection, SpectralLinear) for stage in on.stages)
    assert all(type(stage.output_projection) is nn.Linear for stage in off.stages)


# --- time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 2, 7, 75, 1200])
def test_forward_and_backward_of_any_length(tiny_cascade, T):
    one_pass(tiny_cascade(), T)


@torch.no_grad()
def test_6000_frames(tiny_cascade):
    cascade = Cascade(tiny_cascade(1)).eval()
    seen = []
    cascade.stages[0].dropout.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    input, target = clips(1, 6000)
    output, _ = cascade(input, target)
    assert output.shape == (1, 8, 6000)
    assert output.isfinite().all()
    assert true_rms(output).item() == pytest.approx(math.sqrt((25 + 16) / 2), rel=1e-3)
    positions = seen[0] - torch.cat([input, target], dim=1).transpose(1, 2)  # past the original's table of 2000
    for t, channel in ((5999, 0), (5999, 3), (2001, 14), (0, 5)):
        angle = t / 10_000 ** ((channel - channel % 2) / 16)
        wanted = math.cos(angle) if channel % 2 else math.sin(angle)
        assert positions[0, t, channel].item() == pytest.approx(wanted, abs=2e-3)


@torch.no_grad()
def test_every_frame_sees_every_other_and_its_own_place(tiny_cascade):
    cascade = Cascade(tiny_cascade(1)).eval()
    input, target = clips(1, 9)
    output, _ = cascade(input, target)
    changed = input.clone()
    changed[:, :, 8] += 1
    assert (cascade(changed, target)[0] - output)[0, :, 0].abs().max() > 1e-6
    flipped, _ = cascade(input.flip(2), target.flip(2))  # without positions this would be the output, flipped
    assert relative_error(flipped.flip(2), output) > 1e-3


# --- what a stage computes after its transformer ----------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("residual_source", ["mean", "previous"])
@pytest.mark.parametrize("residual_weight", [1.0, 0.1])
@pytest.mark.parametrize("scaling", ["fixed", "learnable", "off"])
@pytest.mark.parametrize("clamp", [(0.9, 1.1), None])
def test_trace_and_output_by_hand(tiny_cascade, residual_source, residual_weight, scaling, clamp):
    config = tiny_cascade(3, rms_scaling=scaling, clamp=clamp)
    config = config.with_stage(-1, residual_weight=residual_weight, residual_source=residual_source)
    cascade = Cascade(config).eval()
    last, projected, outputs = cascade.stages[-1], [], []
    last.output_projection.register_forward_hook(lambda module, inputs, output: projected.append(output))
    for stage in cascade.stages:
        stage.register_forward_hook(lambda module, inputs, output: outputs.append(output[0]))
    input, target = clips(rms_in=5.0, rms_tgt=2.0)
    result, traces = cascade(input, target)
    previous, trace = outputs[1], traces[-1]

    projection = projected[0].transpose(1, 2)
    residual = previous if residual_source == "previous" else (input + previous + target) / 3
    mixed = projection + residual_weight * residual
    if scaling == "learnable":  # as it starts: half of each RMS
        wanted = (0.5 * 5.0 + 0.5 * 2.0) / true_rms(mixed)
    else:
        wanted = math.sqrt((5.0**2 + 2.0**2) / 2) / true_rms(mixed)
    applied = torch.ones_like(wanted) if scaling == "off" else wanted.clamp(0.9, 1.1) if clamp else wanted

    torch.testing.assert_close(trace.projection_rms.double(), true_rms(projection), rtol=1e-5, atol=0)
    torch.testing.assert_close(trace.rms_before_scaling.double(), true_rms(mixed), rtol=1e-5, atol=0)
    torch.testing.assert_close(trace.output_rms.double(), applied * true_rms(mixed), rtol=1e-5, atol=0)
    torch.testing.assert_close(trace.target_scale.double(), wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(trace.applied_scale.double(), applied.double(), rtol=1e-5, atol=0)
    outside = (wanted < 0.9) | (wanted > 1.1) if clamp and scaling != "off" else torch.zeros(2, dtype=torch.bool)
    assert trace.clamped.tolist() == outside.tolist()
    torch.testing.assert_close(result.double(), mixed * applied[:, None, None], rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(("level", "applied"), [(20.0, 1.5), (0.01, 0.7)])
def test_the_clamp_holds(tiny_cascade, level, applied):
    cascade = Cascade(tiny_cascade(1, residual_weight=0.0)).eval()
    output, (trace,) = cascade(*clips(rms_in=level, rms_tgt=level))
    assert ((trace.target_scale > 3) if applied == 1.5 else (trace.target_scale < 0.1)).all()
    assert torch.equal(trace.applied_scale, torch.full((2,), applied))
    assert trace.clamped.tolist() == [1.0, 1.0]
    torch.testing.assert_close(true_rms(output), applied * trace.rms_before_scaling.double(), rtol=1e-5, atol=0)
    free, (trace,) = Cascade(tiny_cascade(1, residual_weight=0.0, clamp=None)).eval()(*clips(rms_in=level, rms_tgt=1))
    assert trace.clamped.tolist() == [0.0, 0.0]
    assert true_rms(free)[0].item() == pytest.approx(math.sqrt((level**2 + 1) / 2), rel=1e-4)


@torch.no_grad()
def test_output_rms_is_the_root_mean_square_of_both_when_unclamped(tiny_cascade):
    cascade = Cascade(tiny_cascade(3, clamp=None)).eval()
    output, _ = cascade(*clips(rms_in=7.0, rms_tgt=1.0))
    torch.testing.assert_close(true_rms(output), torch.full((2,), 5.0).double(), rtol=1e-5, atol=0)  # not 4, their mean


def test_learnable_scaling_is_that_of_document_003():
    scaling = RmsScaling(StageConfig(rms_scaling="learnable", clamp=None))
    with torch.no_grad():
        scaling.input_weight.fill_(-0.3)  # the source document takes the absolute value
        scaling.target_weight.fill_(0.9)
        scaling.log_scale.fill_(0.2)
    x, _ = clips(rms_in=3.0)
    output, rms_before_scaling, wanted, applied = scaling(x, torch.tensor([5.0, 6.0]), torch.tensor([2.0, 1.0]))
    by_hand = torch.tensor([0.3 * 5 + 0.9 * 2, 0.3 * 6 + 0.9 * 1]) / 1.2 / 3 * math.exp(0.2)
    torch.testing.assert_close(wanted, by_hand, rtol=1e-5, atol=0)
    assert torch.equal(applied, wanted)
    torch.testing.assert_close(rms_before_scaling, torch.full((2,), 3.0))
    torch.testing.assert_close(output, x * by_hand[:, None, None])
    output.square().sum().backward()
    assert all(p.grad.abs() > 1e-3 for p in (scaling.log_scale, scaling.input_weight, scaling.target_weight))


def test_rms_per_sample_with_its_epsilon():
    x = torch.zeros(2, 3, 4)
    x[1] = -2.0
    torch.testing.assert_close(rms(x), torch.tensor([1e-4, 2.0]))  # √1e-8 for silence: no division by zero
    assert rms(x.bfloat16()).dtype == torch.float32
    assert rms(x.double()).dtype == torch.float64


def test_silence_gives_finite_outputs_and_gradients(tiny_cascade):
    cascade = Cascade(tiny_cascade())
    output, _ = cascade(torch.zeros(1, 8, 5), torch.zeros(1, 8, 5))
    output.square().mean().backward()
    assert output.isfinite().all()
    assert all(p.grad.isfinite().all() for p in cascade.parameters())


@torch.no_grad()
def test_a_sample_does_not_depend_on_its_batch(tiny_cascade):
    cascade = Cascade(tiny_cascade(2, clamp=None)).eval()
    quiet, loud = clips(1, rms_in=0.5, rms_tgt=0.4, seed=1), clips(1, rms_in=50.0, rms_tgt=40.0, seed=2)
    both, traces = cascade(torch.cat([quiet[0], loud[0]]), torch.cat([quiet[1], loud[1]]))
    for i, alone in enumerate((quiet, loud)):
        output, own = cascade(*alone)
        assert relative_error(both[i : i + 1], output) < 1e-5
        assert traces[1].target_scale[i].item() == pytest.approx(own[1].target_scale.item(), rel=1e-5)
    assert traces[1].target_scale[0] != pytest.approx(traces[1].target_scale[1].item(), rel=1e-2)


def test_the_trace_carries_no_gradient(tiny_cascade):
    _, traces = Cascade(tiny_cascade())(*clips())
    assert not any(getattr(t, f.name).requires_grad for t in traces for f in dataclasses.fields(t))


# --- the first stages alone -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [1, 2, 3, None])
def test_the_first_stages_alone_give_the_output_of_the_last_of_them(tiny_cascade, stages):
    cascade, (input, target) = Cascade(tiny_cascade(3)).eval(), clips()
    outputs = []
    for stage in cascade.stages:
        stage.register_forward_hook(lambda module, inputs, output: outputs.append(output[0]))
    _, whole = cascade(input, target)
    wanted = stages or 3
    signals, traces = cascade.run_stages(input, target, stages)
    output = signals["previous"]
    assert len(outputs) == 3 + wanted, "a stage ran whose output is not wanted"
    assert torch.equal(output, outputs[wanted - 1])
    assert len(traces) == wanted
    for trace, other in zip(traces, whole[:wanted], strict=True):
        assert all(torch.equal(getattr(trace, f.name), getattr(other, f.name)) for f in dataclasses.fields(StageTrace))
    output.sum().backward()
    learning = [any(p.grad is not None for p in stage.parameters()) for stage in cascade.stages]
    assert learning == [True] * wanted + [False] * (3 - wanted)


def test_a_config_may_have_no_stage():
    assert CascadeConfig.reference(0).predict_rms() == ()
    with pytest.raises(UserError, match=r"^num_stages=-1 is not allowed; use 0 or more"):
        CascadeConfig.reference(-1)


# --- sources and noise ------------------------------------------------------------------------------------------------


def read_block(cascade: Cascade, index: int, block: int) -> list[torch.Tensor]:
    """Make a stage's input projection read one of the concatenated blocks only; the list gets what it reads."""
    projection = cascade.stages[index].input_projection
    with torch.no_grad():
        projection.weight.zero_()
        projection.weight[:, 8 * block : 8 * block + 8] = torch.eye(8)
        projection.bias.zero_()
    seen = []
    projection.register_forward_hook(lambda module, inputs, output: seen.append(output.detach().transpose(1, 2)))
    return seen


@torch.no_grad()
def test_order_of_concatenation_and_who_gets_noise(tiny_cascade):
    """Stage 0 reads (noisy input, clean target); stage 1 (noisy input, stage 0, noisy target)."""
    cascade = Cascade(tiny_cascade(2, width=8, anti_cheating=0.5))  # a width of its own gives an input projection
    input, target = clips()
    results = []
    cascade.stages[0].register_forward_hook(lambda module, inputs, output: results.append(output[0]))
    seen = {}
    for index, block in ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2)):
        read = read_block(cascade, index, block)
        torch.manual_seed(0)
        cascade(input, target)
        seen[index, block] = read[-1], results[-1]
    noisy_input, noisy_target = seen[0, 0][0], seen[1, 2][0]
    assert relative_error(noisy_input, input) > 0.1
    assert relative_error(noisy_target, target) > 0.1
    assert torch.corrcoef(torch.stack([noisy_input.flatten(), input.flatten()]))[0, 1] > 0.8  # it is the input
    assert torch.corrcoef(torch.stack([noisy_target.flatten(), target.flatten()]))[0, 1] > 0.8
    assert torch.equal(seen[0, 1][0], target)  # clean in stage 0
    assert torch.equal(seen[1, 0][0], noisy_input)  # the same noise in both stages
    assert torch.equal(*seen[1, 1])  # the output of stage 0
    read = read_block(cascade.eval(), 0, 0)
    cascade(input, target)
    assert torch.equal(read[-1], input)  # no noise in eval


@torch.no_grad()
def test_noise_has_the_clips_own_std(tiny_cascade):
    cascade = Cascade(tiny_cascade(anti_cheating=0.5))
    torch.manual_seed(0)
    x = torch.randn(2, 8, 5000) * torch.tensor([1.0, 30.0])[:, None, None] + 3
    noise = cascade.add_noise(x) - x
    ratio = noise.std(dim=(1, 2)) / x.std(dim=(1, 2))
    torch.testing.assert_close(ratio, torch.full((2,), 0.5), rtol=0.03, atol=0)  # the std, not the RMS: it has a mean
    assert noise.mean().abs() < 0.3
    assert cascade.eval().add_noise(x) is x
    assert Cascade(tiny_cascade(anti_cheating=0.0)).add_noise(x) is x


@torch.no_grad()
def test_residual_and_rms_use_the_clean_clips(tiny_cascade):
    """Noise of 100 standard deviations changes what the transformer reads, and nothing else."""
    cascade = Cascade(tiny_cascade(2, anti_cheating=100.0, dropout=0.0))
    for stage in cascade.stages:
        stage.output_projection = nn.Linear(stage.output_projection.in_features, 8)
        nn.init.zeros_(stage.output_projection.weight)
        nn.init.zeros_(stage.output_projection.bias)
    input, target = clips()
    output, _ = cascade(input, target)
    assert torch.equal(output, cascade.eval()(input, target)[0])


# --- wrong shapes and wrong configs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("input", "target"),
    [((1, 8, 5), (1, 8, 6)), ((1, 8, 5), (2, 8, 5)), ((1, 7, 5), (1, 7, 5)), ((8, 5), (8, 5)), ((1, 8, 0), (1, 8, 0))],
)
def test_shapes_that_do_not_fit_are_named(tiny_cascade, input, target):
    cascade = Cascade(tiny_cascade(1))
    with pytest.raises(ValueError, match=r"\[B, 8, T\]") as error:
        cascade(torch.zeros(input), torch.zeros(target))
    assert str(list(input)) in str(error.value)
    assert str(list(target)) in str(error.value)


def test_config_survives_json(tiny_cascade):
    config = tiny_cascade(3, anti_cheating=0.1, width=12).with_stage(
        -1, clamp=None, residual_source="previous", residual_weight=0.1, rms_scaling="learnable", spectral_norm=False
    )
    again = from_fields(CascadeConfig, json.loads(json.dumps(dataclasses.asdict(config))))
    assert again == config
    assert again != config.with_stage(0, dropout=0.2)
    assert isinstance(again.stages[0].clamp, tuple)
    torch.manual_seed(0)
    first = Cascade(config).eval()
    torch.manual_seed(0)
    second = Cascade(again).eval()
    assert torch.equal(first(*clips())[0], second(*clips())[0])


def test_from_dict_names_unknown_and_missing_fields(tiny_cascade):
    good = dataclasses.asdict(tiny_cascade())
    stage = dict(good["stages"][0])
    with pytest.raises(UserError, match="stagess is unknown; choose from stages, "):
        from_fields(CascadeConfig, good | {"stagess": 1})
    with pytest.raises(UserError, match=r"stages\[0\]\.droput is unknown"):
        from_fields(CascadeConfig, good | {"stages": [stage | {"droput": 0.1}]})
    with pytest.raises(UserError, match="stages"):
        from_fields(CascadeConfig, {})
    del stage["residual_weight"]
    with pytest.raises(UserError, match=r"lacks the field stages\[0\]\.residual_weight"):
        from_fields(CascadeConfig, good | {"stages": [stage]})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sources", ()), ("sources", ("noise",)), ("residual_source", "mena"), ("rms_scaling", "auto"),
        ("num_layers", 0), ("ffn_mult", 0), ("width", 0), ("dropout", 1.0), ("dropout", -0.1),
        ("residual_weight", math.nan), ("residual_weight", math.inf),
        ("clamp", (1.5, 0.7)), ("clamp", (0.0, 1.0)), ("clamp", (1.0,)), ("clamp", (0.1, 1, 2)),
    ],
)  # fmt: skip
def test_bad_stage_values_name_the_field(field, value):
    with pytest.raises(UserError, match=rf"^{field}\b"):
        StageConfig(**{field: value})


def test_bad_cascade_values_name_the_field(tiny_cascade):
    stage = StageConfig()
    for changes, name in (
        ({"stages": (stage,), "latent_dim": 0}, "latent_dim=0"),
        ({"stages": (stage,), "anti_cheating": -1.0}, "anti_cheating=-1.0"),
        ({"stages": (StageConfig(sources=("previous",)),)}, "stages[0].sources="),
        ({"stages": (StageConfig(residual_source="previous"),)}, "stages[0].residual_source="),
        ({"stages": (stage, StageConfig(width=100))}, "stages[1].width=100"),
        ({"stages": (stage, StageConfig(width=7, num_heads=7))}, "stages[1].width=7"),  # odd: no sine-cosine pairs
        ({"stages": [{"num_heads": 0}]}, "stages[0].num_heads=0"),
    ):
        with pytest.raises(UserError) as error:
            CascadeConfig(**changes)
        assert str(error.value).startswith(name)
    with pytest.raises(UserError, match=r"dropout=2 .*0 or more, below 1"):  # the message lists what is allowed
        tiny_cascade(dropout=2)


# --- the golden file --------------------------------------------------------------------------------------------------


def golden_cascade() -> Cascade:
    small = CascadeConfig.reference(2, num_layers=1, num_heads=2, ffn_mult=2)
    return Cascade(dataclasses.replace(small, latent_dim=8)).eval()


@torch.no_grad()
def write_golden() -> None:
    """How tests/model/cascade_golden.safetensors was made; `python tests/model/test_cascade.py` makes it again."""
    torch.manual_seed(2024)
    cascade = stirred(golden_cascade())
    input, target = clips(2, 9)
    values = {f"weights.{name}": value for name, value in cascade.state_dict().items()}
    values |= {"input": input, "target": target, "output": cascade(input, target)[0]}
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_bytes(safetensors.torch.save({name: value.contiguous() for name, value in values.items()}))


@torch.no_grad()
def test_golden_file():
    """Fixed weights and input give the output that they gave when the file was written."""
    assert os.path.getsize(GOLDEN) < 100_000
    values = safetensors.torch.load_file(GOLDEN)
    cascade = golden_cascade()
    weights = {name.removeprefix("weights."): value for name, value in values.items() if name.startswith("weights.")}
    cascade.load_state_dict(weights)
    output, _ = cascade(values["input"], values["target"])
    assert relative_error(output, values["output"]) < 1e-5
    cascade.stages[1].layers[0].qkv.weight[0, 0] += 0.05  # one weight of thousands
    output, _ = cascade(values["input"], values["target"])
    assert relative_error(output, values["output"]) > 1e-5


if __name__ == "__main__":
    write_golden()


@pytest.mark.parametrize(
    "damage",
    [{"stages": 5}, {"stages": [5]}, {"stages": None}, {"latent_dim": "128"}, {"anti_cheating": None}],
)
def test_from_dict_refuses_values_of_another_kind(tiny_cascade, damage):
    with pytest.raises(UserError, match=f"^{next(iter(damage))}.* is not allowed; use "):
        from_fields(CascadeConfig, dataclasses.asdict(tiny_cascade()) | damage)


# --- gain, mixing, and what the trace says of projection and residual -------------------------------------------------


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("gain", [0.5, 1.0, 9.0])
def test_forward_and_backward_of_every_mixing_and_gain(tiny_cascade, mixing, gain):
    one_pass(tiny_cascade(3, residual_weight=0.6).with_stage(-1, mixing=mixing, projection_gain=gain))


@torch.no_grad()
@pytest.mark.parametrize("residual_source", RESIDUAL_SOURCES)
@pytest.mark.parametrize("weight", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("gain", [1.0, 2.5])
def test_mixing_gain_and_their_trace_by_hand(tiny_cascade, residual_source, weight, mixing, gain):
    config = tiny_cascade(3, rms_scaling="off").with_stage(
        -1, residual_source=residual_source, residual_weight=weight, mixing=mixing, projection_gain=gain
    )
    torch.manual_seed(0)
    cascade = Cascade(config).eval()
    seen = {}
    cascade.stages[1].register_forward_hook(lambda module, inputs, output: seen.update(previous=output[0]))
    cascade.stages[2].output_projection.register_forward_hook(
        lambda module, inputs, output: seen.update(projection=output.transpose(1, 2))
    )
    input, target = clips(3, rms_in=5.0, rms_tgt=2.0)
    output, traces = cascade(input, target)
    projection, trace = gain * seen["projection"], traces[-1]
    residual = seen["previous"] if residual_source == "previous" else (input + seen["previous"] + target) / 3
    share = math.sqrt(1 - weight**2) if mixing == "preserving" else 1.0
    mixed = share * projection + weight * residual

    torch.testing.assert_close(output, mixed, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(trace.projection_rms.double(), true_rms(projection), rtol=1e-5, atol=0)
    torch.testing.assert_close(trace.residual_rms.double(), true_rms(residual), rtol=1e-5, atol=0)
    torch.testing.assert_close(trace.rms_before_scaling.double(), true_rms(mixed), rtol=1e-5, atol=0)
    for b in range(3):
        p, r = projection[b].double().flatten(), residual[b].double().flatten()
        assert trace.alignment[b].item() == pytest.approx((p @ r / p.norm() / r.norm()).item(), abs=1e-5)
    assert trace.alignment.abs().max() > 1e-3


def test_the_cosine_of_two_signals():
    x, y = clips(3)
    y = torch.stack([2 * x[0], -0.1 * x[1], torch.zeros_like(x[2])])
    torch.testing.assert_close(cosine(x, y), torch.tensor([1.0, -1.0, 0.0]))
    assert cosine(x.bfloat16(), x.bfloat16()).dtype == torch.float32
    right_angle = torch.tensor([[[1.0, 1.0]]]), torch.tensor([[[3.0, 0.0]]])
    assert cosine(*right_angle).item() == pytest.approx(math.sqrt(0.5))


@pytest.mark.parametrize(
    ("mixing", "weight", "gain", "share"),
    [("add", 0.6, 1.0, 1.0), ("add", 0.6, 3.0, 3.0), ("preserving", 0.6, 1.0, 0.8), ("preserving", 0.6, 3.0, 2.4),
     ("preserving", 0.0, 2.0, 2.0), ("preserving", 1.0, 2.0, 0.0)],
)  # fmt: skip
def test_gradient_through_mixing_and_gain(tiny_cascade, mixing, weight, gain, share):
    """The output's sum grows by the projection's share for every frame and clip that its bias reaches."""
    config = tiny_cascade(1, mixing=mixing, residual_weight=weight, projection_gain=gain, rms_scaling="off")
    stage = Cascade(config).stages[0]
    input, target = clips(2, 7)
    sources = {"target": target, "noisy_input": input.clone(), "noisy_target": target}
    stage(sources | {"input": input.requires_grad_()})[0].sum().backward()
    bias = stage.output_projection.bias.grad
    torch.testing.assert_close(bias, torch.full((8,), 2 * 7 * share))
    torch.testing.assert_close(input.grad, torch.full_like(input, weight / 2))  # the residual is the mean of two


def test_a_projections_level_is_held_whatever_its_weights(tiny_cascade):
    """And no gradient would make it louder: the bias, which is all of the projection here, gets none."""
    config = tiny_cascade(1, projection_level=0.5, residual_weight=0.0, rms_scaling="off", spectral_norm=False)
    stage = Cascade(config).stages[0]
    input, target = clips(2, 7, rms_in=3.0, rms_tgt=6.0)
    signals = {"input": input, "noisy_input": input, "target": target}
    for size in (0.1, 1.0, 1e3):
        with torch.no_grad():
            stage.output_projection.weight.zero_()
            stage.output_projection.bias.fill_(size)
        output, trace = stage(signals)
        wanted = 0.5 * ((true_rms(input) ** 2 + true_rms(target) ** 2) / 2).sqrt()
        torch.testing.assert_close(trace.projection_rms.double(), wanted, rtol=1e-3, atol=0)
    stage.zero_grad()
    output.square().sum().backward()
    assert stage.output_projection.bias.grad.abs().max() < 1e-4


@torch.no_grad()
def test_preserving_mixing_keeps_the_rms_of_two_orthogonal_signals(tiny_cascade):
    for weight in (0.1, 0.5, 0.9):
        config = tiny_cascade(1, mixing="preserving", residual_weight=weight, rms_scaling="off")
        stage = Cascade(config).stages[0].eval()
        residual = torch.zeros(1, 8, 4)
        residual[:, :4] = 2.0
        projection = (2.0 * torch.ones(1, 8, 4) - residual).transpose(1, 2)
        stage.output_projection.register_forward_hook(lambda module, inputs, output, value=projection: value)
        names = ("input", "target", "noisy_input", "noisy_target")
        _, trace = stage(dict.fromkeys(names, residual))
        assert trace.alignment.item() == 0
        assert trace.rms_before_scaling.item() == pytest.approx(trace.residual_rms.item(), rel=1e-6)


@pytest.mark.parametrize(
    "values",
    [
        {"mixing": "mean"}, {"mixing": None}, {"projection_gain": 0.0}, {"projection_gain": -1.0},
        {"projection_gain": math.inf}, {"projection_gain": math.nan}, {"residual_weight": 1.01, "mixing": "preserving"},
        {"residual_weight": -0.1, "mixing": "preserving"},
    ],
)  # fmt: skip
def test_bad_mixing_values_name_the_field(values):
    with pytest.raises(UserError, match=rf"^{next(iter(values))}=.*is not allowed; use"):
        StageConfig(**values)
    StageConfig(**values | {"mixing": "add", "projection_gain": 1.0})


def test_mixing_and_gain_survive_json(tiny_cascade):
    config = tiny_cascade(2, mixing="preserving", projection_gain=2.5, residual_weight=0.9)
    assert from_fields(CascadeConfig, json.loads(json.dumps(dataclasses.asdict(config)))) == config


# --- settings overridden for a while ----------------------------------------------------------------------------------

CHANGES = [
    {"residual_weight": 0.1},
    {"residual_source": "previous"},
    {"residual_weight": 0.5, "mixing": "preserving"},
    {"clamp": None, "residual_weight": 0.1},
    {"clamp": (0.9, 1.1), "residual_weight": 0.1, "residual_source": "previous"},
]
CHANGES.append({"projection_gain": 2.5, "residual_weight": 0.1})
CHANGES.append({"projection_level": 1.5, "residual_weight": 0.1})


@torch.no_grad()
def everything(cascade: Cascade) -> list[torch.Tensor]:
    output, traces = cascade(*clips(rms_in=5.7, rms_tgt=5.7))
    return [output, *(value for trace in traces for value in vars(trace).values())]


def fresh(config: CascadeConfig) -> Cascade:
    torch.manual_seed(11)
    return Cascade(config).eval()


@pytest.mark.parametrize("changes", CHANGES)
@pytest.mark.parametrize("error", [False, True])
def test_an_overridden_stage_equals_that_of_a_fresh_cascade(tiny_cascade, changes, error):
    config = tiny_cascade(3)
    cascade = fresh(config)
    before = everything(cascade)
    with contextlib.suppress(KeyboardInterrupt), cascade.stages[-1].override(**changes):
        after = everything(cascade)
        if error:
            raise KeyboardInterrupt
    wanted = everything(fresh(config.with_stage(-1, **changes)))
    assert all(torch.equal(a, b) for a, b in zip(after, wanted, strict=True))
    assert not torch.equal(after[0], before[0])
    assert cascade.stages[-1].config is cascade.stages[-1].rms_scaling.config is config.stages[-1]
    assert all(torch.equal(a, b) for a, b in zip(everything(cascade), before, strict=True))


def test_only_settings_without_a_tensor_are_overridden(tiny_cascade):
    stage = Cascade(tiny_cascade()).stages[-1]
    for name, value in (("width", 12), ("spectral_norm", False), ("num_layers", 2), ("rms_scaling", "learnable")):
        with pytest.raises(AssertionError, match=name), stage.override(**{name: value}):
            pass
    with (
        pytest.raises(UserError, match=r"^residual_weight=.* is not allowed"),
        stage.override(residual_weight=math.nan),
    ):
        pass


# --- dropout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.999])
def test_it_drops_the_share_it_was_given_and_keeps_the_expectation(p):
    torch.manual_seed(0)
    y = Dropout(p)(torch.ones(2_000_003))
    deviation = (p * (1 - p) / y.numel()) ** 0.5
    assert (y == 0).double().mean() == pytest.approx(p, abs=5 * deviation + 1e-5)
    assert y.double().mean() == pytest.approx(1, abs=5 * deviation / (1 - p))
    assert y.unique().numel() == 2


def test_what_is_left_is_scaled_by_the_share_that_is_really_kept():
    torch.manual_seed(0)
    y = Dropout(0.1)(torch.ones(1000))
    kept = 1 - 6554 / 65536  # 0.1 in steps of 2⁻¹⁶
    assert y.max().item() == pytest.approx(1 / kept, rel=1e-7)
    assert abs(1 / kept - 1 / 0.9) < 1e-4


def test_exactly_the_share_of_all_draws_is_dropped(monkeypatch):
    every_draw = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    monkeypatch.setattr(torch, "randint", lambda low, high, shape: every_draw.view(torch.int64))
    assert (Dropout(0.1)(torch.ones(2**16)) == 0).sum() == 6554


def test_neighbours_and_positions_in_a_word_are_independent():
    torch.manual_seed(1)
    dropped = Dropout(0.5)(torch.ones(4, 250_000)) == 0
    flat = dropped.flatten().double()
    for lag in (1, 2, 3, 4, 8):
        assert abs(torch.corrcoef(torch.stack([flat[:-lag], flat[lag:]]))[0, 1]) < 0.005
    for place in range(4):  # of the four draws that come from one word
        assert flat[place::4].mean().item() == pytest.approx(0.5, abs=0.005)


def test_the_gradient_passes_where_the_value_did():
    torch.manual_seed(0)
    x = torch.randn(3, 5, 7, requires_grad=True)
    y = Dropout(0.4)(x)
    y.sum().backward()
    assert torch.equal(x.grad == 0, y == 0)
    kept = y != 0
    assert torch.allclose(x.grad[kept], (y / x).detach()[kept])


def test_torchs_seed_decides_and_every_call_draws_new_numbers():
    x = torch.ones(1000)
    torch.manual_seed(3)
    first, second = Dropout(0.5)(x), Dropout(0.5)(x)
    torch.manual_seed(3)
    assert torch.equal(Dropout(0.5)(x), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("shape", [(1,), (0,), (3, 5), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_shape_and_dtype_stay(shape, dtype):
    y = Dropout(0.1)(torch.ones(shape, dtype=dtype))
    assert (y.shape, y.dtype) == (shape, dtype)


def test_it_is_a_tensor_of_its_own_and_nothing_in_eval_or_at_0():
    x = torch.ones(100)
    Dropout(0.5)(x)
    assert torch.equal(x, torch.ones(100))
    assert torch.equal(Dropout(0.5).eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)


def test_almost_everything_dropped_stays_finite():
    torch.manual_seed(0)
    assert torch.isfinite(Dropout(1 - 1e-9)(torch.ones(100_000))).all()
