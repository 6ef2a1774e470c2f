"""Free bytes against a plain list of them; the file is never longer than what was taken at once."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from statekv.cache.tiers.vacancies import Span, Vacancies


@pytest.mark.parametrize("sizes", [(7,), (9, 10, 11), tuple(range(1, 60))], ids=["one", "three", "many"])
@pytest.mark.parametrize("seed", range(3))
def test_no_byte_is_given_twice_and_the_file_grows_only_when_it_is_full(sizes: tuple[int, ...], seed: int) -> None:
    draw, vacancies, most = random.Random(seed), Vacancies(), 0
    held: list[list[Span]] = []
    for _ in range(1500):
        if held and draw.random() < 0.5:
            vacancies.give(held.pop(draw.randrange(len(held))))
        else:
            size = draw.choice(sizes)
            held.append(vacancies.take(size))
            assert sum(stop - start for start, stop in held[-1]) == size
            assert all(start < stop for start, stop in held[-1])
        taken = sorted(span for spans in held for span in spans)
        assert all(before[1] <= after[0] for before, after in pairwise(taken))
        now = sum(stop - start for start, stop in taken)
        most = max(most, now)
        assert max((stop for _, stop in taken), default=0) <= vacancies.end <= most
    assert most > 5 * max(sizes)
    for spans in held:
        vacancies.give(spans)
    assert vacancies.end == 0


def test_pieces_of_one_size_are_never_cut() -> None:
    draw, vacancies = random.Random(0), Vacancies()
    held = [vacancies.take(7) for _ in range(100)]
    for _ in range(1000):
        vacancies.give(held.pop(draw.randrange(len(held))))
        held.append(vacancies.take(7))
        assert len(held[-1]) == 1
    assert vacancies.end == 700


def test_the_smallest_span_that_has_room_is_used() -> None:
    vacancies = Vacancies()
    spans = [vacancies.take(size) for size in (5, 1, 9, 1, 7, 1)]
    for number in (0, 2, 4):
        vacancies.give(spans[number])
    assert vacancies.take(6) == [(16, 22)]
    assert vacancies.take(9) == [(6, 15)]


def test_where_no_span_has_room_several_do_and_then_the_end() -> None:
    vacancies = Vacancies()
    spans = [vacancies.take(size) for size in (5, 1, 9, 1)]
    for number in (0, 2):
        vacancies.give(spans[number])
    assert vacancies.take(20) == [(6, 15), (0, 5), (16, 22)]


def test_neighbours_become_one_and_the_end_comes_back() -> None:
    vacancies = Vacancies()
    first, second, third, last = (vacancies.take(4) for _ in range(4))
    vacancies.give(first)
    vacancies.give(third)
    vacancies.give(second)
    assert vacancies.take(12) == [(0, 12)]
    vacancies.give(last)
    assert vacancies.end == 12
    assert vacancies.take(0) == []
