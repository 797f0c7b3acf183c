"""The super-resolver at document 004's size: what its parts take beside the machine's own matrix products. And a small
one on a file: how much faster than real time, and in how much memory."""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import soundfile
import torch
from measure import Run, alternate, device, precision, timed
from paths import sampled_memory

from lib.lab.results import read_record
from lib.project import RECORD
from lib.superres.completion import Completion
from lib.superres.mel import HOP, MELS, SAMPLE_RATE
from lib.superres.resolver import Restoration, SuperResolver, restore_file
from lib.superres.training import PLANS
from lib.superres.unet import Denoiser, add_noise, sample
from lib.superres.vae import MelVae
from lib.superres.vocoder import Vocoder
from lib.training import run as runs

STEPS = 50  # of the sampler
BATCH = 8  # of a training step, on a GPU
CUTOFF = 12_000.0  # Hz: of fusions
CLIP_FRAMES = round(10.24 * SAMPLE_RATE / HOP)


def parts(limit: dict[str, float]) -> list[dict[str, Any]]:
    """One pass of each part over a clip of 10.24 s, float32."""
    torch.manual_seed(0)
    best = 1e9 * limit["fp32_gflops"]
    rows = []
    for cost, run in zip(read_record(RECORD / "full_size.json", dict)[0], passes(), strict=True):
        with torch.inference_mode():
            seconds = min(timed(run) for _ in range(2))
        share = 2 * cost["counted"] / seconds / best
        rows.append({"what": cost["what"], "gmacs": cost["counted"] / 1e9, "s": seconds, "share": share})
    return rows


def passes() -> list[Run]:
    """In the order of the record's full_size.json."""
    denoiser, vae, vocoder = (make().eval().to(device()) for make in (Denoiser, MelVae, Vocoder))
    mel = torch.randn(1, 1, MELS, CLIP_FRAMES, device=device())
    latents = torch.randn(1, 16, MELS // 8, CLIP_FRAMES // 8, device=device())
    context, time = torch.randn(1, CLIP_FRAMES + 1, 128, device=device()), torch.zeros(1, device=device())
    return [
        lambda: vae.encode(mel),
        lambda: denoiser.encoder(mel),
        lambda: denoiser.denoise(latents, time, latents, context),
        lambda: vae.decode(latents),
        lambda: vocoder(mel),
    ]


def restoring(minutes: float = 2.0) -> list[dict[str, Any]]:
    """A mono file at 48 kHz by a small system of random weights: what is expected, and draws. The growth of memory is
    that from the second third of the time to the last."""
    torch.manual_seed(0)
    plan, rows = PLANS["small"], []
    with tempfile.TemporaryDirectory() as name:
        folder, facts = Path(name), {"latent_scale": 1.0, "train": {"clip_seconds": plan.training.clip_seconds}}
        models = {"completion": Completion(plan.completion), "vae": MelVae(plan.vae)}
        for part, model in (models | {"diffusion": Denoiser(plan.denoiser)}).items():
            run = runs.Run.create(folder / part, {"sizes": dataclasses.asdict(model.config)} | facts)
            run.save(0, model, {}, is_best=True)
            facts[f"{part}_sha256"] = run.weights_sha256()
        soundfile.write(folder / "in.wav", 0.1 * torch.randn(round(minutes * 60 * SAMPLE_RATE)).numpy(), SAMPLE_RATE)
        resolver = SuperResolver(folder, device=str(device()))
        for steps in (0, 10, STEPS):
            memory: list[float] = []
            settings, files = Restoration(steps=steps, cutoff=CUTOFF), (folder / "in.wav", folder / "out.wav")
            with sampled_memory(memory):
                seconds = timed(lambda files=files, settings=settings: restore_file(*files, resolver, settings))
            third = len(memory) // 3
            growth = max(memory[-third:]) - max(memory[third : 2 * third])
            rows.append({"steps": steps, "times_real_time": 60 * minutes / seconds, "memory_growth_mib": growth})
    return rows


def on_gpu() -> dict[str, float]:
    """Time and memory of a training step of the full UNet with its encoder, and of sampling a clip of 10.24 s."""
    torch.manual_seed(0)
    model = Denoiser().to(device())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    latents = torch.randn(BATCH, 16, MELS // 8, CLIP_FRAMES // 8, device=device())
    mel = torch.randn(BATCH, 1, MELS, CLIP_FRAMES, device=device())
    times = torch.randint(1000, (BATCH,), device=device())
    autocast = torch.autocast("cuda", torch.bfloat16, enabled=precision() == "bf16")

    def train() -> None:
        noisy, velocity = add_noise(latents, torch.randn_like(latents), times)
        with autocast:
            found = model(noisy, times, latents, mel)
        optimizer.zero_grad(set_to_none=True)
        (found.float() - velocity).square().mean().backward()
        optimizer.step()

    def draw() -> None:
        with autocast:
            sample(model.eval(), latents[:1], mel[:1], torch.randn_like(latents[:1]), steps=STEPS)
        model.train()

    found = {"batch": BATCH, "precision": precision(), "sampler_steps": STEPS}
    for name, run in (("training_step", train), ("sampling", draw)):
        torch.cuda.reset_peak_memory_stats()
        (found[f"{name}_s"],) = alternate(run)
        found[f"{name}_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found
