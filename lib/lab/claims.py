"""The claims of the source documents, and verdicts on them, made by `decide` and `judge` and gathered by `collect`."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib.util.configs import Number, checked_dataclass, choice, read_entries
from lib.util.stats import describe

Values = Sequence[float] | None  # one per seed
Holds = bool | None  # None: not known
LIMITS = {"above": operator.gt, "below": operator.lt, "least": operator.ge, "most": operator.le}


@checked_dataclass
class Part:
    """A part of a claim that has its own verdict: by its limits, if it has some, for the value of every seed."""

    said: str  # as the document says it
    unit: str = ""  # after the median, a format string
    limits: dict[choice(LIMITS), Number] = field(default_factory=dict)


@checked_dataclass
class Claim:
    """A claim of the source documents in claims.toml."""

    name: str
    documents: str  # that state it
    text: str
    parts: dict[str, Part] = field(default_factory=dict)


CLAIMS: dict[str, Claim] = read_entries(Path(__file__).with_suffix(".toml"), Claim)
VERDICTS = REPRODUCED, REFUTED, NOT_TESTED = "reproduced", "refuted", "not tested here"


@dataclass(frozen=True)
class Verdict:
    """One part of a claim against what was measured."""

    claim: str  # its id
    said: str  # the part that is tested, as the document says it
    measured: str  # median, or what was found in words
    spread: str  # range over seeds; empty where nothing varies
    verdict: str
    why: str = ""  # of 'not tested here', or what the verdict rests on


def judge(claim: str, said: str, holds: Holds, values: Values = None, *, found="", why="", short="") -> Verdict:
    """A verdict: `holds` decides it; None is 'not tested here', and `why` says what a test would take. `found`: what
    was measured in words, or the unit after the median of `values`. `short`: why the runs cannot decide, such as too
    few steps: 'not tested here'."""
    if claim not in CLAIMS:
        raise ValueError(f"unknown claim {claim!r}")
    if short:
        holds, why = None, short
    if holds is None and not why:
        raise ValueError(f"{claim}: a claim that was not tested needs a reason")
    verdict = NOT_TESTED if holds is None else REPRODUCED if holds else REFUTED
    median, _, spread = describe(values).partition(" (") if values else ("", "", "")
    measured = " ".join(part for part in (median, found) if part)
    return Verdict(claim, said, measured, spread.rstrip(")"), verdict, why)


def decide(
    part: str, values: Values = None, holds: Holds = None, *, found="", facts: Mapping[str, Any] = {}, **reasons: Any
) -> Verdict:
    """The verdict on a part of a claim, such as 'C7.weak_rises': by its limits for `values`, or by whether it `holds`.
    `facts`: what its unit has in braces; `found` replaces the unit. `reasons`: why and short of `judge`."""
    claim, _, name = part.partition(".")
    own = CLAIMS[claim].parts[name]
    if own.limits:
        holds = bool(values) and all(LIMITS[rule](v, limit) for v in values for rule, limit in own.limits.items())
    return judge(claim, own.said, holds, values, found=found or own.unit.format(**facts), **reasons)


def collect(sections: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The verdicts that notebooks stored in their sections, by number of the claim."""
    found = [row for section in sections for item in section["items"] for row in item.get("claims", [])]
    return sorted(found, key=lambda row: int(row["claim"][1:]))


def claim_rows(verdicts: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Stored verdicts as rows of a table."""
    rows = []
    for v in verdicts:
        measured = v["measured"] + (f" ({v['spread']})" if v["spread"] else "")
        verdict = v["verdict"] + (f": {v['why']}" if v["why"] else "")
        rows.append({"claim": v["claim"], "said": v["said"], "measured": measured, "verdict": verdict})
    return rows
