"""Tensors in, tensors out: attention with key scores, selection of keys, rotary frequencies."""

from __future__ import annotations

import torch

from statekv.errors import ConfigError
from statekv.ops import blocked, naive

IMPLEMENTATIONS = {"naive": naive.attention_with_key_scores, "blocked": blocked.attention_with_key_scores}


def attention_with_key_scores(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float, impl: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prefix-causal attention that also says how much attention every key received (StateKV, section 3).

    The queries are the last Q of the K positions: all of them see the first K - Q keys, and each sees the own keys
    up to itself. `score[j] = Σ over queries and the group's heads of softmax_j(scale · <q, k_j>)`.

    Args:
        query: [streams, heads, Q, D].
        key, value: [streams, kv_heads, K, D]; heads is a multiple of kv_heads, K ≥ Q.
        scale: factor on the products, usually D ** -0.5.
        impl: auto, or one of IMPLEMENTATIONS by name.

    Returns:
        The mixed values [streams, heads, Q, D] in the query's dtype, and the key scores [streams, kv_heads, K] in
        float32, which sum to Q · heads / kv_heads.

    Raises:
        ConfigError: an unknown implementation.
    """
    name = implementation(impl)
    return IMPLEMENTATIONS[name](query, key, value, scale=scale)


def implementation(impl: str = "auto") -> str:
    """Name of the implementation that `impl` stands for."""
    if impl == "auto":
        return "blocked"
    if impl not in IMPLEMENTATIONS:
        raise ConfigError(f"unknown kernel {impl!r}", f"known: auto, {', '.join(IMPLEMENTATIONS)}")
    return impl
