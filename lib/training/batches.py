"""Which pairs a step takes, how they come from disk, and the noise that is mixed into them. The order depends on the
seed and the epoch alone, never on the number of processes. Legend: P pairs, B batch, D latent channels, T frames."""

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from lib.model.cascade import rms
from lib.training.config import LoopConfig
from lib.util.files import prefetch

Batch = tuple[Tensor, Tensor]  # the first and the second of its pairs, [B, …] each
# What training reads, in several threads: all firsts have one shape, and all seconds. It has a `clip_length`, samples
# of sound that a pair stands for, a `sample_rate` in Hz and, for the report of a fault, perhaps `clip_names(i)`.
Pairs = Sequence[Batch]
Splits = dict[str, Pairs]  # 'train' and 'val'


def epoch_order(num_pairs: int, epoch: int, seed: int, shuffled: float = 0.0) -> Tensor:
    """The pairs of an epoch that give input and target, `[P, 2]`; the share `shuffled` of the targets change places."""
    generator = torch.Generator().manual_seed(seed + epoch * 1_000_003)
    inputs = torch.randperm(num_pairs, generator=generator)
    targets = inputs.clone()
    chosen = torch.randperm(num_pairs, generator=generator)[: round(shuffled * num_pairs)]
    targets[chosen] = inputs[chosen.roll(1)]  # in a circle: each of them gets another's
    return torch.stack([inputs, targets], dim=1)


class TrainingOrder:
    """The position of training in its data, all that a checkpoint holds: epoch, and how many of its pairs are taken."""

    def __init__(self, num_pairs: int, config: LoopConfig, rank: int = 0, processes: int = 1):
        self.num_pairs, self.config, self.rank, self.processes = num_pairs, config, rank, processes
        self.epoch = self.position = 0

    def steps(self) -> Iterator[list[Tensor]]:
        """Every step that is left: the batches of this process, indices of pairs `[≤ batch_size, 2]`. Every process has
        as many; of an epoch's last step up to `processes − 1` pairs are left out. May run ahead of `advance`."""
        if self.num_pairs - self.position < self.processes:  # fewer processes had left too few pairs for one of these
            self.epoch, self.position = self.epoch + 1, 0
        config, epoch, position = self.config, self.epoch, self.position
        while epoch < config.epochs:
            order = epoch_order(self.num_pairs, epoch, config.seed, config.target_shuffling)[position:]
            for start in range(0, len(order), self.pairs_per_step):
                pairs = order[start : start + self.pairs_per_step]
                if share := len(pairs) // self.processes:
                    yield list(pairs[self.rank * share : (self.rank + 1) * share].split(config.batch_size))
            epoch, position = epoch + 1, 0

    def advance(self) -> None:
        """Call it for every step that is taken."""
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

        later = self.config.epochs - self.epoch - 1  # epochs after this one
        total = taken + max(0, steps(self.num_pairs - self.position) + later * steps(self.num_pairs))
        return min(total, self.config.max_steps or total)

    def progress(self, taken: int) -> float:
        """How much of the training is done after the steps `taken`, 0 to 1, whatever the number of processes."""
        done = (self.epoch + self.position / self.num_pairs) / self.config.epochs
        return min(1.0, max(done, taken / (self.config.max_steps or math.inf)))


def evenly_spread(count: int, most: int | None) -> Tensor:
    """At most `most` (None: all) of the numbers 0 to count − 1, spread evenly."""
    most = min(count, most or count)
    return torch.arange(most) * count // most


def prefetch_batches(
    pairs: Pairs, chosen: Tensor, steps: Iterable[list[Tensor]], *, threads: int, pin_memory: bool
) -> Iterator[list[Batch]]:
    """The batches of every step, in order, while as many threads read the steps that follow. A step is a list of
    batches `[≤ B, 2]`: places of input and target among the `chosen` pairs. `pin_memory`: for a GPU."""

    def read(places: list[list[int]]) -> Batch:
        inputs = [pairs[i] for i, _ in places]
        targets = [inputs[k][1] if i == j else pairs[j][1] for k, (i, j) in enumerate(places)]
        batch = torch.stack([input for input, _ in inputs]), torch.stack(targets)
        return tuple(x.pin_memory() for x in batch) if pin_memory else batch

    return prefetch(lambda step: [read(chosen[batch].tolist()) for batch in step], steps, threads=threads)


def mix_noise(latents: Tensor, share: float, generator: torch.Generator | None = None) -> Tensor:
    """√(1 − α²) · latents + α · noise of the same RMS, `[B, D, T]`: a clip keeps its level at every share α."""
    if share == 0:
        return latents
    noise = torch.randn_like(latents, generator=generator) * rms(latents)[:, None, None]
    return (1 - share**2) ** 0.5 * latents + share * noise
