"""Measure what the README quotes, and write it to outputs/record/.

    python -m lib.record --preset demo [--data DIR] [--codec NAME|DIR] [--out DIR] [--set record_steps=200]
                         [--resume]

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
from pathlib import Path
from typing import Any

import torch

from lib.ablation import Result, write_record
from lib.audit import audit_named, disagreements
from lib.claims import collect, markdown_table, merge
from lib.errors import UserError, exit_on_user_error
from lib.files import write_atomic
from lib.pipeline import NotebookError, add_arguments, parsed_overrides, run_notebooks, say
from lib.presets import RECORD, ROOT, Preset, Project, load_preset, open_project
from lib.runs import versions
from lib.superres.evaluation import evaluate, write_scores
from lib.superres.resolver import Restoration, SuperResolver

FIGURES = ("listening_0", "masks", "stages", "grid", "collapse", "waterfalls", "restored")
README = ROOT / "README.md"
MARKS = ("<!-- the claims: written by make record -->", "<!-- end of the claims -->")


def record(preset_name: str, overrides: dict[str, Any], data_dir: str, out_dir: str, *, resume: bool = False) -> Path:
    """Measure and write; returns the folder of the preset's record. `UserError` for bad settings, before any run."""
    preset = load_preset(preset_name, **overrides)
    check_readme(README.read_text())
    if preset.name == "full" and not torch.cuda.is_available():
        say("no GPU was found: preset full takes weeks here; PRESET=demo is made for such a machine")
    merge(RECORD / "claims.json", [], {"preset": preset.name})  # a damaged file is seen before the runs, not after
    folder = RECORD / preset.name
    folder.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    for plan in recorded_plans(preset):
        layers, steps = plan.ablation_layers, plan.ablation_steps
        say(f"ablation: variants {plan.ablation_variants}, {layers} layers, {steps} steps, {plan.ablation_seeds} seeds")
        project = open_project(plan, data_dir, out_dir)
        results += project.ablation()
    facts = {"preset": preset.name, "codec": project.codec.name}
    depth = {"steps": preset.record_steps, "changed_by_depth": changed_by_depth(results)}
    write_record(folder / "ablation.json", results, facts | depth)
    record_superres(preset, project, folder)
    say(f"the whole schedule in miniature: {preset.schedule_epochs} epochs, {preset.schedule_seeds} seeds")
    scheduled = project.schedule()
    length = {"steps": max(result.steps for result in scheduled), "epochs": preset.schedule_epochs}
    write_record(folder / "schedule.json", scheduled, facts | length)
    page = run_notebooks(preset_name, overrides, data_dir, out_dir, resume=resume)
    for name in FIGURES:
        shutil.copyfile(page.parent / "figures" / f"{name}.png", folder / f"{name}.png")
    shutil.copyfile(page.parent / "summary.json", folder / "summary.json")
    where = {"preset": preset.name, "codec": project.codec.name, "commit": versions()["commit"]}
    claims = merge(RECORD / "claims.json", collect(page.parent), where)
    write_atomic(RECORD / "claims.json", one_row_a_line(claims))
    write_atomic(README, with_claims(README.read_text(), markdown_table(claims)))
    return folder


def record_superres(preset: Preset, project: Project, folder: Path) -> None:
    """Train the super-resolver for as long as the record is worth, and measure it at every cutoff."""
    plan, steps = preset.recorded_superres, preset.record_superres_steps
    say(f"super-resolution: {preset.record_superres_vae_steps} and {steps} steps")
    library, source = project.upper_band()
    runs = plan.train(project.out_dir / "superres_record", library, resume=True)
    resolver = SuperResolver(project.out_dir / "superres_record")
    restoration = Restoration(steps=preset.superres_sampler_steps)
    scores = evaluate(resolver, library, restoration, clips=preset.record_superres_clips).scores
    losses = {name: run.metrics("val")[-1]["loss"] for name, run in runs.items()}
    facts = {"preset": preset.name, "vae_steps": preset.record_superres_vae_steps, "steps": steps, "music": source}
    facts |= {"sampler_steps": restoration.steps, "validation_losses": losses, "commit": versions()["commit"]}
    write_scores(folder / "superres.json", scores, facts)


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


def check_readme(text: str) -> None:
    if not all(text.count(mark) == 1 for mark in MARKS):
        raise UserError(f"{README}: the marks {' and '.join(MARKS)} must each be there once; restore them")


def with_claims(readme: str, table: str) -> str:
    """The README with the table between its marks replaced."""
    check_readme(readme)
    pattern = re.escape(MARKS[0]) + ".*" + re.escape(MARKS[1])
    return re.sub(pattern, lambda _: f"{MARKS[0]}\n{table}\n{MARKS[1]}", readme, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lib.record", description="Measure what the README quotes.")
    add_arguments(parser)
    parser.add_argument("--resume", action="store_true", help="keep the notebooks that are done, go on with training")
    options = parser.parse_args()
    with exit_on_user_error():
        try:
            folder = record(options.preset, parsed_overrides(options), options.data, options.out, resume=options.resume)
        except NotebookError as error:
            sys.exit(f"error: {error}")
        print(f"record: {folder}")


if __name__ == "__main__":
    main()
