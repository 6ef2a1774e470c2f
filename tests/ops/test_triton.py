"""The kernels give what the definition gives: interpreted without a GPU, compiled with one."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from statekv.ops import attention, reference, select, triton
from tests.ops.inputs import SHAPES, Shape, Ways, spoil

pytest.importorskip("triton", reason="triton is not installed: no kernels to test")


# Interpreted, infinities are NumPy's, which warns of what the kernels mean to do with them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

# Head sizes that are split in two, filled up, and the largest; more rows than a tile.
HEADS = [Shape(1, 2, 3, 20, 70, 96), Shape(1, 1, 2, 5, 40, 256), Shape(2, 1, 2, 5, 20, 72), Shape(1, 1, 1, 3, 9, 8)]
SEVERAL_TILES = [Shape(2, 2, 2, 9, 77, 80), HEADS[0], Shape(2, 1, 2, 40, 40, 64)]
WIDE_GROUP = Shape(1, 1, 7, 6, 100, 128)
WAYS: dict[str, Ways] = {
    "plain": {},
    "not causal": {"causal": False},
    "every other": {"every": 2},
    "every fifth, not causal": {"every": 5, "causal": False},
}

# All ways, with and without ragged lengths, on the smallest shape; on the others as much as each has of its own.
CASES = [
    *((SEVERAL_TILES[2], way, ragged) for way in WAYS for ragged in (False, True)),
    *((SEVERAL_TILES[1], way, bool(number % 2)) for number, way in enumerate(WAYS)),
    *((SEVERAL_TILES[0], way, way != "plain") for way in ("plain", "every fifth, not causal")),
]
WEIGHTED = [
    *((HEADS[0], way, ragged) for way in WAYS for ragged in (False, True)),
    *((WIDE_GROUP, way, way != "every other") for way in WAYS if way != "not causal"),
]


@pytest.fixture
def many_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops are cut into parts, as on a GPU that would otherwise stand idle."""
    monkeypatch.setattr(triton, "_NOMINAL", 16)
    monkeypatch.setattr(triton, "_processors", lambda _: 64)


def check(shape: Shape, device: torch.device, ragged: bool, ways: Ways, biased: bool = False) -> None:
    inputs = shape.tensors(slack=6, device=device)
    if biased:
        ways = {**ways, "bias": shape.bias(device)}
    if ragged:
        ways = {**ways, "lengths": shape.lengths(device)}
        inputs = spoil(inputs, ways["lengths"])
    mixed, scores = triton.attention_with_key_scores(*inputs, scale=shape.scale, **ways)
    mixed_naive, scores_naive = reference.attention_with_key_scores(*inputs, scale=shape.scale, **ways)
    torch.testing.assert_close(mixed, mixed_naive, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores, scores_naive, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "ragged"),
    # So many tiles take as long as all others together, and are tried with a last slot that is not in use.
    [(shape, ragged) for shape in (*SHAPES, *HEADS) for ragged in (False, True) if ragged or shape.keys < 300],
    ids=str,
)
def test_float32_equals_the_definition(shape: Shape, ragged: bool, device: torch.device) -> None:
    check(shape, device, ragged, {})


@pytest.mark.usefixtures("many_processors")
@pytest.mark.parametrize(("shape", "way", "ragged"), CASES, ids=str)
def test_in_parts_and_all_ways(shape: Shape, way: str, ragged: bool, device: torch.device) -> None:
    check(shape, device, ragged, WAYS[way])


@pytest.mark.usefixtures("many_processors")
@pytest.mark.parametrize(("shape", "way", "ragged"), WEIGHTED, ids=str)
def test_log_weights_and_empty_slots(shape: Shape, way: str, ragged: bool, device: torch.device) -> None:
    check(shape, device, ragged, WAYS[way], biased=True)


def test_a_part_may_hold_empty_slots_alone(device: torch.device, many_processors: None) -> None:
    shape = Shape(1, 2, 2, 3, 90, 16)
    bias = torch.zeros(1, 2, 90, device=device)
    bias[..., :70] = float("-inf")
    inputs = shape.tensors(device=device)
    mixed, scores = triton.attention_with_key_scores(*inputs, scale=shape.scale, bias=bias)
    expected, scores_naive = reference.attention_with_key_scores(*inputs, scale=shape.scale, bias=bias)
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores, scores_naive, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ways", WAYS.values(), ids=WAYS)
def test_in_one_piece_and_all_ways(ways: Ways, device: torch.device) -> None:
    check(SEVERAL_TILES[0], device, True, ways)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *((SEVERAL_TILES[2], dtype) for dtype in (torch.bfloat16, torch.float16)),
        (SEVERAL_TILES[0], torch.bfloat16),
        (SEVERAL_TILES[1], torch.float16),
    ],
    ids=str,
)
def test_half_precision_stays_within_its_rounding(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    query, key, value = shape.tensors(dtype, device=device)
    mixed, scores = triton.attention_with_key_scores(query, key, value, scale=shape.scale)
    wide = query.float(), key.float(), value.float()
    exact, scores_exact = reference.attention_with_key_scores(*wide, scale=shape.scale)
    assert mixed.dtype == dtype
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, scores_exact, atol=1e-4, rtol=1e-4)
    half_ulp = torch.finfo(dtype).eps / 2
    # The probabilities and the mixed values are each rounded once.
    bound = half_ulp * float(value.float().abs().max()) + half_ulp * exact.abs() + 1e-4
    assert ((mixed.float() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_lose_nothing_in_large_logits(dtype: torch.dtype, device: torch.device) -> None:
    """Qwen's key biases add the same large amount to all logits of a row; it must cancel before anything is rounded."""
    shape = Shape(1, 1, 7, 6, 90, 128)
    query, key, value = shape.tensors()
    query[..., 5] += 40
    key[..., 5] += 40
    query, key, value = (tensor.to(device, dtype) for tensor in (query, key, value))
    wide = query.float(), key.float(), value.float()
    exact, scores_exact = reference.attention_with_key_scores(*wide, scale=shape.scale)
    mixed, scores = triton.attention_with_key_scores(query, key, value, scale=shape.scale)
    torch.testing.assert_close(scores, scores_exact, atol=1e-3, rtol=1e-3)
    stock = attention.attention(query, key, value, scale=shape.scale)
    worst = float((stock.float() - exact).abs().max())
    assert float((mixed.float() - exact).abs().max()) <= 4 * worst  # as good as torch's own kernel


def test_float16_products_may_pass_its_range(device: torch.device) -> None:
    """Before scaling, q·k of Qwen2 models passes 65504."""
    shape = Shape(1, 1, 2, 4, 20, 128)
    query, key, value = shape.tensors(torch.float16, device=device)
    query[..., 5], key[..., 5] = 300, 300
    mixed, scores = triton.attention_with_key_scores(query, key, value, scale=shape.scale)
    assert mixed.isfinite().all()
    _, scores_exact = reference.attention_with_key_scores(query, key, value, scale=shape.scale)
    torch.testing.assert_close(scores, scores_exact, atol=1e-2, rtol=1e-2)


def test_keeps_the_same_keys(device: torch.device) -> None:
    shape = WIDE_GROUP
    inputs = shape.tensors(device=device)
    _, scores = triton.attention_with_key_scores(*inputs, scale=shape.scale)
    _, scores_naive = reference.attention_with_key_scores(*inputs, scale=shape.scale)
    for budget in (1, shape.keys // 2, shape.keys - 1):
        assert torch.equal(select.best(scores, budget), select.best(scores_naive, budget))


def test_any_strides_will_do(device: torch.device) -> None:
    """Queries as projections write them, keys and values as anyone may hold them; nothing is copied or touched."""
    shape = Shape(2, 2, 2, 9, 40, 64)
    inputs = shape.tensors(device=device)
    strided = tuple(tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in inputs)
    copies = [tensor.clone() for tensor in strided]
    expected = triton.attention_with_key_scores(*inputs, scale=1.0)
    found = triton.attention_with_key_scores(*strided, scale=1.0)
    assert all(map(torch.equal, found, expected))
    assert all(map(torch.equal, strided, copies))


def test_the_result_lies_as_the_output_projection_reads_it(device: torch.device) -> None:
    mixed, _ = triton.attention_with_key_scores(*SHAPES[6].tensors(device=device), scale=1.0)
    assert mixed.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    ("programs", "steps", "parts"),
    [
        (28, 10, 4),  # InternVL3-1B at a budget of 1024: 112 of 132 processors, three steps each
        (56, 34, 2),  # InternVL3-8B at a budget of 4096
        (132, 100, 1),
        (28, 3, 3),  # never more parts than steps
        (1, 100, 15),  # 16 would not be shorter: seven steps either way
        (1, 1, 1),
        (10_000, 100, 1),
    ],
)
def test_parts_keep_processors_busy(programs: int, steps: int, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "_processors", lambda _: 132)
    assert triton._parts(programs, steps, torch.device("cpu")) == parts


def test_other_lengths_compile_nothing_new(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("an interpreter compiles nothing")
    import triton

    compiled: list[str] = []
    shape = Shape(1, 2, 7, 33, 300, 64)
    triton.attention_with_key_scores(*shape.tensors(torch.bfloat16, slack=5, device=device), scale=1.0)
    triton.attention_with_key_scores(
        *shape.tensors(torch.bfloat16, slack=5, device=device), scale=1.0, lengths=shape.lengths(device)
    )
    triton.knobs.runtime.jit_cache_hook = lambda *, repr, **_: compiled.append(repr)
    try:
        for queries, keys in ((1, 1), (16, 256), (17, 1025), (256, 4096)):
            other = dataclasses.replace(shape, queries=queries, keys=keys)
            inputs = other.tensors(torch.bfloat16, slack=5, device=device)
            triton.attention_with_key_scores(*inputs, scale=1.0, every=3)
            triton.attention_with_key_scores(*inputs, scale=1.0, lengths=other.lengths(device))
    finally:
        triton.knobs.runtime.jit_cache_hook = None
    assert not compiled
