"""The page: everything inside one file, nothing forgotten, nothing that a name could smuggle in."""

import base64
import json
from html.parser import HTMLParser

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import pytest
import torch

from lib.errors import UserError
from lib.player import Players
from lib.report import Section, Table, write_report

EVIL = "<script>alert(\"x\")</script> & 'y'"
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """What a browser would see: tags, addresses, text; fails on tags that do not match."""

    def __init__(self, source: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(source)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


def figure():
    made, axes = plt.subplots(figsize=(1, 1))
    axes.plot([1, 2])
    return made


def players(*names: str) -> Players:
    return Players({name: torch.full((1, 400), 0.1) for name in names})


def text(path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")  # as a browser reads it


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
    (folder / "05_listening.ipynb").write_text("{}")
    return folder


# --- table ------------------------------------------------------------------------------------------------------------


def test_table_as_text_is_aligned():
    table = Table([{"name": "a", "value": 1}, {"name": "longer", "value": 22.5}])
    assert repr(table) == "name    value\na       1\nlonger  22.5"


def test_table_takes_rows_with_different_columns():
    assert repr(Table([{"a": 1}, {"b": None}])) == "a  b\n1\n   None"


def test_table_as_html():
    page = Page(Table([{"x < y": EVIL}, {"x < y": 2}])._repr_html_())
    assert [tag for tag, _ in page.tags if tag in ("th", "td")] == ["th", "td", "td"]
    assert not page.all("script")
    assert "x < y" in page.text
    assert EVIL in page.text


# --- section ----------------------------------------------------------------------------------------------------------


def test_a_section_hands_back_what_it_stores(tmp_path):
    section = Section(tmp_path, "01", "One")
    clips = players("a")
    assert section.figure(figure(), "f", "c").data == (tmp_path / "figures" / "f.png").read_bytes()
    assert section.players(clips, "c") is clips
    assert repr(section.table([{"a": 1}], "c")) == "a\n1"
    stored = json.loads(text(tmp_path / "report" / "01.json"))  # after every item: a notebook may fail at the next
    assert [item["kind"] for item in stored["items"]] == ["figure", "html", "html"]


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


def test_opening_a_section_anew_forgets_what_it_held(out):
    Section(out, "01_encoding", "Encoding again")
    page = Page(text(write_report(out, "t", {})))
    assert "Encoding again" in page.text
    assert "What a clip becomes." not in page.text
    assert [image["alt"] for image in page.all("img")] == ["Outlines"]  # the other section stays


# --- page -------------------------------------------------------------------------------------------------------------


def test_the_page_holds_every_figure_player_table_and_fact(out):
    path = write_report(out, "Latent fusion: demo", {"pairs": "3 training", "code": "commit abc"})
    assert path == out / "index.html"
    page = Page(text(path))
    images = {image["alt"]: image["src"] for image in page.all("img")}
    for caption, name in (("Spectra before and after", "round_trip"), ("Outlines", "picture")):
        kind, data = images[caption].split(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data, validate=True) == (out / "figures" / f"{name}.png").read_bytes()
    assert [audio["aria-label"] for audio in page.all("audio")] == ["input", "output"]
    for said in ("Latent fusion: demo", "3 training", "commit abc", "What a clip becomes.", "[128, 1200]", "A pair"):
        assert said in page.text
    assert page.all("html")[0]["lang"] == "en"
    assert page.all("meta")[0]["charset"] == "utf-8"


def test_the_page_needs_no_other_file(out):
    page = Page(text(write_report(out, "t", {})))
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "data", "poster", "action"):
            address = attributes.get(name)
            if address is None or address.startswith("data:"):
                continue
            inside = tag == "a" and (address.startswith("#") or address == "05_listening.ipynb")
            assert inside, f"<{tag} {name}={address!r}>"
    assert not page.all("script")
    source = text(out / "index.html")
    assert "url(" not in source
    assert "@import" not in source


def test_every_link_leads_somewhere(out):
    page = Page(text(write_report(out, "t", {})))
    links = [link["href"] for link in page.all("a")]
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {link[1:] for link in links if link.startswith("#")} == {"01_encoding", "05_listening"} == ids
    assert [link for link in links if link[0] != "#"] == ["05_listening.ipynb"]  # the one that was executed
    assert (out / "05_listening.ipynb").exists()


def test_the_last_notebook_comes_first_in_page_and_contents(out):
    """Listening is what a newcomer came for; encoding explains it."""
    Section(out, "04_training", "Training")
    page = Page(text(write_report(out, "t", {})))
    wanted = ["05_listening", "04_training", "01_encoding"]
    assert [section["id"] for section in page.all("section")] == wanted
    assert [link["href"] for link in page.all("a") if link["href"][0] == "#"] == ["#" + name for name in wanted]


def test_names_and_captions_cannot_become_markup(tmp_path):
    section = Section(tmp_path, "01", EVIL)
    section.text(EVIL)
    section.figure(figure(), "f", EVIL)
    section.table([{EVIL: EVIL}], EVIL)
    section.players(players(EVIL), EVIL)
    page = Page(text(write_report(tmp_path, EVIL, {EVIL: EVIL})))
    assert not page.all("script")
    assert page.text.count(EVIL) >= 10
    assert page.all("img")[0]["alt"] == EVIL
    assert page.all("audio")[0]["aria-label"] == EVIL


def test_a_file_name_that_is_not_utf8_does_not_stop_the_page(tmp_path):
    name = b"caf\xe9.wav".decode(errors="surrogateescape")
    section = Section(tmp_path, "01", "One")
    section.players(players(name), name)
    assert "caf\ufffd.wav" in Page(text(write_report(tmp_path, "t", {}))).text


def test_no_sections_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match="no sections to report on; run the notebooks first"):
        write_report(tmp_path, "t", {})
    assert not (tmp_path / "index.html").exists()
