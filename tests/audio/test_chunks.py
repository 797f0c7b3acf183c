"""Chunks and the crossfade: every sample covered, no seam, and little memory."""

import threading
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from tqdm import tqdm

import lib.audio.chunks
from lib.audio.chunks import chunk_starts, crossfaded, reading


def white(num_samples: int, seed: int = 0, channels: int = 1) -> Tensor:
    noise = np.random.default_rng(seed).standard_normal((channels, num_samples))
    return torch.from_numpy(0.1 * noise).float()


def decibels(wav: Tensor, reference: Tensor) -> float:
    """Energy of one signal relative to that of another."""
    return 10 * torch.log10(wav.double().square().mean() / reference.double().square().mean()).item()


@pytest.mark.parametrize(("chunk", "overlap"), [(7, 3), (11, 1), (16, 6), (100, 10), (7_680, 2_880), (384_000, 24_000)])
def test_chunks_cover_everything_with_the_same_overlap(chunk, overlap):
    step = chunk - overlap
    for total in (1, overlap, chunk - 1, chunk, chunk + 1, chunk + step - 1, chunk + step, chunk + step + 1, 9 * chunk):
        starts = chunk_starts(total, chunk, overlap)
        assert starts == [i * step for i in range(len(starts))]
        assert starts[-1] + chunk >= total
        assert len(starts) == 1 or starts[-2] + chunk < total  # none more than needed
    lengths = (chunk, chunk + 1, chunk + step, chunk + step + 1)
    assert [len(chunk_starts(n, chunk, overlap)) for n in lengths] == [1, 2, 2, 3]


def cut(wav: Tensor, chunk: int, overlap: int) -> list[Tensor]:
    return [wav[:, start : start + chunk] for start in chunk_starts(wav.shape[1], chunk, overlap)]


def joined(chunks: list[Tensor], overlap: int, keep_power: bool = True) -> Tensor:
    return torch.cat(list(crossfaded(chunks, overlap, keep_power=keep_power)), dim=1)


@pytest.mark.parametrize("num_samples", [1, 9, 10, 99, 100, 101, 190, 191, 1000, 1003])
def test_chunks_that_change_nothing_join_without_a_seam(num_samples):
    torch.manual_seed(0)
    sine = torch.sin(0.3 * torch.arange(num_samples, dtype=torch.float64))[None]
    for signal in (sine, torch.randn(1, num_samples, dtype=torch.float64)):
        original = signal.clone()
        found = joined(cut(signal, 100, 10), 10, keep_power=False)
        assert torch.allclose(found, original, rtol=0, atol=1e-7)  # the fade is in float32
        assert torch.equal(signal, original)  # and the chunks are not written into


def test_the_fade_is_linear_from_one_rendering_to_the_next():
    fade = joined([torch.zeros(1, 100), torch.ones(1, 100)], 10, keep_power=False)[0]
    assert fade[:90].eq(0).all()
    assert fade[100:].eq(1).all()
    assert fade[90:100].tolist() == pytest.approx([(i + 0.5) / 10 for i in range(10)])


def test_the_margin_is_dropped_where_another_chunk_follows():
    chunks = [torch.zeros(1, 100), torch.ones(1, 100)]
    fade = torch.cat(list(crossfaded(chunks, 20, margin=8)), dim=1)[0]
    assert fade[80:92].tolist() == pytest.approx([(i + 0.5) / 12 for i in range(12)])
    assert fade[92:].eq(1).all()
    assert len(fade) == 180


def test_chunks_of_inference_mode_can_be_joined():
    with torch.inference_mode():
        chunks = cut(torch.ones(1, 300), 100, 10)
    assert torch.allclose(joined(chunks, 10), torch.ones(1, 300))


def test_at_most_two_chunks_are_alive():
    alive = weakref.WeakSet()

    class Samples(np.ndarray):
        __hash__ = object.__hash__

    def chunk_at(start: int) -> Tensor:
        samples = np.zeros((1, 100), dtype=np.float32).view(Samples)
        alive.add(samples)
        return torch.from_numpy(samples)

    most = 0
    for piece in crossfaded(map(chunk_at, chunk_starts(5000, 100, 10)), 10):
        most = max(most, len(alive))
        del piece
    assert most <= 2


def test_reading_prefetches_one_chunk_in_order():
    seen, second = [], threading.Event()

    def read() -> Iterator[int]:
        for start in (0, 90, 180, 270):
            seen.append(start)
            if start == 90:
                second.set()
            yield start

    with reading(read(), [0, 90, 180, 270], 360, 100, "fusing") as chunks:
        assert next(iter(chunks)) == 0
        assert second.wait(timeout=30)
    assert seen in ([0, 90], [0, 90, 180])
    with reading(iter([0, 90, 180]), [0, 90, 180], 250, 100, "fusing") as chunks:
        assert list(chunks) == [0, 90, 180]


def test_progress_is_in_seconds_of_music(monkeypatch):
    bars = []
    monkeypatch.setattr(lib.audio.chunks, "tqdm", lambda **options: bars.append(tqdm(**options)) or bars[-1])
    with reading(iter("abc"), [0, 90, 180], 250, 100, "fusing") as chunks:
        shown = [bars[0].n for _ in chunks]
    assert (bars[0].total, bars[0].unit) == (2.5, " s of music")
    assert shown == pytest.approx([0, 0.9, 1.8])
    assert bars[0].n == pytest.approx(2.5)


def linear_fade(tail: Tensor, head: Tensor) -> Tensor:
    rise = (torch.arange(tail.shape[1]) + 0.5) / tail.shape[1]
    return rise * head + (1 - rise) * tail


@pytest.mark.parametrize("keep_power", [False, True])
def test_chunks_that_agree_give_the_signal_back(keep_power):
    wav = white(1_000 + 4 * 900, channels=2)
    pieces = list(crossfaded(iter(cut(wav, 1_000, 100)), 100, keep_power=keep_power))
    assert [piece.shape[1] for piece in pieces] == [900] * 5 + [100]
    torch.testing.assert_close(torch.cat(pieces, dim=1), wav, atol=1e-6, rtol=1e-5)
    (first, rest) = list(crossfaded([wav], 100, keep_power=keep_power))  # one clip
    assert torch.equal(torch.cat([first, rest], dim=1), wav)
    assert list(crossfaded([], 100)) == []


@pytest.mark.parametrize("alike", [0.0, 0.5, 0.9])
def test_the_fade_keeps_the_power_of_clips_that_differ(alike):
    """As much of the overlap is common to both clips; a linear fade of unrelated noise dips by 3 dB in its middle."""
    common, *own = (white(24_000, seed=seed) for seed in range(3))
    tail, head = (alike**0.5 * common + (1 - alike) ** 0.5 * noise for noise in own)
    rest = white(10_000, seed=5)
    made = joined([torch.cat([rest, tail], dim=1), torch.cat([head, rest], dim=1)], 24_000)
    faded, middle = made[:, 10_000:34_000], slice(10_000, 14_000)
    for part in (slice(0, 4_000), slice(5_000, 9_000), middle, slice(20_000, 24_000)):
        assert abs(decibels(faded[:, part], common)) < 0.4
    dip = decibels(linear_fade(tail, head)[:, middle], common)
    assert dip == pytest.approx(10 * np.log10((1 + alike) / 2), abs=0.3)
    if alike == 0:
        assert dip < -2.7
    torch.testing.assert_close(made[:, :10_000], rest)
    torch.testing.assert_close(made[:, 34_000:], rest)


def test_each_channel_fades_by_its_own_correlation():
    """One channel agrees, the other does not."""
    same, tail, head = (white(8_000, seed=seed) for seed in range(3))
    made = joined([torch.cat([same, tail]), torch.cat([same, head])], 8_000)
    torch.testing.assert_close(made[:1], same, atol=1e-6, rtol=1e-5)
    assert abs(decibels(made[1:, 3_000:5_000], tail)) < 0.4


def test_a_sine_stays_a_sine():
    time = torch.arange(1_000 + 8 * 875) / 48_000
    sine = 0.5 * torch.sin(2 * torch.pi * 1_000 * time.double()).float()[None]
    made = joined(cut(sine, 1_000, 125), 125)
    assert decibels(made - sine, sine) < -120
    clips = cut(sine, 1_000, 125)
    clips[4] = -clips[4]  # a wrong chunk is detected
    broken = joined(clips, 125)
    assert decibels(broken - sine, sine) > -20
