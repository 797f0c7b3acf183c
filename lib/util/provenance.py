"""What produced a number or a file: a hash of the code, the commit, versions. A fingerprint covers modules of `lib` and
all that they import from it, at the top or inside a function; a package's `__init__` only where a name is imported from
the package. Comments, docstrings and layout do not count."""

import ast
import functools
import hashlib
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

SOURCE = Path(__file__).resolve().parents[2]


@functools.cache
def code_fingerprint(*modules: str, packages: bool = True) -> str:
    """sha256 of the code of `modules` ('lib.audio.synth') and of what they import from `lib`, except this module; with
    `packages` also of the versions of installed packages that it imports, such as the build of torch."""
    found, outside, waiting = {}, set(), list(modules)
    while waiting:
        name = waiting.pop()
        if name in found or name == __name__:
            continue
        if not (file := _file(name)):
            raise ValueError(f"{name}: no module in {SOURCE}")
        found[name], imports = _read(file)
        for imported in imports:
            parts = imported.split(".")
            if parts[0] == "lib":  # the last part may be a function
                prefixes = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
                waiting.append(next(prefix for prefix in prefixes if _file(prefix)))
            elif parts[0] not in sys.stdlib_module_names:
                outside.add(parts[0])
    facts = sorted(found.items()) + [(name, _version(name)) for name in sorted(outside) if packages]
    return hashlib.sha256(ascii(facts).encode()).hexdigest()


def _file(module: str) -> Path | None:
    path = SOURCE.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


@functools.cache
def _read(file: Path) -> tuple[str, tuple[str, ...]]:
    """Hash of a file's code, and the full names of everything it imports: modules, and names from them."""
    tree, imports = ast.parse(file.read_bytes()), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; name the module in full"
            imports += [f"{node.module}.{alias.name}" for alias in node.names]
    return hashlib.sha256(ascii(_plain(tree)).encode()).hexdigest(), tuple(imports)


@functools.cache
def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # PIL comes with pillow
        return metadata.version(metadata.packages_distributions()[package][0])


def _plain(tree: ast.AST) -> str:
    """The code of a syntax tree, without bare strings, comments and layout."""
    for node in ast.walk(tree):
        if isinstance(body := getattr(node, "body", None), list):
            bare = [isinstance(item, ast.Expr) and isinstance(getattr(item.value, "value", None), str) for item in body]
            node.body = [item for item, is_string in zip(body, bare, strict=True) if not is_string]
    return ast.unparse(tree)


def gpu_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def versions() -> dict[str, str]:
    """What to quote with every number: torch's version and this repository's commit, with '+' if lib/ has changed."""
    git = {"cwd": SOURCE / "lib", "capture_output": True, "text": True, "check": False}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **git).stdout.strip()
    changed = subprocess.run(["git", "status", "--porcelain", "--", "."], **git).stdout.strip()
    return {"torch": torch.__version__, "commit": commit + "+" * bool(changed) if commit else "unknown"}
