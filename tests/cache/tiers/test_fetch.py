"""What has not been asked for the longest goes first, and the memory is taken once."""

from __future__ import annotations

import random

import pytest
import torch

from statekv.cache.spec import KVSpec
from statekv.cache.tiers.base import HostTier, rows_of
from statekv.cache.tiers.block import OffloadedBlock, SegmentEntry, pack_block
from statekv.cache.tiers.fetch import BlockFetcher, FetchCache
from statekv.ops.rope import rotate
from tests.cache.test_detailed import turns
from tests.cache.tokens import kv_spec

GEOMETRY = KVSpec(kv_heads=2, head_dim=4, dtype=torch.float32, devices=(torch.device("cpu"),) * 2)
TOKEN = 2 * 2 * 4 * 4  # bytes in one layer


def recent(steps: int, longest: int = 10) -> FetchCache:
    """Room for so many steps in each layer."""
    return FetchCache(GEOMETRY, 2 * steps * longest * TOKEN + 2 * TOKEN - 1, longest)


def step(tokens: int = 10) -> torch.Tensor:
    return torch.randn(2, 1, 2, tokens, 4)


def get(kept: FetchCache, layer: int, start: int) -> torch.Tensor | None:
    return kept.read(layer, [start]) if kept.known(layer, [start]) else None


def put(kept: FetchCache, layer: int, start: int, tokens: torch.Tensor) -> None:
    kept.put(layer, [start], [tokens.shape[-2]], tokens)


def test_comes_back_as_it_was_put_in() -> None:
    kept, held = recent(3), step(9)
    part = held[..., 2:5, :]
    expected = part.clone()
    put(kept, 1, 70, part)
    held.zero_()  # what it was read into is used again
    found = get(kept, 1, 70)
    assert found is not None
    assert torch.equal(found, expected)
    assert get(kept, 0, 70) is None
    assert get(kept, 1, 71) is None


def test_several_come_and_go_at_once() -> None:
    """As one by one."""
    draw = random.Random(0)
    several, single = recent(5), recent(5)
    for first in range(0, 2000, 20):
        lengths = [draw.randint(1, 11) for _ in range(draw.randint(0, 7))]
        starts, tokens = [first + number for number in range(len(lengths))], step(sum(lengths))
        several.put(0, starts, lengths, tokens)
        for start, part in zip(starts, tokens.split(lengths, dim=-2), strict=False):
            put(single, 0, start, part)
        asked = draw.sample(range(first - 30, first + 8), 12)
        known = several.known(0, asked)
        assert known == single.known(0, asked)
        alone = [single.read(0, [start]) for start in known]
        found = several.read(0, known)
        assert torch.equal(found, torch.cat(alone, dim=-2) if alone else found[..., :0, :])


def test_what_was_not_asked_for_the_longest_goes_first() -> None:
    """Against a list in order of use, of each layer."""
    draw, kept = random.Random(0), recent(7)
    used: list[list[tuple[int, torch.Tensor]]] = [[], []]
    for start in range(400):
        layer, tokens = draw.randrange(2), step(draw.randint(1, 10))
        put(kept, layer, start, tokens)
        used[layer] = [*used[layer][-6:], (start, tokens)]
        assert len(kept) == sum(map(len, used))
        asked, expected = used[layer].pop(draw.randrange(len(used[layer])))
        used[layer].append((asked, expected))
        found = get(kept, layer, asked)
        assert found is not None
        assert torch.equal(found, expected)
    for layer in range(2):
        assert set(kept.known(layer, range(400))) == {start for start, _ in used[layer]}


def test_takes_what_it_may_and_never_more() -> None:
    kept = recent(3)
    before = kept.nbytes
    assert before == 2 * 3 * 10 * TOKEN
    for start in range(9):
        put(kept, 0, start, step())
    assert (kept.nbytes, len(kept)) == (before, 3)


def test_where_there_is_no_room_nothing_is_kept() -> None:
    kept = recent(0)
    put(kept, 0, 0, step(1))
    assert (get(kept, 0, 0), kept.nbytes) == (None, 0)
    kept = recent(2)
    put(kept, 0, 0, step(11))
    assert get(kept, 0, 0) is None


def test_steps_that_are_gone_leave_all_layers_and_their_places() -> None:
    kept = recent(3)
    for layer in range(2):
        for start in (0, 10, 20):
            put(kept, layer, start, step())
    kept.drop({10, 20, 30})
    assert len(kept) == 2
    assert kept.known(0, [0]) == [0]
    assert kept.known(1, [10]) == []
    for start in (40, 50):
        put(kept, 0, start, step())
    assert kept.known(0, [0, 40, 50]) == [0, 40, 50]


def test_clear_lets_go_of_all() -> None:
    kept = recent(1)
    put(kept, 0, 0, step())
    kept.clear()
    assert (len(kept), kept.known(0, [0])) == (0, [])
    put(kept, 0, 0, step(4))
    assert kept.known(0, [0]) == [0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_of_steps_that_have_moved_are_turned_in_float32(dtype: torch.dtype) -> None:
    g, lengths = kv_spec(layers=1, dtype=dtype), [3, 5]
    tokens = torch.randn(2, 1, 2, sum(lengths), 4).to(dtype)
    held = HostTier().put(pack_block([tokens], lengths, None), rows_of(lengths))
    block = OffloadedBlock(held, rows_of(lengths), on_device=True)
    fetcher = BlockFetcher(g, None)
    fetcher.turned = turns
    steps = [SegmentEntry(40, 3, "step", 0, block=block), SegmentEntry(43, 5, "step", 0, block=block, row=1, moved=-7)]
    found = fetcher.bring(0, steps)
    cos, sin = turns(torch.tensor([0] * 3 + [-7] * 5))
    assert torch.equal(found[0], rotate(tokens[0].float(), cos[:, None], sin[:, None]).to(dtype))
    assert torch.equal(found[1], tokens[1])
