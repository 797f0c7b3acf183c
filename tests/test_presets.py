"""Presets: each builds, each setting is changed by its address, bad values and old names are answered in one line."""

import dataclasses
from pathlib import Path

import pytest
import yaml
from settings import settings_of

import lib.presets
from lib.lab.variants import NAMED, VARIANTS
from lib.model.cascade import CascadeConfig
from lib.model.masks import MaskingConfig
from lib.presets import PRESETS, load_preset
from lib.training.config import CurriculumConfig, TrainConfig
from lib.util.configs import flat
from lib.util.errors import UserError

# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds(name):
    preset = load_preset(name)
    assert preset.name == name
    assert isinstance(preset.model.cascade, CascadeConfig)
    assert isinstance(preset.train, TrainConfig)
    assert len(preset.model.cascade.stages) == preset.model.num_stages
    assert all(stage.num_layers == preset.model.num_layers for stage in preset.model.cascade.stages)


def test_settings_are_a_mapping():
    """As `papermill -y` passes them, not as -p does."""
    for text in ("train.max_steps", "{train.max_steps: 40}", ["train.max_steps"]):
        with pytest.raises(UserError, match=r"overrides=.* is not allowed; use a mapping: papermill -y"):
            load_preset("smoke", text)
    assert load_preset("smoke", {}) == load_preset("smoke")


def test_the_presets_are_those_of_the_design():
    smoke, demo, full = (PRESETS[name] for name in ("smoke", "demo", "full"))
    assert [p.codec for p in (smoke, demo, full)] == ["mdct", "mdct", "encodec"]
    assert [p.data.clip_seconds for p in (smoke, demo, full)] == [2, 4, 16]
    assert [p.model.num_layers for p in (smoke, demo, full)] == [2, 6, 6]
    assert demo.listening.seconds == full.listening.seconds == 16
    train = full.train
    assert (train.epochs, train.batch_size, train.learning_rate) == (200, 8, 1e-4)
    assert (train.weight_decay, train.max_steps) == (0.01, None)
    for preset in (smoke, demo, full):  # what is trained is the same; only how long and on what differs
        assert preset.train.loss == demo.train.loss
        assert preset.train.agent_learning_rate > preset.train.learning_rate


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("codec", ["encodec", "a/folder of weights", "mdct"])
def test_the_model_suits_the_codec_unless_something_else_is_asked_for(name, codec):
    """Wide masks cut between bands, and amplitudes are cubes of mdct's latents only."""
    preset = load_preset(name, {"codec": codec})
    assert preset.codec == codec
    reference = 2, MaskingConfig("learned", restore_rms=True, root=1)
    ours = 0, MaskingConfig("wide", restore_rms=False, root=3)
    suited = ours if codec == "mdct" and name != "reference" else reference
    assert (preset.model.num_stages, preset.model.masking) == suited
    assert dataclasses.replace(preset, codec="", model=PRESETS[name].model) == dataclasses.replace(
        PRESETS[name], codec=""
    )
    asked = load_preset(name, {"model.masking.masking": "wide", "codec": codec, "model.num_stages": 1})
    assert (asked.model.num_stages, asked.model.masking.masking) == (1, "wide")


def test_the_reference_is_the_system_of_the_source_documents():
    """Two stages behind masks whose clips stay as loud, every term of the source documents, a discriminator, noise."""
    preset = PRESETS["reference"]
    assert (preset.model.num_stages, preset.model.masking) == (2, MaskingConfig("learned", restore_rms=True))
    weights = preset.train.loss.weights
    ours = {f"{name}_weight" for name in ("onsets", "notes", "onsets_left", "notes_left", "tones")}
    assert {name for name, weight in weights.items() if not weight} == ours | {"input_rms_weight", "target_rms_weight"}
    assert {name for name, weight in PRESETS["demo"].train.loss.weights.items() if weight} == ours
    assert preset.train.adversary.discriminator_learning_rate == 1e-4
    assert preset.train.curriculum.noise_rate == 0.1


@pytest.mark.parametrize("name", PRESETS)
def test_no_warm_up_outlasts_its_preset(name):
    """A short preset reaches what its settings promise: a discriminator in the loss, the full learning rate, noise."""
    train = PRESETS[name].train
    if train.max_steps is not None:
        assert train.warmup_steps < train.max_steps / 2
        assert train.adversary.discriminator_warmup < train.max_steps / 2
        assert train.checkpoint_every <= train.max_steps


def leaves(config, prefix=""):
    """Every value of a nested config, by attribute path."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        elif isinstance(value, dict):
            yield from flat(value, f"{prefix}{field.name}").items()
        else:
            yield prefix + field.name, value


ONLY_FULL = "superres.vocoder_steps"  # refused by the other presets
ONLY_REFERENCE = "train.loss.adversarial_weight"  # refused without a discriminator
ADDRESSES = [a for a, _ in leaves(PRESETS["smoke"]) if a not in ("name", "codec", ONLY_FULL, ONLY_REFERENCE)]
OTHER = {  # values that the smoke preset does not have, where the type does not tell one
    "data.pair_mode": "cross",
    "model.masking.masking": "learned",
    "model.masking.root": 5,
    "train.schedule": "cosine",
    "train.precision": "bf16",
    "train.loss.anti_modulation": "log",
    "ablation.variants": "all",
    "superres.plan": "full",
    "superres.clip_seconds": 0.32,
    "record.variants": "all",
}


def other(value):
    if isinstance(value, bool):
        return not value
    return 0.5 if isinstance(value, float) else (value or 0) + 1


@pytest.mark.parametrize("address", ADDRESSES)
def test_every_setting_is_changed_by_its_own_address_and_no_other(address):
    """So that no two settings can share a name, and none is out of reach."""
    plain = load_preset("smoke")
    before = dict(leaves(plain))
    value = OTHER[address] if address in OTHER else other(before[address])
    assert dict(leaves(load_preset("smoke", {address: value}))) == before | {address: value}
    assert load_preset("smoke") == plain  # the table itself is never written to


def test_none_is_a_value():
    train = load_preset("smoke", dict.fromkeys(("train.max_steps", "train.clip", "train.loss.window_seconds"))).train
    assert (train.max_steps, train.clip, train.loss.window_seconds) == (None, None, None)


def test_the_model_is_built_from_its_section():
    cascade = load_preset(
        "smoke", {"model.num_stages": 3, "model.num_layers": 1, "model.anti_cheating": 0.25}
    ).model.cascade
    assert [stage.num_layers for stage in cascade.stages] == [1, 1, 1]
    assert cascade.anti_cheating == 0.25


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("max_step", "is unknown; did you mean train.max_steps"),
        ("max_steps", "is unknown; did you mean train.max_steps"),
        ("rhythm_weight", "is unknown; did you mean train.loss.rhythm_weight"),
        ("ablation_clip_seconds", "is unknown; did you mean ablation.clip_seconds"),
        ("train.max_step", "is unknown; did you mean train.max_steps"),
        ("train.rhythm_weight", "did you mean train.loss.rhythm_weight"),
        ("train.loss", "is a section; choose from train.loss.input_weight, train.loss.target_weight"),
        ("train", "is a section; choose from train.epochs, "),
        ("zzz", "is unknown; choose from codec, data.clip_seconds, "),
        ("name", "is unknown"),
    ],
)
def test_an_unknown_name_is_answered_with_close_ones_or_the_choices(name, words):
    with pytest.raises(UserError) as caught:
        load_preset("demo", {name: 1})
    assert str(caught.value).startswith(f"setting {name} ")
    assert words in str(caught.value)


def test_an_unknown_preset_lists_the_choices():
    with pytest.raises(UserError, match="preset: unknown 'big'; choose one of smoke, demo, reference, full"):
        load_preset("big")


def test_numbers_are_taken_as_yaml_writes_them():
    assert isinstance(yaml.safe_load("1e-4"), str)  # YAML 1.1 wants a dot in it
    assert load_preset("smoke", {"train.learning_rate": "1e-4"}).train.learning_rate == 1e-4
    assert load_preset("smoke", {"data.clip_seconds": yaml.safe_load("1.5e1")}).data.clip_seconds == 15.0
    clip = load_preset("smoke", {"train.clip": 5}).train.clip
    assert (clip, type(clip)) == (5.0, float)
    with pytest.raises(UserError, match=r"clip='2\.5' is not allowed"):  # in quotes, which YAML takes for text rightly
        load_preset("smoke", {"train.clip": "2.5"})


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("train.max_steps", True, "a whole number, 1 or more"),
        ("train.max_steps", 4.0, "a whole number, 1 or more"),
        ("train.max_steps", "4", "a whole number, 1 or more"),
        ("train.batch_size", None, "a whole number, "),
        ("train.learning_rate", True, "a finite number, above 0"),
        ("train.learning_rate", "fast", "a finite number, above 0"),
        ("train.learning_rate", None, "a finite number, above 0"),
        pytest.param("train.learning_rate", 10**400, "a finite number, above 0", id="learning_rate-huge"),
        ("train.clip", "none", "a finite number, above 0"),
        ("codec", 1, "valid string"),
        ("data.clip_seconds", [1], "a finite number, above 0"),
        ("train.seed", {}, "a whole number, "),
        # of the right type, but no sense
        ("train.learning_rate", "nan", "finite number"),
        ("train.max_steps", 0, "whole number, 1 or more"),
        ("train.precision", "fp8", "use one of fp32, bf16"),
        ("data.clip_seconds", 0, "above 0"),
        ("data.clip_seconds", ".nan", "a finite number, above 0"),
        ("listening.seconds", float("nan"), "above 0"),
        ("listening.pairs", 0, "1 or more"),
        ("model.num_stages", -1, "0 or more"),
        ("model.num_layers", 0, "1 or more"),
        ("model.anti_cheating", -1, "0 or more"),
        ("train.loss.input_weight", -0.3, "0 or more"),
        ("train.num_workers", 0, "1 or more"),
        ("train.patience", 0, "whole number, 1 or more"),
        ("train.accumulate", 0, "whole number, 1 or more"),
        ("train.ema", 1, "0 or more, below 1"),
        ("train.schedule", "linear", "use one of constant, cosine"),
        ("model.masking.masking", "loud", "use one of none, learned, wide"),
        ("train.curriculum.noise_ceiling", 1.5, "at most 1"),
        ("train.curriculum.target_shuffling", -0.1, "0 or more"),
        ("train.adversary.discriminator_warmup", -1, "whole number, 0 or more"),
        ("listening.every", 0, "1 or more"),
        ("evaluation.pairs", 0, "1 or more"),
    ],
)
def test_a_bad_value_names_the_setting_and_what_it_takes(setting, value, words):
    with pytest.raises(UserError) as caught:
        load_preset("smoke", {setting: value})
    assert str(caught.value).startswith(f"{setting}={value!r} is not allowed; use ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("model.masking.masking", "none", "overlap_weight needs masks: set "),
        ("train.adversary.discriminator_learning_rate", None, "train: adversarial_weight=0.05 needs a discriminator: "),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(setting, value, message):
    with pytest.raises(UserError, match=f"^{message}"):
        load_preset("reference", {setting: value})


def test_without_masks_and_stages_there_is_nothing_to_train():
    with pytest.raises(UserError, match=r"^num_stages=0 with masking='none' leaves nothing to train; set one or more"):
        load_preset("demo", {"model.masking.masking": "none"})
    assert not load_preset("demo", {"model.masking.masking": "learned"}).model.cascade.stages


# --- the ablation's settings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "variants", "layers", "seeds", "steps", "batch_size", "val_pairs"),
    [
        ("smoke", NAMED, 1, 2, 10, 4, 8),
        ("demo", NAMED, 2, 3, 50, 4, 32),
        ("full", VARIANTS, 6, 5, 2000, 8, 64),
    ],
)
def test_the_plan_of_every_preset(name, variants, layers, seeds, steps, batch_size, val_pairs):
    plan = load_preset(name).ablation.plan
    assert plan.variants == variants
    assert (plan.num_layers, plan.seeds) == (layers, seeds)
    assert plan.train == TrainConfig(
        epochs=1_000_000,
        max_steps=steps,
        batch_size=batch_size,
        checkpoint_every=min(steps, 500),
        max_val_pairs=val_pairs,
    )
    assert plan.train.precision == "fp32"
    for variant in plan.variants:
        assert all(stage.num_layers == layers for stage in variant.cascade(plan.num_layers).stages)
        assert variant.training(plan.train).max_steps == steps


@pytest.mark.parametrize(
    ("setting", "value", "found"),
    [
        ("ablation.variants", "all", lambda plan: [v.name for v in plan.variants]),
        ("ablation.layers", 3, lambda plan: plan.num_layers),
        ("ablation.steps", 700, lambda plan: (plan.train.max_steps, plan.train.checkpoint_every)),
        ("ablation.seeds", 4, lambda plan: plan.seeds),
        ("ablation.batch_size", 3, lambda plan: plan.train.batch_size),
        ("ablation.val_pairs", 5, lambda plan: plan.train.max_val_pairs),
    ],
)
def test_an_override_of_the_ablation_reaches_the_plan(setting, value, found):
    wanted = {"ablation.variants": [v.name for v in VARIANTS], "ablation.steps": (700, 500)}.get(setting, value)
    changed, plain = load_preset("smoke", {setting: value}), load_preset("smoke")
    assert found(changed.ablation.plan) == wanted
    assert found(plain.ablation.plan) != wanted
    assert changed.train == plain.train
    assert changed.model == plain.model


def test_settings_of_the_training_leave_the_ablation_alone():
    changes = {"train.max_steps": 3, "train.precision": "bf16", "train.learning_rate": 1e-2, "model.num_layers": 3}
    assert load_preset("smoke", changes).ablation == load_preset("smoke").ablation


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("data.seed", -1, "seed=-1 is not allowed; use a whole number, 0 or more"),
        ("ablation.variants", "some", "'some' is not allowed; use one of named, all"),
        ("ablation.seeds", 0, "1 or more"),
        ("ablation.layers", 0, "1 or more"),
        ("ablation.steps", 0, "1 or more"),
        ("ablation.steps", -3, "1 or more"),
        ("ablation.batch_size", 0, "1 or more"),
        ("ablation.val_pairs", 0, "1 or more"),
        ("ablation.clip_seconds", 0, "above 0"),
        ("ablation.seeds", 2.5, "a whole number, "),
        ("ablation.steps", None, "a whole number, "),
    ],
)
def test_a_bad_setting_of_the_ablation_is_named(setting, value, words):
    with pytest.raises(UserError) as caught:
        load_preset("smoke", {setting: value})
    assert str(caught.value).startswith(f"{setting}={value!r} is not allowed; use ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


# --- the other sections -----------------------------------------------------------------------------------------------


def test_super_resolution_is_trained_with_the_seed_it_is_given():
    plan = load_preset("smoke").superres.training_plan(5)
    assert {c.seed for c in (plan.vae_training, plan.training)} == {5}
    assert (plan.vae_training.max_steps, plan.training.max_steps, plan.vocoder_training) == (4, 4, None)


def test_only_the_full_preset_trains_a_vocoder():
    assert [load_preset(name).superres.vocoder_steps > 0 for name in ("smoke", "demo", "full")] == [False, False, True]
    assert load_preset("full", {ONLY_FULL: 0}).superres.training_plan(0).vocoder_training is None
    assert load_preset("full", {ONLY_FULL: 3}).superres.training_plan(0).vocoder_training.max_steps == 3
    with pytest.raises(UserError, match="vocoder_steps=5 is not allowed; use 0, or a plan that trains a vocoder"):
        load_preset("demo", {ONLY_FULL: 5})
    with pytest.raises(UserError, match="vocoder_steps=-1 is not allowed"):
        load_preset("full", {ONLY_FULL: -1})


def test_the_schedule_takes_the_objective_and_its_own_sizes():
    reference = PRESETS["reference"]
    plan = settings_of(load_preset("smoke", {"record.schedule.pairs": 5, "train.patience": 2})).schedule.plan
    assert (plan.train.loss, plan.train.adversary) == (reference.train.loss, reference.train.adversary)
    assert plan.masking == reference.model.masking
    assert plan.train.curriculum == CurriculumConfig(0.002, noise_start=10, target_shuffling=0.25)
    assert (plan.train.epochs, plan.train.max_train_pairs, plan.train.max_val_pairs) == (2, 5, 8)
    assert (plan.train.max_steps, plan.train.patience) == (None, None)


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("max_steps = 24", "max_stepz = 24", "preset smoke: train.max_stepz is unknown"),
        ("batch_size = 4", 'batch_size = "4"', "preset smoke: train.batch_size='4' is not allowed"),
        ("[smoke.record]", "[smoke.records]", "preset smoke: records is unknown"),
        ("[common.train]", "[common.train", "damaged"),
        ("[common.", "[commons.", "no field 'common'"),
    ],
)
def test_a_damaged_file_of_presets_is_named_with_the_preset_and_the_field(tmp_path, monkeypatch, old, new, fault):
    text = Path(lib.presets.__file__).with_suffix(".toml").read_text()
    assert old in text
    (tmp_path / "presets.toml").write_text(text.replace(old, new))
    monkeypatch.setattr(lib.presets, "__file__", str(tmp_path / "presets.py"))
    with pytest.raises(UserError, match=rf"presets\.toml.*{fault}"):
        lib.presets._read_presets()


def test_settings_of_a_record_are_all_there_and_checked():
    for name in PRESETS:
        assert settings_of(load_preset(name)).steps > 0
    with pytest.raises(UserError, match="steps='many' is not allowed"):
        settings_of(load_preset("demo", {"record.steps": "many"}))
    preset = load_preset("demo")
    with pytest.raises(UserError, match="odd is unknown"):
        settings_of(dataclasses.replace(preset, record=preset.record | {"odd": 1}))
