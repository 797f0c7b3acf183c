"""Self-contained pages, which request nothing from anywhere: executed notebooks, and `index.html`. Notebooks store what
they show through a `Section`, and `write_report` joins the sections."""

import functools
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import nbformat
from IPython import display
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from latex2mathml.converter import convert
from markupsafe import Markup
from matplotlib.figure import Figure
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from PIL import Image
from pygments.formatters import HtmlFormatter

from lib.audio.plots import darken
from lib.lab.claims import VERDICTS, Verdict, claim_rows, collect
from lib.listening.player import SCRIPT, STYLE, Players, data_uri
from lib.listening.widgets import figure_png
from lib.util.errors import UserError
from lib.util.files import read_json, write_atomic

LIMIT = 20_000_000  # bytes of a page, so that a phone can open it
# sections as the page has them, others after them
ORDER = ("05_listening", "04_training", "03_rms_collapse", "02_stage_ablation", "06_super_resolution", "01_encoding")
FIRST, FOLD = ORDER[0], 10  # rows: a longer table is folded
Facts = Mapping[str, str]
FOLDER = Path(__file__).with_name("templates")
TEMPLATES = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True)


class Table:
    """Rows as a table: HTML in a notebook, aligned columns as text. `folded`, as all longer than `FOLD` rows are: a
    click on the caption opens it."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], caption: str = "", folded: bool = False):
        self.caption, self.folded = caption, folded or len(rows) > FOLD
        self.columns = list(dict.fromkeys(column for row in rows for column in row))
        self.rows = [[str(row.get(column, "")) for column in self.columns] for row in rows]

    def __repr__(self) -> str:
        lines = [self.columns, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.ljust, cells, widths)).rstrip() for cells in lines)

    def _repr_html_(self) -> str:
        return str(render("table.html.j2", table=self))


class Section:
    """One notebook's part of the report. Opening it again discards what an earlier run of the notebook stored."""

    def __init__(self, out_dir: Path, name: str, title: str):
        self.out_dir, self.name = out_dir, name
        self.content: dict[str, Any] = {"name": name, "title": title, "items": []}
        for folder in ("report", "figures"):
            (out_dir / folder).mkdir(parents=True, exist_ok=True)
        self._store()

    def text(self, text: str) -> None:
        """A paragraph for the page only; the notebook has its own prose."""
        self._store({"kind": "text", "text": text})

    def key_figure(self, what: str, value: str) -> None:
        """A row of the page's summary."""
        self._store({"kind": "key figure", "what": what, "value": value})

    def figure(self, figure: Figure, name: str, caption: str) -> display.Image:
        """Store as figures/<name>.png, of 256 colours, which take a third of the bytes, and for dark pages as
        <name>_dark.png; show the first."""
        files = {"file": f"figures/{name}.png", "dark": f"figures/{name}_dark.png"}
        for file in files.values():
            drawn = Image.open(io.BytesIO(figure_png(figure))).convert("RGB")
            drawn.quantize(256, Image.Quantize.MAXCOVERAGE).save(self.out_dir / file, optimize=True)
            darken(figure)
        self._store({"kind": "figure", "caption": caption} | files)
        return display.Image(filename=self.out_dir / files["file"])

    def table(self, rows: Sequence[Mapping[str, Any]], caption: str, folded: bool = False) -> Table:
        table = Table(rows, caption, folded)
        self._store({"kind": "table", "html": table._repr_html_(), "caption": caption, "rows": list(rows)})
        return table

    def claims(self, verdicts: Sequence[Verdict]) -> Table:
        """Verdicts as a table; the page shows those of all notebooks in one."""
        stored = [asdict(verdict) for verdict in verdicts]
        self._store({"kind": "claims", "claims": stored})
        return Table(claim_rows(stored), "Claims audited here")

    def players(self, players: Players, caption: str) -> Players:
        self._store({"kind": "players", "html": players._repr_html_(), "caption": caption})
        return players

    def _store(self, *items: dict[str, Any]) -> None:
        self.content["items"] += items
        write_atomic(self.out_dir / "report" / f"{self.name}.json", json.dumps(self.content))


def sections(out_dir: Path) -> list[dict[str, Any]]:
    """What the notebooks have stored in `out_dir`, in their order."""
    return [read_json(path) for path in sorted((out_dir / "report").glob("*.json"))]


def tables_of(sections: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Caption → rows of every table."""
    return {item["caption"]: item["rows"] for section in sections for item in section["items"] if "rows" in item}


def write_report(
    out_dir: Path, title: str, lead: str, facts: Facts, failures: Mapping[str, str] = {}, to_come: Sequence[str] = ()
) -> Path:
    """Join the sections in `out_dir` into `index.html`, and return its path; facts and tables go to `summary.json`.
    `failures`: notebook → why it did not finish. `to_come`: notebooks that have not run yet, which the page lists."""
    stored = {name: {"name": name, "title": title_of(name), "items": []} for name in failures}
    stored |= {section["name"]: section for section in sections(out_dir) if section["name"] not in to_come}
    if not stored:
        raise UserError(f"{out_dir}: no sections to report on; run the notebooks first")
    shown = [stored[name] for name in (*ORDER, *sorted(stored.keys() - set(ORDER))) if name in stored]
    write_atomic(out_dir / "summary.json", json.dumps({"facts": dict(facts), "tables": tables_of(shown)}, indent=1))
    for section in shown:
        section["failure"] = failures.get(section["name"])
        section["executed"] = (out_dir / f"{section['name']}.html").exists()
        for item in section["items"]:
            if item["kind"] == "figure":
                files = item["file"], item.get("dark", item["file"])  # older sections have no dark version
                item["data"], item["dark"] = (data_uri("image/png", (out_dir / file).read_bytes()) for file in files)
    verdicts = collect(shown)
    leave_out_largest_players(shown, LIMIT)
    values = {"title": title, "lead": lead, "facts": facts, "sections": shown, "first": FIRST}
    values["to_come"] = [title_of(name) for name in to_come]
    figures = [(section, item) for section in shown for item in section["items"] if item["kind"] == "key figure"]
    key_figures = [{"what": i["what"], "found": i["value"], "section": section["title"]} for section, i in figures]
    values["summary"] = Table(key_figures, "Key figures of every notebook")
    values["claims"] = Table(claim_rows(verdicts), "Every claim and its verdict")
    values["tally"] = [f"{sum(row['verdict'] == verdict for row in verdicts)} {verdict}" for verdict in VERDICTS]
    return write_page(out_dir / "index.html", title, render("report.html.j2", **values))


def title_of(name: str) -> str:
    """The title of a notebook that has stored no section: 02_stage_ablation → Stage ablation."""
    return name[3:].replace("_", " ").capitalize()


def leave_out_largest_players(sections: Sequence[dict[str, Any]], limit: int) -> None:
    """Replace players, the largest first, by a line that says where they are, until all fits in `limit` bytes."""
    size = sum(len(item.get(part, "")) for s in sections for item in s["items"] for part in ("html", "data", "dark"))
    players = [(len(item["html"]), s, item) for s in sections for item in s["items"] if item["kind"] == "players"]
    for length, section, item in sorted(players, key=lambda found: -found[0]):
        if size <= 0.97 * limit:  # the rest is for styles, scripts and the tables of claims
            return
        where = f"in {section['name']}.html" if section["executed"] else "in the folder audio/"
        text = f"{item['caption']}: left out to keep this page below {limit / 1e6:g} MB; the players are {where}."
        size -= length
        item |= {"kind": "text", "text": text, "html": ""}


def write_page(path: Path, title: str, body: Markup, style: str = "") -> Path:
    """Write a page with this `body`, whose players become panels; returns its path."""
    styles = (FOLDER / "page.css").read_text() + STYLE.read_text() + style
    script = Markup(SCRIPT.read_text())
    write_atomic(path, str(render("page.html.j2", title=title, body=body, style=Markup(styles), script=script)))
    return path


def render(template: str, **values: Any) -> Markup:
    """A template of this folder, with all values escaped that are not markup already."""
    return Markup(TEMPLATES.get_template(template).render(**values))


class MathRenderer(IPythonRenderer):
    """nbconvert's Markdown with formulas as MathML, which needs no script."""

    inline_math = staticmethod(convert)
    block_math = staticmethod(functools.partial(convert, display="block"))


def write_notebook_page(notebook: Path) -> Path:
    """Write an executed notebook as a page beside it, with formulas as MathML; returns its path."""
    markdown = MarkdownWithMath(MathRenderer(escape=False))
    exporter = HTMLExporter(template_name="basic", filters={"markdown2html": markdown.render})
    body, _ = exporter.from_notebook_node(nbformat.read(notebook, as_version=4))
    colours, dark = (HtmlFormatter(style=style).get_style_defs(".highlight") for style in ("default", "monokai"))
    style = f"{colours}\n@media (prefers-color-scheme: dark) {{ {dark} }}\n.highlight {{ background: none; }}"
    return write_page(notebook.with_suffix(".html"), notebook.stem, Markup(f'<main id="main">{body}</main>'), style)
