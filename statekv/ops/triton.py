"""The kernels of `two_pass`, in Triton: attention with key scores over tiles, never a matrix of probabilities.

The first pass is flash attention that also leaves the logarithm of each row's softmax denominator. The second takes the
products once more, the keys standing still and the queries passing by, and adds up exp(logit - denominator) per key.
The query heads of a group are rows of one matrix, so that they share every tile of keys and values: row r is query
r // GROUP of the group's head r % GROUP. A head of 80 is 64 + 16 columns, one of 96 is 64 + 32: HEAD and TAIL.

Lengths are plain arguments or are read on the device: none is compiled in, none is brought to the host.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

LARGEST_HEAD = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
OLDEST_GPU = (8, 0)  # tensor cores that take bfloat16
INTERPRETED = bool(triton.knobs.runtime.interpret)
_INTERPRETED = tl.constexpr(INTERPRETED)

# Rows, keys, warps, stages, by the largest head that they are meant for. The first call with a head size, group and
# dtype tries a line and keeps the fastest. The first of each line is where an H100 should start, by its shared memory
# and registers; NONE HAS BEEN TUNED ON AN H100 YET. The last one is small enough for anything.
_Tiles = dict[int, tuple[tuple[int, int, int, int], ...]]
_SMALL = (32, 32, 4, 1)
_MIX_TILES: _Tiles = {
    64: ((128, 128, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3), _SMALL),
    128: ((128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3), _SMALL),
    256: ((128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2), _SMALL),
}
_SCORE_TILES: _Tiles = {
    64: ((64, 128, 8, 3), (128, 128, 8, 3), (64, 64, 4, 3), _SMALL),
    128: ((64, 128, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3), _SMALL),
    256: ((64, 128, 8, 2), (64, 64, 4, 2), (32, 64, 4, 2), _SMALL),
}


def _tuned(tiles: _Tiles) -> Any:
    """Decorator that keeps the fastest tiles of the line for a head size; lengths do not start a new search."""

    def line(configs: list[triton.Config], arguments: dict[str, Any], **constants: Any) -> list[triton.Config]:
        fits = tiles[min(size for size in tiles if size >= constants["DIM"])]
        if arguments["query"].dtype == torch.float32:
            fits = (_SMALL,)  # ordinary arithmetic: large tiles spill, and take half a minute to compile
        return [c for c in configs if (c.kwargs["ROWS"], c.kwargs["KEYS"], c.num_warps, c.num_stages) in fits]

    every = dict.fromkeys(row for rows in tiles.values() for row in rows)
    configs = [triton.Config({"ROWS": r, "KEYS": k}, num_warps=w, num_stages=s) for r, k, w, s in every]
    if INTERPRETED:
        return triton.autotune([triton.Config({"ROWS": 32, "KEYS": 32})], key=[])
    return triton.autotune(configs, key=["GROUP", "DIM"], prune_configs_by={"early_config_prune": line})


@triton.jit
def _factor(values):
    """What tl.dot multiplies. The interpreter keeps bfloat16 as integers, and would multiply those."""
    if _INTERPRETED:
        values = values.to(tl.float32)
    return values


@triton.jit
def _get(rows, present, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, MASKED: tl.constexpr):
    """Columns from FIRST on of the rows [N] pointed to: [N, WIDTH], 0 in absent rows and behind DIM."""
    column = FIRST + tl.arange(0, WIDTH)
    pointers = rows[:, None] + column[None, :]
    if FIRST + WIDTH > DIM:
        found = tl.load(pointers, mask=present[:, None] & (column < DIM)[None, :], other=0.0)
    elif MASKED:
        found = tl.load(pointers, mask=present[:, None], other=0.0)
    else:
        found = tl.load(pointers)
    return _factor(found)


@triton.jit
def _put(rows, present, values, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """Store [N, WIDTH] as the columns from FIRST on of the rows pointed to."""
    column = FIRST + tl.arange(0, WIDTH)
    mask = present[:, None]
    if FIRST + WIDTH > DIM:
        mask = mask & (column < DIM)[None, :]
    tl.store(rows[:, None] + column[None, :], values.to(rows.dtype.element_ty), mask=mask)


@triton.jit
def _attend(
    q, q_tail, key, value, bias, key_step, value_step, low, high, last_seen, factor, peak, total, mixed, mixed_tail,
    DIM: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
    BIASED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax of the rows [ROWS] over keys low … high - 1; MASKED where not every row sees every key."""
    ahead = tl.arange(0, KEYS)
    for start in tl.range(low, high, KEYS):
        slot = start + ahead
        in_use = slot < high
        keys = key + tl.cast(start, tl.int64) * key_step + ahead * key_step
        values = value + tl.cast(start, tl.int64) * value_step + ahead * value_step
        logits = tl.dot(q, tl.trans(_get(keys, in_use, 0, HEAD, DIM, MASKED)), input_precision=PRECISION)
        if TAIL > 0:
            k_tail = _get(keys, in_use, HEAD, TAIL, DIM, MASKED)
            logits = tl.dot(q_tail, tl.trans(k_tail), logits, input_precision=PRECISION)
        if BIASED:
            logits += tl.load(bias + slot, mask=in_use, other=0.0)[None, :]
        if MASKED:
            logits = tl.where(slot[None, :] <= last_seen[:, None], logits, float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, 1) * factor)
        pivot = higher
        if MASKED or BIASED:
            pivot = tl.where(higher == float("-inf"), 0.0, higher)  # a row that sees nothing here
        weights = tl.exp2(logits * factor - pivot[:, None])
        shrink = tl.exp2(peak - pivot)
        total = total * shrink + tl.sum(weights, 1)
        weights = _factor(weights.to(value.dtype.element_ty))
        mixed = mixed * shrink[:, None]
        mixed = tl.dot(weights, _get(values, in_use, 0, HEAD, DIM, MASKED), mixed, input_precision=PRECISION)
        if TAIL > 0:
            v_tail = _get(values, in_use, HEAD, TAIL, DIM, MASKED)
            mixed_tail = tl.dot(weights, v_tail, mixed_tail * shrink[:, None], input_precision=PRECISION)
        peak = higher
    return peak, total, mixed, mixed_tail


@_tuned(_MIX_TILES)
@triton.jit(do_not_specialize=["queries", "capacity", "parts", "out_part"])
def mix(
    query, key, value, bias, out, denominators, lengths, factor, kv_heads, queries, capacity, parts, pairs,
    query_stream, query_head, query_step, key_stream, key_head, key_step, value_stream, value_head, value_step,
    out_part, out_stream, out_head, out_step,
    CAUSAL: tl.constexpr, RAGGED: tl.constexpr, BIASED: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    HEAD: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Pass 1, program (tile of rows, part of the keys, stream and KV head): mixed values and log2 denominators."""
    tile, part, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    stream, head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    used = tl.load(lengths + stream) if RAGGED else capacity
    row = tile * ROWS + tl.arange(0, ROWS)
    asked, present = row // GROUP, row < queries * GROUP
    # Keys of this part that some row of the tile sees, and where those begin that not every row sees.
    share = tl.cdiv(tl.cdiv(used, parts), KEYS) * KEYS
    first_seen_by_some = part * share
    seen_by_all, seen_by_some, last_seen = used, used, tl.zeros([ROWS], tl.int32) + (used - 1)
    if CAUSAL:
        last_seen = tl.minimum(used - queries + asked, used - 1)
        seen_by_all = used - queries + tile * ROWS // GROUP + 1
        seen_by_some = tl.minimum(used - queries + (tile * ROWS + ROWS - 1) // GROUP + 1, used)
    stop = tl.minimum(first_seen_by_some + share, seen_by_some)
    border = tl.maximum(tl.minimum(stop, seen_by_all) // KEYS * KEYS, first_seen_by_some)

    query_heads = head * GROUP + row % GROUP
    rows = query + stream * query_stream + query_heads * query_head + asked.to(tl.int64) * query_step
    key += stream * key_stream + head * key_head
    value += stream * value_stream + head * value_head
    if BIASED:
        bias += pair.to(tl.int64) * capacity
    q = _get(rows, present, 0, HEAD, DIM, True)
    q_tail, mixed_tail = q, tl.zeros([ROWS, 1], tl.float32)
    if TAIL > 0:
        q_tail, mixed_tail = _get(rows, present, HEAD, TAIL, DIM, True), tl.zeros([ROWS, TAIL], tl.float32)
    peak, total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, HEAD], tl.float32)
    peak, total, mixed, mixed_tail = _attend(
        q, q_tail, key, value, bias, key_step, value_step, first_seen_by_some, border, last_seen, factor,
        peak, total, mixed, mixed_tail, DIM, HEAD, TAIL, KEYS, False, BIASED, PRECISION,
    )  # fmt: skip
    peak, total, mixed, mixed_tail = _attend(
        q, q_tail, key, value, bias, key_step, value_step, border, stop, last_seen, factor,
        peak, total, mixed, mixed_tail, DIM, HEAD, TAIL, KEYS, True, BIASED, PRECISION,
    )  # fmt: skip

    place = (part.to(tl.int64) * pairs + pair) * queries * GROUP + row
    tl.store(denominators + place, peak + tl.log2(total), mask=present)  # -inf where nothing was seen
    share_of_one = 1.0 / tl.where(total == 0.0, 1.0, total)[:, None]
    rows = out + part * out_part + stream * out_stream + query_heads * out_head + asked.to(tl.int64) * out_step
    _put(rows, present, mixed * share_of_one, 0, HEAD, DIM)
    if TAIL > 0:
        _put(rows, present, mixed_tail * share_of_one, HEAD, TAIL, DIM)


@triton.jit(do_not_specialize=["queries", "parts", "part_size"])
def merge(
    partial, partial_denominators, out, denominators, queries, parts, pairs, kv_heads, part_size,
    part_stream, part_head, part_step, out_stream, out_head, out_step,
    GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Join the parts of pass 1: each weighs as much as its denominator."""
    tile, pair = tl.program_id(0), tl.program_id(1)
    stream, head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    row = tile * ROWS + tl.arange(0, ROWS)
    asked, present, query_heads = (row // GROUP).to(tl.int64), row < queries * GROUP, head * GROUP + row % GROUP
    place = pair.to(tl.int64) * queries * GROUP + row
    found = partial + stream * part_stream + query_heads * part_head + asked * part_step
    peak, total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, WIDTH], tl.float32)
    for part in tl.range(0, parts):
        one = tl.load(partial_denominators + tl.cast(part, tl.int64) * pairs * queries * GROUP + place, present, 0.0)
        higher = tl.maximum(peak, one)
        pivot = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet: a part may hold empty slots alone
        shrink, weight = tl.exp2(peak - pivot), tl.exp2(one - pivot)
        total = total * shrink + weight
        values = _get(found + tl.cast(part, tl.int64) * part_size, present, 0, WIDTH, DIM, True)
        mixed = mixed * shrink[:, None] + values * weight[:, None]
        peak = higher
    tl.store(denominators + place, peak + tl.log2(total), mask=present)
    rows = out + stream * out_stream + query_heads * out_head + asked * out_step
    _put(rows, present, mixed / total[:, None], 0, WIDTH, DIM)


@triton.jit
def _collect(
    k, k_tail, bias, query, denominators, query_head, query_step, slot, newest, factor, first_query, every, low, high,
    DIM: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, MASKED: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Probabilities of the keys [KEYS], summed over scored rows low … high - 1; query i sees up to slot newest + i."""
    scores = tl.zeros([KEYS], tl.float32)
    for start in tl.range(low, high, ROWS):
        row = start + tl.arange(0, ROWS)
        present = row < high
        asked = first_query + row // GROUP * every
        rows = query + (row % GROUP).to(tl.int64) * query_head + asked.to(tl.int64) * query_step
        logits = tl.dot(k, tl.trans(_get(rows, present, 0, HEAD, DIM, True)), input_precision=PRECISION)
        if TAIL > 0:
            q_tail = _get(rows, present, HEAD, TAIL, DIM, True)
            logits = tl.dot(k_tail, tl.trans(q_tail), logits, input_precision=PRECISION)
        if BIASED:
            logits += bias[:, None]
        # An absent row has an infinite denominator, so that its probabilities are 0.
        denominator = tl.load(denominators + row, mask=present, other=float("inf"))
        probabilities = tl.exp2(logits * factor - denominator[None, :])
        if MASKED:
            probabilities = tl.where(slot[:, None] <= (newest + asked)[None, :], probabilities, 0.0)
        scores += tl.sum(probabilities, 1)
    return scores


@_tuned(_SCORE_TILES)
@triton.jit(do_not_specialize=["queries", "capacity", "parts", "scored", "first_query", "every"])
def score(
    query, key, bias, denominators, scores, lengths, factor, kv_heads, queries, capacity, parts, pairs,
    scored, first_query, every, query_stream, query_head, query_step, key_stream, key_head, key_step,
    CAUSAL: tl.constexpr, RAGGED: tl.constexpr, BIASED: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    HEAD: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Pass 2, program (tile of keys, part of the scored rows, stream and KV head): sums of probabilities."""
    tile, part, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    stream, head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    used = tl.load(lengths + stream) if RAGGED else capacity
    first, newest = tile * KEYS, used - queries
    slot = first + tl.arange(0, KEYS)
    in_use = slot < used
    # Rows before `blind` see nothing of this tile.
    blind = tl.cdiv(tl.maximum(first - newest - first_query, 0), every) * GROUP if CAUSAL else 0
    seeing = tl.where(first < used, scored * GROUP - blind, 0)
    share = tl.cdiv(tl.cdiv(seeing, parts), ROWS) * ROWS
    low, high = blind + part * share, blind + tl.minimum((part + 1) * share, seeing)

    query += stream * query_stream + head * GROUP * query_head
    keys = key + stream * key_stream + head * key_head + slot.to(tl.int64) * key_step
    denominators += pair.to(tl.int64) * scored * GROUP
    k = _get(keys, in_use, 0, HEAD, DIM, True)
    added = tl.zeros([KEYS], tl.float32)
    if BIASED:
        added = tl.load(bias + pair.to(tl.int64) * capacity + slot, mask=in_use, other=0.0)
    k_tail = k
    if TAIL > 0:
        k_tail = _get(keys, in_use, HEAD, TAIL, DIM, True)
    if CAUSAL and first + KEYS > newest + 1:
        found = _collect(
            k, k_tail, added, query, denominators, query_head, query_step, slot, newest, factor, first_query, every,
            low, high, DIM, HEAD, TAIL, GROUP, ROWS, KEYS, True, BIASED, PRECISION,
        )  # fmt: skip
    else:
        found = _collect(
            k, k_tail, added, query, denominators, query_head, query_step, slot, newest, factor, first_query, every,
            low, high, DIM, HEAD, TAIL, GROUP, ROWS, KEYS, False, BIASED, PRECISION,
        )  # fmt: skip
    place = scores + (part.to(tl.int64) * pairs + pair) * capacity + slot
    tl.store(place, tl.where(in_use, found, 0.0), mask=slot < capacity)


_NOMINAL = 128  # rows or keys of a program, when counting programs
_MOST_PARTS = 16  # of one program's loop
_MERGED_ROWS = 32  # of a program that joins parts


def attention_with_key_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    lengths: torch.Tensor | None = None,
    causal: bool = True,
    every: int = 1,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `naive`, tile by tile; see `statekv.ops` for shapes. float16 and bfloat16 are multiplied as they are."""
    streams, heads, queries, dim = query.shape
    kv_heads, capacity = key.shape[1:3]
    pairs, rows = streams * kv_heads, heads // kv_heads * queries
    head = 1 << max(4, dim.bit_length() - 1)  # the largest power of 2 in the head size; tiles are 16 wide at least
    constants = {
        "CAUSAL": causal,
        "RAGGED": lengths is not None,
        "BIASED": bias is not None,
        "GROUP": heads // kv_heads,
        "DIM": dim,
        "HEAD": head,
        "TAIL": 0 if dim <= head else max(16, _power_of_2(dim - head)),
        # The short way through tensor cores would cost float32 half of its digits.
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
    }
    # In the units of the products, so that one factor serves both.
    bias = None if bias is None else (bias / scale).contiguous()
    sizes = (lengths, scale * math.log2(math.e), kv_heads, queries, capacity)
    parts = _parts(_ceil(rows, _NOMINAL) * pairs, _ceil(capacity, _NOMINAL), query.device)
    # In memory [S, Q, H, D], as the output projection reads it.
    mixed = query.new_empty(streams, queries, heads, dim).transpose(1, 2)
    denominators = query.new_empty(pairs, rows, dtype=torch.float32)
    out, logs = mixed[None], denominators
    if parts > 1:
        out = query.new_empty(parts, streams, queries, heads, dim, dtype=torch.float32).transpose(2, 3)
        logs = query.new_empty(parts, pairs, rows, dtype=torch.float32)
    strides = (*query.stride()[:3], *key.stride()[:3])

    def grid_of_rows(tile: Mapping[str, int]) -> tuple[int, int, int]:
        return _ceil(rows, tile["ROWS"]), parts, pairs

    mix[grid_of_rows](
        *(query, key, value, bias, out, logs, *sizes, parts, pairs, *strides, *value.stride()[:3], *out.stride()[:4]),
        **constants,
    )
    if parts > 1:
        merge[_ceil(rows, _MERGED_ROWS), pairs](
            *(out, logs, mixed, denominators, queries, parts, pairs, kv_heads, *out.stride()[:4], *mixed.stride()[:3]),
            GROUP=heads // kv_heads,
            DIM=dim,
            WIDTH=_power_of_2(dim),
            ROWS=_MERGED_ROWS,
        )
    return mixed, _scores(query, key, bias, denominators, sizes, strides, constants, every)


def _scores(
    query: torch.Tensor,
    key: torch.Tensor,
    bias: torch.Tensor | None,
    denominators: torch.Tensor,
    sizes: tuple[torch.Tensor | None, float, int, int, int],
    strides: tuple[int, ...],
    constants: Mapping[str, bool | int | str],
    every: int,
) -> torch.Tensor:
    """The second pass: [streams, kv_heads, K] float32."""
    (streams, _, queries, _), (_, kv_heads, capacity, _) = query.shape, key.shape
    pairs, first_query = streams * kv_heads, (queries - 1) % every
    asked = denominators.view(pairs, queries, -1)[:, first_query::every].contiguous()  # [S·KV, scored, group]
    scored, rows = asked.shape[1], asked[0].numel()
    parts = _parts(_ceil(capacity, _NOMINAL) * pairs, _ceil(rows, _NOMINAL), query.device)
    scores = query.new_empty(parts, streams, kv_heads, capacity, dtype=torch.float32)

    def grid_of_keys(tile: Mapping[str, int]) -> tuple[int, int, int]:
        return _ceil(capacity, tile["KEYS"]), parts, pairs

    score[grid_of_keys](
        *(query, key, bias, asked, scores, *sizes, parts, pairs, scored, first_query, every, *strides), **constants
    )
    return scores.sum(0) if parts > 1 else scores[0]


def _parts(programs: int, steps: int, device: torch.device) -> int:
    """Into how many parts to cut each program's loop of `steps` steps, so that few processors stand idle.

    A program is taken to cost one step besides its loop; so many of them run at once as there are processors.
    """
    processors = _processors(device)

    def cost(parts: int) -> int:
        return _ceil(programs * parts, processors) * (_ceil(steps, parts) + 1)

    return min(range(1, min(_MOST_PARTS, steps) + 1), key=cost)


@functools.cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; interpreted, one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _ceil(number: int, step: int) -> int:
    return -(-number // step)


def _power_of_2(number: int) -> int:
    """The smallest power of 2 that is not below a number."""
    return 1 << (number - 1).bit_length()
