"""Where answers see the newest tokens, those that none can see again are let go, and nobody notices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from statekv.cache.detailed import DetailedCache
from statekv.cache.spec import PositionShift
from statekv.cache.tiers.plan import spare_of, window_tokens
from statekv.cache.tiers.window import WindowedCache
from statekv.config import Config
from statekv.engine.session import Session
from statekv.errors import ConfigError, MemoryLimitError
from tests.cache.test_detailed import feed, recalled, turns, unmoved
from tests.cache.tokens import check_whole, kv_spec, policy
from tests.runner.test_runner import push_together
from tests.talk import QUESTION, assert_same_memory, assert_same_stream, frames_of, shared_engine, some_frames
from tests.tiny import TWO_FAMILIES, video

WINDOWS = pytest.mark.parametrize("recall", ["recent", "sink_recent"])
CARRY: dict[str, dict[str, Any]] = {
    "attention": {},
    "streaming_llm": {"method": "streaming_llm"},
    "random": {"carry": "random"},
    "pinned": {"pin_prefix": True, "pin_newest": 1, "budget": 30},
    "decay": {"decay": 0.5, "layer_slope": 0.5},
    "memory": {"memory": "8MiB"},
}
LONGEST, ROOM = 9, 30


def windowed(recall: str, budget: int = 20, sinks: int = 4) -> WindowedCache:
    given: dict[str, Any] = {"sinks": sinks} if recall == "sink_recent" else {}
    return WindowedCache(kv_spec(), Config(recall=recall, budget=budget, **given), policy(budget=budget))


def step(cache: WindowedCache, tokens: int) -> None:
    cache.make_way(tokens, ROOM, lambda starts: {})
    feed(cache, tokens)


@pytest.mark.parametrize("budget", [6, 20, 33])
@WINDOWS
def test_an_answer_sees_its_window_at_every_moment(recall: str, budget: int) -> None:
    cache = windowed(recall, budget)
    for number in range(60):
        step(cache, 1 + number * 7 % LONGEST)
        length = cache.length
        cache.begin_answer(unmoved)
        for tokens in (5, 1, 20):
            assert feed(cache, tokens)[0] == recalled(recall, budget, 4, length, cache.length)
        cache.truncate(length)
    assert cache.length > 5 * budget > 0 < cache.away


@WINDOWS
def test_what_is_held_is_bounded_and_stays_where_it_is(recall: str) -> None:
    cache = windowed(recall)
    most, places = 0, set[tuple[int, ...]]()
    for number in range(100):
        step(cache, 1 + number * 7 % LONGEST)
        most = max(most, cache.lengths[0])
        assert cache.lengths[0] <= 20 + spare_of(20) + LONGEST
        places.add(cache.addresses)
    assert cache.capacity <= window_tokens(20, LONGEST + 4, ROOM)
    assert cache.capacity >= most
    assert len(places) == 1
    assert cache.nbytes == cache.capacity * cache.spec.bytes_per_token


@WINDOWS
def test_reserving_for_a_whole_video_takes_no_more_than_the_window(recall: str) -> None:
    cache = windowed(recall)
    cache.reserve(10**9)
    assert cache.capacity == 25
    step(cache, LONGEST)
    cache.reserve(10**9)
    assert cache.capacity == window_tokens(20, LONGEST + 4, ROOM)


@WINDOWS
def test_a_fork_does_not_see_what_becomes_of_the_other(recall: str) -> None:
    cache = windowed(recall)
    for _ in range(4):
        step(cache, 6)
    other = cache.fork()
    held = check_whole(cache.spec, 1, other.keys(1), other.values(1)).clone()
    for _ in range(20):
        step(cache, 6)
    assert torch.equal(check_whole(cache.spec, 1, other.keys(1), other.values(1)), held)
    for _ in range(20):
        step(other, 6)
    assert_same_memory([cache.keys(0)], [other.keys(0)])
    assert cache.dropped == other.dropped


@WINDOWS
def test_keys_that_are_held_turn_by_their_own_numbers(recall: str) -> None:
    cache, whole = windowed(recall), DetailedCache(kv_spec(), recall, 20, 4)
    for tokens in [6] * 30:
        step(cache, tokens)
        feed(whole, tokens)
    assert cache.away
    starts = range(0, 180, 6)
    by = [-(start // 3) for start in starts]
    for each in (cache, whole):
        each.rotate(PositionShift(starts, by), turns)
    numbers = [number for number in range(180) if number not in cache.dropped]
    assert torch.equal(cache.keys(2), whole.keys(2)[:, :, numbers])
    assert torch.equal(cache.values(2), whole.values(2)[:, :, numbers])


def opened(family: str, **settings: Any) -> Session:
    return shared_engine(family).open(**{"budget": 20, "max_new_tokens": 6, **settings})


def unbounded(family: str, **settings: Any) -> Session:
    """The same session on a detailed cache that lets nothing go."""
    session = opened(family, **settings)
    state, c = session.state, session.state.config
    state.detailed, state._carried = DetailedCache(state.spec, c.recall, c.budget, c.recalled_sinks), None
    return session


@pytest.mark.parametrize(("carry", "family"), list(zip(CARRY, TWO_FAMILIES * 3, strict=True)))
@WINDOWS
def test_answers_are_those_of_an_unbounded_stream(family: str, recall: str, carry: str) -> None:
    settings = {**CARRY[carry], "recall": recall}
    found, expected = opened(family, **settings), unbounded(family, **{**settings, "memory": None})
    for frame in frames_of(video(30)):
        for session in (found, expected):
            session.push([frame])
        if int(frame.pts_seconds) % 8 == 1:
            assert torch.equal(found.logits(QUESTION), expected.logits(QUESTION))
    assert found.ask(QUESTION) == expected.ask(QUESTION)
    assert found.state.detailed.dropped
    lost = [span for span in expected.state.spans if span not in found.state.spans]
    assert {number for span in lost for number in range(span.start, span.start + span.length)} <= {
        *found.state.detailed.dropped
    }
    carried, starts = expected.state.bounded, [span.start for span in expected.state.spans]
    assert carried is not None
    assert lost or carry != "streaming_llm"
    assert not carried.held_of(starts) & {span.start for span in lost}
    assert found.state.pairs == expected.state.pairs
    assert not found.state.forgotten


@pytest.mark.parametrize(("recall", "family"), list(zip(("recent", "sink_recent"), TWO_FAMILIES, strict=True)))
def test_older_steps_move_closer_together_as_without_bounds(family: str, recall: str) -> None:
    settings = {"recall": recall, "horizon": 160, "on_horizon": "compact", "max_new_tokens": 6}
    found, expected = opened(family, **settings), unbounded(family, **settings)
    for session in (found, expected):
        session.push(frames_of(video(40), fps=2.0))
    assert found.state.compaction.factor > 1
    assert found.state.position == expected.state.position
    assert torch.equal(found.logits(QUESTION), expected.logits(QUESTION))
    for layer in range(3):
        assert torch.equal(found.state.carried.kept(layer), expected.state.carried.kept(layer))  # type: ignore[union-attr]


@pytest.mark.parametrize("memory", [None, "4MiB"])
@pytest.mark.parametrize(("recall", "family"), list(zip(("recent", "sink_recent"), TWO_FAMILIES, strict=True)))
def test_restored_forked_and_continued_equals_never_interrupted(
    family: str, recall: str, memory: str | None, tmp_path: Path
) -> None:
    settings = {"recall": recall, "memory": memory, "pin_newest": 1}
    never, going = opened(family, **settings), opened(family, **settings)
    for number, frame in enumerate(some_frames(30)):
        never.push([frame])
        going.push([frame])
        if number % 8 == 5:
            going.save(tmp_path / "saved")
            going.close()
            going = shared_engine(family).restore(tmp_path / "saved").fork()
        if number % 8 == 7:
            assert_same_stream(going, never)
            assert not memory or going.state.nbytes["detailed"] == never.state.nbytes["detailed"]
    assert torch.equal(going.logits(QUESTION), never.logits(QUESTION))


@WINDOWS
def test_a_save_that_holds_all_tokens_goes_on_in_a_window(recall: str, tmp_path: Path) -> None:
    """Before there were windows, nothing was let go."""
    before, now = unbounded("internvl", recall=recall), opened("internvl", recall=recall)
    for session in (before, now):
        session.push(some_frames(20))
    before.save(tmp_path / "saved")
    restored = shared_engine("internvl").restore(tmp_path / "saved")
    assert torch.equal(restored.logits(QUESTION), now.logits(QUESTION))
    for session in (restored, now):
        session.push(frames_of(video(20, seed=3), start_seconds=20))
    assert torch.equal(restored.logits(QUESTION), now.logits(QUESTION))
    assert restored.state.detailed.lengths[0] <= 25 + restored.state.spans[-1].length


@WINDOWS
def test_windows_step_as_a_batch(recall: str) -> None:
    films = [some_frames(24, seed) for seed in range(2)]
    together, alone = ([opened("internvl", recall=recall) for _ in films] for _ in range(2))
    push_together(together, films, 0, 24)
    for session, film in zip(alone, films, strict=True):
        session.push(film)
    for mine, its in zip(together, alone, strict=True):
        assert mine.state.detailed.dropped == its.state.detailed.dropped != range(0)
        assert mine.state.spans == its.state.spans


@pytest.mark.parametrize(("recall", "family"), list(zip(("recent", "sink_recent"), TWO_FAMILIES, strict=True)))
def test_a_cap_holds_at_every_moment_or_is_refused(family: str, recall: str) -> None:
    with pytest.raises(ConfigError, match="need about") as refused:
        opened(family, recall=recall, memory="16KiB").push(some_frames(2))
    least = str(refused.value).partition("need about ")[2].partition(" (")[0]
    session = opened(family, recall=recall, memory=least)
    cap: Any = session.state.config.memory
    for frame in some_frames(30):
        session.push([frame])
        session.ask(QUESTION)
        assert sum(session.state.nbytes.values()) <= cap
    with pytest.raises(MemoryLimitError, match="do not fit"):
        session.ask(QUESTION, max_new_tokens=10_000)
