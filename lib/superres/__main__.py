"""Restore the upper band of audio files at 48 kHz.

python -m lib.superres IN.wav -o OUT.wav --run outputs/demo/superres
python -m lib.superres FOLDER -o FOLDER --run outputs/demo/superres
"""

import argparse
import sys
from pathlib import Path

import torch

from lib.superres.mel import SAMPLE_RATE
from lib.superres.resolver import VOCODERS, Restoration, Restored, SuperResolver, restore_file, restore_folder
from lib.util.errors import exit_on_user_error


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lib.superres", description="Restore the upper band of audio files at 48 kHz."
    )
    parser.add_argument("input", help="audio file of any rate, length and number of channels, or a folder of them")
    parser.add_argument("-o", "--out", required=True, help="output file; .wav holds any level. For a folder: a folder")
    parser.add_argument("--run", required=True, help="trained super-resolver, such as outputs/demo/superres")
    parser.add_argument("--steps", type=int, default=Restoration.steps, help="of the sampler (default: 50)")
    parser.add_argument(
        "--guidance", type=float, default=Restoration.guidance, help="towards the condition; 1: none (default: 1.5)"
    )
    parser.add_argument("--vocoder", choices=VOCODERS, default=VOCODERS[0], help=f"default: {VOCODERS[0]}, untrained")
    parser.add_argument("--seed", type=int, default=Restoration.seed)
    parser.add_argument("--cutoff", type=float, help="Hz, where the files' own band ends (default: found in each)")
    options = parser.parse_args()
    with exit_on_user_error():
        settings = Restoration(options.steps, options.guidance, options.seed, options.cutoff)
        resolver = SuperResolver(
            options.run, vocoder=options.vocoder, device="cuda" if torch.cuda.is_available() else "cpu"
        )
        if not Path(options.input).is_dir():
            report(restore_file(options.input, options.out, resolver, settings))
            return
        _, skipped = restore_folder(options.input, options.out, resolver, settings, report)
        for path, problem in skipped:
            print(f"skipped {path}: {problem}", file=sys.stderr)


def report(restored: Restored) -> None:
    size = f"{restored.num_samples / SAMPLE_RATE:.2f} s, {restored.channels} channel(s)"
    print(f"{restored.path}: {size}, restored above {restored.cutoff / 1000:.1f} kHz, peak {restored.peak:.3f}")


if __name__ == "__main__":
    main()
