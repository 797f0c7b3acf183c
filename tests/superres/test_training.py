"""Training the parts: plans, what each part learns from, resuming, what is measured, and what is refused."""

import dataclasses
import functools
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lib.superres import training
from lib.superres.completion import SHARE
from lib.superres.degradation import Examples, read_library
from lib.superres.mel import known_bands, log_mel
from lib.superres.resolver import SuperResolver
from lib.superres.training import (
    LAST,
    NEEDED,
    PARTS,
    PLANS,
    DiffusionLearner,
    MadeExamples,
    PartConfig,
    Plan,
    VaeTraining,
    VocoderTraining,
    encode,
    load_part,
    train_part,
)
from lib.superres.unet import Denoiser, schedule
from lib.superres.vae import MelVae
from lib.training.learner import StepInfo
from lib.training.nonfinite import NonFiniteError
from lib.training.run import Run
from lib.training.trainer import Callback, Trainer, TrainingOrder, open_accelerator
from lib.util.errors import UserError
from lib.util.tensors import safe_torch_load
from superres.conftest import CLIP, COMPLETION, DENOISER, DISCRIMINATORS, LOOP, VAE, VOCODER, changed, write_music

SMALL_PLAN, FULL_PLAN = PLANS["small"], PLANS["full"]
# two steps per epoch, the second one smaller; everything that has a state of its own
HARD = LOOP | {"examples": 3, "max_steps": 3, "checkpoint_every": 2, "ema": 0.6, "schedule": "cosine"}


@pytest.fixture(scope="module")
def train_in(library, trained) -> Callable[..., Run]:
    """`train_in(root, part, data=, sizes=, resume=, callbacks=, **fields of its training)`."""

    def run(
        root: Path, part: str, data=library, sizes=None, resume=False, callbacks=(), encoded=None, **changes
    ) -> Run:
        options = {"resume": resume, "encoded": encoded}
        for needed in NEEDED:
            if part == "diffusion" and not (root / needed).exists():
                shutil.copytree(trained / needed, root / needed, symlinks=True)
        default, training, more = {
            "completion": (COMPLETION, PartConfig, {}),
            "vae": (VAE, VaeTraining, {}),
            "diffusion": (DENOISER, PartConfig, {}),
            "hifigan": (VOCODER, VocoderTraining, DISCRIMINATORS),
        }[part]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lib.superres.training.Trainer", functools.partial(Trainer, callbacks=callbacks))
            return train_part(root, part, data, sizes or default, training(**HARD | more | changes), **options)

    return run


@pytest.fixture
def train(tmp_path, train_in) -> Callable[..., Run]:
    """`train(part, …)` in the test's own folder."""
    return functools.partial(train_in, tmp_path)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, train_in) -> Callable[[str], Trainer]:
    """`straight(part)`: a trainer that took its three steps without a stop. Its run is not to be written to."""

    @functools.cache
    def trainer(part: str) -> Trainer:
        last = Last()
        train_in(tmp_path_factory.mktemp(part), part, callbacks=(Repeat(), last))
        return last.trainer

    return trainer


class StopAt(Callback):
    """Ends a training as if it were killed, after a step that no checkpoint has."""

    def __init__(self, step: int):
        self.step = step

    def on_step(self, trainer, row):
        if row["step"] == self.step:
            raise RuntimeError("as if killed")


class Repeat(Callback):
    """Validates once more after each validation: the same numbers, and no random number taken."""

    def on_validation(self, trainer, row):
        before = torch.get_rng_state()
        assert trainer.validate() == {name: value for name, value in row.items() if name not in ("split", "step")}
        assert torch.equal(torch.get_rng_state(), before)


class Last(Callback):
    """Keeps the trainer."""

    def on_end(self, trainer):
        self.trainer = trainer


def make_learner(part: str, config, sizes):
    torch.manual_seed(0)
    kind, model, _ = PARTS[part]
    return kind(config, model(sizes), open_accelerator())


# --- every part -------------------------------------------------------------------------------------------------------


def test_the_autoencoder_learns(train):
    rows = train("vae", max_steps=24, checkpoint_every=24, examples=8, learning_rate=1e-2).metrics("train")
    losses = [row["loss/mel"] for row in rows]
    assert len(losses) == 24
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])  # the last epoch and the first: the same clips


@pytest.mark.parametrize("part", PARTS)
def test_a_stop_changes_nothing(train, straight, part):
    with pytest.raises(RuntimeError, match="as if killed"):
        train(part, callbacks=(StopAt(3),))
    runs = straight(part).run, train(part, resume=True)
    assert [row["step"] for row in runs[0].metrics("train")] == [1, 2, 3]
    assert runs[0].metrics() == runs[1].metrics()
    states = [safe_torch_load(run.path / "last" / "training.pt") for run in runs]
    assert ("adversary" in states[0]) == (part == "hifigan")
    first, second = (load_weights(run) | flat(state) for run, state in zip(runs, states, strict=True))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert sum(name.startswith("state.optimizer") for name in first) > 50


def load_weights(run: Run) -> dict[str, Tensor]:
    return load_file(run.path / "last" / "model.safetensors")


def flat(state, name: str = "state") -> dict[str, Tensor]:
    """Every tensor and number in nested containers, by its place."""
    if isinstance(state, dict):
        return {k: v for key, value in state.items() for k, v in flat(value, f"{name}.{key}").items()}
    if isinstance(state, list | tuple):
        return {k: v for i, value in enumerate(state) for k, v in flat(value, f"{name}.{i}").items()}
    return {name: torch.as_tensor(state)} if isinstance(state, Tensor | int | float) else {}


def test_another_config_or_other_data_is_refused_on_resume(train_in, straight, tmp_path):
    for part in ("vae", "diffusion"):
        shutil.copytree(straight(part).run.path.parent, tmp_path / part, symlinks=True)
    for part, words, changes in (
        ("vae", "train.kl_weight", {"kl_weight": 1e-3}),
        ("vae", "train.seed", {"seed": 1}),
        ("vae", "sizes.num_res_blocks", {"sizes": changed(VAE, num_res_blocks=2)}),
        ("diffusion", "train.learning_rate", {"learning_rate": 1e-3}),
        ("diffusion", "sizes.context", {"sizes": changed(DENOISER, context="pooled")}),
    ):
        with pytest.raises(UserError, match=f"holds a run with another config .*{words}"):
            train_in(tmp_path / part, part, resume=True, **changes)
    for seed in range(3):
        write_music(tmp_path / "other" / f"{seed}.wav", 0.5, 10 + seed)
    with pytest.raises(UserError, match=r"holds a run with another config .*data"):
        train_in(tmp_path / "vae", "vae", data=read_library(tmp_path / "other", CLIP), resume=True)
    shutil.rmtree(tmp_path / "diffusion" / "vae")  # and another autoencoder in its place
    shutil.copytree(straight("vae").run.path, tmp_path / "diffusion" / "vae", symlinks=True)
    with pytest.raises(UserError, match=r"holds a run with another config .*vae_sha256"):
        train_in(tmp_path / "diffusion", "diffusion", resume=True)


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_other_code_finished_is_trained_again(straight, train_in, tmp_path, edit_code, part):
    shutil.copytree(straight(part).run.path.parent, tmp_path, symlinks=True, dirs_exist_ok=True)
    edit_code("lib.superres.resolver")  # plays no part
    train_in(tmp_path, part, resume=True)
    assert not (tmp_path / part / "replaced").exists()
    for module in ("lib.superres.training", "lib.superres.mel", "lib.training.learner"):
        edit_code(module)
        run = train_in(tmp_path, part, resume=True)
        assert run.metrics() == straight(part).run.metrics()
        assert (tmp_path / part / "replaced").exists(), module
        shutil.rmtree(tmp_path / part / "replaced")


def test_a_part_on_another_part_that_other_code_trained_is_trained_again(train, tmp_path, edit_code):
    train("vae")
    train("diffusion")
    edit_code("lib.superres.vae")
    train("vae", resume=True, max_steps=4)  # other weights
    run = train("diffusion", resume=True)
    assert (tmp_path / "diffusion" / "replaced").exists()
    assert run.config["vae_sha256"] == Run.open(tmp_path / "vae").weights_sha256()
    shutil.rmtree(tmp_path / "diffusion" / "replaced")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config | {"code": ["other", *config["code"]]}))
    train("diffusion", resume=True)  # on the same weights, which several codes have trained
    assert (tmp_path / "diffusion" / "replaced").exists()


@pytest.mark.parametrize(("part", "measured"), [("vae", "mel_std"), ("diffusion", "latent_scale")])
def test_another_number_of_threads_resumes_and_changes_nothing_that_was_measured(train, monkeypatch, part, measured):
    """Sums in another order differ in their last digits: here they certainly do."""
    before = train(part).config
    assert measured in json.dumps(before)
    std, threads = torch.Tensor.std, torch.get_num_threads()
    monkeypatch.setattr(torch.Tensor, "std", lambda *a, **k: std(*a, **k) * (1 + 1e-5))
    torch.set_num_threads(threads + 1)
    try:
        run = train(part, resume=True, max_steps=4)
    finally:
        torch.set_num_threads(threads)
    assert len(run.metrics("train")) == 4
    assert run.config | {"train": before["train"]} == before


def test_a_run_may_be_made_longer(train, straight, tmp_path):
    shutil.copytree(straight("vae").run.path, tmp_path / "vae", symlinks=True)
    run = train("vae", resume=True, max_steps=4)
    assert [row["step"] for row in run.metrics("train")] == [1, 2, 3, 4]


@pytest.mark.parametrize("bad", [0, 1])
def test_a_nan_stops_training_and_is_named(tmp_path, library, monkeypatch, bad):
    class Poisoned(Examples):
        def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
            item = [wav.clone() for wav in super().__getitem__(i)]
            if self.split == "train" and i == 3:
                item[bad][0, 77] = math.nan
            return tuple(item)

    monkeypatch.setattr(training, "Examples", Poisoned)
    monkeypatch.setattr(training, "MEASURED", 2)  # of what is measured before, none is poisoned
    with pytest.raises(NonFiniteError) as error:
        train_part(tmp_path, "vae", library, VAE, VaeTraining(**LOOP))
    assert error.value.tensor == ("clips", "degraded clips")[bad]


@pytest.mark.parametrize("part", PARTS)
def test_a_part_is_rebuilt_from_its_run(straight, part):
    trainer = straight(part)
    found = load_part(Run.open(trainer.run.path), part, "last")  # its config as JSON has it
    assert not found.training
    kept = trainer.learner.eval_model.eval()
    assert found.config == kept.config
    inputs = {
        "completion": (torch.randn(1, 1, 256, 16), torch.ones(1, 256)),
        "vae": (torch.randn(1, 1, 256, 16),),
        "hifigan": (torch.randn(1, 1, 256, 16),),
        "diffusion": (
            torch.randn(1, 2, 32, 2),
            torch.tensor([5]),
            torch.randn(1, 2, 32, 2),
            torch.randn(1, 1, 256, 16),
        ),
    }[part]
    options = {"sampled": False} if part == "vae" else {}
    with torch.no_grad():
        made, expected = (model(*inputs, **options) for model in (found, kept))
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5 if part == "hifigan" else 0)
    if part == "hifigan":  # its weights are plain ones again
        assert any(parametrize.is_parametrized(layer) for layer in kept.modules())
        assert not any(parametrize.is_parametrized(layer) for layer in found.modules())


def test_what_is_no_such_part_is_refused(tmp_path, trained):
    for run, part in ((Run.open(trained / "vae"), "diffusion"), (Run.open(trained / "diffusion"), "vae")):
        with pytest.raises(UserError, match=f"describes no {part} of a super-resolver; name its folder"):
            load_part(run, part)
    for number, config in enumerate(({"cascade": {}}, {"sizes": [1]}, {"sizes": {}}, {"sizes": None})):
        run = Run.create(tmp_path / str(number), config)
        for part in PARTS:
            with pytest.raises(UserError, match=f"describes no {part} of a super-resolver"):
                load_part(run, part)
    run = Run.open(trained / "vae")
    run.config["sizes"]["latent_channels"] = 3
    with pytest.raises(UserError, match="does not fit this model"):
        load_part(run, "vae")


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        (VaeTraining, {"clip_seconds": 0.15}, "clip_seconds=0.15.*a multiple of 0.16"),
        (VaeTraining, {"clip_seconds": 0.0}, "clip_seconds=0.0"),
        (VaeTraining, {"kl_weight": -1.0}, "kl_weight=-1.0"),
        (VaeTraining, {"examples": 0}, "examples=0"),
        (PartConfig, {"val_examples": 0}, "val_examples=0"),
        (VaeTraining, {"kl_weight": math.nan}, "kl_weight=nan"),
        (VocoderTraining, {"period_channels": 0}, "period_channels=0"),
    ],
)
def test_impossible_settings_are_refused(kind, fields, words):
    with pytest.raises(UserError, match=words):
        kind(**fields)


def test_settings_come_back_from_json():
    config = VocoderTraining(period_channels=4, learning_rate=2e-4)
    assert VocoderTraining(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
    assert [VaeTraining(clip_seconds=0.16 * k).clip_length for k in (1, 4, 64)] == [7_680, 30_720, 491_520]


# --- what is measured -------------------------------------------------------------------------------------------------


def test_the_autoencoder_sees_mels_of_mean_0_and_deviation_1(straight, library):
    run = straight("vae").run
    sizes = json.loads((run.path / "config.json").read_text())["sizes"]
    examples = Examples(library, "train", 3, CLIP)
    mels = torch.cat([log_mel(wav[None]) for i in range(3) for wav in examples[i]])
    assert sizes["mel_mean"] == pytest.approx(mels.mean().item(), rel=1e-5)
    assert sizes["mel_std"] == pytest.approx(mels.std().item(), rel=1e-5)
    seen = []
    vae = load_part(run, "vae")
    vae.autoencoder.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    vae.encode(mels)
    assert abs(seen[0].mean().item()) < 1e-3
    assert seen[0].std().item() == pytest.approx(1, abs=1e-3)


def test_what_is_missing_has_deviation_1_after_scaling(trained, library):
    config = json.loads((trained / "diffusion" / "config.json").read_text())
    data, facts = encode(trained, library, PartConfig(**LOOP))
    differences = [torch.sub(*data["train"][i][0].chunk(2)) for i in range(LOOP["examples"])]
    assert torch.stack(differences).std().item() == pytest.approx(1, rel=1e-4)
    assert abs(config["latent_scale"] - 1) > 0.01  # the tolerance tells
    for key, value in facts.items():
        assert config[key] == value
    assert facts["vae_sha256"] == Run.open(trained / "vae").weights_sha256()
    assert facts["completion_sha256"] == Run.open(trained / "completion").weights_sha256()


def test_latents_of_another_size_are_refused(train):
    with pytest.raises(UserError, match=r"latent_channels=3 does not fit .*vae, whose latents have 2; use that number"):
        train("diffusion", sizes=changed(DENOISER, latent_channels=3))


@pytest.mark.parametrize("missing", NEEDED)
def test_a_diffusion_model_needs_the_parts_before_it(tmp_path, library, trained, missing):
    for needed in set(NEEDED) - {missing}:
        shutil.copytree(trained / needed, tmp_path / needed, symlinks=True)
    with pytest.raises(UserError, match=f"{missing}: no run here"):
        train_part(tmp_path, "diffusion", library, DENOISER, PartConfig(**LOOP))


def test_two_trainings_may_share_what_was_encoded(train_in, straight, tmp_path, library, trained):
    encoded = encode(trained, library, PartConfig(**HARD))
    first = train_in(tmp_path, "diffusion", encoded=encoded)
    assert len(encoded[0]["train"].kept) == len(encoded[0]["val"].kept) == 3
    assert first.metrics() == straight("diffusion").run.metrics()
    assert first.config["latent_scale"] == straight("diffusion").run.config["latent_scale"]


class Counted(Examples):
    reads = 0

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        self.reads += 1
        return super().__getitem__(i)


@pytest.mark.parametrize(("room", "kept"), [(0, 0), (2.5, 2), (99, 4)])
def test_examples_are_made_once_as_long_as_there_is_room(monkeypatch, library, room, kept):
    monkeypatch.setattr(training, "CACHE", room * 2 * 256 * 16 * 4)  # bytes of an item
    examples = Counted(library, "val", 4, CLIP)
    made = MadeExamples(examples, lambda mel, cutoff: (mel[0], mel[1] + cutoff), torch.device("cpu"))
    assert (len(made), made.clip_length, made.sample_rate) == (4, CLIP, 48_000)
    for _ in range(2):
        for i in range(4):
            clip, low = Examples(library, "val", 4, CLIP)[i]
            expected = log_mel(clip[None])[0], log_mel(low[None])[0] + examples.cutoff(i)
            torch.testing.assert_close(made[i], expected)
    assert examples.reads == 8 - kept


def test_only_clips_for_training_pass_an_equaliser_each_its_own(library):
    found = {}
    for split in ("train", "val"):
        examples = Examples(library, split, 40, CLIP)
        made = MadeExamples(examples, lambda mel, cutoff: (mel[0, 0], mel[1, 0]), torch.device("cpu"))
        plain = [[log_mel(wav[None])[0, 0] for wav in examples[i]] for i in range(40)]
        found[split] = torch.stack([torch.stack(made[i]) - torch.stack(plain[i]) for i in range(40)])  # [40, 2, 256, T]
    assert found["val"].abs().max() == 0
    gains = found["train"]
    torch.testing.assert_close(gains, gains[:, :1, :, :1].expand_as(gains), rtol=0, atol=1e-4)  # both versions alike
    level, slope = gains[:, 0, :, 0].mean(dim=1), (gains[:, 0, -1, 0] - gains[:, 0, 0, 0]) / 2
    for drawn in (level, slope):
        assert drawn.std().item() == pytest.approx(training.EQUALISER, rel=0.35)


def test_the_diffusion_model_is_given_the_completed_clip(trained, library):
    data, facts = encode(trained, library, PartConfig(**LOOP))
    completion, vae = (load_part(Run.open(trained / part), part) for part in NEEDED)
    clip, low = Examples(library, "val", 3, CLIP, LOOP.get("seed", 0))[1]
    cutoff = data["val"].examples.cutoff(1)
    latents, mel = data["val"][1]
    with torch.no_grad():
        completed = completion.complete(log_mel(low[None]), cutoff)
        expected = facts["latent_scale"] * vae.encode(torch.cat([log_mel(clip[None]), completed]))
    torch.testing.assert_close(mel, completed[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(latents, expected.flatten(0, 1), rtol=1e-4, atol=1e-4)
    assert not latents.requires_grad
    assert not mel.requires_grad


# --- what each part learns from ---------------------------------------------------------------------------------------


def test_the_loss_of_the_completion_is_over_missing_bands_alone():
    """Of every half by itself, above its own cutoff; in validation with the share of the correction that is used."""
    learner = make_learner("completion", PartConfig(**LOOP), COMPLETION)
    mel, correction = torch.randn(2, 4, 1, 256, 8, generator=torch.Generator().manual_seed(0))
    seen = []

    def model(linear: Tensor, missing: Tensor) -> Tensor:
        seen.append(missing)
        for one, own, bands in zip(mel, linear, missing, strict=True):
            known = int((bands == 0).sum())
            assert torch.equal(one[:, :known], own[:, :known])
            assert not own[:, known:].any()  # what these statistics expect
        return correction

    for info, share in ((StepInfo(0, 0), 1.0), (None, SHARE)):
        loss, terms, _ = learner.loss(model, mel.split(2), info)
        squares = ((share * correction - mel) * seen[-1][:, None, :, None]).square()
        expected = (squares.sum(dim=(1, 2, 3)) / seen[-1].sum(dim=1) / 8).mean()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        assert terms["loss/mel"] == loss
    bands = [known_bands(cutoff) for cutoff in (2_000, 6_500, 11_250, 16_000)]
    assert (seen[-1] == 0).sum(dim=1).tolist() == bands  # of validation: spread over all


def test_the_completion_is_given_another_cutoff_each_time():
    learner, known = make_learner("completion", PartConfig(**LOOP), COMPLETION), set()

    def model(linear: Tensor, missing: Tensor) -> Tensor:
        known.update((missing == 0).sum(dim=1).tolist())
        return torch.zeros_like(linear)

    for step in range(100):
        learner.loss(model, (torch.randn(2, 1, 256, 8),) * 2, StepInfo(step, 0))
    assert (min(known), max(known)) == (known_bands(2_000), known_bands(16_000))
    assert len(known) > 40


def test_the_completion_learns_from_both_halves_of_whole_clips(library, train, monkeypatch):
    seen = []
    monkeypatch.setattr(training.CompletionLearner, "loss", lambda self, model, batch, info=None: seen.append(batch))
    with pytest.raises(TypeError):
        train("completion", batch_size=3, max_steps=1)
    first, second = seen[0]
    plain = [log_mel(Examples(library, "train", 3, CLIP).clip(i)[None])[0] for i in range(3)]
    for mel in torch.cat([first, second], dim=-1):  # but for the equaliser's level and slope
        gains = [mel - one for one in plain]
        assert any(torch.allclose(gain, gain[..., :1].expand_as(gain), atol=1e-4) for gain in gains)


def test_the_loss_of_the_autoencoder(library):
    learner = make_learner("vae", VaeTraining(**LOOP, kl_weight=0.5), changed(VAE, mel_mean=-4.0, mel_std=3.0))
    batch = tuple(
        torch.stack(wavs) for wavs in zip(*(Examples(library, "train", 2, CLIP)[i] for i in range(2)), strict=True)
    )
    loss, terms, adversarial = learner.loss(learner.unwrapped_model, batch)
    mel = log_mel(torch.cat(batch))
    made, divergence = learner.unwrapped_model(mel, sampled=False)
    assert terms["loss/mel"].item() == pytest.approx((made - mel).abs().mean().item(), rel=1e-5)
    assert loss.item() == pytest.approx((terms["loss/mel"] + 0.5 * divergence.mean()).item(), rel=1e-5)
    assert adversarial is None
    first, second = (learner.loss(learner.unwrapped_model, batch, StepInfo(0, 0))[0].item() for _ in range(2))
    assert first != second  # a sample of the posterior in training, its mean in validation
    for changed_one in (0, 1):  # both clips count
        other = [wav.clone() for wav in batch]
        other[changed_one] *= 0.5
        assert learner.loss(learner.unwrapped_model, tuple(other))[0].item() != pytest.approx(loss.item(), rel=1e-3)


def test_the_loss_of_the_vocoder(straight, library):
    config = VocoderTraining(**HARD | DISCRIMINATORS)
    learner = make_learner("hifigan", config, VOCODER)
    clips = torch.stack([Examples(library, "train", 2, CLIP)[i][0] for i in range(2)])
    loss, terms, (made, real) = learner.loss(learner.unwrapped_model, (clips, 0 * clips), StepInfo(0, 0))
    assert torch.equal(real, clips)  # what is degraded plays no part
    assert made.shape == clips.shape
    assert terms["loss/mel"].item() == pytest.approx((log_mel(made) - log_mel(clips)).abs().mean().item(), rel=1e-5)
    expected = 45 * terms["loss/mel"] + terms["loss/adversarial"] + 2 * terms["loss/features"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert all(p.grad is None for p in learner.adversary.model.parameters())  # they learn in their own step
    assert all(p.grad is not None for p in learner.unwrapped_model.parameters() if p.requires_grad)
    loss, terms, _ = learner.loss(learner.unwrapped_model, (clips, clips))
    assert set(terms) == {"loss/mel"}
    assert loss.item() == pytest.approx(45 * terms["loss/mel"].item(), rel=1e-5)
    rows = straight("hifigan").run.metrics("train")
    assert rows[0]["discriminator/loss"] > 0
    assert rows[0]["discriminator/grad_norm"] > 0


class Noted(nn.Module):
    """A denoiser that predicts 0 and notes what it was asked."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, noisy, timesteps, low, mel):
        self.calls.append((noisy, timesteps, low, mel))
        return torch.zeros_like(noisy)


def test_half_of_the_clips_are_at_the_last_timestep():
    learner = make_learner("diffusion", PartConfig(**LOOP), DENOISER)
    model, clips = Noted(), 20_000
    learner.loss(model, (torch.zeros(clips, 4, 1, 1), torch.zeros(clips, 1, 1, 1)), StepInfo(0, 0))
    timesteps = model.calls[0][1]
    last = timesteps == 999
    assert last.float().mean().item() == pytest.approx(LAST, abs=0.02)
    assert timesteps.min() == 0
    assert timesteps[~last].float().mean().item() == pytest.approx(499, abs=10)


def test_validation_takes_the_same_noise_and_timesteps_all_over_the_schedule():
    learner = make_learner("diffusion", PartConfig(**LOOP), DENOISER)
    model = Noted()
    batch = torch.ones(8, 4, 6, 2), torch.zeros(8, 1, 256, 16)
    before = torch.get_rng_state()
    first, second = (learner.loss(model, batch)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)
    spread = torch.tensor([62, 187, 312, 437, 562, 687, 812, 937])
    timesteps = model.calls[0][1]
    assert bool(((timesteps == spread) | (timesteps == 999)).all())
    assert 0 < (timesteps == 999).sum() < 8
    assert torch.equal(model.calls[0][0], model.calls[1][0])
    training_losses = [learner.loss(model, batch, StepInfo(0, 0))[0] for _ in range(2)]
    assert not torch.equal(*training_losses)


def test_the_loss_of_the_denoiser_is_that_of_the_velocity():
    learner = make_learner("diffusion", PartConfig(**LOOP), DENOISER)
    generator = torch.Generator().manual_seed(1)
    high, low = torch.randn(2, 3, 2, 8, 4, generator=generator)
    model = Noted()
    loss, terms, _ = learner.loss(model, (torch.cat([high, low], dim=1), torch.zeros(3, 1, 256, 32)))
    noisy, timesteps, given, *_ = model.calls[0]
    assert torch.equal(given, low)
    a = schedule().alphas_cumprod[timesteps][:, None, None, None]
    more = high - low
    unit = (noisy - a.sqrt() * more) / (1 - a).sqrt()
    expected = (a.sqrt() * unit - (1 - a).sqrt() * more).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert terms["loss/velocity"] == loss


def predictions(learner: DiffusionLearner, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Noisy latents and what is predicted from them in a training step, under the same random numbers each time."""
    found = []

    def model(noisy: Tensor, *inputs: Tensor) -> Tensor:
        if noisy.requires_grad:
            noisy.retain_grad()
        found.append((noisy, learner.unwrapped_model.eval()(noisy, *inputs)))
        return found[0][1]

    torch.manual_seed(7)
    learner.loss(model, batch, StepInfo(0, 0))
    return found[0]


def test_the_original_reaches_the_model_through_the_noisy_latents_alone(monkeypatch):
    """At the last timestep they are noise: what is predicted there follows the low-resolution clip."""
    monkeypatch.setattr(training, "LAST", 0.0)
    learner = make_learner("diffusion", PartConfig(**LOOP), DENOISER)
    nn.init.normal_(learner.unwrapped_model.unet.conv_out.weight, std=0.1)  # which starts at 0
    monkeypatch.setattr(torch, "randint", lambda highest, size, device: torch.full(size, timestep))
    generator = torch.Generator().manual_seed(1)
    high, low, other = torch.randn(3, 2, 2, 32, 4, generator=generator)
    mel, other_mel = torch.randn(2, 2, 1, 256, 32, generator=generator)
    timestep = 999
    with torch.no_grad():
        _, before = predictions(learner, (torch.cat([high, low], dim=1), mel))
        for batch, least, most in (
            ((torch.cat([other, low], dim=1), mel), 0, 1e-3),
            ((torch.cat([high, other], dim=1), mel), 2e-2, math.inf),
            ((torch.cat([high, low], dim=1), other_mel), 2e-3, math.inf),
        ):
            _, after = predictions(learner, batch)
            assert least <= ((after - before).norm() / before.norm()).item() < most
    timestep = 400
    latents = torch.cat([high, low], dim=1).requires_grad_()
    noisy, made = predictions(learner, (latents, mel))
    made.square().sum().backward()
    through_noise = schedule().alphas_cumprod[400].sqrt() * noisy.grad
    assert through_noise.norm() > 1e-3
    torch.testing.assert_close(latents.grad[:, :2], through_noise, rtol=1e-4, atol=1e-6)
    assert latents.grad[:, 2:].norm() > 1e-3


def test_diffusion_training_leaves_the_autoencoder_alone(straight, trained):
    run = straight("diffusion").run
    vae = run.path.parent / "vae"
    assert Run.open(vae).weights_sha256() == Run.open(trained / "vae").weights_sha256()
    assert os.readlink(vae / "last") == os.readlink(trained / "vae" / "last")
    assert not any("vae" in name or "autoencoder" in name for name in load_weights(run))


def test_averaged_weights_have_the_statistics_of_training(straight):
    learner = straight("diffusion").learner
    norms = [
        [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        for model in (learner.ema_model, learner.unwrapped_model)
    ]
    assert len(norms[0]) == 3
    for averaged, trained_one in zip(*norms, strict=True):
        assert torch.equal(averaged.running_mean, trained_one.running_mean)
        assert torch.equal(averaged.running_var, trained_one.running_var)
        assert averaged.num_batches_tracked == 3
        assert (averaged.running_var - 1).abs().max() > 1e-3
        assert not torch.equal(averaged.weight, trained_one.weight)


# --- plans ------------------------------------------------------------------------------------------------------------


TINY = Plan(
    *(COMPLETION, VAE, DENOISER, VOCODER),
    *(PartConfig(**LOOP), VaeTraining(**LOOP), PartConfig(**LOOP), VocoderTraining(**LOOP | DISCRIMINATORS)),
)


@pytest.mark.parametrize("plan", [SMALL_PLAN, FULL_PLAN, TINY])
@pytest.mark.parametrize("steps", [1, 3, 257, 1_000])
def test_a_plan_lasts_as_many_steps_as_requested(plan, steps):
    more = () if plan is SMALL_PLAN else (3 * steps,)
    lasting = plan.lasting(4 * steps, steps, 2 * steps, *more)
    for config, wanted in zip(trainings(lasting), (4 * steps, steps, 2 * steps, *more), strict=True):
        assert TrainingOrder(config.examples, config).total_steps(0) == config.max_steps == wanted
        fewer = dataclasses.replace(config, epochs=config.epochs - 1) if config.epochs > 1 else None
        assert fewer is None or TrainingOrder(fewer.examples, fewer).total_steps(0) < wanted + config.examples
    assert {config.seed for config in trainings(plan.lasting(4, 5, 6, len(more), seed=3))} == {3}
    assert lasting.lasting(4, 5, 6, len(more)) == plan.lasting(4, 5, 6, len(more))
    assert (lasting.vae, lasting.denoiser, lasting.vocoder) == (plan.vae, plan.denoiser, plan.vocoder)


def trainings(plan: Plan) -> list:
    configs = (plan.completion_training, plan.vae_training, plan.training, plan.vocoder_training)
    return [config for config in configs if config is not None]


def test_a_vocoder_is_trained_where_it_has_steps_and_the_plan_has_one():
    assert TINY.lasting(1, 1, 1).vocoder_training is None
    assert SMALL_PLAN.lasting(1, 1, 1) == SMALL_PLAN.lasting(1, 1, 1, 0)
    with pytest.raises(UserError, match="vocoder_steps=5 is not allowed; use 0, or a plan that trains a vocoder"):
        SMALL_PLAN.lasting(1, 1, 1, 5)


def test_a_plan_may_be_lowered_but_not_raised():
    lowered = SMALL_PLAN.lasting(8, 8, 8, batch_size=8, clip_seconds=0.64)
    assert [config.batch_size for config in trainings(lowered)] == [4, 4, 8]
    assert [config.clip_seconds for config in trainings(lowered)] == [0.64, 0.64, 0.64]
    assert lowered.training.epochs == math.ceil(8 * 8 / lowered.training.examples)


def test_a_plan_may_take_its_steps_in_pieces():
    config = dataclasses.replace(TINY.training, accumulate=2, batch_size=2)
    lasting = dataclasses.replace(TINY, training=config).lasting(1, 1, 7, 1).training
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
    for config in trainings(plan):
        assert config.batch_size <= config.examples
        assert config.clip_length % (16 * 480) == 0


def test_the_small_plan_runs():
    plan, frames = SMALL_PLAN, SMALL_PLAN.training.clip_length // 480
    vae, denoiser = MelVae(plan.vae).eval(), Denoiser(plan.denoiser).eval()
    mel = torch.randn(1, 1, 256, frames)
    with torch.no_grad():
        latents = vae.encode(mel)
        assert latents.shape == (1, 8, 64, frames // 4)
        assert denoiser(latents, torch.tensor([3]), latents, mel).shape == latents.shape
        assert vae.decode(latents).shape == mel.shape


def test_the_full_plan_has_the_sizes_of_the_source_document():
    """Of source document 004: autoencoder, UNet, encoder, and clips of 10.24 s."""
    vae, unet, training = FULL_PLAN.vae, FULL_PLAN.denoiser, FULL_PLAN.training
    assert (vae.channels, vae.num_res_blocks, vae.latent_channels) == ((128, 256, 512, 1024), 2, 16)
    assert (unet.channels, unet.num_res_blocks, unet.head_channels) == ((128, 256, 384, 640), 2, 32)
    assert (unet.attention, unet.transformers, unet.context) == ((False, True, True, True), 2, "sequence")
    encoder = unet.encoder
    assert (encoder.channels, encoder.hidden_dim, encoder.context_dim) == ((32, 64, 256), 256, 128)
    assert (encoder.num_layers, encoder.num_heads, encoder.ffn_dim, encoder.positions) == (4, 8, 512, 1024)
    assert training.clip_seconds == FULL_PLAN.vae_training.clip_seconds == 10.24
    vocoder = FULL_PLAN.vocoder
    assert (vocoder.channels, vocoder.upsample_rates, vocoder.resblock_kernels) == (
        1536,
        (6, 5, 4, 2, 2),
        (3, 7, 11, 15),
    )
    assert (Plan().vae, Plan().denoiser, Plan().vocoder) == (vae, unet, vocoder)


def test_a_plan_trains_every_part(tmp_path, library):
    runs = TINY.lasting(1, 1, 2, 1).train(tmp_path / "all", library)
    assert {name: run.path for name, run in runs.items()} == {name: tmp_path / "all" / name for name in PARTS}
    assert [len(run.metrics("train")) for run in runs.values()] == [1, 1, 2, 1]
    assert SuperResolver(tmp_path / "all").vocoder is not None  # what is trained is used
    without = TINY.lasting(1, 1, 2).train(tmp_path / "some", library)
    assert list(without) == ["completion", "vae", "diffusion"]
    assert without["diffusion"].metrics() == runs["diffusion"].metrics()
    assert SuperResolver(tmp_path / "some").vocoder is None
    assert runs["diffusion"].config["sizes"]["context"] == "sequence"
