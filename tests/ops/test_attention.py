"""Attention without scores mixes what the definition mixes: the queries are the last of the keys."""

from __future__ import annotations

import random
import sys
import types
import warnings
import weakref
from collections.abc import Iterator

import pytest
import torch

from statekv.errors import SpeedWarning
from statekv.ops import attention, reference
from statekv.ops.attention import attention_over
from tests.gpu import need_gpu
from tests.ops.inputs import SHAPES, Shape

ALIGNMENTS = [
    Shape(2, kv_heads, group, queries, keys, 16)
    for kv_heads, group in ((2, 1), (2, 2), (1, 7))
    for queries, keys in ((1, 1), (1, 12), (2, 12), (11, 12), (12, 12))
]


@pytest.mark.parametrize("shape", [*ALIGNMENTS, *SHAPES], ids=str)
def test_equals_the_definition(shape: Shape) -> None:
    query, key, value = shape.tensors(slack=3)
    expected, _ = reference.attention_with_key_scores(query, key, value, scale=0.3)
    torch.testing.assert_close(attention.attention(query, key, value, scale=0.3), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [*ALIGNMENTS, *SHAPES], ids=str)
def test_log_weights_count_as_in_the_definition(shape: Shape) -> None:
    query, key, value = shape.tensors(slack=3)
    expected, _ = reference.attention_with_key_scores(query, key, value, scale=0.3, bias=shape.bias())
    mixed = attention.attention(query, key, value, scale=0.3, bias=shape.bias())
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", ALIGNMENTS, ids=str)
def test_bfloat16(shape: Shape) -> None:
    query, key, value = shape.tensors(torch.bfloat16)
    mixed = attention.attention(query, key, value, scale=0.3)
    expected, _ = reference.attention_with_key_scores(query, key, value, scale=0.3)
    assert mixed.dtype == torch.bfloat16
    # Probabilities and result are each rounded to 8 bits.
    torch.testing.assert_close(mixed, expected, atol=float(value.abs().max()) * 2.0**-7, rtol=2.0**-7)


@pytest.mark.parametrize("shape", ALIGNMENTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hidden_key_might_as_well_not_be_there(shape: Shape, dtype: torch.dtype) -> None:
    """Each key head hides others; a head at a time, the keys that are left give the same."""
    query, key, value = shape.tensors(dtype)
    streams, kv_heads, keys = key.shape[:3]
    hidden = torch.rand(streams, kv_heads, keys - query.shape[2], generator=torch.Generator().manual_seed(0)) < 0.5
    mixed = attention.attention(query, key, value, scale=0.3, hidden=hidden)
    group = query.shape[1] // kv_heads
    for stream in range(streams):
        for head in range(kv_heads):
            left = [j for j in range(keys) if j >= hidden.shape[2] or not hidden[stream, head, j]]
            own = slice(head * group, (head + 1) * group)
            one = (query[stream, own][None], *(t[stream, head, left][None, None] for t in (key, value)))
            expected = attention.attention(*one, scale=0.3)
            tolerance = 1e-5 if dtype == torch.float32 else float(value.abs().max()) * 2.0**-7
            torch.testing.assert_close(mixed[stream, own][None], expected, atol=tolerance, rtol=tolerance)


def reference_flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, softmax_scale: float, causal: bool
) -> torch.Tensor:
    """What flash-attn's documentation says of `flash_attn_func`: [streams, T, heads, D], aligned to the lower right."""
    assert causal
    heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return reference.attention_with_key_scores(*heads_first, scale=softmax_scale)[0].transpose(1, 2)


@pytest.mark.parametrize("shape", ALIGNMENTS, ids=str)
def test_flash_attention_is_handed_what_it_expects(shape: Shape) -> None:
    query, key, value = shape.tensors(slack=3)
    mixed = attention.with_flash_attention(reference_flash, query, key, value, scale=0.3)
    torch.testing.assert_close(mixed, attention.with_torch(query, key, value, scale=0.3), atol=1e-5, rtol=1e-5)


def test_flash_attention_that_does_not_load_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = types.ModuleType("flash_attn")  # holds no flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", broken)
    attention.flash_attention.cache_clear()
    try:
        with pytest.warns(SpeedWarning, match="installed but does not load"):
            assert attention.flash_attention() is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert attention.flash_attention() is None
    finally:
        attention.flash_attention.cache_clear()


def test_flash_attention_that_is_not_there_is_no_news(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    attention.flash_attention.cache_clear()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert attention.flash_attention() is None
    finally:
        attention.flash_attention.cache_clear()


@pytest.mark.parametrize(("queries", "keys"), [(1, 900), (7, 900), (64, 900)])
def test_keys_and_values_are_not_written_out_for_every_head(queries: int, keys: int) -> None:
    """14 heads share 2 of the cache: an expansion would take seven times its bytes."""
    query = torch.randn(1, 14, queries, 64)
    held = torch.randn(2, 1, 2, 1000, 64)[:, :, :, :keys]
    with torch.profiler.profile(profile_memory=True) as seen:
        attention.attention(query, held[0], held[1], scale=0.1)
    taken = sum(event.cpu_memory_usage for event in seen.events() if event.cpu_memory_usage > 0)
    assert taken < 7 * held.nbytes / 2


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [Shape(1, 2, 7, q, k, 64) for q, k in ((1, 300), (16, 300), (300, 300))], ids=str)
def test_cuda_takes_the_flash_kernel(shape: Shape) -> None:
    """Not run without a GPU."""
    need_gpu()
    query, key, value = (tensor.cuda() for tensor in shape.tensors(torch.bfloat16, slack=3))
    with torch.profiler.profile() as seen:
        mixed = attention.with_torch(query, key, value, scale=0.3)
    assert any("flash" in event.key for event in seen.key_averages()), [event.key for event in seen.key_averages()]
    expected, _ = reference.attention_with_key_scores(query, key, value, scale=0.3)
    torch.testing.assert_close(mixed, expected, atol=float(value.abs().max()) * 2.0**-7, rtol=2.0**-7)


Pairs = list[tuple[torch.Tensor, torch.Tensor]]

ALIGNMENTS_PIECES = [
    Shape(2, kv_heads, group, queries, keys, 16)
    for kv_heads, group in ((2, 1), (2, 2), (1, 7))
    for queries, keys in ((1, 1), (1, 12), (5, 12), (12, 12))
]
EVERY_SHAPE = pytest.mark.parametrize("shape", [*ALIGNMENTS_PIECES, *SHAPES], ids=str)
SIZES = pytest.mark.parametrize("sizes", [[1], [40], [33, 1, 64], [7] * 9], ids=str)


def past_of(shape: Shape, sizes: list[int], dtype: torch.dtype = torch.float32) -> Pairs:
    """Pieces of so many tokens, token-major in memory as a cache of blocks keeps them."""
    generator = torch.Generator().manual_seed(1)
    made = (torch.randn(n, 2, shape.streams, shape.kv_heads, shape.dim, generator=generator) for n in sizes)
    return [(block[:, 0].to(dtype).permute(1, 2, 0, 3), block[:, 1].to(dtype).permute(1, 2, 0, 3)) for block in made]


def in_one(query: torch.Tensor, past: Pairs, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    keys, values = (torch.cat(part, dim=2) for part in zip(*past, (key, value), strict=True))
    return attention.attention(query, keys, values, scale=scale)


@EVERY_SHAPE
@SIZES
def test_equals_plain_attention_to_all_keys(shape: Shape, sizes: list[int]) -> None:
    query, key, value = shape.tensors(slack=3)
    past = past_of(shape, sizes)
    mixed = attention_over(query, past, key, value, scale=0.3)
    torch.testing.assert_close(mixed, in_one(query, past, key, value, 0.3), atol=1e-5, rtol=1e-5)


@EVERY_SHAPE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(shape: Shape, dtype: torch.dtype) -> None:
    query, key, value = shape.tensors(dtype)
    past = past_of(shape, [33, 1, 64], dtype)
    mixed = attention_over(query, past, key, value, scale=0.3)
    exact = [(keys.float(), values.float()) for keys, values in past]
    expected = in_one(query.float(), exact, key.float(), value.float(), 0.3)
    assert mixed.dtype == dtype
    largest = max(float(values.abs().max()) for _, values in [*past, (key, value)])
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(mixed.float(), expected, atol=largest * eps, rtol=eps)


@EVERY_SHAPE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_pieces_it_is_plain_attention(shape: Shape, dtype: torch.dtype) -> None:
    query, key, value = shape.tensors(dtype)
    mixed = attention_over(query, iter([]), key, value, scale=0.3)
    assert torch.equal(mixed, attention.attention(query, key, value, scale=0.3))


def test_the_order_of_pieces_does_not_matter() -> None:
    shape = Shape(2, 2, 2, 9, 30, 64)
    query, key, value = shape.tensors()
    past = past_of(shape, [5, 17, 64, 1, 30])
    first = attention_over(query, past, key, value, scale=0.3)
    random.Random(0).shuffle(past)
    torch.testing.assert_close(attention_over(query, past, key, value, scale=0.3), first, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_piece_outweighs_the_rest(place: int) -> None:
    """Exponentials of these logits overflow float32 by far; their differences do not."""
    shape = Shape(1, 2, 2, 4, 8, 16)
    query, key, value = shape.tensors()
    past = past_of(shape, [16, 16, 16])
    past[place] = (100 * past[place][0], past[place][1])
    mixed = attention_over(query, past, key, value, scale=1.0)
    torch.testing.assert_close(mixed, in_one(query, past, key, value, 1.0), atol=1e-4, rtol=1e-4)
    alone = in_one(query, [past[place]], key, value, 1.0)
    torch.testing.assert_close(mixed, alone, atol=1e-4, rtol=1e-4)


def test_own_keys_are_causal_and_pieces_are_seen_by_all() -> None:
    shape = Shape(1, 1, 1, 3, 3, 16)
    query, key, value = shape.tensors()
    past = past_of(shape, [4])
    before = attention_over(query, past, key, value, scale=0.3)
    key[:, :, 2], value[:, :, 2] = 9, 9
    after = attention_over(query, past, key, value, scale=0.3)
    assert torch.equal(before[:, :, :2], after[:, :, :2])
    assert not torch.equal(before[:, :, 2], after[:, :, 2])
    moved = attention_over(query, [(past[0][0], past[0][1] + 1)], key, value, scale=0.3)
    assert (moved > after).all()


def test_one_piece_is_alive_at_a_time() -> None:
    shape = Shape(1, 2, 2, 3, 3, 16)
    query, key, value = shape.tensors()
    alive: list[int] = []
    seen: list[weakref.ref[torch.Tensor]] = []

    def fetched() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for _ in range(4):
            alive.append(sum(ref() is not None for ref in seen))
            piece = past_of(shape, [8])[0]
            seen.extend(weakref.ref(tensor) for tensor in piece)
            yield piece
            del piece

    attention_over(query, fetched(), key, value, scale=0.3)
    assert alive == [0, 0, 0, 0]
    assert all(ref() is None for ref in seen)


@EVERY_SHAPE
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_the_kernel(shape: Shape, causal: bool, dtype: torch.dtype) -> None:
    """What runs where there is no kernel, against the one that runs here."""
    query, key, value = shape.tensors(dtype)
    if causal:
        key, value = key[:, :, -shape.queries :], value[:, :, -shape.queries :]
    mixed, logs = attention.with_products(query, key, value, scale=0.3, causal=causal)
    expected, expected_logs = attention.with_cpu_kernel(query, key, value, scale=0.3, causal=causal)
    off = 1e-5 if dtype == torch.float32 else 2.0**-7
    torch.testing.assert_close(mixed, expected.float(), atol=off * float(value.abs().max()), rtol=off)
    torch.testing.assert_close(logs, expected_logs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("queries", [1, 7, 64])
def test_keys_and_values_are_not_written_out_for_every_head_pieces(queries: int) -> None:
    """14 heads share 2 of the cache: an expansion would take seven times its bytes."""
    query = torch.randn(1, 14, queries, 64)
    own = torch.randn(2, 1, 2, queries, 64)
    held = torch.randn(2, 1, 2, 900, 64)
    with torch.profiler.profile(profile_memory=True) as seen:
        attention_over(query, [(held[0], held[1])], own[0], own[1], scale=0.1)
    taken = sum(event.cpu_memory_usage for event in seen.events() if event.cpu_memory_usage > 0)
    assert taken < 7 * held.nbytes / 2


@pytest.mark.gpu
@EVERY_SHAPE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cuda(shape: Shape, dtype: torch.dtype) -> None:
    """Not run without a GPU."""
    need_gpu()
    query, key, value = (tensor.cuda() for tensor in shape.tensors(dtype))
    past = [(keys.cuda(), values.cuda()) for keys, values in past_of(shape, [33, 1, 64], dtype)]
    mixed = attention_over(query, past, key, value, scale=0.3)
    expected = in_one(query, past, key, value, 0.3)
    off = 1e-4 if dtype == torch.float32 else 2.0**-6
    torch.testing.assert_close(mixed, expected, atol=off * 4, rtol=off)
