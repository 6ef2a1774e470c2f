"""Keys that say which token they are, so that a cache can be asked what it holds."""

from __future__ import annotations

from typing import Any

import torch

from statekv.cache.carry import policy_of
from statekv.cache.policies import Policy
from statekv.cache.spec import KVSpec
from statekv.config import Config

CPU = torch.device("cpu")


def kv_spec(layers: int = 3, kv_heads: int = 2, streams: int = 1, dtype: torch.dtype = torch.float32) -> KVSpec:
    return KVSpec(kv_heads, head_dim=4, dtype=dtype, devices=(CPU,) * layers, streams=streams)


def keys(g: KVSpec, layer: int, tokens: range) -> torch.Tensor:
    """[streams, kv_heads, T, 4]: token, layer, stream and head."""
    made = torch.empty(g.streams, g.kv_heads, len(tokens), 4, dtype=g.dtype)
    made[..., 0] = torch.tensor(list(tokens), dtype=g.dtype)
    made[..., 1] = layer
    made[..., 2] = torch.arange(g.streams).view(-1, 1, 1)
    made[..., 3] = torch.arange(g.kv_heads).view(1, -1, 1)
    return made


def values(g: KVSpec, layer: int, tokens: range) -> torch.Tensor:
    """What belongs to `keys`."""
    return -keys(g, layer, tokens) - 1


def check_whole(g: KVSpec, layer: int, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """[streams, kv_heads, T] token numbers of keys and values that a layer holds, which must belong together."""
    token = key[..., 0]
    for s in range(g.streams):
        for h in range(g.kv_heads):
            assert (key[s, h, :, 1:] == torch.tensor([layer, s, h])).all()
    assert torch.equal(value, -key - 1)
    return token.int()


def policy(carry: Any = "attention", pinned: int = 0, **dials: Any) -> Policy:
    """A policy with what the dials put around it; without sinks, unless it is asked for some."""
    return policy_of(Config(carry=carry, **{"sinks": 0, **dials}), pinned)
