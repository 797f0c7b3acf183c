"""The spectral-norm projection that ends every stage, its true largest singular value, and the RMS ceiling it implies.

Legend: d width of the stage, D latent channels, γ scale of the LayerNorm before the projection.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SpectralLinear(nn.Linear):
    """Linear map with bias whose weight is divided by its largest singular value: `[..., d] → [..., D]`.

    The division is `torch.nn.utils.parametrizations.spectral_norm` (Miyato et al. 2018, arXiv 1802.05957). Its one
    power iteration per training forward cannot follow Adam: the true σ passes 1 by several per cent (shown in the
    tests). So its vectors are realigned before each training forward and on every switch to eval; in eval they stand
    still, and so does σ. Vectors loaded in eval mode are kept as they come.
    """

    SQUARINGS = 12  # 2¹² power iterations: leaves σ right to 1e-3 even where no gap separates the singular values

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)
        nn.utils.parametrizations.spectral_norm(self)
        self.align()

    @torch.no_grad()
    def align(self) -> None:
        """Set u and v to the weight's leading singular vectors: power iteration by repeated squaring of W·Wᵀ, a dozen
        small matrix products without a wait for the device."""
        weight, norm = self.parametrizations.weight.original, self.parametrizations.weight[0]
        with torch.autocast(weight.device.type, enabled=False):
            gram = weight @ weight.T  # [D, D]
            for _ in range(self.SQUARINGS):
                gram = gram / gram.norm()
                gram = gram @ gram
            largest = gram.norm(dim=0).argmax(keepdim=True)  # every column is u times a number; this one is not near 0
            norm._u.copy_(F.normalize(gram.index_select(1, largest).squeeze(1), dim=0))
            norm._v.copy_(F.normalize(weight.T @ norm._u, dim=0))

    def train(self, mode: bool = True) -> "SpectralLinear":
        if self.training and not mode:
            self.align()
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.align()
        with torch.autocast(x.device.type, enabled=False):  # a power iteration in bf16 would blur σ by a per cent
            weight = self.weight
        return F.linear(x, weight, self.bias)


@torch.no_grad()
def spectral_sigma(linear: nn.Linear) -> float:
    """Largest singular value of the weight that the layer applies, by SVD in float64.

    Reading `weight` in training mode would run a power iteration, so the layer is read in eval mode.
    """
    training = linear.training
    linear.eval()
    try:
        return torch.linalg.matrix_norm(linear.weight.double(), ord=2).item()
    finally:
        linear.train(training)


def rms_ceiling(d: int, D: int, gamma: float = 1.0) -> float:
    """Largest RMS that a projection `d → D` with σ ≤ 1 can give to LayerNorm's output, before its bias: √(d/D)·γ.

    LayerNorm leaves every frame with norm √d·γ; σ ≤ 1 cannot lengthen it; spread over D channels its RMS is √(d/D)·γ.
    For D > d it is still an upper bound. Derived in notebook 03.
    """
    if d < 1 or D < 1 or gamma < 0:
        raise ValueError(f"rms_ceiling needs d ≥ 1, D ≥ 1 and gamma ≥ 0, got d={d}, D={D}, gamma={gamma}")
    return math.sqrt(d / D) * gamma


def projection_ceiling(norm: nn.LayerNorm, projection: nn.Linear) -> float:
    """Largest RMS that `projection` can give to the output of `norm` as both stand, its bias included.

    LayerNorm gives γ ⊙ n + β with ‖n‖ = √d, so at most max|γ|·√d + ‖β‖; the projection multiplies that by σ at most and
    adds its bias; over D channels: (σ·(max|γ|·√d + ‖β‖) + ‖b‖)/√D. With γ = 1, β = 0, b = 0 it is `rms_ceiling`.
    """
    D, d = projection.weight.shape
    longest = norm.weight.abs().max().item() * math.sqrt(d) + norm.bias.norm().item()
    return (spectral_sigma(projection) * longest + projection.bias.norm().item()) / math.sqrt(D)
