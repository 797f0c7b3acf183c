"""Learned masks that decide what is taken from each clip. Legend as in `cascade`."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.model.cascade import LATENT_DIM, rms
from lib.util.configs import Count, Flag, check, checked_dataclass, choice

MASKINGS = ("none", "learned", "wide")
SMALLEST = 1e-6  # squared amplitude below which a sum's root is not exact
MAX_RESTORATION = 1000.0  # largest scale that restores the RMS of masked latents
HIT_CHANNELS, NOTE_FRAMES = 13, 25  # 490 Hz of mdct's bands and a third of a second
LEVEL_FRAMES = 75  # a second


@checked_dataclass
class MaskingConfig:
    """What is taken from each clip before the cascade sees it."""

    masking: choice(MASKINGS) = "none"  # 'learned' (the original generator) or 'wide' (ours)
    restore_rms: Flag = True  # bring each masked clip back to its RMS: however little is taken of it, it stays as loud
    root: Count = 1  # of amplitudes that latents are (mdct: 3); without a cascade, the clips' amplitudes are added

    def __post_init__(self):
        check(self.root % 2, "root", self.root, "an odd number: latents keep their sign")


class Masks(NamedTuple):
    """How much of each clip is taken, `[B, D, T]`, 0 to 1."""

    input: Tensor
    target: Tensor


class MaskGenerator(nn.Module):
    """Learned masks from both latents; 1,083,904 parameters, named as in the original checkpoints. Two convolutions
    analyse each clip; each attends to the other, through one attention layer; two more give its mask."""

    def __init__(self, latent_dim: int = LATENT_DIM, width: int = 256, num_heads: int = 4):
        super().__init__()
        self.input_analyzer = nn.Sequential(*_convolutions(latent_dim, width, width, kernel=3), nn.ReLU())
        self.target_analyzer = nn.Sequential(*_convolutions(latent_dim, width, width, kernel=3), nn.ReLU())
        self.cross_attention = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.input_mask_generator = nn.Sequential(*_convolutions(width, latent_dim, latent_dim, kernel=1))
        self.target_mask_generator = nn.Sequential(*_convolutions(width, latent_dim, latent_dim, kernel=1))

    def forward(self, input: Tensor, target: Tensor) -> Masks:
        """`input`, `target` `[B, D, T]` → masks between 0 and 1."""
        a, b = self.input_analyzer(input).mT, self.target_analyzer(target).mT  # [B, T, width]
        from_a, from_b = (self.cross_attention(q, kv, kv, need_weights=False)[0].mT for q, kv in ((a, b), (b, a)))
        return Masks(self.input_mask_generator(from_a).sigmoid(), self.target_mask_generator(from_b).sigmoid())


class WideMaskGenerator(nn.Module):
    """Learned masks from a wide view: two-dimensional convolutions over channels and frames of both clips together,
    dilated so that an element's masks depend on 1.1 s to either side and on nothing further away; 63,932 parameters.
    For codecs whose channels are bands in order. It starts as HPSS with a crossover: the input's hits with the target's
    held notes in the lower half of the channels, the input in the upper half."""

    DILATIONS = ((1, 1), (1, 2), (2, 4), (1, 8), (2, 1), (1, 4))  # of bands and frames, block by block
    BAND = 4  # channels that the blocks treat as one

    def __init__(self, latent_dim: int = LATENT_DIM, width: int = 24):
        super().__init__()
        check(latent_dim % self.BAND == 0, "latent_dim", latent_dim, f"a multiple of {self.BAND} for wide masks")
        self.bands = nn.Conv2d(6, width, (self.BAND, 3), stride=(self.BAND, 1), padding=(0, 1))
        self.positions = nn.Parameter(torch.zeros(width, latent_dim // self.BAND, 1))
        self.blocks = nn.ModuleList()
        for bands, frames in self.DILATIONS:
            convolution = nn.Conv2d(width, width, (3, 5), padding=(bands, 2 * frames), dilation=(bands, frames))
            self.blocks.append(nn.Sequential(convolution, _FrameNorm(4, width), nn.GELU()))
        self.channels = nn.ConvTranspose2d(width, width, (self.BAND, 1), stride=(self.BAND, 1))
        self.head = nn.Sequential(nn.Conv2d(width + 6, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, 2, 1))
        self.gains = nn.Parameter(torch.tensor([1.0, -1.0]))
        upper = 6.0 * (torch.arange(latent_dim) >= latent_dim // 2)
        self.offsets = nn.Parameter(torch.stack([upper, -upper])[..., None])
        nn.init.zeros_(self.head[-1].weight)
        nn.init.zeros_(self.head[-1].bias)
        self.to(memory_format=torch.channels_last)  # a step takes two thirds of the time on a CPU

    def forward(self, input: Tensor, target: Tensor) -> Masks:
        """`input`, `target` `[B, D, T]` → masks between 0 and 1."""
        powers = torch.stack([_log_power(input), _log_power(target)], dim=1)  # [B, 2, D, T]
        # how much more a place belongs to a hit than to a held note, in nepers of amplitude: the geometric mean over
        # neighbouring channels less the one over frames. HPSS (Fitzgerald, DAFx 2010) takes medians
        hits = (_average(powers, HIT_CHANNELS, 1) - _average(powers, 1, NOTE_FRAMES)) / 2
        powers = (powers - _average(powers.mean(dim=(1, 2), keepdim=True), 1, LEVEL_FRAMES)) / 4
        clips = torch.cat([powers, F.pad(2 * powers.diff(dim=3), (1, 0)), hits], dim=1)  # [B, 6, D, T]
        x = self.bands(clips) + self.positions  # [B, width, D / 4, T]
        for block in self.blocks:
            x = x + block(x)
        known = self.gains[:, None, None] * hits + self.offsets
        odds = known + self.head(torch.cat([self.channels(x), clips], dim=1))
        return Masks(*odds.sigmoid().unbind(dim=1))


class _FrameNorm(nn.GroupNorm):
    """Of each frame alone: what plays a minute later changes nothing."""

    def forward(self, x: Tensor) -> Tensor:
        frames = super().forward(x.movedim(3, 1).flatten(0, 1))  # [B·T, width, D / 4]
        return frames.unflatten(0, (len(x), -1)).movedim(1, 3)


def _average(x: Tensor, channels: int, frames: int) -> Tensor:
    """Moving average over channels and frames of `[B, N, D, T]`, fewer at the edges."""
    return F.avg_pool2d(x, (channels, frames), 1, (channels // 2, frames // 2), count_include_pad=False)


def _log_power(x: Tensor) -> Tensor:
    """Logarithm of the power, smoothed: an mdct coefficient alone depends on the phase, its neighbours' difference
    supplies the other part. Latents are cube roots, so their sixth power is meant."""
    cubes = x.pow(3)
    padded = F.pad(cubes, (1, 1), mode="replicate")
    slopes = padded[..., 2:] - padded[..., :-2]
    return (cubes.square() + slopes.square() + 1e-2).log()


def _convolutions(inputs: int, hidden: int, outputs: int, kernel: int) -> list[nn.Module]:
    first = nn.Conv1d(inputs, hidden, 3, padding=1)
    return [first, nn.ReLU(), nn.Conv1d(hidden, outputs, kernel, padding=kernel // 2)]


GENERATORS = {"learned": MaskGenerator, "wide": WideMaskGenerator}


def apply_mask(x: Tensor, mask: Tensor, restore_rms: bool = True) -> Tensor:
    """Masked latents `[B, D, T]`, with `restore_rms` at their RMS before. `ValueError` for a mask of another shape."""
    if mask.shape != x.shape:
        raise ValueError(f"mask is {list(mask.shape)}, the latents are {list(x.shape)}; give a mask of their shape")
    masked = x * mask
    if not restore_rms:
        return masked
    # bounded, or a clip that is masked out entirely would get a gradient a million times too large
    scale = (rms(x) / rms(masked)).clamp(max=MAX_RESTORATION)
    return masked * scale[:, None, None]


def added(input: Tensor, target: Tensor, root: int) -> Tensor:
    """The sum of latents `[B, D, T]` that are the `root`-th roots of amplitudes, an odd number: of those amplitudes. So
    nothing is distorted where both clips sound."""
    total = input.pow(root) + target.pow(root)
    return total / (total.square() + SMALLEST).pow((1 - 1 / root) / 2)  # a root whose gradient at 0 is finite


def complementarity(masks: Masks) -> Tensor:
    """1 − mean(m_in · m_tgt), `[B]`: 0.75 for two constant masks of 0.5, 1 for masks that do not overlap."""
    return 1 - (masks.input * masks.target).mean(dim=(1, 2))
