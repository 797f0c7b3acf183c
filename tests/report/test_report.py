"""The page: everything inside one file, nothing forgotten, nothing that a name could smuggle in."""

import base64
import io
import json
import re
import shutil
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from markupsafe import Markup
from nbformat import v4
from PIL import Image

import lib.report.report
from lib.lab.claims import collect, judge
from lib.listening.player import SCRIPT, STYLE, Players
from lib.report.report import (
    Section,
    Table,
    leave_out_largest_players,
    sections,
    tables_of,
    write_notebook_page,
    write_page,
    write_report,
)
from lib.util.errors import UserError

EVIL = "<script>alert(\"x\")</script> & 'y'"


def figure():
    made, axes = plt.subplots(figsize=(1, 1))
    axes.plot([1, 2])
    return made


def players(*names: str) -> Players:
    return Players({name: torch.full((1, 400), 0.1) for name in names})


def noise_players(seconds: float) -> Players:
    """A player that hardly compresses: about 64 kB of page a second."""
    torch.manual_seed(0)
    return Players({"noise": 0.1 * torch.randn(1, round(24_000 * seconds))})


def text(path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")  # as a browser reads it


@pytest.fixture
def write(parse):
    """`write(folder)`: the page of a folder, parsed."""
    return lambda folder: parse(text(write_report(folder, "t", "What it is.", {})))


@pytest.fixture
def out(tmp_path):
    """A folder with two sections and one executed notebook."""
    folder = tmp_path / "a run é"
    first = Section(folder, "01_encoding", "Encoding")
    first.text("What a clip becomes.")
    first.figure(figure(), "round_trip", "Spectra before and after")
    first.table([{"what": "latents", "shape": [128, 1200]}], "Shapes")
    last = Section(folder, "05_listening", "Listening")
    last.players(players("input", "output"), "A pair")
    last.figure(figure(), "picture", "Outlines")
    nbformat.write(v4.new_notebook(cells=[v4.new_markdown_cell("As executed")]), folder / "05_listening.ipynb")
    write_notebook_page(folder / "05_listening.ipynb")
    return folder


# --- table ------------------------------------------------------------------------------------------------------------


def test_table_as_text_is_aligned():
    table = Table([{"name": "a", "value": 1}, {"name": "longer", "value": 22.5}])
    assert repr(table) == "name    value\na       1\nlonger  22.5"


def test_table_takes_rows_with_different_columns():
    assert repr(Table([{"a": 1}, {"b": None}])) == "a  b\n1\n   None"


def test_table_as_html(parse):
    page = parse(Table([{"x < y": EVIL}, {"x < y": 2}])._repr_html_())
    assert [tag for tag, _ in page.tags if tag in ("th", "td")] == ["th", "td", "td"]
    assert not page.all("script")
    assert "x < y" in page.text
    assert EVIL in page.text


def test_a_table_is_captioned_and_scrolls_by_keyboard(parse):
    page = parse(Table([{"a": 1}], EVIL)._repr_html_())
    (region,) = page.all("div")
    assert (region["role"], region["tabindex"], region["aria-label"]) == ("region", "0", EVIL)
    assert page.text.startswith(EVIL)
    assert len(page.all("caption")) == 1
    assert page.all("th") == [{"scope": "col"}]
    bare = parse(Table([{"a": 1}])._repr_html_())
    assert bare.all("div")[0]["aria-label"] == "table"
    assert not bare.all("caption")


# --- section ----------------------------------------------------------------------------------------------------------


def test_a_section_hands_back_what_it_stores(tmp_path):
    section = Section(tmp_path, "01", "One")
    clips = players("a")
    assert section.figure(figure(), "f", "c").data == (tmp_path / "figures" / "f.png").read_bytes()
    assert section.players(clips, "c") is clips
    assert repr(section.table([{"a": 1}], "c")) == "a\n1"
    section.key_figure("what", "value")
    section.text("a paragraph")
    section.claims([])
    stored = json.loads(text(tmp_path / "report" / "01.json"))  # after every item: a notebook may fail at the next
    kinds = ["figure", "players", "table", "key figure", "text", "claims"]
    assert [item["kind"] for item in stored["items"]] == kinds


def test_a_figure_of_few_colours_stays_as_it_is_drawn(tmp_path):
    made, axes = plt.subplots(figsize=(1, 1))
    axes.set_axis_off()
    axes.axhspan(0, 1, color="#0072B2")
    drawn = io.BytesIO()
    made.savefig(drawn)
    shown = Section(tmp_path, "01", "One").figure(made, "f", "c")
    stored = Image.open(io.BytesIO(shown.data))
    assert stored.mode == "P"
    assert len(stored.getpalette()) <= 3 * 256
    wanted = np.asarray(Image.open(drawn).convert("RGB")).astype(int)
    assert np.abs(np.asarray(stored.convert("RGB")) - wanted).max() <= 8


def test_a_section_closes_its_own_figure_only_and_writes_equal_pictures_alike(tmp_path):
    section = Section(tmp_path, "01", "One")
    bystander = figure()
    for name in ("a", "b"):
        mine = figure()
        section.figure(mine, name, "c")
        assert not plt.fignum_exists(mine.number)
    assert plt.fignum_exists(bystander.number)
    plt.close(bystander)
    a, b = ((tmp_path / "figures" / f"{name}.png").read_bytes() for name in "ab")
    assert a == b
    assert b"matplotlib" not in a.lower()


def test_claims_are_shown_where_they_are_judged_and_found_again(tmp_path):
    first, second = Section(tmp_path, "01", "One"), Section(tmp_path, "02", "Two")
    later = second.claims([judge("C1", "RMS 5.66", True, [5.64, 5.66, 5.7])])
    shown = first.claims([judge("C10", "200 epochs", None, why="takes days"), judge("C2", "1.01", False, found="2")])
    assert "C10" in repr(shown)
    assert "not tested here: takes days" in repr(shown)
    assert "(" in later.rows[0][2]  # the range over seeds beside the median
    assert [row["claim"] for row in collect(sections(tmp_path))] == ["C1", "C2", "C10"]


def test_opening_a_section_again_discards_what_it_held(out, write):
    Section(out, "01_encoding", "Encoding again")
    page = write(out)
    assert "Encoding again" in page.text
    assert "What a clip becomes." not in page.text
    assert [image["alt"] for image in page.all("img") if "mel spectrogram" not in image["alt"]] == [
        "Outlines"
    ]  # the other's


# --- page -------------------------------------------------------------------------------------------------------------


def test_the_page_holds_every_figure_player_table_and_fact(out, parse):
    path = write_report(out, "Latent fusion: demo", "Two clips, one.", {"pairs": "3 training", "code": "commit abc"})
    assert path == out / "index.html"
    page = parse(text(path))
    images = {image["alt"]: image["src"] for image in page.all("img")}
    for caption, name in (("Spectra before and after", "round_trip"), ("Outlines", "picture")):
        kind, data = images[caption].split(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data, validate=True) == (out / "figures" / f"{name}.png").read_bytes()
    assert [audio["aria-label"] for audio in page.all("audio")] == ["input", "output"]
    said = ("Latent fusion: demo", "Two clips, one.", "3 training", "commit abc", "What a clip becomes.", "[128, 1200]")
    for words in (*said, "A pair", "Shapes"):
        assert words in page.text
    assert page.all("html")[0]["lang"] == "en"
    assert page.all("meta")[0]["charset"] == "utf-8"


def test_the_page_needs_no_other_file(out, write):
    page = write(out)
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "data", "poster", "action"):
            address = attributes.get(name)
            if address is None or address.startswith("data:"):
                continue
            inside = tag == "a" and (address.startswith("#") or (out / address).exists())
            assert inside, f"<{tag} {name}={address!r}>"
    assert page.all("script") == [{"type": "module"}]
    source = text(out / "index.html")
    assert "url(" not in source
    assert "@import" not in source


def test_every_link_leads_somewhere(out, write):
    section = Section(out, "03_claims", "Judged")
    section.key_figure("a", "1")
    section.claims([judge("C1", "said", True)])
    page = write(out)
    links = [link["href"] for link in page.all("a")]
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    sections = {"01_encoding", "03_claims", "05_listening", "summary", "claims"}
    assert {link[1:] for link in links if link.startswith("#")} == sections | {"main"} == ids
    files = [link for link in links if link[0] != "#"]
    assert files == ["05_listening.html", "05_listening.ipynb"]  # the one that was executed
    assert all((out / name).exists() for name in files)
    assert "As executed" in text(out / "05_listening.html")


def test_listening_comes_first_then_what_was_found_then_the_story(out, write):
    for name in ("06_super_resolution", "04_training"):
        Section(out, name, name)
    Section(out, "02_stage_ablation", "Ablation").claims([judge("C1", "said", True)])
    page = write(out)
    wanted = ["05_listening", "summary", "04_training", "02_stage_ablation", "06_super_resolution", "01_encoding"]
    assert [section["id"] for section in page.all("section")] == [*wanted, "claims"]
    menu = text(out / "index.html").partition("<nav")[2].partition("</nav>")[0]
    assert re.findall('href="#(.*?)"', menu) == [*wanted, "claims"]


def test_the_page_begins_with_a_sentence_and_a_player(tmp_path):
    section = Section(tmp_path, "05_listening", "Listening")
    section.text("Words about the clips.")
    section.players(players("a"), "A pair")
    section.players(players("b"), "Another pair")
    source = text(write_report(tmp_path, "Title", "A plain sentence.", {}))
    main = source.partition("<main")[2]
    order = ("Title", "A plain sentence.", "A pair", "<audio", "Words about the clips.", "Another pair", "summary")
    assert [main.index(part) for part in order] == sorted(main.index(part) for part in order)
    assert main.count("<audio") == 2


def test_a_page_without_listening_yet_begins_with_what_was_found(tmp_path, write):
    Section(tmp_path, "01_encoding", "Encoding")
    assert [section["id"] for section in write(tmp_path).all("section")] == ["summary", "01_encoding"]


def test_a_failed_notebook_has_its_section_with_the_reason_even_if_it_never_opened_one(out, parse):
    failures = {"01_encoding": "cell 3: KeyError: 'x'", "02_stage_ablation": f"cell 1: {EVIL}"}
    path = write_report(out, "t", "l", {}, failures)
    page = parse(text(path))
    failed = [section["id"] for section in page.all("section") if section.get("class") == "failed"]
    assert failed == ["02_stage_ablation", "01_encoding"]
    for words in ("cell 3: KeyError: 'x'", EVIL, "Stage ablation", "What a clip becomes."):
        assert words in page.text
    assert page.text.count("did not finish") == 2
    assert page.all("script") == [{"type": "module"}]


def test_what_is_still_to_come_is_said_and_an_earlier_execution_of_it_is_not_shown(out, parse):
    page = parse(text(write_report(out, "t", "l", {}, to_come=("05_listening", "02_stage_ablation"))))
    assert "Still to come: Listening, Stage ablation." in page.text
    assert [section["id"] for section in page.all("section")] == ["summary", "01_encoding"]
    assert "Still to come" not in parse(text(write_report(out, "t", "l", {}))).text


def test_a_folded_table_opens_by_its_caption(tmp_path, parse):
    section = Section(tmp_path, "01", "One")
    shown = section.table([{"a": 1}], "Forty rows", folded=True)
    assert repr(shown) == "a\n1"
    page = parse(text(write_report(tmp_path, "t", "l", {})))
    (details,) = page.all("details")
    assert "open" not in details
    assert page.text.count("Forty rows (1 row)") == page.text.count("Forty rows") == 1
    assert tables_of(sections(tmp_path)) == {"Forty rows": [{"a": 1}]}


@pytest.mark.parametrize(("rows", "folded"), [(10, 0), (11, 1)])
def test_a_table_of_more_than_ten_rows_is_folded(parse, rows, folded):
    table = parse(Table([{"a": i} for i in range(rows)], "Rows")._repr_html_())
    assert len(table.all("details")) == folded
    assert ("Rows (11 rows)" in table.text) == folded
    assert table.text.count("Rows") == 1


def test_verdicts_have_a_sign_and_a_colour(parse):
    said = {
        "reproduced": "✓ yes",
        "refuted": "✗ no",
        "not tested here: takes days": "○ open",
        "better than the baseline": "▲ yes",
        "worse than the baseline": "▼ no",
        "no statistically significant difference from the baseline": "≈ open",
    }
    source = Table([{"verdict": words, "said": "refuted"} for words in said])._repr_html_()
    page = parse(source)
    signs = re.findall('<span class="verdict (.*?)"><span aria-hidden="true">(.)</span>', source)
    assert [f"{sign} {kind}" for kind, sign in signs] == list(said.values())  # the column beside has none
    assert all(f"{sign[0]}\xa0{words}" in page.text for words, sign in said.items())
    css = (Path(lib.report.report.FOLDER) / "page.css").read_text()
    assert len({re.search(rf"\.{kind} {{ color: (.*?); }}", css)[1] for kind in ("yes", "no", "open")}) == 3


def test_any_other_verdict_is_text_as_it_is(parse):
    page = parse(Table([{"verdict": EVIL}])._repr_html_())
    assert EVIL in page.text
    assert not page.all("span")


def test_a_tally_heads_the_claims_and_the_documents_are_introduced_once(tmp_path, parse):
    section = Section(tmp_path, "02", "Two")
    section.claims([judge("C1", "a", True), judge("C2", "b", False), judge("C3", "c", False)])
    source = text(write_report(tmp_path, "t", "l", {}))
    claims = source.partition('<section id="claims">')[2]
    found = "✓\xa01 reproduced, ✗\xa02 refuted, ○\xa00 not tested here"
    tally = re.search('<p class="tally">.*?</p>', claims)[0]
    assert parse(tally).text.strip() == found
    assert claims.index(tally) < claims.index("<table")
    assert source.count("<em>source documents</em>") == source.count("C1 to C18") == 1
    assert source.index("<em>source documents</em>") < source.index('<section id="02">')


def test_a_figure_has_a_version_for_dark_pages(tmp_path, parse):
    made, axes = plt.subplots(figsize=(1, 1))
    axes.axhspan(0, 1, color="#0072B2")
    Section(tmp_path, "01", "One").figure(made, "f", "A caption")
    page = parse(text(write_report(tmp_path, "t", "l", {})))
    (dark,) = page.all("source")
    assert dark["media"] == "(prefers-color-scheme: dark)"
    (light,) = page.all("img")
    pictures = {"f": light["src"], "f_dark": dark["srcset"]}
    for name, data in pictures.items():
        assert base64.b64decode(data.partition(",")[2]) == (tmp_path / "figures" / f"{name}.png").read_bytes()
    corners, middles = zip(*map(corner_and_middle, pictures.values()), strict=True)
    assert [sum(corner) for corner in corners] == [3 * 255, pytest.approx(3 * 18, abs=9)]
    assert np.abs(np.subtract(*middles)).max() <= 8  # data keep their colour
    assert page.text.count("A caption") == len(page.all("figcaption")) == 1
    assert page.all("figcaption")[0] == {"aria-hidden": "true"}  # read out once, as the picture's name


def corner_and_middle(data: str) -> tuple[np.ndarray, np.ndarray]:
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2]))).convert("RGB")).astype(int)
    return pixels[1, 1], pixels[len(pixels) // 2, pixels.shape[1] // 2]


def test_a_section_of_before_there_were_dark_versions_is_shown_as_it_is(tmp_path, parse):
    Section(tmp_path, "01", "One").figure(figure(), "f", "c")
    stored = json.loads(text(tmp_path / "report" / "01.json"))
    del stored["items"][0]["dark"]
    (tmp_path / "report" / "01.json").write_text(json.dumps(stored))
    page = parse(text(write_report(tmp_path, "t", "l", {})))
    assert page.all("source")[0]["srcset"] == page.all("img")[0]["src"]


def test_every_caption_is_there_once(tmp_path, write):
    section = Section(tmp_path, "01", "One")
    section.figure(figure(), "f", "the caption of a figure")
    section.table([{"a": 1}], "the caption of a table")
    section.players(players("a"), "the caption of players")
    page = write(tmp_path)
    for kind in ("a figure", "a table", "players"):
        assert page.text.count(f"the caption of {kind}") == 1


def test_the_summary_has_every_key_figure_with_its_section(tmp_path, parse):
    first, last = Section(tmp_path, "01", "Encoding"), Section(tmp_path, "02", "Training")
    first.key_figure("RMS of the input", "5.66")
    first.claims([judge("C1", "a", True), judge("C2", "b", False)])
    last.key_figure("validation loss", "from 9 to 7")
    last.key_figure("time", "3 min")
    last.claims([judge("C10", "c", True), judge("C13", "d", None, why="needs listeners")])
    source = text(write_report(tmp_path, "t", "l", {}))
    summary = source.partition('<section id="summary">')[2].partition("</section>")[0]
    cells = [cell.partition("</td>")[0] for cell in summary.split("<td>")[1:]]
    assert cells == [
        *("RMS of the input", "5.66", "Encoding"),
        *("validation loss", "from 9 to 7", "Training"),
        *("time", "3 min", "Training"),
    ]
    assert "Key figures of every notebook" in summary
    for name in ("01", "02"):  # not once more in their sections
        own = source.partition(f'<section id="{name}">')[2].partition("</section>")[0]
        assert "<table" not in own
        assert "from 9 to 7" not in own


def test_claims_of_all_notebooks_are_one_table_in_their_order(tmp_path, write):
    for name, claim in (("01", "C10"), ("02", "C2")):
        Section(tmp_path, name, name).claims([judge(claim, f"what {claim} says", True, [1.0, 2.0, 3.0])])
    page = write(tmp_path)
    assert page.text.count("Every claim and its verdict") == 1
    assert page.text.count("what C10 says") == page.text.count("what C2 says") == 1
    assert page.text.index("what C2 says") < page.text.index("what C10 says")
    assert [section["id"] for section in page.all("section")][-1] == "claims"


def test_without_key_figures_and_claims_there_is_no_empty_table(out, write):
    page = write(out)
    assert len(page.all("table")) == 1  # the one of shapes
    assert "claims" not in page.text.lower()


def test_summary_json_holds_facts_and_tables_as_data(out):
    Section(out, "03_more", "More").table([{"a": 1.5, "b": None}, {"c": [1, 2]}], "Numbers")
    write_report(out, "t", "l", {"pairs": "3"})
    assert json.loads(text(out / "summary.json")) == {
        "facts": {"pairs": "3"},
        "tables": {
            "Shapes": [{"what": "latents", "shape": [128, 1200]}],
            "Numbers": [{"a": 1.5, "b": None}, {"c": [1, 2]}],
        },
    }


def test_names_and_captions_cannot_become_markup(tmp_path, parse):
    section = Section(tmp_path, "01", EVIL)
    section.text(EVIL)
    section.key_figure(EVIL, EVIL)
    section.figure(figure(), "f", EVIL)
    section.table([{EVIL: EVIL}], EVIL)
    section.players(players(EVIL), EVIL)
    section.claims([judge("C1", EVIL, True, found=EVIL)])
    page = parse(text(write_report(tmp_path, EVIL, EVIL, {EVIL: EVIL})))
    assert page.all("script") == [{"type": "module"}]
    assert page.text.count(EVIL) >= 17
    assert EVIL in [image["alt"] for image in page.all("img")]
    assert page.all("audio")[0]["aria-label"] == EVIL


def test_a_file_name_that_is_not_utf8_does_not_stop_the_page(tmp_path, write):
    name = b"caf\xe9.wav".decode(errors="surrogateescape")
    section = Section(tmp_path, "01", "One")
    section.players(players(name), name)
    assert "caf\ufffd.wav" in write(tmp_path).text


def test_no_sections_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match="no sections to report on; run the notebooks first"):
        write_report(tmp_path, "t", "l", {})
    assert not (tmp_path / "index.html").exists()


# --- size -------------------------------------------------------------------------------------------------------------


def sections_of(figure: int, table: int, *sizes: int) -> list[dict]:
    """Two sections: a figure, a table and players of these sizes in turn; the second has no notebook."""
    items = [{"kind": "players", "html": "p" * size, "caption": f"of {size}"} for size in sizes]
    first = [{"kind": "figure", "data": "f" * figure, "caption": "figure"}, {"kind": "text", "text": "x" * 500}]
    table = {"kind": "table", "html": "t" * table, "caption": "table"}
    return [
        {"name": "01", "executed": True, "items": [*first, *items[::2]]},
        {"name": "02", "executed": False, "items": [table, *items[1::2]]},
    ]


@pytest.mark.parametrize(
    ("limit", "kept"),
    [
        (1000, {10, 40, 80, 30}),  # 97 % of it is 970: all of it fits
        (999, {10, 40, 30}),
        (920, {10, 40, 30}),  # 892, and without the largest it is 890
        (900, {10, 30}),
        (870, {10}),
        (100, set()),
    ],
)
def test_the_largest_players_are_left_out_until_the_rest_fits(limit, kept):
    sections = sections_of(700, 110, 10, 40, 80, 30)  # 970 in all
    leave_out_largest_players(sections, limit)
    items = [item for section in sections for item in section["items"]]
    assert {len(item["html"]) for item in items if item["kind"] == "players"} == kept
    assert [item["kind"] for item in items[:2]] == ["figure", "text"]
    assert len(items[0]["data"]) == 700  # pictures and tables stay, whatever the limit
    assert len(next(item for item in items if item["kind"] == "table")["html"]) == 110
    assert len(items) == 7


def test_a_page_stays_below_its_limit_and_names_the_place(tmp_path, monkeypatch, parse):
    monkeypatch.setattr(lib.report.report, "LIMIT", 1_000_000)
    listening, training = Section(tmp_path, "05", "Listening"), Section(tmp_path, "04", "Training")
    listening.players(noise_players(3), "A short pair")
    listening.players(noise_players(12), "A long pair")
    training.players(noise_players(10), "Made while training")
    training.figure(figure(), "f", "A figure")
    nbformat.write(v4.new_notebook(), tmp_path / "05.ipynb")
    write_notebook_page(tmp_path / "05.ipynb")
    path = write_report(tmp_path, "t", "l", {})
    page = parse(text(path))
    assert path.stat().st_size <= 1_000_000
    assert len(page.all("audio")) == 2
    line = "A long pair: left out to keep this page below 1 MB; the players are in 05.html."
    assert line in page.text
    monkeypatch.setattr(lib.report.report, "LIMIT", 500_000)
    path = write_report(tmp_path, "t", "l", {})
    page = parse(text(path))
    assert path.stat().st_size <= 500_000
    assert len(page.all("audio")) == 1
    assert (
        "Made while training: left out to keep this page below 0.5 MB; the players are in the folder audio/."
        in page.text
    )
    assert "A figure" in [image["alt"] for image in page.all("img")]
    stored = json.loads(text(tmp_path / "report" / "05.json"))
    assert [item["kind"] for item in stored["items"]] == ["players", "players"]  # what is stored stays whole


# --- pages that need nothing but themselves --------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
EVIL_TITLE = "</title><script>alert(\"x\")</script> & 'y'"


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
    source = text(write_page(tmp_path / "a.html", EVIL_TITLE, Markup("")))
    page = parse(source)
    assert len(page.all("script")) == 1
    assert EVIL_TITLE in page.text


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
    first = page.tags.index(("div", {"class": "players", "data-seconds": "0.016667", "data-rate": "24000"}))
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
