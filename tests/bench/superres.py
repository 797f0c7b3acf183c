"""The super-resolver at the seed's size: what its parts take beside the machine's own matrix products."""

from typing import Any

import torch
from measure import Run, alternate, device, precision, timed

from lib.superres.audit import CLIP_FRAMES, count_costs, full_parts
from lib.superres.diffusion import add_noise, sample
from lib.superres.mel import MELS
from lib.superres.unet import Denoiser
from lib.superres.vae import MelVae
from lib.superres.vocoder import Vocoder

STEPS = 50  # of the sampler
BATCH = 8  # of a training step, on a GPU


def parts(limit: dict[str, float]) -> list[dict[str, Any]]:
    """One pass of each part over a clip of 10.24 s, float32."""
    torch.manual_seed(0)
    best = 1e9 * limit["fp32_gflops"]
    rows = []
    for cost, run in zip(count_costs(full_parts()), passes(), strict=True):
        with torch.inference_mode():
            seconds = min(timed(run) for _ in range(2))
        rows.append(
            {"what": cost.what, "gmacs": cost.counted / 1e9, "s": seconds, "share": 2 * cost.counted / seconds / best}
        )
    return rows


def passes() -> list[Run]:
    """In the order of `count_costs`."""
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
