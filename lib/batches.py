"""Which pairs a step takes, and how they come from disk.

The order depends on the seed and the epoch alone, never on the number of processes. Legend: P pairs, D latent channels,
T frames.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lib.latents import LatentPairs
from lib.train_config import TrainConfig

Batch = tuple[Tensor, Tensor]  # input and target latents, [B, D, T] each


def epoch_order(num_pairs: int, epoch: int, seed: int, shuffled: float = 0.0) -> Tensor:
    """The pairs of an epoch, `[P, 2]`: whose input, and whose target comes with it. The share `shuffled` of the targets
    change places."""
    generator = torch.Generator().manual_seed(seed + epoch * 1_000_003)
    inputs = torch.randperm(num_pairs, generator=generator)
    targets = inputs.clone()
    chosen = torch.randperm(num_pairs, generator=generator)[: round(shuffled * num_pairs)]
    targets[chosen] = inputs[chosen.roll(1)]  # round a circle: each of them gets another's
    return torch.stack([inputs, targets], dim=1)


def process_share(order: Tensor, batch_size: int, accumulate: int, rank: int, processes: int) -> list[list[Tensor]]:
    """What one of several processes takes of an order `[P, 2]`: for each step, its batches `[≤ batch_size, 2]`.

    A step takes `batch_size · accumulate · processes` pairs, and every process the same number of them; of the last,
    smaller step up to `processes − 1` pairs are left out.
    """
    steps = []
    for pairs in order.split(batch_size * accumulate * processes):
        share = len(pairs) // processes
        if share:
            steps.append(list(pairs[rank * share : (rank + 1) * share].split(batch_size)))
    return steps


class TrainingOrder:
    """Where training is in its data: which epoch, and how many of its pairs have been taken. Those two go into a
    checkpoint; everything else follows from the config and the number of processes, which may change in between."""

    def __init__(self, num_pairs: int, config: TrainConfig, rank: int = 0, processes: int = 1):
        self.num_pairs, self.config, self.rank, self.processes = num_pairs, config, rank, processes
        self.epoch = self.position = 0

    def left(self) -> list[list[Tensor]]:
        """The steps that are left of this epoch: for each the batches of this process, as places in the data."""
        config = self.config
        order = epoch_order(self.num_pairs, self.epoch, config.seed, config.curriculum.target_shuffling)
        return process_share(order[self.position :], config.batch_size, config.accumulate, self.rank, self.processes)

    def epochs(self) -> Iterator[list[list[Tensor]]]:
        """What is left of each epoch that is left; `advance` must be called for every step that is taken."""
        while self.epoch < self.config.epochs:
            if steps := self.left():
                yield steps
            else:  # fewer processes had left too few pairs for one step of these
                self.epoch, self.position = self.epoch + 1, 0

    def advance(self) -> None:
        """One step has been taken."""
        self.position += self.pairs_per_step
        if self.num_pairs - self.position < self.processes:
            self.epoch, self.position = self.epoch + 1, 0

    @property
    def pairs_per_step(self) -> int:
        return self.config.batch_size * self.config.accumulate * self.processes

    def total_steps(self, taken: int) -> int:
        """Steps until the end, those `taken` included, with this number of processes."""

        def steps(pairs: int) -> int:
            whole, rest = divmod(pairs, self.pairs_per_step)
            return whole + (rest >= self.processes)

        config, epochs_left = self.config, self.config.epochs - self.epoch
        left = steps(self.num_pairs - self.position) + (epochs_left - 1) * steps(self.num_pairs)
        total = taken + (left if epochs_left > 0 else 0)
        return min(total, config.max_steps) if config.max_steps else total

    def progress(self, taken: int) -> float:
        """How much of the training is done after the steps `taken`, 0 to 1, whatever the number of processes."""
        done = (self.epoch + self.position / self.num_pairs) / self.config.epochs
        return min(1.0, max(done, taken / self.config.max_steps if self.config.max_steps else 0.0))


def evenly_spread(count: int, most: int | None) -> Tensor:
    """At most `most` (None: all) of the numbers 0 to count − 1, spread evenly."""
    most = min(count, most or count)
    return torch.arange(most) * count // most


def load_batches(
    pairs: LatentPairs, chosen: Tensor, batches: Sequence[Tensor], *, workers: int, pin_memory: bool
) -> DataLoader:
    """`batches`, each `[≤ B, 2]` places among the `chosen` pairs of the data, → input and target latents."""
    return DataLoader(
        CrossedPairs(pairs),
        batch_sampler=[chosen[batch].tolist() for batch in batches],
        num_workers=workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # a loader draws a seed when it starts; the model's RNG must not notice
    )


class CrossedPairs(Dataset):
    """The input of one pair with the target of another: `[i, j]` → latents `[D, T]` twice."""

    def __init__(self, pairs: LatentPairs):
        self.pairs = pairs

    def __getitem__(self, places: tuple[int, int]) -> Batch:
        i, j = places
        input, target = self.pairs[i]
        return input, target if i == j else self.pairs[j][1]
