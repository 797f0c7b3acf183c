"""The record: what it runs, what it keeps, and that what is committed agrees with itself."""

import dataclasses
import json
import shutil

import pytest

import lib.record
import lib.superres.plans
from lib.ablation import read_record
from lib.claims import CLAIMS, VERDICTS, judge, markdown_table
from lib.errors import UserError
from lib.pipeline import NOTEBOOKS
from lib.presets import RECORD, load_preset
from lib.record import (
    CLAIMS_MARKS,
    DISTANCES_MARKS,
    FIGURES,
    GUIDANCES,
    README,
    changed_by_depth,
    check_readme,
    distances_table,
    recorded_plans,
    with_table,
)
from lib.superres.evaluation import CUTOFFS, METHODS, Evaluation, Score, read_scores
from lib.superres.resolver import Restoration
from lib.variants import SCHEDULED

TEXT = f"before\n{DISTANCES_MARKS[0]}\n{DISTANCES_MARKS[1]}\n{CLAIMS_MARKS[0]}\nold\n{CLAIMS_MARKS[1]}\nafter\n"


def test_the_table_takes_the_place_of_the_old_one():
    assert with_table(TEXT, CLAIMS_MARKS, "| \\1 new |") == TEXT.replace("old", "| \\1 new |")
    assert with_table(TEXT, DISTANCES_MARKS, "| d |") == TEXT.replace(
        DISTANCES_MARKS[0], f"{DISTANCES_MARKS[0]}\n| d |"
    )


@pytest.mark.parametrize("text", ["", CLAIMS_MARKS[0], TEXT + CLAIMS_MARKS[1], TEXT.replace(DISTANCES_MARKS[0], "")])
def test_a_readme_without_its_marks_is_refused(text):
    with pytest.raises(UserError, match=r"README\.md: the marks .* once; restore"):
        check_readme(text)


def test_the_demos_record_has_the_grid_and_the_named_settings_at_full_depth():
    grid, deep = recorded_plans(load_preset("demo"))
    assert (grid.ablation_variants, grid.ablation_layers, grid.ablation_steps) == ("all", 2, 100)
    assert (deep.ablation_variants, deep.ablation_layers, deep.ablation_steps) == ("named", 6, 100)
    (full,) = recorded_plans(load_preset("full"))
    assert (full.ablation_variants, full.ablation_layers, full.ablation_seeds) == ("all", 6, 5)


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """The command with its parts replaced: no run is made, the committed results are given back."""
    results, _ = read_record(RECORD / "demo" / "ablation.json")
    scheduled, _ = read_record(RECORD / "demo" / "schedule.json")
    out = tmp_path / "out"
    (out / "figures").mkdir(parents=True)
    (out / "report").mkdir()
    for name in FIGURES:
        (out / "figures" / f"{name}.png").write_bytes(name.encode())
    (out / "summary.json").write_text("{}")
    said = []

    class Project:
        def __init__(self, preset, data, folder):
            self.preset = preset
            self.codec = type("codec", (), {"name": "mdct"})

        def ablation(self):
            return [r for r in results if r.num_layers == self.preset.ablation_layers]

        def schedule(self):
            return scheduled

        def upper_band(self):
            raise AssertionError("superres was not replaced")

    def run_notebooks(*given, resume):
        assert resume is False
        said.append(given)
        for name in given[-1]:
            table = {"caption": f"of {name}", "rows": [{"measured": 2}]}
            judged = {"01_encoding": "C3", "06_super_resolution": "C18"}.get(name)
            claims = [dataclasses.asdict(judge(judged, "it holds", True))] if judged else []
            (out / "report" / f"{name}.json").write_text(json.dumps({"items": [table, {"claims": claims}]}))
        return out / "index.html"

    readme = tmp_path / "README.md"
    readme.write_text(TEXT)

    def record_superres(preset, project, folder):
        shutil.copyfile(RECORD / "demo" / "superres.json", folder / "superres.json")

    monkeypatch.setattr(lib.record, "record_superres", record_superres)
    monkeypatch.setattr(lib.record, "open_project", Project)
    monkeypatch.setattr(lib.record, "run_notebooks", run_notebooks)
    monkeypatch.setattr(lib.record, "RECORD", tmp_path / "record")
    monkeypatch.setattr(lib.record, "README", readme)
    return tmp_path, said


def test_a_record_holds_runs_figures_summary_claims_and_the_readmes_table(stub):
    folder, said = stub
    written = lib.record.record("demo", {}, "songs", "")
    assert written == folder / "record" / "demo"
    assert said == [("demo", {}, "songs", "", NOTEBOOKS)]
    assert {path.name for path in written.iterdir()} == {
        "ablation.json",
        "schedule.json",
        "superres.json",
        "summary.json",
        *(f"{n}.png" for n in FIGURES),
    }
    results, facts = read_record(written / "ablation.json")
    assert {r.num_layers for r in results} == {2, 6}
    assert (facts["preset"], facts["codec"], facts["steps"]) == ("demo", "mdct", 100)
    results, facts = read_record(written / "schedule.json")
    assert facts["epochs"] == 200
    assert {r.variant for r in results} == {v.name for v in SCHEDULED}
    claims = json.loads((folder / "record" / "claims.json").read_text())
    assert [row["claim"] for row in claims] == list(CLAIMS)
    assert markdown_table(claims) in (folder / "README.md").read_text()
    assert distances_table(read_scores(written / "superres.json")[0]) in (folder / "README.md").read_text()


def test_a_record_of_one_notebook_leaves_what_the_others_have_measured(stub, monkeypatch):
    folder, said = stub
    written = lib.record.record("demo", {}, "songs", "")
    before = {path.name: path.read_text() for path in written.glob("*.json")}
    rows = json.loads((folder / "record" / "claims.json").read_text())
    (written / "summary.json").write_text(json.dumps({"facts": {"of": "all"}, "tables": {"kept": 1, "of 06_x": 1}}))
    for name in FIGURES:
        (written / f"{name}.png").write_bytes(b"before")
    for name in ("record_grid", "record_schedule"):
        monkeypatch.setattr(lib.record, name, None)  # calling it would fail
    only = ("06_super_resolution",)
    lib.record.record("demo", {}, "songs", "", only)
    assert said[-1] == ("demo", {}, "songs", "", only)
    assert all((written / name).read_text() == before[name] for name in ("ablation.json", "schedule.json"))
    drawn = {name for name in FIGURES if (written / f"{name}.png").read_bytes() != b"before"}
    assert drawn == {"restored"}
    summary = json.loads((written / "summary.json").read_text())
    assert summary["facts"] == {"of": "all"}
    assert set(summary["tables"]) == {"kept", "of 06_x", "of 06_super_resolution"}
    assert json.loads((folder / "record" / "claims.json").read_text()) == rows  # C3 is still there


def test_the_super_resolver_is_trained_for_as_long_as_the_record_says(monkeypatch, tmp_path):
    """Plan, library and evaluation are replaced; what goes from one to the next, and into the file, is looked at."""
    preset = load_preset("demo", record_superres_vae_steps=7, record_superres_steps=9, superres_clips=3)
    trained = []

    def train_vae(folder, library, sizes, config, *, resume):
        assert (folder, library, resume) == (tmp_path / "superres_record", "the library", True)
        assert (sizes, config) == (preset.recorded_superres.vae, preset.recorded_superres.vae_training)
        trained.append(config.max_steps)

    def compare_contexts(plan, folder, library, seeds, *, resume):
        assert (folder, library, seeds, resume) == (tmp_path / "superres_record", "the library", 3, True)
        trained.append(plan.training.max_steps)
        return {"sequence": (0.5, 0.25), "pooled": (0.5, 0.5)}

    pair = (1.5, 0.25)
    scores = (Score("model", 4000, 3, 2, pair, pair, pair, pair, pair),)

    def evaluate(resolver, library, restoration, *, clips, cutoffs=CUTOFFS, split="val"):
        assert (resolver, library, clips) == (tmp_path / "superres_record", "the library", 3)
        assert restoration.steps == preset.superres_sampler_steps
        if split == "val":
            assert (restoration, cutoffs) == (Restoration(steps=restoration.steps), CUTOFFS)
            return Evaluation(scores, {})
        guided = (restoration.guidance, 0.125)
        return Evaluation((Score("model", cutoffs[0], 3, 2, pair, pair, guided, pair, pair),), {})

    monkeypatch.setattr(lib.record, "train_vae", train_vae)
    monkeypatch.setattr(lib.superres.plans.Plan, "compare_contexts", compare_contexts)
    monkeypatch.setattr(lib.record, "SuperResolver", lambda folder, diffusion: folder)
    monkeypatch.setattr(lib.record, "evaluate", evaluate)
    project = type("Project", (), {"out_dir": tmp_path, "upper_band": lambda self: ("the library", "songs")})()
    lib.record.record_superres(preset, project, tmp_path)
    assert trained == [7, 9]
    found, facts = read_scores(tmp_path / "superres.json")
    assert found == scores
    assert (facts["preset"], facts["vae_steps"], facts["steps"], facts["music"]) == ("demo", 7, 9, "songs")
    assert facts["contexts"] == {"sequence": [0.5, 0.25], "pooled": [0.5, 0.5]}
    assert facts["guided"] == {str(guidance): [guidance, 0.125] for guidance in GUIDANCES}
    assert facts["guidance"] == Restoration().guidance


def test_the_committed_distances_are_of_every_method_at_every_cutoff():
    scores, facts = read_scores(RECORD / "demo" / "superres.json")
    assert [(s.cutoff, s.method) for s in scores] == [(cutoff, method) for cutoff in CUTOFFS for method in METHODS]
    assert len({s.clips for s in scores}) == 1
    assert facts["preset"] == "demo"
    assert distances_table(scores) in README.read_text()


def test_distances_are_shown_by_method_and_cutoff():
    pair = (0.0, 0.0)
    scores = [
        Score(name, c, 2, 2, pair, pair, (i + c / 1e6, 0.126), pair, pair)
        for c in CUTOFFS
        for i, name in enumerate(METHODS)
    ]
    lines = [line.strip("| ").split(" | ") for line in distances_table(scores).splitlines()]
    assert lines[0] == ["method", "2 kHz", "4 kHz", "8 kHz", "12 kHz", "16 kHz"]
    assert lines[2][1] == "0.00 ± 0.13"
    assert lines[-1][0].startswith("vocoder: ")
    assert lines[-1][-1] == "6.02 ± 0.13"


def test_a_broken_readme_is_seen_before_any_run(stub):
    folder, said = stub
    (folder / "README.md").write_text("no marks")
    with pytest.raises(UserError, match="marks"):
        lib.record.record("demo", {}, "", "")
    assert not said
    assert not (folder / "record").exists()


def test_the_full_preset_says_what_it_needs(stub, capsys, monkeypatch):
    def no_weights(*_):
        raise UserError("weights are missing")

    monkeypatch.setattr(lib.record, "open_project", no_weights)
    monkeypatch.setattr(lib.record.torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="weights are missing"):
        lib.record.record("full", {}, "", "")
    assert "no GPU was found" in capsys.readouterr().err


# --- what is committed ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def committed():
    return json.loads((RECORD / "claims.json").read_text())


def test_every_claim_has_a_verdict(committed):
    assert {row["claim"] for row in committed} == set(CLAIMS)
    for row in committed:
        assert row["verdict"] in VERDICTS
        assert row["why"] or row["measured"], row
        if row["verdict"] != "not tested here":
            assert row["measured"], row
            assert row["codec"], row
            assert row["commit"], row


def test_the_readme_quotes_the_claims_as_they_were_written(committed):
    assert markdown_table(committed) in README.read_text()


def test_the_verdicts_on_depth_follow_from_the_runs():
    results, facts = read_record(RECORD / "demo" / "ablation.json")
    assert facts["changed_by_depth"] == changed_by_depth(list(results))
    assert len({r.num_layers for r in results}) == 2
    seeds = {(r.variant, r.num_layers): 0 for r in results}
    for r in results:
        seeds[r.variant, r.num_layers] += 1
    assert set(seeds.values()) == {3}
    assert all(dataclasses.asdict(r)["steps"] == facts["steps"] or r.non_finite for r in results)


def test_the_recorded_schedule_ran_its_epochs():
    results, facts = read_record(RECORD / "demo" / "schedule.json")
    assert facts["epochs"] == load_preset("demo").schedule_epochs == 200
    assert all(r.steps == facts["steps"] or r.non_finite for r in results)
    assert {(r.variant, r.seed) for r in results} == {
        (v.name, seed) for v in SCHEDULED for seed in range(load_preset("demo").schedule_seeds)
    }


def test_the_readme_quotes_the_figure_of_merit_as_it_was_measured():
    tables = json.loads((RECORD / "demo" / "summary.json").read_text())["tables"]
    (rows,) = (rows for caption, rows in tables.items() if caption.startswith("Means over") and "merit" in rows[0])
    merit = {row["output"]: row["merit"] for row in rows}
    averages = f"{merit['average of latents']} and {merit['average of waveforms']} for the plain averages"
    said = f"is {merit['trained model']} for the trained model, {averages} of latents and of waveforms"
    assert said in " ".join(README.read_text().split())
    assert float(merit["trained model"]) > float(merit["average of latents"])
