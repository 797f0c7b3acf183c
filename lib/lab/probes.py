"""What notebook 03 measures of a cascade: traces over weights, gains of the scaling, Jacobian norms.

Legend: B batch, D latent channels, T frames.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lib.model.cascade import Cascade, RmsScaling, StageTrace


def set_last_stage(cascade: Cascade, **changes: object) -> None:
    """Change settings of the last stage that no tensor depends on: residual weight and source, mixing, clamp."""
    last = cascade.stages[-1]
    last.config = dataclasses.replace(last.config, **changes)
    last.rms_scaling.clamp = last.config.clamp


@torch.no_grad()
def last_stage_over_weights(cascade: Cascade, weights: list[float], input: Tensor, target: Tensor) -> list[StageTrace]:
    """The last stage's trace in an eval pass with each residual weight; the cascade is left as it was."""
    last, seen = cascade.stages[-1], []
    training, before = cascade.training, last.config.residual_weight
    hook = last.register_forward_pre_hook(lambda stage, arguments: seen.append(dict(arguments[0])))
    cascade.eval()
    cascade(input, target)  # the stages before see no difference
    hook.remove()
    traces = []
    for weight in weights:
        set_last_stage(cascade, residual_weight=weight)
        traces.append(last(seen[0])[1])
    set_last_stage(cascade, residual_weight=before)
    cascade.train(training)
    return traces


def scaling_gains(scaling: RmsScaling, x: Tensor, goal: Tensor) -> tuple[float, float]:
    """How much RMS scaling stretches a gradient along its input `x [1, D, T]`, and across it, by autograd.

    Unclamped, x ↦ g·x/rms(x) does not change when x grows: 0 along x, the factor g/rms(x) across. Through a clamped
    factor it is the linear map x ↦ c·x: c in both. `goal`: the wanted RMS, `[1]`.
    """
    x = x.detach().requires_grad_()
    output = scaling(x, goal, goal)[0]
    along = x.detach() / x.detach().norm()
    generator = torch.Generator().manual_seed(271_828)  # not what made x, or nothing would be left across it
    across = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    across = across - (across * along).sum() * along
    across = across / across.norm()
    gains = []
    for direction in (along, across):
        (gradient,) = torch.autograd.grad(output, x, direction, retain_graph=True)
        gains.append(gradient.norm().item())
    return gains[0], gains[1]


def jacobian_norm(function: Callable[[Tensor], Tensor], x: Tensor, *, iterations: int = 20, seed: int = 0) -> float:
    """Largest singular value of the Jacobian of `function` at `x`: its local Lipschitz constant there.

    Power iteration on JᵀJ, whose value grows towards the true one from below. `function` must not be random.
    """
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype).to(x.device)
    sigma = 0.0
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention has no forward-mode derivative
        _, pull_back = torch.func.vjp(function, x)
        for _ in range(iterations):
            v = v / v.norm()
            _, pushed = torch.func.jvp(function, (x,), (v,))
            sigma = pushed.norm().item()
            if sigma == 0:
                break
            (v,) = pull_back(pushed)
    return sigma
