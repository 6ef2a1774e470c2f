"""Rules of others, and steps towards our own, to be measured beside those that the package keeps.

    statekv bench pretrained --method "statekv,statekv:carry=benchmarks.rivals:EachQuery"

from the repository's root.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from statekv.cache.policies import Candidates, Policy
from statekv.cache.policies.random import lots
from statekv.ops import select

_SURE = 1e30  # of a score: it stays, whatever else is there


@dataclass(frozen=True)
class EachQuery(Policy):
    """The mean over those of the step's queries that can see a key, where the paper's sum starves a step's last tokens.

    What Expected Attention (arXiv 2510.00636) computes from the queries' distribution, estimated by a step's own ones.
    """

    needs_attention = True

    def score(self, candidates: Candidates) -> torch.Tensor:
        own = candidates.token_ids >= candidates.first_own
        queries = own.sum(-1, keepdim=True)
        later = candidates.token_ids - candidates.first_own  # queries that come before a key and cannot see it
        return candidates.attended / torch.where(own, queries - later, queries)


@dataclass(frozen=True)
class ValuesAndChance(Policy):
    """Long values stay, and chance decides among the rest: after VaSE (arXiv 2606.03928), as its abstract tells it.

    Attributes:
        reserved: share of the budget for the keys with the longest values (L2).
        seed: of the lots.
    """

    needs_attention = True

    reserved: float = 0.1
    seed: int = 0

    def score(self, candidates: Candidates) -> torch.Tensor:
        norms: torch.Tensor = torch.linalg.vector_norm(candidates.values, dim=-1, dtype=torch.float32)
        norms = norms.masked_fill(candidates.token_ids < 0, -1)
        lot = lots(candidates.token_ids, self.seed, candidates.layer, candidates.first_own)
        gumbel = -(-lot.clamp(1e-12, 1 - 1e-12).log()).log()
        drawn = (candidates.attended.double() * norms.clamp_min(0)).clamp_min(1e-30).log() + gumbel
        return drawn.masked_fill(select.best(norms, round(self.reserved * candidates.budget)), _SURE)


@dataclass(frozen=True)
class Coreset(Policy):
    """A greedy cover of all keys and values: after CoRDS (arXiv 2605.14310), whose term for diversity is left out.

    Each pick is the key that brings the candidates nearest, on average, to a key that was picked: in the cosine between
    keys and in that between values, both counting alike. No attention is needed.
    """

    def score(self, candidates: Candidates) -> torch.Tensor:
        alike = (_cosines(candidates.keys) + _cosines(candidates.values)) / 2  # [streams, kv_heads, K, K]
        there = candidates.token_ids >= 0
        alike = alike.masked_fill(~there[..., None, :], -1)  # nobody need be near an empty slot
        covered = torch.full_like(alike[..., 0], -1)
        scores = torch.zeros_like(covered).masked_fill(~there, -1)
        for turn in range(min(candidates.budget, covered.shape[-1])):
            gains = (alike - covered[..., None, :]).clamp_min(0).sum(-1)
            gains = gains.masked_fill((scores != 0), -1)
            picked = gains.argmax(-1, keepdim=True)
            scores.scatter_(-1, picked, float(candidates.budget - turn))
            nearest = alike.gather(-2, picked[..., None].expand(*picked.shape, alike.shape[-1])).squeeze(-2)
            covered = torch.maximum(covered, nearest)
        return scores


def _cosines(vectors: torch.Tensor) -> torch.Tensor:
    """[..., K, D] → [..., K, K] float32."""
    unit = torch.nn.functional.normalize(vectors.float(), dim=-1).nan_to_num()
    return unit @ unit.mT
