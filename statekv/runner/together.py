"""One step of several streams, run through the model as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from statekv.cache.stream import StreamState
from statekv.errors import MemoryLimitError
from statekv.models.attention import take_attention
from statekv.models.base import Seen, Segment, VideoModel
from statekv.runner.batches import joined
from statekv.runner.memory import memory_limit
from statekv.runner.stepper import Stepper
from statekv.video.frame import Frame


@torch.inference_mode()
def look_together(model: VideoModel, steps: Sequence[Sequence[Frame]], frames_expected: int | None) -> list[Seen]:
    """What the vision tower makes of one step of each of several streams; see `VideoModel.look`."""
    with model.turns, memory_limit():
        return model.look(steps, frames_expected)


@torch.inference_mode()
def gather(stepper: Stepper, states: Sequence[StreamState]) -> bool:
    """Bring the carried caches of some streams into one block; False where there is no memory for that.

    Args:
        stepper: of all of them.
        states: whose steps are of one likeness. In the order of the last time nothing is copied.
    """
    try:
        with stepper.model.turns, memory_limit():
            stepper.batches.block(states)
    except MemoryLimitError:
        return False
    return True


@torch.inference_mode()
def prefill_together(stepper: Stepper, states: Sequence[StreamState], segments: Sequence[Segment]) -> torch.Tensor:
    """As `Stepper.prefill` for each stream, but for the rounding of larger products.

    Products, attention, key scores and eviction run once for all of them; what is entered into the detailed caches is
    entered one by one. CUDA graphs and packed weights are for streams alone.

    Args:
        stepper: of all of them.
        states: gathered.
        segments: a step of each, of one likeness.

    Returns:
        [streams, T, hidden], the last layer's normalised hidden states.

    Raises:
        HorizonError, ConfigError: as `Stepper.check`; nothing has entered.
        MemoryLimitError: the device is out of memory; no stream can be stepped any further.
    """
    with stepper.model.turns:
        for state, segment in zip(states, segments, strict=True):
            stepper.check(state, segment)
        take_attention(stepper.model.model)
        whole, config = joined(segments), states[0].config
        with stepper.model.rope.held(states[0].horizon), memory_limit():
            block = stepper.batches.block(states)
            block.begin()
            try:
                block.make_room(whole.length)
                evicting = block.judges(whole.length)
                hidden = stepper.forward(
                    whole.embeds, whole.positions, whole.extras, block, evicting=evicting, config=config
                )
            finally:
                block.end()
        for state, segment in zip(states, segments, strict=True):
            stepper.took(state, segment)
    return hidden
