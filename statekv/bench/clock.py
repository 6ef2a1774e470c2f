"""Timing several ways to do one thing side by side, and the machine's own speed as the floor below them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

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


_WIDTH = 4096  # of a weight that no cache holds


@torch.inference_mode()
def large_product(device: torch.device, dtype: torch.dtype, rows: int = 256) -> Callable[[], object]:
    """What multiplies `rows` random activations with one large weight."""
    left = torch.randn(rows, _WIDTH, device=device, dtype=dtype)
    right = torch.randn(_WIDTH, _WIDTH, device=device, dtype=dtype)
    return lambda: left @ right


def best_rate(seconds: Iterable[float], rows: int = 256) -> float:
    """FLOP/s of `large_product` from its timed calls: of the best, for a floor is a floor."""
    return 2 * rows * _WIDTH**2 / min(seconds)


def matmul_rate(device: torch.device, dtype: torch.dtype, rows: int = 256, runs: int = 10) -> float:
    """FLOP/s of products of `rows` activations with a large weight, measured now."""
    product = large_product(device, dtype, rows)
    return best_rate(alternate({"product": product}, runs=runs, device=device)["product"], rows)
