"""What the notebooks show, kept for the page `index.html`.

Each notebook opens a `Section` and shows its figures, tables and players through it: they appear in the notebook and
are stored in the project's folder under `report/`. `write_report` joins the sections that are there into one
self-contained page; it is called after every notebook, so that the page grows.
"""

import base64
import html
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from IPython import display
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from lib.lab.claims import VERDICTS, Verdict, collect
from lib.listening.player import Players
from lib.report.page import render, write_page
from lib.util.errors import UserError
from lib.util.files import read_json, write_atomic

LIMIT = 20_000_000  # bytes of a page, which a phone should open
FIRST = "05_listening"  # the section that stands before everything


class Table:
    """Rows as a table: HTML in a notebook, aligned columns as text."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], caption: str = "", folded: bool = False):
        self.caption, self.folded = caption, folded
        self.columns = list(dict.fromkeys(column for row in rows for column in row))
        self.rows = [[str(row.get(column, "")) for column in self.columns] for row in rows]

    def __repr__(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.columns, *self.rows, strict=True)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in self._all()]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        head = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in self.columns)
        rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in self.rows)
        caption = html.escape(self.caption, quote=True)
        heading = f"<caption>{caption}</caption>" if caption and not self.folded else ""
        table = (  # focusable: a wide table scrolls by keyboard as well
            f'<div class="table" role="region" tabindex="0" aria-label="{caption or "table"}"><table>'
            f"{heading}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
        )
        return f"<details><summary>{caption or 'table'}</summary>{table}</details>" if self.folded else table

    def _all(self) -> list[list[str]]:
        return [self.columns, *self.rows]


class Section:
    """One notebook's part of the report. Opening it anew forgets what an earlier run of the notebook stored."""

    def __init__(self, out_dir: Path, name: str, title: str):
        self.out_dir, self.name = out_dir, name
        self.content: dict[str, Any] = {"name": name, "title": title, "items": []}
        for folder in ("report", "figures"):
            (out_dir / folder).mkdir(parents=True, exist_ok=True)
        self._store()

    def text(self, text: str) -> None:
        """A paragraph for the page alone: the notebook says it in its own words."""
        self._add({"kind": "text", "text": text})

    def key_figure(self, what: str, value: str) -> None:
        """A line of the page's summary."""
        self._add({"kind": "key figure", "what": what, "value": value})

    def figure(self, figure: Figure, name: str, caption: str) -> display.Image:
        """Store as figures/<name>.png, and show that file. 256 colours: a third of the bytes, to the eye the same."""
        path = self.out_dir / "figures" / f"{name}.png"
        drawn = io.BytesIO()
        figure.savefig(drawn)
        plt.close(figure)  # the inline backend would show it a second time
        Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE).save(path, optimize=True)
        self._add({"kind": "figure", "file": f"figures/{name}.png", "caption": caption})
        return display.Image(filename=path)

    def table(self, rows: Sequence[Mapping[str, Any]], caption: str, folded: bool = False) -> Table:
        """`folded`: a reader of notebook or page opens it by a click on its caption."""
        table = Table(rows, caption, folded)
        self._add({"kind": "table", "html": table._repr_html_(), "caption": caption, "rows": list(rows)})
        return table

    def claims(self, verdicts: Sequence[Verdict]) -> Table:
        """Verdicts as a table. The page shows those of all notebooks together; `lib.lab.claims.collect` finds them."""
        stored = [asdict(verdict) for verdict in verdicts]
        self._add({"kind": "claims", "claims": stored})
        return claims_table(stored, "Claims audited here")

    def players(self, players: Players, caption: str) -> Players:
        self._add({"kind": "players", "html": players._repr_html_(), "caption": caption})
        return players

    def _add(self, item: dict[str, Any]) -> None:
        self.content["items"].append(item)
        self._store()

    def _store(self) -> None:
        write_atomic(self.out_dir / "report" / f"{self.name}.json", json.dumps(self.content))


def sections(out_dir: Path, names: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """What the notebooks of these names have stored in `out_dir`, or all of them, in the notebooks' order."""
    paths = sorted((out_dir / "report").glob("*.json"))
    return [read_json(path) for path in paths if names is None or path.stem in names]


def tables_of(sections: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Caption → rows of every table."""
    return {item["caption"]: item["rows"] for section in sections for item in section["items"] if "rows" in item}


def claims_table(verdicts: Sequence[Mapping[str, Any]], caption: str) -> Table:
    """Verdicts, as `lib.lab.claims` stores them, side by side."""
    rows = [
        {
            "claim": v["claim"],
            "said": v["said"],
            "measured": v["measured"] + (f" ({v['spread']})" if v["spread"] else ""),
            "verdict": v["verdict"] + (f": {v['why']}" if v["why"] else ""),
        }
        for v in verdicts
    ]
    return Table(rows, caption)


def write_report(
    out_dir: Path,
    title: str,
    lead: str,
    facts: Mapping[str, str],
    failures: Mapping[str, str] | None = None,
    to_come: Sequence[str] = (),
) -> Path:
    """Join the sections in `out_dir` into `index.html`: listening, what was found, the others in the notebooks' order.

    `failures`: notebook → why it did not finish; each has its section, with a link to what was executed.
    `to_come`: notebooks that have not run yet, of which the page says so. Returns the page's path.

    Pictures and players are inside the page. Of players that would take it past 20 MB, the largest are left out, and a
    line says where they are. Pages of executed notebooks beside it are linked. `summary.json` holds the facts and every
    table as data.
    """
    failures = failures or {}
    stored = {section["name"]: section for section in sections(out_dir) if section["name"] not in to_come}
    for name in failures.keys() - stored.keys():
        stored[name] = {"name": name, "title": title_of(name), "items": []}
    if not stored:
        raise UserError(f"{out_dir}: no sections to report on; run the notebooks first")
    shown = [stored[name] for name in sorted(stored, key=lambda name: (name != FIRST, name))]
    content = {"facts": dict(facts), "tables": tables_of(shown)}
    write_atomic(out_dir / "summary.json", json.dumps(content, indent=1))
    summary = []
    for section in shown:
        section["failure"] = failures.get(section["name"])
        for item in section["items"]:
            if item["kind"] == "figure":
                item["data"] = base64.b64encode((out_dir / item["file"]).read_bytes()).decode()
            if item["kind"] == "key figure":
                summary.append({"what": item["what"], "found": item["value"], "section": section["title"]})
        executed = (out_dir / f"{section['name']}.html").exists()
        section["notebook"] = section["name"] if executed else None
    verdicts = collect(shown)
    found = Counter(verdict["verdict"] for verdict in verdicts)
    if verdicts:
        counts = ", ".join(f"{found[verdict]} {verdict}" for verdict in VERDICTS)
        summary.append({"what": "claims of the seeds", "found": counts, "section": "Claims"})
    leave_out_largest_players(shown, LIMIT)
    heard, others = (shown[:1], shown[1:]) if shown[0]["name"] == FIRST else ([], shown)
    body = render(
        "report.html.j2",
        title=title,
        lead=lead,
        facts=facts,
        before=heard,
        after=others,
        to_come=[title_of(name) for name in to_come],
        summary=Markup(Table(summary, "Key figures of every notebook")._repr_html_()) if summary else "",
        claims=Markup(claims_table(verdicts, "Every claim and its verdict")._repr_html_()) if verdicts else "",
    )
    return write_page(out_dir / "index.html", title, body)


def title_of(name: str) -> str:
    """What a notebook without a section of its own is called: 02_stage_ablation → Stage ablation."""
    return name[3:].replace("_", " ").capitalize()


def leave_out_largest_players(sections: Sequence[dict[str, Any]], limit: int) -> None:
    """Turn players into a line that says where they are, the largest first, until all is within `limit` bytes."""
    size = sum(len(item.get("html", "")) + len(item.get("data", "")) for s in sections for item in s["items"])
    players = [(len(item["html"]), s, item) for s in sections for item in s["items"] if item["kind"] == "players"]
    for length, section, item in sorted(players, key=lambda found: -found[0]):
        if size <= 0.97 * limit:  # the rest is for styles, scripts and the tables of claims
            return
        where = f"in {section['notebook']}.html" if section["notebook"] else "in the folder audio/"
        text = f"{item['caption']}: left out to keep this page below {limit / 1e6:g} MB; the players are {where}."
        size -= length
        item |= {"kind": "text", "text": text, "html": ""}
