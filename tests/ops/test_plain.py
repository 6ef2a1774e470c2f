"""Attention without scores mixes what the definition mixes: the queries are the last of the keys."""

from __future__ import annotations

import sys
import types
import warnings

import pytest
import torch

from statekv.errors import SpeedWarning
from statekv.ops import naive, plain
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
    expected, _ = naive.attention_with_key_scores(query, key, value, scale=0.3)
    torch.testing.assert_close(plain.attention(query, key, value, scale=0.3), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", ALIGNMENTS, ids=str)
def test_bfloat16(shape: Shape) -> None:
    query, key, value = shape.tensors(torch.bfloat16)
    mixed = plain.attention(query, key, value, scale=0.3)
    expected, _ = naive.attention_with_key_scores(query, key, value, scale=0.3)
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
    mixed = plain.attention(query, key, value, scale=0.3, hidden=hidden)
    group = query.shape[1] // kv_heads
    for stream in range(streams):
        for head in range(kv_heads):
            left = [j for j in range(keys) if j >= hidden.shape[2] or not hidden[stream, head, j]]
            own = slice(head * group, (head + 1) * group)
            one = (query[stream, own][None], *(t[stream, head, left][None, None] for t in (key, value)))
            expected = plain.attention(*one, scale=0.3)
            tolerance = 1e-5 if dtype == torch.float32 else float(value.abs().max()) * 2.0**-7
            torch.testing.assert_close(mixed[stream, own][None], expected, atol=tolerance, rtol=tolerance)


def reference_flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, softmax_scale: float, causal: bool
) -> torch.Tensor:
    """What flash-attn's documentation says of `flash_attn_func`: [streams, T, heads, D], aligned to the lower right."""
    assert causal
    heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return naive.attention_with_key_scores(*heads_first, scale=softmax_scale)[0].transpose(1, 2)


@pytest.mark.parametrize("shape", ALIGNMENTS, ids=str)
def test_flash_attention_is_handed_what_it_expects(shape: Shape) -> None:
    query, key, value = shape.tensors(slack=3)
    mixed = plain.with_flash_attention(reference_flash, query, key, value, scale=0.3)
    torch.testing.assert_close(mixed, plain.with_torch(query, key, value, scale=0.3), atol=1e-5, rtol=1e-5)


def test_flash_attention_that_does_not_load_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = types.ModuleType("flash_attn")  # holds no flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", broken)
    plain.flash_attention.cache_clear()
    try:
        with pytest.warns(SpeedWarning, match="installed but does not load"):
            assert plain.flash_attention() is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert plain.flash_attention() is None
    finally:
        plain.flash_attention.cache_clear()


def test_flash_attention_that_is_not_there_is_no_news(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    plain.flash_attention.cache_clear()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert plain.flash_attention() is None
    finally:
        plain.flash_attention.cache_clear()


@pytest.mark.parametrize(("queries", "keys"), [(1, 900), (7, 900), (64, 900)])
def test_keys_and_values_are_not_written_out_for_every_head(queries: int, keys: int) -> None:
    """14 heads share 2 of the cache: an expansion would take seven times its bytes."""
    query = torch.randn(1, 14, queries, 64)
    held = torch.randn(2, 1, 2, 1000, 64)[:, :, :, :keys]
    with torch.profiler.profile(profile_memory=True) as seen:
        plain.attention(query, held[0], held[1], scale=0.1)
    taken = sum(event.cpu_memory_usage for event in seen.events() if event.cpu_memory_usage > 0)
    assert taken < 7 * held.nbytes / 2


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [Shape(1, 2, 7, q, k, 64) for q, k in ((1, 300), (16, 300), (300, 300))], ids=str)
def test_cuda_takes_the_flash_kernel(shape: Shape) -> None:
    """Not run without a GPU."""
    need_gpu()
    query, key, value = (tensor.cuda() for tensor in shape.tensors(torch.bfloat16, slack=3))
    with torch.profiler.profile() as seen:
        mixed = plain.with_torch(query, key, value, scale=0.3)
    assert any("flash" in event.key for event in seen.key_averages()), [event.key for event in seen.key_averages()]
    expected, _ = naive.attention_with_key_scores(query, key, value, scale=0.3)
    torch.testing.assert_close(mixed, expected, atol=float(value.abs().max()) * 2.0**-7, rtol=2.0**-7)
