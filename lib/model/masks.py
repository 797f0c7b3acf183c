"""Masks that decide what is taken from each clip: learned, or by a fixed rule. Legend as in `cascade`."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.model.cascade import LATENT_DIM, rms
from lib.util.configs import check, checked_dataclass, choice

MASKINGS = ("none", "temporal", "frequency", "channel", "energy", "hybrid", "learned")
FIXED_MASKINGS = MASKINGS[1:-1]  # each assigns every element to one of the clips
SEGMENT = 25  # frames, a third of a second: the resolution of fixed masks in time
MAX_RESTORATION = 1000.0  # largest scale that restores the RMS of masked latents
SMOOTHING = 5  # frames over which energies are averaged to find the louder clip


@checked_dataclass
class MaskingConfig:
    """What is taken from each clip before the cascade sees it."""

    masking: choice(MASKINGS) = "none"  # a fixed rule, or 'learned' (the mask generator)


class Masks(NamedTuple):
    """How much of each clip is taken, `[B, D, T]`, 0 to 1."""

    input: Tensor
    target: Tensor


class MaskGenerator(nn.Module):
    """Learned masks from both latents; 1,083,904 parameters, named as in the original checkpoints. Two convolutions
    analyse each clip; each then attends to the other, through one attention layer used both ways; two more convolutions
    and a sigmoid give its mask."""

    def __init__(self, latent_dim: int = LATENT_DIM, width: int = 256, num_heads: int = 4):
        super().__init__()
        self.input_analyzer = nn.Sequential(*_convolutions(latent_dim, width, width, kernel=3), nn.ReLU())
        self.target_analyzer = nn.Sequential(*_convolutions(latent_dim, width, width, kernel=3), nn.ReLU())
        self.cross_attention = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.input_mask_generator = nn.Sequential(*_convolutions(width, latent_dim, latent_dim, kernel=1))
        self.target_mask_generator = nn.Sequential(*_convolutions(width, latent_dim, latent_dim, kernel=1))

    def forward(self, input: Tensor, target: Tensor) -> Masks:
        """`input`, `target` `[B, D, T]` → masks between 0 and 1."""
        input_features = self.input_analyzer(input).transpose(1, 2)  # [B, T, width]
        target_features = self.target_analyzer(target).transpose(1, 2)
        attended_input, _ = self.cross_attention(input_features, target_features, target_features, need_weights=False)
        attended_target, _ = self.cross_attention(target_features, input_features, input_features, need_weights=False)
        return Masks(
            self.input_mask_generator(attended_input.transpose(1, 2)).sigmoid(),
            self.target_mask_generator(attended_target.transpose(1, 2)).sigmoid(),
        )


def _convolutions(inputs: int, hidden: int, outputs: int, kernel: int) -> list[nn.Module]:
    first = nn.Conv1d(inputs, hidden, 3, padding=1)
    return [first, nn.ReLU(), nn.Conv1d(hidden, outputs, kernel, padding=kernel // 2)]


@torch.no_grad()
def fixed_masks(kind: str, input: Tensor, target: Tensor) -> Masks:
    """Masks by rule, for latents `[B, D, T]`: every element belongs to exactly one clip.

    temporal   alternating segments of a third of a second
    frequency  the input's lower half of the channels, the target's upper half (mdct's channels are bands in order)
    channel    alternating channels
    energy     whichever clip is louder there
    hybrid     a checkerboard of temporal segments and frequency halves
    """
    check(kind in FIXED_MASKINGS, "masking", kind, f"one of {', '.join(FIXED_MASKINGS)}")
    _, D, T = input.shape
    channels = torch.arange(D, device=input.device)[:, None]  # [D, 1]
    frames = torch.arange(T, device=input.device)[None, :]  # [1, T]
    if kind == "energy":
        from_input = _smoothed_energy(input) >= _smoothed_energy(target)  # [B, D, T]
    else:
        segment = min(SEGMENT, (T + 1) // 2)  # a short clip is halved, so that both have a segment
        odd_segment, upper_half = frames // segment % 2 == 1, channels >= (D + 1) // 2
        from_input = {
            "temporal": ~odd_segment,
            "frequency": ~upper_half,
            "channel": channels % 2 == 0,
            "hybrid": odd_segment == upper_half,
        }[kind]
    mask = from_input.to(input.dtype).expand_as(input)
    return Masks(mask, 1 - mask)


def _smoothed_energy(x: Tensor) -> Tensor:
    """Energy of every channel, averaged over neighbouring frames, `[B, D, T]` → the same shape."""
    return F.avg_pool1d(x.square(), SMOOTHING, stride=1, padding=SMOOTHING // 2, count_include_pad=False)


def apply_mask(x: Tensor, mask: Tensor) -> Tensor:
    """Masked latents `[B, D, T]`, rescaled to their RMS before. A mask of another shape raises `ValueError`."""
    if mask.shape != x.shape:
        raise ValueError(f"mask is {list(mask.shape)}, the latents are {list(x.shape)}; give a mask of their shape")
    masked = x * mask
    # bounded, or a clip that is masked out entirely would get a gradient a million times too large
    scale = (rms(x) / rms(masked)).clamp(max=MAX_RESTORATION)
    return masked * scale[:, None, None]


def complementarity(masks: Masks) -> Tensor:
    """1 − mean(m_in · m_tgt), `[B]`: 0.75 for two constant masks of 0.5, 1 for masks that do not overlap."""
    return 1 - (masks.input * masks.target).mean(dim=(1, 2))
