"""The law against measurements: rows that can come out either way, and a law that holds at toy size."""

import pytest
import torch

from lib.lab import collapse
from lib.lab.collapse import (
    clamped_row,
    largest_error,
    law_row,
    mixing_holds,
    over_weights,
    predictions,
    stage_rows,
    training_panel,
    training_row,
    untrained,
    weight_row,
)
from lib.lab.results import Result
from lib.lab.variants import EXPLODING, REFERENCE, VARIANTS
from lib.model.cascade import cosine, rms
from lib.model.rms_law import Clips

CONFIGS = {variant.name: variant.cascade(1) for variant in VARIANTS}


@pytest.fixture(scope="module")
def pair():
    """Two pairs of clips of RMS 5.7 and 4, `[B, D, T]` each."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 2, 128, 20, generator=generator)
    return 5.7 * x, 4.0 * y


def test_a_row_tells_a_law_that_holds_from_one_that_does_not():
    assert law_row("RMS", [1.0, 1.05], 1.0) == {
        "RMS, predicted": "1",
        "RMS, measured": "1.02 (1.00 to 1.05)",
        "largest error": "5.0%",
        "within 10 %": "yes",
    }
    assert law_row("RMS", [1.0, 1.11], 1.0)["within 10 %"] == "no"
    assert law_row("RMS", [1.0, 1.05], 1.0, 0.02)["within 2 %"] == "no"


def test_the_law_knows_the_levels_and_the_cosine_of_each_pair(pair):
    x, y = pair
    config = CONFIGS[EXPLODING]
    clips = Clips(rms(x)[1].item(), rms(y)[1].item(), cosine(x, y)[1].item())
    assert predictions(config, x, y)[1] == config.predict_rms(clips)


def test_every_stage_of_an_untrained_cascade_follows_the_law(pair):
    rows = stage_rows(EXPLODING, CONFIGS[EXPLODING], *pair, range(2))
    assert [(row["cascade"], row["stage"]) for row in rows] == [(EXPLODING, i) for i in range(3)]
    assert [row["within 10 %"] for row in rows] == ["yes"] * 3
    for row in rows:
        measured = float(row["target scale, measured"].split(" ")[0])
        assert measured == pytest.approx(float(row["target scale, predicted"]), rel=0.1)


def test_over_weights_law_and_measurement_have_one_value_a_weight(pair):
    panel = over_weights(CONFIGS[EXPLODING], (0.1, 1.0), *pair, range(2))
    assert [len(run) for run in panel["measured"]] == [len(panel["predicted"])] * 2 == [2, 2]
    assert panel["predicted"][0] < 0.5 * panel["predicted"][1]
    assert largest_error(panel) < 0.1
    assert largest_error(panel | {"predicted": [2 * value for value in panel["predicted"]]}) > 0.4


def test_a_weight_is_judged_by_the_clips_that_are_clamped(pair):
    traces = [untrained(CONFIGS[EXPLODING], seed)(*pair)[1][-1] for seed in range(2)]
    found = weight_row(0.1, 0.66, traces)
    assert (found["law"], found["clamped"], found["as the law says"]) == ("collapses", "100%", "yes")
    found = weight_row(0.1, 0.05, traces)
    assert (found["law"], found["as the law says"]) == ("safe", "no")


# --- in training ------------------------------------------------------------------------------------------------------


def step(scale: float = 1.0) -> dict[str, float]:
    """The last stage's metrics at one step, where 0.6² + (0.1 · 5)² = 0.61; `scale`: of the RMS before scaling."""
    values = {"projection_rms": 0.6, "residual_rms": 5.0, "alignment": 0.0, "rms_before_scaling": scale * 0.61**0.5}
    return {f"stage2/{name}": value for name, value in values.items()}


def result(start: float = 1.0, end: float = 1.0) -> Result:
    ends = [{"stage2/clamped": share} | step() for share in (start, end)]
    return Result(EXPLODING, 0, 1, 2, None, *ends, {"stage2/ceiling": 1.8}, (1.0, 1.0), "run")


def test_the_mixing_law_holds_with_the_cosine_of_the_step():
    config = CONFIGS[EXPLODING]
    assert mixing_holds(config, step())
    assert not mixing_holds(config, step(1.06))
    assert not mixing_holds(config, step() | {"stage2/alignment": 1.0})


def test_training_is_shown_beside_the_law_and_its_bound(pair, monkeypatch):
    monkeypatch.setattr(collapse, "training_steps", lambda run: [step(), step(1.5), step()])
    config = CONFIGS[EXPLODING]
    panel = training_panel(config, [result(), result()], *pair)
    assert len(panel["x"]) == len(panel["bound"]) == 3
    assert panel["measured"] == [[pytest.approx(scale * 0.61**0.5) for scale in (1.0, 1.5, 1.0)]] * 2
    assert panel["predicted"][0] < panel["bound"][0]
    first, last = (training_row(EXPLODING, config, [result()], 0.61**0.5 / 1.1, when) for when in ("start", "end"))
    assert (first["when"], first["error of the law"]) == ("first tenth", "+10%")
    assert "ceiling now" not in first
    assert (last["ceiling now"], last["steps with step 4 within 5 %"]) == ("1.80", "67%")


@pytest.mark.parametrize(("end", "holds"), [(1.0, "yes"), (0.9, "no")])
def test_a_collapse_holds_where_every_clip_stays_clamped(end, holds):
    row = clamped_row(EXPLODING, CONFIGS[EXPLODING], [result(end=1.0), result(end=end)])
    assert (row["law"], row["weight"], row["the law holds"]) == ("collapses", 0.1, holds)
    assert clamped_row(REFERENCE, CONFIGS[EXPLODING].with_stage(-1, residual_weight=1.0), [result()])["law"] == "safe"
