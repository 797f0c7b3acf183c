"""The repository itself: one environment described three times alike, entry points that exist, nothing large."""

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12")  # that the lock is made for


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads(text("pyproject.toml"))["project"]


@pytest.fixture(scope="module")
def lock() -> list[tuple[Requirement, list[str]]]:
    """Every entry of the lock and its hashes."""
    entries = []
    for entry in text("requirements.lock").replace("\\\n", " ").splitlines():
        if entry.strip() and not entry.startswith("#"):
            requirement, *hashes = entry.split("--hash=")
            entries.append((Requirement(requirement.strip()), [h.strip() for h in hashes]))
    return entries


@pytest.fixture(scope="module")
def conda() -> tuple[list[str], list[str]]:
    """Conda's own packages, and what it hands to pip."""
    dependencies = yaml.safe_load(text("environment.yml"))["dependencies"]
    (by_pip,) = (item["pip"] for item in dependencies if isinstance(item, dict))
    return [item for item in dependencies if isinstance(item, str)], by_pip


def locked(lock, name: str, python: str) -> list[Version]:
    """The versions that a Linux machine with this Python gets."""
    environment = {"python_version": python, "python_full_version": f"{python}.7", "sys_platform": "linux"}
    environment |= {"platform_machine": "x86_64", "os_name": "posix", "platform_system": "Linux"}
    return [
        Version(next(iter(entry.specifier)).version)
        for entry, _ in lock
        if canonicalize_name(entry.name) == canonicalize_name(name)
        and (entry.marker is None or Marker(str(entry.marker)).evaluate(environment))
    ]


# --- environment ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_holds_every_dependency_at_a_version_that_it_allows(project, lock, python):
    assert Version(python) in SpecifierSet(project["requires-python"])
    for dependency in map(Requirement, project["dependencies"]):
        versions = locked(lock, dependency.name, python)
        assert len(versions) == 1, f"{dependency} has {versions} on Python {python}"
        assert versions[0] in dependency.specifier, dependency


def test_every_entry_of_the_lock_is_pinned_and_has_hashes(lock):
    assert len(lock) > 100
    for requirement, hashes in lock:
        assert [spec.operator for spec in requirement.specifier] == ["=="], requirement
        assert hashes, requirement
        assert all(re.fullmatch("sha256:[0-9a-f]{64}", value) for value in hashes), requirement


def test_the_lock_names_no_address(lock):
    assert not re.search(r"https?:|file:|--index|--find-links|git\+| @ ", text("requirements.lock"))
    assert all(requirement.url is None for requirement, _ in lock)


def test_conda_builds_the_same_environment(project, lock, conda):
    packages, by_pip = conda
    (python,) = (item for item in packages if re.match(r"python\b", item))
    version = python.removeprefix("python=")
    assert version in PYTHONS
    assert Version(version) in SpecifierSet(project["requires-python"])
    assert [item.split() for item in by_pip] == [["--requirement", "requirements.lock"]]
    assert (ROOT / "requirements.lock").exists()
    names = {canonicalize_name(requirement.name) for requirement, _ in lock}
    for item in packages:
        name, pin = re.fullmatch(r"([\w.-]+)(.*)", item).groups()
        assert canonicalize_name(name) not in names, f"{item} would come from conda and from the lock"
        assert not pin or name == "python", f"{item}: the lock alone pins versions"


def test_what_is_installed_is_what_the_lock_says(lock):
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    for name in ("torch", "torchaudio", "papermill", "numpy"):
        assert Version(importlib.metadata.version(name)).base_version == str(locked(lock, name, python)[0]), name


# --- entry points -----------------------------------------------------------------------------------------------------


def makefile_targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):(?!=)", text("Makefile"), re.MULTILINE))


def test_the_readme_names_the_two_commands_and_no_target_that_does_not_exist():
    named = set(re.findall(r"\bmake ([a-z][\w-]*)", text("README.md")))
    commands = re.findall(r"^ {4}make (\w+)|`make (\w+)", text("README.md"), re.MULTILINE)
    used = {first or second for first, second in commands}
    assert {"demo", "test"} <= used <= named
    assert used <= makefile_targets()


def test_files_and_modules_that_the_readme_names_exist():
    for module in set(re.findall(r"python -m (lib[.\w]*\w)", text("README.md"))):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    for target in re.findall(r"\]\(([^)#:]+)\)", text("README.md")):
        if not target.startswith("outputs/record/"):  # measured by `make record`
            assert (ROOT / target).exists(), target


def test_every_command_is_declared_phony():
    phony = set(re.search(r"^\.PHONY: (.+)$", text("Makefile"), re.MULTILINE)[1].split())
    assert phony == {target for target in makefile_targets() if not (ROOT / target).is_file()}


def test_the_makefile_takes_nothing_for_granted():
    """Git, make and Python: no command of the virtual environment is called by its bare name."""
    for line in text("Makefile").splitlines():
        if line.startswith("\t"):
            tool = re.match(r"\s*[@-]?(?:\w+=\S+ )*(\S*)", line)[1]
            assert tool not in {"python", "python3", "pip", "pytest", "ruff", "jupyter", "nbstripout", "lint-imports"}


def test_ci_runs_make_test():
    path = ROOT / ".ci" / "run"
    assert os.access(path, os.X_OK)
    lines = text(".ci/run").splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in lines
    assert "make test" in lines
    subprocess.run(["bash", "-n", path], check=True)


def test_make_test_checks_style_layers_tests_notebooks_and_a_papermill_run():
    recipe = subprocess.run(
        ["make", "--dry-run", "--assume-old=.venv/ready", "test"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for step in ("ruff check", "ruff format --check", "lint-imports", "-m pytest", "--nbval ", "lib.pipeline"):
        assert step in recipe, step


# --- files ------------------------------------------------------------------------------------------------------------


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    return [ROOT / os.fsdecode(name) for name in listed.split(b"\0") if name]


def test_no_large_file_is_tracked():
    assert not [path for path in tracked() if path.exists() and path.stat().st_size > 2_000_000]


def test_seeds_are_random_seeds():
    """What the project began with are its source documents."""
    for path in tracked():
        if path.suffix in (".py", ".md", ".toml", ".j2", ".ipynb"):
            prose = path.read_text()
            if path.suffix == ".ipynb":
                prose = "".join("".join(cell["source"]) for cell in json.loads(prose)["cells"])
            found = re.search(r"(?i)\bseed[ ]documents?\b|\bthe[ ]seeds?'|\bseeds?[ ]00\d", prose)
            assert not found, f"{path}: {found[0]!r}"


def test_generated_files_are_not_tracked():
    for path in tracked():
        inside = path.relative_to(ROOT).as_posix()
        assert not re.match(
            r"data/(?!README\.md$|fetch_music\.sh$)|outputs/(?!record/)|\.venv/|.*__pycache__/", inside
        ), inside


PACKAGES = sorted(path.parent.name for path in (ROOT / "lib").glob("*/__init__.py"))


@pytest.mark.parametrize("package", ["", *PACKAGES])
def test_every_module_has_its_tests(package):
    modules = {path.stem.strip("_") for path in (ROOT / "lib" / package).glob("*.py")} - {"init"}
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests" / package).glob("test_*.py")}
    record = {"record", "quotes", "explosion", "constructed", "full_size"}
    others = {"notebooks", "repo", "api", "bench", "check_demo", "other_rates", "gpu", "full_preset", *record}
    assert modules <= tests
    assert tests - modules <= (set() if package else others), "a test of a module that is not there"


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_only_re_exports(package):
    """`code_fingerprint` relies on it: code in an `__init__` would change results under the same hash."""
    for node in ast.parse(text(f"lib/{package}/__init__.py")).body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        assert docstring or isinstance(node, ast.ImportFrom), ast.unparse(node)


def test_every_package_has_its_level():
    """An import-linter contract that does not know a package says nothing about it."""
    contract = tomllib.loads(text("pyproject.toml"))["tool"]["importlinter"]["contracts"][0]
    levels = {name.strip() for level in contract["layers"] for name in level.split(":")}
    assert levels == {path.stem for path in (ROOT / "lib").glob("*.py")} - {"__init__"} | set(PACKAGES)
    assert contract["exhaustive"]


# ---- real music


DPKG = """#!/bin/bash
mkdir -p "$3/usr/share/doc/music" "$3/data/Music" "$3/data/sounds" "$3/sound/music/en"
echo "GPL-2+ of $2" > "$3/usr/share/doc/music/copyright"
for name in data/Music/song data/Music/thunder data/sounds/hit sound/music/en/said; do echo "$2" > "$3/$name.ogg"; done
cp "$PACKED" "$3/data/music.pk3"
"""


@pytest.fixture
def fetch(tmp_path):
    """`fetch(tool=script, ...)` runs the script with these commands beside the ordinary ones."""
    (tmp_path / "bin").mkdir()
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as packed:
        packed.writestr("sound/cdtracks/packed.ogg", "sound")
    for name in ("bash", "env", "find", "mkdir", "mktemp", "rm", "mv", "cp", "wc"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    (tmp_path / "bin" / "python3").write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    (tmp_path / "bin" / "python3").chmod(0o755)

    def run(*arguments: str, **tools: str) -> subprocess.CompletedProcess:
        for name, script in tools.items():
            path = tmp_path / "bin" / name.replace("_", "-")
            path.write_text(script)
            path.chmod(0o755)
        command = [ROOT / "data" / "fetch_music.sh", tmp_path / "my music", *arguments]
        environment = {"PATH": str(tmp_path / "bin"), "PACKED": str(tmp_path / "packed.zip")}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    return run


def test_music_is_unpacked_with_its_licence_and_a_second_call_does_nothing(fetch, tmp_path):
    found = fetch(apt_get='#!/bin/bash\necho > "$3_1.deb"\n', dpkg_deb=DPKG)
    assert (found.returncode, found.stdout) == (0, f"4 tracks in {tmp_path}/my music\n"), found.stderr
    for package in ("nexuiz-music", "wesnoth-1.16-music"):
        folder = tmp_path / "my music" / package
        assert {path.name for path in folder.iterdir()} == {"song.ogg", "packed.ogg", "COPYRIGHT"}
        assert package in (folder / "COPYRIGHT").read_text()
    again = fetch(apt_get="#!/bin/bash\nexit 1\n")
    assert (again.returncode, again.stdout) == (0, found.stdout)
    assert "'more'" in fetch("mroe").stderr
    assert fetch("more", apt_get='#!/bin/bash\necho > "$3_1.deb"\n').stdout == f"30 tracks in {tmp_path}/my music\n"


def test_without_apt_or_a_mirror_it_says_what_to_download(fetch, tmp_path):
    found = fetch()
    assert found.returncode == 2
    assert found.stderr.startswith(
        "error: apt-get is missing; download these Debian packages by hand and unpack the .ogg"
    )
    assert found.stderr.endswith(": nexuiz-music wesnoth-1.16-music\n")
    for package in ("nexuiz-music", "wesnoth-1.16-music"):  # unpacked by hand
        (tmp_path / "my music" / package).mkdir(parents=True)
        assert package in fetch().stderr  # an empty folder is no music
        (tmp_path / "my music" / package / "song.ogg").write_text("")
    assert fetch().returncode == 0
    shutil.rmtree(tmp_path / "my music")
    found = fetch(apt_get="#!/bin/bash\nexit 100\n", dpkg_deb=DPKG)
    assert found.returncode == 2
    assert found.stderr.startswith("error: apt-get cannot download nexuiz-music; download and unpack it by hand")
    assert not list((tmp_path / "my music").iterdir())
