"""A detailed cache for answers that see the newest tokens, and perhaps the first: what none can see again is let go."""

from __future__ import annotations

import torch

from statekv.cache.detailed import DetailedCache, Importance
from statekv.cache.policies.base import Policy
from statekv.cache.spec import KVSpec
from statekv.cache.tiers.cache import LABEL_GROWTH, close_gaps
from statekv.cache.tiers.plan import MemoryPlan, plan, spare_of, window_tokens
from statekv.config import Config


class WindowedCache(DetailedCache):
    """As `DetailedCache`, for a recall that goes by age, in memory that does not grow with the stream.

    Tokens behind the sinks and before the window of the moment are of no further use to anyone. Once they are as many
    as a share of the window, the next step drops all of them, and the window moves up to the sinks: a token is copied a
    few times in its life, and the buffers stay where they are. A question changes nothing.
    """

    def __init__(self, spec: KVSpec, config: Config, policy: Policy) -> None:
        super().__init__(spec, config.recall, window=config.budget, sinks=config.recalled_sinks)
        self.config, self.policy = config, policy
        self.longest = 0  # tokens that a step may have before there must be more room
        self.room = 0  # tokens of a question and its answer
        self.plan: MemoryPlan | None = None  # where memory has a cap

    @property
    def dropped(self) -> range:
        return range(self.sinks, self.sinks + self.away)

    def make_way(self, tokens: int, room: int, importance: Importance) -> list[int]:
        """Before a step of so many tokens: drop what no answer can see any more, where that is much. `room` is that of
        a question and its answer; nothing is returned, for what is dropped was not to be seen (see `dropped`).

        Raises:
            ConfigError: the cap is too small for such steps; nothing that can be seen has changed.
        """
        spare = self.lengths[-1] - self.window
        if spare > spare_of(self.window):
            self._drop(spare)
        if tokens > self.longest or room != self.room:
            self._make_plan(max(tokens + LABEL_GROWTH, self.longest), room)
        return []

    def make_room(self, tokens: int) -> None:
        """Before a question and its answer, of so many tokens; a MemoryLimitError where a cap leaves less than that to
        them.
        """
        if self.plan is not None:
            self.plan.check_room(self.lengths[-1], tokens)
        super().make_room(tokens)

    def reserve(self, tokens: int) -> None:
        """As `DetailedCache.reserve`, but for no more than there will ever be at once."""
        super().reserve(min(tokens, self._most))

    def resume(self, away: int, longest: int, room: int) -> None:
        """Stand where another cache of this configuration stood, once its tokens are back."""
        self.away = away
        if longest:
            self._make_plan(longest, room)

    def fork(self) -> WindowedCache:
        found = WindowedCache(self.spec, self.config, self.policy)
        found.lengths, found.buffers, found.away = list(self.lengths), list(self.buffers), self.away
        found.longest, found.room, found.plan = self.longest, self.room, self.plan
        self._share(found)
        return found

    @property
    def _most(self) -> int:
        """Tokens that there will ever be at once."""
        return window_tokens(self.window, self.longest, self.room)

    def _make_plan(self, step: int, room: int) -> None:
        if self.config.memory is not None:
            self.plan = plan(self.config, self.spec, self.policy, 0, step, room, torch.int64.itemsize)
        self.longest, self.room = step, room
        if self.plan is not None:
            for layer in range(len(self)):
                self._move(layer, self._most)  # at once: buffers that double leave holes, which the cap holds for too

    def _drop(self, tokens: int) -> None:
        """Let go of the first tokens behind the sinks."""
        self.written.forget(self.sinks)  # a file with tokens around them must not stand for what is left
        for layer in range(len(self)):
            self._claim(layer, self.sinks)
        close_gaps(self.buffers, [(self.sinks + tokens, self.sinks, self.window - self.sinks)], self.at_once)
        self.away += tokens
        self.lengths = [length - tokens for length in self.lengths]

    def _numbers(self) -> torch.Tensor:
        first = min(self.sinks, self.lengths[-1])
        return torch.cat([torch.arange(first), torch.arange(first + self.away, self.length)])

    def _doubled(self, capacity: int) -> int:
        return min(super()._doubled(capacity), self._most)
