"""A vision tower that need not look at a picture twice: tests show the same few to many streams."""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import torch


def remember(tower: torch.nn.Module) -> None:
    """Let a tower in eval mode return copies of what it made of the very same pixels; its hooks go on being called."""
    look, seen = tower.forward, dict[bytes, Any]()

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return look(*args, **kwargs)
        key = _digest(args, sorted(kwargs.items()))
        if key not in seen:
            seen[key] = look(*args, **kwargs)
        return copy.deepcopy(seen[key])

    tower.forward = forward


def _digest(*call: Any) -> bytes:
    """Of everything that a result can depend on beside weights, to the bit."""
    found = hashlib.sha256()
    for value in _flat(call):
        if isinstance(value, torch.Tensor):
            found.update(f"{value.dtype} {value.device} {tuple(value.shape)} {value.stride()}".encode())
            found.update(value.contiguous().cpu().view(torch.uint8).numpy().tobytes())
        else:
            found.update(repr(value).encode())
    return found.digest()


def _flat(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return [leaf for each in value for leaf in _flat(each)]
    return [value]
