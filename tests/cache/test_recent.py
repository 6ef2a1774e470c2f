"""What has not been asked for the longest goes first, and the memory is taken once."""

from __future__ import annotations

import random

import torch

from statekv.cache.geometry import Geometry
from statekv.cache.recent import Recent

GEOMETRY = Geometry(kv_heads=2, head_dim=4, dtype=torch.float32, devices=(torch.device("cpu"),) * 2)
TOKEN = 2 * 2 * 4 * 4  # bytes in one layer


def recent(steps: int, longest: int = 10) -> Recent:
    """Room for so many steps in each layer."""
    return Recent(GEOMETRY, 2 * steps * longest * TOKEN + 2 * TOKEN - 1, longest)


def step(tokens: int = 10) -> torch.Tensor:
    return torch.randn(2, 1, 2, tokens, 4)


def test_comes_back_as_it_was_put_in() -> None:
    kept, held = recent(3), step(9)
    part = held[..., 2:5, :]
    expected = part.clone()
    kept.put(1, 70, part)
    held.zero_()  # what it was read into is used again
    found = kept.get(1, 70)
    assert found is not None
    assert torch.equal(found, expected)
    assert kept.get(0, 70) is None
    assert kept.get(1, 71) is None


def test_what_was_not_asked_for_the_longest_goes_first() -> None:
    """Against a list in order of use, of each layer."""
    draw, kept = random.Random(0), recent(7)
    used: list[list[tuple[int, torch.Tensor]]] = [[], []]
    for start in range(400):
        layer, tokens = draw.randrange(2), step(draw.randint(1, 10))
        kept.put(layer, start, tokens)
        used[layer] = [*used[layer][-6:], (start, tokens)]
        assert len(kept) == sum(map(len, used))
        asked, expected = used[layer].pop(draw.randrange(len(used[layer])))
        used[layer].append((asked, expected))
        found = kept.get(layer, asked)
        assert found is not None
        assert torch.equal(found, expected)
    for layer in range(2):
        known = {start for start, _ in used[layer]}
        assert {start for start in range(400) if kept.get(layer, start) is not None} == known


def test_takes_what_it_may_and_never_more() -> None:
    kept = recent(3)
    before = kept.nbytes
    assert before == 2 * 3 * 10 * TOKEN
    for start in range(9):
        kept.put(0, start, step())
    assert (kept.nbytes, len(kept)) == (before, 3)


def test_where_there_is_no_room_nothing_is_kept() -> None:
    kept = recent(0)
    kept.put(0, 0, step(1))
    assert (kept.get(0, 0), kept.nbytes) == (None, 0)
    kept = recent(2)
    kept.put(0, 0, step(11))
    assert kept.get(0, 0) is None


def test_steps_that_are_gone_leave_all_layers_and_their_places() -> None:
    kept = recent(3)
    for layer in range(2):
        for start in (0, 10, 20):
            kept.put(layer, start, step())
    kept.drop({10, 20, 30})
    assert len(kept) == 2
    assert kept.get(0, 0) is not None
    assert kept.get(1, 10) is None
    for start in (40, 50):
        kept.put(0, start, step())
    assert [kept.get(0, start) is not None for start in (0, 40, 50)] == [True] * 3


def test_clear_lets_go_of_all() -> None:
    kept = recent(1)
    kept.put(0, 0, step())
    kept.clear()
    assert (len(kept), kept.get(0, 0)) == (0, None)
    kept.put(0, 0, step(4))
    assert kept.get(0, 0) is not None
