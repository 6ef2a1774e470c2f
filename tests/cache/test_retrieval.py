"""Every step has its mean key, taken back to before rotation, and the question's score is a product with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from statekv.cache.carried import CarriedCache
from statekv.cache.detailed import DetailedCache
from statekv.cache.retrieval import RetrievedView, StepIndex, StepIndexEntry
from statekv.cache.spec import KVSpec
from statekv.config import Config
from statekv.ops.rope import rotate
from tests.cache.tokens import policy

HEADS, GROUP, DIM = 2, 3, 8


def kv_spec(layers: int = 2, dtype: torch.dtype = torch.float32) -> KVSpec:
    return KVSpec(HEADS, DIM, dtype, (torch.device("cpu"),) * layers)


def angles(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[1, T] → cos and sin [1, T, DIM]."""
    turned = positions[..., None].float() * torch.tensor([1.0, 0.3, 0.1, 0.01]).repeat(2)
    return turned.cos(), turned.sin()


def feed(detailed: DetailedCache, raw: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Let keys [layers, kv_heads, T, DIM] enter, rotated by their positions from `start` on; returns the angles."""
    cos, sin = angles(torch.arange(start, start + raw.shape[2])[None])
    for layer, keys in enumerate(raw):
        rotated = rotate(keys[None], cos[:, None], sin[:, None])
        detailed.append(rotated, rotated, layer)
    return cos, sin


def filled(steps: int, dtype: torch.dtype = torch.float32) -> tuple[StepIndex, DetailedCache, list[torch.Tensor]]:
    """Steps of growing length behind three tokens of text, and their keys before rotation."""
    g, generator = kv_spec(dtype=dtype), torch.Generator().manual_seed(0)
    detailed, blocks, entered = DetailedCache(g), StepIndex(g), []
    feed(detailed, torch.randn(2, HEADS, 3, DIM, generator=generator), 0)
    for step in range(steps):
        raw = torch.randn(2, HEADS, 4 + step % 3, DIM, generator=generator)
        start = detailed.length
        turn = feed(detailed, raw, 7 * start)  # positions run ahead of tokens
        blocks.add(detailed, StepIndexEntry(start, detailed.length, 5), *turn)
        entered.append(raw)
    return blocks, detailed, entered


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_a_representative_is_the_mean_key_before_rotation(dtype: torch.dtype, tolerance: float) -> None:
    blocks, _, entered = filled(5, dtype)
    assert len(blocks) == 5
    for layer in range(2):
        expected = torch.stack([raw[layer].mean(-2) for raw in entered], dim=1)
        assert blocks.means[layer].dtype == torch.float32
        torch.testing.assert_close(blocks.means[layer][0, :, :5], expected, atol=tolerance, rtol=0)


def test_a_score_is_the_sum_over_all_heads() -> None:
    blocks, _, entered = filled(4)
    query = torch.randn(1, HEADS * GROUP, DIM)
    for layer in range(2):
        by_hand = [
            sum(float(query[0, h] @ raw[layer, h // GROUP].mean(0)) for h in range(HEADS * GROUP)) for raw in entered
        ]
        torch.testing.assert_close(blocks.scores(layer, query)[0], torch.tensor(by_hand), atol=1e-4, rtol=0)


@pytest.mark.parametrize("planted", [0, 3, 6])
def test_a_planted_step_scores_highest(planted: int) -> None:
    g, query = kv_spec(), torch.randn(1, HEADS * GROUP, DIM, generator=torch.Generator().manual_seed(1))
    detailed, blocks = DetailedCache(g), StepIndex(g)
    wanted = query.view(HEADS, GROUP, DIM).sum(1)
    for step in range(7):
        raw = 0.1 * torch.randn(2, HEADS, 6, DIM, generator=torch.Generator().manual_seed(step))
        if step == planted:
            raw[:, :, 2] += wanted
        turn = feed(detailed, raw, 1000 * step)
        blocks.add(detailed, StepIndexEntry(6 * step, 6 * step + 6, 6), *turn)
    for layer in range(2):
        assert int(blocks.scores(layer, query).argmax()) == planted


def test_entering_never_touches_older_representatives() -> None:
    blocks, detailed, _ = filled(3)
    before, address = blocks.means[0][:, :, :3].clone(), blocks.means[0].data_ptr()
    with torch.inference_mode():
        detailed.keys(0)[:] = float("nan")  # nothing old is read again
    turn = feed(detailed, torch.ones(2, HEADS, 4, DIM), 0)
    blocks.add(detailed, StepIndexEntry(detailed.length - 4, detailed.length, 4), *turn)
    assert torch.equal(blocks.means[0][:, :, :3], before)
    assert blocks.means[0].data_ptr() == address


def test_growing_keeps_what_was_there() -> None:
    blocks, _, entered = filled(70)
    expected = torch.stack([raw[1].mean(-2) for raw in entered], dim=1)
    torch.testing.assert_close(blocks.means[1][0, :, :70], expected, atol=1e-5, rtol=0)


def test_bytes_are_the_formula() -> None:
    assert StepIndex(kv_spec()).nbytes == 0
    for steps, capacity in ((1, 64), (64, 64), (65, 128)):
        assert filled(steps)[0].nbytes == 2 * HEADS * DIM * 4 * capacity


def test_crop_forgets_what_does_not_lie_within() -> None:
    blocks, _, _ = filled(4)
    stops = [block.stop for block in blocks.spots]
    for tokens, left in ((stops[3], 4), (stops[3] - 1, 3), (stops[1], 2), (stops[0] - 1, 0), (0, 0)):
        blocks.truncate(tokens)
        assert len(blocks) == left
    assert blocks.scores(0, torch.zeros(1, HEADS, DIM)).shape == (1, 0)


def test_restored_blocks_score_the_same_and_go_on() -> None:
    blocks, detailed, _ = filled(3)
    other, query = StepIndex(blocks.spec), torch.randn(1, HEADS, DIM)
    other.restore(list(blocks.spots), [means[:, :, :3].clone() for means in blocks.means])
    turn = feed(detailed, torch.ones(2, HEADS, 4, DIM), 0)
    for each in (blocks, other):
        each.add(detailed, StepIndexEntry(detailed.length - 4, detailed.length, 4), *turn)
    assert other.spots == blocks.spots
    assert torch.equal(other.scores(1, query), blocks.scores(1, query))


# Forgetting


def starts_of(blocks: StepIndex) -> list[int]:
    return [block.start for block in blocks.spots]


@pytest.mark.parametrize("forgotten", [[0], [3], [2, 3, 4], [0, 1, 5], [0, 1, 2, 3, 4, 5]], ids=str)
def test_those_that_stay_score_as_before(forgotten: list[int]) -> None:
    blocks, detailed, _ = filled(7)
    query, starts = torch.randn(1, HEADS * GROUP, DIM), starts_of(blocks)
    stay = [number for number in range(7) if number not in forgotten]
    scores = [blocks.scores(layer, query)[:, stay] for layer in range(2)]
    blocks.forget([starts[number] for number in forgotten])
    assert starts_of(blocks) == [starts[number] for number in stay]
    assert all(torch.equal(blocks.scores(layer, query), scores[layer]) for layer in range(2))
    turn = feed(detailed, torch.ones(2, HEADS, 4, DIM), 0)
    blocks.add(detailed, StepIndexEntry(detailed.length - 4, detailed.length, 4), *turn)
    assert len(blocks) == len(stay) + 1
    assert torch.equal(blocks.scores(1, query)[:, :-1], scores[1])


def test_what_the_forgotten_took_is_lost_before_the_next_that_stays() -> None:
    """In one go or one after another, in any order."""
    for rounds in ([[1, 3, 4]], [[1], [3], [4]], [[4], [1, 3]], [[3], [4, 1]]):
        blocks, _, _ = filled(7)
        starts = starts_of(blocks)
        blocks.respace([10, 11, 12, 13, 14, 15, 16])
        for forgotten in rounds:
            blocks.forget([starts[number] for number in forgotten])
        found = [(block.positions, block.lost) for block in blocks.spots]
        assert found == [(10, 0), (12, 11), (15, 13 + 14), (16, 0)]
    blocks.forget([starts[2], starts[5]])
    assert [(block.positions, block.lost) for block in blocks.spots] == [(10, 0), (16, 11 + 12 + 13 + 14 + 15)]
    blocks.forget([starts[0]])
    assert [(block.start, block.lost) for block in blocks.spots] == [(starts[6], 75)]


def test_respacing_leaves_what_is_lost() -> None:
    blocks, _, _ = filled(4)
    blocks.forget(starts_of(blocks)[1:2])
    blocks.respace([1, 2, 3])
    assert [(block.positions, block.lost) for block in blocks.spots] == [(1, 0), (2, 5), (3, 0)]


def with_text() -> tuple[StepIndex, DetailedCache]:
    """Three tokens of text, steps of 4, 5, 6, two tokens of text, and steps of 4 and 5."""
    blocks, detailed, _ = filled(3)
    feed(detailed, torch.ones(2, HEADS, 2, DIM), 0)
    for length in (4, 5):
        turn = feed(detailed, torch.ones(2, HEADS, length, DIM), 0)
        blocks.add(detailed, StepIndexEntry(detailed.length - length, detailed.length, length), *turn)
    return blocks, detailed


@pytest.mark.parametrize("forgotten", [[], [3], [7, 12], [3, 7, 12, 20]], ids=str)
def test_forgotten_steps_are_no_text(forgotten: list[int]) -> None:
    """Nor on a fork, nor for what enters later."""
    blocks, detailed = with_text()
    assert starts_of(blocks) == [3, 7, 12, 20, 24]
    if forgotten:
        blocks.forget(forgotten)
    for each in (blocks, blocks.fork()):
        assert each.texts == [(0, 3), (18, 20)]
        assert each.text_behind(detailed.length) == []
        assert each.text_behind(detailed.length + 6) == [(29, 35)]
    for each in (blocks.fork(), blocks):
        turn = feed(detailed, torch.ones(2, HEADS, 4, DIM), 0)
        each.add(detailed, StepIndexEntry(detailed.length - 4, detailed.length, 4), *turn)
        behind = [(29, detailed.length - 4)] if detailed.length > 33 else []
        assert each.texts == [(0, 3), (18, 20), *behind]


def test_crop_goes_back_to_before_a_text() -> None:
    blocks, _ = with_text()
    blocks.forget([7, 12])
    for tokens, starts, texts, behind in (
        (27, [3, 20], [(0, 3), (18, 20)], [(24, 27)]),
        (19, [3], [(0, 3)], [(18, 19)]),
        (18, [3], [(0, 3)], []),
    ):
        blocks.truncate(tokens)
        assert (starts_of(blocks), blocks.texts, blocks.text_behind(tokens)) == (starts, texts, behind)


def test_a_fork_forgets_alone() -> None:
    blocks, _ = with_text()
    other, query = blocks.fork(), torch.randn(1, HEADS, DIM)
    spots, scores = blocks.spots, blocks.scores(0, query)
    other.forget([3, 12])
    assert blocks.spots == spots
    assert torch.equal(blocks.scores(0, query), scores)
    assert torch.equal(other.scores(0, query), scores[:, [1, 3, 4]])


def test_never_more_room_than_for_the_most() -> None:
    blocks, _, _ = filled(60)
    blocks.most = 70
    detailed = DetailedCache(blocks.spec)
    for _ in range(30):
        turn = feed(detailed, torch.ones(2, HEADS, 4, DIM), 0)
        blocks.add(detailed, StepIndexEntry(detailed.length - 4 + 1000, detailed.length + 1000, 4), *turn)
        if len(blocks) == 70:
            blocks.forget(starts_of(blocks)[:5])
    assert blocks.nbytes == 2 * HEADS * DIM * 4 * 70


@pytest.mark.parametrize("forgotten", [range(0, 1500, 3), range(600), range(900, 1499)], ids=str)
def test_many_move_up_part_by_part(forgotten: range) -> None:
    """More of them than move at once."""
    blocks = StepIndex(kv_spec())
    means = [torch.randn(1, HEADS, 1500, DIM) for _ in range(2)]
    blocks.restore([StepIndexEntry(5 * number, 5 * number + 5, 5) for number in range(1500)], means)
    stay = [number for number in range(1500) if number not in forgotten]
    blocks.forget([5 * number for number in forgotten])
    assert starts_of(blocks) == [5 * number for number in stay]
    for layer in range(2):
        assert torch.equal(blocks.means[layer][:, :, : len(stay)], means[layer][:, :, stay])


def test_with_a_limit_the_memory_is_taken_once() -> None:
    blocks, detailed = StepIndex(kv_spec(), most=300), DetailedCache(kv_spec())
    turn = feed(detailed, torch.ones(2, HEADS, 5, DIM), 0)
    found = set()
    for number in range(300):
        blocks.add(detailed, StepIndexEntry(5 * number, 5 * number + 5, 5), *turn)
        found.add(tuple(means.data_ptr() for means in blocks.means))
    assert len(found) == 1
    assert blocks.nbytes == 2 * HEADS * DIM * 4 * 300


LENGTHS = (5, 4, 6, 3, 5)  # of steps
TEXT = (3, 0, 2, 0, 0)  # tokens of text in front of each


class Stream:
    """A stream of steps and texts whose keys before rotation are known; each token takes two positions."""

    def __init__(self, planted: tuple[int, ...] = (), budget: int = 6, dtype: torch.dtype = torch.float32) -> None:
        g, generator = kv_spec(dtype=dtype), torch.Generator().manual_seed(0)
        self.detailed, self.blocks = DetailedCache(g), StepIndex(g)
        self.carried = CarriedCache(g, budget, policy("random"), self.detailed)
        self.query = torch.randn(1, HEADS * GROUP, DIM, generator=generator)
        self.raw = torch.empty(2, HEADS, 0, DIM)
        for step, (length, text) in enumerate(zip(LENGTHS, TEXT, strict=True)):
            self.enter(0.1 * torch.randn(2, HEADS, text, DIM, generator=generator))
            raw = 0.1 * torch.randn(2, HEADS, length, DIM, generator=generator)
            if step in planted:
                raw += self.query.view(HEADS, GROUP, DIM).sum(1)[:, None] * (1 + step)
            start = self.detailed.length
            turn = self.enter(raw)
            self.blocks.add(self.detailed, StepIndexEntry(start, start + length, 2 * length), *turn)

    def enter(self, raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first = self.detailed.length
        cos, sin = angles(2 * torch.arange(first, first + raw.shape[2])[None])
        self.carried.open_slots(raw.shape[2])
        for layer in range(2):
            keys = rotate(raw[layer][None], cos[:, None], sin[:, None])
            self.carried.update(keys, -keys, layer)
            self.carried.evict(layer, None)
        self.raw = torch.cat([self.raw, raw], dim=2)
        return cos, sin

    def ask(self, tokens: int = 3, carried: bool = False, **dials: Any) -> RetrievedView:
        here = 2 * self.detailed.length + torch.arange(tokens)[None]
        config = Config(recall="retrieve", **dials)
        return RetrievedView(self.detailed, self.blocks, self.carried if carried else None, config, angles, here)


def own(tokens: int) -> torch.Tensor:
    return torch.full((1, HEADS, tokens, DIM), 7.0)


def question(stream: Stream, seen: RetrievedView, layer: int, tokens: int = 3) -> tuple[Any, ...]:
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


def test_reindexed_keys_are_turned_in_float32() -> None:
    stream = Stream(planted=(1,), dtype=torch.bfloat16)
    seen = stream.ask(retrieve=1, retrieve_positions="reindex")
    chosen = torch.tensor(tokens_of(1))
    cos, sin = angles(2 * (stream.detailed.length - len(chosen) + torch.arange(len(chosen)) - chosen)[None])
    for layer in range(2):
        held = stream.detailed.buffers[layer][0][..., chosen, :].float()
        key, _, _ = question(stream, seen, layer)
        assert torch.equal(key[:, :, :-3], rotate(held, cos[:, None], sin[:, None]).bfloat16())


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
            token_ids = stream.carried.token_ids[layer][0, head, :10].tolist()
            assert hidden[0, head, past:].tolist() == [token in tokens_of(1) for token in token_ids]
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
