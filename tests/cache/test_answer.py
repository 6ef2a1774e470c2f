"""An answer sees what its stream held when it was asked, wherever its own tokens lie."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from statekv.cache.answer import AnswerCache
from statekv.cache.detailed import DetailedCache
from statekv.ops.attention import attention
from tests.cache.tokens import keys, kv_spec, values

SPEC = kv_spec(layers=2)
WINDOWS: dict[str, dict[str, object]] = {
    "all": {},
    "recent": {"recall": "recent", "window": 30},
    "sinks and recent": {"recall": "sink_recent", "window": 30, "sinks": 4},
    "less than what waits": {"recall": "sink_recent", "window": 8, "sinks": 3},
}


def feed(cache: DetailedCache, tokens: int) -> list[torch.Tensor]:
    """Let tokens enter all layers; what each attends to, as attention mixes it."""
    start, found = cache.length, []
    for layer in range(SPEC.layers):
        new = range(start, start + tokens)
        key, value = keys(SPEC, layer, new) / 100, values(SPEC, layer, new)
        query = torch.randn(1, 4, tokens, 4, generator=torch.Generator().manual_seed(start))
        found.append(cache.attend(layer, query, *cache.update(key, value, layer), 0.5))
    return found


def asked(settings: dict[str, object], room: int = 0) -> tuple[DetailedCache, AnswerCache]:
    """A stream of 100 tokens, 10 of a frame that waits, and a question of 6."""
    stream = DetailedCache(SPEC, **settings)  # type: ignore[arg-type]
    stream.reserve(room)
    feed(stream, 100)
    feed(stream, 10)
    stream.begin_answer(lambda by: (by, by))
    feed(stream, 6)
    answer = AnswerCache(stream, 100)
    stream.truncate(100)
    return stream, answer


@pytest.mark.parametrize("settings", WINDOWS.values(), ids=WINDOWS)
def test_what_enters_the_stream_changes_an_answer_by_rounding_alone(settings: dict[str, object]) -> None:
    (stream, answer), (_, alone) = asked(settings), asked(settings)
    places = stream.addresses
    for number in range(5):
        if number in (1, 3):
            feed(stream, 20)
        for found, expected in zip(feed(answer, 1), feed(alone, 1), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
            assert torch.equal(found, expected) == (number == 0)
    assert stream.addresses == places
    whole = DetailedCache(SPEC)
    feed(whole, 140)
    for layer in range(SPEC.layers):
        assert torch.equal(stream.keys(layer), whole.keys(layer))
        assert torch.equal(stream.values(layer), whole.values(layer))


def test_alone_it_is_one_piece_in_the_streams_buffers() -> None:
    stream, answer = asked({})
    feed(answer, 3)
    assert [buffer.data_ptr() for buffer in answer.buffers] == list(stream.addresses)
    query = torch.randn(1, 4, 1, 4)
    key, value = answer.update(keys(SPEC, 1, range(119, 120)), values(SPEC, 1, range(119, 120)), 1)
    assert key.shape[2] == 120
    assert torch.equal(answer.attend(1, query, key, value, 0.5), attention(query, key, value, scale=0.5))


def rotate(stream: DetailedCache) -> None:
    stream._claim(0, 50)


def grow(stream: DetailedCache) -> None:
    stream.reserve(5000)


@pytest.mark.parametrize("change", [rotate, grow])
def test_a_stream_that_changes_what_was_seen_moves_to_a_copy(change: Callable[[DetailedCache], None]) -> None:
    (stream, answer), (_, alone) = asked({}), asked({})
    change(stream)
    assert stream.buffers[0] is not answer.buffers[0]
    stream.buffers[0].zero_()
    assert all(map(torch.equal, feed(answer, 1), feed(alone, 1)))


def test_an_answer_that_finds_no_more_room_leaves_the_stream_where_it_is() -> None:
    (stream, answer), (_, alone) = asked({}), asked({}, room=1000)
    assert stream.capacity == 256
    for _ in range(2):
        for found, expected in zip(feed(answer, 200), feed(alone, 200), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert stream.capacity == 256
    assert answer.length == 516
