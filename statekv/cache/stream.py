"""Everything that one stream remembers, and how to go back to a mark."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice, pairwise
from typing import NoReturn

import torch

from statekv.cache.carried import CarriedCache
from statekv.cache.carry import policy_of
from statekv.cache.compaction import Compaction
from statekv.cache.detailed import AnswerCache, DetailedCache
from statekv.cache.policies.base import Policy
from statekv.cache.policies.wrappers import covering
from statekv.cache.retrieval import RetrievedView, StepIndex, StepIndexEntry
from statekv.cache.spec import KVSpec, Mark, Memory, PositionShift, Span
from statekv.cache.tiers.cache import TieredCache
from statekv.cache.tiers.window import WindowedCache
from statekv.cache.view import Entering, Mode, Rotary, View
from statekv.config import WINDOWS, Config
from statekv.errors import ConfigError, HorizonError
from statekv.ops.rope import Angles

_QUESTION_ROOM = 512  # positions that a stream leaves to a question, besides the longest answer


def room_for_answers(config: Config) -> int:
    """Positions that a question and its answer may take."""
    return _QUESTION_ROOM + config.max_new_tokens


def tensors_of(memory: Memory) -> Iterator[torch.Tensor]:
    """The tensors in a memory."""
    return (value for value in memory.values() if isinstance(value, torch.Tensor))


def _within(span: Span, tokens: range) -> bool:
    return span.start in tokens and span.start + span.length <= tokens.stop


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
        pairs: of queries and keys that met in its steps: in those that did not evict, and in those that did.
        memories: what those that reduce its steps remember of it, by name; replaced as a whole, never changed.
        words: the different tokens that have entered, for penalties on what was said before.
        rotary: of the model; None where nothing has to be turned.

    `expect` comes before everything that enters; `begin` and `commit` stand around it, and in between the model's
    layers work on what `begin` has handed out.
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
    pairs: tuple[int, int] = (0, 0)
    memories: Mapping[str, Memory] = field(default_factory=dict)
    words: frozenset[int] = frozenset()
    rotary: Rotary | None = field(default=None, compare=False)  # the same numbers in every engine on these weights

    def __post_init__(self) -> None:
        c = self.config
        self.policy: Policy | None = None
        self._carried: CarriedCache | None = None
        self._choose_policy()
        self.detailed = self._make_detailed()
        # Only retrieval needs them.
        self.blocks = StepIndex(self.spec) if c.recall == "retrieve" else None
        self.outlived: set[int] = set()  # starts of forgotten steps that are still carried
        self._retrieved: RetrievedView | None = None
        self._expected: Entering | None = None
        self._frequencies = None if self.rotary is None else self.rotary.frequencies(self.horizon)

    def __repr__(self) -> str:
        seen = f"{self.frames} frames, {self.tokens} tokens"
        return f"StreamState({self.config.method}, {seen}, position {self.position} of {self.horizon})"

    @property
    def carried(self) -> CarriedCache | DetailedCache:
        """What a step sees; with carry="all" that is the detailed cache itself."""
        return self.detailed if self.bounded is None else self.bounded

    @property
    def bounded(self) -> CarriedCache | None:
        """The carried cache, where there is one beside the detailed one."""
        if self._carried is None and self.policy is not None:
            self._carried = CarriedCache(self.spec, self.config.budget, self.policy, self.detailed)
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
            **self.detailed.bytes_by_tier,
        }

    @property
    def used(self) -> dict[str, int]:
        """Bytes of `nbytes` that tokens take; the rest is reserved for those to come."""
        token, detailed = self.spec.bytes_per_token * self.spec.streams, self.detailed
        carried = sum(self._carried.lengths) * token // self.spec.layers if self._carried is not None else 0
        return {**self.nbytes, "carried": carried, "detailed": min(detailed.lengths[-1] * token, detailed.nbytes)}

    @property
    def forgotten(self) -> int:
        """Steps that a cap on memory has left no room for."""
        return self.detailed.forgotten

    def expect(self, segment: Entering, mode: Mode = "carry") -> None:
        """Before a segment enters: pins and memory for it; asked again, the same.

        Raises:
            HorizonError: it would pass the stream's horizon.
            ConfigError: a pinned prefix that fills the budget, newest steps that do not fit into it, a cap on memory
                that is too small, or a model whose keys cannot be reindexed.
        """
        reach = self.horizon - (self.room if mode == "carry" else 0)
        if segment.reach > reach:
            raise HorizonError(
                f"position {segment.reach} is past {reach}, as far as RoPE reaches for this stream",
                f"open the stream with a `horizon` above {self.horizon}, or set `on_horizon` to 'compact'; "
                "questions about what was seen still work",
            )
        if segment.kind == "prefix":
            self.expect_prefix(segment.length)
        if segment.kind == "step":
            self._check_follows(segment)
        if mode == "carry":
            self.expect_newest(segment.kind, segment.length)
            if segment.kind != "prefix":
                self._make_way(segment.length)
        self._expected = segment

    def begin(self, segment: Entering, mode: Mode = "carry") -> View:
        """What the model's layers see while a segment enters that is expected; for an answer, see `begin_answer`."""
        assert self._expected is segment, "expect it first"
        if mode == "answer":
            return self.recalled
        if self.bounded is not None:
            self.bounded.open_slots(segment.length)
        return self.carried

    def commit(self, segment: Entering, mode: Mode = "carry") -> None:
        """Behind all layers: take note of a segment that has entered."""
        self._expected = None
        if segment.kind == "step" and self.blocks is not None:
            assert self.rotary is not None
            step = StepIndexEntry(self.tokens - segment.length, self.tokens, segment.next_position - self.position)
            self.blocks.add(self.detailed, step, *self.rotary.angles(segment.positions, self.horizon))
        self.note(segment.kind, segment.length, segment.pts_seconds, self.uncompacted(segment.moment))
        self.position = segment.next_position
        if not segment.words <= self.words:
            self.words |= segment.words
        if mode == "carry":
            self.frames += segment.frames
            if self.origin_seconds is None:
                self.origin_seconds = segment.pts_seconds

    def expect_prefix(self, tokens: int) -> None:
        """Say how long the prompt's prefix is before it enters, so that it can be pinned.

        Raises:
            ConfigError: the pinned prefix alone fills the budget.
        """
        if not self.config.pin_prefix or self.policy is None:
            return
        assert not self.tokens, "the prefix comes first"
        if tokens >= self._least_budget:
            raise ConfigError(
                f"budget is {self._told_budget}, but the pinned prefix alone takes {tokens} tokens",
                f"raise budget above {tokens} or leave the prefix unpinned",
            )
        self.pinned = tokens
        self._choose_policy()

    def expect_newest(self, kind: str, tokens: int) -> None:
        """Say what enters before it does, so that the newest steps can be pinned.

        Raises:
            ConfigError: the newest steps do not fit into the part of the budget that goes by score.
        """
        pinned, carried = self.config.pin_newest, self.bounded
        if not pinned or carried is None:
            return
        own = kind == "step"
        before = islice((span.start for span in reversed(self.spans) if span.kind == "step"), pinned - own)
        first = min((*before, self.tokens if own else self.tokens + tokens))
        taken, room = self.tokens + tokens - first, self._chosen
        if taken > room:
            raise ConfigError(
                f"pin_newest is {pinned} with a budget of {self._told_budget}, but these steps take {taken} tokens "
                f"where {room} go by score",
                "raise budget or lower pin_newest",
            )
        carried.pin_from(first)

    def _make_way(self, tokens: int) -> None:
        """Before a step: where memory does not grow, have older ones leave it or be forgotten."""
        before = self.detailed.dropped
        gone = self.detailed.make_way(tokens, room_for_answers(self.config), self._importance)
        if self.detailed.dropped != before:
            gone = [span.start for span in self.spans if span.kind == "step" and _within(span, self.detailed.dropped)]
        self._forget(gone)
        if self.blocks is not None:
            self.blocks.most = self.detailed.most_steps

    def note(self, kind: str, length: int, pts_seconds: float | None, position: int) -> None:
        """Record that `length` tokens of a segment have just entered, uncompacted at `position`."""
        start, budget = self.tokens - length, None if self.policy is None else self.config.budget
        self.spans.append(Span(kind, start, length, pts_seconds, position))
        self.detailed.note(kind, length)
        keys = length + (start if budget is None else min(start, budget))
        kept, evicting = self.pairs
        evicts = budget is not None and keys > budget
        self.pairs = (kept, evicting + length * keys) if evicts else (kept + length * keys, evicting)

    def uncompacted(self, moment: int | None) -> int:
        """Where a segment that comes next, at a moment of its own or None, would begin without any compaction."""
        return (self.position if moment is None else moment) + self.compaction.gained

    def close_up(self, step: Entering) -> bool:
        """Where a step would pass the range of a stream that compacts, move older ones closer together.

        Returns:
            Whether they have moved, and the step's own positions with them.

        Raises:
            HorizonError: the range is too small for such steps; nothing has changed.
        """
        reach = self.horizon - self.room
        if not self.compacts or step.reach <= reach or not self.frames:
            return False
        place = self.uncompacted(step.moment)
        to = self._compacted(place, reach)
        behind = to.place(place) + step.reach - (place - self.compaction.gained)
        if behind > reach:
            raise HorizonError(
                f"with a horizon of {self.horizon}, steps may take {reach} positions; older ones compacted, "
                f"this one would need {behind}",
                f"open the stream with a `horizon` above {self.horizon + behind - reach}, or with smaller pictures",
            )
        self.compact(to)
        return True

    def _compacted(self, position: int, reach: int) -> Compaction:
        """What would make room for a step, uncompacted at `position`, in a stream that may take `reach` positions."""
        first = self.spans[0].length if self.spans and self.spans[0].kind == "prefix" else 0
        return self.compaction.next(position, first, reach)

    def compact(self, to: Compaction) -> None:
        """Move steps closer together, once and for all: their keys in both memories are rotated further, in place.

        Args:
            to: where they stand from now on.
        """
        assert self.rotary is not None
        angles: Angles = partial(self.rotary.moved, horizon=self.horizon)
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
            if self.bounded is not None:
                self.bounded.rotate(moves, angles)
        if not self.rotary.own_time:  # else the next position follows the text, which stays
            self.position -= to.gained - self.compaction.gained
        self.compaction = to
        if self.blocks is not None and self.config.retrieve_positions == "reindex":
            known = set(self.blocks.table[:, 0].tolist())
            places = [to.place(span.position) for span in self.spans if span.kind == "step" and span.start in known]
            self.blocks.respace([behind - place for place, behind in pairwise([*places, self.position])])

    def begin_answer(self, positions: torch.Tensor) -> None:
        """From here on everything that enters is a question and its answer.

        Args:
            positions: of the question's tokens, [streams, T] or [3, streams, T].
        """
        c = self.config
        assert self.rotary is not None
        self.detailed.begin_answer(partial(self.rotary.moved, horizon=self.horizon))
        self._retrieved = None
        # Where no block is left out there is nothing to choose, nor to copy.
        if self.blocks is not None and len(self.blocks) > c.retrieve + c.retrieve_newest:
            angles: Angles = partial(self.rotary.angles, horizon=self.horizon)
            carried = self.bounded if c.retrieve_carried else None
            self._retrieved = RetrievedView(self.detailed, self.blocks, carried, c, angles, positions)

    def apart(self, mark: Mark) -> StreamState:
        """Once a question has entered: what its answer goes on with, so that the stream may be cropped and go on.

        Where the stream's memory has a cap, that is the stream itself, which has no room for both.

        Args:
            mark: where the stream stood before it, and is cropped to next.
        """
        if self.config.memory is not None:
            return self
        found = replace(self, spans=[])
        found.blocks, found.detailed = None, AnswerCache(self.detailed, mark.tokens)
        if self._retrieved is not None:
            found._retrieved, self._retrieved = self._retrieved, None
            found._retrieved.detailed = found.detailed
        return found

    def mark(self) -> Mark:
        """Remember this moment; O(1)."""
        carried = self.carried.length
        beside = self.memories, self.words, self.pairs
        return Mark(self.tokens, self.position, carried, self.frames, self.origin_seconds, *beside)

    def __reduce_ex__(self, _: object) -> NoReturn:
        raise ConfigError("a StreamState cannot be copied or pickled", "fork it, or save its session")

    @torch.inference_mode()  # as whatever it takes back was written
    def crop_to(self, mark: Mark) -> None:
        """Forget everything that came after a mark, as long as no step has evicted since; copies nothing."""
        self.carried.truncate(mark.carried)
        self.detailed.truncate(mark.tokens)
        self._retrieved = None
        if self.blocks is not None:
            self.blocks.truncate(mark.tokens)
        self.position, self.frames, self.origin_seconds = mark.position, mark.frames, mark.origin_seconds
        self.memories, self.words, self.pairs = mark.memories, mark.words, mark.pairs
        while self.spans and self.spans[-1].start >= mark.tokens:
            self.spans.pop()
        self.settle()

    @torch.inference_mode()
    def settle(self) -> None:
        """Let go of steps whose blocks have turned out to be damaged."""
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

    def _choose_policy(self) -> None:
        """Before anything is carried."""
        self.policy = None if self.config.carry == "all" else policy_of(self.config, self.pinned)
        self._carried = None

    def _make_detailed(self) -> DetailedCache:
        c = self.config
        if self.policy is not None and c.recall in WINDOWS:
            return WindowedCache(self.spec, c, self.policy)
        if c.memory is not None:
            assert self.policy is not None, "a cap goes with a budget"
            return TieredCache(self.spec, c, self.policy)
        return DetailedCache(self.spec, c.recall, window=c.budget, sinks=c.recalled_sinks)

    def _importance(self, starts: Sequence[int]) -> dict[int, float]:
        carried = self.bounded
        assert carried is not None, "a cap goes with a budget"
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
        carried, gone = self.bounded, self.outlived | set(starts)
        assert carried is not None, "a cap goes with a budget"
        self.outlived = gone & carried.held_of([span.start for span in self.spans if span.length])
        gone -= self.outlived
        # A gap has the number of the step behind it, and goes with that.
        self.spans = [span for span in self.spans if span.start not in gone]

    def _check_follows(self, step: Entering) -> None:
        """Closing up needs steps that take positions of their own, with whatever comes next behind them."""
        reindexed = self.config.recall == "retrieve" and self.config.retrieve_positions == "reindex"
        if reindexed and step.next_position <= self.position:
            raise ConfigError(
                "retrieve_positions is 'reindex', but this model counts the time of its steps beside its text",
                "set retrieve_positions to 'keep'",
            )

    @property
    def _least_budget(self) -> int:
        assert self.policy is not None
        return min(self.policy.layer_budgets(self.config.budget, self.spec.layers))

    @property
    def _chosen(self) -> int:
        """How many keys of the smallest layer go by score, newest steps among them."""
        assert self.policy is not None
        c, least = self.config, self._least_budget
        first = max(self.pinned, self.policy.sinks if c.sinks is None else c.sinks)
        return least - first - covering(c.coverage, least, self.pinned)

    @property
    def _told_budget(self) -> str:
        least = f" ({self._least_budget} in the smallest layer)" if self.config.layer_slope else ""
        return f"{self.config.budget}{least}"
