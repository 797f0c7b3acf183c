"""A step of the fusion model: it never waits for the device, skips the update if a value is not finite, compiles whole,
and reports by the names that metrics.jsonl and the figures use."""

import dataclasses
import math

import pytest
import torch
from accelerate import Accelerator
from conftest import TinyCodec, TinyDiscriminator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lib.training.fusion_learner
import lib.training.losses
from lib.codec.mdct import MdctCodec
from lib.model.cascade import StageTrace
from lib.model.fusion import Fusion, FusionModel
from lib.model.masks import MaskingConfig, Masks
from lib.presets import PRESETS
from lib.training.config import AdversaryConfig, CurriculumConfig, TrainConfig
from lib.training.fusion_learner import FusionLearner, parameter_groups, step_metrics
from lib.training.learner import StepInfo, gradient_norms, to_floats
from lib.training.losses import LossConfig

CONFIG = TrainConfig(learning_rate=0.01, clip=1.0)
TRACE = [field.name for field in dataclasses.fields(StageTrace)]


def clips(seed=0, B=3, D=8, T=12):
    generator = torch.Generator().manual_seed(seed)
    return tuple(5.0 * torch.randn(2, B, D, T, generator=generator))


@pytest.fixture
def build(monkeypatch, tiny_cascade):
    """`build(TrainConfig fields)`: a learner of small models."""
    monkeypatch.setattr(lib.training.fusion_learner, "Discriminator", TinyDiscriminator)

    def learner(masking="learned", dim=8, codec=None, cascade=None, seed=0, **changes):
        torch.manual_seed(seed)
        cascade = cascade or dataclasses.replace(tiny_cascade(anti_cheating=0.1), latent_dim=dim)
        config = dataclasses.replace(CONFIG, **changes)
        codec = codec or TinyCodec()
        model = FusionModel(cascade, MaskingConfig(masking))
        return FusionLearner(config, model, Accelerator(mixed_precision="no"), codec)

    return learner


def weights(learner):
    return {name: value.detach().clone() for name, value in learner.unwrapped_model.named_parameters()}


# --- no wait ----------------------------------------------------------------------------------------------------------

WAITS = ("local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "unique", "bincount")


class WaitsForbidden(TorchDispatchMode):
    """An operator whose result the host must wait for is an error: on a GPU it would be a stop. Copies
    between host and device do not show here."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__.lstrip("_")
        if name in WAITS:
            raise AssertionError(f"the step waits in aten::{name}")
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_with_everything_on_never_asks_what_a_tensor_holds(build, precision, monkeypatch):
    every = {name: weight or 0.1 for name, weight in PRESETS["reference"].train.loss.weights.items()}
    loss = LossConfig(**every, window_seconds=None)  # a shorter one is drawn on the host
    adversary = AdversaryConfig(discriminator_learning_rate=1e-3)
    learner = build(
        dim=128,
        codec=MdctCodec(),
        loss=loss,
        adversary=adversary,
        curriculum=CurriculumConfig(noise_rate=0.2),
        ema=0.9,
        precision=precision,
        warmup_steps=3,
    )
    batches = [clips(seed, D=128, T=20) for seed in (0, 1)]
    learner.train_step(batches, StepInfo(0, 1))  # fills the caches
    with WaitsForbidden():
        metrics = learner.train_step(batches, StepInfo(1, 1, progress=0.5))
    assert {
        "loss",
        "grad_norm",
        "loss/stft",
        "loss/onsets_left",
        "discriminator/loss",
        "masks/complementarity",
    } <= metrics.keys()
    assert all(isinstance(value, torch.Tensor) and value.numel() == 1 for value in metrics.values())


def test_the_guard_notices_a_wait():
    with WaitsForbidden(), pytest.raises(AssertionError, match="waits in aten::local_scalar_dense"):
        torch.ones(()).item()
    with WaitsForbidden(), pytest.raises(AssertionError, match="waits"):
        bool(torch.ones(3).isfinite().all())


# --- values that are not finite ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_from_a_bad_step_on_every_update_is_skipped(build, bad):
    learner = build()
    learner.train_step([clips()], StepInfo(0))
    before, steps = weights(learner), optimizer_steps(learner)
    input, target = clips(1)
    input[0, 0, 0] = bad
    metrics = learner.train_step([(input, target)], StepInfo(1))
    assert not metrics["loss"].isfinite()
    metrics = learner.train_step([clips(2)], StepInfo(2))  # a good one that follows
    assert metrics["loss"].isfinite()
    assert metrics["grad_norm"] > 0
    for name, value in weights(learner).items():
        assert torch.equal(value, before[name]), name
    assert optimizer_steps(learner) == steps


def test_good_steps_change_every_weight(build):
    """What the test above must be able to tell."""
    learner = build()
    before = weights(learner)
    learner.train_step([clips()], StepInfo(0))
    assert all(not torch.equal(value, before[name]) for name, value in weights(learner).items())
    assert optimizer_steps(learner) == {1.0}


def test_a_discriminator_with_a_bad_gradient_keeps_its_weights(build):
    learner = build(adversary=AdversaryConfig(discriminator_learning_rate=1e-2))
    model = learner.adversary.model
    before = [p.detach().clone() for p in model.parameters()]
    fake, real = torch.randn(2, 3, 8, 12)
    fake[0, 0, 0] = math.nan
    assert not learner.adversary.train_step([(fake, real)])["discriminator/loss"].isfinite()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    learner.adversary.train_step([(fake.nan_to_num(), real)])  # its own next step is taken again
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_after_a_bad_loss_the_discriminator_skips_its_update_too(build):
    """The outputs are finite, so by its own gradient the discriminator would have learned, and the later search for the
    cause would use another one."""
    loss = LossConfig(adversarial_weight=1.0)
    learner = build(loss=loss, adversary=AdversaryConfig(discriminator_learning_rate=1e-2))
    model = learner.adversary.model
    critic = learner.adversary.critic
    learner.adversary.critic = lambda step: lambda latents: critic(step)(latents) * math.inf
    before = [p.detach().clone() for p in model.parameters()]
    metrics = learner.train_step([clips()], StepInfo(0))
    assert not metrics["loss"].isfinite()
    assert metrics["discriminator/grad_norm"].isfinite()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def optimizer_steps(learner):
    return {state["step"].item() for state in learner.optimizer.state.values()}


# --- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.fixture
def compiled_without_a_compiler(monkeypatch):
    """Traced as torch.compile traces, then run as it is: what has a graph break is an error, and no C++ is needed."""
    compile = FusionModel.compile
    monkeypatch.setattr(FusionModel, "compile", lambda model, **options: compile(model, backend="eager", **options))
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("masking", ["learned", "wide", "none"])
def test_a_compiled_model_has_no_graph_break_and_takes_the_same_steps(build, compiled_without_a_compiler, masking):
    config = {"masking": masking, "curriculum": CurriculumConfig(noise_rate=0.1)}
    learners = build(**config), build(**config, compile=True)
    metrics = []
    for learner in learners:
        torch.manual_seed(1)
        batches = [clips(seed, B=B) for seed, B in ((0, 3), (1, 3), (2, 2))]  # an epoch ends with a smaller batch
        metrics.append([learner.train_step([batch], StepInfo(i, 2)) for i, batch in enumerate(batches)])
    for plain, compiled in zip(*metrics, strict=True):
        for name, value in plain.items():
            torch.testing.assert_close(compiled[name], value, rtol=1e-5, atol=1e-6, msg=name)
    for name, value in weights(learners[0]).items():
        torch.testing.assert_close(weights(learners[1])[name], value, rtol=1e-4, atol=1e-5)
    assert learners[1].unwrapped_model.state_dict().keys() == learners[0].unwrapped_model.state_dict().keys()


def test_a_graph_break_would_be_an_error(build, compiled_without_a_compiler, monkeypatch):
    forward = FusionModel.forward

    def with_a_wait(model, input, target):
        return forward(model, input, target * (1.0 if input.sum().item() > 0 else 2.0))

    monkeypatch.setattr(FusionModel, "forward", with_a_wait)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        build(compile=True).train_step([clips()], StepInfo(0))


def test_the_ema_weights_are_a_model_of_their_own(build):
    learner = build(ema=0.5, loss=LossConfig())
    assert learner.eval_model is learner.ema_model is not learner.unwrapped_model
    assert build().eval_model is not None
    learner.train_step([clips()], StepInfo(0))
    averaged = dict(learner.ema_model.named_parameters())
    assert any(not torch.equal(value, averaged[name]) for name, value in weights(learner).items())


# --- parameter groups -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("agent_rate", "expected"), [(None, 3e-4), (1e-3, 1e-3)])
def test_every_parameter_is_in_one_group_with_its_rate(tiny_cascade, agent_rate, expected):
    model = FusionModel(tiny_cascade(), MaskingConfig("learned"))
    config = TrainConfig(learning_rate=3e-4, agent_learning_rate=agent_rate)
    groups = parameter_groups(model, config)
    rates = [(id(p), group["full_lr"]) for group in groups for p in group["params"]]
    assert len(rates) == len(dict(rates)) == len(list(model.parameters()))
    of = dict(rates)
    for name, parameter in model.named_parameters():
        assert of[id(parameter)] == (expected if name.startswith("mask_generator.") else 3e-4), name


def test_without_a_mask_generator_there_is_one_group(tiny_cascade):
    model = FusionModel(tiny_cascade(), MaskingConfig("none"))
    (group,) = parameter_groups(model, TrainConfig(agent_learning_rate=1.0))
    assert group["full_lr"] == 1e-4
    assert len(group["params"]) == len(list(model.parameters()))


# --- reports ----------------------------------------------------------------------------------------------------------


def trace(start: float) -> StageTrace:
    """Field k of two clips: start + k and start + k + 1."""
    return StageTrace(*(torch.tensor([start + k, start + k + 1.0]) for k in range(len(TRACE))))


def test_step_metrics_are_the_terms_and_the_means_of_the_traces():
    masks = Masks(torch.tensor([0.5, 1.0])[:, None, None].expand(2, 3, 4), torch.full((2, 3, 4), 0.5))
    fusion = Fusion(torch.zeros(2, 3, 4), (trace(0), trace(10)), masks)
    terms = {"input_mse": torch.tensor(2.0), "novelty": torch.tensor(0.25)}
    found = {name: value.item() for name, value in step_metrics(terms, fusion).items()}
    stages = {f"stage{i}/{name}": 10 * i + k + 0.5 for i in range(2) for k, name in enumerate(TRACE)}
    expected = {"loss/input_mse": 2.0, "loss/novelty": 0.25, "masks/complementarity": 1 - (0.25 + 0.5) / 2} | stages
    assert found == pytest.approx(expected)


def test_without_masks_there_is_no_complementarity():
    found = step_metrics({}, Fusion(torch.zeros(2, 3, 4), (trace(0),), None))
    assert set(found) == {f"stage0/{name}" for name in TRACE}


def test_metrics_keep_no_graph():
    terms = {"input_mse": torch.tensor(2.0, requires_grad=True) * 3}
    masks = Masks(*(torch.rand(2, 3, 4, requires_grad=True) for _ in range(2)))
    found = step_metrics(terms, Fusion(torch.zeros(2, 3, 4), (trace(0),), masks))
    assert not found["masks/complementarity"].requires_grad
    assert all(isinstance(value, float) for value in to_floats(found).values())


def norms(learner) -> dict[str, float]:
    return to_floats(gradient_norms(learner.parts(learner.unwrapped_model)))


def test_gradient_norms_of_every_part(build, tiny_cascade):
    learner = build(cascade=tiny_cascade(width=20))
    learner.model(*torch.randn(2, 2, 8, 6)).latents.square().sum().backward()
    found = norms(learner)
    squares: dict[str, float] = {}
    for name, parameter in learner.unwrapped_model.named_parameters():
        parts = name.split(".")
        part = f"stage{parts[2]}/{parts[3]}" if parts[0] == "cascade" else parts[0]
        squares[part] = squares.get(part, 0.0) + parameter.grad.double().square().sum().item()
    expected = {f"grad_norm/{part}": math.sqrt(square) for part, square in squares.items()}
    assert found == pytest.approx(expected, rel=1e-4)
    names = ("input_projection", "input_norm", "layers", "post_norm", "output_projection")
    wide = {f"grad_norm/stage{i}/{name}" for i in range(2) for name in names}
    assert wide | {"grad_norm/mask_generator"} == set(found)
    total = math.sqrt(sum(p.grad.double().square().sum().item() for p in learner.unwrapped_model.parameters()))
    assert math.sqrt(sum(norm**2 for norm in found.values())) == pytest.approx(total, rel=1e-5)  # nothing is left out


def test_parts_without_gradients_are_left_out(build):
    learner = build(masking="none")
    assert gradient_norms(learner.parts(learner.unwrapped_model)) == {}
    learner.unwrapped_model.cascade.stages[1].post_norm.bias.grad = torch.full((24,), 2.0)
    assert norms(learner) == pytest.approx({"grad_norm/stage1/post_norm": math.sqrt(24 * 4)})


def test_the_share_of_noise_is_reported_where_there_can_be_noise(build):
    noisy = build(curriculum=CurriculumConfig(noise_rate=0.1, noise_start=2))
    assert [noisy.facts(StepInfo(9, epoch)) for epoch in (2, 4, 9)] == [{"noise_share": x} for x in (0.0, 0.2, 0.3)]
    assert build().facts(StepInfo(9, 9)) == {}


def test_every_stage_with_a_large_target_scale_is_warned_of(build):
    row = {"stage0/target_scale": 1.31, "stage1/target_scale": 1.3}
    assert build().warnings(row) == {0: "stage 0 has a target scale of 1.31, above 1.3"}
    assert list(build().warnings(dict.fromkeys(row, 2.0))) == [0, 1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_output_is_fake_and_the_clean_latents_of_both_clips_are_real(build, precision):
    learner = build(
        adversary=AdversaryConfig(discriminator_learning_rate=1e-2),
        curriculum=CurriculumConfig(noise_rate=0.2),
        precision=precision,
    )
    input, target = batch = clips()
    _, _, (fake, real) = learner.loss(learner.model, batch, StepInfo(0, 1))
    assert fake.shape == input.shape
    assert fake.dtype == torch.float32
    assert torch.equal(real, torch.cat([input, target]))
    assert build().loss(learner.model, batch, StepInfo(0, 1))[2] is None  # without a discriminator


# --- bf16 -------------------------------------------------------------------------------------------------------------

# matrix products, attention, what is done to their outputs, and views: nothing that sums squares or takes roots
ONSETS = LossConfig(onsets_weight=1.0)
IN_BF16 = {"_to_copy", "addmm", "mm", "bmm", "matmul", "linear", "convolution", "mkldnn_rnn_layer", "gelu", "relu"}
IN_BF16 |= {"_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention", "native_layer_norm"}
IN_BF16 |= {"native_dropout", "mul", "mul_", "add", "add_", "sigmoid", "clone", "cat", "empty", "empty_like", "copy_"}
IN_BF16 |= {"t", "transpose", "permute", "view", "reshape", "_unsafe_view", "slice", "select", "expand", "detach"}
IN_BF16 |= {"unsqueeze", "squeeze", "as_strided", "alias", "split", "unbind", "native_group_norm"}


class InBf16(TorchDispatchMode):
    """The names of the operations that give bf16."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if any(x.dtype == torch.bfloat16 for x in tree_leaves(result) if isinstance(x, torch.Tensor)):
            self.names.add(function.overloadpacket.__name__)
        return result


@pytest.mark.parametrize("masking", ["learned", "wide"])
def test_in_bf16_are_matrix_products_and_what_is_done_to_their_outputs(build, masking):
    every = {name: weight or 0.1 for name, weight in PRESETS["reference"].train.loss.weights.items()}
    adversary = AdversaryConfig(discriminator_learning_rate=1e-3)
    learner = build(
        masking, dim=128, codec=MdctCodec(), loss=LossConfig(**every), adversary=adversary, ema=0.9, precision="bf16"
    )
    batch = clips(D=128, T=20)
    with InBf16() as seen:
        loss, metrics, _ = learner.loss(learner.model.train(), batch, StepInfo(0))
    assert {"addmm", "mm", "linear", "convolution"} & seen.names
    assert seen.names <= IN_BF16, seen.names - IN_BF16
    assert {x.dtype for x in (loss, *metrics.values())} == {torch.float32}


@pytest.mark.parametrize("masking", ["learned", "wide"])
def test_fifty_steps_in_bf16_stay_within_the_spread_of_seeds(build, masking):
    def curve(precision, seed):
        learner = build(masking, 128, MdctCodec(), None, seed, precision=precision, loss=ONSETS, learning_rate=1e-3)
        losses = [learner.train_step([clips(step, 2, 128, 20)], StepInfo(step))["loss"] for step in range(50)]
        return torch.stack(losses).unflatten(0, (5, 10)).mean(dim=1)

    seeds = torch.stack([curve("fp32", seed) for seed in range(3)])
    spread, away = seeds.amax(dim=0) - seeds.amin(dim=0), (curve("bf16", 0) - seeds[0]).abs()
    assert seeds[:, -1].mean() < seeds[:, 0].mean()
    assert (away > 0).any()
    assert (away < spread).all(), (away, spread)
