"""Measure what the README quotes, and write it to outputs/record/.

    python -m lib.record --preset demo [--data DIR] [--codec NAME|DIR] [--out DIR] [--set record_steps=200]
                         [--only 06] [--resume]

Runs the preset's ablation grid, the settings that the seeds name at full depth, and the whole training schedule in
miniature; then every notebook; then keeps

    outputs/record/<preset>/ablation.json    every run of the grid, and whether depth changes a verdict
    outputs/record/<preset>/schedule.json    every run of the whole schedule in miniature
    outputs/record/<preset>/superres.json    distances of a super-resolver that was trained for longer
    outputs/record/<preset>/summary.json     facts and tables of the notebooks, and the figures in FIGURES
    outputs/record/claims.json               the audit of every claim, also as the table in README.md

Runs are cached, so a record that was stopped goes on where it was. The preset 'full' is made for a GPU server and needs
EnCodec's weights; on a CPU alone it takes weeks.
"""

import argparse
import dataclasses
import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lib.ablation import Result, write_record
from lib.audit import audit_named, disagreements
from lib.claims import collect, markdown_table, merge
from lib.errors import UserError, exit_on_user_error
from lib.files import write_atomic
from lib.pipeline import (
    NOTEBOOKS,
    NotebookError,
    add_arguments,
    chosen_notebooks,
    parsed_overrides,
    run_notebooks,
    say,
)
from lib.presets import RECORD, ROOT, Preset, Project, load_preset, open_project
from lib.report import sections, tables_of
from lib.runs import versions
from lib.superres.evaluation import METHODS, Score, evaluate, read_scores, write_scores
from lib.superres.resolver import Restoration, SuperResolver
from lib.superres.training import train_vae

FIGURES = {  # and the notebook that draws each
    "listening_0": "05_listening",
    "masks": "04_training",
    "stages": "04_training",
    "grid": "02_stage_ablation",
    "collapse": "03_rms_collapse",
    "waterfalls": "03_rms_collapse",
    "restored": "06_super_resolution",
}
README = ROOT / "README.md"
GUIDANCES = (1.0, 1.5, 2.0, 3.0)  # of which one is the default
# of the README's tables that are written here
CLAIMS_MARKS = ("<!-- the claims: written by make record -->", "<!-- end of the claims -->")
DISTANCES_MARKS = ("<!-- the distances: written by make record -->", "<!-- end of the distances -->")


def record(
    preset_name: str,
    overrides: dict[str, Any],
    data_dir: str,
    out_dir: str,
    only: tuple[str, ...] = NOTEBOOKS,
    *,
    resume: bool = False,
) -> Path:
    """Measure and write; returns the folder of the preset's record. `UserError` for bad settings, before any run.

    `only`: notebooks that are run, each after the longer runs that it rests on; of the others what was recorded stays.
    """
    preset = load_preset(preset_name, **overrides)
    check_readme(README.read_text())
    if preset.name == "full" and not torch.cuda.is_available():
        say("no GPU was found: preset full takes weeks here; PRESET=demo is made for such a machine")
    merge(RECORD / "claims.json", [], {"preset": preset.name})  # a damaged file is seen before the runs, not after
    folder = RECORD / preset.name
    folder.mkdir(parents=True, exist_ok=True)
    project = open_project(preset, data_dir, out_dir)
    if "02_stage_ablation" in only:
        record_grid(preset, data_dir, out_dir, folder)
    if "04_training" in only:
        record_schedule(preset, project, folder)
    if "06_super_resolution" in only:
        record_superres(preset, project, folder)
    out = run_notebooks(preset_name, overrides, data_dir, out_dir, only, resume=resume).parent
    for name in (name for name, notebook in FIGURES.items() if notebook in only):
        shutil.copyfile(out / "figures" / f"{name}.png", folder / f"{name}.png")
    summary = json.loads((out / "summary.json").read_text())
    if only != NOTEBOOKS:
        kept = json.loads((folder / "summary.json").read_text())
        summary = kept | {"tables": kept["tables"] | tables_of(sections(out, only))}
    write_atomic(folder / "summary.json", json.dumps(summary, indent=1))
    where = {"preset": preset.name, "codec": project.codec.name, "commit": versions()["commit"]}
    claims = merge(RECORD / "claims.json", collect(sections(out, only)), where, replace_all=only == NOTEBOOKS)
    write_atomic(RECORD / "claims.json", one_row_a_line(claims))
    scores, _ = read_scores(folder / "superres.json")
    readme = with_table(README.read_text(), CLAIMS_MARKS, markdown_table(claims))
    write_atomic(README, with_table(readme, DISTANCES_MARKS, distances_table(scores)))
    return folder


def record_grid(preset: Preset, data_dir: str, out_dir: str, folder: Path) -> None:
    """The ablation grid, and the named settings at full depth."""
    results: list[Result] = []
    for plan in recorded_plans(preset):
        layers, steps = plan.ablation_layers, plan.ablation_steps
        say(f"ablation: variants {plan.ablation_variants}, {layers} layers, {steps} steps, {plan.ablation_seeds} seeds")
        project = open_project(plan, data_dir, out_dir)
        results += project.ablation()
    facts = {"preset": preset.name, "codec": project.codec.name}
    depth = {"steps": preset.record_steps, "changed_by_depth": changed_by_depth(results)}
    write_record(folder / "ablation.json", results, facts | depth)


def record_schedule(preset: Preset, project: Project, folder: Path) -> None:
    """The whole schedule in miniature."""
    say(f"the whole schedule in miniature: {preset.schedule_epochs} epochs, {preset.schedule_seeds} seeds")
    scheduled = project.schedule()
    facts = {"preset": preset.name, "codec": project.codec.name, "epochs": preset.schedule_epochs}
    write_record(folder / "schedule.json", scheduled, facts | {"steps": max(result.steps for result in scheduled)})


def record_superres(preset: Preset, project: Project, folder: Path) -> None:
    """Train the super-resolver for as long as the record is worth, and measure it at every cutoff."""
    plan, steps = preset.recorded_superres, preset.record_superres_steps
    say(f"super-resolution: {preset.record_superres_vae_steps} and {steps} steps")
    library, source = project.upper_band()
    parts = project.out_dir / "superres_record"
    train_vae(parts, library, plan.vae, plan.vae_training, resume=True)
    contexts = plan.compare_contexts(parts, library, preset.record_superres_seeds, resume=True)
    resolver, clips = SuperResolver(parts, diffusion="sequence-0"), preset.superres_clips
    restoration = Restoration(steps=preset.superres_sampler_steps)
    guided = {}  # on songs that it learned from: the others judge it
    for guidance in GUIDANCES:
        settings = dataclasses.replace(restoration, guidance=guidance)
        found = evaluate(resolver, library, settings, clips=clips, cutoffs=(4_000,), split="train")
        guided[guidance] = found.score("model", 4_000).upper
    scores = evaluate(resolver, library, restoration, clips=clips).scores
    facts = {"preset": preset.name, "vae_steps": preset.record_superres_vae_steps, "steps": steps, "music": source}
    facts |= {"sampler_steps": restoration.steps, "guidance": restoration.guidance, "commit": versions()["commit"]}
    write_scores(folder / "superres.json", scores, facts | {"contexts": contexts, "guided": guided})


def recorded_plans(preset: Preset) -> list[Preset]:
    """The grid at the ablation's depth, and the named settings at the full model's, where that is another."""
    grid = dataclasses.replace(preset, ablation_variants=preset.record_variants, ablation_steps=preset.record_steps)
    deep = dataclasses.replace(grid, ablation_variants="named", ablation_layers=preset.num_layers)
    return [grid] if deep.ablation_layers == grid.ablation_layers else [grid, deep]


def changed_by_depth(results: list[Result]) -> list[str]:
    """The verdicts on the named settings that are not the same at the smallest and at the largest depth."""
    depths = sorted({result.num_layers for result in results})
    audits = [audit_named([r for r in results if r.num_layers == depth]) for depth in (depths[0], depths[-1])]
    return disagreements(*audits)


def one_row_a_line(rows: list[dict[str, Any]]) -> str:
    return "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n"


def distances_table(scores: Sequence[Score]) -> str:
    """LSD above the cutoff as a Markdown table, a row a method, a column a cutoff."""
    cutoffs = sorted({score.cutoff for score in scores})
    lines = [["method", *(f"{cutoff / 1000:g} kHz" for cutoff in cutoffs)], ["---"] * (len(cutoffs) + 1)]
    for method, text in METHODS.items():
        own = {score.cutoff: score.upper for score in scores if score.method == method}
        lines.append([f"{method}: {text}", *("{:.2f} ± {:.2f}".format(*own[cutoff]) for cutoff in cutoffs)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def check_readme(text: str) -> None:
    for marks in (CLAIMS_MARKS, DISTANCES_MARKS):
        if not all(text.count(mark) == 1 for mark in marks):
            raise UserError(f"{README}: the marks {' and '.join(marks)} must each be there once; restore them")


def with_table(readme: str, marks: tuple[str, str], table: str) -> str:
    """The README with the table between these marks replaced."""
    check_readme(readme)
    pattern = re.escape(marks[0]) + ".*" + re.escape(marks[1])
    return re.sub(pattern, lambda _: f"{marks[0]}\n{table}\n{marks[1]}", readme, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lib.record", description="Measure what the README quotes.")
    add_arguments(parser)
    parser.add_argument("--only", help="notebooks, by their numbers; of the others what was recorded stays")
    parser.add_argument("--resume", action="store_true", help="keep the notebooks that are done, go on with training")
    options = parser.parse_args()
    with exit_on_user_error():
        try:
            overrides, only = parsed_overrides(options), chosen_notebooks(options.only)
            folder = record(options.preset, overrides, options.data, options.out, only, resume=options.resume)
        except NotebookError as error:
            sys.exit(f"error: {error}")
        print(f"record: {folder}")


if __name__ == "__main__":
    main()
