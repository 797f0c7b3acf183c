"""What a straightforward build of the reference looks like: stock parts, as their documentation shows them.

`nn.TransformerEncoder` with its own dropout of 0.1, in attention too, and the legacy spectral norm. It shares no code
with lib, and stays as it is while lib becomes faster.
"""

import functools
import math

import torch
from torch import Tensor, nn

from lib.model.cascade import Cascade


class StockCascade(nn.Module):
    """Two stages of width 256 and 384; `[B, 128, T]` twice → `[B, 128, T]`."""

    def __init__(self, num_layers: int = 6, num_heads: int = 8, dropout: float = 0.1):
        super().__init__()
        self.encoders, self.input_norms, self.post_norms, self.projections = (nn.ModuleList() for _ in range(4))
        for d in (256, 384):
            layer = nn.TransformerEncoderLayer(d, num_heads, 4 * d, dropout, "gelu", batch_first=True)
            self.encoders.append(nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False))
            self.input_norms.append(nn.LayerNorm(d))
            self.post_norms.append(nn.LayerNorm(d))
            self.projections.append(nn.utils.spectral_norm(nn.Linear(d, 128)))
        self.dropout = nn.Dropout(dropout)

    @torch.no_grad()
    def copy_from(self, cascade: Cascade) -> "StockCascade":
        """Take over the weights of lib's cascade."""
        for stage, encoder, own in zip(cascade.stages, self.encoders, self.own_parts(), strict=True):
            for layer, stock in zip(stage.layers, encoder.layers, strict=True):
                stock.self_attn.in_proj_weight.copy_(layer.qkv.weight)
                stock.self_attn.in_proj_bias.copy_(layer.qkv.bias)
                pairs = [(stock.self_attn.out_proj, layer.attention_out), (stock.norm1, layer.norm1)]
                pairs += [(stock.linear1, layer.ffn_in), (stock.linear2, layer.ffn_out), (stock.norm2, layer.norm2)]
                for to, source in pairs:
                    to.load_state_dict(source.state_dict())
            input_norm, post_norm, projection = own
            input_norm.load_state_dict(stage.input_norm.state_dict())
            post_norm.load_state_dict(stage.post_norm.state_dict())
            norm = stage.output_projection.parametrizations.weight[0]
            projection.weight_orig.copy_(stage.output_projection.parametrizations.weight.original)
            projection.weight_u.copy_(norm._u)
            projection.weight_v.copy_(norm._v)
            projection.bias.copy_(stage.output_projection.bias)
        return self

    def own_parts(self) -> zip:
        return zip(self.input_norms, self.post_norms, self.projections, strict=True)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        output = None
        for encoder, (input_norm, post_norm, projection) in zip(self.encoders, self.own_parts(), strict=True):
            sources = [input, target] if output is None else [input, output, target]
            x = torch.cat(sources, dim=1).transpose(1, 2)
            x = self.dropout(x + positions(x.shape[1], x.shape[2], x.device))
            x = projection(post_norm(encoder(input_norm(x)))).transpose(1, 2)
            x = x.float() + sum(sources) / len(sources)
            wanted = ((rms(input) ** 2 + rms(target) ** 2) / 2).sqrt()
            output = x * (wanted / (rms(x) + 1e-8)).clamp(0.7, 1.5)
        return output


@functools.lru_cache
@torch.inference_mode(False)
def positions(T: int, d: int, device: torch.device) -> Tensor:
    angles = torch.arange(T, device=device)[:, None] * torch.exp(
        torch.arange(0, d, 2, device=device) * (-math.log(10_000.0) / d)
    )
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


def rms(x: Tensor) -> Tensor:
    return (x.square().mean(dim=(1, 2), keepdim=True) + 1e-8).sqrt()
