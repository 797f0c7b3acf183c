"""Pages that need nothing but themselves: no request to anywhere, formulas without a script, nothing smuggled in."""

import base64
import io
import re
import shutil
from pathlib import Path

import nbformat
import pytest
import torch
from markupsafe import Markup
from nbformat import v4
from PIL import Image

from lib.listening.player import SCRIPT, STYLE, Players
from lib.report.page import write_notebook_page, write_page

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
EVIL = "</title><script>alert(\"x\")</script> & 'y'"


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def script_and_style(source: str) -> tuple[str, str]:
    """The one inline script and the one style of a page."""
    (script,) = re.findall(r"<script[^>]*>(.*?)</script>", source, re.DOTALL)
    (style,) = re.findall(r"<style>(.*?)</style>", source, re.DOTALL)
    return script, style


def assert_self_contained(source: str, page) -> None:
    """Nothing that is loaded is elsewhere, and the page's own policy would refuse it."""
    for tag, attributes in page.tags:
        for name in ("src", "srcset", "data", "poster", "action", "xlink:href"):
            assert attributes.get(name, "data:").startswith("data:"), f"<{tag} {name}={attributes[name]!r}>"
        if tag != "a":
            assert attributes.get("href", "data:").startswith("data:"), f"<{tag} href={attributes['href']!r}>"
    script, style = script_and_style(source)
    assert "</script" not in script.lower()
    for text in (script, style):
        assert not re.search(r"https?:|@import|url\(|import\s*\(|fetch\(", text)
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    first, *others = [directive.strip() for directive in policy.split(";")]
    assert first == "default-src 'none'"
    sources = {word for directive in others for word in directive.split()[1:]}
    assert sources <= {"data:", "'unsafe-inline'"}


@pytest.fixture
def convert(tmp_path, parse):
    """`convert(*cells)`: the page of a notebook of these cells, as source and parsed."""

    def write(*cells, name: str = "a notebook"):
        path = tmp_path / f"{name}.ipynb"
        nbformat.write(v4.new_notebook(cells=list(cells)), path)
        source = text(write_notebook_page(path))
        return source, parse(source)

    return write


# --- any page ---------------------------------------------------------------------------------------------------------


def test_a_page_holds_its_body_styles_and_script(tmp_path, parse):
    body = Markup('<main id="main"><p>é ≥ 3</p></main>')
    path = write_page(tmp_path / "a.html", "A title", body, style=".mine { color: red; }")
    assert path == tmp_path / "a.html"
    source = text(path)
    page = parse(source)
    assert_self_contained(source, page)
    script, style = script_and_style(source)
    assert SCRIPT.read_text() in script
    assert "mount(root)" in script.replace(SCRIPT.read_text(), "")  # and what turns players into panels
    assert STYLE.read_text() in style
    assert ".mine { color: red; }" in style
    assert body in source
    assert page.all("html")[0]["lang"] == "en"
    assert page.all("meta")[0]["charset"] == "utf-8"
    assert [link["href"] for link in page.all("a")] == ["#main"]  # the way past the contents


def test_a_title_cannot_become_markup(tmp_path, parse):
    source = text(write_page(tmp_path / "a.html", EVIL, Markup("")))
    page = parse(source)
    assert len(page.all("script")) == 1
    assert EVIL in page.text


def test_a_page_in_the_way_is_replaced_as_a_whole(tmp_path):
    (tmp_path / "a.html").write_text("superseded " * 40_000)
    assert "superseded" not in text(write_page(tmp_path / "a.html", "t", Markup("new")))
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]


def test_equal_input_makes_equal_pages(tmp_path):
    first, second = (write_page(tmp_path / name, "t", Markup("b")) for name in ("a.html", "b.html"))
    assert first.read_bytes() == second.read_bytes()


# --- a notebook's page ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_stored_notebook_becomes_a_page_that_needs_nothing(tmp_path, parse, notebook):
    shutil.copy(notebook, tmp_path)
    path = write_notebook_page(tmp_path / notebook.name)
    assert path == tmp_path / f"{notebook.stem}.html"
    source = text(path)
    page = parse(source)
    assert_self_contained(source, page)
    content = nbformat.read(notebook, as_version=4)
    prose = "\n".join(cell.source for cell in content.cells if cell.cell_type == "markdown")
    prose = re.sub(r"(`+).+?\1", "", prose, flags=re.DOTALL)
    assert len(page.all("math")) == len(re.findall(r"\$\$.+?\$\$|\$.+?\$", prose, re.DOTALL))
    assert not re.search(r"formula\d|elumrof", source)
    written = source.partition("</style>")[2].partition("<script")[0]
    written = re.sub(r"<(pre|code)\b.*?</\1>", "", written, flags=re.DOTALL)
    assert "$" not in re.sub(r"<[^>]*>", "", written)
    assert "\\lVert" not in page.text  # nor is anything left of its spelling
    outputs = [o for cell in content.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    data = {image["src"].partition("base64,")[2].replace("\n", "") for image in page.all("img")}
    assert {output.data["image/png"].replace("\n", "") for output in outputs} <= data


def test_stored_notebooks_were_found():
    assert len(NOTEBOOKS) >= 5
    assert any("$" in text(path) for path in NOTEBOOKS)


def test_formulas_become_mathml(convert):
    cell = v4.new_markdown_cell("Let $a_1 < b_1$ and $\\frac{1}{2}$, *so* $c*d*e$:\n\n$$\nx^2 \\le\ny\n$$\n\nend.")
    _, page = convert(cell)
    assert [formula["display"] for formula in page.all("math")] == ["inline", "inline", "inline", "block"]
    assert {"mfrac", "msub", "msup"} <= {tag for tag, _ in page.tags}
    assert [tag for tag, _ in page.tags].count("em") == 1  # Markdown takes no star of a formula
    assert "$" not in page.text
    assert page.text.index("Let") < page.text.index("<") < page.text.index("≤") < page.text.index("end.")


def test_formulas_keep_their_order_past_ten(convert):
    _, page = convert(
        *(v4.new_markdown_cell(" ".join(f"${letter}$" for letter in half)) for half in ("abcdefgh", "ijklmnop"))
    )
    assert "".join(re.findall(r"[a-p]", page.text.partition("content")[2])) == "abcdefghijklmnop"


def test_a_dollar_of_code_stays(convert):
    prose = "From `$HOME` to `$PATH`, ``a ` $b$``:\n\n```\necho $ONE $TWO\n```\n\nand $z$ by `x`."
    output = v4.new_output("stream", text="paid $3 and $4")
    _, page = convert(v4.new_markdown_cell(prose), v4.new_code_cell("cost = '$5$'  # $six$", outputs=[output]))
    for kept in ("$HOME", "$PATH", "a ` $b$", "echo $ONE $TWO", "paid $3 and $4", "'$5$'", "# $six$"):
        assert kept in page.text
    assert len(page.all("math")) == 1


def test_code_is_highlighted_in_both_schemes(convert):
    source, page = convert(v4.new_code_cell("def f(x):\n    return 'text'  # a remark"))
    tokens = {span["class"] for span in page.all("span") if "class" in span}
    assert {"k", "nf", "s1", "c1"} <= tokens  # keyword, function, string, comment
    _, style = script_and_style(source)
    light, _, dark = style.partition("prefers-color-scheme: dark")
    for token in tokens & {"k", "nf", "s1", "c1"}:
        rule = rf"\.highlight \.{token} {{ ([^}}]*)}}"
        assert re.search(rule, light)[1] != re.search(rule, dark)[1]


def test_pictures_and_players_of_a_notebook_are_in_its_page(convert, parse):
    drawn = io.BytesIO()
    Image.new("RGB", (3, 2), "red").save(drawn, format="png")
    picture = base64.b64encode(drawn.getvalue()).decode()
    players = Players({"input": torch.full((1, 400), 0.1), "output": torch.full((1, 400), 0.2)})._repr_html_()
    outputs = [
        v4.new_output("display_data", {"image/png": picture, "text/plain": "<Figure>"}),
        v4.new_output("display_data", {"text/html": players, "text/plain": "input: RMS 0.1"}),
    ]
    source, page = convert(v4.new_code_cell("show()", outputs=outputs))
    assert_self_contained(source, page)
    images = [image["src"] for image in page.all("img")]
    assert images[0].replace("\n", "") == f"data:image/png;base64,{picture}"
    first = page.tags.index(("div", {"class": "players", "data-seconds": "0.016667"}))
    wanted = parse(players.replace(" controls ", ' controls="" ')).tags  # how nbconvert writes it
    assert page.tags[first : first + len(wanted)] == wanted


def test_the_page_of_a_notebook_is_named_after_it(convert):
    _, page = convert(v4.new_markdown_cell("# Heading"), name="01 <b> & co")
    assert page.text.strip().startswith("01 <b> & co")
    assert not page.all("b")
    assert [main["id"] for main in page.all("main")] == ["main"]


def test_the_notebook_itself_is_left_alone(tmp_path):
    path = tmp_path / "a.ipynb"
    nbformat.write(v4.new_notebook(cells=[v4.new_markdown_cell("$x$")]), path)
    before = path.read_bytes()
    write_notebook_page(path)
    assert path.read_bytes() == before
