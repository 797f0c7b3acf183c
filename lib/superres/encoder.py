"""The global encoder: context from a low-resolution clip's mel spectrogram, as one vector and as a sequence."""

import itertools

import torch
from torch import Tensor, nn

from lib.superres.mel import MELS
from lib.util.configs import Count, Fraction, checked_dataclass

# kernel, stride, padding over (bands, frames): the seed's table
BLOCKS = (((8, 3), (4, 1), (2, 1)), ((4, 3), (2, 1), (1, 1)), ((4, 3), (2, 1), (1, 1)))


@checked_dataclass
class EncoderConfig:
    """Sizes of the encoder; the defaults are seed 004's."""

    channels: tuple[Count, Count, Count] = (32, 64, 256)  # of the three convolutions
    hidden_dim: Count = 256
    num_layers: Count = 4
    num_heads: Count = 8
    ffn_dim: Count = 512
    context_dim: Count = 128
    positions: Count = 1024  # learned; interpolated for clips of another length
    dropout: Fraction = 0.1


class GlobalAudioEncoder(nn.Module):
    """Log mel `[B, 1, 256, T]` → pooled context `[B, context_dim]` and context sequence `[B, T, context_dim]`.

    The seed's kernels and strides reduce 256 bands to 16, not to the 8 of its table, so neighbours are averaged. It
    creates the frame projection after the optimizer, so it would never be trained; here it is an ordinary layer.
    """

    def __init__(self, config: EncoderConfig | None = None):
        super().__init__()
        self.config = config = config or EncoderConfig()
        blocks = []
        for (before, after), geometry in zip(itertools.pairwise((1, *config.channels)), BLOCKS, strict=True):
            blocks += [nn.Conv2d(before, after, *geometry), nn.BatchNorm2d(after), nn.ReLU()]
        self.convolutions = nn.Sequential(*blocks, nn.AvgPool2d((2, 1)))
        self.frame_projection = nn.Linear(after * MELS // 32, config.hidden_dim)
        self.positions = nn.Parameter(0.02 * torch.randn(1, config.positions, config.hidden_dim))
        layer = nn.TransformerEncoderLayer(
            config.hidden_dim, config.num_heads, config.ffn_dim, config.dropout, batch_first=True
        )
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
        if length == self.positions.shape[1]:
            return self.positions  # [1, length, hidden_dim]
        return nn.functional.interpolate(self.positions.mT, length, mode="linear", align_corners=True).mT
