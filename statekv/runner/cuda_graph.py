"""Steps of a full carried cache, recorded once and replayed: one launch in place of hundreds."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch

from statekv.cache.batched import StaticCarriedCache
from statekv.cache.carried import CarriedCache
from statekv.errors import SpeedWarning
from statekv.models.adapter import Segment

Forward = Callable[[torch.Tensor, torch.Tensor, dict[str, Any], StaticCarriedCache], torch.Tensor]
Recorder = Callable[[Callable[[], torch.Tensor]], Callable[[], torch.Tensor]]


def record_cuda(call: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Record what `call` does on the current CUDA device, without doing it. What is returned does it, and hands out the
    tensor that `call` returned; the next replay overwrites it.
    """
    graph = torch.cuda.CUDAGraph()
    # Other threads may go on using the device meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = call()

    def replay() -> torch.Tensor:
        graph.replay()
        return result

    return replay


@dataclass
class _Step:
    """One stream's step of one shape: its inputs' places, and from its second time on the recording."""

    cache: StaticCarriedCache
    embeds: torch.Tensor
    positions: torch.Tensor
    extras: dict[str, Any]
    addresses: tuple[int, ...]
    call: Callable[[], torch.Tensor]
    times: int = 0

    def load(self, segment: Segment) -> None:
        """Bring a segment's tensors to the recorded places."""
        self.cache.begin()
        self.embeds.copy_(segment.embeds)
        self.positions.copy_(segment.positions)
        for name, kept in self.extras.items():
            if isinstance(kept, list):
                for place, tensor in zip(kept, segment.extras[name], strict=True):
                    place.copy_(tensor)


@dataclass
class StepGraphs:
    """Runs steps of full carried caches through recordings, made on devices of that type when a shape comes for the
    second time.

    The first time runs the same commands unrecorded, for libraries set themselves up then. A stream's recordings die
    with its carried cache.
    """

    record: Recorder = record_cuda
    device_type: str = "cuda"
    _streams: WeakKeyDictionary[CarriedCache, dict[Any, _Step]] = field(default_factory=WeakKeyDictionary)

    def fits(self, carried: CarriedCache, segment: Segment) -> bool:
        """Whether this step looks like all those that follow, and the device can record it."""
        return self.works_on(carried.spec.devices) and segment.kind == "step" and carried.full

    def works_on(self, devices: Sequence[torch.device]) -> bool:
        """Whether steps of a model that lies there can be recorded."""
        return len({*devices}) == 1 and devices[0].type == self.device_type

    def step(self, carried: CarriedCache, segment: Segment, forward: Forward) -> torch.Tensor:
        """One step of a full carried cache with room for it; both memories move on.

        Args:
            forward: the language model on (embeds, positions, extras) with a cache.

        Returns:
            [streams, T, hidden]; the next step overwrites it.
        """
        carried.detailed.make_room(segment.length)
        shapes = self._streams.setdefault(carried, {})
        shape = _shape(segment)
        # Slots may be a row of a block that several streams share: the same place, other strides.
        addresses = (*carried.addresses, *carried.detailed.addresses)
        step = shapes.get(shape)
        if step is None or step.addresses != addresses:
            step = shapes[shape] = _new_step(carried, segment, forward, addresses)
        step.load(segment)
        step.times += 1
        if step.times == 2:
            self._record(step)
        hidden = step.call()
        step.cache.end()
        return hidden

    def _record(self, step: _Step) -> None:
        try:
            step.call = self.record(step.call)
        except RuntimeError as error:
            why = str(error).partition("\n")[0]
            text = f"steps run without a CUDA graph, which could not be recorded ({why}); graph=False says so at once"
            warnings.warn(SpeedWarning(text), stacklevel=2)


def _new_step(carried: CarriedCache, segment: Segment, forward: Forward, addresses: tuple[int, ...]) -> _Step:
    # Empty tensors of the same kind: `load` fills them. What is no list of tensors is the same at every step.
    embeds, positions = torch.empty_like(segment.embeds), segment.positions.clone()
    extras = {name: _places(value) for name, value in segment.extras.items()}
    cache = StaticCarriedCache(carried, segment.length)
    return _Step(cache, embeds, positions, extras, addresses, lambda: forward(embeds, positions, extras, cache))


def _places(value: Any) -> Any:
    return [torch.empty_like(tensor) for tensor in value] if isinstance(value, list) else value


def _shape(segment: Segment) -> tuple[Any, ...]:
    lists = [(name, len(value)) for name, value in segment.extras.items() if isinstance(value, list)]
    return tuple(segment.embeds.shape), tuple(segment.positions.shape), tuple(lists)
