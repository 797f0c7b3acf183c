"""A trained super-resolver: clips in, clips with a restored upper band out, of any length."""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lib.audio.chunks import chunk_starts, crossfaded, reading
from lib.audio.decode import AudioError, Decoder, read_windows
from lib.audio.files import AudioReport, AudioWriter, check_audio, walk_audio
from lib.audio.levels import band_edge, level_of
from lib.superres.degradation import LOWEST
from lib.superres.mel import HOP, N_FFT, SAMPLE_RATE, bin_of, inverse_spectrum, known_bands, log_mel, spectrum
from lib.superres.training import NEEDED, PartConfig, load_part
from lib.superres.unet import TIMESTEPS, sample
from lib.superres.vocoder import griffin_lim
from lib.training.run import Run
from lib.util.configs import check, checked_dataclass, number, whole
from lib.util.errors import UserError
from lib.util.files import FIX, naming, writing

VOCODERS = ("griffin-lim", "hifigan")
MARGIN = 1 / 4  # share of a clip, at its end, that the next one replaces: the autoencoder's convolutions pad there
OVERLAP = 3 / 8  # share of a clip that overlaps the next: a fade, and the margin
TRANSITION = 12  # bins from the clip's own band to the restored one: 280 Hz
FULL = 0.9 * SAMPLE_RATE / 2  # Hz: a band that ends above it is complete
SILENT = 2**-16  # a sample below it is rounded to 0 in 16 bits
BATCH_SECONDS = 16  # of clips that are restored together
BLOCK_SECONDS = 60  # read at once to find where a file's band ends


@checked_dataclass
class Restoration:
    """How to restore. The same seed gives the same sound."""

    steps: whole(0, TIMESTEPS - 1) = 0  # of the sampler, for a draw; 0: what is expected, which is nearer
    seed: whole(0, 2**63 - 1) = 0
    cutoff: number(above=100, most=FULL) | None = None  # Hz, the end of the clip's band; None: measured
    level: Literal["lufs", "peak", "none"] | None = None  # of the file that is written, by `AudioWriter`'s policies


DEFAULTS = Restoration()
Written = tuple[AudioWriter, float]  # the closed writer of a file, with length and level, and the end of its band in Hz
Numbers = Sequence[int] | None  # of clips, which decide their random numbers; 0 to B − 1 by default
Sources = Sequence[tuple[Tensor, float]]  # clips `[B, 1, N]` that others are mixed of, and the end of their band in Hz


class SuperResolver:
    """The trained parts of a folder, in eval mode: its runs of `PARTS`. `vocoder`, 'hifigan' or 'griffin-lim' (which
    has no parameters), is HiFi-GAN by default if the folder has it; `device`, a GPU if there is one."""

    def __init__(self, folder: str | Path, *, vocoder: str | None = None, device: str | None = None):
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        folder, self.device = Path(folder), torch.device(device)
        if (folder / "superres" / "diffusion").exists():  # of a run of all notebooks
            folder /= "superres"
        vocoder = vocoder or VOCODERS[(folder / "hifigan" / "best").exists()]
        check(vocoder in VOCODERS, "vocoder", vocoder, f"one of {', '.join(VOCODERS)}")
        run, earlier = Run.open(folder / "diffusion"), {part: Run.open(folder / part) for part in NEEDED}
        self.completion, self.vae = (load_part(run, part).to(device) for part, run in earlier.items())
        self.denoiser = load_part(run, "diffusion").to(device)
        for part, other in earlier.items():
            if run.config.get(f"{part}_sha256") != other.weights_sha256():
                fix = "put that one back, or train the diffusion model again"
                raise UserError(f"{run.path}: was trained with another {part} than {other.path}; {fix}")
        with naming(run.path / "config.json", FIX):
            self.latent_scale = float(run.config["latent_scale"])
            self.clip_length = PartConfig(clip_seconds=run.config["train"]["clip_seconds"]).clip_length
            check(0 < self.latent_scale < math.inf, "latent_scale", self.latent_scale, "a finite number above 0")
        self.vocoder = load_part(Run.open(folder / vocoder), vocoder).to(device) if vocoder == "hifigan" else None

    @torch.inference_mode()
    def restore(
        self, low: Tensor, cutoff: float, settings=DEFAULTS, numbers: Numbers = None, sources: Sources = ()
    ) -> Tensor:
        """Clips `[B, 1, N]` at 48 kHz, unchanged below `cutoff` Hz, with a band above it: `[B, 1, N]`. N: `clip_length`
        or another multiple of eight mel frames. The seed and a clip's number decide its random numbers. The band is
        `limited` by the sources; what they lack is what is expected of them, and no more than their own tilt allows."""
        own = low.to(self.device)
        mel = self.predict_mel(own, cutoff, settings, numbers)
        if sources:
            mels = [(log_mel(wav.to(self.device)), end) for wav, end in sources]
            whole = [self.completion.complete(one, end) if end <= FULL else one for one, end in mels]
            mel = limited(mel, whole, cutoff, [end for _, end in sources])
        return join_bands(low, self.vocode(mel, own, cutoff, settings, numbers).to(low.device), cutoff)

    @torch.inference_mode()
    def predict_mel(self, low: Tensor, cutoff: float, settings: Restoration, numbers: Numbers = None) -> Tensor:
        """Log mel `[B, 1, 256, T]` of the whole band, for clips on the `device`: the expected one, or a draw of the
        diffusion model around it."""
        mel = self.completion.complete(log_mel(low), cutoff)
        if settings.steps:
            latents = self.latent_scale * self.vae.encode(mel)
            noise = drawn(torch.randn, latents.shape, settings, numbers).to(self.device)
            added = sample(self.denoiser, latents, mel, noise, steps=settings.steps)
            mel = self.vae.decode((latents + added) / self.latent_scale)
        return mel

    @torch.inference_mode()
    def vocode(
        self, mel: Tensor, low: Tensor, cutoff: float, settings: Restoration, numbers: Numbers = None, neural=True
    ) -> Tensor:
        """A waveform `[B, 1, N]` for a log mel: by HiFi-GAN if loaded and `neural`, else by Griffin-Lim over `low`."""
        if neural and self.vocoder is not None:
            return self.vocoder(mel)
        noise = drawn(torch.rand, (len(mel), N_FFT // 2 + 1, mel.shape[-1]), settings, numbers).to(self.device)
        return griffin_lim(mel, low, bin_of(cutoff), noise=noise)

    @property
    def batch_size(self) -> int:
        """How many clips are restored together."""
        return max(1, round(BATCH_SECONDS * SAMPLE_RATE / self.clip_length))

    def starts(self, num_samples: int) -> list[int]:
        """Start positions of the overlapping clips that cover a signal, in samples."""
        return chunk_starts(num_samples, self.clip_length, round(OVERLAP * self.clip_length))

    def restored(
        self, clips: Iterable[Tensor], cutoff: float, settings: Restoration = DEFAULTS, ends: Sequence[float] = ()
    ) -> Iterator[Tensor]:
        """Pieces `[C, n]` of a long signal, from clips `[1 + S, C, clip_length]` at its `starts`: of itself, and of S
        sources whose bands end at `ends` (Hz). Channels share random numbers. Crossfade gains follow from the added
        band: neighbouring clips agree on their own band."""
        length = self.clip_length

        def parts() -> Iterator[Tensor]:
            numbered = enumerate(clips)
            while batch := list(itertools.islice(numbered, self.batch_size)):
                parts = torch.stack([clip for _, clip in batch])  # [B, 1 + S, C, N]
                low, *sources = (part.flatten(0, 1)[:, None] for part in parts.unbind(1))  # [B · C, 1, N]
                numbers = [number for number, _ in batch for _ in range(parts.shape[2])]
                limits = list(zip(sources, ends, strict=True))
                full = self.restore(low, cutoff, settings, numbers=numbers, sources=limits)
                full, low = full.view_as(parts[:, 0]), parts[:, 0]
                yield from torch.cat([low, audible(low) * (full - low)], dim=1)

        for piece in crossfaded(parts(), round(OVERLAP * length), margin=round(MARGIN * length), keep_power=True):
            yield torch.add(*piece.chunk(2))  # the clips' own sound and the added band

    def restore_signal(self, wav: Tensor, settings: Restoration = DEFAULTS, sources: Sources = ()) -> Tensor:
        """A signal `[C, N]` at 48 kHz, restored; for a resampled one give its `band_edge` as the cutoff. Its band is
        limited by the `sources` that it is mixed of, `[C, N]` each."""
        cutoff = settings.cutoff or max(band_edge(wav), LOWEST)  # the lowest cutoff in training
        starts, ends = self.starts(wav.shape[-1]), [end for _, end in sources]
        whole = torch.stack([wav, *(source for source, _ in sources)])
        whole = torch.nn.functional.pad(whole, (0, starts[-1] + self.clip_length - wav.shape[-1]))
        clips = (whole[..., start : start + self.clip_length] for start in starts)
        return torch.cat(list(self.restored(clips, cutoff, settings, ends)), dim=1)[:, : wav.shape[-1]]


def drawn(draw: Callable, shape: Sequence[int], settings: Restoration, numbers: Numbers) -> Tensor:
    """Random numbers `[B, …]`; the seed and a clip's number decide its own."""
    numbers = range(shape[0]) if numbers is None else numbers
    generators = (torch.Generator().manual_seed((settings.seed + 1_000_003 * n) % 2**63) for n in numbers)
    return torch.stack([draw(*shape[1:], generator=generator) for generator in generators])


def join_bands(low: Tensor, high: Tensor, cutoff: float) -> Tensor:
    """`low [B, 1, N]` below the cutoff (Hz), `high [B, 1, N]` above it: the shares of both in a bin add up to 1."""
    bins = torch.arange(N_FFT // 2 + 1, device=low.device)[:, None]
    share = ((bins - bin_of(cutoff) + TRANSITION) / TRANSITION).clamp(0, 1)
    return low + inverse_spectrum(share * spectrum(high - low))


def limited(mel: Tensor, sources: Sequence[Tensor], cutoff: float, ends: Sequence[float] = ()) -> Tensor:
    """A log mel `[B, 1, 256, T]` whose bands above the cutoff (Hz) are no louder, over the clip, than in the loudest of
    the sources `[B, 1, 256, T]`. A source that is louder than the clip in the octave below the cutoff is taken at the
    clip's level there, so that its tilt counts. `ends`: of the sources' own bands (Hz), as in `continued`."""
    known, octave = known_bands(cutoff), known_bands(cutoff / 2)

    def mean(mel: Tensor, dim: int) -> Tensor:  # of powers
        return ((2 * mel).logsumexp(dim, keepdim=True) - math.log(mel.shape[dim])) / 2

    spectra = torch.stack([mean(x, -1) for x in (mel, *sources)])  # [1 + S, B, 1, 256, 1]
    for i, end in enumerate(ends, start=1):
        spectra[i] = continued(spectra[i], end)
    levels = mean(spectra[:, :, :, octave:known], -2)
    most = (spectra + (levels[0] - levels).clamp_max(0))[1:].amax(dim=0)
    excess = (spectra[0] - most).clamp_min(0)
    return torch.cat([mel[:, :, :known], (mel - excess)[:, :, known:]], dim=2)


def continued(spectrum: Tensor, end: float) -> Tensor:
    """Log magnitudes `[..., 256, 1]` that, above `end` (Hz), are no higher than the straight line through the octave
    below it goes on, which never rises."""
    known, octave = known_bands(end), known_bands(end / 2)
    bands = torch.arange(spectrum.shape[-2], dtype=spectrum.dtype, device=spectrum.device)[:, None]
    middle, own = bands[octave:known].mean(), spectrum[..., octave:known, :]
    away = bands[octave:known] - middle
    slope = ((own * away).sum(dim=-2, keepdim=True) / away.square().sum()).clamp_max(0)
    line = own.mean(dim=-2, keepdim=True) + slope * (bands - middle)
    return torch.where(bands < known, spectrum, torch.minimum(spectrum, line))


def audible(low: Tensor) -> Tensor:
    """1 where clips `[..., N]` hold more than digital silence, falling to 0 within a few frames."""
    frames = (low.abs() > SILENT).float().unflatten(-1, (-1, HOP)).amax(dim=-1).flatten(0, -2)[:, None]
    near = torch.nn.functional.max_pool1d(frames, 5, stride=1, padding=2)
    return torch.nn.functional.interpolate(near, low.shape[-1], mode="linear").view_as(low)


def restore_file(
    path: str | Path,
    out: str | Path,
    resolver: SuperResolver,
    settings: Restoration,
    *,
    sources: Sequence[AudioReport] = (),
    loudness: float | None = None,
) -> Written:
    """Restore a file into `out`, 48 kHz, which appears when complete. `AudioError` if it is unusable. `sources`: files
    that it was mixed of, by which the band is `limited`; `loudness`: LUFS for the level 'lufs', or None: the file's."""
    path = Path(path)
    if Path(out).resolve() == path.resolve():
        raise UserError(f"{out}: is the input itself; choose another output file")
    info = check_audio(path, min_samples=0, mix=False)
    cutoff = settings.cutoff or max(file_band(info), LOWEST)
    if cutoff > FULL:
        fault = f"its band, or what a resampler left of its images, reaches {cutoff / 1000:.1f} kHz already"
        raise AudioError(path, f"{fault}; leave it as it is, or give --cutoff")
    if settings.cutoff and cutoff > info.sample_rate / 2:
        most = f"at {info.sample_rate} Hz it holds nothing above {info.sample_rate / 2000:g} kHz"
        raise AudioError(path, f"cutoff={cutoff:g} is not allowed: {most}; give a lower --cutoff, or none")

    total = info.samples_at(SAMPLE_RATE)
    starts = resolver.starts(total)
    windows = [(start, min(resolver.clip_length, total - start)) for start in starts]
    wavs = [
        read_windows(file.path, windows, SAMPLE_RATE, mix=file.channels != info.channels) for file in (info, *sources)
    ]

    def clip(parts: Sequence[Tensor]) -> Tensor:
        padded = (torch.nn.functional.pad(part, (0, resolver.clip_length - part.shape[-1])) for part in parts)
        return torch.stack([part.expand(info.channels, -1) for part in padded])

    ends = [max(file_band(source), LOWEST) for source in sources]
    chunks = reading(map(clip, zip(*wavs, strict=True)), starts, total, SAMPLE_RATE, path.name)
    with AudioWriter(out, SAMPLE_RATE, info.channels, settings.level) as writer, chunks as clips:
        writer.loudness = file_loudness(info) if loudness is None and settings.level == "lufs" else loudness
        for piece in resolver.restored(clips, cutoff, settings, ends):
            writer.write(piece[:, : total - writer.num_samples])
    return writer, cutoff


@functools.lru_cache(maxsize=1024)  # of content: reading all of a file takes seconds
def file_band(info: AudioReport) -> float:
    """`band_edge` of a file at its own sample rate, read minute by minute."""
    rate, block = info.sample_rate, BLOCK_SECONDS * info.sample_rate
    starts = (min(start, max(0, info.num_frames - block)) for start in range(0, info.num_frames, block))
    windows = ((start, block) for start in starts)  # the last one is a full block
    return band_edge(read_windows(info.path, windows, rate, mix=False), rate)


def file_loudness(info: AudioReport) -> float:
    """LUFS, of a file of any length."""
    with Decoder(info.path) as file:
        return level_of((block.T for block in file.blocks(mix=False)), info.sample_rate, info.channels).lufs


def restore_folder(
    folder: str | Path, out: str | Path, resolver: SuperResolver, settings: Restoration, report: Callable
) -> list[tuple[Path, str]]:
    """Restore every file below `folder` into `out`, as .wav, and `report` each. Returns paths skipped, with reasons."""
    folder, out = Path(folder), Path(out)
    files, others = walk_audio(folder)
    targets = {folder / name: (out / name).with_suffix(".wav") for name in files}
    if any(target.resolve().is_relative_to(folder.resolve()) for target in (out, *targets.values())):
        raise UserError(f"{out}: results would lie among the files of {folder}; choose another output folder")
    skipped, sources = [], {}  # sources: of the files written, by target
    for path, target in targets.items():
        try:
            if target in sources:
                raise AudioError(path, f"{sources[target].name} goes by the same name; rename one of them")
            with writing(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                report(*restore_file(path, target, resolver, settings))
            sources[target] = path
        except AudioError as error:
            if error.path == target:  # nor can the others be written
                raise
            skipped.append((path, error.problem))
    skipped += [(folder / item.path, item.reason) for item in others]
    if not sources:
        reasons = "; ".join(f"{path.name}: {problem}" for path, problem in skipped[:3])
        raise UserError(f"{folder}: no usable audio file ({reasons or 'none there'})")
    return skipped
