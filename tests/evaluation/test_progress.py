"""The figure of merit over the time of training: what is measured, when, and what its own time does."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import lib.evaluation.progress
from lib.codec.mdct import MdctCodec
from lib.data.latents import encode_manifest
from lib.evaluation.fusion_metrics import sound_features, sound_metrics
from lib.evaluation.progress import SPLIT, MeritOverTime
from lib.model.cascade import CascadeConfig
from lib.model.fusion import load_model
from lib.model.masks import MaskingConfig
from lib.training.config import TrainConfig
from lib.training.fusion_learner import train
from lib.training.trainer import Callback
from lib.util.errors import UserError


@pytest.fixture
def pairs(clips) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Two pairs of latents `[128, T]`."""
    return [(clips[0], clips[1]), (clips[2], clips[0])]


@pytest.fixture(scope="module")
def index(songs, tmp_path_factory) -> Path:
    return encode_manifest(songs, MdctCodec(), tmp_path_factory.mktemp("latents"))


def config(steps: int) -> TrainConfig:
    return TrainConfig(max_steps=steps, batch_size=2, checkpoint_every=2, learning_rate=1e-2)


def test_the_model_is_measured_before_training_and_at_every_validation(index, tmp_path, pairs, monkeypatch):
    """A resumed training continues its clock, and the time that measuring takes is not on it."""
    clock, features = [0.0], MeritOverTime.features

    def slow_features(*args) -> list:
        clock[0] += 100
        return features(*args)

    class Watch(Callback):
        def on_step(self, trainer, row) -> None:
            clock[0] += 1

    monkeypatch.setattr(lib.evaluation.progress.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(MeritOverTime, "features", slow_features)
    codec, cascade, masking = MdctCodec(), CascadeConfig.reference(0), MaskingConfig("wide", restore_rms=False)
    for steps, resume in ((4, False), (6, True)):
        callbacks = (MeritOverTime(pairs, codec), Watch())
        run = train(
            tmp_path / "run", index, codec, cascade, config(steps), masking,
            resume=resume, progress=False, callbacks=callbacks,
        )  # fmt: skip
    rows = run.metrics(SPLIT)
    assert [row["step"] for row in rows] == [0, 2, 4, 6]
    assert [row["seconds"] for row in rows] == [0, 2, 4, 6]  # a second a step
    with torch.inference_mode():
        model = load_model(run, "last")
        sounds = [[sound_features(codec.decode(x[None])[0]) for x in (*pair, fused)] for pair in pairs
                  for fused in [model(pair[0][None], pair[1][None]).latents[0]]]  # fmt: skip
    expected = [sound_metrics(output, input, target)["merit"] for input, target, output in sounds]
    assert rows[-1]["merit"] == pytest.approx(sum(expected) / 2, rel=1e-4)


def test_a_curve_is_of_the_same_pairs_all_along(index, tmp_path, pairs):
    codec, cascade, masking = MdctCodec(), CascadeConfig.reference(0), MaskingConfig("wide", restore_rms=False)
    for steps, resume, followed in ((2, False, pairs), (4, True, pairs[:1])):
        with pytest.raises(UserError, match="run: follows 2 pairs, not 1; follow as many") if resume else nullcontext():
            train(
                tmp_path / "run", index, codec, cascade, config(steps), masking,
                resume=resume, progress=False, callbacks=(MeritOverTime(followed, codec),),
            )  # fmt: skip


def test_measuring_changes_nothing_in_training(index, tmp_path, pairs):
    codec, cascade, masking = MdctCodec(), CascadeConfig.reference(1, num_layers=1), MaskingConfig("wide")
    runs = [
        train(tmp_path / str(i), index, codec, cascade, config(4), masking, progress=False, callbacks=callbacks)
        for i, callbacks in enumerate(((), (MeritOverTime(pairs, codec),)))
    ]
    weights = [load_model(run, "last").state_dict() for run in runs]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
