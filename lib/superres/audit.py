"""What the full configuration holds and costs, counted, and the verdicts on what seed 004 claims of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lib.lab.claims import Verdict, judge
from lib.superres.mel import HOP, MELS, SAMPLE_RATE
from lib.superres.unet import Denoiser, GlobalTransformer
from lib.superres.vae import MelVae
from lib.superres.vocoder import Vocoder

CLIP_FRAMES = round(10.24 * SAMPLE_RATE / HOP)


@dataclass(frozen=True)
class Size:
    """A part's parameters: counted, and as the seed says."""

    part: str
    counted: int
    said: int | None


@dataclass(frozen=True)
class Cost:
    """Multiply-accumulate operations of one pass over a clip of 10.24 s: counted, and as the seed says."""

    what: str
    counted: int
    said: float | None


def full_parts() -> dict[str, nn.Module]:
    """The parts at the seed's sizes, without memory for their weights."""
    with torch.device("meta"):
        return {"denoiser": Denoiser(), "vae": MelVae(), "vocoder": Vocoder()}


def count_sizes(parts: dict[str, nn.Module]) -> list[Size]:
    denoiser = parts["denoiser"]
    transformers = [module for module in denoiser.modules() if isinstance(module, GlobalTransformer)]
    conditioned = sum(number_of_parameters(module) for module in transformers)
    sizes = [
        Size("global encoder", number_of_parameters(denoiser.encoder), 3_232_312),
        Size("UNet, all of it", number_of_parameters(denoiser.unet), 64_876_712),
        Size(f"its {len(transformers)} conditioned transformers", conditioned, 14_313_024),
        Size("autoencoder", number_of_parameters(parts["vae"]), 100_001_328),
        Size("vocoder", number_of_parameters(parts["vocoder"]), 39_317_489),
    ]
    whole = [size for size in sizes if "transformers" not in size.part]
    return [*sizes, Size("together", sum(size.counted for size in whole), 207_427_841)]


def count_costs(parts: dict[str, nn.Module]) -> list[Cost]:
    """Of matrix products, convolutions and attention, one clip. The seed's numbers are for a batch of eight, or so its
    heading says."""
    denoiser, vae = parts["denoiser"], parts["vae"]
    with torch.device("meta"):
        mel = torch.zeros(1, 1, MELS, CLIP_FRAMES)
        latents = torch.zeros(1, denoiser.config.latent_channels, MELS // vae.stride, CLIP_FRAMES // vae.stride)
        context = torch.zeros(1, CLIP_FRAMES + 1, denoiser.config.encoder.context_dim)
        time = torch.zeros(1)
    return [
        Cost("autoencoder, encoding", macs(lambda: vae.encode(mel)), 50e6),
        Cost("global encoder", macs(lambda: denoiser.encoder(mel)), 2.3e9),
        Cost("UNet, one step", macs(lambda: denoiser.denoise(latents, time, latents, context)), 57.5e9),
        Cost("autoencoder, decoding", macs(lambda: vae.decode(latents)), 50e9),
        Cost("vocoder", macs(lambda: parts["vocoder"](mel)), 8e9),
    ]


def latent_shape(parts: dict[str, nn.Module]) -> tuple[int, ...]:
    """`[Z, H, W]` of a clip of 10.24 s."""
    with torch.device("meta"):
        return tuple(parts["vae"].encode(torch.zeros(1, 1, MELS, CLIP_FRAMES)).shape[1:])


def macs(run) -> int:
    """Multiply-accumulate operations of `run()`, on the meta device: the CPU's fused attention would go uncounted."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2


def number_of_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# --- verdicts ---------------------------------------------------------------------------------------------------------


NEAR = 0.01  # relative: a count that is further from what is said is another
ALIKE = 1e-5  # relative to what is received: below it, all places receive the same


def audit_sizes(
    sizes: Sequence[Size], costs: Sequence[Cost], transformers: int, latent: Sequence[int]
) -> list[Verdict]:
    """C16 and C17, from the full configuration."""
    verdicts = [
        judge(
            "C16",
            f"{size.part}: {size.said / 1e6:.2f} M parameters",
            near(size.counted, size.said),
            found=f"{size.counted / 1e6:.2f} M",
        )
        for size in sizes
        if "transformers" not in size.part
    ]
    (of_transformers,) = (size for size in sizes if "transformers" in size.part)
    (step,) = (cost for cost in costs if cost.what == "UNet, one step")
    parameters, macs = of_transformers.counted / 1e6, step.counted / 1e9
    return [
        *verdicts,
        judge("C17", "18 (or 12) conditioned transformers", transformers in (12, 18), found=str(transformers)),
        judge(
            "C17",
            "with 14.3 M parameters",
            near(of_transformers.counted, of_transformers.said),
            found=f"{parameters:.1f} M",
        ),
        judge("C17", "latents [16, 64, 64]", tuple(latent) == (16, 64, 64), found=str(list(latent))),
        judge(
            "C17",
            "57.5 GMACs a step for a batch of eight",
            near(8 * step.counted, step.said),
            found=f"{8 * macs:.0f} GMACs, {macs:.1f} a clip",
        ),
    ]


def near(counted: float, said: float) -> bool:
    return abs(counted / said - 1) <= NEAR


def audit_attention(pooled: Tensor, sequence: Tensor) -> list[Verdict]:
    """C18, from what every place of a map receives: of one pooled vector, and of a sequence, `[C, H, W]` each."""
    spreads = {"pooled": spread_over_places(pooled), "sequence": spread_over_places(sequence)}
    return [
        judge(
            "C18",
            "each position queries the global context, one pooled vector",
            spreads["pooled"] > ALIKE,
            found=in_words(spreads["pooled"]),
        ),
        judge(
            "C18",
            "the same with the sequence as context",
            spreads["sequence"] > ALIKE,
            found=in_words(spreads["sequence"]),
            why="the repair that is the default here",
        ),
    ]


def in_words(spread: float) -> str:
    if spread <= ALIKE:
        return "every place receives the same"
    return f"places differ by {spread:.0%} of what they receive"


def spread_over_places(received: Tensor) -> float:
    """RMS distance of `[C, H, W]` from its mean over places, relative to its RMS."""
    apart = received - received.mean(dim=(1, 2), keepdim=True)
    return float(apart.square().mean().sqrt() / received.square().mean().sqrt())
