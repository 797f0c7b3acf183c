"""The band above the codec's, fused beside the model, so that a fusion reaches 12 kHz.

`mdct` carries 0 to 4.8 kHz. What it leaves out of each clip goes through a lapped transform like its own, but with all
320 bins, is companded by the same power law, and is mixed as a model without stages mixes latents: each clip's bins
times its mask, frame by frame. So both bands follow one law of level, and a clip that a mask takes whole is unchanged.
Legend as in `cascade`; N samples, H hop (320). Both clips lie in one batch of 2·B, first the inputs, then the targets.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from lib.codec.codec import Codec
from lib.codec.mdct import GAIN, HOP, ROOT, MdctCodec, _butterfly
from lib.model.cascade import rms
from lib.model.fusion import Fusion
from lib.model.masks import added
from lib.util.tensors import cached_table

TOP = 8  # channels, 4.5 to 4.8 kHz, whose mean mask goes for all bins above
MAX_GAIN = 1.5  # of these bins, as of a cascade's output: one that fills silence would raise the hiss above it


def leaves_out(codec: Codec) -> bool:
    """Whether its latent channels are bands of mono sound, so that what it lacks can be mixed as they are."""
    return isinstance(codec, MdctCodec) and codec.channels == 1


def left_out(codec: Codec, wavs: Tensor, latents: Tensor) -> Tensor:
    """What the codec leaves out of clips `[2·B, 1, N]` of these latents; zeros unless its channels are bands."""
    if not leaves_out(codec):
        return torch.zeros_like(wavs)
    return wavs - codec.decode(latents, length=wavs.shape[-1])


def decode_fusion(codec: Codec, fusion: Fusion, latents: Tensor, rest: Tensor | None, length: int) -> Tensor:
    """A fusion of latents `[2·B, D, T]` as sound `[B, 1, length]`. `rest`: what the codec left out of their clips; None
    for its band alone. If the cascade changes the RMS of the masked clips' sum, the bins above follow."""
    wav = codec.decode(fusion.latents, length=length)
    if rest is None or not leaves_out(codec):
        return wav
    masks = torch.cat(fusion.masks or 2 * [torch.ones_like(fusion.latents)])
    scale = rms(fusion.latents) / rms(added(*(latents * masks).chunk(2), fusion.root))
    gains = scale.repeat(2)[:, None, None] * masks[:, -TOP:].mean(1, keepdim=True)  # [2·B, 1, T]
    cosines = _cosines(wav.device, wav.dtype)
    bins = _butterfly(pad(rest.to(wav)[:, 0], (0, -length % HOP)).unflatten(1, (-1, HOP))) @ cosines  # [2·B, T, H]
    companded = GAIN * bins.sign() * bins.abs().pow(1 / ROOT)  # as latents are: `added` has a smallest amplitude
    mixed = added(*(gains[..., : bins.shape[1]].clamp(max=MAX_GAIN).mT * companded).chunk(2), fusion.root)
    return wav + _butterfly((mixed / GAIN).pow(ROOT) @ cosines, inverse=True).flatten(1)[:, None, :length]


@cached_table
def _cosines(device: torch.device, dtype: torch.dtype) -> Tensor:
    """`[H, H]`, the orthonormal DCT-IV, its own inverse."""
    n = torch.arange(HOP, dtype=torch.float64) + 0.5
    return (math.sqrt(2 / HOP) * torch.cos(math.pi / HOP * n[:, None] * n)).to(device, dtype)
