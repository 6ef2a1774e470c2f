"""How few keys hold a stream's attention, and how long they stay the same: the paper's figures 6, 7 and 8.

All of it is measured on full attention, in each layer and KV head by itself. At step t the history is every token
before the step, h[j] the key score of history token j (the attention that the step's queries pay to it), and K_t(B) the
B tokens of the history with the highest scores. Figure 6 shows the share of the history's attention that K_t(B)
captures:

    captured_t(B) = Σ_{j ∈ K_t(B)} h[j] / Σ_j h[j]

Figures 7 and 8 ask whether a carried cache could have known K_t(B). All it could still hold is the candidate pool
K_{t-1}(B) ∪ tokens of step t - 1:

    recall_t(B)    = Σ_{j ∈ K_t(B) ∩ pool} h[j] / Σ_{j ∈ K_t(B)} h[j]
    retention_t(B) = |K_t(B) ∩ K_{t-1}(B)| / |K_{t-1}(B)|          churn_t(B) = 1 - retention_t(B)

Shares are averaged over heads and steps with equal weight. Captured counts from the second step on, the others from the
third, for before there is no history of frames. The paper's own formulas were not at hand: these are read off its
figures, in which retention and churn sum to 1 and figure 8 shows the mean of figure 7 over layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch

from statekv.config import Config
from statekv.errors import ConfigError

BUDGETS = tuple(2**power for power in range(15))
_NEVER = BUDGETS[-1]  # rank of a token that was not among the best


@dataclass(frozen=True)
class LayerShares:
    """One layer's means over heads and steps; a tuple has an entry for each of BUDGETS.

    Attributes:
        captured, recall, retention: as above.
        best: captured by as many keys as the carried cache holds, had they been chosen best.
        carried: captured by the keys that the carried cache did hold.
    """

    layer: int
    captured: tuple[float, ...]
    recall: tuple[float, ...]
    retention: tuple[float, ...]
    best: float
    carried: float

    @property
    def churn(self) -> tuple[float, ...]:
        """Share of the best keys that a step replaces."""
        return tuple(1 - share for share in self.retention)


@dataclass(frozen=True, kw_only=True)
class Curves:
    """What was found in a stream of so many steps and tokens.

    Attributes:
        budget: keys that were carried.
        shares: a row for each layer.
    """

    budget: int
    steps: int
    tokens: int
    kv_heads: int
    shares: list[LayerShares]

    @property
    def length(self) -> str:
        """In words."""
        return f"{self.steps} steps, {self.tokens} tokens"

    def mean_shares(self) -> LayerShares:
        """The mean over layers, as layer -1."""
        captured, recall, retention = (
            tuple(np.mean([getattr(row, name) for row in self.shares], axis=0).tolist())
            for name in ("captured", "recall", "retention")
        )
        best, carried = fmean(row.best for row in self.shares), fmean(row.carried for row in self.shares)
        return LayerShares(-1, captured, recall, retention, best, carried)


def layers_to_look_at(layers: Sequence[int] | None, known: int, config: Config) -> Sequence[int]:
    """Those that were named, or all of so many; a ConfigError for one that is not there, or where all is carried."""
    if config.carry == "all":
        raise ConfigError("carry is 'all', but where every key is carried there is nothing to look into", "set carry")
    for layer in layers or ():
        if not 0 <= layer < known:
            raise ConfigError(f"layer {layer} is not there, the model has 0 to {known - 1}", "leave it out")
    return range(known) if layers is None else sorted(set(layers))


class Concentration:
    """Adds up the shares of a stream, step by step, without ever keeping a matrix of queries and keys.

    From one step to the next it keeps the order of the best 2^14 tokens for each layer and head, and nothing else.
    """

    def __init__(self, layers: Sequence[int]) -> None:
        self._sums = {layer: torch.zeros(3, len(BUDGETS), dtype=torch.float64) for layer in layers}
        self._cache_sums = {layer: torch.zeros(2, dtype=torch.float64) for layer in layers}
        self._orders: dict[int, torch.Tensor] = {}  # per layer [kv_heads, m] int64, the best first
        self._steps = 0
        self._history = self._history_before = 0
        self._carried: Mapping[int, torch.Tensor] = {}

    def begin(self, history: int, carried: Mapping[int, torch.Tensor]) -> None:
        """Before each step from the second on.

        Args:
            history: tokens before the step.
            carried: for each layer [kv_heads, n] int64, the tokens that the carried cache holds before the step; -1
                where a slot is empty.
        """
        self._steps += 1
        self._history_before, self._history = self._history, history
        self._carried = carried

    def observe(self, layer: int, scores: torch.Tensor) -> None:
        """A layer's key scores at this step, [1, kv_heads, history + own tokens] float32."""
        if layer not in self._sums:
            return
        past = scores[0, :, : self._history].double()
        best, order = past.topk(min(self._history, BUDGETS[-1]))
        total = past.sum(-1)
        self._sums[layer][0] += captured(best, total).cpu()
        held = self._carried[layer].to(past.device)
        there = held >= 0
        as_many = torch.arange(held.shape[-1], device=held.device) < there.sum(-1, keepdim=True)
        optimum = (past.topk(held.shape[-1]).values * as_many).sum(-1)
        carried = (past.gather(-1, held.clamp_min(0)) * there).sum(-1)
        self._cache_sums[layer] += torch.stack([_share(optimum, total), _share(carried, total)]).cpu()
        if layer in self._orders:
            ranks = ranks_before(self._orders[layer], order, self._history)
            fresh = order >= self._history_before
            self._sums[layer][1:] += persistence(best, ranks, fresh, self._history_before).cpu()
        self._orders[layer] = order

    def shares(self) -> list[LayerShares]:
        """What was found, a row for each layer; NaN where the stream was too short to say."""
        found = []
        for layer, sums in self._sums.items():
            captured, recall, retention = (
                tuple((row / steps).tolist())
                for row, steps in zip(sums, _counts(self._steps, self._steps - 1, self._steps - 1), strict=True)
            )
            best, carried = (self._cache_sums[layer] / _counts(self._steps)).tolist()
            found.append(LayerShares(layer, captured, recall, retention, best, carried))
        return found


def captured(best: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Share of the attention that the best B keys capture, mean over heads.

    Args:
        best: [kv_heads, m] scores, the highest first.

    Returns:
        [budgets] float64.
    """
    summed = best.cumsum(-1)
    return torch.stack([_share(summed[:, min(budget, best.shape[1]) - 1], total) for budget in BUDGETS])


def ranks_before(before: torch.Tensor, order: torch.Tensor, history: int) -> torch.Tensor:
    """Where the tokens of `order` stood in the order of the step before.

    Args:
        before, order: [kv_heads, m] int64 tokens, the best first.
        history: tokens in all.

    Returns:
        [kv_heads, m] int64, 0 for the best; 2^14 for tokens that were not in it.
    """
    ranks = order.new_full((len(order), history), _NEVER)
    places = torch.arange(before.shape[1], device=order.device).expand_as(before)
    return ranks.scatter_(-1, before, places).gather(-1, order)


def persistence(best: torch.Tensor, ranks: torch.Tensor, fresh: torch.Tensor, history_before: int) -> torch.Tensor:
    """Weighted recall in the candidate pool, and retention, means over heads.

    Args:
        ranks: [kv_heads, m] as `ranks_before`.
        fresh: [kv_heads, m] bool, whether a token came with the step before.

    Returns:
        [2, budgets] float64: recall and retention.
    """
    found = []
    for budget in BUDGETS:
        kept = ranks[:, :budget] < budget
        mass = best[:, :budget]
        recall = _share((mass * (kept | fresh[:, :budget])).sum(-1), mass.sum(-1))
        retention = (kept.sum(-1).double() / min(budget, history_before)).mean()
        found.append(torch.stack([recall, retention]))
    return torch.stack(found, dim=-1)


def _share(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Mean over heads; of nothing, everything."""
    return torch.where(whole > 0, part / whole, 1.0).mean()


def _counts(*steps: int) -> torch.Tensor:
    return torch.tensor([float(count) if count > 0 else float("nan") for count in steps], dtype=torch.float64)
