"""What every command says of itself, at once: its help, its options, and the settings that the presets have."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lib.commands import SETTINGS, TABLE, parser_of
from lib.plan import GPUS
from lib.presets import PRESETS
from lib.superres.resolver import VOCODERS, Restoration
from lib.util.configs import flat

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {name: f"lib.{name}" for name in TABLE["commands"]}
RUN_WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = sys.modules["numpy"] = sys.modules["papermill"] = None  # importing them raises
for name in sys.argv.pop(1).split():
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        print(name, "ended with", ended.code)
"""


def test_help_and_wrong_options_are_answered_before_anything_slow_is_imported():
    for option, code in (("--help", 0), ("--no-such-option", 2)):
        program = [sys.executable, "-c", RUN_WITHOUT_TORCH, " ".join(COMMANDS.values()), option]
        done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        ended = [line for line in done.stdout.splitlines() if "ended with" in line]
        assert ended == [f"{module} ended with {code}" for module in COMMANDS.values()]


def test_a_letter_and_a_name_mean_the_same_in_every_command():
    """And every command that writes takes -o."""
    kinds = {}
    for name in COMMANDS:
        actions = {action.dest: action for action in parser_of(name)._actions}
        assert name == "plan" or "-o" in actions["out"].option_strings
        for flag, action in ((flag, a) for a in actions.values() for flag in a.option_strings or [a.dest]):
            kind = (action.dest, type(action), action.type, action.choices)
            assert kinds.setdefault(flag, kind) == kind, (name, flag)
    assert all(TABLE["commands"][name]["about"] in parser_of(name).format_help() for name in COMMANDS)
    assert set().union(*TABLE["commands"].values()) - {"about"} == set(TABLE["options"])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(name):
    assert all(action.help for action in parser_of(name)._actions)


def test_what_the_table_repeats_is_what_the_code_says():
    options = TABLE["options"]
    assert [options[name].get("default") for name in ("steps", "seed", "cutoff")] == [0, 0, None]
    assert Restoration() == Restoration(steps=0, seed=0, cutoff=None)
    assert tuple(options["vocoder"]["choices"]) == VOCODERS
    assert f"one of {', '.join(PRESETS)};" in options["preset"]["help"]
    assert options["gpu"]["choices"] == list(GPUS)


def settings() -> str:
    """Every address by section, and what the presets differ in."""
    values = {name: {a: v for a, v in flat(preset).items() if a != "name"} for name, preset in PRESETS.items()}
    sections: dict[str, list[str]] = {}
    for address in dict.fromkeys(address for preset in values.values() for address in preset):
        section, _, name = address.rpartition(".")
        sections.setdefault(section, []).append(name)
    lines = ["names for --set, as SECTION.NAME=VALUE:"]
    sections["train.loss"].append("own")  # which is empty in every preset
    for section, names in sections.items():
        indents = {"initial_indent": f"  {section or '(no section)':<24}", "subsequent_indent": " " * 26}
        lines += textwrap.wrap(" ".join(names), 110, break_long_words=False, **indents)
    differing = [a for a in values["full"] if len({repr(preset[a]) for preset in values.values() if a in preset}) > 1]
    rows = [[a, *(str(preset[a]) for preset in values.values())] for a in differing if not a.startswith("record.")]
    lines += ["", "what the presets differ in:"]
    lines += [f"  {row[0]:<44}" + "".join(f"{cell:<12}" for cell in row[1:]).rstrip() for row in [["", *values], *rows]]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def test_help_lists_the_settings_by_section_and_what_the_presets_differ_in():
    """They are kept in a file, as the presets take seconds to import. This test writes it again."""
    before, now = SETTINGS.read_text(), settings()
    if before != now:
        SETTINGS.write_text(now)
    assert before == now, f"{SETTINGS} was out of date and has been written again; commit it"
    for name in ("pipeline", "train"):
        assert now in parser_of(name).format_help()
    assert "  train.loss " in now
    assert "  data.clip_seconds                           2.0         4.0         4.0         16.0" in now
