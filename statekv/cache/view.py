"""What a stream and the model that runs it must know of each other."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch

# carry: part of the stream. peek: sees what a step sees, but leaves the carried cache as it is.
# answer: sees what an answer sees.
Mode = Literal["carry", "peek", "answer"]


class Rotary(Protocol):
    """How a model turns its keys; `VideoModel` is one."""

    @property
    def own_time(self) -> bool:
        """Whether steps count time on an axis that text does not follow."""

    def frequencies(self, horizon: int) -> torch.Tensor:
        """[head_dim / 2] float32: of a stream of this horizon, which holds them for as long as it lives."""

    def angles(self, positions: torch.Tensor, horizon: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of positions [streams, T] or [3, streams, T]: cos and sin [streams, T, head_dim] float32."""

    def moved(self, by: torch.Tensor, horizon: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of how far the steps of some keys have moved, [T] int64 on the CPU: cos and sin [1, T, head_dim] float32."""


class Entering(Protocol):
    """What a stream must know of a segment that enters; `Segment` says what the names mean."""

    @property
    def kind(self) -> str: ...
    @property
    def length(self) -> int: ...
    @property
    def reach(self) -> int: ...
    @property
    def positions(self) -> torch.Tensor: ...
    @property
    def next_position(self) -> int: ...
    @property
    def frames(self) -> int: ...
    @property
    def pts_seconds(self) -> float | None: ...
    @property
    def moment(self) -> int | None: ...
    @property
    def words(self) -> frozenset[int]: ...


class View(Protocol):
    """A cache as attention layers see it. Each layer calls `update`, then `attend` or, for key scores, takes `bias`
    into attention of its own, and last `evict` where the segment is a step that must shrink the cache."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Enter own keys and values [streams, kv_heads, T, head_dim]; all that is seen comes out, own ones last."""

    def bias(self, layer: int) -> torch.Tensor | None:
        """[streams, kv_heads, K] float32, added to the logits of what `update` has handed out; None: nothing is."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """[streams, heads, T, head_dim]: queries over what `update` has handed out."""

    def evict(self, layer: int, attention: torch.Tensor | None) -> None:
        """Shrink the layer to its budget; attention [streams, kv_heads, K] float32 where the policy needs it."""

    def must_evict(self, tokens: int) -> bool:
        """Whether a step of so many tokens ends with `evict`."""

    @property
    def needs_attention(self) -> bool:
        """Whether `evict` goes by key scores."""
