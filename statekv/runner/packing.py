"""Steps on a CPU run on packed weights, from the moment that packing them has paid."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from threading import Lock

import torch

from statekv.cache.stream import StreamState
from statekv.ops.packed import PackedProducts, packable
from statekv.runner.memory import free_bytes

_PAYS_AFTER = 12  # steps: packing takes as long as it saves in about so many
_WORTH_PACKING = 1 << 25  # multiplications of one product; below, the call itself takes most of the time
_SHARE = 0.25  # of the free memory that the copies may take


class StepProducts:
    """Packed copies of a language model's weights for steps of one length, the newest that came up.

    A step is run on them when the steps before it in its own stream were as long: so what a stream computes does not
    depend, to the bit, on what other streams did before.

    Args:
        layers: whose linear layers are packed.
        after: equal steps that a stream takes before.
        worth: multiplications of a product that is worth packing.
    """

    def __init__(self, layers: torch.nn.Module, after: int = _PAYS_AFTER, worth: int = _WORTH_PACKING) -> None:
        self.weights = [
            module.weight
            for module in layers.modules()
            if isinstance(module, torch.nn.Linear) and packable(module.weight)
        ]
        self.after = after
        self.worth = worth
        self._lock = Lock()
        self._held: PackedProducts | None = None

    def around(self, state: StreamState) -> AbstractContextManager[object]:
        """What to enter while a step runs: products packed for steps as long as the stream's last ones, or nothing."""
        before = state.spans[-self.after :]
        lengths = {span.length if span.kind == "step" else None for span in before}
        if not self.weights or len(before) < self.after or len(lengths) > 1 or None in lengths:
            return nullcontext()
        return self._packed(before[-1].length) or nullcontext()

    def _packed(self, rows: int) -> PackedProducts | None:
        with self._lock:
            if self._held is not None and (self._held.rows != rows or self._held.stale):
                self._held = None
            if self._held is None:
                worthy = [weight for weight in self.weights if rows * weight.numel() >= self.worth]
                needed = sum(weight.nbytes for weight in worthy)
                if worthy and needed <= _SHARE * free_bytes(worthy[0].device):
                    self._held = PackedProducts(worthy, rows)
            return self._held
