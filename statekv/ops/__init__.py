"""Tensors in, tensors out: attention with key scores, selection of keys, rotary frequencies."""

from __future__ import annotations

from typing import Protocol

import torch

from statekv.ops import blocked, naive
from statekv.ops.choice import IMPLEMENTATIONS, implementation

__all__ = ["IMPLEMENTATIONS", "attention_with_key_scores", "implementation"]


def attention_with_key_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    lengths: torch.Tensor | None = None,
    causal: bool = True,
    every: int = 1,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prefix-causal attention that also says how much attention every key received (StateKV, section 3).

    The queries are the last Q of the keys in use: all of them see the keys before, and each sees the own keys up to
    itself. `score[j] = Σ over queries and the group's heads of softmax_j(scale · <q, k_j>)`.

    Args:
        query: [streams, heads, Q, D].
        key, value: [streams, kv_heads, K, D]; heads is a multiple of kv_heads, K ≥ Q. They may be views into larger
            buffers; only the last dimension must be dense.
        scale: factor on the products, above 0; usually D ** -0.5.
        lengths: [streams] int32 on the tensors' device: how many slots hold keys, own keys included and last among
            them. The slots behind are never attended, whatever they hold, and score 0. None: all K.
        causal: False lets every query see all keys in use.
        every: score with the queries Q - 1, Q - 1 - every, … only, unscaled. The mixed values stay exact; the scores
            sum to fewer queries. 1 is the definition.
        impl: auto, or one of IMPLEMENTATIONS by name; see `implementation`.

    Returns:
        The mixed values [streams, heads, Q, D] in the query's dtype, and the key scores [streams, kv_heads, K] in
        float32, which sum to Q · heads / kv_heads.

    Raises:
        ConfigError: an unknown implementation, or one that cannot run on such tensors.
    """
    name = implementation(impl, query.device, query.dtype, query.shape[-1])
    return _named(name)(query, key, value, scale=scale, lengths=lengths, causal=causal, every=every)


class _Implementation(Protocol):
    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float,
        lengths: torch.Tensor | None,
        causal: bool,
        every: int,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


def _named(name: str) -> _Implementation:
    if name == "triton":
        from statekv.ops import two_pass

        return two_pass.attention_with_key_scores
    return naive.attention_with_key_scores if name == "naive" else blocked.attention_with_key_scores
