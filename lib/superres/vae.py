"""The KL autoencoder of log-mel spectrograms: diffusers' `AutoencoderKL`, as source document 004 names it."""

from typing import Any

from torch import Tensor, nn

from lib.util.configs import Count, Number, Positive, checked_dataclass


@checked_dataclass
class VaeConfig:
    """Sizes; the defaults are document 004's. Each level but the last halves the number of bands and of frames."""

    channels: tuple[Count, ...] = (128, 256, 512, 1024)
    num_res_blocks: Count = 2
    latent_channels: Count = 16
    norm_groups: Count = 32
    mel_mean: Number = 0.0  # of the training set's log mel, which is normalised before the first layer
    mel_std: Positive = 1.0


class MelVae(nn.Module):
    """Log mel `[B, 1, 256, T]` ⇄ the posterior's mean `[B, Z, 32, T / 8]` (with four levels)."""

    def __init__(self, config: VaeConfig | None = None):
        from diffusers import AutoencoderKL  # seconds to import

        super().__init__()
        self.config = config = config or VaeConfig()
        levels = len(config.channels)
        self.autoencoder = AutoencoderKL(
            in_channels=1,
            out_channels=1,
            block_out_channels=config.channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=config.num_res_blocks,
            latent_channels=config.latent_channels,
            norm_num_groups=config.norm_groups,
        )

    def encode(self, mel: Tensor) -> Tensor:
        return self._posterior(mel).mode()

    def decode(self, latents: Tensor) -> Tensor:
        decoded = self.autoencoder.decode(latents, return_dict=False)[0].float()  # near silence, bf16 has steps of 0.06
        return decoded * self.config.mel_std + self.config.mel_mean

    def forward(self, mel: Tensor, *, sampled: bool = True) -> tuple[Tensor, Tensor]:
        """Reconstruction from a sample of the posterior or its mean, and KL divergence `[B]`, nats a latent value."""
        posterior = self._posterior(mel)
        latents = posterior.sample() if sampled else posterior.mode()
        return self.decode(latents), posterior.kl() / latents[0].numel()

    def _posterior(self, mel: Tensor) -> Any:
        found = self.autoencoder.encode((mel - self.config.mel_mean) / self.config.mel_std, return_dict=False)[0]
        return type(found)(found.parameters.float())
