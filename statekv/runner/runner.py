"""One loaded model at work: a segment into a stream's memory, a question into tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch

from statekv.cache.carry import policy_of, tried
from statekv.cache.policies.base import Policy
from statekv.cache.spec import Memory
from statekv.cache.stream import StreamState, room_for_answers
from statekv.cache.view import Mode, View
from statekv.config import CARRIES, REDUCERS, Config
from statekv.config.spelling import load_named
from statekv.errors import MemoryLimitError
from statekv.models.adapter import Segment, VideoModel
from statekv.models.encoded import EncodedStep
from statekv.models.hooks import Observer, Pass, take_attention
from statekv.ops import implementation
from statekv.reduce.base import Reducer, reduced
from statekv.runner.batching import StepBatches, joined
from statekv.runner.cuda_graph import StepGraphs
from statekv.runner.decoding import SamplingParams
from statekv.runner.lock import FairLock
from statekv.runner.memory import Admission, memory_limit
from statekv.video.frame import Frame

_LABEL_GROWTH = 4  # tokens that the label of a late frame has more than that of the first


_REDUCE = "reduce"  # where the reducer's memory is among those of a stream


def with_methods(config: Config, names: Sequence[str] = ("carry", "reduce")) -> Config:
    """The same settings with policy and reducer themselves in place of their spellings; plain names of policies stay.

    So a save notes all parameters, and a stream opened by a spelling is like one opened by the object.

    Raises:
        ConfigError: there is no such policy or reducer, or it does not take such parameters.
    """
    for name, table, kind in (("carry", CARRIES, Policy), ("reduce", REDUCERS, Reducer)):
        given = getattr(config, name)
        plain = given is None or (name == "carry" and given in (*CARRIES, "all"))
        if name in names and not plain and not isinstance(given, kind):
            config = config.with_(**{name: load_named(given, table, f"`{name}`", kind)})
    return config


class ModelRunner:
    """Runs segments through a model, whose attention it routes through the hook and keeps there.

    Threads take turns with the model, segment by segment; each stream belongs to one thread at a time.

    Args:
        graphs: what replays steps; None: CUDA graphs on a CUDA device.

    Attributes:
        lock: whoever runs the model holds it: attention and rotary frequencies are set for one at a time.
    """

    def __init__(self, model: VideoModel, graphs: StepGraphs | None = None) -> None:
        self.model = model
        self.lock = FairLock()
        self.graphs = StepGraphs() if graphs is None else graphs
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
            horizon: positions to scale RoPE for; None: the trained length.
            frames_expected: frames of the whole video, where known.
            room: positions below the horizon that steps leave to questions; None: enough for most.
            compacts: whether steps move closer together once the horizon is reached.

        Raises:
            ConfigError: the kernel that was asked for cannot run here, or there is no such policy or reducer.
            PolicyError: a policy of the user's own fails, or gives what cannot be used.
        """
        config = with_methods(config)
        self.check(config)
        horizon = config.horizon or horizon or self.model.trained_length
        if room is None:
            room = min(room_for_answers(config), horizon // 4)
        spec, rotary = self.model.kv_spec(), self.model
        return StreamState(spec, config, horizon, frames_expected, room, compacts=compacts, rotary=rotary)

    @torch.inference_mode()
    def check(self, config: Config) -> None:
        """Raise the error of a kernel or of a policy that cannot run here before the work instead of in it."""
        if config.carry == "all":
            return
        spec, policy = self.model.kv_spec(), policy_of(config)
        if policy.needs_attention:
            implementation(config.kernel, spec.devices[0], spec.dtype, spec.head_dim)
        keys = torch.empty(1, spec.kv_heads, 1, spec.head_dim, dtype=spec.dtype, device=spec.devices[0])
        tried(policy, config.budget, spec.layers, keys)

    @torch.inference_mode()
    def encode(self, steps: Sequence[Sequence[Frame]], frames_expected: int | None) -> list[EncodedStep]:
        """What the vision tower makes of the pictures of several steps, of one stream or of several; a MemoryLimitError
        where that takes too much.
        """
        with self.lock, memory_limit():
            return self.model.encode(steps, frames_expected)

    @torch.inference_mode()
    def segments_of(self, state: StreamState, seen: EncodedStep, compact: bool = True) -> list[Segment]:
        """Segments of a step whose turn has come, at the stream's next position, reduced as its settings say.

        Args:
            state: the stream. What its reducer remembers moves on; where it compacts, older steps may move.
            seen: what `encode` made of the step's pictures.
            compact: whether room is made first where the range of a stream that compacts is used up.

        Raises:
            HorizonError: that range is too small for such steps; nothing has changed.
            ConfigError: what the reducer made of the step cannot enter; nothing has changed.
        """
        with self.lock:
            step, memories = self._reduced(state, seen)
            segments = self.model.segments_of(step, state)
            if compact and state.close_up(segments[-1]):
                segments = self.model.segments_of(step, state)
        state.memories = memories
        return segments

    def segments_of_inputs(self, state: StreamState, inputs: Mapping[str, Any]) -> Iterator[Segment]:
        """A stock processor's inputs cut into segments, vision computed piece by piece; each picture is reduced."""

        def reduce(seen: EncodedStep) -> EncodedStep:
            step, state.memories = self._reduced(state, seen)
            return step

        return self.model.segments(inputs, reduce)

    @torch.inference_mode()
    def enter(
        self, state: StreamState, segment: Segment, mode: Mode = "carry", observer: Observer | None = None
    ) -> torch.Tensor:
        """Find room for a segment, and `prefill` it; what is returned is the same.

        Args:
            state: the stream. Where its memory has a cap, older steps may move or be forgotten.

        Raises:
            HorizonError, ConfigError: as `StreamState.expect`; nothing has entered.
            MemoryLimitError, PolicyError: as `prefill`.
        """
        with self.lock, memory_limit():
            state.expect(segment, mode)
            return self.prefill(state, segment, mode, observer)

    @torch.inference_mode()
    def prefill(
        self, state: StreamState, segment: Segment, mode: Mode = "carry", observer: Observer | None = None
    ) -> torch.Tensor:
        """Run a segment through the language model and remember it: the method, arXiv 2605.31598, section 3.

        In each layer and KV head the segment's queries attend to all carried keys, and to its own ones causally; what
        attention a key receives from them is its score; own keys and values are appended to the detailed cache; and of
        carried and own keys, where they are more than the budget, those with the highest scores are carried on
        (`attention_hook`, `CarriedCache.evict`).

        Args:
            state: the stream; both memories, position and spans move on.
            segment: what enters; the stream expects it (`StreamState.expect`).
            observer: told every layer's key scores; it sees what happens and changes nothing.

        Returns:
            [streams, T, hidden], the last layer's normalised hidden states.

        Raises:
            MemoryLimitError: the device is out of memory.
            PolicyError: a policy of the user's own gave something that cannot be used.
        """
        with self._at_work(state.horizon):
            view = state.begin(segment, mode)  # what the layers see, with slots for the segment
            evicting = mode == "carry" and view.must_evict(segment.length)
            hidden = self._layers(state, segment, view, evicting, observer)
            state.commit(segment, mode)  # position and spans move on
        return hidden

    @torch.inference_mode()
    def prefill_batch(self, states: Sequence[StreamState], segments: Sequence[Segment]) -> torch.Tensor:
        """As `prefill` for each stream, but for the rounding of larger products.

        Products, attention, key scores and eviction run once for all of them; what is entered into the detailed caches
        is entered one by one. CUDA graphs are for streams alone.

        Returns:
            [streams, T, hidden], the last layer's normalised hidden states.

        Raises:
            HorizonError, ConfigError: as `StreamState.expect`; nothing has entered.
            MemoryLimitError: the device is out of memory; no stream can be stepped any further.
        """
        with self._at_work(states[0].horizon):
            for state, segment in zip(states, segments, strict=True):
                state.expect(segment)
            whole, block = joined(segments), self.batches.block(states)
            with block.stepping(whole.length):
                forward = partial(self._forward, config=states[0].config, view=block)
                hidden = forward(whole.embeds, whole.positions, whole.extras, evicting=block.must_evict(whole.length))
            for state, segment in zip(states, segments, strict=True):
                state.commit(segment)
        return hidden

    @torch.inference_mode()
    def gather_batch(self, states: Sequence[StreamState]) -> bool:
        """Bring the carried caches of some streams, whose steps are of one `batch_key`, into one block; False where
        there is no memory for that. In the order of the last time nothing is copied.
        """
        try:
            with self.lock, memory_limit():
                self.batches.block(states)
        except MemoryLimitError:
            return False
        return True

    def _reduced(self, state: StreamState, seen: EncodedStep) -> tuple[EncodedStep, Mapping[str, Memory]]:
        """A step after the stream's reducer, and what the stream remembers from then on."""
        reducer: Reducer | None = with_methods(state.config, ["reduce"]).reduce  # type: ignore[assignment]
        if reducer is None:
            return seen, state.memories
        step, memory = reduced(reducer, seen, state.memories.get(_REDUCE, {}))
        return step, {**state.memories, _REDUCE: memory}

    @contextmanager
    def _at_work(self, horizon: int) -> Iterator[None]:
        """The model is ours, its attention the hook's, its frequencies the stream's; out of memory is one error."""
        with self.lock, memory_limit():
            take_attention(self.model.model)
            with self.model.rope.held(horizon):
                yield

    def _layers(
        self, state: StreamState, segment: Segment, view: View, evicting: bool, observer: Observer | None
    ) -> torch.Tensor:
        forward = partial(self._forward, config=state.config, evicting=evicting, observer=observer)
        # Steps that lose tokens are of many lengths: recordings of all of them would fill the device.
        replays = evicting and observer is None and segment.kept is None and state.config.graph
        if replays and state.bounded is not None and self.graphs.fits(state.bounded, segment):
            return self.graphs.step(state.bounded, segment, forward)
        return forward(segment.embeds, segment.positions, segment.extras, view)

    def _forward(
        self,
        embeds: torch.Tensor,
        positions: torch.Tensor,
        extras: dict[str, Any],
        view: View,
        *,
        evicting: bool,
        config: Config,
        observer: Observer | None = None,
    ) -> torch.Tensor:
        """The language model on embeddings, with a cache; see `Segment` for shapes."""
        scored = evicting and view.needs_attention
        hidden: torch.Tensor = self.model.language_model(
            inputs_embeds=embeds,
            position_ids=positions,
            past_key_values=view,
            use_cache=True,
            statekv_pass=Pass(view, evicting, scored, config.kernel, config.score_every, observer),
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
        with self.lock, suppress(MemoryLimitError), memory_limit():
            state.detailed.reserve(state.tokens + steps * longest + room_for_answers(state.config))

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[streams, T, hidden] → [streams, vocabulary] of the last position."""
        with self.lock:
            found: torch.Tensor = self.model.model.get_output_embeddings()(hidden[:, -1])
        return found

    @torch.inference_mode()
    def ask(self, state: StreamState, question: Segment, answer: int = 0) -> torch.Tensor:
        """[streams, vocabulary]: what the first token of the answer is chosen from.

        Args:
            state: the stream; the caller crops it back to its mark afterwards.
            answer: tokens of the longest answer, for which room is made with that for the question.

        Raises:
            HorizonError, MemoryLimitError: as `prefill`.
        """
        longest = min(answer, state.horizon - question.next_position)
        with self.lock, memory_limit():
            state.detailed.make_room(question.length + max(0, longest))  # not in the middle of an answer
            state.begin_answer(question.positions)
            return self.logits(self.enter(state, question, "answer"))

    @torch.inference_mode()
    def decode(
        self, state: StreamState, logits: torch.Tensor, sampling: SamplingParams, prompt: torch.Tensor
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Decode an answer token by token; it ends at the stream's horizon, if not before.

        Args:
            state: that was asked, or what is apart from it (`StreamState.apart`); grows by the answer.
            logits: what `ask` has returned.
            prompt: [streams, T] tokens that penalties look at.

        Yields:
            Each token, end of turn included, with the logits [streams, vocabulary] that it was chosen from.
        """
        sampler = sampling.begin(self.model.generator, prompt)
        token = sampler.choose(logits)  # [streams]
        yield int(token), logits
        for _ in range(1, sampling.max_new_tokens):
            if sampler.ended or state.position >= state.horizon:
                return
            logits = self.logits(self.enter(state, self.model.token(token, state), "answer"))
            token = sampler.choose(logits)
            yield int(token), logits
