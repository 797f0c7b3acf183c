"""Every part of the project on a GPU that is not there. Not collected with the other tests: importing the device
changes torch, so `tests/test_gpu.py` runs these in a process of their own."""

import copy
import dataclasses
import sys
from pathlib import Path

import gpu.device
import pytest
import torch
from accelerate import Accelerator
from conftest import encodec_model
from gpu.device import GPU, Placed, simulated_gpu, syncs, unordered, uploads
from superres.conftest import COMPLETION, DENOISER, DISCRIMINATORS, LOOP, VAE, VOCODER
from torch import nn
from torch.utils.data import Subset

import lib.superres.training
from lib.codec.codec import placed
from lib.codec.encodec import EncodecCodec
from lib.codec.mdct import MdctCodec
from lib.data.latents import LatentPairs
from lib.evaluation.baselines import measure_fusions
from lib.evaluation.metrics import evaluate_fusion
from lib.listening.render import Settings, render
from lib.model.cascade import CascadeConfig
from lib.model.fusion import FusionModel, load_model
from lib.model.masks import MaskingConfig
from lib.presets import load_preset
from lib.superres.completion import Completion
from lib.superres.evaluation import evaluate
from lib.superres.resolver import Restoration, SuperResolver
from lib.superres.training import PartConfig, VaeTraining, VocoderTraining, train_part
from lib.superres.unet import Denoiser
from lib.superres.vae import MelVae
from lib.superres.vocoder import Vocoder
from lib.training.config import AdversaryConfig, CurriculumConfig, TrainConfig
from lib.training.fusion_learner import FusionLearner, fusion_trainer, run_settings
from lib.training.learner import Learner, StepInfo
from lib.training.losses import LossConfig
from lib.training.run import Run
from lib.training.trainer import Trainer

sys.path.append(str(Path(__file__).parents[1] / "record"))
import upper_band

pytest_plugins = ("superres.conftest",)  # its music
FRAMES = 40
ALL_TERMS = LossConfig(**dict.fromkeys(LossConfig().weights, 0.1), window_seconds=0.3)


@pytest.fixture(autouse=True)
def on_gpu(monkeypatch):
    """Everything below is on the device; what waits or uploads is counted from here on."""
    monkeypatch.setattr(Accelerator, "device", property(lambda _: GPU))
    syncs.clear(), uploads.clear(), unordered.clear()
    with simulated_gpu():
        yield


@pytest.fixture(scope="module")
def encodec_codec():
    return EncodecCodec(encodec_model(), "0" * 64)


def clips(seed: int = 0, batch: int = 2, frames: int = FRAMES) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(5.0 * torch.randn(2, batch, 128, frames, generator=torch.Generator().manual_seed(seed)))


def cascade(**changes) -> CascadeConfig:
    return CascadeConfig.reference(2, num_layers=1, ffn_mult=1, anti_cheating=0.1, **changes)


def learner(codec, masking: str, dropout: float = 0.1) -> FusionLearner:
    torch.manual_seed(0)
    adversary = AdversaryConfig(discriminator_learning_rate=1e-3)
    curriculum = CurriculumConfig(noise_rate=0.2)
    config = TrainConfig(loss=ALL_TERMS, adversary=adversary, curriculum=curriculum, ema=0.9)
    model = FusionModel(cascade(dropout=dropout), MaskingConfig(masking))
    return FusionLearner(config, model, Accelerator(), codec)


# --- the device itself ------------------------------------------------------------------------------------------------


def test_it_refuses_what_a_gpu_refuses():
    x, y = torch.randn(2, 3, device="cuda"), torch.randn(2, 3)
    assert isinstance(x, Placed)
    for mixed in (lambda: x + y, lambda: x @ y.T, lambda: torch.cat([x, y])):
        with pytest.raises(RuntimeError, match="same device"):
            mixed()
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(2, device="cuda", generator=torch.Generator())
    assert torch.equal((x + torch.tensor(1.0)).cpu(), x.cpu() + 1)  # a CPU's scalar is welcome


def test_it_counts_where_the_host_waits():
    x = torch.arange(4.0, device="cuda")
    square = torch.eye(3, device="cuda")
    for waits in (
        *(lambda: x.sum().item(), lambda: bool(x.sum() > 0), x.tolist, x.cpu, lambda: x[x > 1]),
        *(lambda: torch.linalg.solve(square, square), lambda: torch.linalg.matrix_norm(square, 2)),
        *(lambda: torch.unique(x), lambda: torch.unique_consecutive(x), lambda: torch.bincount(x.long())),
        *(lambda: torch.allclose(x, x), lambda: torch.repeat_interleave(x, x.long())),
    ):
        syncs.clear()
        waits()
        assert syncs.total() >= 1, waits
    syncs.clear()
    _ = torch.where(x > 1, x, 0 * x).masked_fill(x > 2, 0)
    torch.ones(4).to("cuda", non_blocking=True)
    assert syncs + uploads == {}


def test_it_counts_what_the_host_uploads():
    x, ones = torch.arange(4.0, device="cuda"), torch.ones(4)
    places = torch.tensor([0, 1])

    def assigned():
        x[places] = torch.tensor(1.0)

    for count, sends in (
        (1, lambda: ones.to("cuda")),
        (1, lambda: torch.tensor([1.0, 2.0], device="cuda")),
        (1, lambda: x.new_tensor([1.0])),
        (1, lambda: x.copy_(ones)),
        (1, lambda: x[:2].copy_(ones[:2])),
        (1, lambda: torch.ones(1 << 15).to("cuda", non_blocking=True)),
        (0, lambda: torch.ones(1 << 15).pin_memory().to("cuda", non_blocking=True)),
        (1, lambda: x[places]),
        (2, assigned),
    ):
        uploads.clear()
        sends()
        assert uploads.total() == count, sends


def test_it_counts_gradients_that_a_gpu_would_sum_in_any_order():
    x = torch.randn(1, 1, 8, device="cuda", requires_grad=True)
    nn.functional.pad(x, (2, 2)).square().sum().backward()
    assert not unordered
    nn.functional.pad(x, (2, 2), mode="reflect").square().sum().backward()
    assert unordered.total() == 1


# --- fusion -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masking", ["learned", "wide"])
def test_after_the_first_step_no_step_waits(masking):
    learning, batch = learner(MdctCodec(), masking), [tuple(x.to(GPU) for x in clips())]
    before = [p.detach().cpu().clone() for p in learning.unwrapped_model.parameters()]
    learning.train_step(batch, StepInfo(0, 1))  # makes the tables
    syncs.clear(), uploads.clear()
    metrics = [learning.train_step(batch, StepInfo(step, 1)) for step in (1, 2)]
    assert syncs + uploads == {}
    assert all(isinstance(value, Placed) for row in metrics for value in row.values())
    after = list(learning.unwrapped_model.parameters())
    moved = [not torch.equal(p.cpu(), old) for p, old in zip(after, before, strict=True)]
    assert sum(moved) > 0.9 * len(moved)


@pytest.mark.parametrize("kind", ["mdct", "encodec"])
def test_a_step_with_all_terms_is_deterministic_and_waits_for_nothing(kind, encodec_codec):
    codec = {"mdct": MdctCodec(), "encodec": encodec_codec}[kind]
    with placed(codec, GPU):
        learning, batch = learner(codec, "learned"), [tuple(x.to(GPU) for x in clips(batch=1))]
        learning.train_step(batch, StepInfo(0, 1))
        syncs.clear(), uploads.clear(), unordered.clear()
        learning.train_step(batch, StepInfo(1, 1))
        assert unordered + syncs + uploads == {}
    if kind == "encodec":
        assert {p.device.type for p in codec.parameters()} == {"cpu"}


def test_a_step_computes_what_the_cpu_computes(monkeypatch):
    rows = {}
    for device in (torch.device("cpu"), GPU):
        monkeypatch.setattr(Accelerator, "device", property(lambda _, device=device: device))
        learning = learner(MdctCodec(), "wide", dropout=0.0)  # which has another generator on a CPU
        torch.manual_seed(1)
        batch = [tuple(x.to(device) for x in clips())]
        rows[device.type] = {name: float(value) for name, value in learning.train_step(batch, StepInfo(0, 0)).items()}
    assert rows["gpu"] == pytest.approx(rows["cpu"], rel=1e-3, abs=1e-4)


def test_training_validation_resume_and_evaluation(tiny_index, tiny_codec, tmp_path, monkeypatch):
    waits, step = [], Trainer.train_step

    def counted(self, batches, places):
        syncs.clear(), uploads.clear()
        step(self, batches, places)
        waits.append(syncs + uploads)

    monkeypatch.setattr(Trainer, "train_step", counted)
    monkeypatch.setattr(gpu.device, "STAGED", 0)  # batches are small here
    pairs = {split: LatentPairs(tiny_index, split) for split in ("train", "val")}
    config = TrainConfig(max_steps=4, checkpoint_every=2, batch_size=2, loss=LossConfig(onsets_weight=0.0), ema=0.9)
    small = dataclasses.replace(cascade(num_heads=2), latent_dim=8)
    settings = run_settings(tiny_index, tiny_codec, small, config, MaskingConfig("learned"))
    run = Run.create(tmp_path / "run", settings)
    fusion_trainer(run, pairs, tiny_codec).run_to_end(progress=False)
    more = dict(settings, train=settings["train"] | {"max_steps": 6})
    longer = Run.create(tmp_path / "longer", more)
    fusion_trainer(longer, pairs, tiny_codec).run_to_end(progress=False)
    (run.path / "config.json").write_text((longer.path / "config.json").read_text())
    fusion_trainer(Run.open(run.path), pairs, tiny_codec).run_to_end(progress=False)
    assert [row["step"] for row in run.metrics("val")] == [2, 4, 6]
    assert waits[1:4] == 3 * [{}]

    chosen = Subset(pairs["val"], [0, 1])
    on_gpu, on_cpu = (evaluate_fusion(model, chosen) for model in (load_model(run).to(GPU), load_model(run)))
    assert on_gpu["mse"] == pytest.approx(on_cpu["mse"], rel=1e-3)


@pytest.mark.parametrize("kind", ["mdct", "encodec"])
def test_renditions_and_their_measures(kind, encodec_codec):
    codec = {"mdct": MdctCodec(), "encodec": encodec_codec}[kind]
    model = FusionModel(cascade(), MaskingConfig("learned")).eval().to(GPU)
    wavs = 0.1 * torch.randn(2, 1, FRAMES * codec.hop)
    settings = Settings(noise=0.1, mask_blend=0.2, mask_hardness=2.0, residual_weight=0.5, stages=1)
    with placed(codec, GPU):
        made = render(model, codec, *wavs.to(GPU), settings)
    assert made.wav.shape == wavs[0].shape
    again = render(copy.deepcopy(model).to("cpu"), codec, *wavs, settings)
    assert torch.allclose(made.wav.cpu(), again.wav, atol=1e-4)  # with the same noise
    assert isinstance(made.wav, Placed)
    rows = measure_fusions([tuple(wavs)], codec, {"model": model})  # by a codec on the CPU
    assert len(rows["model"]) == 1


# --- super-resolution -------------------------------------------------------------------------------------------------


def test_super_resolution_is_trained_judged_and_heard(library, tmp_path, monkeypatch):
    for part, sizes in (("completion", COMPLETION), ("vae", VAE), ("diffusion", DENOISER)):
        config = {"vae": VaeTraining}.get(part, PartConfig)(**LOOP)
        train_part(tmp_path, part, library, sizes, config)
    train_part(tmp_path, "hifigan", library, VOCODER, VocoderTraining(**LOOP | DISCRIMINATORS))
    resolver = SuperResolver(tmp_path, device="cuda")
    found = evaluate(resolver, library, Restoration(steps=2), clips=3, cutoffs=(4_000,))
    assert {score.method for score in found.scores} >= {"ridge", "model", "draw", "vocoder", "griffin-lim"}
    (tmp_path / "songs-0").symlink_to(tmp_path)
    study = upper_band.Study(load_preset("smoke"), {}, tmp_path)
    with monkeypatch.context() as patch:  # of the record, which is on a GPU where there is one
        patch.setattr(upper_band, "STEPS", (1,))
        patch.setattr(torch.cuda, "is_available", lambda: True)
        rows = upper_band.by_steps(study, study.resolver("songs", 0), library, None)
    assert [row["cutoff"] for row in rows] == list(upper_band.HEARD_AT)

    low = found.sounds[4_000]["sinc"]
    for wav in (low, low.to(GPU)):
        assert resolver.restore(wav, 4_000, sources=[(wav, 8_000.0)]).device == wav.device


def test_no_step_of_super_resolution_waits(library, tmp_path, monkeypatch):
    """But for the first of each part, which makes tables: those of the completion are of each cutoff, here of one."""
    waits, step = {}, Learner.train_step

    def counted(self, batches, info):
        syncs.clear(), uploads.clear()
        metrics = step(self, batches, info)
        waits.setdefault(type(self.unwrapped_model), []).append(syncs + uploads)
        return metrics

    monkeypatch.setattr(Learner, "train_step", counted)
    monkeypatch.setattr(lib.superres.training, "GRID", 100_000)
    train_part(tmp_path, "completion", library, COMPLETION, PartConfig(**LOOP))
    train_part(tmp_path, "vae", library, VAE, VaeTraining(**LOOP))
    train_part(tmp_path, "diffusion", library, DENOISER, PartConfig(**LOOP))
    train_part(tmp_path, "hifigan", library, VOCODER, VocoderTraining(**LOOP | DISCRIMINATORS))
    assert {model: [dict(count) for count in counts[1:]] for model, counts in waits.items()} == {
        model: 3 * [{}] for model in (Completion, MelVae, Denoiser, Vocoder)
    }


def test_the_folder_of_a_run_holds_no_tensor_of_the_device(tmp_path):
    run = Run.create(tmp_path / "run", {})
    run.save(1, FusionModel(cascade(), MaskingConfig("wide")).to(GPU), {"step": torch.ones(1)}, is_best=True)
    assert Path(run.path / "best").exists()
