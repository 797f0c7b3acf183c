"""What the README quotes: every wording, and that what is committed says nothing that the record does not hold."""

import json
import re
import shutil

import pytest

from lib.lab.claims import markdown_table
from lib.lab.results import read_record
from lib.project import RECORD, ROOT
from lib.report.quotes import (
    BLOCKS,
    DIFFERENT,
    MARKS,
    alike,
    distances_table,
    mean_of,
    moved,
    readme_blocks,
    results,
    span,
    speed,
    with_blocks,
)
from lib.superres.evaluation import CUTOFFS, GAIN, METHODS, Score
from lib.util.errors import UserError

README = (ROOT / "README.md").read_text()
# numbers of the README that nothing has measured, outside code and quoted blocks
NOT_MEASURED = {
    "3.11": "the oldest Python",
    "5": "GB of packages",
    "24": "kHz of codecs and fusions",
    "12": "kHz, the highest in them",
    "48": "kHz of super-resolution",
    "0.1.1": "the encodec package",
    "4.0": "its licence",
    **dict.fromkeys(("02", "03", "04", "05"), "a notebook"),
}


ENVELOPE = {"2 kHz": "no difference to", "4 kHz": "better than"}


def row(run: str, merit: float, words: str = "better than", *, gain: str = "-0.10 ± 0.05", **more) -> dict:
    return {
        "run": run,
        "pairs": "p",
        "merit": {"trained model": merit, "average": 0.5, "masks": 0.6},
        "against": {"average": "better than", "masks": words},
        "gain": {"2 kHz": gain, "4 kHz": "0.20 ± 0.01"},
        "against_envelope": {
            "2 kHz": "no difference to",
            "4 kHz": "better than",
        },
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
    assert "the model is worse: −0.10 at 2 kHz, 0.20 at 4 kHz." in text
    assert "Verdicts: no difference to the mean envelope at 2 kHz; better than the mean envelope at 4 kHz." in text
    assert "Other CPUs" not in text


def test_a_record_without_variations_quotes_the_one_run():
    text = "\n".join(results([row("as it is", 0.1)]))
    assert text.startswith("One run (")
    assert "trained model 0.10" in text


def test_what_moves_on_other_processors_is_said():
    here = row("as it is", 0.70, claims={"C1: a": "reproduced", "C2: b": "refuted"})
    thread = row("songs-0-seed-0", 0.72, claims={"C1: a": "reproduced", "C2: b": "refuted"}, gain="-0.12 ± 0.05")
    bare = row("no-vectors", 0.69, claims={"C1: a": "reproduced", "C2: b": "refuted"})
    same = "the demo has the same pairs and split, and 6 of its 6 verdicts are the same. "
    moves = "Figures of merit move by up to 0.02, LSD reductions by up to 0.02."
    assert moved(here, [thread, bare]).endswith(same + moves)
    bare["claims"]["C2: b"], bare["pairs"] = "reproduced", "q"
    other = "the demo has OTHER pairs and split, and 5 of its 6 verdicts are the same, all but: C2: b. "
    assert moved(here, [thread, bare]).endswith(other + moves)
    assert "Other CPUs" in "\n".join(results([here, thread | {"data_seed": 0, "seed": 0}, bare]))


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
    assert lines[-1][0].startswith("griffin-lim: ")
    assert lines[-1][-1] == "7.02 ± 0.13"


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


def test_all_of_the_record_names_one_commit_once():
    commit = json.loads((RECORD / "record.json").read_text())["commit"]
    assert re.fullmatch(r"[0-9a-f]{7,40}", commit)
    for path in RECORD.rglob("*"):
        assert path.is_file(), f"{path}: a record has no folders"
        if path.suffix in (".json", ".md") and path.name != "record.json":
            assert not re.search(r"commit\W{1,4}[0-9a-f]{7,}|" + commit, path.read_text()), path


def test_the_record_in_markdown_is_the_record_in_data():
    claims = json.loads((RECORD / "claims.json").read_text())
    assert markdown_table(claims) in (RECORD / "claims.md").read_text()
    for link in re.findall(r"\((outputs/record/[^)]*)\)", README):
        assert (ROOT / link).exists()


def test_the_committed_distances_are_of_every_method_at_every_cutoff():
    scores, facts = read_record(RECORD / "superres.json", Score)
    assert [(s.cutoff, s.method) for s in scores] == [
        (cutoff, method) for cutoff in CUTOFFS for method in list(METHODS)[:-1]
    ]
    assert len({s.clips for s in scores}) == 1
    assert facts["preset"] == json.loads((RECORD / "record.json").read_text())["preset"]


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
        assert len(row["gain"]) == len(row["against_envelope"]) == len(CUTOFFS)


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
    assert GAIN.startswith("LSD")
