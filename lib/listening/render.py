"""One pair rendered by a trained model, with settings changed if wanted, and recipes that reproduce a rendering bit for
bit: all is on the CPU in float32, one pair at a time. Legend as in `cascade`; N samples."""

import contextlib
import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lib.audio.decode import mixed
from lib.audio.files import SAMPLE_RATE, save_audio
from lib.codec.codec import Codec, load_codec
from lib.data.pairs import Clip, cut_to_shorter, load_pair
from lib.model.cascade import StageTrace
from lib.model.fusion import FusionModel, check_codec, load_model
from lib.model.masks import Masks
from lib.model.whole_band import decode_fusion, left_out
from lib.training.batches import mix_noise
from lib.training.run import Run
from lib.util.configs import Count, Flag, NonNegative, Share, check, checked_dataclass, from_fields, number, whole
from lib.util.errors import UserError
from lib.util.files import file_sha256, naming, read_json, write_atomic
from lib.util.provenance import versions
from lib.util.tensors import torch_threads

RECIPE_VERSION = 1
ROLES = ("input", "target")
MOST_THREADS = 1024  # that a recipe may ask for
UNDECIDED = 1e-6  # masks are clamped to this distance from 0 and 1, where their log-odds are finite
HARDEST = 1e3  # largest factor on log-odds; a larger one changes nothing


@checked_dataclass
class Settings:
    """What may be changed when a pair is rendered. The defaults render with the model as it was trained."""

    stages: Count | None = None  # how many of the cascade's stages to apply, from the first; None: all
    residual_weight: NonNegative | None = None  # of the last stage that is applied; None: its own
    noise: Share = 0.0  # share of noise in both clips' latents, at their level, as the curriculum mixes it
    mask_blend: Share = 0.0  # 0: the masks as they are; 1: one half everywhere
    mask_hardness: number(0, HARDEST) = 1.0  # factor on the log-odds: 0 gives one half everywhere, a large one 0 or 1
    seed: whole(0, 2**64 - 1) = 0  # of the noise
    whole_band: Flag = True  # mix what the codec leaves out of both clips too, up to 12 kHz


class Rendition(NamedTuple):
    wav: Tensor  # [C, N]
    latents: tuple[Tensor, Tensor]  # of input and target [C, D, T], [1, D, T] of a codec with C; noise included
    masks: Masks | None  # the same, as applied; None without masking
    traces: tuple[StageTrace, ...]  # one per applied stage
    stages: tuple[Tensor, ...] = ()  # the same, the latents after each of them


@torch.inference_mode()
def render(
    model: FusionModel, codec: Codec, input: Tensor, target: Tensor, settings: Settings | None = None
) -> Rendition:
    """Fuse two waveforms `[C, N]` of one shape, at the codec's rate: in as many channels as the codec has, or, where it
    has one, each by itself, with the masks of their mean. `UserError` for others, and for a setting that this model
    lacks."""
    if input.shape != target.shape or input.ndim != 2:
        raise UserError(f"clips are {list(input.shape)} and {list(target.shape)}; give two [C, N] of one length")
    check_codec(model, codec.fingerprint)
    settings = settings or Settings()
    stages, weight, none = model.cascade.stages, settings.residual_weight, "None: this model has no stages"
    rule = f"1 to {len(stages)}" if stages else none
    check(settings.stages is None or settings.stages <= len(stages), "stages", settings.stages, rule)
    check(weight is None or stages, "residual_weight", weight, none)
    generator = torch.Generator().manual_seed(settings.seed)  # its own: several threads render at once
    channels = codec.channels
    clips = [mixed(x, channels)[None] if channels > 1 else x[:, None] for x in (input, target)]  # [1, C, N], [C, 1, N]
    clean = codec.encode(clips[0]), codec.encode(clips[1])  # [C, D, T] or [1, D, T] each
    latents = tuple(mix_noise(x.cpu(), settings.noise, generator).to(x.device) for x in clean)  # the same on any device
    one = latents if len(clean[0]) == 1 else (codec.encode(x.mean(0, keepdim=True)) for x in clips)
    masks = model.make_masks(*one)
    if masks is not None:
        masks = Masks(*(adjusted(mask, settings).expand_as(latents[0]) for mask in masks))
    with contextlib.nullcontext() if weight is None else stages[: settings.stages][-1].override(residual_weight=weight):
        fusion = model(*latents, masks=masks, stages=settings.stages)
    rest = left_out(codec, torch.cat(clips), torch.cat(clean)) if settings.whole_band else None
    wav = decode_fusion(codec, fusion, torch.cat(latents), rest, input.shape[-1]).flatten(0, 1)
    return Rendition(wav, latents, masks, fusion.traces, fusion.stages)


def adjusted(mask: Tensor, settings: Settings) -> Tensor:
    """A mask made harder or softer, then blended with one half."""
    if settings.mask_hardness != 1:
        mask = (mask.clamp(UNDECIDED, 1 - UNDECIDED).logit() * settings.mask_hardness).sigmoid()
    return torch.lerp(mask, torch.full_like(mask, 0.5), settings.mask_blend)


def save_with_recipe(path: str | Path, run: Run, codec: Codec, input: Clip, target: Clip, settings: Settings) -> Path:
    """Render a pair, at the length of its shorter clip, into `path` (.wav); returns the recipe's path beside it. Its
    paths are relative to it for files in the run's folder or, where it lies elsewhere, in the folder above its own."""
    path = Path(path)
    input, target = cut_to_shorter(input, target)
    for clip in (input, target):
        _check_file(clip, "the pair", "restore that file, or make the pairs again")
    model = load_model(run, codec_fingerprint=codec.fingerprint)
    rendition = render(model, codec, *load_pair(input, target, codec.channels), settings)
    save_audio(path, rendition.wav, codec.sample_rate)
    folder, root = path.parent.resolve(), run.path.resolve()
    root = root if folder.is_relative_to(root) else folder.parent

    def named(path: str | Path) -> str:
        path = Path(path).resolve()
        return os.path.relpath(path, folder) if path.is_relative_to(root) else str(path)

    recipe = {
        "recipe": RECIPE_VERSION,
        "run": named(run.path),
        "checkpoint": "best",
        "weights_sha256": run.weights_sha256(),
        "codec": {"name": codec.name, "fingerprint": codec.fingerprint},
        "settings": dataclasses.asdict(settings),
        "input": dataclasses.asdict(input) | {"path": named(input.path)},
        "target": dataclasses.asdict(target) | {"path": named(target.path)},
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "output": {"file": path.name, "samples_sha256": samples_sha256(rendition.wav)},
        "config": run.config,
    }
    write_atomic(path.with_suffix(".json"), json.dumps(recipe, indent=1))
    return path.with_suffix(".json")


class Rerendering(NamedTuple):
    wav: Tensor  # [C, N]
    sample_rate: int
    equal: bool  # bit for bit to the samples that the recipe was written for
    versions: dict[str, str]  # the versions that the recipe was written with
    files: tuple[Path, Path]  # of the two clips


def follow_recipe(path: str | Path, *, run: str | Path | None = None, codec: str | Path | None = None) -> Rerendering:
    """Render a recipe again. `run`: where it is now; `codec`: as in `load_codec`. `UserError` if a file has changed."""
    path = Path(path)
    recipe = _read_recipe(path)
    clips = [dataclasses.replace(recipe[role], path=str(path.parent / recipe[role].path)) for role in ROLES]
    for role, clip in zip(ROLES, clips, strict=True):
        if not Path(clip.path).is_file():
            raise UserError(f"{path}: its {role} {clip.path} is not there; put the file back, or correct {role}.path")
        _check_file(clip, str(path), "restore that file")
    place = Path(run or path.parent / recipe["run"])
    if not run and not (place / "config.json").is_file():
        raise UserError(f"{path}: its run {place} is not there; say where it is now, by --run")
    found = Run.open(place)
    model = load_model(found, recipe["checkpoint"], codec_fingerprint=recipe["codec"]["fingerprint"])
    if found.weights_sha256(recipe["checkpoint"]) != recipe["weights_sha256"]:
        raise UserError(f"{found.path}: its weights are not those of {path}; name the run that has them, by --run")
    loaded = load_codec(codec or found.codec_source)
    found.check_codec(loaded.fingerprint)
    wavs = load_pair(*clips, loaded.channels)
    # it may have a setting that this model lacks; and how many threads share sums decides their last bits
    with naming(path, "name another run"), torch_threads(recipe["threads"]):
        wav = render(model, loaded, *wavs, recipe["settings"]).wav
    equal = samples_sha256(wav) == recipe["output"]["samples_sha256"]
    return Rerendering(wav, loaded.sample_rate, equal, recipe["versions"], tuple(Path(clip.path) for clip in clips))


def samples_sha256(wav: Tensor) -> str:
    """SHA-256 of the samples as little-endian float32, independent of the file's format."""
    return hashlib.sha256(wav.numpy().astype("<f4").tobytes()).hexdigest()


def _check_file(clip: Clip, wanted_by: str, fix: str) -> None:
    """`UserError` if the clip's file has changed since it was cut."""
    try:
        sha256 = file_sha256(Path(clip.path))
    except OSError as error:
        raise UserError(f"{clip.path}: cannot be read ({error.strerror}); {fix}") from None
    if sha256 != clip.sha256:
        raise UserError(f"{clip.path}: not the file that {wanted_by} was made of; {fix}")


def _read_recipe(path: Path) -> dict[str, Any]:
    fix = "name the .json beside a saved .wav"
    recipe = read_json(path, fix=fix)
    with naming(path, fix):
        if (version := recipe["recipe"]) != RECIPE_VERSION:
            raise UserError(f"recipe version {version!r}, this code reads {RECIPE_VERSION}; use the code that wrote it")
        # one without `whole_band` is older than the field, and of the codec's band alone
        recipe["settings"] = from_fields(Settings, {"whole_band": False} | recipe["settings"])
        recipe |= {role: from_fields(Clip, {"sample_rate": SAMPLE_RATE} | recipe[role]) for role in ROLES}
        length, other, threads = recipe["input"].length, recipe["target"].length, recipe["threads"]
        check(length == other, "target.length", other, f"the input's, {length}")
        check(recipe["checkpoint"] in ("best", "last"), "checkpoint", recipe["checkpoint"], "best or last")
        check(type(threads) is int and 1 <= threads <= MOST_THREADS, "threads", threads, f"1 to {MOST_THREADS}")
        texts = (recipe["run"], recipe["codec"]["name"], recipe["codec"]["fingerprint"], recipe["weights_sha256"])
        if not all(isinstance(text, str) for text in (*texts, recipe["output"]["samples_sha256"])):
            raise TypeError("a number where there was text")
        check(isinstance(recipe["versions"], dict), "versions", recipe["versions"], "names and versions of packages")
    return recipe
