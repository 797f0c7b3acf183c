"""Dropout whose random numbers are cheap on a CPU, where `F.dropout` took a fifth of a training step."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DRAWS = 2**16  # from so many numbers each element draws one: a share is kept to 8e-6


class Dropout(nn.Dropout):
    """`nn.Dropout`, from 16 random bits an element where that is faster: on a CPU, out of torch's own generator.

    What is left is divided by the share that is really kept, so that the expectation is exact.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return F.dropout(x, self.p, self.training)
        words = torch.randint(-(2**63), 2**63 - 1, ((x.numel() + 3) // 4,))  # 64 random bits each
        draws = words.view(torch.int16)[: x.numel()].view(x.shape)
        dropped = min(round(self.p * DRAWS), DRAWS - 1)
        return (x * (draws >= dropped - DRAWS // 2)).mul_(DRAWS / (DRAWS - dropped))
