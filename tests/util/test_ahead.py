"""Work done ahead: in order, bounded, with errors in their place, and no thread left behind."""

import itertools
import threading

import pytest

from lib.util.ahead import map_ahead


class Watched:
    """A function that tells which items it has been given, and in which threads; 13 is an error."""

    def __init__(self):
        self.seen, self.threads, self.changed = [], set(), threading.Condition()

    def __call__(self, item: int) -> int:
        if item == 13:
            raise ValueError("thirteen")
        with self.changed:
            self.seen.append(item)
            self.threads.add(threading.current_thread().name)
            self.changed.notify_all()
        return 10 * item

    def wait_for(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.seen) >= count, timeout=30)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_what_follows_is_made_while_one_result_is_used(threads):
    """As much as there are threads and no more."""
    function, results = Watched(), []
    made = map_ahead(function, range(12), threads=threads)
    for number, result in enumerate(made, 1):
        results.append(result)
        function.wait_for(min(12, number + threads))
        assert sorted(function.seen) == list(range(min(12, number + threads)))
    assert results == list(range(0, 120, 10))
    assert threading.current_thread().name not in function.threads


def test_items_are_asked_for_as_they_are_needed():
    made = map_ahead(Watched(), itertools.count(100), threads=2)
    assert [next(made) for _ in range(5)] == [1000, 1010, 1020, 1030, 1040]
    made.close()


def test_an_error_is_raised_in_its_own_place():
    made = map_ahead(Watched(), [1, 13, 2], threads=2)
    assert next(made) == 10
    with pytest.raises(ValueError, match="thirteen"):
        next(made)


def test_nothing_gives_nothing():
    assert list(map_ahead(Watched(), [], threads=2)) == []


def test_no_thread_is_left_when_it_ends_early():
    made = map_ahead(Watched(), range(12), threads=3)
    next(made)
    assert any(thread.name.startswith("map_ahead") for thread in threading.enumerate())
    made.close()
    assert not any(thread.name.startswith("map_ahead") for thread in threading.enumerate())
