"""Restore the upper band of audio files at 48 kHz.

python -m lib.superres IN.wav -o OUT.wav --run outputs/demo/superres
python -m lib.superres FOLDER -o FOLDER --run outputs/demo/superres
"""

import argparse
import sys
from pathlib import Path

import torch

from lib.audio.files import GAIN, AudioWriter
from lib.superres.mel import SAMPLE_RATE
from lib.superres.resolver import DEFAULTS, VOCODERS, Restoration, SuperResolver, restore_file, restore_folder
from lib.util.errors import exit_on_user_error


def main() -> None:
    parser = argparse.ArgumentParser("python -m lib.superres", description=__doc__.splitlines()[0])
    parser.add_argument("input", help="audio file of any sample rate, length and number of channels, or a folder")
    parser.add_argument("-o", "--out", required=True, help="output file (.wav holds any level), or folder for a folder")
    parser.add_argument("--run", required=True, help="folder of a trained super-resolver, e.g. outputs/demo/superres")
    parser.add_argument(
        "--steps",
        type=int,
        default=DEFAULTS.steps,
        help="of the sampler, which adds detail drawn at random: 10, or 0 for none (default: %(default)s)",
    )
    parser.add_argument("--vocoder", choices=VOCODERS, help="default: hifigan where the run has trained it")
    parser.add_argument("--gain", type=float, default=0.0, metavar="DB", help=GAIN)
    parser.add_argument("--seed", type=int, default=DEFAULTS.seed, help="default: %(default)s")
    parser.add_argument("--cutoff", type=float, help="Hz, where the files' own band ends (default: measured in each)")
    options = parser.parse_args()
    with exit_on_user_error():
        settings = Restoration(options.steps, options.seed, options.cutoff, options.gain)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        resolver = SuperResolver(options.run, vocoder=options.vocoder, device=device)
        if not Path(options.input).is_dir():
            report(*restore_file(options.input, options.out, resolver, settings))
            return
        for path, problem in restore_folder(options.input, options.out, resolver, settings, report):
            print(f"skipped {path}: {problem}", file=sys.stderr)


def report(written: AudioWriter, cutoff: float) -> None:
    size = f"{written.num_samples / SAMPLE_RATE:.2f} s, {written.channels} channel(s)"
    print(f"{written.path}: {size}, restored above {cutoff / 1000:.1f} kHz, {written.level}")


if __name__ == "__main__":
    main()
