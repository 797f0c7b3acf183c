"""The music files below a folder, for pairs, projects and super-resolution."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lib.audio.files import AUDIO_SUFFIXES


@dataclass(frozen=True)
class Skipped:
    """A file or folder that is not used. `path`: posix, relative to the folder that was walked."""

    path: str
    reason: str


def walk_audio(root: Path, ignore: Iterable[Path] = ()) -> tuple[list[str], list[Skipped]]:
    """Music files below `root`, by suffix, as sorted posix paths relative to it; all other files with the reason.
    Hidden files and folders, and others in `ignore`, are left out. Links are followed, but no folder is entered twice.
    A broken link counts as a file: `check_audio` names it."""
    files, skipped, seen = [], [], set()
    ignored = {path.resolve() for path in ignore}

    def unreadable(error: OSError) -> None:
        relative = Path(error.filename).relative_to(root).as_posix()
        skipped.append(Skipped(relative, f"folder cannot be read ({error.strerror}); check its permissions"))

    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=unreadable):
        if (place := os.path.realpath(folder)) in seen:
            subfolders.clear()
            continue
        seen.add(place)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for path in (Path(folder, name) for name in names if not name.startswith(".")):
            relative = path.relative_to(root).as_posix()
            if path.suffix.lower() in AUDIO_SUFFIXES:
                files.append(relative)
            elif path.resolve() not in ignored:
                skipped.append(Skipped(relative, "not WAV, FLAC, OGG or MP3 by its name; convert it if it is music"))
    return sorted(files), skipped
