"""Verdicts that can come out every way, gathered from notebooks."""

import dataclasses

import pytest
from parts import markdown_table, with_untested

from lib.lab.claims import (
    CLAIMS,
    NOT_TESTED,
    REFUTED,
    REPRODUCED,
    collect,
    decide,
    judge,
)
from lib.report.report import Section, sections


def row(claim: str, holds: bool | None = True, **more) -> dict:
    return dataclasses.asdict(judge(claim, "it holds", holds, why="too short" if holds is None else "", **more))


def test_every_claim_has_its_documents_and_text():
    assert list(CLAIMS) == [f"C{i}" for i in range(1, 19)]
    assert all(claim.documents and claim.text for claim in CLAIMS.values())


def test_limits_hold_for_every_seed():
    verdicts = {values: decide("C7.reference", values).verdict for values in ((2, 5), (2, 5.1), (1.9, 5), ())}
    assert list(verdicts.values()) == [REPRODUCED, REFUTED, REFUTED, REFUTED]
    assert decide("C8.all", [1.0]).verdict == REFUTED
    assert decide("C8.all", [float("inf")]).verdict == REPRODUCED
    assert decide("C15.nearer", [0.3]).verdict == REFUTED
    assert decide("C15.nearer", [0.3], short="few").verdict == NOT_TESTED


def test_a_part_has_the_claims_words_and_its_unit_the_facts():
    found = decide("C7.weak_rises", [2.0], facts={"steps": 9})
    assert (found.claim, found.said[:5], found.measured[-7:]) == ("C7", "0.1×:", "9 steps")


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


def test_every_claim_is_in_the_list_once_nobody_tested_it():
    rows = with_untested([row("C7"), row("C7", False), row("C2")])
    assert [r["claim"] for r in rows] == sorted([*CLAIMS, "C7"], key=lambda claim: int(claim[1:]))
    assert {r["claim"] for r in rows if r["why"]} == set(CLAIMS) - {"C7", "C2"}
    assert all(r["verdict"] == NOT_TESTED for r in rows if r["why"])


def test_the_table_has_one_row_a_verdict_and_survives_its_own_separator():
    table = markdown_table([row("C7", values=[1.0, 2.0]), row("C10", None, found="|corr|")])
    lines = table.splitlines()
    assert len(lines) == 4
    assert "| 1.50 (1.00 to 2.00) | **reproduced** |" in lines[2]
    assert "\\|corr\\|" in lines[3]
    assert "**not tested here**: too short" in lines[3]
