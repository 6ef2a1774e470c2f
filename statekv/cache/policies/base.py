"""What a policy is told of one layer that must shrink, and what it answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch

# State that the cache itself keeps for policies which weigh: what is added to every logit of a key.
LOG_WEIGHTS = "log_weights"


@dataclass(frozen=True)
class Candidates:
    """Keys of one layer, carried and a step's own, of which `budget` stay in each head. Only `state` may be changed.

    Attributes:
        layer: its index.
        budget: keys that a head keeps, on average.
        keys, values: [streams, kv_heads, K, head_dim] of the model's dtype, keys rotated.
        token_ids: [streams, kv_heads, K] int32, int64 in streams of 2^31 tokens: numbers in the stream, from 0; -1 in
            an empty slot.
        attention: [streams, kv_heads, K] float32, the attention that the step's queries gave each key; None unless the
            policy needs it.
        first_own: the step's first token: a number, or a tensor that broadcasts against `token_ids`.
        newest: the first token of steps that are pinned as the newest, int64 that broadcasts against `token_ids`; None:
            none are.
        state: [streams, kv_heads, K] float32 each: what the policy has declared, by name, in place.
    """

    layer: int
    budget: int
    keys: torch.Tensor
    values: torch.Tensor
    token_ids: torch.Tensor
    attention: torch.Tensor | None = None
    first_own: int | torch.Tensor = 0
    newest: torch.Tensor | None = None
    state: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def attended(self) -> torch.Tensor:
        """`attention`, for policies that need it."""
        if self.attention is None:
            raise TypeError("there is no attention without needs_attention = True")
        return self.attention

    @property
    def log_weights(self) -> torch.Tensor:
        """[streams, kv_heads, K] float32: logarithms of how many keys each stands for; own keys' are 0."""
        return self.state[LOG_WEIGHTS]


class Policy(ABC):
    """A score for every key of a layer; the highest stay, each KV head for itself.

    The smallest one is a class with `score`. One object serves a stream, its forks and its batches, and keeps nothing
    itself: what it must remember of each key it declares as `state`, which lies beside the keys, and which eviction,
    fork, save, restore, batches and CUDA graphs carry along. Parameters are best the fields of a frozen dataclass: a
    save notes them, and streams of equal policies step as one batch.

    Attributes:
        needs_attention: whether `score` reads `Candidates.attention`; where it does not, steps run without key scores.
        every_step: whether `score` is called at every step, also where nothing has to go, because it keeps state.
        weighs: whether it has `log_weights`.
        joint_heads: whether all heads of a layer keep the same tokens, on which the scores rely.
        sinks: first tokens of the stream that stay, unless the configuration says another number.
        state: name of everything it remembers of a key, with the value that a new key begins with.
    """

    needs_attention = False
    every_step = False
    weighs = False
    joint_heads = False
    sinks = 0
    state: Mapping[str, float] = MappingProxyType({})

    @abstractmethod
    def score(self, candidates: Candidates) -> torch.Tensor:
        """[streams, kv_heads, K] floats below infinity; the highest stay. Nothing here may wait for the device."""

    def log_weights(self, candidates: Candidates, scores: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """What is added to each key's logit from the next step on, where the policy weighs.

        Args:
            candidates: as for `score`.
            scores: what stayed was chosen by; empty slots have -inf.
            kept: [streams, kv_heads, K] bool: which keys stay.

        Returns:
            [streams, kv_heads, K] float32, below infinity; -inf leaves the slot of a kept key empty. The detailed cache
            knows no weights.
        """
        raise TypeError(f"{type(self).__name__} weighs its keys, but does not say how: define log_weights")

    def layer_budgets(self, budget: int, layers: int) -> Sequence[int]:
        """Keys that a head of each layer keeps on average, 1 or more; at most `layers` · `budget` in all."""
        return [budget] * layers

    def slots(self, budget: int) -> int:
        """Slots of a head in a layer with this budget: more than the budget where heads share it out unevenly."""
        return budget

    def __repr__(self) -> str:
        """`Mine(alpha=0.5)`, as a dataclass shows itself."""
        shown = (f"{name}={value!r}" for name, value in vars(self).items() if not name.startswith("_"))
        return f"{type(self).__name__}({', '.join(shown)})"
