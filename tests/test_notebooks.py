"""The stored notebooks: executed, clean, small, and made to be run by papermill and nbval."""

import ast
import base64
import io
import json
import re
from pathlib import Path

import nbformat
import papermill
import pytest
import soundfile

from lib.presets import PRESETS, load_preset

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SHARED = ("preset", "overrides", "data_dir", "out_dir")


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request) -> Path:
    return request.param


@pytest.fixture
def notebook(path):
    return nbformat.read(path, 4)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook) -> list:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def text_outputs(notebook) -> str:
    """Everything that an output holds but pictures and sound."""
    parts = []
    for output in outputs(notebook):
        parts.append(output.get("text", ""))
        parts += [value for kind, value in output.get("data", {}).items() if not kind.startswith("image/")]
    return re.sub(r"base64,[A-Za-z0-9+/=]+", "", "\n".join(map(str, parts)))


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 3


def test_the_format_is_valid(notebook):
    nbformat.validate(notebook)
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)


def test_every_code_cell_was_executed_in_order(notebook):
    """nbval does not compare a cell without a count: a stripped notebook would pass whatever it prints."""
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    results = [o for o in outputs(notebook) if o.output_type == "execute_result"]
    assert results
    for cell in code_cells(notebook):
        assert all(o.execution_count == cell.execution_count for o in cell.outputs if "execution_count" in o)


def test_no_error_and_no_warning_is_stored(notebook):
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    assert "Traceback" not in text_outputs(notebook)
    assert "Warning" not in text_outputs(notebook)


def test_it_is_small(path):
    assert path.stat().st_size < 1_000_000


def test_it_opens_with_its_number_and_a_title(path, notebook):
    first = notebook.cells[0]
    assert first.cell_type == "markdown"
    number = path.stem.split("_")[0]
    assert re.match(rf"# {number} · \w", first.source)
    assert len(first.source.splitlines()) > 1  # what it is about


def test_parameters_are_plain_assignments(notebook):
    """papermill reads this cell line by line: one `=` each, and comments without one."""
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    assert tagged[0] is code_cells(notebook)[0]
    names = []
    for line in filter(str.strip, tagged[0].source.splitlines()):
        assert line.count("=") == 1, line
        (assignment,) = ast.parse(line).body
        ast.literal_eval(assignment.value)
        names.append(assignment.targets[0].id)
    assert tuple(names[:4]) == SHARED
    assert not tagged[0].outputs


def test_papermill_finds_the_parameters_and_they_are_those_of_the_smoke_preset(path, notebook):
    found = papermill.inspect_notebook(str(path))
    assert set(SHARED) <= set(found)
    values = {name: ast.literal_eval(found[name]["default"]) for name in SHARED}
    assert values == {"preset": "smoke", "overrides": {}, "data_dir": "", "out_dir": ""}
    load_preset(values["preset"], values["overrides"])
    help_text = found["preset"]["help"]
    assert all(name in help_text for name in PRESETS)


def test_metadata_is_clean(notebook):
    metadata = notebook.metadata
    assert metadata.kernelspec.name == "python3"
    assert metadata.kernelspec.language == "python"
    assert set(metadata) <= {"kernelspec", "language_info"}  # no papermill, no widget state
    assert "version" not in metadata.get("language_info", {})
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags"}, cell.metadata  # no times, no editor's state
        for output in cell.get("outputs", []):
            assert not set(output.get("metadata", {})) - {"image/png"}


def test_tags_are_known(notebook):
    tags = {tag for cell in notebook.cells for tag in cell.metadata.get("tags", [])}
    assert tags <= {"parameters", "nbval-ignore-output", "nbval-skip"}


def test_pictures_and_players_are_not_compared(notebook):
    """What differs by machine is tagged; the rest nbval compares strictly."""
    for cell in code_cells(notebook):
        kinds = {kind for output in cell.outputs for kind in output.get("data", {})}
        if "image/png" in kinds or any("<audio" in str(o.get("data", {})) for o in cell.outputs):
            assert "nbval-ignore-output" in cell.metadata.get("tags", []), cell.source


def test_something_is_compared(notebook):
    compared = [cell for cell in code_cells(notebook) if "nbval-ignore-output" not in cell.metadata.get("tags", [])]
    assert [cell for cell in compared if cell.outputs]


def test_nothing_of_this_machine_is_stored(path, notebook):
    text = text_outputs(notebook) + "\n".join(cell.source for cell in notebook.cells)
    assert not re.search(r"(?<![\w/.<])/(home|root|work|tmp|Users|usr|var|mnt|opt)/", text)
    assert "application/vnd.jupyter.widget" not in path.read_text()
    assert not re.search(r"0x[0-9a-f]{9,}", text)  # an address in memory


def test_previews_are_short_and_embedded(notebook):
    pages = [output.data.get("text/html", "") for output in outputs(notebook) if "data" in output]
    sources = [source for page in pages for source in re.findall(r'<audio[^>]*src="([^"]*)"', page)]
    for source in sources:
        kind, data = source.split(",")
        assert kind == "data:audio/flac;base64"
        info = soundfile.info(io.BytesIO(base64.b64decode(data)))
        assert 0 < info.duration <= 3


def test_the_listening_notebook_holds_the_four_players():
    page = json.dumps(json.loads((FOLDER / "05_listening.ipynb").read_text()))
    labels = re.findall(r'aria-label=\\"([^"\\]*)\\"', page)
    assert labels[:4] == ["input", "target", "output", "plain average"]


def test_stored_code_draws_sound_only_through_players(notebook):
    """`IPython.display.Audio` normalises: a collapsed level would sound healthy."""
    source = "\n".join(cell.source for cell in code_cells(notebook))
    assert not re.search(r"\bAudio\(", source)


# --- no luck in assertions --------------------------------------------------------------------------------------------

ALGEBRA = {"untrained.mask_generator is not None"}  # conditions on the model's own build


def conditional_asserts(source: str) -> list[str]:
    """Asserts that only some runs are held to: inside an `if` or `while`, or with an `or` that lets others off."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.If | ast.While) and ast.unparse(node.test) not in ALGEBRA:
            found += [inner for part in (*node.body, *node.orelse) for inner in ast.walk(part)]
        elif isinstance(node, ast.Assert):
            ways_out = (part for part in ast.walk(node.test) if isinstance(part, ast.BoolOp))
            found += [node for part in ways_out if isinstance(part.op, ast.Or)]
    return sorted({ast.unparse(node) for node in found if isinstance(node, ast.Assert)})


def test_an_assertion_holds_whatever_the_preset_and_the_music(notebook):
    assert conditional_asserts("\n".join(cell.source for cell in code_cells(notebook))) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("assert x > 0", 0),
        ("if preset == 'demo':\n    print(x)\nassert x > 0", 0),
        ("if untrained.mask_generator is not None:\n    assert count(untrained.mask_generator) == 3", 0),
        ("if preset == 'demo' and not (data_dir or overrides):\n    assert x > 0", 1),
        ("if settings.name == 'demo':\n    assert x > 0", 1),
        ("if y:\n    pass\nelif not data_dir:\n    for x in y:\n        assert x > 0", 1),
        ("if data_dir:\n    pass\nelse:\n    assert x > 0", 1),
        ("ASSERTED = codec == 'mdct' and not data_dir\nif ASSERTED and y:\n    assert x > 0", 1),
        ("assert x > 0 or data_dir", 1),
        ("assert all(x > 0 or not y for x in z)", 1),
    ],
)
def test_an_assertion_behind_a_condition_is_found(source, found):
    assert len(conditional_asserts(source)) == found


def test_the_tables_that_the_record_reads_are_there():
    """`parts.found_in` of the record finds them by their columns."""
    shown = text_outputs(nbformat.read(FOLDER / "04_training.ipynb", 4))
    for column in ("output", "merit", "baseline", "verdict", "plain merit", "mark", "recipe", "Hz"):
        assert column in shown


def not_shown(source: str) -> list[str]:
    """Tables and figures that a cell makes and throws away: neither its last expression, nor kept, nor displayed."""
    tree = ast.parse(source)
    thrown = [node for node in ast.walk(tree) if isinstance(node, ast.Expr) and node is not tree.body[-1]]
    made = [ast.unparse(node.value) for node in thrown]
    return [call for call in made if call.startswith(("section.table(", "section.figure("))]


def test_every_table_and_figure_of_a_section_is_shown(notebook):
    assert not [call for cell in code_cells(notebook) for call in not_shown(cell.source)]
    assert not_shown("section.table(a)\nif b:\n    section.figure(c)") == ["section.table(a)", "section.figure(c)"]
    assert not not_shown("display(section.table(a))\nsection.figure(c)")
