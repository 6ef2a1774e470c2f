"""Nothing is lost, nothing that grows copies itself, and an answer sees the window it was promised."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from statekv.cache import folder
from statekv.cache.detailed import AnswerCache, DetailedCache
from statekv.cache.spec import KVSpec, PositionShift, numbers_in
from statekv.ops.attention import attention
from statekv.ops.rope import rotate
from tests.cache.tokens import check_whole, keys, kv_spec, values


def unmoved(by: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    raise AssertionError("nothing has moved")


def feed(cache: DetailedCache, tokens: int) -> list[list[int]]:
    """Let tokens enter all layers; returns which ones each layer hands out."""
    g, start = cache.spec, cache.length
    new = range(start, start + tokens)
    seen = []
    for layer in range(g.layers):
        key, value = cache.update(keys(g, layer, new), values(g, layer, new), layer)
        held = check_whole(g, layer, key, value)
        assert (held == held[0, 0]).all()
        seen.append(held[0, 0].tolist())
    assert all(row == seen[0] for row in seen)
    return seen


def addresses(cache: DetailedCache) -> list[int]:
    return [buffer.data_ptr() for buffer in cache.buffers]


@pytest.mark.parametrize("g", [kv_spec(), kv_spec(layers=1, kv_heads=1), kv_spec(streams=2)], ids=str)
def test_holds_every_token_in_order(g: KVSpec) -> None:
    cache = DetailedCache(g)
    total = 0
    for tokens in (1, 255, 1, 3, 700, 40):
        total += tokens
        assert feed(cache, tokens)[0] == list(range(total))
    assert cache.length == cache.get_seq_length() == total
    for layer in range(g.layers):
        held = check_whole(g, layer, cache.keys(layer), cache.values(layer))
        assert (held == torch.arange(total)).all()


def test_hands_out_views() -> None:
    cache = DetailedCache(kv_spec())
    g = cache.spec
    key, value = cache.update(keys(g, 1, range(5)), values(g, 1, range(5)), 1)
    assert key.untyped_storage().data_ptr() == cache.buffers[1].untyped_storage().data_ptr()
    assert value.untyped_storage().data_ptr() == cache.buffers[1].untyped_storage().data_ptr()
    assert cache.keys(1).untyped_storage().data_ptr() == cache.buffers[1].untyped_storage().data_ptr()


def test_growing_copies_a_linear_number_of_tokens() -> None:
    cache = DetailedCache(kv_spec(layers=2))
    steps, tokens, changes, copied = 600, 13, 0, 0
    for _ in range(steps):
        before, length = cache.buffers[0], cache.length  # kept alive, so that its address is not given out again
        feed(cache, tokens)
        if cache.buffers[0].data_ptr() != before.data_ptr():
            changes += 1
            copied += length
    total = steps * tokens
    assert 0 < changes <= math.ceil(math.log2(total / 256)) + 1
    assert copied <= 2 * total
    assert cache.capacity <= 2 * total
    assert cache.grown == 2 * (changes - 1)  # the first buffer of each layer copied nothing


def test_nothing_moves_after_reserve() -> None:
    cache = DetailedCache(kv_spec())
    feed(cache, 10)
    cache.reserve(5000)
    before, grown = addresses(cache), cache.grown
    while cache.length < 5000:
        feed(cache, 499)
    assert cache.length == 5000
    assert addresses(cache) == before
    assert cache.grown == grown
    assert feed(cache, 1)[0] == list(range(5001))


@pytest.mark.parametrize("tokens", [0, 3, 256])
def test_reserving_less_changes_nothing(tokens: int) -> None:
    cache = DetailedCache(kv_spec())
    feed(cache, 10)
    before = addresses(cache)
    cache.reserve(tokens)
    assert addresses(cache) == before
    assert feed(cache, 1)[0] == list(range(11))


def test_crop_copies_nothing_and_is_overwritten() -> None:
    cache = DetailedCache(kv_spec())
    feed(cache, 50)
    before = addresses(cache)
    cache.truncate(20)
    assert cache.length == 20
    assert feed(cache, 10)[0] == list(range(30))
    assert addresses(cache) == before
    cache.truncate(1000)
    assert cache.length == 30


def test_crop_mends_a_pass_that_broke_off_between_layers() -> None:
    cache = DetailedCache(kv_spec())
    feed(cache, 20)
    g = cache.spec
    cache.update(keys(g, 0, range(20, 25)), values(g, 0, range(20, 25)), 0)
    assert cache.length == 20
    cache.truncate(20)
    assert feed(cache, 3) == [list(range(23))] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("streams", [1, 3])
def test_bytes_are_the_formula(dtype: torch.dtype, streams: int) -> None:
    g = kv_spec(streams=streams, dtype=dtype)
    cache = DetailedCache(g)
    assert cache.nbytes == 0
    cache.reserve(1000)
    assert cache.nbytes == 1000 * streams * g.bytes_per_token == sum(b.nbytes for b in cache.buffers)
    assert g.bytes_per_token == 2 * 3 * 2 * 4 * dtype.itemsize
    unreserved = DetailedCache(g)
    feed(unreserved, 257)
    assert unreserved.nbytes == unreserved.capacity * streams * g.bytes_per_token


def recalled(recall: str, window: int, sinks: int, asked_at: int, length: int) -> list[int]:
    """By hand: the tokens that an answer sees."""
    if recall == "all":
        return list(range(length))
    sinks = sinks if recall == "sink_recent" else 0
    return [t for t in range(length) if t < sinks or t >= asked_at - (window - sinks)]


@pytest.mark.parametrize("video", [0, 3, 4, 9, 10, 11, 12, 40])
@pytest.mark.parametrize(("window", "sinks"), [(10, 4), (10, 0), (10, 9), (1, 0), (1000, 4)])
@pytest.mark.parametrize("recall", ["all", "recent", "sink_recent"])
def test_an_answer_sees_its_window(recall: str, window: int, sinks: int, video: int) -> None:
    cache = DetailedCache(kv_spec(), recall, window, sinks)
    for step in range(0, video, 6):
        assert feed(cache, min(6, video - step))[0] == list(range(cache.length))  # steps see everything
    cache.begin_answer(unmoved)
    for tokens in (5, 1, 1, 20):  # the question, and answer tokens: the window does not move along
        assert feed(cache, tokens)[0] == recalled(recall, window, sinks, video, cache.length)


@pytest.mark.parametrize("recall", ["recent", "sink_recent"])
def test_crop_ends_the_answer(recall: str) -> None:
    cache = DetailedCache(kv_spec(), recall, 10, 4)
    feed(cache, 40)
    cache.begin_answer(unmoved)
    assert len(feed(cache, 5)[0]) == 15
    cache.truncate(40)
    assert feed(cache, 6)[0] == list(range(46))
    cache.begin_answer(unmoved)
    assert feed(cache, 1)[0] == recalled(recall, 10, 4, 46, 47)


def test_a_window_copies_no_more_than_itself() -> None:
    cache = DetailedCache(kv_spec(), "recent", 10)
    feed(cache, 500)
    cache.begin_answer(unmoved)
    key, _ = cache.update(keys(cache.spec, 0, range(500, 501)), values(cache.spec, 0, range(500, 501)), 0)
    assert key.untyped_storage().data_ptr() == cache.buffers[0].untyped_storage().data_ptr()
    assert key.shape[-2] == 11


def turns(by: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[T] → cos and sin [1, T, 4]: one turn speed for each pair."""
    angles = by[None, :, None].double() * torch.tensor([0.1, 0.01, 0.1, 0.01], dtype=torch.float64)
    return angles.cos().float(), angles.sin().float()


@pytest.mark.parametrize("g", [kv_spec(layers=2), kv_spec(layers=1, streams=2), kv_spec(dtype=torch.bfloat16)], ids=str)
def test_keys_turn_in_place_from_a_token_on(g: KVSpec) -> None:
    """More of them than are turned at once; what lies before, and all values, keep their bits."""
    cache = DetailedCache(g)
    feed(cache, 9000)
    at, first = addresses(cache), 300
    before = [(cache.keys(layer).clone(), cache.values(layer).clone()) for layer in range(g.layers)]
    by = -(torch.arange(9000 - first) // 7)
    cache.rotate(PositionShift(range(first, first + len(by)), by.tolist()), turns)
    cos, sin = turns(by)
    for layer, (key, value) in enumerate(before):
        assert torch.equal(cache.values(layer), value)
        assert torch.equal(cache.keys(layer)[:, :, :first], key[:, :, :first])
        expected = rotate(key[:, :, first:].float(), cos[:, None], sin[:, None])
        assert torch.equal(cache.keys(layer)[:, :, first:], expected.to(g.dtype))
    assert addresses(cache) == at


# What tiers and retrieval read


@pytest.mark.parametrize("g", [kv_spec(), kv_spec(streams=2, dtype=torch.bfloat16)], ids=["one", "streams"])
def test_gathered_segments_are_copies_in_order(g: KVSpec) -> None:
    cache = DetailedCache(g)
    feed(cache, 50)
    starts, stops = [0, 9, 40], [4, 30, 50]
    for layer in range(g.layers):
        found = cache.gather(layer, starts, stops)
        assert found.shape == (2, g.streams, g.kv_heads, 35, g.head_dim)
        tokens = check_whole(g, layer, found[0], found[1])
        assert (tokens == numbers_in(starts, stops)).all()
        found.zero_()
        check_whole(g, layer, cache.keys(layer), cache.values(layer))


def test_the_newest_keys_are_a_view_of_the_last() -> None:
    cache = DetailedCache(kv_spec())
    feed(cache, 20)
    for layer in range(3):
        found = cache.newest(layer, 6)
        assert torch.equal(found, keys(cache.spec, layer, range(14, 20)))
        assert found.untyped_storage().data_ptr() == cache.buffers[layer].untyped_storage().data_ptr()
    assert cache.newest(0, 0).shape[-2] == 0


def test_what_has_left_the_buffers_still_counts() -> None:
    """Tokens keep their numbers, by which streams are cropped."""
    cache = DetailedCache(kv_spec())
    feed(cache, 20)
    cache.away = 100
    assert (cache.length, cache.number(0), cache.get_seq_length()) == (120, 120, 20)
    g = cache.spec
    cache.update(keys(g, 0, range(20, 25)), values(g, 0, range(20, 25)), 0)
    assert [cache.number(layer) for layer in range(3)] == [125, 120, 120]
    cache.truncate(117)
    assert (cache.length, cache.lengths) == (117, [17] * 3)


@pytest.mark.parametrize(("part_bytes", "size"), [(1000, 32), (1, 1)])
def test_parts_are_of_one_size_and_stay_what_they_are(
    part_bytes: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "PART_BYTES", part_bytes)
    cache = DetailedCache(kv_spec(layers=1, kv_heads=1))  # 32 bytes a token
    cache.reserve(100)

    def parts() -> list[tuple[int, int]]:
        return [(part.first, part.stop) for part in cache.parts()]

    assert parts() == []
    cache.advance(size)
    assert parts() == [(0, size)]
    cache.advance(size + 1)
    assert parts() == [(0, size), (size, 2 * size), (2 * size, 2 * size + 1)]


# Answers beside a stream that goes on

SPEC = kv_spec(layers=2)
SEEN: dict[str, dict[str, object]] = {
    "all": {},
    "recent": {"recall": "recent", "window": 30},
    "sinks and recent": {"recall": "sink_recent", "window": 30, "sinks": 4},
    "less than what waits": {"recall": "sink_recent", "window": 8, "sinks": 3},
}


def attended(cache: DetailedCache, tokens: int) -> list[torch.Tensor]:
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
    attended(stream, 100)
    attended(stream, 10)
    stream.begin_answer(lambda by: (by, by))
    attended(stream, 6)
    answer = AnswerCache(stream, 100)
    stream.truncate(100)
    return stream, answer


@pytest.mark.parametrize("settings", SEEN.values(), ids=SEEN)
def test_what_enters_the_stream_changes_an_answer_by_rounding_alone(settings: dict[str, object]) -> None:
    (stream, answer), (_, alone) = asked(settings), asked(settings)
    places = stream.addresses
    for number in range(5):
        if number in (1, 3):
            attended(stream, 20)
        for found, expected in zip(attended(answer, 1), attended(alone, 1), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
            assert torch.equal(found, expected) == (number == 0)
    assert stream.addresses == places
    whole = DetailedCache(SPEC)
    attended(whole, 140)
    for layer in range(SPEC.layers):
        assert torch.equal(stream.keys(layer), whole.keys(layer))
        assert torch.equal(stream.values(layer), whole.values(layer))


def test_alone_it_is_one_piece_in_the_streams_buffers() -> None:
    stream, answer = asked({})
    attended(answer, 3)
    assert [buffer.data_ptr() for buffer in answer.buffers] == list(stream.addresses)
    query = torch.randn(1, 4, 1, 4)
    key, value = answer.update(keys(SPEC, 1, range(119, 120)), values(SPEC, 1, range(119, 120)), 1)
    assert key.shape[2] == 120
    assert torch.equal(answer.attend(1, query, key, value, 0.5), attention(query, key, value, scale=0.5))


def turn(stream: DetailedCache) -> None:
    stream._claim(0, 50)


def grow(stream: DetailedCache) -> None:
    stream.reserve(5000)


@pytest.mark.parametrize("change", [turn, grow])
def test_a_stream_that_changes_what_was_seen_moves_to_a_copy(change: Callable[[DetailedCache], None]) -> None:
    (stream, answer), (_, alone) = asked({}), asked({})
    change(stream)
    assert stream.buffers[0] is not answer.buffers[0]
    stream.buffers[0].zero_()
    assert all(map(torch.equal, attended(answer, 1), attended(alone, 1)))


def test_an_answer_that_finds_no_more_room_leaves_the_stream_where_it_is() -> None:
    (stream, answer), (_, alone) = asked({}), asked({}, room=1000)
    assert stream.capacity == 256
    for _ in range(2):
        for found, expected in zip(attended(answer, 200), attended(alone, 200), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert stream.capacity == 256
    assert answer.length == 516
