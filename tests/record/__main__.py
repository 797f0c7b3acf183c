"""Measure what the README quotes, from a clean commit, into outputs/record/.

    python tests/record --preset demo [--parts fusion ...] [--data DIR] [--codec NAME|DIR] [--set record.steps=200]

Everything is measured in a clone of the commit, in outputs/recording/, so neither older files nor later edits matter.
Parts that are not measured stay; record.json has commit, preset, codec, music and machine of each part:

    bench       bench.json         speed compared with stock PyTorch modules, and bench.md, the same as tables
    ablations   ablation.json      every run of the grid, and of the named settings at full depth
                schedule.json      every run of the whole schedule in miniature, and the verdicts on it
    explosion   explosion.json     what ends a training and what does not, on real music and songs: about six hours
    fusion      fusion.json        notebook 04 on real music, whatever --data says: seeds, and what each change brings
    superres    superres.json      a small super-resolver on more music: held-out songs and albums, seeds, perception
    notebooks   constructed.json   whether the figure of merit ranks outputs right whose worth is known
                full_size.json     parameters and operations of the super-resolver at the document's sizes
                summary.json       facts and tables of the notebooks, and the figures in FIGURES
                claims.json        the audit of every claim, and claims.md, the same as a table
    variations  variations.json    the demo with other songs and seeds, on one thread, and without vector instructions
    by hand     gpu.json, gpu.png  only where a GPU trained runs for it: their figure of merit over time

A stopped record resumes on the same commit and starts again on another. What takes a GPU is trained and recorded there:

    python -m lib.train --preset full --codec mdct --data data/music --follow 24 --out outputs/long [--set ...]
    python tests/record --preset full --codec mdct --data data/music --followed outputs/long [RUN ...]
"""

import argparse
import json
import sys
from pathlib import Path

import clones
from parts import PARTS, record, record_followed

from lib.commands import add_options
from lib.pipeline import NotebookError, parse_overrides
from lib.presets import load_preset
from lib.project import RECORD, ROOT, open_project
from lib.util.errors import UserError, exit_on_user_error


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python tests/record", description=__doc__, formatter_class=raw)
    add_options(parser, {"preset": {}, "data": {}, "codec": {}, "set": {}})
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="measure these, and keep the others")
    parser.add_argument("--followed", nargs="+", metavar="RUN", help="record runs of lib.train --follow, and only them")
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)  # in the clone: whose record is to be replaced
    options = parser.parse_args()
    with exit_on_user_error():
        overrides = parse_overrides(options.set, options.codec)
        data = str(Path(options.data).resolve()) if options.data else ""
        if options.followed:
            record_followed(open_project(load_preset(options.preset, overrides), data), options.followed, ROOT)
            return
        if options.into is None:
            settings = [part for name, value in overrides.items() for part in ("--set", f"{name}={json.dumps(value)}")]
            clones.continue_in_clone(["--preset", options.preset, "--data", data, *settings, "--parts", *options.parts])
        if options.into.resolve() == ROOT:
            raise UserError(f"--into {options.into}: is where this command runs; leave it out, and a clone is made")
        try:
            record(options.preset, overrides, data, options.into / "data" / "music", options.parts)
        except NotebookError as error:
            sys.exit(f"error: {error}")
        clones.replace_record(RECORD, options.into)
        print(f"record: {options.into / 'outputs' / 'record'}; `make notebooks` stores what notebooks show of it")


if __name__ == "__main__":
    main()
