"""Parameters and operations of the super-resolver at the sizes of source document 004, and the verdicts on what that
claims of them. No run changes what is counted here: notebook 06 shows it as it is recorded."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from writing import write_record

from lib.lab.claims import Verdict, decide
from lib.superres.mel import HOP, MELS, SAMPLE_RATE
from lib.superres.unet import Denoiser, GlobalTransformer
from lib.superres.vae import MelVae
from lib.superres.vocoder import Vocoder

CLIP_FRAMES = round(10.24 * SAMPLE_RATE / HOP)
TOLERANCE = 0.01  # relative: a count within it is the claimed one
STEP = "UNet, one step"


class Count(NamedTuple):
    """Parameters of a part, or multiply-accumulate operations of one pass over 10.24 s: counted and claimed."""

    what: str
    counted: int
    claimed: float

    @property
    def agrees(self) -> bool:
        return abs(self.counted / self.claimed - 1) <= TOLERANCE


def full_parts() -> dict[str, nn.Module]:
    """The parts at the document's sizes, on the meta device."""
    with torch.device("meta"):
        return {"denoiser": Denoiser(), "vae": MelVae(), "vocoder": Vocoder()}


def transformers_of(parts: Mapping[str, nn.Module]) -> list[GlobalTransformer]:
    return [module for module in parts["denoiser"].modules() if isinstance(module, GlobalTransformer)]


def count_sizes(parts: Mapping[str, nn.Module]) -> list[Count]:
    """Parameters. The conditioned transformers are part of the UNet."""
    transformers = nn.ModuleList(transformers_of(parts))
    counted = (
        ("global encoder", parts["denoiser"].encoder, 3_232_312),
        ("UNet, all of it", parts["denoiser"].unet, 64_876_712),
        (f"its {len(transformers)} conditioned transformers", transformers, 14_313_024),
        ("autoencoder", parts["vae"], 100_001_328),
        ("vocoder", parts["vocoder"], 39_317_489),
    )
    sizes = [Count(what, sum(p.numel() for p in part.parameters()), claimed) for what, part, claimed in counted]
    whole = sum(size.counted for size in sizes) - sizes[2].counted
    return [*sizes, Count("together", whole, 207_427_841)]


def count_costs(parts: Mapping[str, nn.Module]) -> list[Count]:
    """Matrix products, convolutions and attention of one clip; the document counts a batch of eight."""
    denoiser, vae = parts["denoiser"], parts["vae"]
    with torch.device("meta"):
        mel, latents, time = torch.zeros(1, 1, MELS, CLIP_FRAMES), torch.zeros(1, *latent_shape(parts)), torch.zeros(1)
        context = torch.zeros(1, CLIP_FRAMES + 1, denoiser.config.encoder.context_dim)
    return [
        Count("autoencoder, encoding", macs(lambda: vae.encode(mel)), 50e6),
        Count("global encoder", macs(lambda: denoiser.encoder(mel)), 2.3e9),
        Count(STEP, macs(lambda: denoiser.denoise(latents, time, latents, context)), 57.5e9),
        Count("autoencoder, decoding", macs(lambda: vae.decode(latents)), 50e9),
        Count("vocoder", macs(lambda: parts["vocoder"](mel)), 8e9),
    ]


def latent_shape(parts: Mapping[str, nn.Module]) -> tuple[int, ...]:
    """`[Z, H, W]` of a clip of 10.24 s."""
    return tuple(parts["vae"].encode(torch.zeros(1, 1, MELS, CLIP_FRAMES, device="meta")).shape[1:])


def macs(run: Callable[[], Any]) -> int:
    """Multiply-accumulate operations of `run()` on the meta device: the CPU's fused attention would not be counted."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2


def audit_sizes(sizes: list[Count], costs: list[Count], transformers: int, latent: Sequence[int]) -> list[Verdict]:
    """C16 and C17, from the full configuration."""
    (inner,) = (size for size in sizes if "transformers" in size.what)
    (step,) = (cost for cost in costs if cost.what == STEP)
    per_batch = Count(step.what, 8 * step.counted, step.claimed)
    found = f"{per_batch.counted / 1e9:.0f} GMACs, {step.counted / 1e9:.1f} a clip"
    return [
        *(decide(f"C16.{s.what}", holds=s.agrees, found=f"{s.counted / 1e6:.2f} M") for s in sizes if s is not inner),
        decide("C17.transformers", holds=transformers in (12, 18), found=str(transformers)),
        decide("C17.parameters", holds=inner.agrees, found=f"{inner.counted / 1e6:.1f} M"),
        decide("C17.latents", holds=tuple(latent) == (16, 64, 64), found=str(list(latent))),
        decide("C17.step", holds=per_batch.agrees, found=found),
    ]


def counted() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The counts of operations as rows, and the tables, sizes and verdicts that notebook 06 shows."""
    parts = full_parts()
    sizes, costs = count_sizes(parts), count_costs(parts)
    latent, transformers = latent_shape(parts), len(transformers_of(parts))
    verdicts = audit_sizes(sizes, costs, transformers, latent)
    facts = {"sizes": size_rows(sizes), "costs": cost_rows(costs), "latent": list(latent), "transformers": transformers}
    claims = {"claims": [dataclasses.asdict(verdict) for verdict in verdicts]}
    return [cost._asdict() for cost in costs], facts | claims


def size_rows(sizes: Sequence[Count]) -> list[dict[str, str]]:
    return [
        {"part": s.what, "counted": f"{s.counted:,}", "document": f"{s.claimed:,}"}
        | {"ratio": f"{s.counted / s.claimed:.2f}"}
        for s in sizes
    ]


def cost_rows(costs: Sequence[Count]) -> list[dict[str, str]]:
    (step,) = (cost.counted for cost in costs if cost.what == STEP)
    return [
        {"one pass over 10.24 s": c.what, "counted (GMACs)": f"{c.counted / 1e9:,.1f}"}
        | {"document": f"{c.claimed / 1e9:,.2f}", "in UNet steps": f"{c.counted / step:.1f}"}
        for c in costs
    ]


def record_full_size(folder: Path) -> None:
    """full_size.json, within seconds."""
    write_record(folder / "full_size.json", *counted())
