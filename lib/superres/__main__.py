"""Restore the upper band of audio files at 48 kHz. More: `--help`."""

from lib.commands import parser_of

if __name__ == "__main__":  # at once: what is imported below takes seconds
    parser_of("superres").parse_args()

import sys
from pathlib import Path

from lib.audio.files import AudioWriter
from lib.superres.resolver import Restoration, SuperResolver, restore_file, restore_folder
from lib.util.errors import exit_on_user_error


def main() -> None:
    options = parser_of("superres").parse_args()
    with exit_on_user_error():
        settings = Restoration(options.steps, options.seed, options.cutoff, options.level)
        resolver = SuperResolver(options.run, vocoder=options.vocoder)
        if not Path(options.input).is_dir():
            report(*restore_file(options.input, options.out, resolver, settings))
            return
        for path, problem in restore_folder(options.input, options.out, resolver, settings, report):
            print(f"skipped {path}: {problem}", file=sys.stderr)


def report(written: AudioWriter, cutoff: float) -> None:
    print(f"{written}, restored above {cutoff / 1000:.1f} kHz")


if __name__ == "__main__":
    main()
