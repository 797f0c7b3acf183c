"""The settings of a training: every bad one is refused by its name, before anything runs."""

import dataclasses
import math

import pytest
import torch

from lib.model.cascade import CascadeConfig
from lib.model.masks import MASKINGS, MaskingConfig
from lib.training.config import (
    AdversaryConfig,
    CurriculumConfig,
    LoopConfig,
    TrainConfig,
    resolved_precision,
)
from lib.training.losses import MASK_TERMS, LossConfig
from lib.util.configs import from_fields
from lib.util.errors import UserError

COUNTS = ("epochs", "batch_size", "accumulate", "checkpoint_every", "num_workers", "gather_every")
OPTIONAL_COUNTS = ("max_steps", "patience", "cpu_threads", "max_train_pairs", "max_val_pairs")
BAD = (
    [(name, value, "a whole number, 1 or more$") for name in COUNTS for value in (0, -1, 1.5, None, True, "8")]
    + [(name, value, "a whole number, 1 or more$") for name in OPTIONAL_COUNTS for value in (0, 2.0, "8")]
    + [("warmup_steps", value, "a whole number, 0 or more$") for value in (-1, 0.5, None)]
    + [("seed", value, "a whole number, 0 or more, at most 2147483647$") for value in (-1, 0.5, None, 2**31)]
    + [("learning_rate", value, "a finite number, above 0$") for value in (0, -1e-4, math.nan, math.inf, "1e-4", None)]
    + [("agent_learning_rate", value, "a finite number, above 0$") for value in (0, -1e-4, math.nan, "1e-4")]
    + [("clip", value, "a finite number, above 0$") for value in (0, -1.0, math.inf, math.nan)]
    + [("weight_decay", value, "a finite number, 0 or more$") for value in (-0.1, math.nan, math.inf, None)]
    + [("ema", value, "a finite number, 0 or more, below 1$") for value in (1, 1.0, -0.1, math.nan, "0.9", None)]
    + [("precision", value, "one of fp32, bf16, auto$") for value in ("fp16", "", None)]
    + [("compile", value, "true or false$") for value in (1, None, "true")]
    + [("schedule", value, "one of constant, cosine$") for value in ("linear", None)]
)


@pytest.mark.parametrize(("name", "value", "expected"), BAD)
def test_a_bad_value_is_refused_by_its_name(name, value, expected):
    with pytest.raises(UserError, match=f"^{name}=.* is not allowed; use {expected}"):
        TrainConfig(**{name: value})


def test_what_every_training_has_is_checked_for_every_training():
    general = {field.name for field in dataclasses.fields(LoopConfig)}
    assert {name for name, _, _ in BAD} - general == {"agent_learning_rate"}
    for name, value, expected in BAD:
        if name in general:
            with pytest.raises(UserError, match=f"^{name}=.* is not allowed; use {expected}"):
                LoopConfig(**{name: value})


def test_what_is_derived():
    assert (LoopConfig(clip=3.0).max_norm, LoopConfig(clip=None).max_norm) == (3.0, math.inf)
    assert LoopConfig().target_shuffling == 0
    assert TrainConfig(curriculum=CurriculumConfig(target_shuffling=0.4)).target_shuffling == 0.4


def test_every_field_has_been_given_a_bad_value():
    nested = {"loss", "curriculum", "adversary"}
    assert {name for name, _, _ in BAD} | nested == {field.name for field in dataclasses.fields(TrainConfig)}


def test_every_choice_and_every_bound_is_allowed():
    for precision in ("fp32", "bf16", "auto"):
        for schedule in ("constant", "cosine"):
            TrainConfig(precision=precision, schedule=schedule)
    TrainConfig(clip=None, agent_learning_rate=None, max_steps=None, ema=0, weight_decay=0, warmup_steps=0)
    TrainConfig(ema=0.9999, epochs=1, batch_size=1, max_val_pairs=1, num_workers=4, patience=1)


# --- nested -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("loss", {"mel_weight": -1}, r"loss\.mel_weight=-1 is not allowed; use a finite number, 0 or more"),
        ("loss", {"mel_weight": "1"}, r"loss\.mel_weight='1' is not allowed; use a finite number, 0 or more"),
        ("loss", {"window_seconds": 0.01}, r"loss\.window_seconds=0\.01 is not allowed"),
        ("loss", {"zeta": 2, "mel": 1}, r"loss\.zeta is unknown; check its name; loss\.mel is unknown"),
        ("curriculum", {"noise_rate": -1}, r"curriculum\.noise_rate=-1 is not allowed; use a finite number, 0 or more"),
        ("curriculum", {"noise": 1}, r"curriculum\.noise is unknown"),
        (
            "adversary",
            {"discriminator_warmup": -1},
            r"adversary\.discriminator_warmup=-1 is not allowed; use a whole number, 0 or",
        ),
        ("adversary", {"gradient_penalty": 1}, r"adversary\.gradient_penalty is unknown"),
    ],
)
def test_bad_sections_of_a_saved_config_are_refused_by_the_names_of_their_fields(part, values, message):
    saved = dataclasses.asdict(TrainConfig())
    saved[part] |= values
    with pytest.raises(UserError, match=f"^{message}"):
        from_fields(TrainConfig, saved)


def test_a_section_that_lacks_a_field_is_refused():
    saved = dataclasses.asdict(TrainConfig())
    del saved["curriculum"]["noise_rate"]
    with pytest.raises(UserError, match=r"^TrainConfig lacks the field curriculum\.noise_rate"):
        from_fields(TrainConfig, saved)


def test_a_config_comes_back_from_its_json():
    config = TrainConfig(
        max_steps=5, loss=LossConfig(mel_weight=2.0, window_seconds=None), adversary=AdversaryConfig(1e-4)
    )
    assert from_fields(TrainConfig, dataclasses.asdict(config)) == config


# --- what must fit together -------------------------------------------------------------------------------------------


def test_an_adversarial_weight_needs_a_discriminator():
    with pytest.raises(
        UserError, match=r"^adversarial_weight=0\.1 needs a discriminator: set discriminator_learning_rate"
    ):
        TrainConfig(loss=LossConfig(adversarial_weight=0.1))
    TrainConfig(loss=LossConfig(adversarial_weight=0.1), adversary=AdversaryConfig(1e-4))
    TrainConfig(adversary=AdversaryConfig(1e-4))  # one that the loss does not use is allowed


@pytest.mark.parametrize("term", MASK_TERMS)
def test_terms_on_masks_need_a_masking(term):
    config = TrainConfig(loss=LossConfig(**{f"{term}_weight": 0.5}))
    with pytest.raises(UserError, match=f"^{term}_weight needs masks: set masking='learned', or the weight to 0"):
        config.check_model(CascadeConfig.reference(), MaskingConfig("none"))
    for masking in MASKINGS[1:]:
        config.check_model(CascadeConfig.reference(), MaskingConfig(masking))
    TrainConfig().check_model(CascadeConfig.reference(), MaskingConfig("none"))


# --- curriculum -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epoch", "rate", "ceiling", "start", "expected"),
    [
        (0, 0.1, 0.3, 0, 0.0),
        (1, 0.1, 0.3, 0, 0.1),
        (2.5, 0.1, 0.3, 0, 0.25),
        (3, 0.1, 0.3, 0, 0.3),
        (50, 0.1, 0.3, 0, 0.3),
        (50, 0.1, 1.0, 0, 1.0),
        (4, 0.1, 0.3, 5, 0.0),  # never negative
        (5, 0.1, 0.3, 5, 0.0),
        (7, 0.02, 0.3, 5, 0.04),
        (100, 0.0, 0.3, 0, 0.0),
        (100, 0.1, 0.0, 0, 0.0),
    ],
)
def test_the_share_grows_from_its_start_to_its_ceiling(epoch, rate, ceiling, start, expected):
    assert CurriculumConfig(rate, ceiling, start).noise_share(epoch) == pytest.approx(expected)


def test_by_default_there_is_no_noise_and_no_shuffling():
    config = CurriculumConfig()
    assert config.noise_share(1000) == 0
    assert config.target_shuffling == 0


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("noise_rate", -0.1, "0 or more"),
        ("noise_rate", math.nan, "0 or more"),
        ("noise_ceiling", 1.1, "at most 1"),
        ("noise_ceiling", -0.1, "0 or more"),
        ("noise_start", -1, "a whole number, 0 or more"),
        ("noise_start", 1.5, "a whole number, 0 or more"),
        ("target_shuffling", 1.5, "at most 1"),
        ("target_shuffling", math.inf, "at most 1"),
    ],
)
def test_a_bad_curriculum_is_refused_by_its_field(field, value, expected):
    with pytest.raises(UserError, match=f"^{field}=.* is not allowed; use .*{expected}"):
        CurriculumConfig(**{field: value})


# --- memory and precision ---------------------------------------------------------------------------------------------


def test_memory_advice_names_what_can_be_lowered():
    advice = TrainConfig(batch_size=8, accumulate=2).memory_advice(16.0)
    assert "lower batch_size (now 8)" in advice
    assert "batch_size=4 with accumulate=4 trains alike" in advice
    assert "set precision to bf16 (now fp32)" in advice
    assert advice.endswith("or lower clip_seconds (now 16)")


def test_memory_advice_names_nothing_that_cannot_be_lowered():
    advice = TrainConfig(batch_size=1, precision="bf16").memory_advice(2.5)
    assert advice == "lower clip_seconds (now 2.5)"
    assert "precision" not in TrainConfig(batch_size=2, precision="bf16").memory_advice(2.5)
    assert "batch_size" not in TrainConfig(batch_size=1).memory_advice(2.5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_chosen_precision_stays(precision):
    assert resolved_precision(precision) == precision


@pytest.mark.parametrize(
    ("gpu", "gpu_computes", "tiles", "expected"),
    [
        (True, True, False, "bf16"),
        (True, False, True, "fp32"),
        (False, False, True, "bf16"),
        (False, True, False, "fp32"),
    ],
)
def test_auto_is_what_the_hardware_computes_in(monkeypatch, gpu, gpu_computes, tiles, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: gpu_computes or including_emulation
    )
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_tile": tiles})
    assert resolved_precision("auto") == expected


def test_auto_on_this_machine():
    """By what Linux says of the processor, where there is no GPU."""
    if torch.cuda.is_available():
        assert resolved_precision("auto") in ("fp32", "bf16")
        return
    with open("/proc/cpuinfo") as file:
        flags = {flag for line in file if line.startswith("flags") for flag in line.split()}
    assert resolved_precision("auto") == ("bf16" if "amx_tile" in flags else "fp32")
