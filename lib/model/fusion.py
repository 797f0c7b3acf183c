"""The whole model: the creative agent's masks, then the cascade.

Legend: B batch, D latent channels, T frames.
"""

from typing import NamedTuple

from torch import Tensor, nn

from lib.model.cascade import Cascade, CascadeConfig, StageTrace
from lib.model.masks import MaskGenerator, MaskingConfig, Masks, apply_mask, fixed_masks, harden


class Fusion(NamedTuple):
    """What the model returns."""

    latents: Tensor  # [B, D, T]
    traces: tuple[StageTrace, ...]  # one a stage
    masks: Masks | None  # None without an agent


class FusionModel(nn.Module):
    """Fuse two latents into one. With the learned masks and the two-stage reference: 16,553,984 parameters.

    The masks are computed once a pass; everything after them, residuals and the wanted RMS included, sees the masked
    latents, each brought back to the RMS of its clip (as in the original).
    """

    def __init__(self, cascade: CascadeConfig | None = None, masking: MaskingConfig | None = None):
        super().__init__()
        self.cascade = Cascade(cascade)
        self.masking = masking or MaskingConfig()
        learned = self.masking.masking == "learned"
        self.mask_generator = MaskGenerator(self.cascade.config.latent_dim) if learned else None

    def forward(self, input: Tensor, target: Tensor, masks: Masks | None = None, stages: int | None = None) -> Fusion:
        """`input`, `target` `[B, D, T]`, any T ≥ 1; `masks` of their shape replace those that the model would make.

        `stages`: how many of the cascade's stages to apply, from the first; None: all."""
        self.cascade.check_shapes(input, target)  # before the masks, whose own errors would name no cause
        masks = masks or self.make_masks(input, target)
        if masks is not None:
            input, target = apply_mask(input, masks.input), apply_mask(target, masks.target)
        latents, traces = self.cascade(input, target, stages)
        return Fusion(latents, traces, masks)

    def make_masks(self, input: Tensor, target: Tensor) -> Masks | None:
        """What is taken of each clip; None without masking."""
        if self.mask_generator is not None:
            masks = Masks(*(mask.float() for mask in self.mask_generator(input, target)))
            return harden(masks) if self.masking.hard_masks else masks
        return None if self.masking.masking == "none" else fixed_masks(self.masking.masking, input, target)
