"""Verdicts that can come out every way, gathered from notebooks and kept per preset."""

import dataclasses
import json

import pytest

from lib.claims import CLAIMS, NOT_TESTED, REFUTED, REPRODUCED, collect, judge, markdown_table, merge
from lib.errors import UserError
from lib.report import Section, sections

FACTS = {"preset": "demo", "codec": "mdct", "commit": "abc1234"}


def row(claim: str, holds: bool | None = True, **more) -> dict:
    return dataclasses.asdict(judge(claim, "it holds", holds, why="too short" if holds is None else "", **more))


def test_every_claim_has_its_seed_and_text():
    assert list(CLAIMS) == [f"C{i}" for i in range(1, 19)]
    assert all(seed and text for seed, text in CLAIMS.values())


@pytest.mark.parametrize(("holds", "verdict"), [(True, REPRODUCED), (False, REFUTED), (None, NOT_TESTED)])
def test_the_verdict_follows_from_what_holds(holds, verdict):
    assert judge("C7", "it rises", holds, [1.0, 3.0, 2.0], why="too short").verdict == verdict


def test_values_become_median_and_range():
    found = judge("C7", "it rises", True, [1.0, 3.0, 2.0], found="times")
    assert (found.measured, found.spread) == ("2.00 times", "1.00 to 3.00")
    single = judge("C7", "it rises", True, [2.5])
    assert (single.measured, single.spread) == ("2.50", "")
    words = judge("C3", "parameters", False, found="4.77 M")
    assert (words.measured, words.spread) == ("4.77 M", "")


def test_what_was_not_tested_needs_a_reason_and_claims_are_known():
    with pytest.raises(ValueError, match="C10: a claim that was not tested needs a reason"):
        judge("C10", "200 epochs", None)
    with pytest.raises(ValueError, match="unknown claim 'C99'"):
        judge("C99", "what", True)


def test_collect_finds_what_sections_stored_in_order_of_the_claims(tmp_path):
    late, early = judge("C10", "later", True), judge("C2", "earlier", False, [1.0, 2.0])
    Section(tmp_path, "03_x", "Three").claims([late])
    section = Section(tmp_path, "02_x", "Two")
    section.text("words")
    shown = section.claims([early])
    assert "refuted" in repr(shown)
    assert collect(sections(tmp_path)) == [dataclasses.asdict(early), dataclasses.asdict(late)]


def test_merge_puts_a_preset_in_place_of_its_earlier_rows_and_keeps_the_others(tmp_path):
    path = tmp_path / "claims.json"
    first = merge(path, [row("C7"), row("C2", False)], FACTS)
    path.write_text(json.dumps(first))
    full = merge(path, [row("C7", False)], FACTS | {"preset": "full"})
    path.write_text(json.dumps(full))
    again = merge(path, [row("C7", None)], FACTS)
    by_preset = [(r["preset"], r["verdict"]) for r in again if r["claim"] == "C7"]
    assert by_preset == [("full", REFUTED), ("demo", NOT_TESTED)]
    assert [r["verdict"] for r in again if r["claim"] == "C2"] == [NOT_TESTED]  # this time no notebook judged it


def test_every_claim_is_in_the_list_once_nobody_tested_it(tmp_path):
    rows = merge(tmp_path / "claims.json", [row("C7")], FACTS)
    assert [r["claim"] for r in rows] == list(CLAIMS)
    assert all(r["why"] and r["preset"] == "" for r in rows if r["claim"] != "C7")


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "claims.json"
    for content in ("{", "[1]", "3", '[{"claim": "C1"}]'):
        path.write_text(content)
        with pytest.raises(UserError, match=r"claims\.json: damaged .*restore"):
            merge(path, [], FACTS)


def test_the_table_has_one_row_a_verdict_and_survives_its_own_separator():
    table = markdown_table([row("C7", values=[1.0, 2.0]) | FACTS, row("C10", None, found="|corr|") | FACTS])
    lines = table.splitlines()
    assert len(lines) == 4
    assert "| 1.50 (1.00 to 2.00) | **reproduced** | demo, mdct, abc1234 |" in lines[2]
    assert "\\|corr\\|" in lines[3]
    assert "**not tested here**: too short" in lines[3]
