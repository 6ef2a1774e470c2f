"""Blocks of any size give what the definition gives."""

from __future__ import annotations

import math

import pytest
import torch

from statekv.ops import attention, cpu, reference, select
from tests.ops.inputs import SHAPES, Shape, Ways, spoil

# Bytes of a thread's block: one row, a few rows, several heads at once, the shipped size.
BLOCKS = [1, 1500, 9000, cpu._BLOCK_BYTES["cpu"]]
WAYS: dict[str, Ways] = {"every other": {"every": 2}, "not causal": {"causal": False, "every": 3}}
BIASED = pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])


@pytest.fixture(params=BLOCKS)
def block_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setitem(cpu._BLOCK_BYTES, "cpu", request.param)
    return int(request.param)


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize("slack", [0, 13])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_equals_the_definition(shape: Shape, slack: int) -> None:
    query, key, value = shape.tensors(slack=slack)
    mixed, scores = cpu.attention_with_key_scores(query, key, value, scale=shape.scale)
    mixed_naive, scores_naive = reference.attention_with_key_scores(query, key, value, scale=shape.scale)
    torch.testing.assert_close(mixed, mixed_naive, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores, scores_naive, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize("ways", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@BIASED
@pytest.mark.parametrize("shape", SHAPES[3:6], ids=str)
def test_all_ways_equal_the_definition(shape: Shape, ragged: bool, ways: Ways, biased: bool) -> None:
    inputs = shape.tensors(slack=3)
    if biased:
        ways = {**ways, "bias": shape.bias()}
    if ragged:
        ways = {**ways, "lengths": shape.lengths()}
        inputs = spoil(inputs, ways["lengths"])
    mixed, scores = cpu.attention_with_key_scores(*inputs, scale=shape.scale, **ways)
    mixed_naive, scores_naive = reference.attention_with_key_scores(*inputs, scale=shape.scale, **ways)
    torch.testing.assert_close(mixed, mixed_naive, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores, scores_naive, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("threads", "bytes_", "block"),
    [
        (1, 1, (1, 1)),
        (1, 1500, (1, 4)),  # four rows of 77 keys fit; 18 rows make five pieces of at most four
        (1, 9000, (1, 18)),
        (1, 1 << 20, (8, 18)),
        (2, 1500, (2, 4)),  # a head for each thread
        (3, 1500, (3, 4)),
        (16, 1500, (8, 9)),  # more threads than heads
    ],
)
def test_blocks_fit(threads: int, bytes_: int, block: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    shape = SHAPES[5]  # 8 pairs of stream and head, 18 rows each, 77 keys
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setitem(cpu._BLOCK_BYTES, "cpu", bytes_)
    calls: list[tuple[int, ...]] = []
    softmax = torch.softmax

    def spy(logits: torch.Tensor, dim: int, out: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(logits.shape))
        return softmax(logits, dim, out=out)

    monkeypatch.setattr(torch, "softmax", spy)
    cpu.attention_with_key_scores(*shape.tensors(), scale=1.0)
    assert calls[0][:2] == block
    assert sum(math.prod(call) for call in calls) == 8 * 18 * 77
    most = max(threads * bytes_, 4 * shape.keys * block[0])  # never less than a row of each head
    assert all(4 * math.prod(call) <= most for call in calls)


def test_streams_that_have_used_up_as_many_slots_are_cut_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = SHAPES[6]
    widths: list[int] = []
    softmax = torch.softmax

    def spy(logits: torch.Tensor, dim: int, out: torch.Tensor) -> torch.Tensor:
        widths.append(logits.shape[-1])
        return softmax(logits, dim, out=out)

    monkeypatch.setattr(torch, "softmax", spy)
    lengths = torch.full((3,), 25, dtype=torch.int32)
    query, key, value = spoil(shape.tensors(), lengths)
    mixed, scores = cpu.attention_with_key_scores(query, key, value, scale=1.0, lengths=lengths)
    assert set(widths) == {25}
    expected = cpu.attention_with_key_scores(query, key[:, :, :25], value[:, :, :25], scale=1.0)
    assert torch.equal(mixed, expected[0])
    assert torch.equal(scores[..., :25], expected[1])
    assert (scores[..., 25:] == 0).all()


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape.keys > 20], ids=str)
def test_keeps_the_same_keys(shape: Shape) -> None:
    query, key, value = shape.tensors()
    _, scores = cpu.attention_with_key_scores(query, key, value, scale=shape.scale)
    _, scores_naive = reference.attention_with_key_scores(query, key, value, scale=shape.scale)
    for budget in (1, shape.keys // 2, shape.keys - 1):
        assert torch.equal(select.best(scores, budget), select.best(scores_naive, budget))


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16_stays_within_its_rounding(shape: Shape) -> None:
    query, key, value = shape.tensors(torch.bfloat16, slack=5)
    mixed, scores = cpu.attention_with_key_scores(query, key, value, scale=shape.scale)
    exact, scores_exact = reference.attention_with_key_scores(
        query.float(), key.float(), value.float(), scale=shape.scale
    )
    assert mixed.dtype == torch.bfloat16
    assert scores.dtype == torch.float32
    half_ulp = 2.0**-9
    keys = key.float().repeat_interleave(shape.group, 1)
    largest = float((query.float() @ keys.transpose(2, 3)).abs().max()) * shape.scale
    # A logit rounded to bfloat16 is off by half_ulp of its size, and so are those that a row is divided by.
    share = math.expm1(2 * half_ulp * largest) + 1e-5
    assert ((scores - scores_exact).abs() <= share * scores_exact).all()
    # On top, the probabilities and the mixed values are each rounded once.
    bound = (share + half_ulp) * float(value.float().abs().max()) + half_ulp * exact.abs()
    assert ((mixed.float() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_lose_nothing_in_large_logits(dtype: torch.dtype) -> None:
    """Qwen's key biases add the same large amount to all logits of a row; it must cancel before anything is rounded."""
    shape = Shape(1, 2, 7, 16, 300, 128)
    query, key, value = shape.tensors(torch.float32)
    query[..., 5] += 40
    key[..., 5] += 40
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    wide = query.float(), key.float(), value.float()
    exact, scores_exact = reference.attention_with_key_scores(*wide, scale=shape.scale)
    mixed, scores = cpu.attention_with_key_scores(query, key, value, scale=shape.scale)
    torch.testing.assert_close(scores, scores_exact, atol=1e-3, rtol=1e-3)
    stock = attention.attention(query, key, value, scale=shape.scale)
    worst = float((stock.float() - exact).abs().max())
    assert float((mixed.float() - exact).abs().max()) <= 4 * worst  # as good as torch's own kernel


def test_float16_products_may_pass_its_range() -> None:
    """Before scaling, q·k of Qwen2 models passes 65504."""
    shape = Shape(1, 1, 2, 4, 20, 128)
    query, key, value = (tensor.half() for tensor in shape.tensors())
    query[..., 5], key[..., 5] = 300, 300
    mixed, scores = cpu.attention_with_key_scores(query, key, value, scale=shape.scale)
    assert mixed.isfinite().all()
    _, scores_exact = reference.attention_with_key_scores(query, key, value, scale=shape.scale)
    torch.testing.assert_close(scores, scores_exact, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("queries", [1, 6])
def test_queries_may_be_transposed(streams: int, queries: int, group: int) -> None:
    shape = Shape(streams, 4, group, queries, 9, 8)
    query, key, value = shape.tensors()
    strided = query.transpose(1, 2).contiguous().transpose(1, 2)  # [S, T, H, D] in memory, as projections write it
    assert strided.stride() != query.stride() or queries == 1
    mixed, scores = cpu.attention_with_key_scores(strided, key, value, scale=1.0)
    expected, expected_scores = cpu.attention_with_key_scores(query, key, value, scale=1.0)
    torch.testing.assert_close(mixed, expected)
    torch.testing.assert_close(scores, expected_scores)


def test_inputs_are_left_alone() -> None:
    inputs = SHAPES[4].tensors()
    copies = [tensor.clone() for tensor in inputs]
    cpu.attention_with_key_scores(*inputs, scale=1.0)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, copies, strict=True))
