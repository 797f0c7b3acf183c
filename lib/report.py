"""What the notebooks show, kept for the page `index.html`.

Each notebook opens a `Section` and shows its figures, tables and players through it: they appear in the notebook and
are stored in the project's folder under `report/`. `write_report` joins the sections into one self-contained page.
"""

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
import matplotlib.pyplot as plt
from IPython import display
from matplotlib.figure import Figure
from PIL import Image

from lib.claims import Verdict
from lib.errors import UserError
from lib.files import write_atomic
from lib.player import Players

TEMPLATE = Path(__file__).with_name("report.html.j2")


class Table:
    """Rows as a table: HTML in a notebook, aligned columns as text."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]):
        self.columns = list(dict.fromkeys(column for row in rows for column in row))
        self.rows = [[str(row.get(column, "")) for column in self.columns] for row in rows]

    def __repr__(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.columns, *self.rows, strict=True)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in self._all()]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        head, *body = (
            "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
            for tag, row in zip(["th"] + ["td"] * len(self.rows), self._all(), strict=True)
        )
        rows = "".join(f"<tr>{row}</tr>" for row in body)
        return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'

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

    def figure(self, figure: Figure, name: str, caption: str) -> display.Image:
        """Store as figures/<name>.png, and show that file. 256 colours: a third of the bytes, to the eye the same."""
        path = self.out_dir / "figures" / f"{name}.png"
        drawn = io.BytesIO()
        figure.savefig(drawn)
        plt.close(figure)  # the inline backend would show it a second time
        Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE).save(path, optimize=True)
        self._add({"kind": "figure", "file": f"figures/{name}.png", "caption": caption})
        return display.Image(filename=path)

    def table(self, rows: Sequence[Mapping[str, Any]], caption: str) -> Table:
        table = Table(rows)
        self._add({"kind": "html", "html": table._repr_html_(), "caption": caption, "rows": list(rows)})
        return table

    def claims(self, verdicts: Sequence[Verdict]) -> Table:
        """Verdicts as a table; `lib.claims.collect` finds them again."""
        rows = [
            {
                "claim": v.claim,
                "said": v.said,
                "measured": v.measured + (f" ({v.spread})" if v.spread else ""),
                "verdict": v.verdict + (f": {v.why}" if v.why else ""),
            }
            for v in verdicts
        ]
        table = Table(rows)
        caption = "Claims audited here"
        stored = [asdict(verdict) for verdict in verdicts]
        self._add({"kind": "html", "html": table._repr_html_(), "caption": caption, "claims": stored})
        return table

    def players(self, players: Players, caption: str) -> Players:
        self._add({"kind": "html", "html": players._repr_html_(), "caption": caption})
        return players

    def _add(self, item: dict[str, Any]) -> None:
        self.content["items"].append(item)
        self._store()

    def _store(self) -> None:
        write_atomic(self.out_dir / "report" / f"{self.name}.json", json.dumps(self.content))


def write_report(out_dir: Path, title: str, facts: Mapping[str, str]) -> Path:
    """Join the sections in `out_dir` into `index.html`, with pictures and players inside it; returns its path.

    `summary.json` beside it holds the facts and every table as data.
    """
    paths = sorted((out_dir / "report").glob("*.json"))
    if not paths:
        raise UserError(f"{out_dir}: no sections to report on; run the notebooks first")
    sections = [json.loads(path.read_text()) for path in paths]
    tables = {item["caption"]: item["rows"] for section in sections for item in section["items"] if "rows" in item}
    write_atomic(out_dir / "summary.json", json.dumps({"facts": dict(facts), "tables": tables}, indent=1))
    for section in sections:
        for item in section["items"]:
            if item["kind"] == "figure":
                item["data"] = base64.b64encode((out_dir / item["file"]).read_bytes()).decode()
        notebook = out_dir / f"{section['name']}.ipynb"
        section["notebook"] = notebook.name if notebook.exists() else None
    template = jinja2.Template(TEMPLATE.read_text(), autoescape=True, undefined=jinja2.StrictUndefined)
    page = out_dir / "index.html"
    write_atomic(page, template.render(title=title, facts=facts, sections=sections))
    return page
