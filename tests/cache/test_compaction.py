"""Steps stay in order and within the range, and as few are moved as can be."""

from __future__ import annotations

import itertools

import pytest

from statekv.cache.compaction import Compaction


def compacted(steps: int, sizes: tuple[int, ...], first: int, reach: int) -> tuple[Compaction, list[int], int]:
    """Steps of these sizes in turns: their compaction, where each would begin, how often there was no room."""
    found, places, position, times = Compaction(), [], first, 0
    for size in itertools.islice(itertools.cycle(sizes), steps):
        if found.place(position) + size > reach:
            found, times = found.next(position, first, reach), times + 1
        assert found.place(position) + size <= reach
        places.append(position)
        position += size
    return found, places, times


def test_nothing_moves_at_first() -> None:
    still = Compaction()
    assert [still.place(position) for position in (0, 1, 7, 10**9)] == [0, 1, 7, 10**9]
    assert still.gained == 0


def test_golden_places() -> None:
    """A prefix of 4; below 24 three positions share one, from there on all move up by the same."""
    places = Compaction(first=4, until=24, factor=4)
    assert [places.place(position) for position in (0, 3, 4, 7, 8, 23, 24, 25, 40)] == [0, 3, 4, 4, 5, 8, 9, 10, 25]
    assert places.gained == 15


@pytest.mark.parametrize("sizes", [(9,), (1,), (9, 10, 11), (30, 3)])
@pytest.mark.parametrize(("first", "reach"), [(0, 80), (5, 85), (13, 400), (0, 4096)])
@pytest.mark.parametrize("steps", [1, 20, 3000])
def test_any_stream_fits_in_order(sizes: tuple[int, ...], first: int, reach: int, steps: int) -> None:
    found, places, times = compacted(steps, sizes, first, reach)
    stand = [found.place(position) for position in places]
    assert stand == sorted(stand)
    assert first <= stand[0] <= stand[-1] < reach
    assert all(found.place(position) == position for position in range(first))
    newest = [(place, at) for place, at in zip(places, stand, strict=True) if place >= found.until]
    assert newest[-1][0] == places[-1]
    assert all(place - at == found.gained for place, at in newest)
    # Each time half of the range has become free, so that a stream is not compacted all the time.
    assert times <= 1 + (places[-1] - first) / ((reach - first) / 2 - max(sizes))


def test_older_steps_fill_at_least_half_of_what_they_may() -> None:
    """The least factor that makes room, so that no order is given away."""
    found, _, times = compacted(5000, (9,), 0, 4000)
    assert times > 10
    assert 500 <= found.until - found.gained <= 1000


def test_older_steps_that_just_fit_stay_where_they_are() -> None:
    assert Compaction().next(204, 4, 404) == Compaction(4, 104, 1)
    assert Compaction().next(205, 4, 404) == Compaction(4, 105, 2)


def test_a_step_is_moved_a_few_times_only() -> None:
    """Once when it leaves the newest, then each time the stream has doubled: roundings do not pile up."""
    place, moves, found, position = 9 * 100, 0, Compaction(), 0
    for _ in range(20_000):
        if found.place(position) + 9 > 2000:
            before, found = found, found.next(position, 0, 2000)
            moves += found.place(place) != before.place(place) and position > place
        position += 9
    assert found.factor == 512
    assert 5 <= moves <= 11


def test_a_long_silence_is_squeezed_like_everything_else() -> None:
    found = Compaction().next(10**6, 4, 400)
    assert found.place(10**6) <= 4 + 2 * 99
    assert found.place(10**6) - found.place(10**6 - 99) == 99


def test_compacting_twice_at_one_place_changes_nothing() -> None:
    once = Compaction().next(5000, 3, 1000)
    assert once.next(5000, 3, 1000) == once
