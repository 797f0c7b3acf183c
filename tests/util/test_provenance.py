"""The fingerprint of code: changed by what runs, wherever it is imported, and by nothing else."""

import re
import time
from importlib import metadata
from pathlib import Path

import pytest
import torch

import lib.util.provenance
from lib.util.provenance import code_fingerprint, versions

TREE = {
    "__init__.py": "",
    "song.py": "from lib.tone import sine\nimport numpy as np\n\n\ndef song():\n    return sine(1)\n",
    "tone.py": "def sine(x):\n    import lib.table\n\n    return lib.table.VALUES[x]\n",
    "table.py": "from lib.deep import wave\nVALUES = (1, 2)\n",
    "deep/__init__.py": "from lib.scale import size\n",
    "deep/wave.py": "",
    "deep/noise.py": "",
    "scale.py": "import os.path\n",
    "other.py": "",
}
INSIDE = ("song.py", "tone.py", "table.py", "deep/wave.py")


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A `lib` of its own to fingerprint."""
    for name, text in TREE.items():
        (tmp_path / "lib" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lib" / name).write_text(text)
    monkeypatch.setattr(lib.util.provenance, "SOURCE", tmp_path)
    return tmp_path / "lib"


def forget():
    for function in (code_fingerprint, lib.util.provenance._read, lib.util.provenance._version):
        function.cache_clear()


@pytest.fixture
def fingerprint():
    """`code_fingerprint` of the files as they are now, as a new process would compute it."""
    yield lambda *modules, **options: (forget(), code_fingerprint(*modules, **options))[1]
    forget()


@pytest.mark.parametrize("name", TREE)
def test_it_follows_every_module_that_is_imported_and_no_other(tree, fingerprint, name):
    before = fingerprint("lib.song")
    assert re.fullmatch("[0-9a-f]{64}", before)
    assert fingerprint("lib.song") == before
    with open(tree / name, "a") as file:
        file.write("\nx = 1\n")
    assert (fingerprint("lib.song") != before) == (name in INSIDE)


def test_a_package_counts_where_a_name_is_imported_from_it(tree, fingerprint):
    (tree / "other.py").write_text("from lib.deep import size")
    for name, counts in (("deep/__init__.py", True), ("scale.py", True), ("deep/noise.py", False)):
        before = fingerprint("lib.other")
        with open(tree / name, "a") as file:
            file.write("\nx = 1\n")
        assert (fingerprint("lib.other") != before) == counts, name


def test_comments_docstrings_and_layout_do_not_count(tree, fingerprint):
    before = fingerprint("lib.tone")
    (tree / "tone.py").write_text(
        '"""Sound."""\n# why\ndef sine(x):\n  "y"\n  import lib.table\n  return lib.table.VALUES [x]'
    )
    assert fingerprint("lib.tone") == before
    for changed in ("return lib.table.VALUES[-x]", "return lib.table.VALUES[0]", "return None", "return 'VALUES'"):
        (tree / "tone.py").write_text(f"def sine(x):\n    import lib.table\n    {changed}\n")
        assert fingerprint("lib.tone") != before, changed


@pytest.mark.parametrize(
    ("code", "other"),
    [
        ("x = 1", "x = 1.0"),
        ("f(a, b)", "f(b, a)"),
        ("def f(): pass", "async def f(): pass"),
        ("a < b", "a <= b"),
        ("{**a, 1: b}", "{1: b, **a}"),
        ("def f(a, /): pass", "def f(a): pass"),
        ("x = ''", "x = None"),
        ("a.b", "b.a"),
    ],
)
def test_similar_code_has_different_hashes(tree, fingerprint, code, other):
    found = set()
    for text in (code, other):
        (tree / "other.py").write_text(text)
        found.add(fingerprint("lib.other"))
    assert len(found) == 2


def test_versions_of_imported_packages_count(tree, fingerprint, monkeypatch):
    version = metadata.version
    changed = {"numpy": "0.1", "scipy": "0.1"}
    before, without = fingerprint("lib.song"), fingerprint("lib.song", packages=False)
    other = fingerprint("lib.tone")
    monkeypatch.setattr(metadata, "version", lambda name: changed.get(name) or version(name))
    assert fingerprint("lib.song") != before
    assert fingerprint("lib.song", packages=False) == without
    assert fingerprint("lib.tone") == other  # imports no NumPy
    (tree / "other.py").write_text("from PIL import Image")  # of a package with another name
    assert fingerprint("lib.other") != fingerprint("lib.other", packages=False)


def test_several_modules_in_any_order_of_imports(tree, fingerprint):
    assert fingerprint("lib.song", "lib.tone") == fingerprint("lib.song")
    assert len({fingerprint(*names) for names in (("lib.song",), ("lib.song", "lib.other"), ("lib.other",))}) == 3


def test_what_cannot_be_followed_is_refused(tree, fingerprint):
    with pytest.raises(ValueError, match=r"lib\.nothing: no module"):
        fingerprint("lib.nothing")
    (tree / "other.py").write_text("from .tone import sine")
    with pytest.raises(AssertionError, match="line 1: a relative import"):
        fingerprint("lib.other")


def test_every_import_of_the_library_is_followed_quickly(fingerprint):
    names = [path.relative_to(lib.util.provenance.SOURCE) for path in Path(lib.__file__).parent.rglob("*.py")]
    for name in names:
        fingerprint(".".join(name.with_suffix("").parts).removesuffix(".__init__"))
    started = time.process_time()
    fingerprint("lib.superres.training")
    assert time.process_time() - started < 1  # 0.2 s on a machine that is not busy


def test_versions_are_torchs_and_the_commit():
    assert versions()["torch"] == torch.__version__
    assert re.fullmatch(r"[0-9a-f]{7,}\+?|unknown", versions()["commit"])
