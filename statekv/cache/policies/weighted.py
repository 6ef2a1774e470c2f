"""A kept key stands for dropped ones: a weighted sample of the past, whose softmax is right on average."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from statekv.cache.policies.base import Candidates, Policy
from statekv.cache.policies.caote import output_error
from statekv.cache.policies.random import lots
from statekv.errors import ConfigError

_LEAST = 1e-30  # a size: a key that nobody attends to goes first, but its priority is a number


@dataclass(frozen=True)
class Weighted(Policy):
    """Priority sampling of the keys, by size: how far the mixed values would move without a key (`Caote`), by what it
    received from each query that could see it.

    Where the paper's rule forgets what it drops, each later softmax runs over too few keys. Here a key's priority is
    its size over a lot u in 0 … 1; the highest stay, and a key of a size below the highest priority among the dropped
    stands for that many keys from then on: the logarithm is added to its logit, and so to the size that it has in later
    steps. Sums over the whole past are right on average (Duffield, Lund and Thorup, "Priority sampling for estimation
    of arbitrary subset sums", JACM 2007), but for the cap. A key larger than all dropped priorities keeps its weight:
    where attention is concentrated this is the paper's rule, where it is spread it is a weighted sample. Lots come from
    the token's number, layer, head and step, so that a fork, a restored stream and a batch draw the same.

    Attributes:
        cap: highest log weight: less variance for some bias; 0 is a sample without weights.
        output_error: False: sizes are the attention alone, which costs less.
        seed: of the lots; None: the configuration's.

    Raises:
        ConfigError: a cap below 0.
    """

    needs_attention = True
    weighs = True
    sinks = 4

    cap: float = 3.0
    output_error: bool = True
    seed: int | None = None

    def __post_init__(self) -> None:
        if not self.cap >= 0:
            raise ConfigError(f"cap is {self.cap!r}, but must be a number of at least 0", "leave it out for 3")

    def score(self, candidates: Candidates) -> torch.Tensor:
        return self._sizes(candidates) / self._lots(candidates)

    def log_weights(self, candidates: Candidates, scores: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        before = candidates.log_weights
        if not self.cap:
            return before
        highest = scores.masked_fill(kept, 0.0).amax(-1, keepdim=True)  # of the dropped, [streams, kv_heads, 1]
        sizes = scores * self._lots(candidates)  # infinite where a key stays whatever its size
        gained = (highest / sizes).log().clamp_min(0).float()
        return torch.minimum(before + gained, before.clamp_min(self.cap))

    def _lots(self, candidates: Candidates) -> torch.Tensor:
        found = lots(candidates.token_ids, self.seed or 0, candidates.layer, candidates.first_own)
        return found.clamp_min(math.ulp(0.5))

    def _sizes(self, candidates: Candidates) -> torch.Tensor:
        """[streams, kv_heads, K] float64; the paper's sum would give a step's last tokens little: few can see them."""
        token_ids, attended = candidates.token_ids, candidates.attended.double()
        own = token_ids >= candidates.first_own
        queries = own.sum(-1, keepdim=True)
        seen_by = torch.where(own, queries - (token_ids - candidates.first_own), queries)
        each = attended / seen_by
        if self.output_error:
            heads = attended.sum(-1, keepdim=True) / queries  # of a group: each of a query's rows adds up to 1
            each = output_error(each / heads, attended / attended.sum(-1, keepdim=True), candidates)
        return each.clamp_min(_LEAST)
