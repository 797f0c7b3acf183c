"""The creative agent: masks that decide what to take from each clip, and the discriminator that judges the result.

Legend: B batch, D latent channels (128), T frames.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.model.cascade import LATENT_DIM, rms
from lib.util.configs import check

MASKINGS = ("none", "constant", "temporal", "frequency", "channel", "energy", "hybrid", "learned")
FIXED_MASKINGS = MASKINGS[2:-1]  # each gives every place to one of the clips
SEGMENT = 25  # frames, a third of a second: the grain of fixed masks in time
MAX_RESTORED = 1000.0  # factor by which masked latents are brought back at most
SMOOTHING = 5  # frames over which the louder clip is found


@dataclass(frozen=True)
class MaskingConfig:
    """What is taken from each clip before the cascade sees it."""

    masking: str = "none"  # a fixed rule, 'learned' (the mask generator), or 'constant': half of both, everywhere
    hard_masks: bool = False  # 0 or 1 forward, the gradient of the soft masks backward; only where they are learned

    def __post_init__(self):
        check(self.masking in MASKINGS, "masking", self.masking, f"one of {', '.join(MASKINGS)}")
        check(not self.hard_masks or self.masking == "learned", "hard_masks", True, "masking='learned' with it")


class Masks(NamedTuple):
    """How much of each clip is taken, `[B, D, T]`, 0 to 1."""

    input: Tensor
    target: Tensor


class MaskGenerator(nn.Module):
    """Learned masks from both latents; 1,083,904 parameters, named as in the original checkpoints.

    Each clip is analysed by two convolutions, each then attends to the other through one attention used both ways, and
    two more convolutions and a sigmoid make its mask.
    """

    def __init__(self, latent_dim: int = LATENT_DIM, width: int = 256, num_heads: int = 4):
        super().__init__()
        self.input_analyzer = _analyzer(latent_dim, width)
        self.target_analyzer = _analyzer(latent_dim, width)
        self.cross_attention = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.input_mask_generator = _mask_head(width, latent_dim)
        self.target_mask_generator = _mask_head(width, latent_dim)

    def forward(self, input: Tensor, target: Tensor) -> Masks:
        """`input`, `target` `[B, D, T]` → masks between 0 and 1."""
        of_input = self.input_analyzer(input).transpose(1, 2)  # [B, T, width]
        of_target = self.target_analyzer(target).transpose(1, 2)
        seen_by_input, _ = self.cross_attention(of_input, of_target, of_target, need_weights=False)
        seen_by_target, _ = self.cross_attention(of_target, of_input, of_input, need_weights=False)
        return Masks(
            self.input_mask_generator(seen_by_input.transpose(1, 2)).sigmoid(),
            self.target_mask_generator(seen_by_target.transpose(1, 2)).sigmoid(),
        )


def _analyzer(latent_dim: int, width: int) -> nn.Sequential:
    first, second = nn.Conv1d(latent_dim, width, 3, padding=1), nn.Conv1d(width, width, 3, padding=1)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU())


def _mask_head(width: int, latent_dim: int) -> nn.Sequential:
    first, second = nn.Conv1d(width, latent_dim, 3, padding=1), nn.Conv1d(latent_dim, latent_dim, 1)
    return nn.Sequential(first, nn.ReLU(), second)


def harden(masks: Masks) -> Masks:
    """0 or 1 where a mask is below or above 0.5; the gradient passes as if nothing had been done (straight-through,
    Bengio et al. 2013, arXiv 1308.3432)."""
    return Masks(*((mask > 0.5).to(mask.dtype) + (mask - mask.detach()) for mask in masks))


@torch.no_grad()
def fixed_masks(kind: str, input: Tensor, target: Tensor) -> Masks:
    """Masks by rule, for latents `[B, D, T]`. But for 'constant', every place belongs to exactly one clip.

    temporal   segments of a third of a second, by turns          channel  every other channel
    frequency  the input's lower half of the channels, the        energy   whichever clip is louder there
               target's upper one (mdct's are bands in order)     hybrid   a checkerboard of segments and halves
    """
    check(kind in ("constant", *FIXED_MASKINGS), "masking", kind, f"one of constant, {', '.join(FIXED_MASKINGS)}")
    _, D, T = input.shape
    channels = torch.arange(D, device=input.device)[:, None]  # [D, 1]
    frames = torch.arange(T, device=input.device)[None, :]  # [1, T]
    if kind == "constant":
        half = torch.full_like(input, 0.5)
        return Masks(half, half)
    if kind == "energy":
        of_input = _louder(input) >= _louder(target)  # [B, D, T]
    else:
        segment = min(SEGMENT, (T + 1) // 2)  # a shorter clip is halved: each has its turn
        odd_segment, upper_half = frames // segment % 2 == 1, channels >= (D + 1) // 2
        of_input = {
            "temporal": ~odd_segment,
            "frequency": ~upper_half,
            "channel": channels % 2 == 0,
            "hybrid": odd_segment == upper_half,
        }[kind]
    mask = of_input.to(input.dtype).expand_as(input)
    return Masks(mask, 1 - mask)


def _louder(x: Tensor) -> Tensor:
    """Energy of every channel, smoothed over frames, `[B, D, T]` → the same shape."""
    return F.avg_pool1d(x.square(), SMOOTHING, stride=1, padding=SMOOTHING // 2, count_include_pad=False)


def apply_mask(x: Tensor, mask: Tensor) -> Tensor:
    """Masked latents `[B, D, T]` at the RMS that they had before. A mask of another shape raises `ValueError`."""
    if mask.shape != x.shape:
        raise ValueError(f"mask is {list(mask.shape)}, the latents are {list(x.shape)}; give a mask of their shape")
    masked = x * mask
    # bounded: the gradient of a clip that a mask leaves out altogether would be a million times the others'
    factor = (rms(x) / rms(masked)).clamp(max=MAX_RESTORED)
    return masked * factor[:, None, None]


def complementarity(masks: Masks) -> Tensor:
    """1 − mean(m_in · m_tgt), `[B]`. Two constant masks of 0.5 already have 0.75, two masks that share nothing 1."""
    return 1 - (masks.input * masks.target).mean(dim=(1, 2))
