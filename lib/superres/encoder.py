"""The global encoder: context from a low-resolution clip's mel spectrogram, as one vector and as a sequence."""

import torch
from torch import Tensor, nn

from lib.superres.mel import MELS
from lib.util.configs import Count, Fraction, checked_dataclass

# output channels, kernel, stride, padding over (bands, frames): the seed's table
BLOCKS = ((32, (8, 3), (4, 1), (2, 1)), (64, (4, 3), (2, 1), (1, 1)), (256, (4, 3), (2, 1), (1, 1)))


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

    The seed's kernels and strides reduce the 256 bands to 16, not to the 8 of its table, so neighbours are averaged.
    The seed creates the projection of a frame's 256 · 8 values in the first forward pass, after the optimizer got its
    parameters, so that it would never learn. Here it is a layer like any other.
    """

    def __init__(self, config: EncoderConfig | None = None):
        super().__init__()
        config = config or EncoderConfig()
        self.config = config
        blocks, before = [], 1
        for channels, (_, kernel, stride, padding) in zip(config.channels, BLOCKS, strict=True):
            blocks += [nn.Conv2d(before, channels, kernel, stride, padding), nn.BatchNorm2d(channels), nn.ReLU()]
            before = channels
        self.convolutions = nn.Sequential(*blocks, nn.AvgPool2d((2, 1)))
        self.frame_projection = nn.Linear(before * MELS // 32, config.hidden_dim)
        self.positions = nn.Parameter(0.02 * torch.randn(1, config.positions, config.hidden_dim))
        layer = nn.TransformerEncoderLayer(
            config.hidden_dim, config.num_heads, config.ffn_dim, config.dropout, batch_first=True
        )
        self.transformer = nn.TransformerEncoder(layer, config.num_layers, enable_nested_tensor=False)
        self.output_projection = nn.Sequential(
            nn.Linear(config.hidden_dim, config.hidden_dim),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden_dim, config.context_dim),
        )
        self.global_projection = nn.Linear(config.context_dim, config.context_dim)

    def forward(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.convolutions(mel)  # [B, C, 8, T]
        frames = self.frame_projection(maps.flatten(1, 2).transpose(1, 2))  # [B, T, hidden_dim]
        sequence = self.output_projection(self.transformer(frames + self.positions_for(frames.shape[1])))
        return self.global_projection(sequence.mean(dim=1)), sequence

    def positions_for(self, length: int) -> Tensor:
        """`[1, length, hidden_dim]`, interpolated linearly between the learned ones."""
        if length == self.positions.shape[1]:
            return self.positions
        return nn.functional.interpolate(self.positions.mT, length, mode="linear", align_corners=True).mT
