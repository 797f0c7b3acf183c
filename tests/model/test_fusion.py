"""The whole model: what the masks leave is all that the cascade sees, and without masks it is the cascade."""

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from lib.codec.mdct import MdctCodec
from lib.model.cascade import Cascade, CascadeConfig, StageTrace
from lib.model.discriminator import Discriminator
from lib.model.fusion import FusionModel, load_model
from lib.model.masks import (
    MASKINGS,
    MaskGenerator,
    MaskingConfig,
    Masks,
    WideMaskGenerator,
    added,
    apply_mask,
    complementarity,
)
from lib.util.errors import UserError

CASCADE = CascadeConfig.reference(2, num_layers=1)
CONFIGS = [MaskingConfig(masking) for masking in MASKINGS]
MASKED = CONFIGS[1:]


def label(config: MaskingConfig) -> str:
    return config.masking


def clips(B: int = 2, T: int = 8, D: int = 128, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two latents of unlike level, their samples of unlike level too."""
    input, target = torch.randn(2, B, D, T, generator=torch.Generator().manual_seed(seed))
    levels = torch.linspace(4, 6, B)[:, None, None]
    return levels * input, 0.7 * levels * target


def true_rms(x: Tensor) -> Tensor:
    """`[B, D, T] → [B]`, in float64 and without the 1e-8."""
    return x.detach().double().pow(2).flatten(1).mean(1).sqrt()


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """At the RMS of x, written a second time."""
    left = x.double() * mask.double()
    before, after = ((y.double() ** 2).mean((1, 2), keepdim=True) + 1e-8 for y in (x, left))
    return left * torch.sqrt(before / after)


def build(masking: MaskingConfig | None = None, cascade: CascadeConfig = CASCADE, seed: int = 0) -> FusionModel:
    torch.manual_seed(seed)
    model = FusionModel(cascade, masking)
    if isinstance(model.mask_generator, WideMaskGenerator):  # whose masks are one half before training
        nn.init.normal_(model.mask_generator.head[-1].weight)
    return model


# --- size -------------------------------------------------------------------------------------------------------------


def test_parameter_counts():
    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    cascade = 4_772_480 + 10_697_600
    assert count(FusionModel()) == cascade
    assert count(FusionModel(masking=MaskingConfig("learned"))) == cascade + 1_083_904 == 16_553_984


def test_the_mask_generator_has_the_cascades_channels(tiny_cascade):
    model = FusionModel(tiny_cascade(), MaskingConfig("learned"))
    assert model.mask_generator.input_analyzer[0].in_channels == 8
    names = {name.split(".")[0] for name in model.state_dict()}
    assert names == {"cascade", "mask_generator"}
    assert all(name.startswith("cascade.") for name in build(MaskingConfig("none")).state_dict())


# --- every masking ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masking", CONFIGS, ids=label)
def test_forward_and_backward_of_every_masking(masking):
    model = build(masking)
    input, target = clips()
    fused = model(input, target)
    assert fused.latents.shape == input.shape
    assert len(fused.traces) == 2
    for trace in fused.traces:
        assert all(getattr(trace, field.name).isfinite().all() for field in dataclasses.fields(StageTrace))
    assert (fused.masks is None) == (masking.masking == "none")
    loss = (fused.latents - target).square().mean()
    if fused.masks is not None:
        loss = loss + complementarity(fused.masks).mean()
    loss.backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert sum(p.grad.abs().sum() for p in model.cascade.parameters()) > 0
    if masking.masking == "learned":
        silent = [n for n, p in model.mask_generator.named_parameters() if not p.grad.any()]
        assert not silent


@pytest.mark.parametrize("masking", CONFIGS, ids=label)
@pytest.mark.parametrize("T", [1, 2, 26, 60])
def test_any_length(tiny_cascade, masking, T):
    model = build(masking, tiny_cascade())
    input, target = clips(T=T, D=8)
    output = model(input, target).latents
    assert output.shape == input.shape
    assert output.isfinite().all()
    output.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("masking", CONFIGS, ids=label)
def test_every_sample_is_fused_by_itself(tiny_cascade, masking):
    model = build(masking, tiny_cascade()).eval()
    input, target = clips(3, 30, 8)
    together = model(input, target)
    for b in range(3):
        alone = model(input[b : b + 1], target[b : b + 1])
        torch.testing.assert_close(alone.latents[0], together.latents[b], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("silent", ["input", "target", "both"])
def test_silent_clips_are_fused_without_a_nan(tiny_cascade, silent):
    model = build(MaskingConfig("learned"), tiny_cascade())
    input, target = clips(D=8)
    input, target = input * (silent == "target"), target * (silent == "input")
    output = model(input, target).latents
    assert output.isfinite().all()
    output.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# --- without masks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_without_masking_it_is_the_cascade_bit_for_bit(training):
    config = dataclasses.replace(CASCADE, anti_cheating=0.3)
    outputs, gradients = [], []
    for model in (build(cascade=config), build(MaskingConfig("none"), config), None):
        if model is None:
            torch.manual_seed(0)
            model = Cascade(config)
        model.train(training)
        torch.manual_seed(1)  # dropout and noise
        latents, traces, *rest = model(*clips())
        assert not rest or rest[0] is None  # no masks
        latents.square().mean().backward()
        outputs.append((latents, *(getattr(t, field.name) for t in traces for field in dataclasses.fields(StageTrace))))
        gradients.append([p.grad for p in model.parameters()])
    for others in (outputs, gradients):
        for other in others[:2]:
            assert all(torch.equal(a, b) for a, b in zip(other, others[2], strict=True))


# --- what the cascade sees --------------------------------------------------------------------------------------------


def seen_by_stages(model: FusionModel) -> list[dict[str, Tensor]]:
    """What each stage is given in the passes to come."""
    seen = []
    for stage in model.cascade.stages:
        stage.register_forward_pre_hook(lambda module, inputs: seen.append(dict(inputs[0])))
    return seen


@torch.no_grad()
@pytest.mark.parametrize("masking", MASKED, ids=label)
def test_residuals_and_wanted_rms_are_of_the_masked_latents(masking):
    model = build(masking).eval()
    seen = seen_by_stages(model)
    input, target = clips(T=40)
    fused = model(input, target)
    wanted = {"input": masked(input, fused.masks.input), "target": masked(target, fused.masks.target)}
    for sources in seen:
        for name, x in wanted.items():
            torch.testing.assert_close(sources[name].double(), x, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(sources[f"noisy_{name}"].double(), x, rtol=1e-5, atol=1e-6)

    first, second = fused.traces
    residual = (wanted["input"] + wanted["target"]) / 2
    torch.testing.assert_close(first.residual_rms.double(), true_rms(residual), rtol=1e-5, atol=0)
    residual = (wanted["input"] + wanted["target"] + seen[1]["previous"]) / 3
    torch.testing.assert_close(second.residual_rms.double(), true_rms(residual), rtol=1e-5, atol=0)
    goal = ((true_rms(input) ** 2 + true_rms(target) ** 2) / 2).sqrt()  # which the masks leave as they were
    for trace in fused.traces:
        torch.testing.assert_close((trace.target_scale * trace.rms_before_scaling).double(), goal, rtol=1e-4, atol=0)

    unmasked = true_rms((input + target) / 2)
    assert ((first.residual_rms / unmasked - 1).abs() > 1e-5).all()


@torch.no_grad()
def test_a_clip_that_the_mask_leaves_out_altogether_counts_for_nothing():
    """Where every element is the input's, neither residual nor target scale depends on the other clip."""
    model = build(MaskingConfig("learned")).eval()
    seen = seen_by_stages(model)
    input, target = clips(T=8)
    all_input = Masks(torch.ones_like(input), torch.zeros_like(target))
    fused = model(input, target, all_input)
    assert not fused.masks.target.any()
    assert not seen[0]["target"].any()
    torch.testing.assert_close(fused.traces[0].residual_rms.double(), true_rms(input) / 2, rtol=1e-4, atol=0)
    goal = true_rms(input) / math.sqrt(2)  # of a clip and of silence
    for trace in fused.traces:
        torch.testing.assert_close((trace.target_scale * trace.rms_before_scaling).double(), goal, rtol=1e-4, atol=0)
    assert torch.equal(model(input, 3 * target.flip(2), all_input).latents, fused.latents)


def test_noise_is_added_after_the_masks():
    """Its level is that of what they left, and it falls on masked places too."""
    model = build(MaskingConfig("learned"), dataclasses.replace(CASCADE, anti_cheating=0.5))
    seen = seen_by_stages(model)
    input, target = clips(8, 100)
    given = torch.zeros_like(input)
    given[:, :64] = 1.0
    fused = model(input, target, Masks(given, 1 - given))
    sources = seen[0]
    for name, mask in zip(("input", "target"), fused.masks, strict=True):
        noise = sources[f"noisy_{name}"] - sources[name]
        torch.testing.assert_close(true_rms(noise) / true_rms(sources[name]), torch.full((8,), 0.5).double(), rtol=0.05,
                                   atol=0)  # fmt: skip
        assert not sources[name][mask == 0].any()
        assert noise[mask == 0].std() == pytest.approx(noise[mask == 1].std().item(), rel=0.05)


@torch.no_grad()
@pytest.mark.parametrize("masking", MASKED, ids=label)
def test_the_masks_returned_are_those_applied(masking):
    model = build(masking).eval()
    input, target = clips(T=40)
    fused = model(input, target)
    again, _ = model.cascade(masked(input, fused.masks.input).float(), masked(target, fused.masks.target).float())
    torch.testing.assert_close(again, fused.latents, rtol=1e-4, atol=1e-4)
    of_its_own = model.make_masks(input, target)
    assert all(torch.equal(a, b) for a, b in zip(of_its_own, fused.masks, strict=True))
    for mask in fused.masks:
        assert mask.min() >= 0
        assert mask.max() <= 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masking", CONFIGS, ids=label)
def test_masks_are_computed_once_a_pass(tiny_cascade, monkeypatch, masking, training):
    calls = []
    for kind in (MaskGenerator, WideMaskGenerator):
        generate = kind.forward
        monkeypatch.setattr(kind, "forward", lambda *args, run=generate: calls.append(args[0]) or run(*args))
    model = build(masking, tiny_cascade(3)).train(training)
    for passes in (1, 2, 3):
        model(*clips(D=8))
        assert calls == passes * [model.mask_generator] * (masking.masking != "none")


@torch.no_grad()
@pytest.mark.parametrize("masking", ["wide", "learned"])
def test_without_stages_the_output_is_the_sum_of_what_the_masks_take(masking):
    model = build(MaskingConfig(masking, restore_rms=False), CascadeConfig.reference(0))
    input, target = clips()
    fused = model(input, target)
    assert torch.equal(fused.latents, fused.masks.input * input + fused.masks.target * target)
    assert fused.traces == ()
    given = Masks(torch.ones_like(input), torch.zeros_like(input))
    assert torch.equal(model(input, target, given).latents, input)


@torch.no_grad()
def test_a_model_leaves_its_stages_out_and_keeps_its_masks(tiny_cascade):
    torch.manual_seed(0)
    model, (input, target) = FusionModel(tiny_cascade(), MaskingConfig("learned")).eval(), torch.randn(2, 2, 8, 20)
    alone, masks = model.without_stages()(input, target), model.make_masks(input, target)
    assert torch.equal(alone.masks.input, masks.input)
    assert alone.traces == ()
    taken = [apply_mask(x, mask) for x, mask in zip((input, target), masks, strict=True)]
    torch.testing.assert_close(alone.latents, sum(taken))
    assert len(model(input, target).traces) == 2


def test_without_stages_the_amplitudes_of_roots_are_added():
    """Masks of one half and m in latents are gains of 1/8 and m³ of amplitudes; through mdct, sounds add up."""
    model = build(MaskingConfig("wide", restore_rms=False, root=3), CascadeConfig.reference(0))
    input, target = clips()
    masks = Masks(torch.full_like(input, 0.5), torch.rand_like(input))
    fused = model(input, target, masks).latents
    torch.testing.assert_close(fused**3, input**3 / 8 + (masks.target * target) ** 3, rtol=1e-3, atol=1e-2)
    sounds = [MdctCodec().decode(x) for x in (model(input, target, masks).latents, input / 2, masks.target * target)]
    torch.testing.assert_close(sounds[0], sounds[1] + sounds[2], rtol=1e-3, atol=1e-4)


def test_the_sum_of_amplitudes_has_a_finite_gradient_at_0():
    x = torch.zeros(1, 1, 4).requires_grad_()
    added(x, torch.tensor([[[0.0, 1e-3, 1.0, -5.0]]]), 3).sum().backward()
    assert x.grad.isfinite().all()


def test_what_a_given_mask_leaves_out_counts_by_its_rms_alone(tiny_cascade):
    """The gradient there is the clip itself, times one number a sample; where the mask takes it, it is not."""
    model = build(MaskingConfig("learned"), tiny_cascade()).eval()
    input, target = (x.requires_grad_() for x in clips(D=8))
    even = (torch.arange(8) % 2 == 0).float()[:, None].expand_as(input)
    (model(input, target, Masks(even, 1 - even)).latents ** 3).sum().backward()
    for x, left_out in ((input, slice(1, None, 2)), (target, slice(0, None, 2))):
        cosines = torch.cosine_similarity(x.grad[:, left_out].flatten(1), x[:, left_out].flatten(1)).abs()
        torch.testing.assert_close(cosines, torch.ones(2), rtol=1e-5, atol=0)
        taken = slice(1 - left_out.start, None, 2)
        cosines = torch.cosine_similarity(x.grad[:, taken].flatten(1), x[:, taken].flatten(1)).abs()
        assert (cosines < 0.9).all()


@torch.no_grad()
@pytest.mark.parametrize("stages", [1, 2, 3, None])
@pytest.mark.parametrize("masking", CONFIGS, ids=label)
def test_the_first_stages_alone_see_the_same_masked_latents(tiny_cascade, masking, stages):
    model = build(masking, tiny_cascade(3)).eval()
    seen = seen_by_stages(model)
    input, target = clips(D=8)
    whole, fewer = model(input, target), model(input, target, stages=stages)
    wanted = stages or 3
    assert len(fewer.traces) == wanted
    assert len(seen) == 3 + wanted
    for before, now in zip(seen[:wanted], seen[3:], strict=True):
        assert all(torch.equal(before[name], now[name]) for name in now)
    following = [*(sources["previous"] for sources in seen[1:3]), whole.latents]  # what each stage handed on
    assert torch.equal(fewer.latents, following[wanted - 1])
    assert (fewer.masks is None) == (masking.masking == "none")
    if fewer.masks is not None:
        assert all(torch.equal(a, b) for a, b in zip(fewer.masks, whole.masks, strict=True))


# --- the model of a run -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["best", "last"])
@pytest.mark.parametrize("masking", MASKINGS)
def test_a_runs_model_is_rebuilt_from_its_config_and_weights(tiny_cascade, masking, which):
    trained = build(MaskingConfig(masking), tiny_cascade())
    config = {"cascade": dataclasses.asdict(trained.cascade.config), "masking": dataclasses.asdict(trained.masking)}
    asked = []

    def load_weights(model: nn.Module, checkpoint: str) -> None:
        asked.append(checkpoint)
        model.eval().load_state_dict(trained.state_dict())

    run = SimpleNamespace(path=Path("run"), config=config, check_codec=asked.append, load_weights=load_weights)
    model = load_model(run, which, codec_fingerprint="f")
    assert asked == ["f", which]
    assert torch.equal(model(*clips(D=8)).latents, trained.eval()(*clips(D=8)).latents)
    run.config = {"preset": "demo"}
    with pytest.raises(UserError, match=r"^run/config\.json: describes no model; give a run"):
        load_model(run)


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masking", CONFIGS, ids=label)
@pytest.mark.parametrize(
    ("first", "second"),
    [((2, 8, 9), (2, 8, 10)), ((2, 7, 9), (2, 7, 9)), ((2, 8, 9), (3, 8, 9)), ((8, 9), (8, 9)), ((2, 8, 0), (2, 8, 0))],
)
def test_latents_of_other_shapes_are_named(tiny_cascade, masking, first, second):
    model = build(masking, tiny_cascade())
    with pytest.raises(ValueError, match=r"input and target must both be \[B, 8, T\] with T ≥ 1, got \[.*\] and \["):
        model(torch.ones(first), torch.ones(second))


def test_the_discriminators_gradient_reaches_mask_generator_and_cascade():
    model = build(MaskingConfig("learned"))
    Discriminator()(model(*clips()).latents).sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert any(p.grad.any() for p in model.mask_generator.parameters())


def test_masks_are_float32_under_autocast():
    """Means of masks are what the source documents measure: in bfloat16 they would move in steps of 0.004."""
    model = build(MaskingConfig("learned")).eval()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        masks = model(*clips()).masks
    assert masks.input.dtype == masks.target.dtype == torch.float32
