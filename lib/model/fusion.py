"""The whole model, masks and cascade; and the model of a trained run. Legend as in `cascade`."""

import dataclasses
from typing import Any, NamedTuple

from torch import Tensor, nn

from lib.model.cascade import Cascade, CascadeConfig, StageTrace
from lib.model.masks import GENERATORS, MaskingConfig, Masks, added, apply_mask
from lib.util.configs import from_fields
from lib.util.errors import UserError
from lib.util.files import naming


class Fusion(NamedTuple):
    """What the model returns."""

    latents: Tensor  # [B, D, T]
    traces: tuple[StageTrace, ...]  # one per stage
    masks: Masks | None  # None without masking
    root: int = 1  # as in `added`, by which a model without stages has summed the masked clips
    stages: tuple[Tensor, ...] = ()  # [B, D, T], the latents after each stage that was applied


class FusionModel(nn.Module):
    """Fuse two latents into one. With learned masks and the two-stage reference: 16,553,984 parameters. The masks are
    computed once per forward pass. Everything after them, residuals and RMS scaling included, sees the masked latents.
    A cascade without stages leaves their sum."""

    def __init__(self, cascade: CascadeConfig | None = None, masking: MaskingConfig | None = None):
        super().__init__()
        self.cascade = Cascade(cascade)
        self.masking = masking or MaskingConfig()
        generator = GENERATORS.get(self.masking.masking)
        self.mask_generator = generator and generator(self.cascade.config.latent_dim)

    def forward(self, input: Tensor, target: Tensor, masks: Masks | None = None, stages: int | None = None) -> Fusion:
        """Of `[B, D, T]` twice, T ≥ 1. `masks` of that shape replace the model's own; `stages`: of `run_stages`."""
        self.cascade.check_shapes(input, target)  # before the masks, whose own errors would name no cause
        masks = masks or self.make_masks(input, target)
        if masks is not None:
            restore = self.masking.restore_rms
            input, target = apply_mask(input, masks.input, restore), apply_mask(target, masks.target, restore)
        if not self.cascade.stages:
            return Fusion(added(input, target, self.masking.root), (), masks, self.masking.root)
        signals, traces = self.cascade.run_stages(input, target, stages)
        outputs = tuple(signals[f"stage{i}"] for i in range(len(traces)))
        return Fusion(outputs[-1], traces, masks, stages=outputs)

    def make_masks(self, input: Tensor, target: Tensor) -> Masks | None:
        """What is taken from each clip; None without masking."""
        if self.mask_generator is None:
            return None
        return Masks(*(mask.float() for mask in self.mask_generator(input, target)))

    def without_stages(self) -> "FusionModel":
        """The same masks without the cascade: the sum of the masked latents. In eval mode."""
        replace = dataclasses.replace
        alone = FusionModel(replace(self.cascade.config, stages=()), replace(self.masking, root=1))
        alone.mask_generator = self.mask_generator
        return alone.eval()


def load_model(run: Any, which: str = "best", *, codec_fingerprint: str | None = None) -> FusionModel:
    """The model of a `lib.training.run.Run`, in eval mode, on the CPU: `load_model(Run.open("outputs/demo"))`. `which`:
    'best' or 'last' checkpoint. `UserError` if the run was trained on another codec than `codec_fingerprint`."""
    if not {"cascade", "masking"} <= set(run.config):
        raise UserError(f"{run.path / 'config.json'}: describes no model; give a run that this project trained")
    run.check_codec(codec_fingerprint)
    with naming(run.path / "config.json", "train again"):  # damaged, or of a run by other code
        cascade = from_fields(CascadeConfig, run.config["cascade"])
        model = FusionModel(cascade, from_fields(MaskingConfig, run.config["masking"]))
    run.load_weights(model, which)
    model.run = run
    return model


def check_codec(model: nn.Module, fingerprint: str) -> None:
    """`UserError` if the model is of a run that was trained on another codec's latents."""
    if run := getattr(model, "run", None):
        run.check_codec(fingerprint)
