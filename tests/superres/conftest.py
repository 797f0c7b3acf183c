"""A tiny library of music at 48 kHz, and a super-resolver that was trained on it for some steps."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from lib.superres.completion import CompletionConfig
from lib.superres.degradation import Library, read_library
from lib.superres.mel import SAMPLE_RATE
from lib.superres.resolver import SuperResolver
from lib.superres.training import PartConfig, VaeTraining, train_part
from lib.superres.unet import DenoiserConfig, EncoderConfig
from lib.superres.vae import VaeConfig
from lib.superres.vocoder import VocoderConfig

CLIP = 7_680  # samples: the shortest clip, 0.16 s, 16 mel frames and two places of a latent map
COMPLETION = CompletionConfig(hidden_dim=8, num_layers=1)
VAE = VaeConfig(channels=(4, 4, 8, 8), num_res_blocks=1, latent_channels=2, norm_groups=2)
ENCODER = EncoderConfig(
    channels=(2, 4, 8), hidden_dim=16, num_layers=1, num_heads=2, ffn_dim=16, context_dim=8, positions=32
)
DENOISER = DenoiserConfig(
    latent_channels=2,
    channels=(8, 16),
    attention=(False, True),
    num_res_blocks=1,
    head_channels=8,
    transformers=1,
    norm_groups=4,
    encoder=ENCODER,
)
VOCODER = VocoderConfig(channels=32, resblock_kernels=(3,), dilations=(1,))
LOOP = {"clip_seconds": 0.16, "examples": 6, "val_examples": 3, "batch_size": 2, "learning_rate": 3e-3}
LOOP |= {"max_steps": 4, "checkpoint_every": 4, "clip": 1.0}
DISCRIMINATORS = {"period_channels": 1, "scale_channels": 16, "batch_size": 1, "examples": 2, "val_examples": 1}


def white(num_samples: int, seed: int = 0, channels: int = 1, rms: float = 0.1) -> Tensor:
    """Noise of the whole band, `[channels, num_samples]`."""
    noise = np.random.default_rng(seed).standard_normal((channels, num_samples))
    return torch.from_numpy(rms * noise).float()


def band(wav: Tensor, lowest: float = 0.0, highest: float = SAMPLE_RATE / 2, rate: int = SAMPLE_RATE) -> Tensor:
    """A signal `[..., N]` without the frequencies outside a band."""
    spectrum = torch.fft.rfft(wav.double())
    frequencies = torch.fft.rfftfreq(wav.shape[-1], 1 / rate)
    return torch.fft.irfft(spectrum * ((frequencies >= lowest) & (frequencies <= highest)), wav.shape[-1]).float()


def inner(wav: Tensor) -> Tensor:
    """Faded in and out: an abrupt end would have frequencies of its own."""
    return wav * torch.hann_window(wav.shape[-1])


def decibels(wav: Tensor, reference: Tensor) -> float:
    """Of the energy of one signal, against that of another."""
    return 10 * torch.log10(wav.double().square().mean() / reference.double().square().mean()).item()


def write_music(path: Path, seconds: float = 1.2, seed: int = 0, rate: int = SAMPLE_RATE, channels: int = 1) -> Path:
    """Tones with harmonics, and beats of noise, of the whole band."""
    rng, time = np.random.default_rng(seed), np.arange(round(seconds * rate)) / rate
    tones = sum(np.sin(2 * np.pi * k * rng.uniform(100, 400) * time) / k for k in range(1, 60))
    beats = np.exp(-20 * (time % rng.uniform(0.1, 0.3))) * rng.standard_normal(len(time))
    wav = 0.05 * tones + 0.1 * beats
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.stack([wav / (1 + c) for c in range(channels)], axis=1), rate)
    return path


@pytest.fixture(scope="session")
def music(tmp_path_factory) -> Path:
    """A folder of three songs."""
    folder = tmp_path_factory.mktemp("music")
    for seed in range(3):
        write_music(folder / f"song_{seed}.wav", 1.2 + 0.1 * seed, seed)
    return folder


@pytest.fixture(scope="session")
def library(music) -> Library:
    return read_library(music, CLIP)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, library) -> Path:
    """A folder with all parts but a vocoder, not to be written to."""
    folder = tmp_path_factory.mktemp("superres")
    train_part(folder, "completion", library, COMPLETION, PartConfig(**LOOP))
    train_part(folder, "vae", library, VAE, VaeTraining(**LOOP))
    train_part(folder, "diffusion", library, DENOISER, PartConfig(**LOOP))
    return folder


@pytest.fixture(scope="session")
def resolver(trained) -> SuperResolver:
    return SuperResolver(trained)


def changed(config: Any, **fields: Any) -> Any:
    return dataclasses.replace(config, **fields)


class NoiseResolver(SuperResolver):
    """Adds noise of this RMS above the cutoff, different in each clip; no model."""

    def __init__(self, clip_length: int, rms: float = 0.01):
        self.clip_length, self.rms, self.seen = clip_length, rms, []

    def restore(self, low: Tensor, cutoff: float, settings=None, *, numbers=(), sources=()) -> Tensor:
        self.seen.append((tuple(low.shape), cutoff, list(numbers)))
        if not self.rms:
            return low
        noise = torch.stack([white(low.shape[-1], seed=number, rms=self.rms) for number in numbers])
        return low + band(noise, cutoff)
