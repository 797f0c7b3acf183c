"""Plans: how long they last, that their parts fit together, and what they train."""

import dataclasses
import math
import shutil

import pytest
import torch

from lib.superres.data import Examples
from lib.superres.plans import FULL_PLAN, SMALL_PLAN, Plan
from lib.superres.resolver import SuperResolver
from lib.superres.training import DiffusionTraining, VaeTraining, VocoderTraining
from lib.superres.unet import Denoiser
from lib.superres.vae import MelVae
from lib.training.run import Run
from lib.training.trainer import TrainingOrder
from superres.conftest import CLIP, DENOISER, JUDGES, LOOP, VAE, VOCODER

TINY = Plan(VAE, DENOISER, VOCODER, VaeTraining(**LOOP), DiffusionTraining(**LOOP), VocoderTraining(**LOOP | JUDGES))


@pytest.mark.parametrize("plan", [SMALL_PLAN, FULL_PLAN, TINY])
@pytest.mark.parametrize("steps", [1, 3, 257, 1_000])
def test_a_plan_lasts_as_long_as_it_is_asked_to(plan, steps):
    lasting = plan.lasting(steps, 2 * steps, 3 * steps)
    configs = lasting.vae_training, lasting.training, lasting.vocoder_training
    for config, wanted in zip(configs, (steps, 2 * steps, 3 * steps), strict=True):
        assert TrainingOrder(config.examples, config).total_steps(0) == config.max_steps == wanted
        fewer = dataclasses.replace(config, epochs=config.epochs - 1) if config.epochs > 1 else None
        assert fewer is None or TrainingOrder(fewer.examples, fewer).total_steps(0) < wanted + config.examples
    seeded = plan.lasting(5, 6, 7, seed=3)
    assert [c.seed for c in (seeded.vae_training, seeded.training, seeded.vocoder_training)] == [3, 3, 3]
    assert lasting.lasting(5, 6, 7) == plan.lasting(5, 6, 7)
    assert (lasting.vae, lasting.denoiser, lasting.vocoder) == (plan.vae, plan.denoiser, plan.vocoder)


def test_a_plan_may_take_its_steps_in_pieces():
    config = dataclasses.replace(TINY.training, accumulate=2, batch_size=2)
    lasting = dataclasses.replace(TINY, training=config).lasting(1, 7, 1).training
    assert TrainingOrder(config.examples, lasting).total_steps(0) == 7


@pytest.mark.parametrize("plan", [SMALL_PLAN, FULL_PLAN, TINY])
def test_the_parts_of_a_plan_fit_together(plan):
    assert plan.vae.latent_channels == plan.denoiser.latent_channels
    assert plan.vae_training.clip_length == plan.training.clip_length
    frames = plan.training.clip_length // 480
    stride = 2 ** (len(plan.vae.channels) - 1) * 2 ** (len(plan.denoiser.channels) - 1)
    assert frames % stride == 0
    assert plan.denoiser.encoder.positions >= frames
    for heads, channels in zip(plan.denoiser.attention, plan.denoiser.channels, strict=True):
        assert channels % plan.denoiser.norm_groups == 0
        assert not heads or channels % plan.denoiser.head_channels == 0
    assert all(channels % plan.vae.norm_groups == 0 for channels in plan.vae.channels)
    assert math.prod(plan.vocoder.upsample_rates) == 480
    for config in (plan.vae_training, plan.training, plan.vocoder_training):
        assert config.batch_size <= config.examples
        assert config.clip_length % (16 * 480) == 0


def test_the_small_plan_runs():
    plan, frames = SMALL_PLAN, SMALL_PLAN.training.clip_length // 480
    vae, denoiser = MelVae(plan.vae).eval(), Denoiser(plan.denoiser).eval()
    mel = torch.randn(1, 1, 256, frames)
    with torch.no_grad():
        latents = vae.encode(mel)
        assert latents.shape == (1, 4, 32, frames // 8)
        assert denoiser(latents, torch.tensor([3]), latents, mel).shape == latents.shape
        assert vae.decode(latents).shape == mel.shape


def test_the_full_plan_has_the_seeds_sizes():
    """Of seed 004: autoencoder, UNet, encoder, and clips of 10.24 s."""
    vae, unet, training = FULL_PLAN.vae, FULL_PLAN.denoiser, FULL_PLAN.training
    assert (vae.channels, vae.num_res_blocks, vae.latent_channels) == ((128, 256, 512, 1024), 2, 16)
    assert (unet.channels, unet.num_res_blocks, unet.head_channels) == ((128, 256, 384, 640), 2, 32)
    assert (unet.attention, unet.transformers, unet.context) == ((False, True, True, True), 2, "sequence")
    encoder = unet.encoder
    assert (encoder.channels, encoder.hidden_dim, encoder.context_dim) == ((32, 64, 256), 256, 128)
    assert (encoder.num_layers, encoder.num_heads, encoder.ffn_dim, encoder.positions) == (4, 8, 512, 1024)
    assert training.clip_seconds == FULL_PLAN.vae_training.clip_seconds == 10.24
    assert training.condition_dropout == 0.1
    vocoder = FULL_PLAN.vocoder
    assert (vocoder.channels, vocoder.upsample_rates, vocoder.resblock_kernels) == (
        1536,
        (6, 5, 4, 2, 2),
        (3, 7, 11, 15),
    )
    assert (Plan().vae, Plan().denoiser, Plan().vocoder) == (vae, unet, vocoder)


def test_a_plan_trains_every_part(tmp_path, library):
    runs = TINY.lasting(1, 2, 1).train(tmp_path, library, progress=False)
    assert {name: run.path for name, run in runs.items()} == {
        name: tmp_path / name for name in ("vae", "diffusion", "vocoder")
    }
    assert [len(run.metrics("train")) for run in runs.values()] == [1, 2, 1]
    assert runs["diffusion"].config["sizes"]["context"] == "sequence"


def test_contexts_are_compared_by_trainings_that_differ_in_nothing_else(tmp_path, trained, library):
    shutil.copytree(trained / "vae", tmp_path / "vae", symlinks=True)
    plan = TINY.lasting(1, 2, 1, seed=4)
    losses = plan.compare_contexts(tmp_path, library, 2, progress=False)
    assert {context: len(values) for context, values in losses.items()} == {"sequence": 2, "pooled": 2}
    for seed in range(2):
        runs = {context: Run.open(tmp_path / f"{context}-{seed}") for context in losses}
        sequence, pooled = (run.config for run in runs.values())
        assert sequence["sizes"] | {"context": "pooled"} == pooled["sizes"]
        assert sequence["sizes"]["context"] == "sequence"
        assert sequence["train"]["seed"] == 4 + seed
        for key in ("train", "data", "latent_scale", "vae_sha256"):
            assert sequence[key] == pooled[key]
        for context, run in runs.items():
            assert len(run.metrics("train")) == 2
            assert losses[context][seed] == run.metrics("val")[-1]["loss"]
    low = torch.stack([Examples(library, "val", 1, CLIP)[0][1]])
    resolvers = [SuperResolver(tmp_path, diffusion=f"{context}-0") for context in losses]
    assert [r.denoiser.config.context for r in resolvers] == ["sequence", "pooled"]
    assert all(r.restore(low, 4_000).shape == low.shape for r in resolvers)
    assert plan.compare_contexts(tmp_path, library, 2, progress=False, resume=True) == losses
