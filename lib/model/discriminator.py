"""The discriminator of real and generated latents. Legend: B batch, D latent channels (128), T frames (75 Hz)."""

from torch import Tensor, nn

from lib.model.cascade import LATENT_DIM


class Discriminator(nn.Module):
    """Tells real latents from generated ones, any T: `[B, D, T]` → one logit per clip `[B]`, positive for real.
    3,802,881 parameters, named as in the original checkpoints: four convolutions, mean over time, two linear layers."""

    def __init__(self, latent_dim: int = LATENT_DIM):
        super().__init__()
        widths, kernels, strides = (latent_dim, 256, 512, 512, 256), (3, 5, 7, 9), (2, 2, 2, 1)
        layers: list[nn.Module] = []
        for i, (k, stride) in enumerate(zip(kernels, strides, strict=True)):
            layers += [nn.Conv1d(widths[i], widths[i + 1], k, stride, padding=k // 2), nn.LeakyReLU(0.2)]
            layers += [nn.Dropout(0.3)]
        self.conv_layers = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Linear(256, 128), nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.Linear(128, 1))

    def forward(self, latents: Tensor) -> Tensor:
        return self.classifier(self.conv_layers(latents).mean(dim=2)).squeeze(1)
