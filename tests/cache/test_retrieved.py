"""What a question chooses, what is handed out, and that it stays so for the whole answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from statekv.cache.blocks import Block, Blocks
from statekv.cache.carried import CarriedCache
from statekv.cache.detailed import DetailedCache
from statekv.cache.policies.carry import Rule
from statekv.cache.retrieved import Retrieved
from statekv.config import Config
from statekv.ops.rope import rotate
from tests.cache.test_blocks import DIM, GROUP, HEADS, angles, geometry

LENGTHS = (5, 4, 6, 3, 5)  # of steps
TEXT = (3, 0, 2, 0, 0)  # tokens of text in front of each


class Stream:
    """A stream of steps and texts whose keys before rotation are known; each token takes two positions."""

    def __init__(self, planted: tuple[int, ...] = (), budget: int = 6) -> None:
        g, generator = geometry(), torch.Generator().manual_seed(0)
        self.detailed, self.blocks = DetailedCache(g), Blocks(g)
        self.carried = CarriedCache(g, budget, Rule("random", sinks=0, seed=0, pinned=0), self.detailed)
        self.query = torch.randn(1, HEADS * GROUP, DIM, generator=generator)
        self.raw = torch.empty(2, HEADS, 0, DIM)
        for step, (length, text) in enumerate(zip(LENGTHS, TEXT, strict=True)):
            self.enter(0.1 * torch.randn(2, HEADS, text, DIM, generator=generator))
            raw = 0.1 * torch.randn(2, HEADS, length, DIM, generator=generator)
            if step in planted:
                raw += self.query.view(HEADS, GROUP, DIM).sum(1)[:, None] * (1 + step)
            start = self.detailed.length
            turn = self.enter(raw)
            self.blocks.add(self.detailed, Block(start, start + length, 2 * length), *turn)

    def enter(self, raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first = self.detailed.length
        cos, sin = angles(2 * torch.arange(first, first + raw.shape[2])[None])
        self.carried.make_room(raw.shape[2])
        for layer in range(2):
            keys = rotate(raw[layer][None], cos[:, None], sin[:, None])
            self.carried.update(keys, -keys, layer)
            self.carried.evict(layer, None)
        self.raw = torch.cat([self.raw, raw], dim=2)
        return cos, sin

    def ask(self, tokens: int = 3, carried: bool = False, **dials: Any) -> Retrieved:
        here = 2 * self.detailed.length + torch.arange(tokens)[None]
        config = Config(recall="retrieve", **dials)
        return Retrieved(self.detailed, self.blocks, self.carried if carried else None, config, angles, here)


def own(tokens: int) -> torch.Tensor:
    return torch.full((1, HEADS, tokens, DIM), 7.0)


def question(stream: Stream, seen: Retrieved, layer: int, tokens: int = 3) -> tuple[Any, ...]:
    """Keys, values and what is hidden, as the hook gets them for the planted query at the question's positions."""
    cos, sin = angles(2 * stream.detailed.lengths[layer] + torch.arange(tokens)[None])
    queries = rotate(stream.query[:, :, None].expand(-1, -1, tokens, -1), cos[:, None], sin[:, None])
    return seen.complete(layer, queries, *seen.update(own(tokens), -own(tokens), layer))


def tokens_of(*steps: int) -> list[int]:
    """All text, and these steps."""
    found: list[int] = []
    first = 0
    for step, (length, text) in enumerate(zip(LENGTHS, TEXT, strict=True)):
        found += range(first, first + text)
        first += text
        found += range(first, first + length) if step in steps else ()
        first += length
    return found


@pytest.mark.parametrize(
    ("dials", "steps"),
    [
        ({"retrieve": 1}, (3,)),
        ({"retrieve": 2}, (1, 3)),
        ({"retrieve": 1, "retrieve_newest": 1}, (3, 4)),
        ({"retrieve": 1, "retrieve_newest": 2}, (1, 3, 4)),
    ],
    ids=str,
)
def test_planted_steps_are_seen_with_all_text(dials: dict[str, Any], steps: tuple[int, ...]) -> None:
    stream = Stream(planted=(1, 3))
    seen = stream.ask(**dials)
    for layer in range(2):
        past = stream.detailed.buffers[layer][..., tokens_of(*steps), :].clone()
        key, value, hidden = question(stream, seen, layer)
        assert hidden is None
        chosen = seen.chosen[layer]
        assert chosen is not None
        assert chosen.tolist() == tokens_of(*steps) == sorted(set(tokens_of(*steps)))
        assert torch.equal(key, torch.cat([past[0], own(3)], dim=-2))
        assert torch.equal(value, torch.cat([past[1], -own(3)], dim=-2))


def test_the_choice_stays_and_the_answer_grows_behind_it() -> None:
    stream = Stream(planted=(1,))
    before = stream.detailed.length
    seen = stream.ask(retrieve=1)
    for layer in range(2):
        question(stream, seen, layer)
    for number in range(1, 300):  # far longer than there was room for at first
        for layer in range(2):
            key, value = seen.update(own(1), -own(1), layer)
            assert key.shape[-2] == len(tokens_of(1)) + 3 + number
            again, _, hidden = seen.complete(layer, torch.full((1, HEADS * GROUP, 1, DIM), 99.0), key, value)
            assert again is key
            assert hidden is None
    assert torch.equal(key[:, :, : len(tokens_of(1))], stream.detailed.buffers[1][0][..., tokens_of(1), :])
    assert stream.detailed.length == seen.get_seq_length() == before + 3 + 299


def test_room_is_made_once() -> None:
    stream = Stream(planted=(0, 2))
    seen = stream.ask(retrieve=2, max_new_tokens=9)
    addresses = seen._seen.addresses
    for layer in range(2):
        question(stream, seen, layer)
    for _ in range(9):
        for layer in range(2):
            seen.update(own(1), -own(1), layer)
    assert seen._seen.addresses == addresses
    assert seen._seen.capacity == seen._seen.length  # the two longest steps were chosen: not a token too many


@pytest.mark.parametrize("steps", [(1,), (0, 3)])
def test_reindexed_keys_close_up_to_the_question(steps: tuple[int, ...]) -> None:
    stream = Stream(planted=steps)
    seen = stream.ask(retrieve=len(steps), retrieve_positions="reindex")
    chosen, total = tokens_of(*steps), stream.detailed.length
    places = 2 * (total - len(chosen) + torch.arange(len(chosen)))  # without a gap, and none before the question
    cos, sin = angles(places[None])
    for layer in range(2):
        values = stream.detailed.buffers[layer][1][..., chosen, :].clone()
        key, value, _ = question(stream, seen, layer)
        expected = rotate(stream.raw[layer][None, :, chosen], cos[:, None], sin[:, None])
        torch.testing.assert_close(key[:, :, :-3], expected, atol=2e-5, rtol=0)
        assert torch.equal(value[:, :, :-3], values)


@pytest.mark.parametrize(
    ("steps", "forgotten"),
    [((1,), (0,)), ((1,), (3,)), ((1,), (0, 2, 3)), ((0, 3), (2,)), ((4,), (0,)), ((0,), (2, 3)), ((0, 4), (2, 3))],
    ids=str,
)
@pytest.mark.parametrize("one_by_one", [False, True])
def test_reindexed_keys_stand_as_if_forgotten_steps_had_never_been(
    steps: tuple[int, ...], forgotten: tuple[int, ...], one_by_one: bool
) -> None:
    stream = Stream(planted=steps)
    starts = [stream.blocks.spots[step].start for step in forgotten]
    for gone in [[start] for start in starts] if one_by_one else [starts]:
        stream.blocks.forget(gone)
    seen = stream.ask(retrieve=len(steps), retrieve_positions="reindex")
    chosen, total = tokens_of(*steps), stream.detailed.length
    places = 2 * (total - len(chosen) + torch.arange(len(chosen)))
    cos, sin = angles(places[None])
    for layer in range(2):
        values = stream.detailed.buffers[layer][1][..., chosen, :].clone()
        key, value, _ = question(stream, seen, layer)
        expected = rotate(stream.raw[layer][None, :, chosen], cos[:, None], sin[:, None])
        torch.testing.assert_close(key[:, :, :-3], expected, atol=2e-5, rtol=0)
        assert torch.equal(value[:, :, :-3], values)


def test_forgotten_steps_are_never_chosen() -> None:
    stream = Stream(planted=(1, 3))
    stream.blocks.forget([stream.blocks.spots[3].start])
    seen = stream.ask(retrieve=1, retrieve_newest=1)
    question(stream, seen, 0)
    assert seen.chosen[0] is not None
    assert seen.chosen[0].tolist() == tokens_of(1, 4)


def test_carried_keys_are_seen_once() -> None:
    stream = Stream(planted=(1,), budget=10)
    seen = stream.ask(retrieve=1, carried=True)
    for layer in range(2):
        held = stream.carried.buffers[layer][0, :, :, :10].clone()
        key, _, hidden = question(stream, seen, layer)
        past = len(tokens_of(1))
        assert torch.equal(key[:, :, past : past + 10], held)
        assert hidden.shape == (1, HEADS, past + 10)
        assert not hidden[..., :past].any()
        for head in range(HEADS):
            born = stream.carried.born[layer][0, head, :10].tolist()
            assert hidden[0, head, past:].tolist() == [token in tokens_of(1) for token in born]
        assert hidden.any()
        assert not hidden.all()
        assert stream.carried.lengths[layer] == 10


def test_ties_go_to_the_earlier_step() -> None:
    stream = Stream()
    for means in stream.blocks.means:
        means.zero_()
    seen = stream.ask(retrieve=2)
    question(stream, seen, 0)
    assert seen.chosen[0] is not None
    assert seen.chosen[0].tolist() == tokens_of(0, 1)
