"""Self-contained HTML pages: styles, pictures and players are inside, and nothing is requested from anywhere."""

import re
from pathlib import Path
from typing import Any

import latex2mathml.converter
import nbformat
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from nbconvert import HTMLExporter
from pygments.formatters import HtmlFormatter

from lib.listening.player import SCRIPT
from lib.listening.player import STYLE as PLAYER_STYLE
from lib.util.files import write_atomic

FOLDER = Path(__file__).with_name("templates")
# code comes first: a $ in it begins no formula
FORMULA = r"(?s)(?P<code>(?P<ticks>`+).+?(?P=ticks))|\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^$\n]+?)\$"
TEMPLATES = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined)


def write_page(path: Path, title: str, body: Markup, style: str = "") -> Path:
    """Write a page with this `body`, whose players become panels; returns its path."""
    styles = (FOLDER / "page.css").read_text() + PLAYER_STYLE.read_text() + style
    script = Markup(SCRIPT.read_text())
    write_atomic(path, str(render("page.html.j2", title=title, body=body, style=Markup(styles), script=script)))
    return path


def render(template: str, **values: Any) -> Markup:
    """A template of this folder, with all values escaped that are not markup already."""
    return Markup(TEMPLATES.get_template(template).render(**values))


def write_notebook_page(notebook: Path) -> Path:
    """Write an executed notebook as a page beside it, with formulas as MathML; returns its path."""
    content = nbformat.read(notebook, as_version=4)
    formulas: list[str] = []

    def keep(match: re.Match[str]) -> str:
        if match["code"]:
            return match[0]
        display = "block" if match["block"] else "inline"
        formulas.append(latex2mathml.converter.convert(match[display], display=display))
        return f"formula{len(formulas) - 1}elumrof"  # Markdown leaves this word alone

    for cell in content.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(FORMULA, keep, cell.source)
    body, _ = HTMLExporter(template_name="basic").from_notebook_node(content)
    body = re.sub(r"formula(\d+)elumrof", lambda match: formulas[int(match[1])], body)
    colours, dark = (HtmlFormatter(style=style).get_style_defs(".highlight") for style in ("default", "monokai"))
    style = f"{colours}\n@media (prefers-color-scheme: dark) {{ {dark} }}\n.highlight {{ background: none; }}"
    return write_page(notebook.with_suffix(".html"), notebook.stem, Markup(f'<main id="main">{body}</main>'), style)
