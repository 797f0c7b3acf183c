"""Which pairs a step takes: every one once, the same whatever the number of processes, targets moved as asked."""

import math
import tracemalloc

import pytest
import torch

from lib.data.latents import LatentPairs
from lib.model.cascade import rms
from lib.training.batches import TrainingOrder, epoch_order, evenly_spread, mix_noise, prefetch_batches
from lib.training.config import CurriculumConfig, LoopConfig, TrainConfig

# --- order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_an_epoch_takes_every_pair_once(count):
    order = epoch_order(count, epoch=3, seed=1)
    assert order.shape == (count, 2)
    assert sorted(order[:, 0].tolist()) == list(range(count))
    assert torch.equal(order[:, 0], order[:, 1])  # each input with its own target


def test_the_order_depends_on_seed_and_epoch_and_nothing_else():
    torch.manual_seed(0)
    first = epoch_order(50, 1, 2, 0.5)
    state = torch.get_rng_state()
    torch.manual_seed(99)
    assert torch.equal(epoch_order(50, 1, 2, 0.5), first)
    torch.set_rng_state(state)
    others = [epoch_order(50, epoch, seed, 0.5) for epoch, seed in ((0, 2), (2, 2), (1, 3), (1, 1))]
    assert not any(torch.equal(order, first) for order in others)
    assert torch.equal(torch.get_rng_state(), state)  # and takes none of the global random numbers


def test_orders_of_neighbouring_seeds_and_epochs_never_meet():
    orders = {tuple(epoch_order(20, epoch, seed)[:, 0].tolist()) for epoch in range(20) for seed in range(20)}
    assert len(orders) == 400


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("count", [20, 33])
def test_exactly_the_chosen_share_of_targets_moves(count, share):
    """None of those keeps its own, every target is used once, and the inputs stay in order."""
    for epoch in range(5):
        order, plain = epoch_order(count, epoch, 0, share), epoch_order(count, epoch, 0)
        assert torch.equal(order[:, 0], plain[:, 0])
        assert (order[:, 0] != order[:, 1]).sum() == round(share * count)
        assert sorted(order[:, 1].tolist()) == list(range(count))


def test_other_epochs_move_other_targets():
    moved = set()
    for epoch in range(30):
        order = epoch_order(10, epoch, 0, 0.3)
        moved |= set(order[order[:, 0] != order[:, 1], 1].tolist())
    assert moved == set(range(10))


def test_one_target_alone_has_nobody_to_change_places_with():
    order = epoch_order(10, 0, 0, 0.1)
    assert torch.equal(order[:, 0], order[:, 1])
    assert (epoch_order(10, 0, 0, 0.2).diff(dim=1) != 0).sum() == 2


# --- shares -----------------------------------------------------------------------------------------------------------


def process_share(
    count: int, batch_size: int, accumulate: int, rank: int = 0, processes: int = 1
) -> list[list[torch.Tensor]]:
    """One process's steps of `epoch_order(count, 0, 5, 0.5)`."""
    shuffled = CurriculumConfig(target_shuffling=0.5)
    config = TrainConfig(epochs=1, batch_size=batch_size, accumulate=accumulate, seed=5, curriculum=shuffled)
    return list(TrainingOrder(count, config, rank, processes).steps())


def test_one_process_takes_the_order_as_it_is():
    order = epoch_order(11, 0, 5, 0.5)
    steps = process_share(11, batch_size=2, accumulate=2)
    assert [[len(batch) for batch in step] for step in steps] == [[2, 2], [2, 2], [2, 1]]
    assert torch.equal(torch.cat([batch for step in steps for batch in step]), order)


@pytest.mark.parametrize("count", [8, 23, 24, 25, 31, 64])
@pytest.mark.parametrize(("batch_size", "accumulate"), [(4, 1), (2, 2), (1, 3), (3, 2)])
@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_all_processes_together_take_what_one_takes(count, batch_size, accumulate, processes):
    order = epoch_order(count, 0, 5, 0.5)
    shares = [process_share(count, batch_size, accumulate, rank, processes) for rank in range(processes)]
    sizes = [[[len(batch) for batch in step] for step in share] for share in shares]
    assert all(size == sizes[0] for size in sizes)  # or one would wait for the others for ever
    whole = batch_size * accumulate * processes
    everything = order.split(whole)
    for number, step in enumerate(zip(*shares, strict=True)):
        taken = torch.cat([batch for batches in step for batch in batches])
        lost = len(everything[number]) - len(taken)
        assert torch.equal(taken, everything[number][: len(taken)])  # in the same order, inputs with their targets
        assert lost == (0 if len(everything[number]) == whole else len(everything[number]) % processes)
        for batches in step:
            assert len(batches) <= accumulate
            assert all(1 <= len(batch) <= batch_size for batch in batches)
            assert all(len(batch) == batch_size for batch in batches[:-1])
    left_out = count - sum(len(batch) for share in shares for step in share for batch in step)
    assert left_out <= processes - 1
    assert len(everything) - len(shares[0]) == (left_out > 0 and count % whole < processes)


def test_accumulated_batches_are_the_larger_batch():
    small, large = process_share(20, 2, 3), process_share(20, 6, 1)
    assert [torch.cat(step).tolist() for step in small] == [torch.cat(step).tolist() for step in large]


# --- where training is ------------------------------------------------------------------------------------------------


def walk(order: TrainingOrder) -> list[tuple[int, int, list[torch.Tensor]]]:
    """All steps that are left: epoch, position and batches of each."""
    taken = []
    for step in order.steps():
        taken.append((order.epoch, order.position, step))
        order.advance()
    return taken


def test_steps_of_two_epochs_by_hand():
    """Five pairs, two a step: the last step of an epoch is a small one."""
    order = TrainingOrder(5, TrainConfig(epochs=2, batch_size=2, seed=3))
    assert order.total_steps(0) == 6
    taken = walk(order)
    assert [(epoch, position) for epoch, position, _ in taken] == [(0, 0), (0, 2), (0, 4), (1, 0), (1, 2), (1, 4)]
    assert [len(batch) for _, _, (batch,) in taken] == [2, 2, 1, 2, 2, 1]
    for epoch in range(2):
        pairs = torch.cat([batch for e, _, (batch,) in taken if e == epoch])
        assert torch.equal(pairs, epoch_order(5, epoch, 3))
    assert (order.epoch, order.position, order.total_steps(6)) == (2, 0, 6)


def test_steps_may_be_asked_for_before_those_before_them_are_taken():
    config = TrainConfig(epochs=3, batch_size=2)
    in_step, ahead = TrainingOrder(5, config), TrainingOrder(5, config)
    for order in (in_step, ahead):
        order.advance()
    expected = [step for _, _, step in walk(in_step)]
    asked = list(ahead.steps())
    assert len(asked) == len(expected) == 8
    assert all(torch.equal(a, b) for (a,), (b,) in zip(asked, expected, strict=True))
    assert (ahead.epoch, ahead.position) == (0, 2)


def test_the_order_of_a_million_pairs_is_generated_lazily():
    """The first step of an epoch costs no more objects than the first of a small one."""
    order = TrainingOrder(1_000_000, TrainConfig(epochs=1000, batch_size=8))
    tracemalloc.start()
    first = next(order.steps())
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [len(batch) for batch in first] == [8]
    assert held < 100_000  # a list of all 125,000 steps takes tens of MB


def test_an_epoch_ends_with_its_last_step_though_a_few_pairs_are_left_out():
    order = TrainingOrder(8, TrainConfig(epochs=2, batch_size=2), rank=0, processes=3)
    order.advance()
    assert (order.epoch, order.position) == (1, 0)  # after six of eight pairs, two for three processes


def test_a_training_made_shorter_than_it_is_is_over():
    order = TrainingOrder(5, TrainConfig(epochs=2, batch_size=2))
    order.epoch, order.position = 4, 2
    assert order.total_steps(13) == 13
    assert order.progress(13) == 1
    assert walk(order) == []


def test_targets_are_shuffled_as_the_config_says():
    config = TrainConfig(epochs=1, batch_size=8, curriculum=CurriculumConfig(target_shuffling=0.5))
    ((_, _, (batch,)),) = walk(TrainingOrder(8, config))
    assert (batch[:, 0] != batch[:, 1]).sum() == 4
    ((_, _, (batch,)),) = walk(TrainingOrder(8, LoopConfig(epochs=1, batch_size=8)))  # which says nothing of it
    assert torch.equal(batch[:, 0], batch[:, 1])


@pytest.mark.parametrize("count", [3, 7, 8, 23])
@pytest.mark.parametrize(("batch_size", "accumulate"), [(1, 1), (2, 1), (2, 2), (3, 1)])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_steps_are_counted_before_they_are_taken(count, batch_size, accumulate, processes):
    """On every process alike, and from every place on the way the same total."""
    config = TrainConfig(epochs=3, batch_size=batch_size, accumulate=accumulate)
    orders = [TrainingOrder(count, config, rank, processes) for rank in range(processes)]
    walks = [walk(order) for order in orders]
    total = TrainingOrder(count, config, 0, processes).total_steps(0)
    assert {len(steps) for steps in walks} == {total}
    places = [[(epoch, position) for epoch, position, _ in steps] for steps in walks]
    assert all(place == places[0] for place in places)
    for epoch in range(3):
        pairs = [tuple(p.tolist()) for w in walks for e, _, step in w if e == epoch for batch in step for p in batch]
        assert len(set(pairs)) == len(pairs)
        assert count - len(pairs) <= processes - 1
    again = TrainingOrder(count, config, 0, processes)
    progress = []
    for number, (again.epoch, again.position) in enumerate(places[0]):
        assert again.total_steps(number) == total
        progress.append(again.progress(number))
    assert progress == sorted(set(progress))
    assert progress[0] == 0
    assert orders[0].progress(total) == 1
    assert orders[0].total_steps(total) == total


@pytest.mark.parametrize("before", [1, 2, 3, 4])
@pytest.mark.parametrize("after", [1, 2, 3, 4])
def test_training_goes_on_with_another_number_of_processes(before, after):
    """After each step, what is left of the epoch is what has not been taken, but for the few at its end that do not
    divide; and the steps are counted with the new number."""
    config, count = TrainConfig(epochs=2, batch_size=2), 23
    for steps in range(TrainingOrder(count, config, 0, before).total_steps(0)):
        orders = []
        for rank in range(max(before, after)):
            order = TrainingOrder(count, config, min(rank, before - 1), before)
            for _ in range(steps):
                order.advance()
            orders.append((order.epoch, order.position))
        assert len(set(orders)) == 1
        epoch, position = orders[0]
        shares = []
        for rank in range(after):
            order = TrainingOrder(count, config, rank, after)
            order.epoch, order.position = epoch, position
            total = order.total_steps(steps)
            shares.append(walk(order))
            assert len(shares[-1]) == total - steps
        taken = [pair for share in shares for e, _, step in share if e == epoch for batch in step for pair in batch]
        rest = epoch_order(count, epoch, 0)[position:]
        assert len(rest) - len(taken) <= after - 1
        assert {tuple(pair.tolist()) for pair in taken} <= {tuple(pair.tolist()) for pair in rest}


def test_max_steps_end_training_and_count_as_progress():
    order = TrainingOrder(10, TrainConfig(epochs=4, batch_size=2, max_steps=8))
    assert order.total_steps(0) == 8  # of 20
    assert order.progress(0) == 0
    for _ in range(6):
        order.advance()
    assert (order.epoch, order.position) == (1, 2)
    assert order.progress(6) == pytest.approx(6 / 8)  # 1.2 of 4 epochs would be less
    assert order.progress(8) == 1
    endless = TrainingOrder(10, TrainConfig(epochs=4, batch_size=2, max_steps=1000))
    assert endless.total_steps(0) == 20
    endless.epoch, endless.position = 1, 2
    assert endless.progress(6) == pytest.approx(1.2 / 4)


@pytest.mark.parametrize(
    ("count", "most", "expected"),
    [
        (10, None, range(10)),
        (10, 20, range(10)),
        (10, 5, (0, 2, 4, 6, 8)),
        (10, 1, (0,)),
        (10, 3, (0, 3, 6)),
        (0, 3, ()),
    ],
)
def test_evenly_spread(count, most, expected):
    assert evenly_spread(count, most).tolist() == list(expected)


@pytest.mark.parametrize("count", [7, 100, 999])
@pytest.mark.parametrize("most", [1, 3, 7])
def test_gaps_of_a_spread_differ_by_one_at_most(count, most):
    places = evenly_spread(count, most)
    assert len(places) == min(count, most)
    gaps = torch.cat([places, torch.tensor([count])]).diff()
    assert gaps.max() - gaps.min() <= 1


# --- from disk --------------------------------------------------------------------------------------------------------


def read(pairs, chosen, steps, threads=2):
    return prefetch_batches(pairs, chosen, steps, threads=threads, pin_memory=False)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_batch_has_the_input_of_one_pair_with_the_target_of_another(tiny_index, threads):
    pairs = LatentPairs(tiny_index, "val")
    chosen = torch.tensor([1, 3, 4, 8])  # what training takes of the data
    steps = [[torch.tensor([[0, 2], [1, 1], [3, 0]]), torch.tensor([[2, 3]])], [torch.tensor([[1, 0]])]]
    places = [[[(1, 4), (3, 3), (8, 1)], [(4, 8)]], [[(3, 1)]]]
    loaded = list(read(pairs, chosen, steps, threads))
    assert [[len(input) for input, _ in step] for step in loaded] == [[3, 1], [1]]
    for step, expected_step in zip(loaded, places, strict=True):
        for (input, target), expected in zip(step, expected_step, strict=True):
            assert torch.equal(input, torch.stack([pairs[i][0] for i, _ in expected]))
            assert torch.equal(target, torch.stack([pairs[j][1] for _, j in expected]))
    assert not torch.equal(loaded[0][0][1][0], pairs[1][1])


def test_batches_for_a_gpu_lie_in_pinned_memory(tiny_index, monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x.clone()) or x)
    pairs = LatentPairs(tiny_index, "train")
    steps = [[torch.zeros(1, 2).long(), torch.ones(1, 2).long()]]
    (batches,) = prefetch_batches(pairs, torch.arange(5), steps, threads=1, pin_memory=True)
    assert [x.tolist() for x in pinned] == [x.tolist() for batch in batches for x in batch]
    assert len(pinned) == 4


def test_loading_leaves_the_random_numbers_alone(tiny_index):
    state = torch.get_rng_state()
    for _ in read(LatentPairs(tiny_index, "train"), torch.arange(5), [[torch.zeros(2, 2).long()]]):
        pass
    assert torch.equal(torch.get_rng_state(), state)


# --- noise ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def latents() -> torch.Tensor:
    """`[4, 128, 300]` of levels from 0.5 to 20: 38,400 values per clip, whose RMS is known to 0.4 %."""
    clips = torch.randn(4, 128, 300, generator=torch.Generator().manual_seed(0))
    return clips * torch.tensor([0.5, 2.0, 6.0, 20.0])[:, None, None]


@pytest.mark.parametrize("share", [0.1, 0.3, 0.7, 1.0])
def test_every_clip_keeps_its_level(latents, share):
    torch.manual_seed(1)
    mixed = mix_noise(latents, share)
    torch.testing.assert_close(rms(mixed), rms(latents), rtol=0.015, atol=0)
    kept = (mixed * latents).mean(dim=(1, 2)) / latents.square().mean(dim=(1, 2))
    torch.testing.assert_close(kept, torch.full((4,), math.sqrt(1 - share**2)), rtol=0, atol=0.02)
    noise = mixed - math.sqrt(1 - share**2) * latents
    torch.testing.assert_close(rms(noise), share * rms(latents), rtol=0.015, atol=0)


def test_the_noise_is_normal_and_of_each_place(latents):
    torch.manual_seed(1)
    noise = (mix_noise(latents, 1.0) / rms(latents)[:, None, None]).double()
    assert noise.mean().item() == pytest.approx(0, abs=0.01)
    assert noise.pow(4).mean().item() == pytest.approx(3, abs=0.1)
    neighbours = (noise[..., 1:] * noise[..., :-1]).mean().item()
    clips = (noise[0] * noise[1]).mean().item()
    assert abs(neighbours) < 0.01
    assert abs(clips) < 0.02


def test_a_share_of_0_is_the_same_object_and_draws_nothing(latents):
    state = torch.get_rng_state()
    assert mix_noise(latents, 0.0) is latents
    assert torch.equal(torch.get_rng_state(), state)
    mix_noise(latents, 0.1)
    assert not torch.equal(torch.get_rng_state(), state)


def test_the_latents_themselves_are_left_alone(latents):
    before = latents.clone()
    mix_noise(latents, 0.5)
    assert torch.equal(latents, before)
