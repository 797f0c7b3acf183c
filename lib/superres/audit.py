"""The verdicts on seed 004's claims about the super-resolver, as functions of what was counted and measured."""

from collections.abc import Sequence

from torch import Tensor

from lib.lab.claims import Verdict, judge
from lib.superres.sizes import Cost, Size

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
