"""One loaded model at work: a segment into a stream's memory, a question into tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any, Literal

import torch

from statekv.cache.batched import StaticCarriedCache
from statekv.cache.carried import CarriedCache
from statekv.cache.detailed import DetailedCache
from statekv.cache.retrieval import RetrievedView, StepIndexEntry
from statekv.cache.spec import Memory
from statekv.cache.stream import StreamState
from statekv.cache.tiers.cache import TieredCache
from statekv.config import REDUCERS, Config, load_named
from statekv.errors import ConfigError, HorizonError, MemoryLimitError
from statekv.models.adapter import Segment, VideoModel
from statekv.models.encoded import EncodedStep
from statekv.models.hooks import Observer, Pass, take_attention
from statekv.ops import implementation
from statekv.reduce.base import Reducer, reduced
from statekv.runner.batching import StepBatches, joined
from statekv.runner.cuda_graph import StepGraphs
from statekv.runner.decoding import SamplingParams
from statekv.runner.memory import Admission, memory_limit
from statekv.runner.packing import StepProducts
from statekv.video.frame import Frame

# carry: part of the stream. peek: sees what a step sees, but leaves the carried cache as it is.
# answer: sees what an answer sees.
Mode = Literal["carry", "peek", "answer"]


# Positions that a stream leaves to a question, besides the longest answer.
_QUESTION_ROOM = 512
_LABEL_GROWTH = 4  # tokens that the label of a late frame has more than that of the first


_REDUCE = "reduce"  # where the reducer's memory is among those of a stream


def with_reducer(config: Config) -> Config:
    """The same settings with the reducer itself in place of its spelling.

    Raises:
        ConfigError: there is no such reducer, or it does not take such parameters.
    """
    if config.reduce is None or isinstance(config.reduce, Reducer):
        return config
    return config.with_(reduce=load_named(config.reduce, REDUCERS, "`reduce`", Reducer))


def room_for_answers(config: Config) -> int:
    """Positions that a question and its answer may take."""
    return _QUESTION_ROOM + config.max_new_tokens


class ModelRunner:
    """Runs segments through a model, whose attention it routes through the hook and keeps there.

    Threads take turns with the model, segment by segment; each stream belongs to one thread at a time.

    Args:
        model: maker of segments, and the weights.
        graphs: what replays steps; None: CUDA graphs on a CUDA device.
    """

    def __init__(self, model: VideoModel, graphs: StepGraphs | None = None) -> None:
        self.model = model
        self.graphs = StepGraphs() if graphs is None else graphs
        self.products = StepProducts(model.language_model.layers)
        self.batches = StepBatches()
        self.admission = Admission()

    def open(
        self,
        config: Config,
        horizon: int | None = None,
        frames_expected: int | None = None,
        room: int | None = None,
        compacts: bool = False,
    ) -> StreamState:
        """An empty stream.

        Args:
            config: dials, budget and the rest.
            horizon: positions to scale RoPE for; None: the trained length.
            frames_expected: frames of the whole video, where known.
            room: positions below the horizon that steps leave to questions; None: enough for most.
            compacts: whether steps move closer together once the horizon is reached.

        Raises:
            ConfigError: the kernel that was asked for cannot run here, or there is no such reducer.
        """
        self.check_kernel(config)
        config = with_reducer(config)
        horizon = config.horizon or horizon or self.model.trained_length
        if room is None:
            room = min(room_for_answers(config), horizon // 4)
        return StreamState(self.model.kv_spec(), config, horizon, frames_expected, room, compacts=compacts)

    @torch.inference_mode()
    def encode(self, steps: Sequence[Sequence[Frame]], frames_expected: int | None) -> list[EncodedStep]:
        """Send the pictures of several steps, of one stream or of many, through the vision tower together.

        Args:
            steps: as for `VideoModel.encode`.
            frames_expected: frames of the whole video where that is known; some families size pictures by it.

        Raises:
            MemoryLimitError: the device is out of memory.
        """
        with self.model.lock, memory_limit():
            return self.model.encode(steps, frames_expected)

    @torch.inference_mode()
    def segments_of(self, state: StreamState, seen: EncodedStep, compact: bool = True) -> list[Segment]:
        """Segments of a step whose turn has come, reduced as the stream's settings say.

        Args:
            state: the stream. What its reducer remembers moves on; where it compacts, older steps may move.
            seen: what `encode` made of the step's pictures.
            compact: whether room is made first where the range of a stream that compacts is used up.

        Raises:
            HorizonError: that range is too small for such steps; nothing has changed.
            ConfigError: what the reducer made of the step cannot enter; nothing has changed.
        """
        with self.model.lock:
            step, memories = self._reduced(state, seen)
            entering = self._with_room(state, step) if compact else self.model.segments_of(step, state)
        state.memories = memories
        return entering

    def segments_of_inputs(self, state: StreamState, inputs: Mapping[str, Any]) -> Iterator[Segment]:
        """A stock processor's inputs cut into segments, vision computed piece by piece; each picture is reduced."""

        def reduce(seen: EncodedStep) -> EncodedStep:
            step, state.memories = self._reduced(state, seen)
            return step

        return self.model.segments(inputs, reduce)

    def _reduced(self, state: StreamState, seen: EncodedStep) -> tuple[EncodedStep, Mapping[str, Memory]]:
        """A step after the stream's reducer, and what the stream remembers from then on."""
        reducer: Reducer | None = with_reducer(state.config).reduce  # type: ignore[assignment]
        if reducer is None:
            return seen, state.memories
        step, memory = reduced(reducer, seen, state.memories.get(_REDUCE, {}))
        return step, {**state.memories, _REDUCE: memory}

    def _with_room(self, state: StreamState, seen: EncodedStep) -> list[Segment]:
        entering, reach = self.model.segments_of(seen, state), state.horizon - state.room
        step = entering[-1]
        if not state.compacts or step.reach <= reach or not state.frames:
            return entering
        place = state.uncompacted(step.moment)
        to = state.compacted(place, reach)
        behind = to.place(place) + step.reach - (place - state.compaction.gained)
        if behind > reach:
            raise HorizonError(
                f"with a horizon of {state.horizon}, steps may take {reach} positions; older ones compacted, "
                f"this one would need {behind}",
                f"open the stream with a horizon above {state.horizon + behind - reach}, or with smaller pictures",
            )
        state.compact(to, partial(self._angles, state), self.model.own_time)
        return self.model.segments_of(seen, state)

    def _angles(self, state: StreamState, by: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What keys are turned by whose steps move so far, [T] on the CPU."""
        return self.model.rope.angles(self.model.displacement(by.to(self.model.model.device)), state.horizon)

    def check_kernel(self, config: Config) -> None:
        """Raise the ConfigError of a kernel that cannot run here before the work instead of in it."""
        spec = self.model.kv_spec()
        if config.carry == "attention":
            implementation(config.kernel, spec.devices[0], spec.dtype, spec.head_dim)

    @torch.inference_mode()
    def prefill(
        self, state: StreamState, segment: Segment, mode: Mode = "carry", observer: Observer | None = None
    ) -> torch.Tensor:
        """Run a segment through the language model and remember it.

        Args:
            state: the stream; both memories, position and spans move on.
            segment: what enters.
            mode: see `Mode`.
            observer: told every layer's key scores; it sees what happens and changes nothing.

        Returns:
            [streams, T, hidden], the last layer's normalised hidden states.

        Raises:
            HorizonError: the segment would pass the stream's horizon; nothing has entered.
            ConfigError: a pinned prefix that fills the budget, newest steps that do not fit into it, or a model whose
                keys cannot be reindexed; nothing has entered.
            MemoryLimitError: the device is out of memory.
        """
        with self.model.lock:
            self.check(state, segment, mode)
            take_attention(self.model.model)
            packed = self.products.around(state, segment) if state.config.pack and mode == "carry" else nullcontext()
            with self.model.rope.held(state.horizon), memory_limit(), packed:
                if segment.kind == "question":
                    angles = partial(self.model.rope.angles, horizon=state.horizon)
                    state.begin_answer(segment.positions, angles, partial(self._angles, state))
                hidden = self._run(state, segment, mode, observer)
            self.commit(state, segment, mode)
        return hidden

    def check(self, state: StreamState, segment: Segment, mode: Mode = "carry") -> None:
        """Before a segment enters: raise what `prefill` would, and let the stream know what comes."""
        reach = state.horizon - (state.room if mode == "carry" else 0)
        if segment.reach > reach:
            raise HorizonError(
                f"position {segment.reach} is past {reach}, as far as RoPE reaches for this stream",
                f"open the stream with a horizon above {state.horizon}, or with on_horizon='compact'; "
                "questions about what was seen still work",
            )
        if segment.kind == "prefix":
            state.expect_prefix(segment.length)
        if segment.kind == "step":
            _check_follows(state, segment)
        if mode == "carry":
            state.expect_newest(segment.kind, segment.length)
            if segment.kind != "prefix":
                state.make_way(segment.length, room_for_answers(state.config))

    def commit(self, state: StreamState, segment: Segment, mode: Mode = "carry") -> None:
        """Behind all layers: take note of a segment that has entered."""
        if segment.kind == "step":
            with memory_limit():
                self._index(state, segment)
        state.note(segment.kind, segment.length, segment.pts_seconds, state.uncompacted(segment.moment))
        state.position = segment.next_position
        if mode == "carry":
            state.frames += segment.frames
            if state.origin_seconds is None:
                state.origin_seconds = segment.pts_seconds

    def _index(self, state: StreamState, segment: Segment) -> None:
        """Let questions find a step that has just entered."""
        if state.blocks is not None:
            block = StepIndexEntry(state.tokens - segment.length, state.tokens, segment.next_position - state.position)
            state.blocks.add(state.detailed, block, *self.model.rope.angles(segment.positions, state.horizon))

    def _run(self, state: StreamState, segment: Segment, mode: Mode, observer: Observer | None) -> torch.Tensor:
        forward = partial(self.forward, config=state.config, observer=observer)
        cache = state.recalled if mode == "answer" else state.carried
        evicting = False
        if isinstance(cache, CarriedCache):
            cache.make_room(segment.length)
            evicting = mode == "carry" and cache.must_evict(segment.length)
            # Steps that lose tokens are of many lengths: recordings of all of them would fill the device.
            steady = segment.kept is None and observer is None
            if evicting and steady and state.config.graph and self.graphs.fits(cache, segment):
                return self.graphs.step(cache, segment, partial(forward, evicting=True))
        return forward(segment.embeds, segment.positions, segment.extras, cache, evicting=evicting)

    def forward(
        self,
        embeds: torch.Tensor,
        positions: torch.Tensor,
        extras: dict[str, Any],
        cache: CarriedCache | DetailedCache | RetrievedView | StaticCarriedCache,
        *,
        evicting: bool,
        config: Config,
        observer: Observer | None = None,
    ) -> torch.Tensor:
        """The language model on embeddings, with a cache; see `Segment` for shapes."""
        run = Pass(
            evicting=cache if evicting and isinstance(cache, (CarriedCache, StaticCarriedCache)) else None,
            scored=evicting and config.carry == "attention",
            kernel=config.kernel,
            score_every=config.score_every,
            retrieved=cache if isinstance(cache, RetrievedView) else None,
            tiered=cache if isinstance(cache, TieredCache) and len(cache.manager) else None,
            observer=observer,
        )
        hidden: torch.Tensor = self.model.language_model(
            inputs_embeds=embeds,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            statekv_pass=run,
            **extras,
        ).last_hidden_state
        return hidden

    def reserve(self, state: StreamState) -> None:
        """Once a step has entered: where the video's length is known, allocate the detailed cache once."""
        if state.frames_expected is None:
            return
        frames = max(0, state.frames_expected - state.frames)
        steps = -(-frames // self.model.frames_per_step)
        longest = state.spans[-1].length + _LABEL_GROWTH
        # A video too long for the memory is watched as far as it goes.
        with self.model.lock, suppress(MemoryLimitError), memory_limit():
            state.detailed.reserve(state.tokens + steps * longest + room_for_answers(state.config))

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[streams, T, hidden] → [streams, vocabulary] of the last position."""
        with self.model.lock:
            found: torch.Tensor = self.model.model.get_output_embeddings()(hidden[:, -1])
        return found

    @torch.inference_mode()
    def answer(
        self, state: StreamState, question: Segment, sampling: SamplingParams, prompt: torch.Tensor | None = None
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Decode an answer token by token; the caller crops the stream back to its mark afterwards.

        An answer that arrives at the stream's horizon ends there.

        Args:
            state: the stream; grows by question and answer.
            question: text that ends where the answer begins.
            sampling: how to choose tokens and when to stop.
            prompt: [streams, T] tokens that a repetition penalty looks at; None: the question's.

        Yields:
            Each token, end of turn included, with the logits [streams, vocabulary] that it was chosen from.
        """
        segment, prompt = question, question.ids if prompt is None else prompt
        asked = prompt.shape[1]
        chosen = prompt.new_empty(prompt.shape[0], asked + sampling.max_new_tokens)
        chosen[:, :asked] = prompt
        longest = min(sampling.max_new_tokens, state.horizon - question.next_position)
        with self.model.lock, memory_limit():
            state.detailed.make_room(question.length + max(0, longest))  # not in the middle of an answer
        for number in range(sampling.max_new_tokens):
            logits = self.logits(self.prefill(state, segment, "answer"))
            token = sampling.choose(chosen[:, : asked + number], logits)  # [streams]
            yield int(token), logits
            if int(token) in sampling.end_tokens or state.position >= state.horizon:
                return
            chosen[:, asked + number] = token
            segment = self.model.token(token, state)


def _check_follows(state: StreamState, segment: Segment) -> None:
    """Closing up needs steps that take positions of their own, with whatever comes next behind them."""
    dials = state.config
    if dials.recall == "retrieve" and dials.retrieve_positions == "reindex" and segment.next_position <= state.position:
        raise ConfigError(
            "retrieve_positions is 'reindex', but this model counts the time of its steps beside its text",
            "set retrieve_positions to 'keep'",
        )


@torch.inference_mode()
def gather_batch(runner: ModelRunner, states: Sequence[StreamState]) -> bool:
    """Bring the carried caches of some streams into one block; False where there is no memory for that.

    Args:
        runner: of all of them.
        states: whose steps are of one likeness. In the order of the last time nothing is copied.
    """
    try:
        with runner.model.lock, memory_limit():
            runner.batches.block(states)
    except MemoryLimitError:
        return False
    return True


@torch.inference_mode()
def prefill_batch(runner: ModelRunner, states: Sequence[StreamState], segments: Sequence[Segment]) -> torch.Tensor:
    """As `ModelRunner.prefill` for each stream, but for the rounding of larger products.

    Products, attention, key scores and eviction run once for all of them; what is entered into the detailed caches is
    entered one by one. CUDA graphs and packed weights are for streams alone.

    Args:
        runner: of all of them.
        states: gathered.
        segments: a step of each, of one likeness.

    Returns:
        [streams, T, hidden], the last layer's normalised hidden states.

    Raises:
        HorizonError, ConfigError: as `ModelRunner.check`; nothing has entered.
        MemoryLimitError: the device is out of memory; no stream can be stepped any further.
    """
    with runner.model.lock:
        for state, segment in zip(states, segments, strict=True):
            runner.check(state, segment)
        take_attention(runner.model.model)
        whole, config = joined(segments), states[0].config
        with runner.model.rope.held(states[0].horizon), memory_limit():
            block = runner.batches.block(states)
            block.begin()
            try:
                block.make_room(whole.length)
                evicting = block.must_evict(whole.length)
                hidden = runner.forward(
                    whole.embeds, whole.positions, whole.extras, block, evicting=evicting, config=config
                )
            finally:
                block.end()
        for state, segment in zip(states, segments, strict=True):
            runner.commit(state, segment)
    return hidden
