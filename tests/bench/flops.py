"""Floating-point operations that the model needs, from its config alone. A multiply and an add count as two."""

from lib.model.cascade import CascadeConfig


def forward_flops(config: CascadeConfig, T: int) -> int:
    """Of one clip's pass forward: matrix products only. A test holds it to a counter."""
    total = 0
    for i, stage in enumerate(config.stages):
        d, concat = config.width(i), config.latent_dim * len(stage.sources)
        weights = stage.num_layers * (4 + 2 * stage.ffn_mult) * d * d + d * config.latent_dim
        weights += 0 if d == concat else concat * d
        attention = stage.num_layers * 2 * T * d  # scores and weighted sum, for every frame
        total += 2 * T * (weights + attention)
    return total


def training_flops(config: CascadeConfig, T: int) -> int:
    """Forward and backward: every product forward has two in its gradient. What is computed twice to save memory, as
    attention's scores are, counts once."""
    return 3 * forward_flops(config, T)
