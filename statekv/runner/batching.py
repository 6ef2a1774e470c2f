"""Steps of several streams run as one, and which of them can."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch

from statekv.cache.batched import BatchedCarriedCache
from statekv.cache.carried import CarriedCache
from statekv.cache.stream import StreamState
from statekv.config import SETTINGS
from statekv.models.adapter import Segment, VideoModel

_OF_A_STEP = [name for name, setting in SETTINGS.items() if not setting.scope.of_one_stream]


def stream_key(model: VideoModel, state: StreamState) -> Hashable:
    """What streams must share to step together, where their steps are alike; None: this one steps alone, as with its
    first step, which brings a prefix along.
    """
    carried = state.bounded
    if not state.frames or carried is None:
        return None
    config = tuple(getattr(state.config, name) for name in _OF_A_STEP)
    horizon = state.horizon if model.rope.kind == "dynamic" else None  # else frequencies do not depend on it
    return config, horizon, state.pinned, state.config.memory is not None, tuple(carried.lengths)


def batch_key(model: VideoModel, state: StreamState, segments: Sequence[Segment]) -> Hashable:
    """What steps must share to be run as one; None: this one goes alone."""
    kin = stream_key(model, state)
    if kin is None or len(segments) != 1:
        return None
    extras = segments[0].extras.items()
    shapes = tuple((name, len(value) if isinstance(value, list) else value) for name, value in extras)
    return kin, segments[0].length, shapes


def joined(segments: Sequence[Segment]) -> Segment:
    """One segment [streams, T] out of steps of one `batch_key`; place and time are the first one's."""
    first = segments[0]
    extras = {
        name: [torch.cat(layer) for layer in zip(*(segment.extras[name] for segment in segments), strict=True)]
        if isinstance(value, list)
        else value
        for name, value in first.extras.items()
    }
    return replace(
        first,
        ids=torch.cat([segment.ids for segment in segments]),
        embeds=torch.cat([segment.embeds for segment in segments]),
        positions=torch.cat([segment.positions for segment in segments], dim=-2),
        extras=extras,
    )


class StepBatches:
    """The blocks in which carried caches lie that were last stepped together."""

    def __init__(self) -> None:
        self._blocks: WeakKeyDictionary[CarriedCache, BatchedCarriedCache] = WeakKeyDictionary()

    def block(self, states: Sequence[StreamState]) -> BatchedCarriedCache:
        """The carried caches of some streams of equal `batch_key` in one block; where they lie in one already, in that
        order, nothing is copied.

        Raises:
            MemoryError, RuntimeError: there is no memory for the block; every stream is as it was.
        """
        members = [state.bounded for state in states if state.bounded is not None]
        found = self._blocks.get(members[0])
        if found is None or not found.holds(members):
            found = BatchedCarriedCache(members)
            for former in {id(block): block for block in map(self._blocks.get, members) if block is not None}.values():
                self._disband(former)
            for member in members:
                self._blocks[member] = found
        return found

    def leave(self, state: StreamState) -> None:
        """Before a stream ends: let nobody keep its share of a block."""
        carried = state.bounded
        if carried is not None and (block := self._blocks.get(carried)) is not None:
            self._disband(block)

    def _disband(self, block: BatchedCarriedCache) -> None:
        for member in block.members:
            if self._blocks.get(member) is block:
                del self._blocks[member]
        block.disband()
