"""The measures of a run, and of the runs of a variant."""

import math

import pytest

from lab.test_audit import VARIANT, result
from lib.lab.measures import (
    at_level,
    first_non_finite,
    largest_factor,
    last_projection_share,
    peak,
    scalar_ratio,
    stable,
)
from lib.lab.variants import EXPLODING, LEARNABLE, REPAIR
from lib.model.cascade import Cascade


def test_measures():
    run = result(EXPLODING, norms=(1, 7), factor=4.0)
    assert peak(run) == 7
    assert math.isinf(peak(result(EXPLODING, bad_step=3)))
    assert largest_factor(run) == 4.0
    assert last_projection_share(run) == pytest.approx(0.25 / 3.75)
    assert at_level([run, run])
    assert not at_level([run, result(EXPLODING, bad_step=3)])
    assert not stable([result(REPAIR), result(REPAIR, bad_step=3)])
    assert first_non_finite([run]) == "no non-finite value in 100 steps"
    assert first_non_finite([run, result(EXPLODING, bad_step=3)]) == "non-finite in 1 of 2 runs, first at step 3"


def test_the_ratio_of_the_scalars_is_by_element():
    """Ones everywhere: every element of every parameter has the gradient 1, so the ratio is 1."""
    run = result(LEARNABLE)
    model = Cascade(VARIANT[LEARNABLE].cascade(2))
    norms = {
        f"grad_norm/stage{i}/{name}": math.sqrt(sum(p.numel() for p in part.parameters()))
        for i, stage in enumerate(model.stages)
        for name, part in stage.named_children()
        if list(part.parameters())
    }
    kept = {k: v for k, v in run.start.items() if not k.startswith("grad_norm/")}
    run.start.clear()
    run.start.update(kept | norms)
    assert scalar_ratio(run) == pytest.approx(1.0, rel=1e-6)
    run.start["grad_norm/stage0/rms_scaling"] *= 100
    run.start["grad_norm/stage1/rms_scaling"] *= 100
    assert scalar_ratio(run) == pytest.approx(100.0, rel=1e-6)
