"""Timing several ways to do one thing side by side, and the machine's own speed as the floor below them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch


def alternate(
    candidates: Mapping[str, Callable[[], object]], *, runs: int, device: torch.device, warm: int = 2
) -> dict[str, list[float]]:
    """Time candidates in turn, so that a slow moment of the machine falls on all of them alike.

    Args:
        candidates: what to call, by name; results are thrown away.
        runs: timed calls of each.
        device: waited for before and after each call.
        warm: calls of each before the first timed one.

    Returns:
        Seconds of each timed call, by name, in order.
    """
    for call in candidates.values():
        for _ in range(warm):
            call()
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(runs):
        for name, call in candidates.items():
            wait(device)
            began = time.perf_counter()
            call()
            wait(device)
            found[name].append(time.perf_counter() - began)
    return found


def wait(device: torch.device) -> None:
    """Until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def matmul_rate(device: torch.device, dtype: torch.dtype, rows: int = 256, runs: int = 10) -> float:
    """FLOP/s of a product of `rows` activations with a large weight: the best of `runs`, for a floor is a floor."""
    left = torch.randn(rows, 4096, device=device, dtype=dtype)
    right = torch.randn(4096, 4096, device=device, dtype=dtype)
    seconds = alternate({"matmul": lambda: left @ right}, runs=runs, device=device)["matmul"]
    return 2 * rows * 4096 * 4096 / min(seconds)
