"""The blocks that the README quotes from a record: text between marks, written from the files of outputs/record/."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, mode
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lib.evaluation.baselines import ORACLE
from lib.evaluation.tables import ALONE, MASKS_ALONE, WITH_CASCADE, number_row
from lib.lab.findings import weak_residuals
from lib.lab.results import Result, by_variant, read_record
from lib.lab.variants import WEAK_RESIDUALS
from lib.superres.evaluation import METHODS, Score, gains_in_words, nearer_than_all, upper_rows
from lib.util.errors import UserError
from lib.util.files import read_json
from lib.util.stats import TEST, Comparison

DISTANCES = ("envelope", "replication", "ridge", "model", "draw", "vocoder")  # methods that the README shows
BLOCKS = ("music", "results", "explosion", "speed", "distances")
MARKS = "<!-- {}: written by make record -->", "<!-- end of {} -->"
DIFFERENT = "runs disagree on"
TEMPLATES = Environment(loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True)
STUDIED = "onsets", "notes", "onsets_left", "notes_left", "plain_merit"  # of settings on real music
METRICS = "merit", "onsets", "notes", "onsets_left", "notes_left", "beats", "level", "plain_merit"  # on real music


def with_blocks(readme: str, blocks: Mapping[str, str]) -> str:
    """The README with the text between the marks of each block replaced; `UserError` if marks are missing."""
    for name, content in blocks.items():
        first, last = (mark.format(name) for mark in MARKS)
        if not readme.count(first) == readme.count(last) == 1:
            raise UserError(f"README.md: the marks {first} and {last} must each be there once; restore them")
        pattern = re.escape(first) + ".*" + re.escape(last)
        readme = re.sub(pattern, lambda _, text=f"{first}\n{content}\n{last}": text, readme, flags=re.DOTALL)
    return readme


def readme_blocks(folder: Path) -> dict[str, str]:
    """The blocks of the record in `folder`, by name."""
    made, summary, bench = (read_json(folder / f"{name}.json") for name in ("record", "summary", "bench"))
    origins: dict[str, list[str]] = {}
    for part, facts in made.items():
        origin = "commit {commit} (preset {preset}, codec {codec}, {music})".format(**facts)
        origins.setdefault(origin, []).append(part)
    last = "; ".join(f"{origin}: {', '.join(parts)}" for origin, parts in origins.items()) + "."
    if "after a stop" not in (took := summary["facts"]["time"]):  # otherwise only part of the time is known
        minutes = sum(map(int, re.findall(r"(\d+) s\b", took))) / 60
        last += f" All notebooks took {minutes:.0f} minutes on {made['notebooks']['machine']['cores']} cores."
    return {
        "music": music_block(folder),
        "results": "\n".join([*results(read_json(folder / "variations.json", list)), "", f"*Measured in {last}*"]),
        "explosion": explosion_block(folder),
        "speed": speed(bench["cascade"]),
        "distances": distances_block(*read_record(folder / "superres.json", Score)),
    }


def music_block(folder: Path) -> str:
    """Fusion on real music (fusion.json) and longer training on a GPU (gpu.json), where the record has them."""
    values: dict[str, Any] = {"study": {}, "gpu": {}}
    if (folder / "fusion.json").exists():
        rows, values["facts"] = read_record(folder / "fusion.json", dict)
        values["study"] = study(rows, values["facts"])
    if (folder / "gpu.json").exists():
        fields = {"gpu": str, "trained_by": str, "clip_seconds": float, "batch_size": int, "runs": dict, "marks": dict}
        values["gpu"] = gpu = read_json(folder / "gpu.json", fields)
        values["mark"] = max(gpu["marks"], key=gpu["marks"].get)
    return filled("music.md.j2", values)


def explosion_block(folder: Path) -> str:
    """What ends a training and what does not (explosion.json), where the record has it."""
    if not (folder / "explosion.json").exists():
        return "This record is older than the long trainings."
    rows, facts = read_record(folder / "explosion.json", dict)
    causes, deaths = (facts["tables"][name] for name in ("causes", "deaths"))
    causes = [row for row in causes if row["experiment"] == "grid"]

    def total(found: Sequence[Mapping[str, str]]) -> str:
        dead, runs = (
            sum(map(int, part)) for part in zip(*(row["non-finite"].split(" of ") for row in found), strict=True)
        )
        return f"{dead} of {runs}"

    def of(experiment: str, data: str) -> list[Mapping[str, str]]:
        return [row for row in deaths if (row["experiment"], row["data"]) == (experiment, data)]

    deaths = [row | {"operation": re.sub(r"(\w+\.py):\d+ in (\w+)", r"\2 in \1", row["operation"])} for row in deaths]
    names = [variant.name for variant in WEAK_RESIDUALS]
    kept = {}
    for row in rows:
        groups = by_variant([Result(**run) for run in row["results"]])
        if set(names) <= set(groups):
            kept[row["data"]] = weak_residuals(groups, names)[-1].partition(": ")[-1]
    norms = [row["largest norm"].partition(" ") for row in causes]  # '565 (the setting)'
    largest = max((float(norm), f"{float(norm):,.0f} {setting}") for norm, _, setting in norms)[1]
    values = {"facts": facts, "causes": causes, "of": of, "total": total, "kept": kept, "largest": largest}
    return filled("explosion.md.j2", values)


def study(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Outputs on real music, the trained masks against each baseline, and the merit of each setting."""
    trained = mode(row["setting"] for row in reversed(rows))  # with most training seeds, or the last one
    masks, shorter, cascade = ([r for r in rows if r["setting"] == s] for s in (trained, MASKS_ALONE, WITH_CASCADE))
    against = [row["against"] for row in masks]
    shown = {f"trained {trained} (mean; training seeds: {len(masks)})": (masks, "trained model")}
    for setting, of in {MASKS_ALONE: shorter, WITH_CASCADE: cascade}.items():
        shown |= {f"{setting}, {facts['steps']} steps": (of, "trained model")}
    recipes = sorted(against[0], key=lambda name: -trained_mean(masks, name, "merit"))
    shown |= {name: (masks, name) for name in (*recipes, ORACLE)}
    cells = {label: [span([trained_mean(*of, metric)]) for metric in METRICS] for label, of in shown.items()}

    def ends(name: str, column: str) -> str:
        found = sorted((seed[name][column].replace("-", "−") for seed in against), key=mean_of)
        return " to ".join(dict.fromkeys((found[0], found[-1])))

    said = [f"{ends(name, 'advantage in merit')} over {name}" for name in recipes]
    for i, name in enumerate(recipes[:2]):
        said[i] += f" (onset score {ends(name, 'in onset score')}, note score {ends(name, 'in note score')})"
    verdicts = [{name: row["verdict"].removesuffix(" the baseline") for name, row in seed.items()} for seed in against]
    return {
        "outputs": cells,
        "best": max((merit for label, (merit, *_) in cells.items() if label != ORACLE), key=mean_of),
        "advantages": said,
        "verdicts": alike(verdicts),
        "pairs": against[0][recipes[0]]["pairs won"].split()[-1],
        "settings": study_rows(rows),
        "crossovers": masks[0]["crossovers"],
    }


def study_rows(studied: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The settings of fusion.json: the trained model's metrics as means over training seeds, and how long training took
    (s). Merit untrained, and as a range over seeds."""
    rows = []
    for setting in dict.fromkeys(row["setting"] for row in studied):
        own = [row for row in studied if row["setting"] == setting]
        merits = [float(row["measured"]["trained model"]["merit"]) for row in own]
        seconds = fmean(row["curve"][-1]["seconds"] for row in own)
        head = {"setting": setting, "runs": len(own), "seconds": f"{seconds:.0f}"}
        head["untrained"] = f"{trained_mean(own, 'untrained model', 'merit'):.2f}"
        head["merit"] = f"{min(merits):.2f}" + (f" to {max(merits):.2f}" if len(own) > 1 else "")
        head[f"merit, {ALONE}"] = f"{trained_mean(own, ALONE, 'merit'):.2f}" if ALONE in own[0]["measured"] else "–"
        rows.append(number_row(head, {name: trained_mean(own, "trained model", name) for name in STUDIED}))
    return rows


def trained_mean(studied: Sequence[Mapping[str, Any]], output: str, metric: str) -> float:
    """A metric of one output, averaged over runs of fusion.json."""
    return fmean(float(row["measured"][output][metric.replace("_", " ")]) for row in studied)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def results(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Results over all runs with other songs and seeds, and their changes on other processors."""
    seeded = [row for row in rows if row["run"].startswith("songs-")] or list(rows)
    by_run = {row["run"]: row for row in rows}
    values = {name: len({row.get(key) for row in seeded}) for name, key in (("songs", "data_seed"), ("seeds", "seed"))}
    values["advantages"] = pooled(seeded)
    values["moved"] = "no-vectors" in by_run and moved(
        by_run["as it is"], [by_run[name] for name in ("songs-0-seed-0", "no-vectors")]
    )
    return filled("results.md.j2", values | {"runs": seeded}).splitlines()


def filled(template: str, values: Mapping[str, Any]) -> str:
    """A block of the README; in its lists, names have no comma."""
    return (
        TEMPLATES.get_template(template)
        .render(**WORDS, **values)
        .replace("crossover, input below", "crossover with the input below")
    )


def pooled(rows: Sequence[Mapping[str, Any]]) -> str:
    """The mean advantage over each baseline. Data seeds are independent; runs on the same songs share their error."""
    said = []
    for name in rows[0]["advantage"]:
        by_songs: dict[Any, list[list[float]]] = {}
        for row in rows:
            mean, _, error = row["advantage"][name].partition(" ± ")
            by_songs.setdefault(row.get("data_seed"), []).append([float(mean), float(error or "inf")])
        means, errors = zip(*([*map(fmean, zip(*runs, strict=True))] for runs in by_songs.values()), strict=True)
        found = str(Comparison(fmean(means), math.hypot(*errors) / len(errors), len(rows)))
        said.append(f"{found.replace('-', '−')} over {name}")
    return ", ".join(said)


def span(values: Sequence[float]) -> str:
    low, high = (f"{round(value, 2) + 0.0:.2f}".replace("-", "−") for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def mean_of(plus_minus: str) -> float:
    """'−0.12 ± 0.05' → -0.12."""
    return float(plus_minus.split()[0].replace("−", "-"))


def alike(verdicts: Sequence[Mapping[str, str]]) -> str:
    """'better than a, b; worse than c' where all runs agree, and 'runs disagree on' for the rest."""
    groups: dict[str, list[str]] = {}
    for name in verdicts[0]:
        found = {run[name] for run in verdicts}
        groups.setdefault(found.pop() if len(found) == 1 else DIFFERENT, []).append(name)
    return "; ".join(f"{words} {', '.join(names)}" for words, names in groups.items())


def moved(here: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    """What changes in runs on one thread, one of them without vector instructions."""
    kinds = {"against": "fusion against ", "claims": ""}
    names = [(kind, name) for kind in kinds for name in here[kind]]
    changed = [kinds[k] + name for k, name in names if any(row[k].get(name) != here[k][name] for row in others)]
    merit = max(abs(row["merit"][name] - value) for row in others for name, value in here["merit"].items())
    pairs = "the same" if all(row["pairs"] == here["pairs"] for row in others) else "OTHER"
    all_but = f", all but: {'; '.join(changed)}" if changed else ""
    moves = f"move by up to {merit:.2f}" if merit >= 0.005 else "are equal to two digits"
    return (
        "On one thread, with and without vector instructions (AVX and the like), the demo "
        f"has {pairs} pairs and split, and {len(names) - len(changed)} of its {len(names)} verdicts, on claims and on "
        f"baselines, are the same"
        f"{all_but}. Figures of merit {moves}."
    )


def speed(rows: Sequence[Mapping[str, Any]]) -> str:
    """The benchmark against stock PyTorch, over all sizes of batches and clips."""
    parts = []
    for what in dict.fromkeys(row["what"] for row in rows):
        own = [row for row in rows if row["what"] == what]
        ratio, highest = (span([row[name] for row in own]) for name in ("ratio", "highest_ratio"))
        memory = span([row["here_mib_per_clip"] / row["baseline_mib_per_clip"] for row in own])
        fast = f"{ratio} times as fast as stock PyTorch (upper bound: {highest})"
        parts.append(f"{what.capitalize()}: {fast}, with {memory} of its memory.")
    return f"{' '.join(parts)} Each size: [bench.md](outputs/record/bench.md)."


def distances_block(scores: Sequence[Score], facts: Mapping[str, Any]) -> str:
    """LSD above the cutoff, a row for each method in `DISTANCES`, and what the model gains, with how many seeds."""
    rows = [row for row in upper_rows(sorted(scores, key=lambda s: s.cutoff)) if row["method"] in DISTANCES]
    named = ([f"{row['method']}: {METHODS[row['method']]}", *list(row.values())[1:]] for row in rows)
    trained, held_out = facts["songs"]["songs"]
    judged = f"clips of {max(s.songs for s in scores)} of {held_out} that are held out"
    others = {name: [Score(**row) for row in found] for name, found in facts["others"].items()}
    runs = {"songs, seed 0": scores} | others
    nearest = {name: ", ".join(f"{s.cutoff / 1000:g}" for s in nearer_than_all(own)) for name, own in runs.items()}
    said = f"Trained on {trained} songs, judged on {judged}, the model {gains_in_words(scores)} ({TEST}). "
    said += "Nearer than every baseline, by what was held out (or trained with) and random seed: "
    said += "; ".join(f"{name}: {f'at {at} kHz' if at else 'nowhere'}" for name, at in nearest.items())
    said += f". Albums held out: {', '.join(facts['albums'])}."
    return "\n".join([*table(list(rows[0]), named), "", said])


WORDS = {"TEST": TEST, "ORACLE": ORACLE, "alike": alike, "span": span}  # of both templates
