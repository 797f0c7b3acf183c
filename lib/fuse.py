"""Fuse two files into one with a trained run. More: `--help`."""

from lib.commands import parser_of

if __name__ == "__main__":  # at once: what is imported below takes seconds
    parser_of("fuse").parse_args()

import argparse
import itertools
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lib.audio.chunks import chunk_starts, crossfaded, reading
from lib.audio.decode import AudioError, mixed, read_windows
from lib.audio.files import AudioWriter, check_audio, save_audio
from lib.audio.levels import Meter, decibels, mean_loudness
from lib.codec.codec import Codec, load_codec, placed
from lib.listening.render import Settings, follow_recipe, render
from lib.model.fusion import FusionModel, load_model
from lib.superres.resolver import Restoration, SuperResolver, Written, restore_file
from lib.training.run import Run
from lib.util.errors import UserError, exit_on_user_error
from lib.util.files import writing
from lib.util.provenance import versions

CHUNK_SECONDS, OVERLAP_SECONDS = 16, 1  # the clip length of the full preset, and what is crossfaded
File = str | Path


def fuse_files(
    input: File,
    target: File,
    out: File,
    run: Run,
    codec: Codec,
    *,
    which: str = "best",
    mono: bool = False,
    whole_band: bool = True,
    level: str | None = None,
) -> AudioWriter:
    """Fuse two audio files; `out` appears when it is complete, in stereo if one of them is, unless `mono`. Returns its
    closed writer, with length and level. `level`: a policy of `AudioWriter`, whose `loudness` is the mean of what is
    fused of both files, at the codec's rate. `UserError` for unusable files and a run of another codec."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(run, which, codec_fingerprint=codec.fingerprint).to(device)
    paths = (input, target)
    _check_out(out, paths)
    infos = [check_audio(path) for path in paths]  # whose mean decides the masks
    rate, chunk, overlap = (seconds * codec.sample_rate for seconds in (1, CHUNK_SECONDS, OVERLAP_SECONDS))
    num_samples = min(info.samples_at(rate) for info in infos)
    starts = chunk_starts(num_samples, chunk, overlap)
    mixes = [info.channels != 2 for info in infos]
    channels = 1 if mono or all(mixes) else 2

    windows = [(start, min(chunk, num_samples - start)) for start in starts]
    meters = [Meter(rate, 2) for _ in paths]  # mono is heard from two loudspeakers
    wavs = (read_windows(path, windows, rate, mix=mix) for path, mix in zip(paths, mixes, strict=True))
    pairs = ([wav.expand(2, -1)[None] for wav in pair] for pair in zip(*wavs, strict=True))
    music = reading(pairs, starts, num_samples, rate, "fusing")

    def fused(number: int, clips: Sequence[Tensor]) -> Tensor:
        for meter, clip in zip(meters, clips, strict=True):
            meter.add(clip[0, :, overlap if number else 0 :].T.numpy())
        clips = (clip.to(device) if channels == 2 else clip.mean(dim=1, keepdim=True).to(device) for clip in clips)
        return mixed(fuse_clips(*clips, model, codec, whole_band)[0].cpu(), channels)

    with AudioWriter(out, rate, channels, level) as writer, placed(codec, device), music as chunks:
        for piece in crossfaded(itertools.starmap(fused, enumerate(chunks)), overlap):
            writer.write(piece)
        writer.loudness = mean_loudness(*(meter.level().lufs for meter in meters))
        writer.loudness -= decibels(2) / 2 if channels == 1 else 0  # a meter counts one channel once
    return writer


def fuse_and_restore(
    input: File, target: File, out: File, run: Run, codec: Codec, resolver: SuperResolver, **options: Any
) -> Written:
    """Fuse two audio files, with the options of `fuse_files`; write 48 kHz with the upper band restored."""
    _check_out(out, (input, target))
    level = options.pop("level", None)
    with writing(out, "choose an existing folder you may write to"):
        folder = tempfile.TemporaryDirectory(prefix=".fused-", dir=Path(out).parent)
    with folder as name:
        draft = Path(name) / "fusion.wav"
        try:  # at the level of the sources, which limit the restored band, unless another is wanted
            policy = "lufs" if level == "lufs" else None
            fused = fuse_files(input, target, draft, run, codec, level=policy, **options)
            settings, sources = Restoration(level=level), [check_audio(path, mix=False) for path in (input, target)]
            written, cutoff = restore_file(draft, out, resolver, settings, sources=sources, loudness=fused.loudness)
        except AudioError as error:
            problem = error.problem.replace("or give --cutoff", "without --superres")
            raise AudioError(out, problem) if error.path == draft else error from None
        written.change += fused.change
        return written, cutoff


def _check_out(out: File, clips: Iterable[File]) -> None:
    if Path(out).resolve() in [Path(path).resolve() for path in clips]:
        raise UserError(f"{out}: is one of the two clips; choose another output file")


def fuse_clips(input: Tensor, target: Tensor, model: FusionModel, codec: Codec, whole_band: bool = True) -> Tensor:
    """Waveforms `[B, C, N]` twice → fused waveforms, by `render`."""
    settings = Settings(whole_band=whole_band)
    return torch.stack([render(model, codec, *pair, settings).wav for pair in zip(input, target, strict=True)])


def main() -> None:
    parser = parser_of("fuse")
    options = parser.parse_args()
    if options.recipe:
        if options.input or options.checkpoint or options.superres or options.mono or options.narrow or options.level:
            parser.error("--recipe reproduces a favourite; give it -o, --run and --codec only")
    elif not (options.target and options.run):
        parser.error("give INPUT, TARGET and --run, or --recipe")
    with exit_on_user_error():
        sys.exit(fuse_recipe(options) if options.recipe else fuse(options))


def fuse(options: argparse.Namespace) -> int:
    run = Run.open(options.run)
    codec = load_codec(options.codec or run.codec_source)
    files = options.input, options.target, options.out
    chosen = {"which": options.checkpoint or "best", "mono": options.mono, "whole_band": not options.narrow}
    chosen["level"] = options.level or "lufs"
    if options.superres is None:
        written = fuse_files(*files, run, codec, **chosen)
        seconds = -(-written.num_samples // written.sample_rate)
        how = f"in {len(chunk_starts(seconds, CHUNK_SECONDS, OVERLAP_SECONDS))} chunk(s)"
    else:
        resolver = SuperResolver(options.superres)
        written, cutoff = fuse_and_restore(*files, run, codec, resolver, **chosen)
        how = f"at 48 kHz, restored above {cutoff / 1000:.1f} kHz"
    print(f"{written}, {how}")
    return 0


def fuse_recipe(options: argparse.Namespace) -> int:
    """Returns the exit code: 1 if the samples differ from the recipe's output."""
    if Path(options.out).suffix.lower() != ".wav":
        raise UserError(f"{options.out}: only a .wav holds the samples as they are; choose a name that ends in .wav")
    result = follow_recipe(options.recipe, run=options.run, codec=options.codec)
    _check_out(options.out, result.files)
    save_audio(options.out, result.wav, result.sample_rate)
    there, here = (f"torch {v.get('torch')}, commit {v.get('commit')}" for v in (result.versions, versions()))
    why = f"it is from {there}, this from {here}; or the processor differs, or the recipe was edited"
    found = "equal to the recipe's output bit for bit" if result.equal else f"NOT equal to the recipe's output: {why}"
    print(f"{options.out}: {result.wav.shape[-1] / result.sample_rate:.2f} s, {found}")
    return int(not result.equal)


if __name__ == "__main__":
    main()
