"""What notebook 03 measures on a cascade: traces over residual weights, gains of RMS scaling, Jacobian norms.
Legend: B batch, D latent channels, T frames."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lib.model.cascade import Cascade, RmsScaling, StageTrace


@torch.no_grad()
def last_stage_over_weights(cascade: Cascade, weights: list[float], input: Tensor, target: Tensor) -> list[StageTrace]:
    """The last stage's trace at each residual weight, in eval mode; the cascade is left as it was."""
    last, training = cascade.stages[-1], cascade.training
    cascade.eval()
    signals, _ = cascade.run_stages(input, target, len(cascade.stages) - 1)
    traces = []
    for weight in weights:
        with last.override(residual_weight=weight):
            traces.append(last(signals)[1])
    cascade.train(training)
    return traces


def scaling_gains(scaling: RmsScaling, x: Tensor, goal: Tensor) -> tuple[float, float]:
    """The gain of RMS scaling on a gradient parallel to its input `x [1, D, T]`, and on an orthogonal one, by autograd.

    Unclamped, x ↦ g·x/rms(x) does not change when x grows: the gain is 0 along x, and g/rms(x) across. A clamped scale
    c makes it the linear map x ↦ c·x, whose gain is c in both directions. `goal`: the RMS of both clips, `[1]`.
    """
    x = x.detach().requires_grad_()
    output = scaling(x, goal, goal)[0]
    along = x.detach() / x.detach().norm()
    generator = torch.Generator().manual_seed(271_828)  # not the seed of x, or nothing would be left across it
    across = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    across = across - (across * along).sum() * along
    directions = along, across / across.norm()
    return tuple(torch.autograd.grad(output, x, d, retain_graph=True)[0].norm().item() for d in directions)


def jacobian_norm(function: Callable[[Tensor], Tensor], x: Tensor, *, iterations: int = 20, seed: int = 0) -> float:
    """Largest singular value of the Jacobian of `function` at `x`: its local Lipschitz constant there.

    Power iteration on JᵀJ, which approaches the true value from below. `function` must be deterministic.
    """
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype).to(x.device)
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention has no forward-mode derivative
        _, pull_back = torch.func.vjp(function, x)
        for _ in range(iterations):
            _, pushed = torch.func.jvp(function, (x,), (v / v.norm(),))
            if not pushed.any():
                break
            (v,) = pull_back(pushed)
    return pushed.norm().item()


def lipschitz_constants(
    two: Cascade, three: Cascade, input: Tensor, target: Tensor, level: float, seed: int
) -> dict[str, float]:
    """Jacobian norms of parts and of whole cascades, with respect to both clips `[1, D, T]` together."""
    both, stage = torch.stack((input, target)), two.stages[0]  # [2, 1, D, T]
    z = torch.randn(1, input.shape[2], 256, generator=torch.Generator().manual_seed(seed))
    return {
        "projection": jacobian_norm(stage.output_projection, z, iterations=12),
        "LayerNorm + projection": jacobian_norm(lambda v: stage.output_projection(stage.post_norm(v)), level * z),
        "stage 0": jacobian_norm(lambda v: stage({"input": v[0], "noisy_input": v[0], "target": v[1]})[0], both),
        "two stages": jacobian_norm(lambda v: two(v[0], v[1])[0], both, iterations=12),
        "exploding 3-stage": jacobian_norm(lambda v: three(v[0], v[1])[0], both, iterations=12),
    }


def largest_sigma(layer: nn.Linear, rate: float, steps: int = 40) -> float:
    """Largest true σ that a spectral-norm layer applied in a forward pass while AdamW fitted it to a random map."""
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(64, layer.in_features, generator=generator)
    goal = z @ torch.randn(layer.in_features, layer.out_features, generator=generator)
    optimizer, largest = torch.optim.AdamW(layer.parameters(), lr=rate), 0.0
    for _ in range(steps):
        loss = (layer(z) - goal).square().mean()
        weight, norm = layer.parametrizations.weight.original.detach(), layer.parametrizations.weight[0]
        largest = max(largest, (torch.linalg.matrix_norm(weight, 2) / (norm._u @ weight @ norm._v)).item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return largest
