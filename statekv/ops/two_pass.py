"""Attention with key scores for GPUs: the buffers and grids of the kernels in `flash`."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch

from statekv.ops.flash import merge, mix, score

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
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `naive`, tile by tile; see `statekv.ops` for shapes. float16 and bfloat16 are multiplied as they are."""
    streams, heads, queries, dim = query.shape
    kv_heads, capacity = key.shape[1:3]
    pairs, rows = streams * kv_heads, heads // kv_heads * queries
    head = 1 << max(4, dim.bit_length() - 1)  # the largest power of 2 in the head size; tiles are 16 wide at least
    constants = {
        "CAUSAL": causal,
        "RAGGED": lengths is not None,
        "GROUP": heads // kv_heads,
        "DIM": dim,
        "HEAD": head,
        "TAIL": 0 if dim <= head else max(16, _power_of_2(dim - head)),
        # The short way through tensor cores would cost float32 half of its digits.
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
    }
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
        *(query, key, value, out, logs, *sizes, parts, pairs, *strides, *value.stride()[:3], *out.stride()[:4]),
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
    return mixed, _scores(query, key, denominators, sizes, strides, constants, every)


def _scores(
    query: torch.Tensor,
    key: torch.Tensor,
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
        *(query, key, asked, scores, *sizes, parts, pairs, scored, first_query, every, *strides), **constants
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
