"""The parts of a record: what each measures, and writes into its folder."""

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import explosion
import torch
from constructed import record_constructed
from explosion import rounded
from full_size import record_full_size
from quotes import BLOCKS, music_block, readme_blocks, study_rows, with_blocks
from settings import settings_of
from upper_band import record_superres
from verdicts import audit_schedule, schedule_rows
from writing import write_record

from lib.data.latents import LatentPairs
from lib.evaluation.baselines import best_crossovers, mean_metrics, measure_fusions, pairs_to_measure
from lib.evaluation.progress import SPLIT
from lib.evaluation.tables import MASKS_ALONE, SOURCE_SYSTEM, WITH_CASCADE
from lib.lab.claims import CLAIMS, claim_rows, collect, judge
from lib.lab.results import Result, by_variant
from lib.pipeline import NotebookError, run_notebooks, say
from lib.presets import Preset, load_preset
from lib.project import RECORD, ROOT, Project, open_project
from lib.report.report import sections, tables_of
from lib.train import pairs_to_follow
from lib.training.plots import curves
from lib.training.run import Run
from lib.util.errors import UserError
from lib.util.files import naming, read_json, write_atomic
from lib.util.provenance import gpu_name, versions

# first the bench, while nothing else runs
PARTS = ("bench", "ablations", "explosion", "fusion", "superres", "notebooks", "variations")
FIGURES = ("listening_0", "collapse")  # that the README shows
POINTS = 40  # gradient norms of a run in a record
# without AVX2, sums are rounded differently; NumPy has had two sets of names for the features it can disable
NO_VECTORS = {"ATEN_CPU_CAPABILITY": "default", "NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3 X86_V3 X86_V4 AVX512_ICL"}
ON_MUSIC = tomllib.loads(Path(__file__).with_name("study.toml").read_text())
STUDY, LICENCES = ON_MUSIC["study"], ON_MUSIC["licences"]  # setting → its changes of the preset; package → its licence
WHOLE = ("songs-0-seed-0", "no-vectors")  # variations that run all notebooks, and are compared as a whole
CLAIMS_HEAD = Path(__file__).with_name("claims.md")


def record(
    preset_name: str, overrides: dict[str, Any], data_dir: str, music: Path, parts=PARTS, folder: Path = RECORD
) -> None:
    """Measure `parts` into `folder`, in the order of `PARTS`; finished runs are reused. `music`: where real music is or
    is brought to. `UserError` for bad settings, and where `folder` lacks a part that is to stay."""
    preset = load_preset(preset_name, overrides)
    settings_of(preset)  # bad ones are refused before anything runs
    whole = set(parts) == set(PARTS)
    with naming(folder, "restore it, or record all parts"):
        with_blocks((ROOT / "README.md").read_text(), dict.fromkeys(BLOCKS, "") if whole else readme_blocks(folder))
    if preset.name == "full" and not torch.cuda.is_available():
        say("no GPU was found: preset full takes weeks here; PRESET=demo suits such a machine")
    project = open_project(preset, data_dir)
    fetch, on_music = ROOT / "data" / "fetch_music.sh", {"explosion", "fusion", "superres"}
    more = music.with_name("more-music")
    needed = [[music]] * bool(on_music & set(parts)) + [[more, "more"]] * ("superres" in parts)
    for place, *which in needed:
        if subprocess.run([fetch, place, *which], check=False).returncode:
            raise UserError(f"{place}: lacks the music to measure on; data/README.md says where it comes from")
    measure = {
        "bench": lambda: record_bench(folder),
        "ablations": lambda: record_ablations(preset, project, folder),
        "explosion": lambda: record_explosion(preset, project, music, folder),
        "fusion": lambda: record_fusion(preset, overrides, music, folder),  # its notebook shows the schedule's record
        "superres": lambda: record_superres(preset, (music, more), project.out_dir / "superres_record", folder),
        "notebooks": lambda: record_notebooks(preset, overrides, data_dir, folder),
        "variations": lambda: record_variations(preset, overrides, data_dir, folder),
    }
    machine = {"cores": os.cpu_count(), "instructions": torch.backends.cpu.get_cpu_capability(), "gpu": gpu_name()}
    facts = versions() | {"preset": preset.name, "codec": project.codec.name, "machine": machine}
    songs = f"music in {Path(data_dir).name}" if data_dir else "generated songs"
    folder.mkdir(parents=True, exist_ok=True)
    made = read_json(folder / "record.json") if (folder / "record.json").exists() else {}
    made = {part: said for part, said in made.items() if not whole or said.get("commit") == facts["commit"]}
    for part in (part for part in PARTS if part in parts):
        if made.get(part, {}).get("commit") == facts["commit"]:
            say(f"{part}: measured before the record was stopped")
            continue
        measure[part]()
        made[part] = facts | {"music": "real music" if part in on_music else songs}
        write_json(folder / "record.json", made)


def record_notebooks(preset: Preset, overrides: dict[str, Any], data_dir: str, folder: Path) -> None:
    """All notebooks: their facts, tables, figures and claims; first what they show that no run changes."""
    say("constructed outputs, and the super-resolver's full size")
    record_constructed(folder)
    record_full_size(folder)
    out = run_notebooks(preset.name, overrides, data_dir, resume=True).parent
    for name in FIGURES:
        shutil.copyfile(out / "figures" / f"{name}.png", folder / f"{name}.png")
    summary = read_json(out / "summary.json", {"facts": dict})
    summary["facts"].pop("code", None)  # record.json says it
    write_json(folder / "summary.json", summary)
    claims = with_untested(collect(sections(out)))
    write_json(folder / "claims.json", claims)
    write_atomic(folder / "claims.md", f"{CLAIMS_HEAD.read_text()}\n{markdown_table(claims)}\n")


def with_untested(verdicts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The verdicts, and every claim that has none, with the reason."""
    tested, why = {row["claim"] for row in verdicts}, "no notebook has tested it"
    missing = [
        dataclasses.asdict(judge(claim, CLAIMS[claim].text, None, why=why)) for claim in CLAIMS if claim not in tested
    ]
    return sorted([*verdicts, *missing], key=lambda row: int(row["claim"][1:]))


def markdown_table(verdicts: Sequence[dict[str, Any]]) -> str:
    """claims.json as a Markdown table."""
    lines = ["| claim | document | said | measured (range over seeds) | verdict |", "|" + " --- |" * 5]
    for claim, said, measured, verdict in map(dict.values, claim_rows(verdicts)):
        word, colon, why = verdict.partition(":")
        cells = (claim, CLAIMS[claim].documents, said, measured, f"**{word}**{colon}{why}")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def record_followed(project: Project, paths: Sequence[str], root: Path) -> None:
    """The figure of merit over the time of runs with wide masks that `lib.train --follow` trained on a GPU and this
    project's data, beside what recipes reach on the same pairs: gpu.json and gpu.png of `root`'s record, and its
    README. `UserError` for other runs."""
    runs = {MASKS_ALONE if not run.config["cascade"]["stages"] else WITH_CASCADE: run for run in map(Run.open, paths)}
    rows = {name: run.metrics(SPLIT) for name, run in runs.items()}
    first = next(iter(rows.values()))
    for name, run in runs.items():
        same = run.config["data"] == project.index.stem and run.config["masking"]["masking"] == "wide"
        followed = rows[name] and rows[name][0]["step"] == 0 and rows[name][-1]["gpu"] == first[-1]["gpu"] != "no GPU"
        if not same or not followed or rows[name][0]["pairs"] != first[0]["pairs"] or len(runs) < len(paths):
            rule = "one run of each kind, followed from its first step on one GPU, on as many pairs of this data"
            raise UserError(f"--followed {run.path}: needs {rule}")
    training, pairs = LatentPairs(project.index, "train"), pairs_to_follow(project, first[0]["pairs"])
    tuning = pairs_to_measure(project.manifest, training, len(pairs) // 3)
    crossovers = best_crossovers((training[i] for i in tuning), project.codec)
    measured = measure_fusions(pairs, project.codec, {}, crossovers)
    marks = {name: mean_metrics(found)["merit"] for name, found in measured.items()}
    folder, readme, config = root / "outputs" / "record", root / "README.md", next(iter(runs.values())).config
    series, shown = {name: (found, "merit") for name, found in rows.items()}, [*crossovers, "HPSS"]
    figure = curves(series, {name: marks[name] for name in shown}, "seconds", ylabel="figure of merit", ylim=(0, 1))
    figure.savefig(folder / "gpu.png")
    sizes = {"batch_size": config["train"]["batch_size"], "clip_seconds": project.preset.data.clip_seconds}
    facts = {"trained_by": config["versions"]["commit"], "gpu": first[-1]["gpu"], "pairs": len(pairs), **sizes}
    write_json(folder / "gpu.json", facts | {"marks": marks, "runs": rows})
    write_atomic(readme, with_blocks(readme.read_text(), {"music": music_block(folder)}))


def record_bench(folder: Path) -> None:
    """The benchmark against stock PyTorch."""
    bench = ROOT / "outputs" / "bench"
    if not (bench / "bench.md").exists():
        say("speed compared with stock PyTorch")
        subprocess.run([sys.executable, "tests/bench", "limit", "cascade", "--out", str(bench)], cwd=ROOT, check=True)
    found = read_json(bench / "bench.json", {"machine": dict})
    found["machine"] = {name: value for name, value in found["machine"].items() if name not in versions()}
    write_json(folder / "bench.json", found)
    shutil.copyfile(bench / "bench.md", folder / "bench.md")


def record_ablations(preset: Preset, project: Project, folder: Path) -> None:
    """The ablation grid, the named settings at full depth, and the whole schedule in miniature."""
    results: list[Result] = []
    facts = {"preset": preset.name, "codec": project.codec.name}
    record = settings_of(preset)
    schedule, steps = record.schedule, {"steps": record.steps}
    grid = dataclasses.replace(preset.ablation, variants=record.variants, **steps)
    deep = dataclasses.replace(grid, variants="named", layers=preset.model.num_layers)
    for ablation in [grid] if deep.layers == grid.layers else [grid, deep]:
        size = f"{ablation.layers} layers, {ablation.steps} steps, {ablation.seeds} seeds"
        say(f"ablation: variants {ablation.variants}, {size}")
        results += project.ablation(ablation.plan)
    write_record(folder / "ablation.json", [shortened(result) for result in results], facts | steps)
    say(f"the whole schedule in miniature: {schedule.epochs} epochs, {schedule.seeds} seeds")
    scheduled = [shortened(result) for result in project.ablation(schedule.plan)]
    facts |= {"epochs": schedule.epochs, "steps": max(result.steps for result in scheduled)}
    facts["table"] = schedule_rows(by_variant(scheduled))
    facts["claims"] = [dataclasses.asdict(verdict) for verdict in audit_schedule(scheduled, schedule.epochs)]
    write_record(folder / "schedule.json", scheduled, facts)


def record_explosion(preset: Preset, project: Project, music: Path, folder: Path) -> None:
    """What ends a training and what does not, on real music and on the project's songs."""
    size, out = settings_of(preset).explosion, ROOT / "outputs" / "explosion"
    say(f"what ends a training: {size.seeds} seeds, {size.steps} and {size.longer} steps")
    explosion.record(size, music, project.manifest.root, out, folder / "explosion.json")


def shortened(result: Result) -> Result:
    """`rounded`, with gradient norms as medians of `POINTS` equal parts."""
    norms, count = result.grad_norm, len(result.grad_norm)
    if count > POINTS:
        cuts = [round(i * count / POINTS) for i in range(POINTS + 1)]
        norms = tuple(statistics.median(norms[a:b]) for a, b in itertools.pairwise(cuts))
    found = rounded(dataclasses.replace(result, grad_norm=norms))
    return Result(**found | {"grad_norm": tuple(found["grad_norm"])})


def record_fusion(preset: Preset, overrides: dict[str, Any], music: Path, folder: Path) -> None:
    """Notebook 04 on real music, one run per core: every setting of `STUDY`, with the preset's steps and stages of the
    ablation's depth, and the preset itself trained for longer, with several training seeds."""
    first = preset.train.seed
    same = {"model.num_layers": preset.ablation.layers, "train.max_steps": preset.train.max_steps}
    same["evaluation.pairs"] = preset.evaluation.pairs
    record = settings_of(preset)
    longer = record.steps_on_music
    runs = [(name, first, changed) for name, changed in STUDY.items()]
    for k in range(record.seeds_on_music):
        runs.append((f"{MASKS_ALONE}, {longer} steps", first + k, {"train.max_steps": longer}))
    say(f"{len(runs)} runs on the music in {music}")
    manifest = open_project(preset, music, "outputs/variations/music").manifest  # and they find its latents

    def run(name: str, seed: int, changed: dict[str, Any]) -> dict[str, Any]:
        of = "reference" if name == SOURCE_SYSTEM else preset.name
        settings = overrides | same | changed | {"train.seed": seed}
        place = f"music-{name}-{seed}".replace(" ", "-").replace("'", "").replace(",", "")
        out = run_apart(place, of, str(music), settings, "04")
        return {"setting": name, "seed": seed} | measured_in(out)

    with ThreadPoolExecutor(1 if torch.cuda.is_available() else os.cpu_count()) as pool:
        rows = list(pool.map(run, *zip(*runs, strict=True)))
    tracks = {package: sorted(path.stem for path in (music / package).glob("*.ogg")) for package in LICENCES}
    held_out = sorted({Path(clip.path).stem for pair in manifest.split("val") for clip in (pair.input, pair.target)})
    facts = {"preset": preset.name, "steps": preset.train.max_steps, "layers": preset.ablation.layers}
    found = {"settings": study_rows(rows), "tracks": tracks, "held_out": held_out, "licences": LICENCES}
    write_record(folder / "fusion.json", rows, facts | found)


def measured_in(out: Path) -> dict[str, Any]:
    """What a run of notebook 04 measured; its figure of merit over the seconds of training, beside marks on the same
    pairs; the crossovers that were chosen; and what its stages did at the last step."""
    tables, run = tables_of(sections(out)), Run.open(out)
    metrics, compared = rows_with(tables, "output", "merit", "onsets"), rows_with(tables, "baseline", "verdict")
    plain = {row["output"]: row["plain merit"] for row in rows_with(tables, "output", "plain merit")}
    curve = [{"seconds": round(row["seconds"]), "merit": round(row["merit"], 3)} for row in run.metrics(SPLIT)]
    last = run.metrics("val")[-1]
    return {
        "measured": {row["output"]: row | {"plain merit": plain[row["output"]]} for row in metrics},
        "against": {row.pop("baseline"): row for row in map(dict, compared)},
        "curve": curve,
        "marks": {row["mark"]: float(row["merit on these pairs"]) for row in rows_with(tables, "mark")},
        "crossovers": {row["recipe"]: int(row["Hz"]) for row in rows_with(tables, "recipe", "Hz")},
        "stages": {name: round(last[name], 4) for name in last if name.startswith("stage")},
    }


def variations(preset: Preset) -> list[dict[str, Any]]:
    """Runs on one thread: every data seed with every training seed, and one without vector instructions; or none."""
    record = settings_of(preset)
    counts = record.data_seeds, record.seeds
    if counts == (1, 1):
        return []
    first = {"data_seed": preset.data.seed, "seed": preset.train.seed}
    rows = [
        {"run": f"songs-{songs}-seed-{seed}", "data_seed": first["data_seed"] + songs, "seed": first["seed"] + seed}
        for songs, seed in itertools.product(*map(range, counts))
    ]
    return rows if torch.cuda.is_available() else [*rows, {"run": "no-vectors"} | first]


def record_variations(preset: Preset, overrides: dict[str, Any], data_dir: str, folder: Path) -> None:
    """Run the variations, one per core, the longest first, and write their findings beside the notebooks' as it is."""
    out, done = run_notebooks(preset.name, overrides, data_dir, resume=True).parent, variations(preset)
    say(f"{len(done)} variations of {preset.name}")
    with ThreadPoolExecutor(1 if torch.cuda.is_available() else os.cpu_count()) as pool:
        folders = [*pool.map(lambda row: run_variation(row, preset, overrides, data_dir), done[::-1])][::-1]
    found = [row | found_in(where) for row, where in zip(done, folders, strict=True)]
    rows = [{"run": "as it is"} | found_in(out), *found]
    same = [row for row in found if row["data_seed"] == preset.data.seed]
    if others := [row["run"] for row in same if row["pairs"] != rows[0]["pairs"]]:
        raise NotebookError(", ".join(others), "has other pairs than the run as it is, from the same data seed")
    write_json(folder / "variations.json", rows)


def run_variation(row: Mapping[str, Any], preset: Preset, overrides: dict[str, Any], data_dir: str) -> Path:
    """Run a variation and return its folder."""
    settings = overrides | {"data.seed": row["data_seed"], "train.seed": row["seed"]}
    only, environment = "" if row["run"] in WHOLE else "04", NO_VECTORS if row["run"] == "no-vectors" else {}
    return run_apart(row["run"], preset.name, data_dir, settings, only, environment)


def run_apart(
    name: str, preset: str, data_dir: str, settings: Mapping[str, Any], only: str, environment: Mapping[str, str] = {}
) -> Path:
    """Run notebooks on one thread in a folder of their own, which is returned. A `NotebookError` names the log."""
    out = ROOT / "outputs" / "variations" / name
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "lib.pipeline", "--preset", preset, "--data", data_dir, "--out", str(out)]
    command += ["--resume", *(["--only", only] if only else [])]
    for setting, value in settings.items():
        command += ["--set", f"{setting}={json.dumps(value)}"]  # JSON is YAML
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    with open(out / "log.txt", "w") as log:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, check=False)
    if done.returncode == 130:
        raise KeyboardInterrupt("stopped; run `make record` again to resume")
    if done.returncode:
        raise NotebookError(name, f"failed; {out / 'log.txt'} and {out / 'index.html'} say why")
    return out


def found_in(out: Path) -> dict[str, Any]:
    """The findings of a run of the notebooks: numbers, verdicts and a hash of its pairs."""
    stored = sections(out)
    tables = tables_of(stored)
    measured, compared = rows_with(tables, "output", "merit"), rows_with(tables, "baseline", "verdict")
    claims = {f"{row['claim']}: {row['said']}": row["verdict"] for row in collect(stored)}
    pairs = json.dumps(read_json(out / "manifest.json")["pairs"])  # songs and their split
    return {
        "pairs": hashlib.sha256(pairs.encode()).hexdigest()[:16],
        "merit": {row["output"]: float(row["merit"]) for row in measured},
        "against": {row["baseline"]: row["verdict"].removesuffix(" the baseline") for row in compared},
        "advantage": {row["baseline"]: row["advantage in merit"] for row in compared},
        "claims": claims if len(stored) > 2 else {},
    }


def rows_with(tables: Mapping[str, Sequence[Mapping[str, str]]], *columns: str) -> Sequence[Mapping[str, str]]:
    """The rows of the first table that has these columns."""
    for rows in tables.values():
        if rows and set(columns) <= set(rows[0]):
            return rows
    raise ValueError(f"no notebook shows a table with the columns {', '.join(columns)}")


def write_json(path: Path, content: Any) -> None:
    """A list of rows with one row per line, anything else indented."""
    text = json.dumps(content, indent=1, ensure_ascii=False)
    if isinstance(content, list):
        text = "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in content) + "\n]"
    write_atomic(path, text + "\n")
