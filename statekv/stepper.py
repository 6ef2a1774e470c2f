"""One loaded model at work: a segment into a stream's memory, a question into tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from statekv.cache.carried import CarriedCache
from statekv.cache.stream import StreamState
from statekv.config import Config
from statekv.decoding import Sampling
from statekv.errors import HorizonError, MemoryLimitError
from statekv.models.attention import Pass, take_attention
from statekv.models.base import Segment, VideoModel

# carry: part of the stream. peek: sees what a step sees, but leaves the carried cache as it is.
# answer: sees what an answer sees.
Mode = Literal["carry", "peek", "answer"]


# Positions that a stream leaves to a question, besides the longest answer.
_QUESTION_ROOM = 512


def room_for_answers(config: Config) -> int:
    """Positions that a question and its answer may take."""
    return _QUESTION_ROOM + config.max_new_tokens


class Stepper:
    """Runs segments through a model, whose attention it routes through the hook and keeps there.

    Args:
        model: maker of segments, and the weights.
    """

    def __init__(self, model: VideoModel) -> None:
        self.model = model

    def open(
        self,
        config: Config,
        horizon: int | None = None,
        frames_expected: int | None = None,
        room: int | None = None,
    ) -> StreamState:
        """An empty stream.

        Args:
            config: dials, budget and the rest.
            horizon: positions to scale RoPE for; None: the trained length.
            frames_expected: frames of the whole video, where known.
            room: positions below the horizon that steps leave to questions; None: enough for most.
        """
        horizon = config.horizon or horizon or self.model.trained_length
        if room is None:
            room = min(room_for_answers(config), horizon // 4)
        return StreamState(self.model.geometry(), config, horizon, frames_expected, room)

    @torch.inference_mode()
    def prefill(self, state: StreamState, segment: Segment, mode: Mode = "carry") -> torch.Tensor:
        """Run a segment through the language model and remember it.

        Args:
            state: the stream; both memories, position and spans move on.
            segment: what enters.
            mode: see `Mode`.

        Returns:
            [streams, T, hidden], the last layer's normalised hidden states.

        Raises:
            HorizonError: the segment would pass the stream's horizon; nothing has entered.
            ConfigError: a pinned prefix that fills the budget; nothing has entered.
            MemoryLimitError: the device is out of memory.
        """
        reach = state.horizon - (state.room if mode == "carry" else 0)
        if segment.next_position > reach:
            raise HorizonError(
                f"position {segment.next_position} is past {reach}, as far as RoPE reaches for this stream",
                f"open the stream with a horizon above {state.horizon}; questions about what was seen still work",
            )
        if segment.kind == "prefix":
            state.expect_prefix(segment.length)
        if segment.kind == "question":
            state.detailed.begin_answer()
        cache = state.detailed if mode == "answer" else state.carried
        evicting = None
        take_attention(self.model.model)
        with self.model.rope.held(state.horizon), memory_limit():
            if isinstance(cache, CarriedCache):
                cache.make_room(segment.length)
                full = cache.length + segment.length > cache.budget
                evicting = cache if full and mode == "carry" else None
            scored = evicting is not None and state.config.carry == "attention"
            run = Pass(evicting, scored, state.config.kernel)
            hidden: torch.Tensor = self.model.language_model(
                inputs_embeds=segment.embeds,
                position_ids=segment.positions,
                past_key_values=cache,
                use_cache=True,
                statekv_pass=run,
                **segment.extras,
            ).last_hidden_state
        state.position = segment.next_position
        state.note(segment.kind, segment.length, segment.pts_seconds)
        if mode == "carry":
            state.frames += segment.frames
            if state.origin_seconds is None:
                state.origin_seconds = segment.pts_seconds
        return hidden

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[streams, T, hidden] → [streams, vocabulary] of the last position."""
        found: torch.Tensor = self.model.model.get_output_embeddings()(hidden[:, -1])
        return found

    @torch.inference_mode()
    def answer(
        self, state: StreamState, question: Segment, sampling: Sampling, prompt: torch.Tensor | None = None
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
        segment, chosen = question, question.ids if prompt is None else prompt
        for _ in range(sampling.max_new_tokens):
            logits = self.logits(self.prefill(state, segment, "answer"))
            token = sampling.choose(chosen, logits)  # [streams]
            yield int(token), logits
            if int(token) in sampling.end_tokens or state.position >= state.horizon:
                return
            chosen = torch.cat([chosen, token[:, None]], dim=1)
            segment = self.model.token(token, state)


@contextmanager
def memory_limit() -> Iterator[None]:
    """Turn the many ways of running out of memory into one error that says what to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch's own kinds are RuntimeErrors
        told = str(error).lower()
        if isinstance(error, RuntimeError) and "allocate memory" not in told and "out of memory" not in told:
            raise
        raise MemoryLimitError(
            "out of memory in a step", "lower budget, max_frames or the video's resolution, or use a half dtype"
        ) from error
