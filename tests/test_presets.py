"""Presets: every one builds, overrides reach their field, and a project is made once and then found again."""

import dataclasses

import pytest
import yaml

import lib.presets
from lib.lab.variants import NAMED, VARIANTS
from lib.model.cascade import CascadeConfig
from lib.model.masks import MaskingConfig
from lib.presets import OBJECTIVE, PRESETS, load_preset
from lib.training.config import NESTED, TrainConfig
from lib.util.errors import UserError

# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds(name):
    preset = load_preset(name)
    assert preset.name == name
    assert isinstance(preset.cascade, CascadeConfig)
    assert isinstance(preset.train, TrainConfig)
    assert len(preset.cascade.stages) == 2
    assert all(stage.num_layers == preset.num_layers for stage in preset.cascade.stages)


def test_the_presets_are_those_of_the_design():
    smoke, demo, full = (PRESETS[name] for name in ("smoke", "demo", "full"))
    assert [p.codec for p in (smoke, demo, full)] == ["mdct", "mdct", "encodec"]
    assert [p.clip_seconds for p in (smoke, demo, full)] == [2, 4, 16]
    assert [p.num_layers for p in (smoke, demo, full)] == [2, 6, 6]
    assert demo.listen_seconds == full.listen_seconds == 16
    train = full.train
    assert (train.epochs, train.batch_size, train.learning_rate) == (200, 8, 1e-4)
    assert (train.weight_decay, train.clip, train.max_steps) == (0.01, 10.0, None)
    for preset in (smoke, demo, full):  # what is trained is the same; only how long and on what differs
        assert preset.masking == MaskingConfig("learned")
        assert preset.train.loss == OBJECTIVE
        assert preset.train.adversary.discriminator_learning_rate == 1e-4
        assert preset.train.agent_learning_rate > preset.train.learning_rate
        assert preset.train.ema


@pytest.mark.parametrize("name", PRESETS)
def test_no_warm_up_outlasts_its_preset(name):
    """Short presets must come to what their settings promise: a heard discriminator, the full learning rate, noise."""
    train = PRESETS[name].train
    if train.max_steps is not None:
        assert train.warmup_steps < train.max_steps / 2
        assert train.adversary.discriminator_warmup < train.max_steps / 2
        assert train.checkpoint_every <= train.max_steps


@pytest.mark.parametrize(
    ("setting", "value", "found"),
    [
        ("codec", "encodec", lambda p: p.codec),
        ("clip_seconds", 3.0, lambda p: p.clip_seconds),
        ("num_layers", 1, lambda p: p.cascade.stages[1].num_layers),
        ("num_stages", 3, lambda p: len(p.cascade.stages)),
        ("anti_cheating", 0.25, lambda p: p.cascade.anti_cheating),
        ("max_steps", 7, lambda p: p.train.max_steps),
        ("max_steps", None, lambda p: p.train.max_steps),
        ("clip", None, lambda p: p.train.clip),
        ("precision", "bf16", lambda p: p.train.precision),
        ("seed", 5, lambda p: p.train.seed),
        ("data_seed", 6, lambda p: p.data_seed),
        ("input_weight", 0.9, lambda p: p.train.loss.input_weight),
        ("window_seconds", None, lambda p: p.train.loss.window_seconds),
        ("anti_modulation", "log", lambda p: p.train.loss.anti_modulation),
        ("noise_rate", 0.02, lambda p: p.train.curriculum.noise_rate),
        ("target_shuffling", 0.5, lambda p: p.train.curriculum.target_shuffling),
        ("discriminator_every", 3, lambda p: p.train.adversary.discriminator_every),
        ("discriminator_spectral_norm", True, lambda p: p.train.adversary.discriminator_spectral_norm),
        ("masking", "energy", lambda p: p.masking.masking),
        ("hard_masks", True, lambda p: p.masking.hard_masks),
        ("patience", 2, lambda p: p.train.patience),
        ("accumulate", 2, lambda p: p.train.accumulate),
        ("agent_learning_rate", None, lambda p: p.train.agent_learning_rate),
        ("demo_every", 5, lambda p: p.demo_every),
    ],
)
def test_an_override_reaches_its_field_and_no_other(setting, value, found):
    changed, plain = load_preset("smoke", **{setting: value}), load_preset("smoke")
    assert found(changed) == value
    assert found(plain) != value

    def flat(preset):
        values = dataclasses.asdict(preset)
        train = values.pop("train")
        nested = [values.pop("masking"), *(train.pop(room) for room in NESTED)]
        return values | train | dict(item for room in nested for item in room.items())

    assert flat(changed) == flat(plain) | {setting: value}
    assert PRESETS["smoke"] == plain  # the table itself is never written to


def test_every_setting_has_one_room():
    """A name that is a field of two rooms would reach only one of them."""
    names = [f.name for f in dataclasses.fields(lib.presets.Preset) if f.name not in ("name", "train", "masking")]
    names += [f.name for f in dataclasses.fields(TrainConfig) if f.name not in NESTED]
    names += [f.name for room in (*NESTED.values(), MaskingConfig) for f in dataclasses.fields(room)]
    assert len(names) == len(set(names))
    for name in names:
        with pytest.raises(UserError, match=f"setting {name}="):  # each can be reached, and takes no list
            load_preset("smoke", **{name: [object]})


def test_numbers_are_taken_as_yaml_writes_them():
    assert isinstance(yaml.safe_load("1e-4"), str)  # YAML 1.1 wants a dot in it
    assert load_preset("smoke", learning_rate="1e-4").train.learning_rate == 1e-4
    clip = load_preset("smoke", clip=5).train.clip
    assert (clip, type(clip)) == (5.0, float)
    assert load_preset("smoke", clip="2.5").train.clip == 2.5


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("max_steps", True, "type int or none"),
        ("max_steps", 4.0, "type int or none"),
        ("max_steps", "4", "type int or none"),
        ("batch_size", None, "type int"),
        ("learning_rate", True, "type float"),
        ("learning_rate", "fast", "type float"),
        ("learning_rate", None, "type float"),
        pytest.param("learning_rate", 10**400, "type float", id="learning_rate-huge"),
        ("clip", "none", "type float or none"),
        ("codec", 1, "type str"),
        ("clip_seconds", [1], "type float"),
        ("seed", {}, "type int"),
        # of the right type, but no sense
        ("learning_rate", "nan", "finite number"),
        ("max_steps", 0, "whole number, 1 or more"),
        ("precision", "fp8", "use one of fp32, bf16"),
        ("clip_seconds", 0, "more than 0"),
        ("clip_seconds", ".nan", "type float"),
        ("listen_seconds", float("nan"), "more than 0"),
        ("listen_pairs", 0, "more than 0"),
        ("num_stages", 0, "1 or more"),
        ("num_layers", 0, "1 or more"),
        ("anti_cheating", -1, "0 or more"),
        ("input_weight", -0.3, "0 or more"),
        ("num_workers", 0, "1 or more"),
        ("patience", 0, "whole number, 1 or more, or none"),
        ("accumulate", 0, "whole number, 1 or more"),
        ("ema", 1, "from 0 to below 1"),
        ("schedule", "linear", "use one of constant, cosine"),
        ("masking", "loud", "use one of none, constant"),
        ("masking", "none", "overlap_weight needs masks"),
        ("hard_masks", 1, "type bool"),
        ("noise_ceiling", 1.5, "at most 1"),
        ("target_shuffling", -0.1, "0 or more"),
        ("gradient_penalty", "inf", "finite number"),
        ("discriminator_every", 0, "whole number, 1 or more"),
        ("discriminator_learning_rate", None, "adversarial_weight=0.05 needs a discriminator"),
        ("demo_every", 0, "more than 0"),
        ("judged_pairs", 0, "more than 0"),
    ],
)
def test_a_bad_value_names_the_setting_and_what_it_takes(setting, value, words):
    with pytest.raises(UserError) as caught:
        load_preset("smoke", **{setting: value})
    assert setting in str(caught.value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_name_lists_the_choices():
    with pytest.raises(UserError, match="preset: unknown 'big'; choose one of smoke, demo, full"):
        load_preset("big")
    for name in ("max_step", "train", "loss", "curriculum", "adversary", "name"):
        with pytest.raises(
            UserError, match=f"unknown '{name}'; choose from .*batch_size, .*hard_masks, .*input_weight, .*noise_rate"
        ):
            load_preset("demo", **{name: 1})


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
    plan = load_preset(name).plan
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
        ("ablation_variants", "all", lambda p: [v.name for v in p.plan.variants]),
        ("ablation_layers", 3, lambda p: p.plan.num_layers),
        ("ablation_steps", 700, lambda p: (p.plan.train.max_steps, p.plan.train.checkpoint_every)),
        ("ablation_seeds", 4, lambda p: p.plan.seeds),
        ("ablation_batch_size", 3, lambda p: p.plan.train.batch_size),
        ("ablation_val_pairs", 5, lambda p: p.plan.train.max_val_pairs),
        ("ablation_clip_seconds", 0.5, lambda p: p.ablation_clip_seconds),
    ],
)
def test_an_override_of_the_ablation_reaches_the_plan(setting, value, found):
    wanted = {"ablation_variants": [v.name for v in VARIANTS], "ablation_steps": (700, 500)}.get(setting, value)
    changed, plain = load_preset("smoke", **{setting: value}), load_preset("smoke")
    assert found(changed) == wanted
    assert found(plain) != wanted
    assert changed.train == plain.train
    assert changed.cascade == plain.cascade


def test_settings_of_the_training_leave_the_ablation_alone():
    plain = load_preset("smoke").plan
    assert load_preset("smoke", max_steps=3, precision="bf16", learning_rate=1e-2, num_layers=3).plan == plain


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("data_seed", -1, "data_seed=-1 is not allowed; use a whole number, 0 or more"),
        ("ablation_variants", "some", "'some' is not allowed; use one of named, all"),
        ("ablation_seeds", 0, "1 or more"),
        ("ablation_layers", 0, "1 or more"),
        ("ablation_steps", 0, "1 or more"),
        ("ablation_steps", -3, "1 or more"),
        ("ablation_batch_size", 0, "1 or more"),
        ("ablation_val_pairs", 0, "1 or more"),
        ("ablation_clip_seconds", 0, "more than 0"),
        ("ablation_seeds", 2.5, "type int"),
        ("ablation_steps", None, "type int"),
    ],
)
def test_a_bad_setting_of_the_ablation_is_named(setting, value, words):
    with pytest.raises(UserError) as caught:
        load_preset("smoke", **{setting: value})
    assert setting in str(caught.value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


# --- project ----------------------------------------------------------------------------------------------------------


def test_super_resolution_is_trained_with_the_seed_of_training():
    for seed in (0, 5):
        preset = load_preset("smoke", seed=seed)
        for plan in (preset.superres, preset.recorded_superres):
            assert {c.seed for c in (plan.vae_training, plan.training, plan.vocoder_training)} == {seed}
