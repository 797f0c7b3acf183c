"""Two runs side by side: their configs, their metrics, and the same pairs fused by both.

    python -m lib.compare outputs/a outputs/b [--out DIR] [--pairs 3] [--judged 24]

The pairs are validation pairs of the first run whose music neither run was trained on; those that are measured are of
two songs, if there are some. Prints the tables and writes them, with curves and players, to a page, by default
outputs/compare/<a>-<b>/index.html.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from lib.codec.codec import load_codec
from lib.data.pairs import Clip, load_pair, read_manifest, whole_clip
from lib.evaluation.baselines import advantage
from lib.evaluation.fusion_metrics import sound_features, sound_metrics
from lib.evaluation.tables import count_parameters, fusion_rows
from lib.listening.panel import describe_pair
from lib.listening.player import Players
from lib.listening.render import render
from lib.model.fusion import load_model
from lib.project import ROOT
from lib.report.report import Section, Table, write_report
from lib.training import plots
from lib.training.batches import evenly_spread
from lib.training.run import Run
from lib.util.configs import differing_fields
from lib.util.errors import UserError, exit_on_user_error
from lib.util.files import make_folder
from lib.util.stats import TEST

LEAD = "Two runs on validation pairs that neither was trained on: how their configs, metrics and sounds differ."
MEASURES = ("merit", "onsets", "notes", "onsets_left", "notes_left", "artifacts", "level", "plain_merit")
SECTIONS = {"config", "metrics", "sounds"}
Pairs = dict[str, tuple[Clip, Clip]]


class Compared:
    """A run with its model and codec."""

    def __init__(self, name: str, run: Run, codec_folder: str):
        self.name, self.run = name, run
        self.codec = load_codec(codec_folder if codec_folder and run.codec["name"] == "encodec" else run.codec["name"])
        self.model = load_model(run, "best", codec_fingerprint=self.codec.fingerprint)


def compare_runs(
    first: str | Path, second: str | Path, out: str | Path = "", *, pairs: int = 3, judged: int = 24, codec: str = ""
) -> tuple[Path, dict[str, Table]]:
    """Compare two run directories; returns the page's path and its tables by name. `UserError` if no pair is new."""
    if pairs < 1 or judged < 1:
        raise UserError(f"--pairs {pairs}, --judged {judged}: at least one pair each is needed")
    paths = [Path(path) for path in (first, second)]
    runs = [Run.open(path) for path in paths]
    names = names_of(paths)
    compared = [Compared(name, run, codec) for name, run in zip(names, runs, strict=True)]
    new = pairs_new_to_both(*paths)
    out = Path(out) if out else ROOT / "outputs" / "compare" / "-".join(names).replace("/", "_")
    if (out / "config.json").exists() or {path.stem for path in (out / "report").glob("*")} - SECTIONS:
        raise UserError(f"{out}: holds a run or its page, which would be lost; choose another folder")
    make_folder(out)
    changes = differing_fields(runs[0].config, runs[1].config)
    rows = [{"field": field} | dict(zip(names, map(str, values), strict=True)) for field, *values in changes]
    configs = Section(out, "config", "Configs")
    configs.key_figure("fields of the configs that differ", str(len(rows)))
    of_two_songs = {what: pair for what, pair in new.items() if pair[0].sha256 != pair[1].sha256} or new
    tables = {
        "configs": configs.table(rows or [{"field": "none: the configs are equal"}], "What differs in the configs"),
        "metrics": write_metrics(Section(out, "metrics", "Metrics"), compared, spread(of_two_songs, judged)),
    }
    sounds = Section(out, "sounds", "Sounds")
    for what, clips in spread(new, pairs).items():
        wavs = load_pair(*clips)
        outputs = {c.name: render(c.model, c.codec, *wavs).wav for c in compared}
        sounds.players(Players({"input": wavs[0], "target": wavs[1], **outputs}), what)
    facts = {c.name: f"{c.run.path}, commit {c.run.config.get('versions', {}).get('commit')}" for c in compared}
    facts["pairs"] = f"{len(new)} that are new to both, {min(judged, len(of_two_songs))} of them measured"
    return write_report(out, f"{names[0]} and {names[1]}", LEAD, facts), tables


def write_metrics(section: Section, compared: Sequence[Compared], pairs: Pairs) -> Table:
    curves = {c.name: {split: c.run.metrics(split) for split in ("train", "val")} for c in compared}
    measured: dict[str, list[dict[str, float]]] = {c.name: [] for c in compared}
    for input, target in tqdm(pairs.values(), desc="measuring", unit="pair"):
        wavs = load_pair(input, target)
        clips = [sound_features(wav) for wav in wavs]
        for c in compared:
            measured[c.name].append(sound_metrics(sound_features(render(c.model, c.codec, *wavs).wav), *clips))
    a, b = measured
    found = advantage(measured, a, b, [(input.sha256, target.sha256) for input, target in pairs.values()])
    said = f"{found}, {found.in_words(b)} on {len(pairs)} pair(s) ({TEST})"
    section.key_figure(f"figure of merit of {a} against {b}", said)
    print(f"figure of merit of {a} against {b}: {said}\n")
    rows = []
    for c, means in zip(compared, fusion_rows(measured, MEASURES, "run"), strict=True):
        section.key_figure(f"figure of merit of {c.name}", f"{means['merit']}, 1 at best")
        losses = [row["loss"] for row in curves[c.name]["val"] if row.get("loss") is not None]
        steps = max((row["step"] for row in curves[c.name]["train"]), default=0)
        row = {"run": c.name, "parameters": f"{count_parameters(c.model):,}", "steps": steps}
        row["lowest validation loss"] = f"{min(losses):.3f}" if losses else "none"
        rows.append(row | means)
    section.figure(plots.runs_side_by_side(curves), "curves", "Validation loss, gradient norm and level over steps")
    return section.table(rows, f"Means over {len(pairs)} validation pairs; losses compare where the objectives do")


def names_of(paths: Sequence[Path]) -> list[str]:
    """Folder names, with as many parent folders as it takes to make them different."""
    parts = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = [Path(*part[-count:]).as_posix() for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"{paths[0]}: compared with itself; name two runs")


def pairs_new_to_both(first: Path, second: Path) -> Pairs:
    """Validation pairs of the first run, of listening length if it has some, from files new to both runs."""
    longer = first / "listening.json"
    manifest = read_manifest(longer if longer.exists() else first / "manifest.json")
    first_songs, second_songs = (read_manifest(run / "manifest.json").songs("train") for run in (first, second))
    pairs = [(pair.input, pair.target) for pair in manifest.split("val")]
    new = [clips for clips in pairs if (first_songs | second_songs).isdisjoint(clip.sha256 for clip in clips)]
    if not new:
        fault = f"was trained on the music of every validation pair of {first}"
        raise UserError(f"{second}: {fault}; nothing is new to both")
    return {describe_pair(*clips): tuple(whole_clip(manifest, clip) for clip in clips) for clips in new}


def spread(pairs: Pairs, count: int) -> Pairs:
    """At most `count` of the pairs, evenly spread."""
    names = list(pairs)
    return {names[i]: pairs[names[i]] for i in evenly_spread(len(names), count).tolist()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lib.compare", description="Two runs side by side.")
    parser.add_argument("first", help="run directory, such as outputs/demo")
    parser.add_argument("second", help="run directory to compare it with")
    parser.add_argument("--out", default="", help="folder for the page (default: outputs/compare/<first>-<second>)")
    parser.add_argument("--pairs", type=int, default=3, help="pairs to listen to (default: 3)")
    parser.add_argument("--judged", type=int, default=24, help="pairs to measure on (default: 24)")
    parser.add_argument("--codec", default="", help="directory of EnCodec weights, for runs that were trained with it")
    options = parser.parse_args()
    with exit_on_user_error():
        page, tables = compare_runs(**vars(options))
        for table in tables.values():
            print(f"{table.caption}\n{table}\n")
        print(f"page: {page}")


if __name__ == "__main__":
    main()
