"""The spectral-norm projection that ends every stage, its true largest singular value, and the RMS ceiling it implies.
Legend: d width of the stage, D latent channels, γ scale of the LayerNorm before the projection."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SpectralLinear(nn.Linear):
    """Linear map with bias whose weight is divided by its largest singular value: `[..., d] → [..., D]`. The division
    is torch's `spectral_norm` (Miyato et al. 2018, arXiv 1802.05957), whose one power iteration per training forward
    cannot keep up with Adam: the true σ exceeds 1 by several per cent (shown in the tests). So every training forward
    first realigns the singular vectors. In eval mode they are fixed: call `realign` after an optimizer step."""

    SQUARINGS = 12  # 2¹² power iterations: σ is right to 1e-3 even where no gap separates the singular values

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)
        nn.utils.parametrizations.spectral_norm(self)
        self.realign()

    @torch.no_grad()
    def realign(self) -> None:
        """Set u and v to the weight's leading singular vectors. Squarings of W·Wᵀ never wait for the device."""
        weight, norm = self.parametrizations.weight.original, self.parametrizations.weight[0]
        with torch.autocast(weight.device.type, enabled=False):
            gram = weight @ weight.T  # [D, D]
            for _ in range(self.SQUARINGS):
                gram = gram / gram.norm()
                gram = gram @ gram
            largest = gram.norm(dim=0).argmax(keepdim=True)  # every column is a multiple of u; this one is not near 0
            norm._u.copy_(F.normalize(gram.index_select(1, largest).squeeze(1), dim=0))
            norm._v.copy_(F.normalize(weight.T @ norm._u, dim=0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.realign()
        with torch.autocast(x.device.type, enabled=False):  # a power iteration in bf16 is off by a per cent
            weight = self.weight
        return F.linear(x, weight, self.bias)


def realign_projections(model: nn.Module) -> None:
    """Realign every `SpectralLinear` of a model whose weights have moved since its last training forward."""
    for module in model.modules():
        if isinstance(module, SpectralLinear):
            module.realign()


@torch.no_grad()
def applied_weight(linear: nn.Linear) -> Tensor:
    """The weight `[D, d]` that the layer's next forward applies."""
    training = linear.training
    if training and isinstance(linear, SpectralLinear):
        linear.realign()
    linear.eval()  # in training mode, reading `weight` would run a power iteration
    try:
        return linear.weight.detach()
    finally:
        linear.train(training)


def spectral_sigma(linear: nn.Linear) -> float:
    """Largest singular value of the weight that the layer's next forward applies, by SVD in float64."""
    return torch.linalg.matrix_norm(applied_weight(linear).double(), ord=2).item()


def rms_ceiling(d: int, D: int, gamma: float = 1.0) -> float:
    """Largest RMS that a projection `d → D` with σ ≤ 1 can give to LayerNorm's output, before its bias: √(d/D)·γ, as
    that has norm √d·γ in every frame, over D channels. For D > d it is still an upper bound (notebook 03)."""
    if d < 1 or D < 1 or gamma < 0:
        raise ValueError(f"rms_ceiling needs d ≥ 1, D ≥ 1 and gamma ≥ 0, got d={d}, D={D}, gamma={gamma}")
    return math.sqrt(d / D) * gamma
