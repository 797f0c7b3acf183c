"""The claims of the seed documents, and verdicts on them: `judge` makes one, `collect` gathers a finished run's."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lib.util.stats import describe

# id → seed documents that state it, and what they state
CLAIMS = {
    "C1": ("000", "384,000 samples become latents [B, 128, 1200] and come back; RMS 5.66 and 5.69"),
    "C2": ("000", "stages of the two-stage cascade leave RMS 5.73 and 5.68, with factors 1.01 and 1.02"),
    "C3": ("000, 001", "stages of 6.3 M and 14.2 M parameters; 27.4 M become 18.3 M, 33 % fewer"),
    "C4": ("000, 002", "spectral norm keeps σ ≤ 1, and so the Lipschitz constant ≤ 1"),
    "C5": (
        "002",
        "a third stage at 0.1×: projection RMS 0.85, 1.09 before scaling, needs 5.2×, ends at 1.64, 71 % too quiet",
    ),
    "C6": ("002", "a third stage at 0.3×: RMS 2.5 to 3.0 before scaling, needs 2.0 to 2.3×, ends at 4.05"),
    "C7": ("001, 002", "gradient norm: 0.1× 2.45 → 6.66 → 16.71 → NaN; 0.3× 3.93 → 5.36 → 6 to 7; two stages 2 to 5"),
    "C8": ("003", "learnable RMS scalars get gradients 100 to 10,000 times larger; norm 15,438, then NaN"),
    "C9": ("000, 002", "spectral norm, clamp and clipping together keep training stable"),
    "C10": ("001", "the two-stage cascade completes 200 epochs without NaN"),
    "C11": ("001", "no scale factor above 1.3 in either stage"),
    "C12": ("001", "complementarity of the masks reaches 85 % by epoch 50"),
    "C13": ("001", "the two-stage output sounds as good as the three-stage one; continuations are coherent"),
    "C14": ("001", "safe fallbacks: stage 1 at 512 wide; three stages at 0.3×; three or more at 1.0×"),
    "C15": ("003", "health: gradient norm < 100, RMS ratio 0.8 to 1.2, movement, correlation with sources < 0.3"),
    "C16": ("004", "parameters of the super-resolver: 3.23 M, 64.9 M, 100.0 M, 39.3 M, together 207.4 M"),
    "C17": ("004", "18 (or 12) conditioned transformers, 14.3 M; latent [16, 64, 64]; 57.5 GMACs a step"),
    "C18": ("004", "cross-attention lets each position query the global context"),
}
VERDICTS = REPRODUCED, REFUTED, NOT_TESTED = "reproduced", "refuted", "not tested here"


@dataclass(frozen=True)
class Verdict:
    """One part of a claim against what was measured."""

    claim: str  # its id
    said: str  # the part that is tested, as the seed says it
    measured: str  # median, or what was found in words
    spread: str  # range over seeds; empty where nothing varies
    verdict: str
    why: str = ""  # of 'not tested here', or what the verdict rests on


def judge(
    claim: str,
    said: str,
    holds: bool | None,
    values: Sequence[float] | None = None,
    *,
    found: str = "",
    why: str = "",
    short: str = "",
    unless: bool | None = None,
) -> Verdict:
    """A verdict: `holds` decides it; None is 'not tested here', and `why` says what a test would take.

    `values`: one per seed; their median and range become `measured` and `spread`. `found`: what was measured in words,
    or the unit after the median. `short`: why the runs cannot decide, such as too few steps; the verdict is then 'not
    tested here' `unless` the outcome is one that more steps could not change.
    """
    if claim not in CLAIMS:
        raise ValueError(f"unknown claim {claim!r}")
    if short and (unless is None or holds is not unless):
        holds, why = None, short
    if holds is None and not why:
        raise ValueError(f"{claim}: a claim that was not tested needs a reason")
    verdict = NOT_TESTED if holds is None else REPRODUCED if holds else REFUTED
    median, _, spread = describe(values).partition(" (") if values else ("", "", "")
    measured = " ".join(part for part in (median, found) if part)
    return Verdict(claim, said, measured, spread.rstrip(")"), verdict, why)


def collect(sections: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The verdicts that notebooks stored in their sections, by number of the claim."""
    found = [row for section in sections for item in section["items"] for row in item.get("claims", [])]
    return sorted(found, key=lambda row: int(row["claim"][1:]))


def with_untested(verdicts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The verdicts, and every claim that has none, with the reason."""
    tested, why = {row["claim"] for row in verdicts}, "no notebook has tested it"
    missing = [asdict(judge(claim, said, None, why=why)) for claim, (_, said) in CLAIMS.items() if claim not in tested]
    return sorted([*verdicts, *missing], key=lambda row: int(row["claim"][1:]))


def claim_rows(verdicts: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Stored verdicts as rows of a table."""
    rows = []
    for v in verdicts:
        measured = v["measured"] + (f" ({v['spread']})" if v["spread"] else "")
        verdict = v["verdict"] + (f": {v['why']}" if v["why"] else "")
        rows.append({"claim": v["claim"], "said": v["said"], "measured": measured, "verdict": verdict})
    return rows


def markdown_table(verdicts: Sequence[dict[str, Any]]) -> str:
    """claims.json as a Markdown table."""
    head = ("claim", "seed", "said", "measured (range over seeds)", "verdict")
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for claim, said, measured, verdict in map(dict.values, claim_rows(verdicts)):
        word, colon, why = verdict.partition(":")
        cells = (claim, CLAIMS[claim][0], said, measured, f"**{word}**{colon}{why}")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)
