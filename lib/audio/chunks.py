"""Long signals in overlapping chunks, crossfaded, so that memory does not grow with a file. C channels, N samples."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from lib.util.files import prefetch

Chunk = TypeVar("Chunk")


def chunk_starts(num_samples: int, chunk: int, overlap: int) -> list[int]:
    """Start positions of the chunks that cover `num_samples`, in samples; the last chunk ends there or beyond."""
    return list(range(0, max(1, num_samples - overlap), chunk - overlap))


@contextlib.contextmanager
def reading(
    chunks: Iterator[Chunk], starts: Sequence[int], num_samples: int, sample_rate: int, description: str
) -> Iterator[Iterable[Chunk]]:
    """The chunks of an iterator, which begin at `starts` in a signal of `num_samples`, one prefetched. If they take
    long, a progress bar counts seconds of music."""
    total, ends = num_samples / sample_rate, [*starts[1:], num_samples]
    bar = tqdm(desc=description, total=total, unit=" s of music", unit_scale=True, delay=1)

    def counted() -> Iterator[Chunk]:
        for chunk, end in zip(ahead, ends, strict=True):
            yield chunk
            bar.update(end / sample_rate - bar.n)

    with bar, contextlib.closing(prefetch(lambda _: next(chunks), range(len(starts)), threads=1)) as ahead:
        yield counted()


def crossfaded(
    chunks: Iterable[Tensor], overlap: int, *, margin: int = 0, keep_power: bool = False
) -> Iterator[Tensor]:
    """The pieces `[C, n]` of one signal, from chunks `[C, N]` that each overlap the next by `overlap` samples, the last
    `margin` of which are dropped. The fade is linear in amplitude, for renderings that add in phase; `keep_power` suits
    others too, of correlation ρ: its gains a and b have a² + b² + 2·ρ·a·b = 1: linear for ρ = 1, equal power for 0."""
    tail = None  # the next chunk's beginning is faded into it
    for chunk in chunks:
        if tail is not None:
            head = chunk[:, :overlap]
            rise = ((torch.arange(overlap) + 0.5) / (overlap - margin)).clamp(max=1)[None]
            fade = rise * head + (1 - rise) * tail
            if keep_power:
                similar = torch.nn.functional.cosine_similarity(tail, head, dim=1).clamp_min(0)[:, None]
                fade = fade / (rise**2 + (1 - rise) ** 2 + 2 * similar * rise * (1 - rise)).sqrt()
            chunk = torch.cat([fade, chunk[:, overlap:]], dim=1)
        tail = chunk[:, -overlap:]
        yield chunk[:, :-overlap]
    if tail is not None:
        yield tail
