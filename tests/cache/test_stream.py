"""One stream's memory: spans, marks, bytes, and the prefix."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from statekv.cache.carried import CarriedCache
from statekv.cache.retrieval import RetrievedView, StepIndexEntry
from statekv.cache.spec import Span
from statekv.cache.stream import StreamState
from statekv.config import METHODS, Config
from statekv.errors import ConfigError
from statekv.models.adapter import Segment
from tests.cache.test_carried import carried, random_scores
from tests.cache.tokens import check_whole, keys, kv_spec, values
from tests.presets import filled


def stream(method: str = "statekv", **settings: Any) -> StreamState:
    return StreamState(kv_spec(), Config.of(**filled({"method": method}, **settings)), horizon=1000)


def enter(state: StreamState, kind: str, tokens: int, mode: str = "carry", pts_seconds: float | None = None) -> None:
    """Run a segment as the stepper does, with scores that prefer even tokens."""
    g, new = state.spec, range(state.tokens, state.tokens + tokens)
    cache = state.detailed if mode == "answer" else state.carried
    if mode == "carry":
        state.expect_newest(kind, tokens)
    if isinstance(cache, CarriedCache):
        cache.open_slots(tokens)
    for layer in range(g.layers):
        key, _ = cache.update(keys(g, layer, new), values(g, layer, new), layer)
        if isinstance(cache, CarriedCache) and mode == "carry":
            token = key[..., 0]
            cache.evict(layer, token / 1000 + 1 - token % 2)
    state.note(kind, tokens, pts_seconds, state.position)
    state.position += tokens


def carried_tokens(state: StreamState) -> list[list[int]]:
    """Per layer, the tokens carried by both heads."""
    cache = state.carried
    if not isinstance(cache, CarriedCache):
        return [list(range(cache.length)) for _ in range(3)]
    for layer in range(3):
        key, value = cache.buffers[layer][..., : cache.lengths[layer], :]
        assert torch.equal(check_whole(state.spec, layer, key, value).sort(-1).values, cache.kept(layer))
    return [cache.kept(layer)[0, 0].tolist() for layer in range(3)]


def test_spans_say_where_and_when() -> None:
    state = stream(budget=8)
    enter(state, "prefix", 3)
    enter(state, "step", 5, pts_seconds=0.5)
    enter(state, "step", 6, pts_seconds=1.5)
    assert state.spans == [Span("prefix", 0, 3, None, 0), Span("step", 3, 5, 0.5, 3), Span("step", 8, 6, 1.5, 8)]
    assert state.tokens == state.position == 14
    assert state.carried.length == 8


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("entered", [0, 1, 4])
def test_a_question_leaves_no_trace(method: str, entered: int) -> None:
    """Peek, question and answer, then back to the mark: as if never asked."""
    asked, never = stream(method, budget=8), stream(method, budget=8)
    for state in (asked, never):
        for number in range(entered):
            enter(state, "step", 5, pts_seconds=float(number))
    mark = asked.mark()
    enter(asked, "step", 3, mode="peek", pts_seconds=9.0)
    asked.detailed.begin_answer(nothing_turns)
    enter(asked, "question", 4, mode="answer")
    enter(asked, "token", 1, mode="answer")
    assert asked.tokens == never.tokens + 8
    asked.crop_to(mark)
    for _ in range(3):
        assert asked.mark() == never.mark()
        assert (asked.tokens, asked.position, asked.spans) == (never.tokens, never.position, never.spans)
        assert carried_tokens(asked) == carried_tokens(never)
        enter(asked, "step", 5)
        enter(never, "step", 5)
    key = asked.detailed.keys(1)
    assert torch.equal(key, never.detailed.keys(1))


def test_a_mark_is_made_of_numbers() -> None:
    state = stream(budget=8)
    enter(state, "step", 5)
    enter(state, "step", 5)
    state.position += 7  # positions of pictures run ahead of tokens
    mark = state.mark()
    assert (mark.tokens, mark.position, mark.carried) == (10, 17, 8)


@pytest.mark.parametrize("method", ["statekv", "full"])
def test_going_back_over_a_step_forgets_it(method: str) -> None:
    """Nothing was evicted yet, so a mark may lie before a step."""
    state = stream(method, budget=100)
    enter(state, "step", 5, pts_seconds=0.0)
    mark = state.mark()
    enter(state, "step", 5, pts_seconds=1.0)
    state.crop_to(mark)
    assert (state.tokens, state.position, len(state.spans)) == (5, 5, 1)
    assert carried_tokens(state) == [list(range(5))] * 3


def test_going_back_over_a_step_forgets_its_frames() -> None:
    state = stream(budget=100)
    mark = state.mark()
    enter(state, "step", 5, pts_seconds=2.0)
    state.frames, state.origin_seconds = 1, 2.0
    state.crop_to(mark)
    assert state.frames == 0
    assert state.origin_seconds is None


def test_carrying_all_is_the_detailed_cache() -> None:
    state = stream("full", budget=8)
    assert state.carried is state.detailed
    enter(state, "step", 20)
    assert state.carried.length == state.tokens == 20
    assert state.nbytes == {"carried": 0, "detailed": state.detailed.nbytes, "blocks": 0, "memories": 0}


def test_bytes_of_both_memories() -> None:
    state = stream(budget=8)
    assert state.nbytes == {"carried": 0, "detailed": 0, "blocks": 0, "memories": 0}
    enter(state, "step", 20)
    state.detailed.reserve(1000)
    g = state.spec
    slots = 20  # the longest step alone needs more room than the budget
    assert state.nbytes == {
        "carried": slots * (g.bytes_per_token + 4 * g.layers * g.kv_heads),
        "detailed": 1000 * g.bytes_per_token,
        "blocks": 0,
        "memories": 0,
    }


def test_carried_and_detailed_see_the_same_stream() -> None:
    state = stream(budget=8)
    carried = state.carried
    assert isinstance(carried, CarriedCache)
    assert state.carried is carried
    assert carried.detailed is state.detailed
    assert carried.budget == 8


@pytest.mark.parametrize(("recall", "expected"), [("all", 31), ("recent", 9), ("sink_recent", 9)])
def test_recall_uses_the_budget_as_its_window(recall: str, expected: int) -> None:
    state = stream(budget=8, recall=recall, sinks=2)
    enter(state, "step", 30)
    state.detailed.begin_answer(nothing_turns)
    key, _ = state.detailed.update(keys(state.spec, 0, range(30, 31)), values(state.spec, 0, range(30, 31)), 0)
    assert key.shape[-2] == expected


def nothing_turns(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Angles of a model without rotation."""
    shape = (*positions.shape, 4)
    return torch.ones(shape), torch.zeros(shape)


class Unturned:
    """A model whose keys are never turned."""

    own_time = False

    def frequencies(self, horizon: int) -> torch.Tensor:
        return torch.ones(2)

    def angles(self, positions: torch.Tensor, horizon: int) -> tuple[torch.Tensor, torch.Tensor]:
        return nothing_turns(positions)

    def moved(self, by: torch.Tensor, horizon: int) -> tuple[torch.Tensor, torch.Tensor]:
        return nothing_turns(by)


@pytest.mark.parametrize("recall", ["all", "recent", "sink_recent", "retrieve", "last_frames"])
def test_only_a_choice_among_steps_is_more_than_a_view(recall: str) -> None:
    state = stream("full", budget=8, recall=recall, retrieve=2, retrieve_newest=1)
    question = torch.zeros(1, 3, dtype=torch.int64)
    for steps in range(5):
        mark = state.mark()
        state.rotary = Unturned()
        state.begin_answer(question)
        assert isinstance(state.recalled, RetrievedView) == (recall == "retrieve" and steps > 3)
        state.crop_to(mark)
        assert state.recalled is state.detailed
        enter(state, "step", 5)
        if state.blocks is not None:
            state.blocks.add(
                state.detailed, StepIndexEntry(5 * steps, 5 * steps + 5, 5), *nothing_turns(torch.zeros(1, 5))
            )


@pytest.mark.parametrize("carry", ["attention", "recent", "sink_recent", "random"])
def test_a_pinned_prefix_stays(carry: str) -> None:
    state = stream(carry=carry, budget=8, pin_prefix=True)
    state.expect_prefix(5)
    enter(state, "prefix", 5)
    for _ in range(10):
        enter(state, "step", 7)
        assert all(tokens[:5] == [0, 1, 2, 3, 4] for tokens in carried_tokens(state))
    assert state.carried.length == 8


def test_an_unpinned_prefix_competes() -> None:
    state = stream(carry="recent", budget=8)
    state.expect_prefix(5)
    enter(state, "prefix", 5)
    enter(state, "step", 20)
    assert carried_tokens(state) == [list(range(17, 25))] * 3


@pytest.mark.parametrize("tokens", [8, 9, 100])
def test_a_pinned_prefix_must_leave_room(tokens: int) -> None:
    state = stream(budget=8, pin_prefix=True)
    with pytest.raises(ConfigError, match=rf"^budget is 8, .*prefix.* {tokens} tokens \(raise budget above {tokens}"):
        state.expect_prefix(tokens)
    assert state.tokens == 0


def test_the_newest_steps_stay_with_the_text_behind_them() -> None:
    """Scores prefer even tokens, so odd ones are there because they are pinned."""
    state = stream(budget=14, pin_newest=2)
    for kind, tokens, first in [("prefix", 3, 3), ("step", 4, 3), ("step", 5, 3), ("text", 2, 3), ("step", 6, 7)]:
        enter(state, kind, tokens)
        assert all(set(range(first, state.tokens)) <= set(kept) for kept in carried_tokens(state))
    assert carried_tokens(state) == [[6, *range(7, 20)]] * 3


def test_newest_steps_that_do_not_fit_are_refused() -> None:
    state = stream(budget=14, pin_newest=2, coverage=0.25)  # 4 of the 14 are a sample
    enter(state, "step", 5)
    with pytest.raises(ConfigError, match=r"^pin_newest is 2 with a budget of 14, .* 11 tokens where 10 go by score"):
        state.expect_newest("step", 6)
    enter(state, "step", 5)
    with pytest.raises(ConfigError, match=r"11 tokens where 10"):
        state.expect_newest("text", 1)


def test_other_carries_pin_nothing_new() -> None:
    state = stream("full", budget=8)
    state.expect_newest("step", 100)
    assert state.carried is state.detailed


@pytest.mark.parametrize("tokens", [5, 100])
def test_carrying_all_pins_the_prefix_anyway(tokens: int) -> None:
    state = stream("full", budget=8, pin_prefix=True)
    state.expect_prefix(tokens)
    assert state.carried is state.detailed
    assert state.nbytes["carried"] == 0


def test_random_streams_of_one_seed_are_alike() -> None:
    states = [stream("random", budget=8, seed=seed) for seed in (1, 1, 2)]
    for state in states:
        for _ in range(5):
            enter(state, "step", 7)
    assert carried_tokens(states[0]) == carried_tokens(states[1]) != carried_tokens(states[2])


def test_free_gives_the_memory_back() -> None:
    state = stream(budget=8)
    enter(state, "step", 20)
    state.free()
    assert state.nbytes == {"carried": 0, "detailed": 0, "blocks": 0, "memories": 0}


def test_a_step_is_worth_what_its_own_keys_score() -> None:
    """And not what those of a forgotten step behind it do, which may be carried for long."""
    state = stream(budget=8, memory="1MiB")
    for _ in range(3):
        enter(state, "step", 5)  # of 15 tokens the 8 even ones are carried
    before = state._importance([0, 5, 10])
    assert before.keys() == {0, 5, 10}
    state._forget([5])
    assert state._importance([0, 10]) == {0: before[0], 10: before[10]}
    assert [span.start for span in state.spans] == [0, 5, 10]  # its keys would have to move with it


def test_a_fork_goes_on_from_both_memories_and_leaves_them_alone() -> None:
    one, never = stream(budget=8), stream(budget=8)
    for state in (one, never):
        enter(state, "prefix", 3)
        enter(state, "step", 9)
    other, before = one.fork(), carried_tokens(one)
    assert carried_tokens(other) == before
    for state in (other, never):
        enter(state, "step", 6)
    assert carried_tokens(other) == carried_tokens(never) != before
    assert carried_tokens(one) == before
    assert (one.tokens, len(one.spans)) == (12, 2)


# Streams that never end

FAR = 2**31 - 60  # tokens


@pytest.mark.parametrize("carry", ["attention", "recent", "sink_recent"])
def test_a_stream_goes_on_beyond_int32(carry: str) -> None:
    """What is kept does not depend on how many tokens have come before; sinks and a pinned prefix stay for ever."""
    far, near = (carried(20, carry, pinned=2) for _ in range(2))
    for number in range(30):
        if number == 4:  # a few billion tokens pass
            far.detailed.away += FAR
        fresh = torch.randn(3, 2, 1, 2, 5, 4, generator=torch.Generator().manual_seed(number))
        for cache in (far, near):
            cache.pin_from(cache.detailed.length + 3)
            cache.open_slots(5)
            for layer in range(3):
                cache.update(*fresh[layer], layer)
                cache.evict(layer, random_scores(cache, layer, number))
        for layer in range(3):
            tokens = near.kept(layer)
            assert torch.equal(far.kept(layer), tokens.long() + FAR * (tokens >= 20))
            mine, its = (cache.buffers[layer][..., : cache.lengths[layer], :] for cache in (far, near))
            assert torch.equal(mine, its)
    assert far.detailed.length > 2**31
    assert {ids.dtype for ids in near.token_ids} == {torch.int32}
    assert torch.equal(far.fork(far.detailed).kept(1), far.kept(1))


class Still(Unturned):
    """As a model, for keys that have moved."""

    def moved(self, by: torch.Tensor, horizon: int) -> tuple[torch.Tensor, torch.Tensor]:
        return nothing_turns(by[None])


@dataclass
class Growth:
    """What a stream takes at some moment."""

    nbytes: int
    spans: int
    objects: int


def growth(state: StreamState) -> Growth:
    gc.collect()
    return Growth(sum(state.nbytes.values()), len(state.spans), len(gc.get_objects()))


@torch.inference_mode()
def watch(state: StreamState, steps: int, first: int = 0) -> None:
    """Tiny steps as a runner lets them in, every seventh of them after a gap."""
    g, tokens = state.spec, 2
    generator = torch.Generator().manual_seed(first)
    for number in range(first, first + steps):
        segment = step_at(state, tokens, float(number))
        if state.close_up(segment):
            segment = step_at(state, tokens, float(number))
        state.expect(segment)
        if number % 7 == 6:
            state.note("gap", 0, number - 0.5, state.uncompacted(None))
        view = state.begin(segment)
        for layer in range(g.layers):
            key, value = torch.randn(2, 1, g.kv_heads, tokens, g.head_dim, generator=generator)
            seen, _ = view.update(key, value, layer)
            if view.must_evict(0):
                view.evict(layer, torch.rand(seen.shape[:3], generator=generator))
        state.commit(segment)


def step_at(state: StreamState, tokens: int, pts_seconds: float) -> Segment:
    positions = torch.arange(state.position, state.position + tokens)[None]
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    return Segment("step", ids, ids, positions, state.position + tokens, 1, pts_seconds)


ENDLESS: dict[str, dict[str, Any]] = {
    "streaming_llm": {"method": "streaming_llm"},
    "streaming_llm, capped": {"method": "streaming_llm", "memory": "150KiB"},
    "recent": {"recall": "recent", "pin_newest": 1},
    "sample, recent": {"carry": "random", "recall": "recent", "memory": "150KiB"},
    "capped": {"memory": "150KiB"},
    "capped, retrieve": {"memory": "150KiB", "recall": "retrieve", "retrieve": 2, "host_memory": "20KiB"},
}


@pytest.mark.parametrize("settings", ENDLESS.values(), ids=ENDLESS)
def test_a_thousand_tiny_steps_leave_no_more_behind_than_hundreds(settings: dict[str, Any]) -> None:
    config = Config.of(**{"budget": 16, "max_new_tokens": 2, **settings})
    state = StreamState(kv_spec(layers=1, kv_heads=1), config, horizon=800, compacts=True, rotary=Still())
    watch(state, 300)
    before = growth(state)
    watch(state, 900, first=300)
    after = growth(state)
    assert state.tokens == 2400
    assert state.frames == 1200
    assert after.nbytes <= before.nbytes
    assert after.spans <= 1.1 * before.spans + 12
    assert after.objects <= before.objects + 60
    gaps = {span.start for span in state.spans if span.kind == "gap"}
    assert gaps <= {span.start for span in state.spans if span.kind == "step"}
