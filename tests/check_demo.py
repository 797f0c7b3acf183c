"""Is the page of `make demo` whole? Every section is there and none failed, every player has sound.

    python tests/check_demo.py outputs/demo/index.html

Prints what is wrong, a line each, and exits with 1 if anything is; CI runs it after `make demo`.
"""

import base64
import io
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import soundfile

from lib.report.report import FIRST, ORDER

SECTIONS = [FIRST, "summary", *ORDER[1:], "claims"]
WITH_PLAYERS = ("01_encoding", FIRST, "06_super_resolution")
SILENT = 1e-3  # RMS; the demo's songs are a hundred times louder
SHORT = 0.5  # seconds


class Reader(HTMLParser):
    """Sections in order, whether each failed, and the players of each."""

    def __init__(self, source: str):
        super().__init__()
        self.sections: dict[str, bool] = {}
        self.players: dict[str, list[dict]] = {}
        self.unfinished = False
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "section":
            self.sections[attributes["id"]] = attributes.get("class") == "failed"
            self.players[attributes["id"]] = []
        elif tag == "audio":
            self.players[next(reversed(self.players))].append(attributes)
        self.unfinished |= attributes.get("class") == "to-come"


def problems(source: str) -> list[str]:
    """What is wrong with the page."""
    page = Reader(source)
    found = [] if source.rstrip().endswith("</html>") else ["the page is cut off"]
    if page.unfinished:
        found.append("the page says that it is not finished")
    if list(page.sections) != SECTIONS:
        found.append(f"sections are {', '.join(page.sections)}; they must be {', '.join(SECTIONS)}")
    found += [f"{name}: failed" for name, failed in page.sections.items() if failed]
    found += [f"{name}: no player" for name in WITH_PLAYERS if not page.players.get(name)]
    for name, players in page.players.items():
        for player in players:
            if fault := fault_of(player.get("src", "")):
                found.append(f"{name}, player {player.get('aria-label')!r}: {fault}")
    return found


def fault_of(address: str) -> str:
    """What is wrong with a player's embedded sound; empty if nothing is."""
    match = re.fullmatch(r"data:audio/flac;base64,(.+)", address)
    if not match:
        return "no embedded sound"
    try:
        wav, rate = soundfile.read(io.BytesIO(base64.b64decode(match[1])))
    except (ValueError, soundfile.LibsndfileError) as error:
        return f"cannot be decoded ({error})"
    if len(wav) < SHORT * rate:
        return f"only {len(wav) / rate:.2f} s"
    level = float(np.sqrt(np.mean(np.square(wav))))
    return "" if level > SILENT else f"silent (RMS {level:.5f})"


def main() -> None:
    path = Path(sys.argv[1])
    found = problems(path.read_text()) if path.exists() else ["there is no such page"]
    for problem in found:
        print(f"{path}: {problem}")
    if found:
        sys.exit(1)
    players = sum(map(len, Reader(path.read_text()).players.values()))
    print(f"{path}: {len(SECTIONS)} sections, none failed, and {players} players with sound")


if __name__ == "__main__":
    main()
