"""What the README quotes: every wording, and that what is committed says nothing that the record does not hold."""

import dataclasses
import json
import re
import shutil

import pytest
from lab.test_audit import result
from parts import markdown_table
from quotes import (
    BLOCKS,
    DIFFERENT,
    DISTANCES,
    MARKS,
    alike,
    distances_block,
    explosion_block,
    mean_of,
    moved,
    music_block,
    readme_blocks,
    results,
    span,
    speed,
    study_rows,
    trained_mean,
    with_blocks,
)
from writing import write_record

from lib.evaluation.baselines import ORACLE
from lib.evaluation.tables import ALONE, MASKS_ALONE, SOURCE_SYSTEM, WITH_CASCADE
from lib.lab.results import read_record
from lib.lab.variants import EXPLODING, REFERENCE, WEAK_RESIDUALS
from lib.project import RECORD, ROOT
from lib.superres.evaluation import CUTOFFS, METHODS, Score
from lib.util.errors import UserError
from lib.util.stats import TEST

README = (ROOT / "README.md").read_text()
# numbers of the README that nothing has measured, outside code and quoted blocks
NOT_MEASURED = {
    "3.11": "the oldest Python",
    "5": "GB of packages",
    "24": "kHz of codecs and fusions",
    "12": "kHz, the highest in them",
    "48": "kHz of super-resolution",
    "4.0": "the licence of EnCodec's weights",
    **dict.fromkeys(("13", "580"), "the version of CUDA that is installed, and of the driver that it needs"),
    **dict.fromkeys(("02", "03", "05"), "a notebook"),
}


def row(run: str, merit: float, words: str = "better than", **more) -> dict:
    return {
        "run": run,
        "pairs": "p",
        "merit": {"trained model": merit, "average": 0.5, "masks": 0.6},
        "against": {"average": "better than", "masks": words},
        "advantage": dict.fromkeys(("average", "masks"), "+0.100 ± 0.030"),
        "claims": {},
        **more,
    }


SEEDED = [
    row(f"songs-{songs}-seed-{seed}", 0.7 + songs / 10 + seed / 100, "worse than" if seed else "better than")
    | {"data_seed": songs, "seed": seed}
    for songs in range(3)
    for seed in range(2)
]


def test_only_what_held_in_every_run_is_said_with_the_range():
    text = "\n".join(results([row("as it is", 0.1), *SEEDED]))
    assert text.startswith("6 runs, 3 data seeds with 2 training seeds each; ")
    assert "Figure of merit: trained model 0.70 to 0.91, average 0.50, masks 0.60." in text
    assert f"Verdicts: better than average; {DIFFERENT} masks." in text
    assert "Other CPUs" not in text


def test_advantages_are_pooled_over_songs_and_not_over_training_seeds():
    """Three sets of songs, two runs each: the mean of all; errors add up over the sets, and are averaged within one."""
    values = {
        "average": [(0.1, 0.03), (0.3, 0.05), (0.0, 0.06), (0.2, 0.06), (-0.1, 0.0), (0.1, 0.0)],
        "masks": 6 * [(-0.2, 0.1)],
    }
    rows = [
        row | {"advantage": {name: f"{found[i][0]:+.3f} ± {found[i][1]:.3f}" for name, found in values.items()}}
        for i, row in enumerate(SEEDED)
    ]
    said = "+0.100 ± 0.024 over average, −0.200 ± 0.058 over masks."  # √(0.04² + 0.06² + 0²) / 3, 0.1 / √3
    assert f"trained model, over all data seeds (± standard error): {said}" in "\n".join(results(rows))
    rows[3]["advantage"]["masks"] = "-0.200"  # of one song
    assert "−0.200 over masks." in "\n".join(results(rows))


def test_a_record_without_variations_quotes_the_one_run():
    text = "\n".join(results([row("as it is", 0.1)]))
    assert text.startswith("One run (")
    assert "trained model 0.10" in text


def test_what_moves_on_other_processors_is_said():
    here = row("as it is", 0.70, claims={"C1: a": "reproduced", "C2: b": "refuted"})
    thread = row("songs-0-seed-0", 0.72, claims={"C1: a": "reproduced", "C2: b": "refuted"})
    bare = row("no-vectors", 0.69, claims={"C1: a": "reproduced", "C2: b": "refuted"})
    same = "the demo has the same pairs and split, and 4 of its 4 verdicts, on claims and on baselines, are the same. "
    moves = "Figures of merit move by up to 0.02."
    assert moved(here, [thread, bare]).endswith(same + moves)
    assert moved(here, [here, here]).endswith(same + "Figures of merit are equal to two digits.")
    bare["claims"]["C2: b"], bare["pairs"] = "reproduced", "q"
    other = "the demo has OTHER pairs and split, and 3 of its 4 verdicts, on claims and on baselines, are the same, "
    other += "all but: C2: b. "
    assert moved(here, [thread, bare]).endswith(other + moves)
    assert "Other CPUs" in "\n".join(results([here, thread | {"data_seed": 0, "seed": 0}, bare]))


RECIPES = {"average of waveforms": 0.15, "crossover, input below": 0.18, "HPSS": 0.45}  # merit of each
FACTS = {
    "steps": 300,
    "layers": 2,
    "held_out": ["a"],
    "tracks": {"nexuiz-music": ["a", "b"], "wesnoth-1.16-music": ["c"]},
    "licences": {"nexuiz-music": "GPL-2 or later", "wesnoth-1.16-music": "CC0"},
}
ON_GPU = {
    "gpu": "NVIDIA H200",
    "trained_by": "1234567",
    "clip_seconds": 16.0,
    "batch_size": 8,
    "runs": {
        "masks": [{"epoch": 1, "seconds": 3.0, "merit": 0.9}, {"epoch": 200, "seconds": 750.0, "merit": 0.631}],
        "cascade": [{"epoch": 50, "seconds": 60.0, "merit": 0.4}],
    },
    "marks": {"crossover": 0.33, "HPSS": 0.452, "average": 0.2},
}


def studied(setting: str, merit: float, advantage: str = "+0.100 ± 0.040", verdict: str = "better than") -> dict:
    """A run of fusion.json: every metric of an output is its merit, but for its level, which is negative."""
    merits = {"trained model": merit, ORACLE: 0.95, "untrained model": 0.99, "input": 0.0, "target": 0.02, **RECIPES}
    names = ("merit", "onsets", "notes", "onsets left", "notes left", "beats", "plain merit")
    measured = {name: dict.fromkeys(names, f"{m:.2f}") | {"level": f"{-m:.2f}"} for name, m in merits.items()}
    found = {"advantage in merit": "+0.300 ± 0.010", "pairs won": "24 of 24", "verdict": "better than the baseline"}
    found |= {"in onset score": "-0.100 ± 0.050", "in note score": "+0.200 ± 0.050"}
    own = found | {"advantage in merit": advantage, "pairs won": "9 of 24", "verdict": f"{verdict} the baseline"}
    against = dict.fromkeys(RECIPES, found) | {"HPSS": own}
    curve = [{"seconds": 9, "merit": merit}]
    found = {"marks": {"HPSS": 0.5}, "crossovers": {"crossover, input below": 1700}, "stages": {}}
    return {"setting": setting, "seed": 0, "measured": measured, "against": against, "curve": curve, **found}


LONGER = f"{MASKS_ALONE}, 900 steps"
STUDIED = [
    studied(SOURCE_SYSTEM, 0.2),
    studied(MASKS_ALONE, 0.3),
    studied(LONGER, 0.5, "+0.050 ± 0.030", "no statistically significant difference from"),
    studied(LONGER, 0.61, "-0.010 ± 0.020"),
    studied(LONGER, 0.6, "+0.150 ± 0.040"),
    studied(WITH_CASCADE, 0.4),
]


def on_music(tmp_path, rows: list[dict], gpu: dict | None = None) -> str:
    write_record(tmp_path / "fusion.json", rows, FACTS)
    if gpu is not None:
        (tmp_path / "gpu.json").write_text(json.dumps(gpu))
    return music_block(tmp_path)


def test_outputs_on_real_music_are_a_table_with_the_mean_over_seeds(tmp_path):
    lines = on_music(tmp_path, STUDIED).splitlines()
    assert lines[0] == (
        "| output | merit | input's onsets | target's notes | target's onsets left | input's notes left | beats "
        "| level (dB) | merit by the old figure |"
    )
    assert set(lines[1].split()) == {"|", "---"}
    rows = {cells[0]: cells[1:] for cells in (line.strip("| ").split(" | ") for line in lines[2 : lines.index("")])}
    assert {name: cells[0] for name, cells in rows.items()} == {
        f"trained {LONGER} (mean; training seeds: 3)": "**0.57**",
        f"{MASKS_ALONE}, 300 steps": "0.30",
        f"{WITH_CASCADE}, 300 steps": "0.40",
        "HPSS": "0.45",
        "crossover with the input below": "0.18",
        "average of waveforms": "0.15",
        ORACLE: "0.95",
    }
    assert list(rows)[3:7] == ["HPSS", "crossover with the input below", "average of waveforms", ORACLE]
    assert rows["HPSS"][1:] == ["0.45"] * 5 + ["−0.45", "0.45"]


def test_each_column_on_real_music_is_its_own_metric(tmp_path):
    values = ("0.60", "0.11", "0.12", "0.13", "0.14", "0.15", "-1.60", "0.17")
    names = ("merit", "onsets", "notes", "onsets left", "notes left", "beats", "level", "plain merit")
    run = studied(MASKS_ALONE, 0.6)
    run["measured"]["trained model"] = dict(zip(names, values, strict=True))
    cells = "**0.60** | 0.11 | 0.12 | 0.13 | 0.14 | 0.15 | −1.60 | 0.17"
    text = on_music(tmp_path, [run, run, studied(WITH_CASCADE, 0.4)])
    assert f"\n| trained {MASKS_ALONE} (mean; training seeds: 2) | {cells} |\n" in text


def test_the_best_on_real_music_is_bold_whoever_it_is(tmp_path):
    masks = studied(MASKS_ALONE, 0.3)
    masks["measured"][ORACLE]["merit"] = "0.45"  # no output that one can have, as good as it may be
    text = on_music(tmp_path, [masks, studied(WITH_CASCADE, 0.4)])
    assert text.count("**0.") == 1
    assert "| HPSS | **0.45** | 0.45 |" in text


def test_the_advantage_on_real_music_is_said_with_its_errors_and_where_it_comes_from(tmp_path):
    text = on_music(tmp_path, STUDIED)
    scores = " (onset score −0.100 ± 0.050, note score +0.200 ± 0.050)"  # of the best two recipes
    assert (
        f"(± standard error, lowest to highest seed): −0.010 ± 0.020 to +0.150 ± 0.040 over HPSS{scores}; "
        f"+0.300 ± 0.010 over crossover with the input below{scores}; +0.300 ± 0.010 over average of waveforms. "
        "Verdicts: better than average of "
        f"waveforms, crossover with the input below; {DIFFERENT} HPSS ({TEST})."
    ) in text
    assert "24 pairs of 1 held-out songs" in text
    assert "tracks: 2 of nexuiz-music (GPL-2 or later), 1 of wesnoth-1.16-music (CC0)." in text
    assert "Tuned on training songs: crossover with the input below 1,700 Hz." in text
    trained = {SOURCE_SYSTEM: "0.20", MASKS_ALONE: "0.30", LONGER: "0.50 to 0.61", WITH_CASCADE: "0.40"}
    changes = ", ".join(f"{setting} 0.99 → {merit}" for setting, merit in trained.items())
    assert f"; 300 steps if nothing else is said, 2-layer stages. Merit, untrained → trained: {changes}." in text
    assert "GPU" not in text
    assert "older" not in text


def test_with_one_training_seed_the_longest_training_is_quoted(tmp_path):
    """Every setting has one run then; the one that was trained for longer comes last."""
    text = on_music(tmp_path, [STUDIED[0], STUDIED[1], STUDIED[-1], STUDIED[2]])
    assert f"\n| trained {LONGER} (mean; training seeds: 1) | **0.50** |" in text


def test_an_advantage_without_an_error_is_quoted_as_it_is(tmp_path):
    text = on_music(tmp_path, [studied(WITH_CASCADE, 0.4), studied(MASKS_ALONE, 0.5, "-0.050")])
    assert "lowest to highest seed): −0.050 over HPSS (onset score" in text


GPU_SAID = (
    "On one NVIDIA H200 (commit 1234567), clips of 16 s, batch size 8, by that commit's judge and on other pairs: "
    "merit 0.63 after 200 epochs and 12.5 minutes (masks), 0.40 after 50 epochs and 1.0 minutes (cascade), beside 0.45 "
    "of the best mark (HPSS): "
    "[curves](outputs/record/gpu.png)."
)


def test_training_on_a_gpu_is_quoted_where_it_is_recorded(tmp_path):
    (tmp_path / "gpu.json").write_text(json.dumps(ON_GPU))
    assert music_block(tmp_path) == f"This record is older than the measurements on real music.\n\n{GPU_SAID}"
    without = on_music(tmp_path, STUDIED).removesuffix(f"\n\n{GPU_SAID}")
    (tmp_path / "gpu.json").unlink()
    assert music_block(tmp_path) == without
    with pytest.raises(UserError, match=r"gpu\.json: damaged \(no field 'marks'\)"):
        on_music(tmp_path, STUDIED, {name: value for name, value in ON_GPU.items() if name != "marks"})


def test_a_record_without_real_music_says_so_and_has_all_other_blocks(tmp_path):
    shutil.copytree(RECORD, tmp_path / "record")
    for name in ("fusion.json", "gpu.json"):
        (tmp_path / "record" / name).unlink(missing_ok=True)
    older = readme_blocks(tmp_path / "record")
    assert older["music"] == "This record is older than the measurements on real music."
    write_record(tmp_path / "record" / "fusion.json", STUDIED, FACTS)
    newer = readme_blocks(tmp_path / "record")
    assert tuple(older) == tuple(newer) == BLOCKS
    assert {name for name in BLOCKS if older[name] != newer[name]} == {"music"}
    assert with_blocks(with_blocks(README, newer), older) == with_blocks(README, older)


def trained(variant: str, leak: float, seed: int) -> dict:
    """A run at the target level as a row, with this correlation of output and input."""
    return dataclasses.asdict(dataclasses.replace(result(EXPLODING, seed, leak=leak), variant=variant))


def test_what_ends_a_training_is_quoted_from_its_tables(tmp_path):
    def death(experiment: str, data: str, found: str, operation: str = "–") -> dict:
        return {"experiment": experiment, "data": data, "non-finite": found, "operation": operation}

    def at(rate: str, data: str) -> dict:
        return {"learning rate": rate, "data": data, "clip": "none" if data == "loops" else "10"}

    causes = [
        {"experiment": "grid", **at("1e-04", "loops"), "non-finite": "0 of 45", "largest norm": "9.5 (a)"},
        {"experiment": "grid", **at("3e-04", "songs"), "non-finite": "1 of 45", "largest norm": "1.2e+03 (b)"},
        {"experiment": "longer", **at("2e-04", "loops"), "non-finite": "1 of 5", "largest norm": "2.2e+03 (c)"},
    ]
    deaths = [
        death("windows", "loops", "7 of 25", "div gave NaN"),
        death("windows", "loops", "8 of 25", "div gave NaN"),
        death("operation taken away", "loops", "0 of 15"),
        death("pairs taken away", "loops without silence", "2 of 15"),
        death("windows", "songs", "3 of 15"),
        death("pair put in", "songs and silence", "4 of 15"),
        death("pair put in, operation taken away", "songs and silence", "5 of 15"),
    ]
    names = [variant.name for variant in WEAK_RESIDUALS]
    runs = [trained(name, 0.5 if name == names[1] else 0.8, seed) for name in names for seed in range(3)]
    runs += [trained(REFERENCE, 0.7, seed) for seed in range(3)]
    rows = [{"data": "loops", "results": runs}, {"data": "songs", "results": runs[:2]}]
    facts = {"steps": 2000, "window": 0.5, "tables": {"causes": causes, "deaths": deaths}}
    write_record(tmp_path / "explosion.json", rows, facts)
    said = explosion_block(tmp_path)
    said_first = "without epsilons (clip none and 10, learning rate 1e-04 and 3e-04, loops and songs, 2,000 steps): "
    assert f"{said_first}1 of 90 cases (setting and seed) met a non-finite value; the largest" in said
    assert "largest gradient norm is 1,200 (b). With 0.5 s of each clip decoded" in said
    assert "a few are digital silence: 15 of 50, each as `div gave NaN`. " in said
    assert ": without the silent pairs 2 of 15, with epsilons 0 of 15; on songs 3 of 15, with" in said
    assert "a silent pair put in 4 of 15, and with epsilons too 5 of 15. " in said
    assert said.endswith(f"without larger gradients: {names[1]} (loops).")
    (tmp_path / "explosion.json").unlink()
    assert explosion_block(tmp_path) == "This record is older than the long trainings."


def test_small_numbers():
    assert span([0.5, 0.501]) == "0.50"
    assert span([0.2, -0.1]) == "−0.10 to 0.20"
    assert span([-0.001, 0.002]) == "0.00"
    assert mean_of("-0.10 ± 0.05") == mean_of("−0.10 ± 0.05") == -0.1
    assert mean_of("+0.123") == 0.123
    assert alike([{"a": "x", "b": "y"}, {"a": "x", "b": "z"}]) == f"x a; {DIFFERENT} b"


def test_speed_is_quoted_over_all_sizes():
    def row(what: str, ratio: float, memory: float) -> dict:
        return {"what": what, "ratio": ratio, "highest_ratio": 3.0, "here_mib_per_clip": memory} | {
            "baseline_mib_per_clip": 4.0
        }

    said = speed([row("training step", 1.234, 1.0), row("training step", 2.5, 2.0), row("inference", 1.5, 3.0)])
    faster = "times as fast as stock PyTorch (upper bound: 3.00)"
    step = f"Training step: 1.23 to 2.50 {faster}, with 0.25 to 0.50 of its memory."
    inference = f"Inference: 1.50 {faster}, with 0.75 of its memory."
    assert said == f"{step} {inference} Each size: [bench.md](outputs/record/bench.md)."


def test_distances_are_shown_by_method_and_cutoff_with_what_is_gained():
    def scored(gain: float) -> list[Score]:
        pair = (0.0, 0.0)
        gains = {"ridge": (gain, 0.01), "sinc": (1.0, 0.01)}
        places = enumerate(METHODS)
        return [Score(m, c, 30, 20, (i + c / 1e6, 0.126), pair, gains) for i, m in places for c in CUTOFFS]

    others = {"songs, seed 1": scored(-1.0), "albums, seed 0": scored(1.0)}
    facts = {"others": {name: [dataclasses.asdict(s) for s in scores] for name, scores in others.items()}}
    facts |= {"songs": {"songs": [50, 25]}, "albums": ["an album", "another"]}
    *rows, empty, said = distances_block(scored(1.0), facts).splitlines()
    lines = [line.strip("| ").split(" | ") for line in rows]
    assert lines[0] == ["method", "2 kHz", "4 kHz", "8 kHz", "12 kHz", "16 kHz"]
    assert [line[0].split(":")[0] for line in lines[2:]] == list(DISTANCES)
    assert lines[2][1:3] == ["1.00 ± 0.13", "1.00 ± 0.13"]
    assert not empty
    assert said.startswith(
        "Trained on 50 songs, judged on clips of 20 of 25 that are held out, the model beats ridge at"
    )
    everywhere = "at 2, 4, 8, 12, 16 kHz"
    assert f"songs, seed 0: {everywhere}; songs, seed 1: nowhere; albums, seed 0: {everywhere}. " in said
    assert said.endswith("Albums held out: an album, another.")


TEXT = "\n".join(f"{MARKS[0].format(name)}\nold\n{MARKS[1].format(name)}" for name in BLOCKS)


def test_a_block_takes_the_place_of_the_old_one():
    assert with_blocks(TEXT, dict.fromkeys(BLOCKS, "| \\1 new |")) == TEXT.replace("old", "| \\1 new |")


@pytest.mark.parametrize("text", ["", TEXT + TEXT, TEXT.replace(MARKS[1].format("speed"), "")])
def test_a_readme_without_its_marks_is_refused(text):
    with pytest.raises(UserError, match=r"README\.md: the marks .* once; restore"):
        with_blocks(text, dict.fromkeys(BLOCKS, ""))


# --- what is committed ------------------------------------------------------------------------------------------------


def without_quotes(text: str) -> str:
    """The README without what `make record` writes there, without code and without addresses."""
    for name in BLOCKS:
        first, last = (re.escape(mark.format(name)) for mark in MARKS)
        text = re.sub(first + ".*" + last, "", text, flags=re.DOTALL)
    text = re.sub(r"^    .*$", "", text, flags=re.MULTILINE)
    return re.sub(r"`[^`]*`|\]\([^)]*\)", "", text)


def numbers(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w.])\d+(?:[.,]\d+)*(?![\w])", text))


def test_every_number_in_the_readme_is_in_the_record_or_was_never_measured():
    assert with_blocks(README, readme_blocks(RECORD)) == README
    assert numbers(without_quotes(README)) == set(NOT_MEASURED)


def test_a_number_by_hand_is_found():
    blocks = dict.fromkeys(BLOCKS, "0.5")
    assert numbers(without_quotes(with_blocks(README, blocks) + " It is 4.27 times as fast.")) - set(NOT_MEASURED) == {
        "4.27"
    }
    assert numbers("`0.5` 1,000 x2 3.5 kHz 7%") >= {"1,000", "3.5", "7"}


def test_only_one_file_of_the_record_names_commits():
    commits = {facts["commit"] for facts in json.loads((RECORD / "record.json").read_text()).values()}
    assert all(re.fullmatch(r"[0-9a-f]{7,40}", commit) for commit in commits)
    for path in RECORD.rglob("*"):
        assert path.is_file(), f"{path}: a record has no folders"
        if path.suffix in (".json", ".md") and path.name != "record.json":
            assert not re.search(r"commit\W{1,4}[0-9a-f]{7,}|" + "|".join(commits), path.read_text()), path


def test_parts_of_one_origin_are_named_together(tmp_path):
    shutil.copytree(RECORD, tmp_path / "record")
    facts = {"commit": "abcdef0", "preset": "demo", "codec": "mdct", "music": "songs", "machine": {"cores": 2}}
    made = dict.fromkeys(("bench", "ablations", "notebooks"), facts) | {"fusion": facts | {"commit": "1234567"}}
    (tmp_path / "record" / "record.json").write_text(json.dumps(made))
    said = "commit abcdef0 (preset demo, codec mdct, songs): bench, ablations, notebooks; "
    said += "commit 1234567 (preset demo, codec mdct, songs): fusion."
    assert f"*Measured in {said}" in readme_blocks(tmp_path / "record")["results"]


def test_the_record_in_markdown_is_the_record_in_data():
    claims = json.loads((RECORD / "claims.json").read_text())
    assert markdown_table(claims) in (RECORD / "claims.md").read_text()
    for link in re.findall(r"\((outputs/record/[^)]*)\)", README):
        assert (ROOT / link).exists()


def test_the_committed_distances_are_of_every_method_at_every_cutoff():
    scores, facts = read_record(RECORD / "superres.json", Score)
    methods = list(dict.fromkeys(s.method for s in scores))
    assert {"sinc", "envelope", "model", "vocoder"} <= set(methods) <= set(METHODS)
    assert [(s.cutoff, s.method) for s in scores] == [(cutoff, method) for cutoff in CUTOFFS for method in methods]
    assert all(len({s.clips for s in scores if s.cutoff == cutoff}) == 1 for cutoff in CUTOFFS)
    assert all(20 <= s.songs <= facts["songs"]["songs"][1] == 60 for s in scores if s.cutoff < 16_000)
    assert facts["preset"] == json.loads((RECORD / "record.json").read_text())["superres"]["preset"]


def test_the_committed_variations_are_whole():
    rows = {row["run"]: row for row in json.loads((RECORD / "variations.json").read_text())}
    seeded = {f"songs-{songs}-seed-{seed}" for songs in range(3) for seed in range(2)}
    assert set(rows) == {"as it is", "no-vectors"} | seeded
    assert len({rows[name]["pairs"] for name in seeded}) == 3  # other songs, other pairs
    same = ("as it is", "songs-0-seed-0", "songs-0-seed-1", "no-vectors")
    assert len({rows[name]["pairs"] for name in same}) == 1
    for row in rows.values():
        assert {"trained model", "average of latents"} <= set(row["merit"])
        assert set(row["against"]) <= set(row["merit"])


def test_the_time_is_not_quoted_where_a_stop_has_hidden_some_of_it(tmp_path):
    shutil.copytree(RECORD, tmp_path / "record")
    path = tmp_path / "record" / "summary.json"
    summary = json.loads(path.read_text())
    summary["facts"]["time"] = "01_encoding 40 s, 04_training 80 s"
    path.write_text(json.dumps(summary))
    assert "All notebooks took 2 minutes" in readme_blocks(tmp_path / "record")["results"]
    summary["facts"]["time"] += " after a stop"
    path.write_text(json.dumps(summary))
    assert "minutes" not in readme_blocks(tmp_path / "record")["results"]


def test_another_record_says_something_else(tmp_path):
    """The blocks follow the files: a number that moves there moves here."""
    shutil.copytree(RECORD, tmp_path / "record")
    rows = json.loads((RECORD / "variations.json").read_text())
    for row in rows:
        row["merit"]["trained model"] = 0.125
    (tmp_path / "record" / "variations.json").write_text(json.dumps(rows))
    assert "trained model 0.12," in readme_blocks(tmp_path / "record")["results"]


def study_row(setting: str, merit: float, seconds: int) -> dict:
    trained = dict.fromkeys(("onsets", "onsets left", "notes left", "plain merit"), "0.10")
    trained |= {"output": "trained model", "merit": f"{merit:.2f}", "notes": f"{merit / 2:.2f}"}
    curve = [{"seconds": 0, "merit": 0.0}, {"seconds": seconds, "merit": merit}]
    measured = {"trained model": trained, "untrained model": trained | {"merit": "0.05"}}
    return {"setting": setting, "measured": measured, "curve": curve}


def test_a_study_has_a_row_for_each_setting_with_its_range_over_seeds():
    studied = [study_row("masks", 0.5, 60), study_row("masks", 0.6, 80), study_row("cascade", 0.2, 300)]
    studied[2]["measured"][ALONE] = {"merit": "0.45"}
    masks, cascade = study_rows(studied)
    assert cascade["merit, its masks without the stages"] == "0.45"
    assert masks == {
        "setting": "masks", "runs": 2, "seconds": "70", "untrained": "0.05", "merit": "0.50 to 0.60",
        "merit, its masks without the stages": "–",
        "onsets": "0.10", "notes": "0.28", "onsets left": "0.10", "notes left": "0.10", "plain merit": "0.10",
    }  # fmt: skip
    assert (cascade["setting"], cascade["runs"], cascade["seconds"], cascade["merit"]) == ("cascade", 1, "300", "0.20")
    assert trained_mean(studied[:2], "trained model", "merit") == pytest.approx(0.55)
