"""Two runs side by side: their configs, their metrics, and the same pairs fused by both. More: `--help`."""

from lib.commands import parser_of

if __name__ == "__main__":  # at once: what is imported below takes seconds
    parser_of("compare").parse_args()

import itertools
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from lib.audio.decode import mixed, resample
from lib.codec.codec import load_codec
from lib.data.pairs import Clip, build_manifest, load_pair, read_manifest, whole_clip
from lib.evaluation.baselines import advantage, features_of
from lib.evaluation.fusion_metrics import sound_metrics
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

LEAD = "Two runs on music that neither was trained on: how their configs, metrics and sounds differ."
MEASURES = ("merit", "onsets", "notes", "onsets_left", "notes_left", "artifacts", "level", "plain_merit")
SECTIONS = {"config", "runs", "metrics", "sounds"}
OF_LOSSES = ("data", "codec", "train.loss", "train.max_val_pairs")  # fields that decide what a validation loss is of
Pairs = dict[str, tuple[Clip, Clip]]
File = str | Path


class Compared:
    """A run with its model and codec."""

    def __init__(self, name: str, run: Run, codec: str):
        self.name, self.run = name, run
        asked = codec if run.codec["name"] != "mdct" else ""  # which is built in
        self.codec = load_codec(asked or run.codec_source)
        self.model = load_model(run, "best", codec_fingerprint=self.codec.fingerprint)


def compare_runs(
    first: File, second: File, out: File = "", *, data: File = "", pairs: int = 3, judged: int = 24, codec: str = ""
) -> tuple[Path, dict[str, Table]]:
    """Compare two run directories, in the order of their names, whichever is given first; returns the page's path and
    its tables by name. `data`: a folder of other music to measure them on, too. Of each music, `pairs` are played and
    `judged` measured. `UserError` if no pair is new to both."""
    if pairs < 1 or judged < 1:
        raise UserError(f"--pairs {pairs}, --judged {judged}: at least one pair each is needed")
    given = [Path(first), Path(second)]
    paths = dict(sorted(zip(names_of(given), given, strict=True)))
    compared = [Compared(name, Run.open(path), codec) for name, path in paths.items()]
    music = music_new_to_both(paths, data)
    out = Path(out) if out else ROOT / "outputs" / "compare" / "-".join(paths).replace("/", "_")
    if (out / "config.json").exists() or {path.stem for path in (out / "report").glob("*")} - SECTIONS:
        raise UserError(f"{out}: holds a run or its page, which would be lost; choose another folder")
    make_folder(out)
    changes = differing_fields(*(c.run.config for c in compared))
    rows = [{"field": field} | dict(zip(paths, map(str, values), strict=True)) for field, *values in changes]
    configs = Section(out, "config", "Configs")
    configs.key_figure("fields of the configs that differ", str(len(rows)))
    tables = {
        "configs": configs.table(rows or [{"field": "none: the configs are equal"}], "What differs in the configs"),
        "runs": write_runs(Section(out, "runs", "Runs"), compared, [field for field, *_ in changes]),
    }
    measured = {what: spread(new, judged, of_two_songs=True) for what, new in music.items() if new}
    tables["metrics"] = write_metrics(Section(out, "metrics", "Metrics"), compared, measured)
    sounds = Section(out, "sounds", "Sounds")
    for what, new in music.items():
        for pair, clips in spread(new, pairs).items():
            sounds.players(fused(compared, *clips), f"{what}: {pair}")
    facts = {c.name: f"{c.run.path}, commit {c.run.config.get('versions', {}).get('commit')}" for c in compared}
    for what, new in music.items():
        facts[what] = f"{len(new)} pairs that are new to both, {len(measured.get(what, ()))} of them measured"
    return write_report(out, " and ".join(paths), LEAD, facts), tables


def fused(compared: Sequence[Compared], input: Clip, target: Clip) -> Players:
    """Two clips and every run's fusion of them, at the clips' rate; each codec gets them at its own."""
    rate, wavs = input.sample_rate, load_pair(input, target, max(c.codec.channels for c in compared))
    players = dict(zip(("input", "target"), wavs, strict=True))
    for c in compared:
        own = (mixed(resample(wav, rate, c.codec.sample_rate), c.codec.channels) for wav in wavs)
        fusion = render(c.model, c.codec, *own).wav
        players[c.name] = resample(fusion, c.codec.sample_rate, rate)[..., : wavs[0].shape[-1]]
    return Players(players, rate)


def write_runs(section: Section, compared: Sequence[Compared], changed: Sequence[str]) -> Table:
    """What was trained, and the curves. Losses are left out if a field that they depend on has `changed`."""
    of_one_kind = not any(field.startswith(OF_LOSSES) for field in changed)
    rows, norms, losses = [], {}, {}
    for c in compared:
        training, validation = c.run.metrics("train"), c.run.metrics("val")
        steps = max((row["step"] for row in training), default=0)
        rows.append({"run": c.name, "parameters": f"{count_parameters(c.model):,}", "steps": steps})
        norms[c.name], losses[c.name] = (training, "grad_norm"), (validation, "loss")
        if of_one_kind:
            found = [row["loss"] for row in validation if row.get("loss") is not None]
            rows[-1]["lowest validation loss"] = f"{min(found):.3f}" if found else "none"
    section.figure(plots.curves(norms, ylabel="gradient norm", yscale="log"), "gradient_norms", "Gradient norms")
    if of_one_kind:
        section.figure(plots.curves(losses, ylabel="validation loss"), "losses", "Validation losses")
    about = "" if of_one_kind else "; no losses, as they are of different pairs, codecs or objectives"
    return section.table(rows, f"What was trained{about}")


def write_metrics(section: Section, compared: Sequence[Compared], music: Mapping[str, Pairs]) -> Table:
    """Both runs' metrics on the pairs of each music, and the verdict between them, which is printed too."""
    a, b = (c.name for c in compared)
    rows = []
    for what, pairs in music.items():
        measured: dict[str, list[dict[str, float]]] = {a: [], b: []}
        seconds = sum(input.length / input.sample_rate for input, _ in pairs.values())
        with tqdm(desc=f"measuring on {what}", total=seconds, unit=" s of music", unit_scale=True) as bar:
            for clips in pairs.values():
                input, target, *outputs = features_of(list(fused(compared, *clips).resampled().values()))
                for judged, output in zip(measured.values(), outputs, strict=True):
                    judged.append(sound_metrics(output, input, target))
                bar.update(clips[0].length / clips[0].sample_rate)
        found = advantage(measured, a, b, [(input.sha256, target.sha256) for input, target in pairs.values()])
        asked = f"figure of merit of {a} against {b} on {what}"
        said = f"{found}, {found.in_words(b)} on {len(pairs)} pair(s) ({TEST})"
        section.key_figure(asked, said)
        print(f"{asked}: {said}\n")
        rows += [{"music": what, "pairs": len(pairs)} | row for row in fusion_rows(measured, MEASURES, "run")]
    return section.table(rows, "Means over pairs that neither run was trained on")


def names_of(paths: Sequence[Path]) -> list[str]:
    """Folder names, with as many parent folders as it takes to make them different."""
    parts = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = [Path(*part[-count:]).as_posix() for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"{paths[0]}: compared with itself; name two runs")


def music_new_to_both(runs: Mapping[str, Path], data: str | Path = "") -> dict[str, Pairs]:
    """Name of the music → its pairs of songs that neither run was trained on, if any: the validation set of each run,
    of listening length where it has one, and everything in the folder `data`. Where two are equal, they are one."""
    trained_on = set().union(*(read_manifest(path / "manifest.json").songs("train") for path in runs.values()))
    sets, music, missing = [], {}, []
    for name, path in runs.items():
        longer = path / "listening.json"
        manifest = read_manifest(longer if longer.exists() else path / "manifest.json")
        sets.append((f"{manifest.root}, validation set of {name}", manifest, manifest.split("val")))
    if data:
        rate = max(manifest.sample_rate for _, manifest, _ in sets)
        seconds = max(manifest.clip_length / manifest.sample_rate for _, manifest, _ in sets)
        with tempfile.TemporaryDirectory() as folder:
            manifest = build_manifest(data, Path(folder) / "manifest.json", seconds, sample_rate=rate)
        sets.append((str(manifest.root), manifest, manifest.pairs))
    for what, manifest, pairs in sets:
        couples = [(pair.input, pair.target) for pair in pairs]
        new = [clips for clips in couples if trained_on.isdisjoint(clip.sha256 for clip in clips)]
        found = {describe_pair(*clips): tuple(whole_clip(manifest, clip) for clip in clips) for clips in new}
        if absent := next((c.path for c in itertools.chain(*found.values()) if not Path(c.path).is_file()), None):
            missing.append(f"{what}: left out, as {absent} is not there")
            continue
        if found and (twin := next((name for name, known in music.items() if keys(known) == keys(found)), None)):
            music[f"{twin} and {what.rpartition('validation set of ')[2]}"] = music.pop(twin)
        else:
            music[what] = found
    if not any(music.values()):
        faults = [f"one of the two was trained on the songs of every pair of {'; '.join(music)}"] * bool(music)
        raise UserError(f"{' and '.join(runs)}: {'; '.join(missing + faults)}; name a folder of other music by --data")
    print(*(f"{line}\n" for line in missing), sep="", end="", file=sys.stderr)
    return music


def keys(pairs: Pairs) -> set[tuple[str, str]]:
    """What the pairs hold, wherever their files are."""
    return {(input.key, target.key) for input, target in pairs.values()}


def spread(pairs: Pairs, count: int, of_two_songs: bool = False) -> Pairs:
    """At most `count` of the pairs, evenly spread; those of two songs alone, if there are some."""
    names = [name for name, (a, b) in pairs.items() if of_two_songs and a.sha256 != b.sha256] or list(pairs)
    return {names[i]: pairs[names[i]] for i in evenly_spread(len(names), count).tolist()}


def main() -> None:
    options = parser_of("compare").parse_args()
    with exit_on_user_error():
        page, tables = compare_runs(**vars(options))
        for table in tables.values():
            print(f"{table.caption}\n{table}\n")
        print(f"page: {page}")


if __name__ == "__main__":
    main()
