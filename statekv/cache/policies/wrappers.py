"""What may be put around any policy: keys that stay whatever it says, and other ways to count."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from statekv.cache.policies.base import Candidates, Policy
from statekv.cache.policies.random import lots
from statekv.errors import ConfigError
from statekv.ops import select

_ALWAYS = float("inf")

# State: the attention that a key was last judged by. The tiers keep steps by it.
IMPORTANCE = "importance"


class Wrapper(Policy):
    """A policy that changes what another one says; by itself it changes nothing."""

    def __init__(self, inner: Policy) -> None:
        self.inner = inner
        self.needs_attention, self.every_step, self.weighs = inner.needs_attention, inner.every_step, inner.weighs
        self.joint_heads, self.sinks, self.state = inner.joint_heads, inner.sinks, inner.state
        self._taken_over = set(vars(self)) - {"inner"}

    def score(self, candidates: Candidates) -> torch.Tensor:
        return self.inner.score(candidates)

    def log_weights(self, candidates: Candidates, scores: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        return self.inner.log_weights(candidates, scores, kept)

    def layer_budgets(self, budget: int, layers: int) -> Sequence[int]:
        return self.inner.layer_budgets(budget, layers)

    def slots(self, budget: int) -> int:
        return self.inner.slots(budget)

    def __repr__(self) -> str:
        """`Pinned(Decayed(Attention(), decay=0.5), first=4)`."""
        own = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        shown = (f"{name}={value!r}" for name, value in own.items() if name not in {*self._taken_over, "inner"})
        return f"{type(self).__name__}({', '.join([repr(self.inner), *shown])})"


class Pinned(Wrapper):
    """The stream's first tokens stay, and the newest steps where `Candidates.newest` says from which token on."""

    def __init__(self, inner: Policy, first: int) -> None:
        super().__init__(inner)
        self.first = first

    def score(self, candidates: Candidates) -> torch.Tensor:
        found, token_ids = self.inner.score(candidates), candidates.token_ids
        if candidates.newest is not None:
            found = found.masked_fill(token_ids >= candidates.newest, _ALWAYS)
        return found.masked_fill(token_ids < self.first, _ALWAYS) if self.first else found


class Covered(Wrapper):
    """A share of the budget goes to a uniform sample of the whole stream, as `Random` draws it.

    Args:
        share: of the budget, pinned tokens left out, 0 … 1.

    Raises:
        ConfigError: a policy whose heads keep the same tokens; the sample's differ.
    """

    def __init__(self, inner: Policy, share: float, pinned: int, seed: int) -> None:
        super().__init__(inner)
        _check_heads(inner, f"`coverage` is {share}, but draws for each head", "coverage")
        self.share, self.pinned, self.seed = share, pinned, seed

    def score(self, candidates: Candidates) -> torch.Tensor:
        found, token_ids = self.inner.score(candidates), candidates.token_ids
        drawn = lots(token_ids, self.seed, candidates.layer).masked_fill(token_ids < self.pinned, -1)
        # None of the stream's highest lots so far was ever evicted.
        number = min(covering(self.share, candidates.budget, self.pinned), drawn.shape[-1])
        return found.masked_fill(select.best(drawn, number), _ALWAYS)


def _check_heads(inner: Policy, rule: str, setting: str) -> None:
    if inner.joint_heads:
        told = f"{rule}, and all heads of this `carry` keep the same tokens"
        raise ConfigError(told, f"leave `{setting}` out, or choose another `carry`")


def covering(share: float, budget: int, pinned: int) -> int:
    """How many keys of a layer with this budget are a sample of the whole stream."""
    return round(share * (budget - pinned))


class ValueNorms(Wrapper):
    """Scores times the length (L2) of the value: what a key adds to a mixture is its attention times its value.

    After VATP (arXiv 2406.12335), which takes the L1 norm.

    Raises:
        ConfigError: a policy whose heads keep the same tokens; their values differ.
    """

    def __init__(self, inner: Policy) -> None:
        super().__init__(inner)
        _check_heads(inner, "`value_norms` is True, but values differ between heads", "value_norms")

    def score(self, candidates: Candidates) -> torch.Tensor:
        norms: torch.Tensor = torch.linalg.vector_norm(candidates.values, dim=-1, dtype=torch.float32)
        return self.inner.score(candidates) * norms


class Decayed(Wrapper):
    """The attention that a carried key received before counts beside a step's own, `decay` times, 0 … 1."""

    def __init__(self, inner: Policy, decay: float) -> None:
        super().__init__(inner)
        self.every_step, self.state = True, {**inner.state, IMPORTANCE: 0.0}
        self.decay = decay

    def score(self, candidates: Candidates) -> torch.Tensor:
        attention = candidates.state[IMPORTANCE].mul_(self.decay).add_(candidates.attended)
        return self.inner.score(replace(candidates, attention=attention))


class Sloped(Wrapper):
    """The first layer gets budget · (1 + slope), the last one budget · (1 - slope), see `layer_budgets`."""

    def __init__(self, inner: Policy, slope: float) -> None:
        super().__init__(inner)
        self.slope = slope

    def layer_budgets(self, budget: int, layers: int) -> Sequence[int]:
        return layer_budgets(budget, layers, self.slope)


def layer_budgets(budget: int, layers: int, slope: float) -> list[int]:
    """Tokens of each layer, along a line from the first to the last, `layers` · `budget` in all.

    A linear decline is PyramidKV's (arXiv 2406.02069). StateKV's figure 6 is why one may want it: the first layers
    spread their attention over the most keys.

    Args:
        budget: mean tokens of a layer.
        slope: the first layer gets `budget` · (1 + slope), the last `budget` · (1 - slope), between -1 and 1; 0 gives
            every layer the same.
    """
    if layers == 1:
        return [budget]
    line = [budget * (1 + slope * (1 - 2 * layer / (layers - 1))) for layer in range(layers)]
    whole = [math.floor(share) for share in line]
    largest_rests = sorted(range(layers), key=lambda layer: whole[layer] - line[layer])
    for layer in largest_rests[: layers * budget - sum(whole)]:
        whole[layer] += 1
    return whole


class Noted(Wrapper):
    """Beside each key stands the attention that it was last judged by, as `Decayed` leaves it too."""

    def __init__(self, inner: Policy) -> None:
        super().__init__(inner)
        self.state = {**inner.state, IMPORTANCE: 0.0}

    def score(self, candidates: Candidates) -> torch.Tensor:
        if candidates.attention is not None:
            candidates.state[IMPORTANCE].copy_(candidates.attention)
        return self.inner.score(candidates)
