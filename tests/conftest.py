"""Shared fixtures: small audio files and folders that the tests write themselves."""

import dataclasses
import hashlib
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks: the tests' batches and models are on the CPU

import encodec.model
import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor, nn

import lib.data.pairs
import lib.util.provenance
from lib.codec.codec import Codec, load_codec
from lib.data.latents import encode_manifest
from lib.data.pairs import Clip, Manifest, Pair, build_manifest
from lib.model.cascade import CascadeConfig
from lib.model.fusion import FusionModel
from lib.model.masks import MaskingConfig
from lib.training.run import Run
from lib.util.provenance import code_fingerprint

torch.set_num_threads(1)  # tests run in parallel processes

FRAMES = 12  # of a clip in `tiny_index`
BLOCKS = """
import torch

class Blocks:
    sample_rate, hop, dim, fingerprint = 16_000, 128, 64, "b10c5b10c5b1"

    def encode(self, wav):
        wav = torch.nn.functional.pad(wav, (0, -wav.shape[-1] % self.hop))
        return 30 * wav[:, 0].unflatten(1, (-1, self.dim, 2)).mean(3).mT

    def decode(self, latents, length=None):
        return (latents.mT.repeat_interleave(2, 2).flatten(1)[:, None] / 30)[..., :length]
"""  # the module of a codec that is none of ours


class TinyCodec:
    """Eight channels a frame: each the mean of 40 neighbouring samples, at the RMS of real latents (about 5)."""

    sample_rate, channels, hop, dim, name = 24_000, 1, 320, 8, "tiny"
    fingerprint = hashlib.sha256(b"tiny").hexdigest()

    def encode(self, wav: Tensor) -> Tensor:
        """`[B, 1, T · 320] → [B, 8, T]`."""
        return 300.0 * wav[:, 0].unflatten(1, (-1, self.dim, self.hop // self.dim)).mean(3).transpose(1, 2)

    def decode(self, latents: Tensor, length: int | None = None) -> Tensor:
        """`[B, 8, T] → [B, 1, T · 320]` or `[B, 1, length]`, each mean held for its 40 samples."""
        wav = latents.transpose(1, 2).repeat_interleave(self.hop // self.dim, 2).flatten(1)[:, None] / 300.0
        return wav[..., :length]


@pytest.fixture(scope="module")
def blocks(tmp_path_factory) -> Iterator[Codec]:
    """A codec of one's own: 16 kHz, 64 channels."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_blocks.py").write_text(BLOCKS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield load_codec("own_blocks:Blocks")
    sys.modules.pop("own_blocks")


def encodec_model(seed: int = 0) -> nn.Module:
    """EnCodec with random weights."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the package's weight norm
        torch.manual_seed(seed)
        return encodec.model.EncodecModel.encodec_model_24khz(pretrained=False)


def write_weights(directory: Path, content: bytes | None = None) -> Path:
    """A file of EnCodec's weights, random ones by default, that is named with its true checksum."""
    directory.mkdir(exist_ok=True)
    if content is None:
        torch.save(encodec_model().state_dict(), saved := io.BytesIO())
        content = saved.getvalue()
    path = directory / f"encodec_24khz-{hashlib.sha256(content).hexdigest()[:8]}.th"
    path.write_bytes(content)
    return path


class TinyDiscriminator(nn.Module):
    """As random as the real one, by its dropout, with a thousandth of its parameters."""

    def __init__(self, latent_dim: int, *, spectral_norm: bool = False):
        super().__init__()
        self.conv = nn.Conv1d(latent_dim, 16, 3)
        self.classifier = nn.Sequential(nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.Linear(16, 1))
        if spectral_norm:
            nn.utils.parametrizations.spectral_norm(self.conv)

    def forward(self, latents: Tensor) -> Tensor:
        return self.classifier(self.conv(latents).square().mean(dim=2)).squeeze(1)


class Page(HTMLParser):
    """What a browser would see: tags, addresses, text; fails on tags that do not match."""

    VOID = frozenset({"meta", "link", "img", "source", "br", "hr", "input"})

    def __init__(self, source: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""  # without that of scripts and styles
        self.open: list[str] = []
        self.feed(source)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.text += data

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def edit_code() -> Iterator[Callable[[str], None]]:
    """`edit_code("lib.audio.synth")`: as if that module's file had been edited and a new process had begun."""

    def edit(module: str) -> None:
        read, edited = lib.util.provenance._read, lib.util.provenance._file(module)
        assert edited, module

        def changed(file: Path) -> tuple[str, tuple[str, ...]]:
            code, imports = read(file)
            return "edited " * (file == edited) + code, imports

        patch.setattr(lib.util.provenance, "_read", changed)
        code_fingerprint.cache_clear()

    with pytest.MonkeyPatch.context() as patch:
        yield edit
    code_fingerprint.cache_clear()


@pytest.fixture(scope="session")
def parse():
    """`parse(html)`: its tags, attributes and text."""
    return Page


@pytest.fixture(scope="session")
def tiny_codec():
    return TinyCodec()


@pytest.fixture(scope="session")
def tiny_manifest(tmp_path_factory, tiny_codec):
    """Noise: 5 pairs for training, and 9 for validation, one more than a batch of it takes."""
    root = tmp_path_factory.mktemp("songs")
    length = FRAMES * tiny_codec.hop
    pairs = []
    for seed, (split, clips) in enumerate((("train", 6), ("val", 10))):
        wav = 0.1 * np.random.default_rng(seed).standard_normal(clips * length)
        soundfile.write(root / f"{split}.wav", wav, tiny_codec.sample_rate, subtype="FLOAT")
        sha256 = hashlib.sha256((root / f"{split}.wav").read_bytes()).hexdigest()
        cuts = [Clip(f"{split}.wav", i * length, length, sha256) for i in range(clips)]
        pairs += [Pair(f"{split}_{i}", split, "continuation", cuts[i], cuts[i + 1]) for i in range(clips - 1)]
    return Manifest(root, length, tiny_codec.sample_rate, 0, tuple(pairs))


@pytest.fixture(scope="session")
def tiny_index(tiny_manifest, tiny_codec):
    """Its latents `[8, 12]` on disk."""
    return encode_manifest(tiny_manifest, tiny_codec, tiny_manifest.root / "cache")


@pytest.fixture(scope="session")
def tiny_cascade():
    """`tiny_cascade(num_stages, **StageConfig fields)`: the reference with 8 latent channels and one small layer."""

    def build(num_stages: int = 2, *, anti_cheating: float = 0.0, **changes) -> CascadeConfig:
        changes = {"num_layers": 1, "num_heads": 2, "ffn_mult": 2} | changes
        reference = CascadeConfig.reference(num_stages, anti_cheating=anti_cheating, **changes)
        return dataclasses.replace(reference, latent_dim=8)

    return build


@pytest.fixture(scope="session")
def songs(tmp_path_factory) -> Manifest:
    """Clips of half a second, cut from five songs of a second and three quarters; two songs are for validation."""
    root = tmp_path_factory.mktemp("data") / "songs"
    root.mkdir()
    length = 42_000
    time = np.arange(length) / 24_000
    for seed in range(5):
        rng = np.random.default_rng(seed)
        beat = np.exp(-8 * (time % rng.uniform(0.2, 0.5)))
        tones = sum(np.sin(2 * np.pi * f * time) for f in 220 * 2 ** (rng.choice(24, 4, replace=False) / 12))
        wav = (0.02 + 0.05 * seed + 0.1 * beat) * tones / 4 + 0.003 * rng.standard_normal(length)
        soundfile.write(root / f"song_{seed}.wav", wav, 24_000, subtype="PCM_24")  # FLOAT would hold the time
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lib.data.pairs, "CROSS_PER_FILE", 2)
        return build_manifest(root, root.parent / "manifest.json", 0.5, mode="both")


@pytest.fixture(scope="session")
def save_run() -> Callable[..., Run]:
    """`save_run(folder, codec, cascade, masking, seed, **parts of the config)`: a run that has trained for no step. Its
    masks are far from one half."""

    def save(
        folder: Path, codec: Codec, cascade: CascadeConfig, masking: str = "none", seed: int = 0, **config: Any
    ) -> Run:
        config |= {"cascade": dataclasses.asdict(cascade), "masking": dataclasses.asdict(MaskingConfig(masking))}
        run = Run.create(folder, config | {"codec": {"name": codec.name, "fingerprint": codec.fingerprint}})
        torch.manual_seed(seed)
        model = FusionModel(cascade, MaskingConfig(masking))
        if masking == "learned":
            for head in (model.mask_generator.input_mask_generator, model.mask_generator.target_mask_generator):
                nn.init.normal_(head[-1].weight, std=1.0)
        run.save(0, model.eval(), {}, is_best=True)
        return run

    return save


@pytest.fixture(scope="session")
def tiny_superres(tmp_path_factory) -> Path:
    """A super-resolver of random weights for clips of 0.16 s, which makes noise of the upper band."""
    from lib.superres.completion import Completion, CompletionConfig
    from lib.superres.unet import Denoiser, DenoiserConfig, EncoderConfig
    from lib.superres.vae import MelVae, VaeConfig

    folder = tmp_path_factory.mktemp("superres")
    torch.manual_seed(0)
    encoder = EncoderConfig((2, 4, 8), hidden_dim=16, num_layers=1, num_heads=2, ffn_dim=16, context_dim=8)
    sizes = {"channels": (8, 16), "attention": (False, True), "num_res_blocks": 1, "head_channels": 8}
    denoiser = Denoiser(DenoiserConfig(2, **sizes, transformers=1, norm_groups=4, encoder=encoder))
    vae = MelVae(VaeConfig((4, 4, 8, 8), 1, 2, 2, mel_mean=-6.0, mel_std=2.0))
    completion = Completion(CompletionConfig(8, 1))
    completion.statistics.mean += torch.linspace(-1, -4, 256)
    facts = {"latent_scale": 1.0, "train": {"clip_seconds": 0.16}}
    for name, model in (("completion", completion), ("vae", vae), ("diffusion", denoiser)):
        run = Run.create(folder / name, {"sizes": dataclasses.asdict(model.config)} | facts)
        run.save(0, model, {}, is_best=True)
        facts[f"{name}_sha256"] = run.weights_sha256()  # of the first two, for the third
    return folder


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        pyplot.close("all")
