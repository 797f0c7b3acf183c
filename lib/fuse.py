"""Fuse two files into one with a trained run.

    python -m lib.fuse INPUT TARGET -o OUT.wav --run outputs/demo

Files of any length: they are read, fused and written in chunks of 16 s that overlap by a second and are crossfaded, so
memory does not grow with the length. The output is exactly as long as the shorter file, mono, 24 kHz.
"""

import argparse
import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from lib.ahead import map_ahead
from lib.audio import SAMPLE_RATE, AudioWriter, check_audio, load_audio
from lib.codec import Codec, load_codec
from lib.errors import UserError, exit_on_user_error
from lib.fusion import FusionModel
from lib.runs import Run

CHUNK = 16 * SAMPLE_RATE  # samples: the clip length that the seeds' system works on
OVERLAP = 1 * SAMPLE_RATE


@dataclass(frozen=True)
class FuseReport:
    """What was written: the file, its length in samples, the number of chunks, its peak (linear)."""

    path: Path
    num_samples: int
    chunks: int
    peak: float


def fuse_files(
    input_path: str | Path,
    target_path: str | Path,
    out_path: str | Path,
    run: Run,
    codec: Codec,
    *,
    which: str = "best",
) -> FuseReport:
    """Fuse two audio files; writes `out_path` when all of it is done.

    A .wav is written as 32-bit float and may pass full scale; other formats are refused above it (`AudioError`).
    Raises `UserError` for unusable files and for a run that was trained on another codec's latents.
    """
    model = run.load_model(which, codec_fingerprint=codec.fingerprint)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    if isinstance(codec, torch.nn.Module):
        codec.to(device)
    out_path = Path(out_path)
    if out_path.resolve() in (Path(input_path).resolve(), Path(target_path).resolve()):
        raise UserError(f"{out_path}: is one of the two clips; choose another output file")
    paths = (input_path, target_path)
    with contextlib.closing(map_ahead(check_audio, paths, threads=2)) as checks:
        num_samples = min(report.num_samples for report in checks)
    bounds = chunk_bounds(num_samples)

    def read(bound: tuple[int, int]) -> list[Tensor]:
        start, end = bound
        return [load_audio(path, start, end - start)[None] for path in paths]

    peak = 0.0
    with AudioWriter(out_path) as writer, contextlib.closing(map_ahead(read, bounds, threads=1)) as chunks:
        fused = (fuse_clips(*(clip.to(device) for clip in clips), model, codec)[0].cpu() for clips in chunks)
        for piece in crossfaded(bounds, fused):
            peak = max(peak, float(piece.abs().max()))
            writer.write(piece)
    return FuseReport(out_path, num_samples, len(bounds), peak)


@torch.inference_mode()
def fuse_clips(input: Tensor, target: Tensor, model: FusionModel, codec: Codec) -> Tensor:
    """Waveforms `[B, 1, N]` twice → fused waveform `[B, 1, N]`."""
    latents = model(*codec.encode(torch.cat([input, target])).chunk(2)).latents
    return codec.decode(latents, length=input.shape[-1])


def chunk_bounds(num_samples: int, chunk: int = CHUNK, overlap: int = OVERLAP) -> list[tuple[int, int]]:
    """Start and end of each chunk. Neighbours share `overlap` samples; the last ends at `num_samples`."""
    starts = range(0, max(1, num_samples - overlap), chunk - overlap)
    return [(start, min(start + chunk, num_samples)) for start in starts]


def crossfaded(bounds: list[tuple[int, int]], chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    """The pieces `[1, n]` of one signal, from overlapping chunks `[1, end - start]`, taken one by one.

    The fade is linear in amplitude: both sides of an overlap are renderings of the same seconds, so they add in phase.
    """
    tail = None  # what the next chunk's beginning is faded into
    bar = tqdm(chunks, desc="fusing", unit="chunk", total=len(bounds), disable=len(bounds) < 2)
    for i, wav in enumerate(bar):
        if tail is not None:
            n = tail.shape[1]
            rise = (torch.arange(n) + 0.5) / n
            wav = torch.cat([wav[:, :n] * rise + tail * (1 - rise), wav[:, n:]], dim=1)
        shared = bounds[i][1] - bounds[i + 1][0] if i + 1 < len(bounds) else 0
        tail = wav[:, wav.shape[1] - shared :]
        yield wav[:, : wav.shape[1] - shared]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lib.fuse", description="Fuse two audio files with a trained run.")
    parser.add_argument("input", help="audio file: WAV, FLAC, OGG or MP3")
    parser.add_argument("target", help="audio file to fuse it with")
    parser.add_argument("-o", "--out", required=True, help="output file; .wav holds any level")
    parser.add_argument("--run", required=True, help="run directory, such as outputs/demo")
    parser.add_argument("--codec", help="mdct, encodec or a directory of EnCodec weights (default: the run's codec)")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best", help="default: best")
    options = parser.parse_args()
    with exit_on_user_error():
        run = Run.open(options.run)
        trained_on = run.config.get("codec")
        if not isinstance(trained_on, dict) or not isinstance(trained_on.get("name"), str):
            raise UserError(f"{run.path / 'config.json'}: damaged, it names no codec; restore it or train again")
        codec = load_codec(options.codec or trained_on["name"])
        report = fuse_files(options.input, options.target, options.out, run, codec, which=options.checkpoint)
        seconds = report.num_samples / SAMPLE_RATE
        print(f"{report.path}: {seconds:.2f} s in {report.chunks} chunk(s), peak {report.peak:.3f}")


if __name__ == "__main__":
    main()
