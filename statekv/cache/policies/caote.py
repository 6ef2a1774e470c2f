"""How far the layer's output would move without a key: attention and value together."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from statekv.cache.policies.base import Candidates, Policy


@dataclass(frozen=True)
class Caote(Policy):
    """The error that dropping one key makes in the mixed values: a / (1 - a) · |v - o|, o being what is mixed.

    CAOTE (arXiv 2504.14051) takes one query's probabilities. Here a is a key's share of the attention of all the
    step's queries and of its group's heads, as key scores give it, and o is what these shares mix: one number for each
    key and KV head, for which no matrix of probabilities is needed.
    """

    needs_attention = True

    def score(self, candidates: Candidates) -> torch.Tensor:
        share = candidates.attended / candidates.attended.sum(-1, keepdim=True)
        return output_error(share, share, candidates)


def output_error(share: torch.Tensor, mix: torch.Tensor, candidates: Candidates) -> torch.Tensor:
    """a / (1 - a) · |v - o| of each key.

    Args:
        share: a of each key, [streams, kv_heads, K].
        mix: shares that add up to 1, by which the values make o.
        candidates: whose values they are.
    """
    # Empty slots hold whatever was there before; a masked fill would take several times as long.
    values = candidates.values.float() * (candidates.token_ids >= 0)[..., None]
    values = values.nan_to_num_(0.0, 0.0, 0.0)
    mixed = mix.float()[:, :, None] @ values  # [streams, kv_heads, 1, head_dim]
    distance: torch.Tensor = torch.linalg.vector_norm(values - mixed, dim=-1)
    return share / (1 - share).clamp_min(torch.finfo(torch.float32).eps) * distance
