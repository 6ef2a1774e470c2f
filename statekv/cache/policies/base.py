"""Which keys go on to the next step: every rule is a score, and the highest `budget` of them stay."""

from __future__ import annotations

import torch

from statekv.ops import select


class Rule:
    """What a carry's name means.

    Args:
        carry: attention, recent, sink_recent or random; `all` needs no rule, for nothing is evicted.
        sinks: first tokens that sink_recent always keeps.
        seed: of random.
        pinned: first tokens that stay whatever the rule says.
        value_norms: whether a key's score is multiplied by the length of its value: what the key adds to a mixture is
            its attention times its value, so that a key with a value near 0 changes nothing (after VATP, arXiv
            2406.12335, which takes the L1 norm; here it is L2).
        coverage: share of the budget, pinned tokens left out, that goes to a sample of the whole stream as `random`
            draws it; the rule chooses among all others.
    """

    def __init__(
        self, carry: str, *, sinks: int, seed: int, pinned: int, value_norms: bool = False, coverage: float = 0.0
    ) -> None:
        self._carry = carry
        self._seed = seed
        self._pinned = pinned
        self._always = max(pinned, sinks if carry == "sink_recent" else 0)
        self._value_norms = value_norms
        self._coverage = coverage

    def __call__(
        self,
        scores: torch.Tensor | None,
        token_ids: torch.Tensor,
        layer: int = 0,
        *,
        values: torch.Tensor | None = None,
        budget: int = 0,
        newest: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Score the keys of one layer.

        Args:
            scores: [streams, kv_heads, K] float32 key scores; None for rules that ignore them.
            token_ids: [streams, kv_heads, K] int32, the stream's tokens numbered from 0.
            layer: index of the layer; random draws differ between layers.
            values: [streams, kv_heads, K, D], for value_norms.
            budget: keys that will stay, for coverage.
            newest: int32, 0-d or one for each stream [streams, 1, 1], the first token of the newest steps, which stay;
                None: none of them is pinned.

        Returns:
            [streams, kv_heads, K] float; the highest stay.
        """
        found = self._score(scores, token_ids, layer)
        if self._value_norms:
            assert values is not None
            found = found * torch.linalg.vector_norm(values, dim=-1, dtype=torch.float32)
        if self._coverage:
            found = found.masked_fill(self._sample(token_ids, layer, budget), float("inf"))
        if newest is not None:
            found = found.masked_fill(token_ids >= newest, float("inf"))
        return found.masked_fill(token_ids < self._always, float("inf")) if self._always else found

    def covering(self, budget: int) -> int:
        """How many keys of a layer with this budget are a sample of the whole stream."""
        return round(self._coverage * (budget - self._pinned))

    def chosen(self, budget: int) -> int:
        """How many keys of a layer with this budget go by score, newest steps among them."""
        return budget - self._pinned - self.covering(budget)

    def _sample(self, token_ids: torch.Tensor, layer: int, budget: int) -> torch.Tensor:
        """[streams, kv_heads, K] bool: the highest lots of all tokens so far, for none of those was ever evicted."""
        lots = _lots(token_ids, self._seed, layer).masked_fill(token_ids < self._pinned, -1)
        return select.best(lots, self.covering(budget))

    def _score(self, scores: torch.Tensor | None, token_ids: torch.Tensor, layer: int) -> torch.Tensor:
        if self._carry == "attention":
            assert scores is not None
            return scores
        if self._carry == "random":
            return _lots(token_ids, self._seed, layer)
        return token_ids.double()  # float32 would tie neighbours behind 2^24 tokens


def _lots(token_ids: torch.Tensor, seed: int, layer: int) -> torch.Tensor:
    """A lot in 0…1 for each token, the same at every step.

    Drawn anew at each step, old tokens would have to win again and again and die out: a soft recency window. With one
    lot for life, the carried keys are a uniform sample of the whole stream. The mixing is splitmix64's.
    """
    head = torch.arange(token_ids.shape[1], device=token_ids.device).view(-1, 1)  # the same in every stream of a batch
    bits = (token_ids.long() + (head << 34)) ^ ((layer * 0x9E3779B1 + seed * 0x85EBCA77) % 2**62)
    for multiplier, shift in ((-0x40A7B892E31B1A47, 30), (-0x6B2FB644ECCEEE15, 27)):
        bits = (bits ^ ((bits >> shift) & ((1 << (64 - shift)) - 1))) * multiplier
    return ((bits >> 11) & ((1 << 53) - 1)).double() / 2**53
