"""Everything that one stream remembers, and how to go back to a mark."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise

import torch

from statekv.cache.carried import CarriedCache
from statekv.cache.detailed import DetailedCache
from statekv.cache.policies.base import Rule
from statekv.cache.retrieval import RetrievedView, StepIndex
from statekv.cache.spec import KVSpec, Mark, Memory, PositionShift, Span, layer_budgets
from statekv.cache.tiers.cache import TieredCache
from statekv.config import Config
from statekv.errors import ConfigError
from statekv.ops.rope import Angles


@dataclass(frozen=True)
class Compaction:
    """From the position that a step would have without a horizon to the one that it has.

    A step moves as a whole, so that its own tokens keep their distances. Steps before `until` stand `factor` times as
    densely as they came, in order; from `until` on every distance is what it was. Factors are powers of two: a step is
    moved when it leaves the newest ones, and from then on each time that the stream has doubled.

    Attributes:
        first: positions up to here, the prompt's prefix, never move.
        until: uncompacted position of the first step that keeps its distances.
        factor: positions of older steps that share one.
    """

    first: int = 0
    until: int = 0
    factor: int = 1

    def place(self, position: int) -> int:
        """Where a step stands that would begin at `position`."""
        return position - self.gained if position >= self.until else self._squeezed(position)

    @property
    def gained(self) -> int:
        """Positions by which the newest steps have moved towards the front."""
        return self.until - self._squeezed(self.until)

    def next(self, newest: int, first: int, reach: int) -> Compaction:
        """Make room: half of the range becomes free, a quarter holds the newest steps, a quarter all older ones.

        Args:
            newest: uncompacted position of the newest step, which keeps its distances in any case.
            first: positions that never move.
            reach: one past the last position that steps may take.
        """
        quarter = max(1, (reach - first) // 4)
        until = max(self.until, first, newest - quarter)
        factor = self.factor
        while (until - first) // factor > quarter:
            factor *= 2
        return Compaction(first, until, factor)

    def _squeezed(self, position: int) -> int:
        return position if position < self.first else self.first + (position - self.first) // self.factor


def tensors_of(memory: Memory) -> Iterator[torch.Tensor]:
    """The tensors in a memory."""
    return (value for value in memory.values() if isinstance(value, torch.Tensor))


@dataclass
class StreamState:
    """Both memories of one stream, and where it stands.

    Attributes:
        spec: sizes of the model's keys.
        config: dials and budget.
        horizon: positions that RoPE is scaled for.
        room: the last positions below the horizon, which steps leave to questions.
        frames_expected: frames of the whole video where that is known; some families size pictures by it.
        position: next RoPE position; at least the number of tokens for one-axis RoPE.
        frames: pictures that have entered.
        origin_seconds: time of the first frame; prompts count from there.
        spans: one for each segment, in order.
        pinned: tokens of the prefix that stay carried.
        compacts: whether steps move closer together once the horizon is reached.
        compaction: how far they have.
        memories: what those that reduce its steps remember of it, by name; replaced as a whole, never changed.
    """

    spec: KVSpec
    config: Config
    horizon: int
    frames_expected: int | None = None
    room: int = 0
    position: int = 0
    frames: int = 0
    origin_seconds: float | None = None
    spans: list[Span] = field(default_factory=list)
    pinned: int = 0
    compacts: bool = False
    compaction: Compaction = field(default_factory=Compaction)
    memories: Mapping[str, Memory] = field(default_factory=dict)

    def __post_init__(self) -> None:
        c = self.config
        self.detailed = self._make_detailed()
        # Only retrieval needs them.
        self.blocks = StepIndex(self.spec) if c.recall == "retrieve" else None
        self._carried: CarriedCache | None = None
        self.outlived: set[int] = set()  # starts of forgotten steps that are still carried
        self._retrieved: RetrievedView | None = None

    @property
    def carried(self) -> CarriedCache | DetailedCache:
        """What a step sees; with carry="all" that is the detailed cache itself."""
        if self.config.carry == "all":
            return self.detailed
        if self._carried is None:
            self._carried = self._make_carried()
        return self._carried

    @property
    def recalled(self) -> RetrievedView | DetailedCache:
        """What an answer sees; the detailed cache itself narrows its view for recalls that go by age."""
        return self.detailed if self._retrieved is None else self._retrieved

    @property
    def tokens(self) -> int:
        """Tokens in the detailed cache."""
        return self.detailed.length

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes allocated by each memory; the carried cache costs nothing where it is the detailed one.

        What an answer copies out for itself is not counted: it is gone when the answer is.
        """
        return {
            "carried": self._carried.nbytes if self._carried is not None else 0,
            "detailed": self.detailed.nbytes,
            "blocks": self.blocks.nbytes if self.blocks is not None else 0,
            "memories": sum(tensor.nbytes for memory in self.memories.values() for tensor in tensors_of(memory)),
            **(self.detailed.bytes_by_tier if isinstance(self.detailed, TieredCache) else {}),
        }

    @property
    def forgotten(self) -> int:
        """Steps that a cap on memory has left no room for."""
        return self.detailed.forgotten if isinstance(self.detailed, TieredCache) else 0

    def expect_prefix(self, tokens: int) -> None:
        """Say how long the prompt's prefix is before it enters, so that it can be pinned.

        Raises:
            ConfigError: the pinned prefix alone fills the budget.
        """
        if not self.config.pin_prefix or self.config.carry == "all":
            return
        assert not self.tokens, "the prefix comes first"
        if tokens >= self._least_budget:
            raise ConfigError(
                f"budget is {self._told_budget}, but the pinned prefix alone takes {tokens} tokens",
                f"raise budget above {tokens} or leave the prefix unpinned",
            )
        self.pinned = tokens
        self._carried = self._make_carried()

    def expect_newest(self, kind: str, tokens: int) -> None:
        """Say what enters before it does, so that the newest steps can be pinned.

        Raises:
            ConfigError: the newest steps do not fit into the part of the budget that goes by score.
        """
        pinned, carried = self.config.pin_newest, self.carried
        if not pinned or isinstance(carried, DetailedCache):
            return
        own = kind == "step"
        before = islice((span.start for span in reversed(self.spans) if span.kind == "step"), pinned - own)
        first = min((*before, self.tokens if own else self.tokens + tokens))
        taken, room = self.tokens + tokens - first, carried.rule.chosen(self._least_budget)
        if taken > room:
            raise ConfigError(
                f"pin_newest is {pinned} with a budget of {self._told_budget}, but these steps take {taken} tokens "
                f"where {room} go by score",
                "raise budget or lower pin_newest",
            )
        carried.pin_from(first)

    def make_way(self, tokens: int, room: int) -> None:
        """Before a step: where memory has a cap, have older ones leave it or be forgotten.

        Args:
            tokens: of the step.
            room: tokens of a question and its answer.

        Raises:
            ConfigError: the cap is too small for such steps; nothing has changed.
        """
        if isinstance(self.detailed, TieredCache):
            self._forget(self.detailed.make_way(tokens, room, self._importance))
            if self.blocks is not None and self.detailed.plan is not None:
                self.blocks.most = self.detailed.plan.most_steps

    def note(self, kind: str, length: int, pts_seconds: float | None, position: int) -> None:
        """Record that `length` tokens of a segment have just entered, uncompacted at `position`."""
        self.spans.append(Span(kind, self.tokens - length, length, pts_seconds, position))
        if isinstance(self.detailed, TieredCache):
            self.detailed.note(kind, length)

    def uncompacted(self, moment: int | None) -> int:
        """Where a segment that comes next, at a moment of its own or None, would begin without any compaction."""
        return (self.position if moment is None else moment) + self.compaction.gained

    def compacted(self, position: int, reach: int) -> Compaction:
        """What would make room for a step, uncompacted at `position`, in a stream that may take `reach` positions."""
        first = self.spans[0].length if self.spans and self.spans[0].kind == "prefix" else 0
        return self.compaction.next(position, first, reach)

    def compact(self, to: Compaction, angles: Angles, own_time: bool = False) -> None:
        """Move steps closer together, once and for all: their keys in both memories are rotated further, in place.

        Args:
            to: where they stand from now on.
            angles: of how far each token's step moves, [T] int64 on the CPU, to cos and sin [1, T, head_dim] float32.
            own_time: whether steps count time on an axis that text does not follow; else the next position moves too.
        """
        spans, by = [], []
        for span in reversed(self.spans):
            far = to.place(span.position) - self.compaction.place(span.position)
            if not far:
                break  # nor have any before it
            spans.append(span)
            by.append(far)
        if spans:
            moves = PositionShift([span.start for span in spans[::-1]], by[::-1])
            self.detailed.rotate(moves, angles)
            if isinstance(self.carried, CarriedCache):
                self.carried.rotate(moves, angles)
        if not own_time:
            self.position -= to.gained - self.compaction.gained
        self.compaction = to
        if self.blocks is not None and self.config.retrieve_positions == "reindex":
            known = set(self.blocks.table[:, 0].tolist())
            places = [to.place(span.position) for span in self.spans if span.kind == "step" and span.start in known]
            self.blocks.respace([behind - place for place, behind in pairwise([*places, self.position])])

    def begin_answer(self, positions: torch.Tensor, angles: Angles, turned: Angles) -> None:
        """From here on everything that enters is a question and its answer.

        Args:
            positions: of the question's tokens, [streams, T] or [3, streams, T].
            angles: of the model's RoPE.
            turned: of how far steps have moved, [T] int64, as for `compact`.
        """
        c = self.config
        self.detailed.begin_answer()
        if isinstance(self.detailed, TieredCache):
            self.detailed.fetcher.turned = turned
        self._retrieved = None
        # Where no block is left out there is nothing to choose, nor to copy.
        if self.blocks is not None and len(self.blocks) > c.retrieve + c.retrieve_newest:
            carried = self.carried if c.retrieve_carried else None
            assert not isinstance(carried, DetailedCache)
            self._retrieved = RetrievedView(self.detailed, self.blocks, carried, c, angles, positions)

    def mark(self) -> Mark:
        """Remember this moment; O(1)."""
        carried = self.carried.length
        return Mark(self.tokens, self.position, carried, self.frames, self.origin_seconds, self.memories)

    def crop_to(self, mark: Mark) -> None:
        """Forget everything that came after a mark, as long as no step has evicted since; copies nothing."""
        self.carried.truncate(mark.carried)
        self.detailed.truncate(mark.tokens)
        self._retrieved = None
        if self.blocks is not None:
            self.blocks.truncate(mark.tokens)
        self.position, self.frames, self.origin_seconds = mark.position, mark.frames, mark.origin_seconds
        self.memories = mark.memories
        while self.spans and self.spans[-1].start >= mark.tokens:
            self.spans.pop()
        self.settle()

    def settle(self) -> None:
        """Let go of steps whose blocks have turned out to be damaged."""
        if isinstance(self.detailed, TieredCache):
            self._forget(self.detailed.settle())

    def fork(self) -> StreamState:
        """A second stream with the same past; neither sees what becomes of the other.

        The detailed cache's memory is shared for as long as that goes well (`DetailedCache.fork`), all else is copied.
        """
        found = replace(self, spans=list(self.spans))
        found.detailed = self.detailed.fork()
        found.outlived = set(self.outlived)
        found.blocks = self.blocks.fork() if self.blocks is not None else None
        found._carried = self._carried.fork(found.detailed) if self._carried is not None else None
        return found

    def free(self) -> None:
        """Give all memory back; the stream is empty and of no further use."""
        self._carried = self._retrieved = None
        self.detailed = DetailedCache(self.spec)
        self.blocks = StepIndex(self.spec) if self.blocks is not None else None
        self.memories = {}

    def _make_carried(self) -> CarriedCache:
        c = self.config
        rule = Rule(
            c.carry, sinks=c.sinks, seed=c.seed, pinned=self.pinned, value_norms=c.value_norms, coverage=c.coverage
        )
        capped = c.memory is not None
        return CarriedCache(self.spec, c.budget, rule, self.detailed, c.layer_slope, c.decay, remembers=capped)

    def _make_detailed(self) -> DetailedCache:
        c = self.config
        if c.memory is not None:
            return TieredCache(self.spec, c)
        return DetailedCache(self.spec, c.recall, window=c.budget, sinks=c.sinks)

    def _importance(self, starts: Sequence[int]) -> dict[int, float]:
        carried = self.carried
        assert isinstance(carried, CarriedCache)
        # Forgotten steps that are still carried count for themselves, and not for the step before them.
        known = carried.importance([span.start for span in self.spans if span.length])
        return {start: known[start][0] for start in starts if start in known}

    def _forget(self, starts: Sequence[int]) -> None:
        """Steps are gone from the detailed cache: so are their representatives, and their spans once nothing carries
        their keys any more, which would have to move with them."""
        if not starts:
            return
        if self.blocks is not None:
            self.blocks.forget(starts)
        carried, gone = self.carried, self.outlived | set(starts)
        assert isinstance(carried, CarriedCache)
        self.outlived = gone & carried.importance([span.start for span in self.spans if span.length]).keys()
        gone -= self.outlived
        self.spans = [span for span in self.spans if span.start not in gone or not span.length]

    @property
    def _least_budget(self) -> int:
        return min(layer_budgets(self.config.budget, self.spec.layers, self.config.layer_slope))

    @property
    def _told_budget(self) -> str:
        least = f" ({self._least_budget} in the smallest layer)" if self.config.layer_slope else ""
        return f"{self.config.budget}{least}"
