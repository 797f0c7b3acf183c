"""Files in, files at 48 kHz out, of any length, rate and number of channels, in memory that does not grow with them."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from lib.audio.files import AUDIO_SUFFIXES, AudioError, AudioInfo, AudioWriter, check_audio, load_audio
from lib.superres.mel import SAMPLE_RATE
from lib.superres.resolver import FULL, Restoration, SuperResolver, bin_powers, clip_starts, edge_of, within_reach
from lib.util.ahead import map_ahead
from lib.util.errors import UserError

BLOCK_SECONDS = 60  # read at once where a file's band is looked for


@dataclass(frozen=True)
class Restored:
    """What was written: the file, its length in samples and channels, where its own band ended (Hz), its peak."""

    path: Path
    num_samples: int
    channels: int
    cutoff: float
    peak: float


def restore_file(path: str | Path, out: str | Path, resolver: SuperResolver, settings: Restoration) -> Restored:
    """Restore the upper band of a file; writes `out` (48 kHz, as many channels) when all of it is done.

    Clips overlap and are crossfaded; only what lies above the file's own band is the model's, the rest is
    the file, resampled. Raises `AudioError` for a file that cannot be read or written, and where its band is full.
    """
    path, out = Path(path), Path(out)
    if out.resolve() == path.resolve():
        raise UserError(f"{out}: is the input itself; choose another output file")
    info = check_audio(path, min_samples=0).info
    total = info.samples_at(SAMPLE_RATE)
    cutoff = settings.cutoff or within_reach(file_band(info))
    if cutoff > FULL:
        fault = f"its band, or what a resampler left of its images, reaches {cutoff / 1000:.1f} kHz already"
        raise AudioError(path, f"{fault}; leave it as it is, or give --cutoff")
    if settings.cutoff and settings.cutoff > info.sample_rate / 2:
        most = f"at {info.sample_rate} Hz nothing above {info.sample_rate / 2000:g} kHz is its own"
        raise AudioError(path, f"cutoff={settings.cutoff:g} is not allowed: {most}; give a lower --cutoff, or none")
    starts = clip_starts(total, resolver.clip_length)

    def read(start: int) -> Tensor:
        wav = load_audio(path, start, resolver.clip_length, SAMPLE_RATE, mix=False)  # [C, n]
        return torch.nn.functional.pad(wav, (0, resolver.clip_length - wav.shape[-1]))

    peak, left = 0.0, total
    ahead = contextlib.closing(map_ahead(read, starts, threads=1))
    with AudioWriter(out, SAMPLE_RATE, info.channels) as writer, ahead as clips:
        bar = tqdm(clips, desc=path.name, unit="clip", total=len(starts), disable=len(starts) < 2)
        for piece in resolver.restored(bar, cutoff, settings):
            piece = piece[:, :left]
            left -= piece.shape[1]
            peak = max([peak, *piece.abs().amax(dim=1).tolist()]) if piece.numel() else peak
            writer.write(piece)
    return Restored(out, total, info.channels, cutoff, peak)


def file_band(info: AudioInfo) -> float:
    """Where a file's band ends, in Hz, at its own rate: the highest bin that any minute of it has within 70 dB of the
    loudest minute's loudest."""
    rate, block = info.sample_rate, BLOCK_SECONDS * info.sample_rate
    starts = (min(start, max(0, info.num_samples - block)) for start in range(0, info.num_samples, block))
    clips = (load_audio(info.path, start, block, rate, mix=False) for start in starts)  # the last one is a whole block
    return edge_of(torch.stack([bin_powers(clip) for clip in clips]), rate)


def restore_folder(
    folder: str | Path,
    out: str | Path,
    resolver: SuperResolver,
    settings: Restoration,
    report: Callable[[Restored], None] = lambda restored: None,
) -> tuple[list[Restored], list[tuple[Path, str]]]:
    """Restore every audio file below `folder` into `out`, under the same names, as .wav.

    Returns what was written, of which `report` is told at once, and file and reason of what was skipped. `UserError`
    where no file can be used, and where a result would lie among the files.
    """
    folder, out = Path(folder), Path(out)
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES and p.is_file())
    targets = [out / path.relative_to(folder).with_suffix(".wav") for path in paths]
    if any(target.resolve().is_relative_to(folder.resolve()) for target in (out, *targets)):
        raise UserError(f"{out}: results would lie among the files of {folder}; choose another output folder")
    done, skipped, names = [], [], {}
    for path, target in zip(paths, targets, strict=True):
        if target in names:
            skipped.append((path, f"{names[target].name} goes by the same name; rename one of them"))
            continue
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            restored = restore_file(path, target, resolver, settings)
        except AudioError as error:
            skipped.append((path, error.problem))
            continue
        except OSError as error:
            if not done:
                raise UserError(f"{out}: cannot be written ({error.strerror}); choose another output folder") from None
            skipped.append((path, f"{target} cannot be written ({error.strerror})"))
            continue
        done.append(restored)
        names[target] = path
        report(restored)
    if not done:
        reasons = "; ".join(f"{path.name}: {problem}" for path, problem in skipped[:3])
        raise UserError(f"{folder}: no usable audio file ({reasons or 'none there'})")
    return done, skipped
