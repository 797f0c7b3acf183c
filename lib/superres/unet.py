"""The denoiser: a UNet over mel latents, conditioned on the low-resolution clip's latents by concatenation and on the
global encoder's context by cross-attention. It is diffusers' `UNet2DConditionModel` with other transformers."""

import torch
from torch import Tensor, nn

from lib.superres.encoder import EncoderConfig, GlobalAudioEncoder
from lib.util.configs import Count, Flag, check, checked_dataclass, choice

CONTEXTS = ("sequence", "pooled")


@checked_dataclass
class DenoiserConfig:
    """Sizes of the UNet and its encoder; the defaults are seed 004's."""

    latent_channels: Count = 16
    channels: tuple[Count, ...] = (128, 256, 384, 640)  # of each level, at half the resolution of the one before
    attention: tuple[Flag, ...] = (False, True, True, True)  # levels at 1/2, 1/4 and 1/8 have transformers
    num_res_blocks: Count = 2
    head_channels: Count = 32
    transformers: Count = 2  # in each stack
    norm_groups: Count = 32
    context: choice(CONTEXTS) = "sequence"  # of cross-attention: 'pooled' is the seed's one vector
    encoder: EncoderConfig = EncoderConfig()

    def __post_init__(self):
        check(len(self.attention) == len(self.channels), "attention", self.attention, "one value for each of channels")


class GlobalTransformer(nn.Module):
    """Cross-attention from every position of a map to the projected global context, added to the map, then an ordinary
    transformer block: seed 004's `GlobalConditionedSpatialTransformer`."""

    def __init__(self, channels: int, head_channels: int, context_dim: int, norm_groups: int):
        from diffusers import Transformer2DModel  # seconds to import

        super().__init__()
        heads = channels // head_channels
        self.global_projection = nn.Linear(context_dim, channels)
        self.global_attention = nn.MultiheadAttention(channels, heads, batch_first=True)
        options = {"norm_num_groups": norm_groups, "double_self_attention": True}
        self.block = Transformer2DModel(heads, head_channels, channels, **options)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Maps `[B, C, H, W]`, context `[B, L, context_dim]` → `[B, C, H, W]`."""
        return self.block(x + self.attend(x, context), return_dict=False)[0]

    def attend(self, x: Tensor, context: Tensor) -> Tensor:
        """The output, `[B, C, H, W]`: with L = 1 the same everywhere, as a softmax over one key is 1 for any query."""
        keys = self.global_projection(context)  # [B, L, C]
        places = x.flatten(2).transpose(1, 2)  # [B, H·W, C]
        received, _ = self.global_attention(places, keys, keys, need_weights=False)
        return received.transpose(1, 2).unflatten(2, x.shape[2:])


class TransformerStack(nn.Sequential):
    """Global transformers in sequence, with the signature that diffusers' blocks call."""

    def forward(self, x: Tensor, encoder_hidden_states: Tensor, **_: object) -> tuple[Tensor]:
        for transformer in self:
            x = transformer(x, encoder_hidden_states)
        return (x,)


class Denoiser(nn.Module):
    """Encoder and UNet, trained together, and a learned null context."""

    def __init__(self, config: DenoiserConfig | None = None):
        from diffusers import UNet2DConditionModel  # seconds to import

        super().__init__()
        self.config = config = config or DenoiserConfig()
        self.encoder = GlobalAudioEncoder(config.encoder)
        kinds = ["CrossAttn" * attends + "{}Block2D" for attends in config.attention]
        self.unet = UNet2DConditionModel(
            in_channels=2 * config.latent_channels,
            out_channels=config.latent_channels,
            block_out_channels=config.channels,
            down_block_types=tuple(kind.format("Down") for kind in kinds),
            up_block_types=tuple(kind.format("Up") for kind in reversed(kinds)),
            layers_per_block=config.num_res_blocks,
            norm_num_groups=config.norm_groups,
            attention_head_dim=tuple(c // config.head_channels for c in config.channels),  # number of heads, in fact
            cross_attention_dim=config.encoder.context_dim,
        )
        for block in (*self.unet.down_blocks, self.unet.mid_block, *self.unet.up_blocks):
            for i, replaced in enumerate(getattr(block, "attentions", ())):
                sizes = (replaced.in_channels, config.head_channels, config.encoder.context_dim, config.norm_groups)
                stack = (GlobalTransformer(*sizes) for _ in range(config.transformers))
                block.attentions[i] = TransformerStack(*stack)
        self.null_context = nn.Parameter(torch.zeros(1, 1, config.encoder.context_dim))

    def forward(self, noisy: Tensor, timesteps: Tensor, low: Tensor, mel: Tensor, **keeps: Tensor) -> Tensor:
        """Predicted velocity `[B, Z, H, W]`, from noisy and low-resolution latents of that shape and the low-resolution
        mel `[B, 1, 256, T]`; `keeps` as in `conditions`."""
        return self.denoise(noisy, timesteps, *self.conditions(low, mel, **keeps))

    def conditions(
        self, low: Tensor, mel: Tensor, keeps_low: Tensor | None = None, keeps_context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The latents, and the context `[B, L, context_dim]`: the pooled vector, with 'sequence' also one vector a mel
        frame. Zeros and the null context replace them where `keeps_low [B]` and `keeps_context [B]` are false."""
        pooled, sequence = self.encoder(mel)
        context = pooled[:, None]
        if self.config.context == "sequence":
            context = torch.cat([context, sequence], dim=1)
        if keeps_low is not None:
            low = low * keeps_low[:, None, None, None]
        if keeps_context is not None:
            context = torch.where(keeps_context[:, None, None], context, self.null_context)
        return low, context

    def denoise(self, noisy: Tensor, timesteps: Tensor, low: Tensor, context: Tensor) -> Tensor:
        return self.unet(torch.cat([noisy, low], dim=1), timesteps, context, return_dict=False)[0]
