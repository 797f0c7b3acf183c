"""Callbacks write and draw what happened, and change nothing."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import soundfile
import torch
from matplotlib.image import imread

import lib.listening.dashboard
from lib.audio.files import load_audio
from lib.codec.mdct import MdctCodec
from lib.data.latents import LatentPairs, encode_manifest
from lib.data.pairs import Clip, Manifest, Pair
from lib.fuse import fuse_clips
from lib.listening.dashboard import Dashboard
from lib.model.cascade import CascadeConfig
from lib.model.fusion import load_model
from lib.model.masks import MaskingConfig
from lib.training.callbacks import DemoClips
from lib.training.config import TrainConfig
from lib.training.fusion_learner import train
from lib.training.run import Run
from lib.training.trainer import Callback, Trainer, rng_state
from lib.util.files import file_sha256

# Three steps per epoch, so that checkpoints fall within epochs.
CONFIG = TrainConfig(epochs=4, batch_size=2, checkpoint_every=4, learning_rate=1e-2, seed=2)


@pytest.fixture
def start(tmp_path, tiny_index, tiny_codec, tiny_cascade) -> Callable[..., Run]:
    """`start(callbacks, folder, resume=, **TrainConfig fields)` trains; dropout and noise make every step random."""

    def run(callbacks: Sequence[Callback] = (), folder: str = "run", resume: bool = False, **changes) -> Run:
        return train(
            tmp_path / folder,
            tiny_index,
            tiny_codec,
            tiny_cascade(anti_cheating=0.1),
            dataclasses.replace(CONFIG, **changes),
            resume=resume,
            progress=False,
            callbacks=callbacks,
        )

    return run


class Stop(RuntimeError):
    pass


class Kill(Callback):
    """Ends a training after a step, as a crash would."""

    def __init__(self, step: int):
        self.step = step

    def on_step(self, trainer: Trainer, row: dict) -> None:
        if row["step"] == self.step:
            raise Stop


class Keep(Callback):
    """Keeps the trainer."""

    def on_start(self, trainer: Trainer) -> None:
        self.trainer = trainer


def state(trainer: Trainer) -> list:
    """All that training resumes from: weights of both models, modes, gradients, random numbers."""
    models = [
        trainer.learner.unwrapped_model,
        *([trainer.learner.ema_model] if trainer.learner.ema_model is not None else []),
    ]
    kept = [value.clone() for model in models for value in model.parameters()]
    modes = [module.training for model in models for module in model.modules()]
    gradients = [p.grad.clone() for p in trainer.learner.unwrapped_model.parameters() if p.grad is not None]
    return [*kept, *gradients, rng_state()["rng"], torch.tensor(modes), torch.tensor(torch.is_grad_enabled())]


# --- clips to listen to -----------------------------------------------------------------------------------------------


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_clips_are_written_at_their_epochs_and_at_the_end(start, tiny_codec, tiny_manifest):
    run = start([DemoClips(tiny_codec, tiny_manifest, every=2, count=2)])
    times = [f"pair_{pair}_epoch_{epoch:04d}" for pair in (0, 1) for epoch in (2, 4)]
    times = sorted([*times, "pair_0_last", "pair_1_last"])
    sources = [f"pair_{pair}_{name}" for pair in (0, 1) for name in ("input", "target")]
    assert files(run.path / "audio") == sorted(f"{name}.wav" for name in times + sources)
    assert files(run.path / "figures") == [f"{name}.png" for name in times]
    for name in times:
        assert imread(run.path / "figures" / f"{name}.png").std() > 0.05  # something is drawn
    assert plt.get_fignums() == []


def test_the_last_clips_are_of_a_training_that_came_to_its_end(start, tiny_codec, tiny_manifest, tmp_path):
    """By its length or for lack of patience; not of one that failed."""
    with pytest.raises(Stop):
        start([DemoClips(tiny_codec, tiny_manifest, every=100, count=1), Kill(5)], folder="failed")
    assert not (tmp_path / "failed" / "audio").exists()
    endings = {"steps": {"max_steps": 2}, "patience": {"patience": 1, "learning_rate": 1.0, "checkpoint_every": 1}}
    for folder, changes in endings.items():
        run = start(
            [DemoClips(tiny_codec, tiny_manifest, every=100, count=1), keep := Keep()], folder=folder, **changes
        )
        assert files(run.path / "figures") == ["pair_0_last.png"]
        assert keep.trainer.out_of_patience == (folder == "patience")


def test_sources_are_the_same_validation_pairs_at_the_codecs_level(start, tiny_codec, tiny_manifest, tiny_index):
    run = start([DemoClips(tiny_codec, tiny_manifest, every=4, count=2)])
    pairs = LatentPairs(tiny_index, "val")
    for number, place in enumerate((0, 4)):  # spread evenly over nine
        for name, latents in zip(("input", "target"), pairs[place], strict=True):
            path = run.path / "audio" / f"pair_{number}_{name}.wav"
            assert soundfile.info(path).samplerate == tiny_codec.sample_rate
            assert torch.equal(load_audio(path), tiny_codec.decode(latents[None])[0])


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_outputs_are_those_of_the_model_that_is_kept(start, tiny_codec, tiny_manifest, tiny_index, ema):
    """In eval mode; with EMA, the EMA weights and not the ones in training."""
    run = start([DemoClips(tiny_codec, tiny_manifest, every=4, count=1), keep := Keep()], ema=ema)
    input, target = (clip[None] for clip in LatentPairs(tiny_index, "val")[0])
    found = load_audio(run.path / "audio" / "pair_0_epoch_0004.wav")
    with torch.no_grad():
        kept = load_model(run, "last")(input, target).latents
        torch.testing.assert_close(found, tiny_codec.decode(kept)[0], rtol=1e-4, atol=1e-6)
        in_training = keep.trainer.learner.unwrapped_model.eval()(input, target).latents
    difference = (tiny_codec.decode(in_training)[0] - found).abs().max()
    assert (difference > 1e-4) == (ema > 0)
    assert found.square().mean().sqrt() > 0.01


def test_the_clips_have_the_whole_band(tmp_path, mdct_pairs):
    manifest, codec = mdct_pairs
    index, masking = encode_manifest(manifest, codec, tmp_path / "cache"), MaskingConfig("learned")
    cascade = CascadeConfig.reference(1, num_layers=1)
    config = dataclasses.replace(CONFIG, epochs=1, batch_size=1)
    callbacks = [DemoClips(codec, manifest, every=2)]
    run = train(tmp_path / "run", index, codec, cascade, config, masking, progress=False, callbacks=callbacks)
    for number, (pair, length) in enumerate(zip(manifest.split("val"), (5_120, 4_650), strict=True)):
        clips = [load_audio(manifest.path(clip), clip.offset, length) for clip in (pair.input, pair.target)]
        wavs = [load_audio(run.path / "audio" / f"pair_{number}_{name}.wav") for name in ("input", "target", "last")]
        for found, wanted in zip(wavs, clips, strict=False):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
        fused = fuse_clips(*(clip[None] for clip in clips), load_model(run, "last"), codec)[0]
        assert wavs[2].shape == fused.shape
        if length == manifest.clip_length:  # the short clip's latents are of its zeros too
            torch.testing.assert_close(wavs[2], fused, rtol=0, atol=1e-3)


@pytest.fixture
def mdct_pairs(tmp_path) -> tuple[Manifest, MdctCodec]:
    """Noise; the last clip of a song is shorter than the others, by more than a frame."""
    pairs = []
    for seed, split in enumerate(("train", "val")):
        wav = 0.1 * np.random.default_rng(seed).standard_normal(14_890)
        soundfile.write(path := tmp_path / f"{split}.wav", wav, 24_000, subtype="FLOAT")
        clips = Clip(path.name, 0, 14_890, file_sha256(path)).cut(5_120)
        pairs += [Pair(f"{split}{i}", split, "continuation", *two) for i, two in enumerate(itertools.pairwise(clips))]
    return Manifest(tmp_path, 5_120, 24_000, 0, tuple(pairs)), MdctCodec()


class Compare(Callback):
    """Whether another callback leaves everything as it was."""

    def __init__(self, other: Callback):
        self.other, self.times = other, 0

    def __getattribute__(self, name: str):
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def call(trainer: Trainer, *arguments) -> None:
            before = state(trainer)
            getattr(self.other, name)(trainer, *arguments)
            after = state(trainer)
            assert len(before) == len(after)
            assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True)), name
            self.times += 1

        return call


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_callbacks_do_not_disturb_training(start, tiny_codec, tiny_manifest, monkeypatch, ema):
    """Neither while they are called, nor in what comes of it, bit for bit."""
    monkeypatch.setattr(lib.listening.dashboard, "can_show_widgets", lambda: True)
    monkeypatch.setattr(lib.listening.dashboard, "display", lambda box: None)
    monkeypatch.setattr(lib.listening.dashboard, "figure_png", lambda figure: plt.close(figure) or b"")  # faster
    watchers = [Compare(c) for c in (DemoClips(tiny_codec, tiny_manifest, every=1, count=1), Dashboard(seconds=0))]
    alone, watched = (start(w, folder, ema=ema, epochs=2) for w, folder in (((), "alone"), (watchers, "watched")))
    assert all(watcher.times == 1 + 6 + 2 + 2 + 1 for watcher in watchers)
    assert watched.metrics() == alone.metrics()
    for which in ("last", "best"):
        models = [load_model(run, which).state_dict() for run in (alone, watched)]
        assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())
