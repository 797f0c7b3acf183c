"""The variants of the ablation: what each one changes, and that each one runs."""

import dataclasses
import itertools
import math

import pytest
import torch

from lib.codec.mdct import MdctCodec
from lib.lab.variants import (
    CAUSES,
    CEILING_GAIN,
    EXPLODING,
    LEARNABLE,
    NAMED,
    PROTECTIONS,
    REFERENCE,
    REPAIR,
    SETS,
    SINGLE_CHANGES,
    START_GAIN,
    VARIANTS,
    WEAK_RESIDUALS,
    Variant,
)
from lib.model.cascade import Cascade, CascadeConfig
from lib.model.projection import rms_ceiling
from lib.model.rms_law import LATENT_RMS, check_collapse
from lib.training.config import TrainConfig
from lib.training.losses import total_loss
from lib.util.configs import differing_fields

BY_NAME = {variant.name: variant for variant in VARIANTS}
CELLS = list(itertools.product((False, True), repeat=3))
LOG_PENALTY = {"train.loss.anti_modulation", "train.loss.anti_modulation_weight"}

# group → the one field that it changes, and in which of two stages; objectives may change any field of the loss
CHANGED = {
    "last residual": {"cascade.stages[1].residual_weight"},
    "residual source": {"cascade.stages[1].residual_source"},
    "spectral norm": {"cascade.stages[0].spectral_norm", "cascade.stages[1].spectral_norm"},
    "clamp": {"cascade.stages[0].clamp", "cascade.stages[1].clamp"},
    "RMS scaling": {"cascade.stages[0].rms_scaling", "cascade.stages[1].rms_scaling"},
    "clipping": {"train.clip"},
    "width": {"cascade.stages[1].width"},
    "learning rate": {"train.learning_rate"},
}


def config_of(variant: Variant) -> dict:
    return {
        "cascade": dataclasses.asdict(variant.cascade(2)),
        "train": dataclasses.asdict(variant.training(TrainConfig())),
    }


def changed(variant: Variant, other: Variant) -> set[str]:
    """The fields in which two variants differ."""
    return {field for field, *_ in differing_fields(config_of(other), config_of(variant))}


# --- all of them ------------------------------------------------------------------------------------------------------


def test_names_are_unique():
    assert len(BY_NAME) == len(VARIANTS)


@pytest.mark.parametrize("name", BY_NAME)
def test_every_variant_builds(name):
    cascade, training = BY_NAME[name].cascade(3), BY_NAME[name].training(TrainConfig(seed=7, batch_size=3))
    assert isinstance(training, TrainConfig)
    assert (training.seed, training.batch_size) == (7, 3)  # what the variant does not name comes from the base
    assert [stage.num_layers for stage in cascade.stages] == [3] * len(cascade.stages)
    assert len(cascade.stages) == BY_NAME[name].stages
    assert cascade.latent_dim == 128


def test_the_exploding_cascade_is_one_that_collapses_by_design():
    (message,) = check_collapse(BY_NAME[EXPLODING].cascade(1))
    assert message.startswith("stage 2: ")
    assert check_collapse(BY_NAME[REFERENCE].cascade(1)) == []


class Flat(MdctCodec):
    """`[B, D, T] → [B, 1, D · T]`, every value a sample."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents.flatten(1)[:, None]


@pytest.mark.parametrize("name", BY_NAME)
def test_forward_and_backward_of_every_variant(name):
    torch.manual_seed(0)
    cascade = Cascade(BY_NAME[name].cascade(1))
    input, target = LATENT_RMS * torch.randn(2, 2, 128, 6)
    output, _ = cascade(input, target)
    loss, _ = total_loss(output, input, target, BY_NAME[name].training(TrainConfig()).loss, Flat())
    loss.backward()
    assert loss.isfinite()
    for parameter, value in cascade.named_parameters():
        assert value.grad is not None, parameter
        assert value.grad.isfinite().all(), parameter
    assert all(sum(p.grad.abs().sum() for p in stage.layers.parameters()) > 0 for stage in cascade.stages)


# --- single changes ---------------------------------------------------------------------------------------------------


def test_the_reference_changes_nothing():
    assert BY_NAME[REFERENCE].cascade(2) == CascadeConfig.reference(2, num_layers=2)
    base = TrainConfig(learning_rate=0.5, clip=3.0)
    assert BY_NAME[REFERENCE].training(base) == base


@pytest.mark.parametrize("variant", SINGLE_CHANGES, ids=lambda variant: variant.name)
def test_a_single_change_changes_one_thing(variant):
    fields = changed(variant, BY_NAME[REFERENCE])
    if variant.factor == "stages":
        first, later = CascadeConfig.reference(2, num_layers=2).stages
        assert {field.split("]")[0] for field in fields} == {f"cascade.stages[{i}" for i in range(2, variant.stages)}
        assert variant.cascade(2).stages == (first, *[later] * (variant.stages - 1))
        assert variant.stages > 2
    elif variant.factor == "objective":
        assert fields
        assert all(field.startswith("train.loss.") for field in fields)
    else:
        assert fields == CHANGED[variant.factor]


def test_every_group_of_single_changes_has_a_member():
    assert {variant.factor for variant in SINGLE_CHANGES} == {*CHANGED, "stages", "objective"}


def test_a_name_with_a_number_tells_the_value():
    for variant in SINGLE_CHANGES:
        cascade, training = variant.cascade(1), variant.training(TrainConfig())
        value = {
            "stages": len(cascade.stages),
            "last residual": cascade.stages[-1].residual_weight,
            "width": cascade.stages[-1].width,
            "learning rate": training.learning_rate,
            "clipping": training.clip,
        }.get(variant.factor)
        if value is not None:
            told = variant.name.split()[0 if variant.factor == "stages" else -1]
            assert float(told) == value, variant.name
    assert BY_NAME["no clipping"].training(TrainConfig()).clip is None
    assert BY_NAME["no clamp"].cascade(1).stages[0].clamp is None
    assert BY_NAME["no RMS scaling"].cascade(1).stages[0].rms_scaling == "off"
    assert BY_NAME["learnable RMS"].cascade(1).stages[0].rms_scaling == "learnable"


def test_objectives():
    losses = {v.name: v.training(TrainConfig()).loss for v in SINGLE_CHANGES if v.factor == "objective"}
    by_root = losses["RMS loss"]
    assert (by_root.input_weight, by_root.target_weight) == (0.0, 0.0)
    assert (by_root.input_rms_weight, by_root.target_rms_weight) == (0.3, 0.3)
    squared, log = losses["anti-modulation corr²"], losses["anti-modulation log"]
    assert (squared.anti_modulation, log.anti_modulation) == ("squared", "log")
    assert dataclasses.replace(log, anti_modulation="squared") == squared  # they differ in the form alone
    assert squared.anti_modulation_weight > 0


# --- what the source documents describe -------------------------------------------------------------------------------


def test_the_exploding_cascade():
    cascade, training = BY_NAME[EXPLODING].cascade(6), BY_NAME[EXPLODING].training(TrainConfig())
    assert cascade.stages[:2] == CascadeConfig.reference().stages
    last = cascade.stages[2]
    assert (last.residual_weight, last.residual_source, last.clamp) == (0.1, "previous", (0.7, 1.5))
    assert (last.spectral_norm, last.rms_scaling, training.clip) == (True, "fixed", 10.0)
    assert len(cascade.stages) == 3


def test_the_repair_changes_the_weight_and_the_clipping():
    assert changed(BY_NAME[REPAIR], BY_NAME[EXPLODING]) == {"cascade.stages[2].residual_weight", "train.clip"}
    assert BY_NAME[REPAIR].cascade(1).stages[2].residual_weight == 0.3
    assert BY_NAME[REPAIR].training(TrainConfig()).clip == 5.0


def test_the_learnable_scalars():
    cascade, training = BY_NAME[LEARNABLE].cascade(1), BY_NAME[LEARNABLE].training(TrainConfig())
    assert [stage.residual_weight for stage in cascade.stages] == [1.0, 0.1]
    assert [stage.residual_source for stage in cascade.stages] == ["mean", "mean"]
    assert [stage.rms_scaling for stage in cascade.stages] == ["learnable", "learnable"]
    assert all(stage.clamp is None and not stage.spectral_norm for stage in cascade.stages)
    assert training.clip == 1.0


# --- the two factorials -----------------------------------------------------------------------------------------------


def one_step_pairs(cells: dict) -> list[tuple[int, Variant, Variant]]:
    """(factor, variant with it off, the same with it on)."""
    return [
        (i, cells[cell], cells[(*cell[:i], True, *cell[i + 1 :])]) for cell in cells for i in range(3) if not cell[i]
    ]


@pytest.mark.parametrize("cells", [PROTECTIONS, CAUSES], ids=["protection", "cause"])
def test_a_factorial_has_every_cell_once(cells):
    assert sorted(cells) == CELLS
    configs = [config_of(variant) for variant in cells.values()]
    assert all(a != b for a, b in itertools.combinations(configs, 2))


def test_one_protection_changes_one_field():
    stages = range(3)
    fields = [
        {f"cascade.stages[{i}].spectral_norm" for i in stages},
        {f"cascade.stages[{i}].clamp" for i in stages},
        {"train.clip"},
    ]
    pairs = one_step_pairs(PROTECTIONS)
    assert len(pairs) == 12
    assert all(changed(on, off) == fields[factor] for factor, off, on in pairs)


def test_a_cell_has_the_protections_that_it_is_named_after():
    for (norm, clamp, clip), variant in PROTECTIONS.items():
        cascade, training = variant.cascade(1), variant.training(TrainConfig())
        assert {stage.spectral_norm for stage in cascade.stages} == {norm}
        assert {stage.clamp for stage in cascade.stages} == {(0.7, 1.5) if clamp else None}
        assert training.clip == (10.0 if clip else None)
        assert [word in variant.name for word in ("norm", "clamp", "clipping")] == [norm, clamp, clip]
        last = cascade.stages[-1]
        assert (len(cascade.stages), last.residual_weight, last.residual_source) == (3, 0.1, "previous")


def test_all_protections_together_are_the_exploding_cascade():
    assert config_of(PROTECTIONS[True, True, True]) == config_of(BY_NAME[EXPLODING])
    assert config_of(PROTECTIONS[True, True, False]) != config_of(BY_NAME[EXPLODING])


def test_one_cause_changes_one_thing():
    fields = [
        {"cascade.stages[2].residual_weight", "cascade.stages[2].residual_source"},
        {f"cascade.stages[{i}].rms_scaling" for i in range(3)},
        LOG_PENALTY,
    ]
    pairs = one_step_pairs(CAUSES)
    assert len(pairs) == 12
    assert all(changed(on, off) == fields[factor] for factor, off, on in pairs)


def test_a_cell_has_the_causes_that_it_is_named_after():
    for (weak, learnable, log), variant in CAUSES.items():
        cascade, loss = variant.cascade(1), variant.training(TrainConfig()).loss
        assert (cascade.stages[-1].residual_weight, len(cascade.stages)) == (0.1 if weak else 1.0, 3)
        assert {stage.rms_scaling for stage in cascade.stages} == {"learnable" if learnable else "fixed"}
        assert {stage.clamp for stage in cascade.stages} == {None}
        assert (loss.anti_modulation_weight, loss.anti_modulation) == ((1.0, "log") if log else (0.0, "squared"))
        assert [word in variant.name for word in ("weak", "learnable", "log penalty")] == [weak, learnable, log]


# --- weak residuals without a collapse --------------------------------------------------------------------------------


def test_a_weak_residual_is_kept_by_a_change_of_the_last_stage():
    for variant in WEAK_RESIDUALS:
        fields = changed(variant, BY_NAME[EXPLODING])
        assert fields
        allowed = ("projection_gain", "projection_level", "mixing", "clamp")
        assert fields <= {f"cascade.stages[2].{name}" for name in allowed}
        last = variant.cascade(1).stages[-1]
        assert (last.residual_weight, last.residual_source) == (0.1, "previous")


def test_what_the_gains_reach():
    assert rms_ceiling(384, 128) * CEILING_GAIN == pytest.approx(LATENT_RMS)
    start = BY_NAME["weak, gain from the start"].cascade(1).predict_rms()[-1]
    assert start.projection_rms == pytest.approx(LATENT_RMS)
    assert start.target_scale == pytest.approx(1, abs=0.01)
    preserving = BY_NAME["weak, RMS-preserving"].cascade(1).predict_rms()[-1]
    assert preserving.target_scale == pytest.approx(1, abs=1e-6)  # 1 − w² and w² of the power
    assert 1 < CEILING_GAIN < START_GAIN < math.inf


# --- choosing ---------------------------------------------------------------------------------------------------------


def test_the_sets():
    assert SETS["named"] == NAMED
    assert [variant.name for variant in NAMED] == [REFERENCE, EXPLODING, REPAIR, LEARNABLE]
    assert SETS["all"] == VARIANTS
    assert len(VARIANTS) == len(NAMED) + len(SINGLE_CHANGES) + 8 + 8 + len(WEAK_RESIDUALS)
