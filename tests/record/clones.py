"""A record is measured in a clone of one clean commit, and takes the old one's place as a whole."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from quotes import readme_blocks, with_blocks

from lib.pipeline import say
from lib.project import ROOT
from lib.util.errors import UserError
from lib.util.files import write_atomic


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{folder}: git {arguments[0]} failed ({done.stderr.strip()}); a record needs a git checkout")
    return done.stdout.strip()


def clean_commit(root: Path) -> str:
    """The commit of a checkout without changes; `UserError` names the files that changed."""
    if Path(git(root, "rev-parse", "--show-toplevel")).resolve() != root.resolve():
        raise UserError(f"{root}: lies inside another git repository; record in a checkout of its own")
    if changed := git(root, "status", "--porcelain").splitlines():
        listed = ", ".join(line.split(maxsplit=1)[-1] for line in changed[:4])
        more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
        raise UserError(f"{root}: differs from its commit in {listed}{more}; commit that or stash it, then record")
    return git(root, "rev-parse", "HEAD")


def clone_of(root: Path, commit: str, asked: Sequence[str] = ()) -> Path:
    """A clone of the commit: the one that a stopped record with the same arguments left, or a new one."""
    arguments = hashlib.sha256(json.dumps(list(asked)).encode()).hexdigest()
    folder = root / "outputs" / "recording" / f"{commit[:12]}-{arguments[:8]}"
    code = ("status", "--porcelain", "--", ".", ":!outputs", ":!README.md")
    if folder.exists() and git(folder, "rev-parse", "HEAD") == commit and not git(folder, *code):
        return folder
    for other in folder.parent.glob("*"):  # another part of the same commit may be under way
        if other.stem == folder.name or not other.name.startswith(commit[:12]):
            shutil.rmtree(other, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_suffix(".new")
    git(root, "clone", "--quiet", "--no-checkout", str(root), str(unfinished))
    git(unfinished, "checkout", "--quiet", "--detach", commit)
    os.rename(unfinished, folder)
    return folder


def continue_in_clone(arguments: Sequence[str]) -> None:
    """Replace this process by the same command in a clone of the commit, which copies its record back here."""
    folder = clone_of(ROOT, clean_commit(ROOT), arguments)
    say(f"recording in {folder}")
    command = [sys.executable, "tests/record", *arguments, "--into", str(ROOT)]
    os.chdir(folder)
    os.execve(sys.executable, command, os.environ | {"PYTHONPATH": str(folder)})


def replace_record(new: Path, root: Path) -> None:
    """Replace `root`'s record by the folder `new`, and update the quotes of it in the README."""
    target, staged, old = (root / "outputs" / name for name in ("record", ".record-new", ".record-old"))
    for folder in (staged, old):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(new, staged)
    for path in target.glob("gpu.*"):  # which may have been recorded meanwhile
        shutil.copy(path, staged)
    readme = with_blocks((root / "README.md").read_text(), readme_blocks(staged))
    if target.exists():
        os.rename(target, old)
    os.rename(staged, target)
    shutil.rmtree(old, ignore_errors=True)
    write_atomic(root / "README.md", readme)
