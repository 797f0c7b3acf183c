"""The denoiser: diffusers' `UNet2DConditionModel` over mel latents, with other transformers, conditioned on the low
clip's latents by concatenation and, by cross-attention, on the context that an encoder makes of its mel spectrogram;
and its latent diffusion, all of diffusers: v-prediction (arXiv 2202.00512) on a cosine schedule (arXiv 2102.09672), and
sampling by DPM-Solver++ (arXiv 2211.01095)."""

import functools
import itertools
from typing import Any

import torch
from torch import Tensor, nn

from lib.superres.mel import MELS
from lib.util.configs import Count, Flag, Fraction, check, checked_dataclass, choice

CONTEXTS = ("sequence", "pooled", "none")
TIMESTEPS = 1000
SCHEDULE = {"num_train_timesteps": TIMESTEPS, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
# kernel, stride, padding over (bands, frames): source document 004's table
BLOCKS = (((8, 3), (4, 1), (2, 1)), ((4, 3), (2, 1), (1, 1)), ((4, 3), (2, 1), (1, 1)))


@checked_dataclass
class EncoderConfig:
    """Sizes of the encoder; the defaults are source document 004's."""

    channels: tuple[Count, Count, Count] = (32, 64, 256)  # of the three convolutions
    hidden_dim: Count = 256
    num_layers: Count = 4
    num_heads: Count = 8
    ffn_dim: Count = 512
    context_dim: Count = 128
    positions: Count = 1024  # learned; interpolated for clips of another length
    dropout: Fraction = 0.1


class GlobalAudioEncoder(nn.Module):
    """Log mel `[B, 1, 256, T]` → pooled context `[B, context_dim]` and context sequence `[B, T, context_dim]`. The
    document's kernels reduce 256 bands to 16, not to the 8 of its table, so neighbours are averaged; and its frame
    projection, created after the optimizer, would never be trained."""

    def __init__(self, config: EncoderConfig | None = None):
        super().__init__()
        self.config = config = config or EncoderConfig()
        blocks = []
        for (before, after), geometry in zip(itertools.pairwise((1, *config.channels)), BLOCKS, strict=True):
            blocks += [nn.Conv2d(before, after, *geometry), nn.BatchNorm2d(after), nn.ReLU()]
        self.convolutions = nn.Sequential(*blocks, nn.AvgPool2d((2, 1)))
        self.frame_projection = nn.Linear(after * MELS // 32, config.hidden_dim)
        self.positions = nn.Parameter(0.02 * torch.randn(1, config.positions, config.hidden_dim))
        sizes = (config.hidden_dim, config.num_heads, config.ffn_dim, config.dropout)
        layer = nn.TransformerEncoderLayer(*sizes, batch_first=True)
        self.transformer = nn.TransformerEncoder(layer, config.num_layers, enable_nested_tensor=False)
        first, last = (nn.Linear(config.hidden_dim, size) for size in (config.hidden_dim, config.context_dim))
        self.output_projection = nn.Sequential(first, nn.ReLU(), nn.Dropout(config.dropout), last)
        self.global_projection = nn.Linear(config.context_dim, config.context_dim)

    def forward(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.convolutions(mel)  # [B, C, 8, T]
        frames = self.frame_projection(maps.flatten(1, 2).transpose(1, 2))  # [B, T, hidden_dim]
        sequence = self.output_projection(self.transformer(frames + self.positions_for(frames.shape[1])))
        return self.global_projection(sequence.mean(dim=1)), sequence

    def positions_for(self, length: int) -> Tensor:
        """`[1, length, hidden_dim]`; those of the learned length are not changed."""
        return nn.functional.interpolate(self.positions.mT, length, mode="linear", align_corners=True).mT


@checked_dataclass
class DenoiserConfig:
    """Sizes of the UNet and its encoder; the defaults are source document 004's."""

    latent_channels: Count = 16
    channels: tuple[Count, ...] = (128, 256, 384, 640)  # of each level, at half the resolution of the one before
    attention: tuple[Flag, ...] = (False, True, True, True)  # levels at 1/2, 1/4 and 1/8 have transformers
    num_res_blocks: Count = 2
    head_channels: Count = 32
    transformers: Count = 2  # in each stack
    norm_groups: Count = 32
    context: choice(CONTEXTS) = "sequence"  # of cross-attention: 'pooled' is the document's one vector, 'none' zeros
    encoder: EncoderConfig = EncoderConfig()

    def __post_init__(self):
        check(len(self.attention) == len(self.channels), "attention", self.attention, "one value for each of channels")


class GlobalTransformer(nn.Module):
    """Cross-attention to the projected context, added to a map, then a transformer block, as in source document 004."""

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
    """Encoder and UNet, trained together; untrained, the UNet predicts zeros."""

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
                block.attentions[i] = TransformerStack(*(GlobalTransformer(*sizes) for _ in range(config.transformers)))
        nn.init.zeros_(self.unet.conv_out.weight)
        nn.init.zeros_(self.unet.conv_out.bias)

    def forward(self, noisy: Tensor, timesteps: Tensor, low: Tensor, mel: Tensor) -> Tensor:
        """Velocity `[B, Z, H, W]` from noisy and low latents and the low mel `[B, 1, 256, T]`."""
        return self.denoise(noisy, timesteps, low, self.context(mel))

    def context(self, mel: Tensor) -> Tensor:
        """`[B, L, context_dim]`: the pooled vector, with 'sequence' also one vector a mel frame."""
        pooled, sequence = self.encoder(mel)
        if self.config.context == "none":
            return 0 * pooled[:, None]
        return torch.cat([pooled[:, None], sequence], dim=1) if self.config.context == "sequence" else pooled[:, None]

    def denoise(self, noisy: Tensor, timesteps: Tensor, low: Tensor, context: Tensor) -> Tensor:
        return self.unet(torch.cat([noisy, low], dim=1), timesteps, context, return_dict=False)[0]


@functools.cache
def schedule() -> Any:
    from diffusers import DDIMScheduler  # seconds to import

    return DDIMScheduler(**SCHEDULE)


def add_noise(latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Noisy latents and the velocity to predict, `[B, Z, H, W]` each, at `timesteps [B]`, 0 to 999."""
    return schedule().add_noise(latents, noise, timesteps), schedule().get_velocity(latents, noise, timesteps)


@torch.no_grad()
def sample(denoiser: Denoiser, low: Tensor, mel: Tensor, noise: Tensor, *, steps: int) -> Tensor:
    """Latents `[B, Z, H, W]`, given the low band's latents, its mel `[B, 1, 256, T]` and unit normal noise. One step
    gives the mean that the denoiser expects, whatever the noise."""
    from diffusers import DPMSolverMultistepScheduler

    solver, context, latents = DPMSolverMultistepScheduler(**SCHEDULE), denoiser.context(mel), noise
    solver.set_timesteps(steps)  # 1 to 999, evenly spaced from 999, where only noise is left
    for timestep in solver.timesteps:
        velocity = denoiser.denoise(latents, timestep.to(noise.device).expand(len(low)), low, context)
        latents = solver.step(velocity, timestep, latents, return_dict=False)[0]
    return latents
