"""A stream standing where thousands of steps would have brought it, without taking them: full of random keys."""

from __future__ import annotations

import torch

from statekv.cache.carried import CarriedCache
from statekv.cache.detailed import DetailedCache
from statekv.cache.span import Span
from statekv.cache.stream import StreamState

_NEWEST = 16  # steps that whoever looks at the steps before will ask for at most
_PIECE = 1024  # tokens drawn; the rest repeats them, for what a step costs does not depend on its keys


@torch.inference_mode()
def fill(state: StreamState, tokens: int, step: int) -> None:
    """Give an empty stream the memories that `tokens` tokens would have left, and room for another step.

    Args:
        state: it is left standing behind those tokens, at position `tokens`.
        tokens: how many the detailed cache is to hold.
        step: tokens of one step.
    """
    fill_detailed(state.detailed, tokens, step)
    if isinstance(state.carried, CarriedCache):
        fill_carried(state.carried, step)
    stand(state, tokens, tokens, step)


@torch.inference_mode()
def fill_detailed(detailed: DetailedCache, tokens: int, step: int) -> None:
    """Random keys and values for `tokens` tokens, written straight into the buffers, with room for another step."""
    detailed.reserve(tokens + step)
    for buffer in detailed.buffers:  # [2, streams, kv_heads, capacity, head_dim]
        drawn = torch.randn_like(buffer[..., : min(tokens, _PIECE), :])
        for start in range(0, tokens, _PIECE):
            stop = min(start + _PIECE, tokens)
            buffer[..., start:stop, :] = drawn[..., : stop - start, :]
    _hold(detailed, tokens)


@torch.inference_mode()
def fill_carried(carried: CarriedCache, step: int) -> None:
    """Carry as many of the detailed cache's tokens as the budget allows, spread evenly, with room for another step."""
    tokens = carried.detailed.length
    length = min(tokens, carried.budget)
    carried.crop(0)
    carried.make_room(length + step)
    if length:
        for layer, device in enumerate(carried.geometry.devices):
            chosen = torch.arange(length, device=device) * tokens // length  # [length], ascending
            carried.buffers[layer][..., :length, :] = carried.detailed.buffers[layer][..., chosen, :]
            carried.born[layer][..., :length] = chosen
    carried.lengths = [length] * carried.geometry.layers


def stand(state: StreamState, tokens: int, position: int, step: int) -> None:
    """Move a filled stream to another moment by its lengths alone; nothing is written.

    The carried cache then holds as many keys as it would have at that moment, though not the same ones.

    Args:
        state: counts of what it saw are cleared, and all spans but those of the newest steps.
        tokens: at most as many as were filled in.
        position: of the next token.
        step: tokens of one step.
    """
    assert tokens <= state.detailed.capacity
    _hold(state.detailed, tokens)
    carried = state.carried
    if isinstance(carried, CarriedCache):
        carried.lengths = [min(tokens, carried.budget)] * state.geometry.layers
    state.position, state.frames, state.origin_seconds = position, 0, None
    newest = range(max(0, tokens - _NEWEST * step), tokens - step + 1, step)
    state.spans[:] = [Span("step", start, step, None, start) for start in newest]


def _hold(detailed: DetailedCache, tokens: int) -> None:
    detailed.crop(0)
    detailed.advance(tokens)
