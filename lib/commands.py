"""The options of every command, from commands.toml. Nothing here takes long to import: a command parses before it
imports what it works with, and answers `--help` and mistakes at once."""

import argparse
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TABLE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
SETTINGS = Path(__file__).with_name("settings.txt")  # written by tests/test_commands.py, from the presets
TYPES = {"int": int, "float": float}


def parser_of(name: str) -> argparse.ArgumentParser:
    """The parser of `python -m lib.NAME`."""
    options = dict(TABLE["commands"][name])
    about, raw = options.pop("about"), argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(f"python -m lib.{name}", description=about, formatter_class=raw)
    add_options(parser, options)
    return parser


def add_options(parser: argparse.ArgumentParser, options: Mapping[str, Mapping[str, Any]]) -> None:
    """Options by name, with what a command adds to them. Where settings can be changed, help ends with their names:
    give the parser a formatter that keeps lines."""
    for name, own in options.items():
        option = TABLE["options"][name] | own
        flags, kind = option.pop("flags", [f"--{name}"]), TYPES.get(option.pop("type", ""), str)
        parser.add_argument(*flags, **option | ({} if "action" in option else {"type": kind}))
    if "set" in options:
        parser.epilog = SETTINGS.read_text()
