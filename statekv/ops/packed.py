"""Products with weights that MKL has laid out beforehand, for one number of rows: the same numbers, sooner."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


def packable(weight: torch.Tensor) -> bool:
    """Whether this build of torch and the weight's place and dtype allow it."""
    here = weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.dim() == 2
    return here and torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear")


class PackedProducts(TorchFunctionMode):
    """While entered, `F.linear` with `rows` rows and one of the weights uses that weight's packed copy.

    Nothing is changed in the modules that own the weights, and other threads see nothing of it. Results differ from
    unpacked ones by rounding. On two cores with AVX-512, 256 rows took about a sixth less time (`docs/log/speed.md`).

    Args:
        weights: [out, in] each, `packable`; the copies take as many bytes again.
        rows: of the inputs, all leading dimensions together.
    """

    def __init__(self, weights: Iterable[torch.Tensor], rows: int) -> None:
        super().__init__()
        self.rows = rows
        self._sources = list(weights)
        self._packed = {id(weight): _pack(weight, rows) for weight in self._sources}
        self._versions = _versions(self._sources)

    @property
    def stale(self) -> bool:
        """Whether a weight was written to or moved since it was packed."""
        return _versions(self._sources) != self._versions

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.linear and not kwargs:
            source, weight, *bias = args
            packed = self._packed.get(id(weight))
            if packed is not None and source.numel() == self.rows * source.shape[-1]:
                return torch.ops.mkl._mkl_linear(source, packed, weight, bias[0] if bias else None, self.rows)
        return func(*args, **(kwargs or {}))


def _pack(weight: torch.Tensor, rows: int) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkl._mkl_reorder_linear_weight(weight.detach(), rows)
    return packed


def _versions(weights: Iterable[torch.Tensor]) -> list[tuple[int, int]]:
    # Tensors made in inference mode count no versions.
    return [(weight.data_ptr(), -1 if weight.is_inference() else weight._version) for weight in weights]
