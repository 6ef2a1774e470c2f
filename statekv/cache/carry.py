"""Which keys go on to the next step: every rule is a score, and the highest `budget` of them stay."""

from __future__ import annotations

from collections.abc import Callable

import torch

# (key scores or None, born) → scores; all [streams, kv_heads, K]. `born` numbers the stream's tokens from 0.
Rule = Callable[[torch.Tensor | None, torch.Tensor], torch.Tensor]


def carry_rule(carry: str, *, sinks: int, seed: int, pinned: int) -> Rule:
    """The rule of a carry's name.

    Args:
        carry: attention, recent, sink_recent or random; `all` needs no rule, for nothing is evicted.
        sinks: first tokens that sink_recent always keeps.
        seed: of random.
        pinned: first tokens that stay whatever the rule says.
    """
    rule = {"attention": _attention, "recent": _recent, "sink_recent": _recent, "random": _random(seed)}[carry]
    always = max(pinned, sinks if carry == "sink_recent" else 0)
    return _pinned(rule, always) if always else rule


def _attention(scores: torch.Tensor | None, born: torch.Tensor) -> torch.Tensor:
    assert scores is not None
    return scores


def _recent(scores: torch.Tensor | None, born: torch.Tensor) -> torch.Tensor:
    return born.float()  # exact up to 2^24 tokens; beyond, neighbours tie and either may go


def _random(seed: int) -> Rule:
    generator = torch.Generator().manual_seed(seed)

    def rule(scores: torch.Tensor | None, born: torch.Tensor) -> torch.Tensor:
        return torch.rand(born.shape, generator=generator).to(born.device)

    return rule


def _pinned(rule: Rule, first: int) -> Rule:
    def pinned(scores: torch.Tensor | None, born: torch.Tensor) -> torch.Tensor:
        return rule(scores, born).masked_fill(born < first, float("inf"))

    return pinned
