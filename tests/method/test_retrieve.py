"""Answers from retrieved steps: equal a layer loop by hand, and full recall where no step is left out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from statekv.cache.retrieval import RetrievedView, StepIndex
from statekv.cache.stream import StreamState
from statekv.cache.view import Mode
from statekv.engine.session import Session
from statekv.errors import ConfigError
from statekv.models.adapter import Segment
from statekv.models.hooks import Observer
from statekv.runner.runner import ModelRunner
from tests.method.byhand import ByHand, Keep, Piece, always, best, newest, pieces_of
from tests.method.test_method import PREFIX, assert_close
from tests.presets import filled
from tests.talk import (
    QUESTION,
    assert_same_answer,
    assert_same_stream,
    frames_of,
    inputs_of,
    session_answer,
    shared_engine,
    some_frames,
    stock_model,
)
from tests.tiny import FAMILIES, Tiny, video

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
# Qwen2.5-VL's steps lie beside the text on an axis of time: nothing to close up to.
IN_LINE = pytest.mark.parametrize("family", [family for family in FAMILIES if family != "qwen2_5_vl"])
FRAMES = 10


@dataclass
class Told:
    """What one answer entered as, came out as, and saw: per layer the tokens chosen."""

    segments: list[Segment] = field(default_factory=list)
    hidden: list[torch.Tensor] = field(default_factory=list)
    chosen: list[list[int]] = field(default_factory=list)


class Listener(ModelRunner):
    """Keeps what the last answer was made of."""

    told: Told

    def prefill(
        self, state: StreamState, segment: Segment, mode: Mode = "carry", observer: Observer | None = None
    ) -> torch.Tensor:
        hidden = super().prefill(state, segment, mode, observer)
        if segment.kind == "question":
            self.told = Told()
            if isinstance(state.recalled, RetrievedView):
                self.told.chosen = [tokens.tolist() for tokens in state.recalled.chosen if tokens is not None]
        if mode == "answer":
            self.told.segments.append(segment)
            self.told.hidden.append(hidden.clone())
        return hidden


class Asked(ByHand):
    """A model stepped by hand that answers from the steps whose mean key fits the question's mean query best."""

    def __init__(self, made: Tiny, budget: int, keep: Keep) -> None:
        super().__init__(made, budget, keep)
        self.raw: list[list[list[torch.Tensor]]] = [[[] for _ in heads] for heads in self.memory]  # before rotation
        self.pieces: list[Piece] = []

    def step(self, piece: Piece) -> torch.Tensor:
        self.pieces.append(piece)
        return super().step(piece)

    def _project(self, layer: int, name: str, x: torch.Tensor) -> torch.Tensor:
        projected = super()._project(layer, name, x)
        if name == "k":
            for head, keys in zip(self.raw[layer], projected, strict=True):
                head.extend(keys)
        return projected

    def answer(
        self, asked: Piece, question: int, retrieve: int, last: int = 0, carried: bool = False, reindex: bool = False
    ) -> tuple[torch.Tensor, list[list[int]]]:
        """Hidden states [T, hidden] of question and answer, and the tokens chosen in each layer.

        Args:
            asked: both; the first `question` tokens choose.
            retrieve, last: how many of the steps fit best, how many are the newest.
            carried: see the carried keys too.
            reindex: number what is seen from 0 on, the question too.
        """
        steps, first = [], len(self.pieces[0].embeds)
        for piece, following in zip(self.pieces[1:], [*self.pieces[2:], asked], strict=True):
            taken = int(following.positions[0, 0] - piece.positions[0, 0])
            steps.append((range(first, first + len(piece.embeds)), taken))
            first += len(piece.embeds)
        positions = torch.cat([piece.positions for piece in self.pieces], dim=-1)
        x, seen = asked.embeds.double(), []
        for layer, heads in enumerate(self.memory):
            y = self._norm(x, f"layers.{layer}.input_layernorm")
            queries, values = ByHand._project(self, layer, "q", y), ByHand._project(self, layer, "v", y)
            keys = ByHand._project(self, layer, "k", y)
            fits = [self._fit(layer, tokens, queries[:, :question]) for tokens, _ in steps[: len(steps) - last]]
            ranked = sorted(range(len(fits)), key=lambda i: -fits[i])
            out = [steps[i] for i in ranked[retrieve:]]
            visible = [t for t in range(first) if not any(t in tokens for tokens, _ in out)]
            seen.append(visible)
            places, here = positions[:, visible], asked.positions
            if reindex:
                gone = [sum(taken for tokens, taken in out if tokens[0] < t) for t in (*visible, first)]
                places, here = places - torch.tensor(gone[:-1]), here - gone[-1]
            angles, own = self._angles(places), self._angles(here)
            mixed = torch.empty_like(queries)
            for h, head in enumerate(heads):
                raw = torch.stack([self.raw[layer][h][t] for t in visible])
                extra = [j for j, t in enumerate(head.token_ids) if carried and t not in visible]
                past = [*self._rotate(raw, angles), *(head.keys[j] for j in extra)]
                all_values = [*(head.all_values[t] for t in visible), *(head.values[j] for j in extra), *values[h]]
                all_keys = torch.stack([*past, *self._rotate(keys[h], own)])
                group = self.heads // self.kv_heads
                for g in range(h * group, (h + 1) * group):
                    products = self._rotate(queries[g], own) @ all_keys.T / self.dim**0.5
                    for i in range(len(products)):
                        products[i, len(past) + i + 1 :] = -torch.inf
                    mixed[g] = products.softmax(-1) @ torch.stack(all_values)
            x = x + self._linear(mixed.transpose(0, 1).reshape(len(x), -1), f"layers.{layer}.self_attn.o_proj")
            y = self._norm(x, f"layers.{layer}.post_attention_layernorm")
            gate, up = (self._linear(y, f"layers.{layer}.mlp.{name}_proj") for name in ("gate", "up"))
            x = x + self._linear(gate * torch.sigmoid(gate) * up, f"layers.{layer}.mlp.down_proj")
        return self._norm(x, "norm"), seen

    def _fit(self, layer: int, tokens: range, queries: torch.Tensor) -> float:
        group, found = self.heads // self.kv_heads, 0.0
        for h, query in enumerate(queries):
            keys = torch.stack([self.raw[layer][h // group][t] for t in tokens])
            found += float(query.mean(0) @ keys.mean(0))
        return found


def watched(family: str, frames: int = FRAMES, **settings: Any) -> Session:
    session = shared_engine(family).open(**settings)
    session.runner = Listener(session.runner.model)
    session.push(frames_of(video(frames, seed=5)))
    return session


def told(session: Session) -> Told:
    assert isinstance(session.runner, Listener)
    return session.runner.told


WAYS: list[dict[str, Any]] = [
    {"retrieve": 2},
    {"retrieve": 1, "retrieve_newest": 2},
    {"retrieve": 2, "retrieve_carried": True},
    {"retrieve": 2, "method": "rekv"},
]


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        *((family, settings) for family in ("internvl", "qwen2_5_vl") for settings in WAYS),
        *((family, WAYS[2]) for family in ("qwen3_vl", "llava_onevision")),
    ],
    ids=str,
)
def test_an_answer_is_that_of_the_loop_by_hand(family: str, settings: dict[str, Any]) -> None:
    compare(family, settings)


@pytest.mark.parametrize("settings", [{"retrieve": 2, "retrieve_newest": 1}, {"retrieve": 1, "carry": "all"}], ids=str)
@IN_LINE
def test_reindexed_keys_are_rotated_where_they_then_stand(family: str, settings: dict[str, Any]) -> None:
    compare(family, {**settings, "retrieve_positions": "reindex"})


def compare(family: str, settings: dict[str, Any]) -> None:
    made = stock_model(family)
    session = watched(family, **filled(settings, recall="retrieve", budget=24))
    session.ask(QUESTION, max_new_tokens=4)
    prefix = len(made.tokenizer(PREFIX[family])["input_ids"])
    rule = always(prefix, newest) if settings.get("method") == "rekv" else best
    hand = Asked(made, 100_000 if settings.get("carry") == "all" else 24, rule)
    for piece in pieces_of(made, inputs_of(made, video(FRAMES, seed=5), QUESTION), prefix)[:-1]:
        hand.step(piece)
    found = told(session)
    embeds = torch.cat([segment.embeds[0] for segment in found.segments])
    places = torch.cat([segment.positions.reshape(-1, segment.length) for segment in found.segments], dim=-1)
    hidden, chosen = hand.answer(
        Piece(embeds, places, []),
        found.segments[0].length,
        session.state.config.retrieve,
        session.state.config.retrieve_newest,
        session.state.config.retrieve_carried,
        session.state.config.retrieve_positions == "reindex",
    )
    assert len(found.segments) == 4
    assert found.chosen == chosen
    assert_close(torch.cat(found.hidden, dim=1)[0], hidden.float())


@pytest.mark.parametrize(
    ("family", "method"),
    [*((family, "statekv") for family in FAMILIES), ("internvl", "full"), ("qwen3_vl", "recency_window")],
)
def test_with_every_step_retrieved_it_is_full_recall(family: str, method: str) -> None:
    steps = FRAMES // shared_engine(family).model.frames_per_step
    settings = filled({"method": method}, budget=24)
    every = watched(family, **settings)
    for retrieve, last in ((steps, 0), (steps + 7, 0), (steps - 2, 2), (1, steps)):
        found = watched(family, **settings, recall="retrieve", retrieve=retrieve, retrieve_newest=last)
        assert_same_stream(found, every)
        assert torch.equal(found.logits(QUESTION), every.logits(QUESTION))
    fewer = watched(family, **settings, recall="retrieve", retrieve=steps - 1)
    assert not torch.allclose(fewer.logits(QUESTION), every.logits(QUESTION), atol=1e-3)


@EVERY_FAMILY
def test_copying_every_step_out_changes_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The road that a small choice takes, taken with all steps."""
    every = watched(family, method="full")
    for settings in ({"method": "full"}, {"method": "statekv", "budget": 100_000, "retrieve_carried": True}):
        found = watched(family, **settings, recall="retrieve", retrieve=1)
        monkeypatch.setattr(RetrievedView, "_choose", lambda self, *_: torch.ones(len(self.blocks), dtype=torch.bool))
        assert_same_answer(session_answer(found), session_answer(every))
        monkeypatch.undo()


@EVERY_FAMILY
def test_what_is_not_chosen_is_never_read(family: str) -> None:
    session = watched(family, method="statekv_retrieve", budget=24, retrieve=2)
    before = session.logits(QUESTION)
    chosen, spans = told(session).chosen, session.state.spans
    assert len({tuple(tokens) for tokens in chosen}) > 1  # layers differ
    for layer, tokens in enumerate(chosen):
        assert tokens == sorted(set(tokens))
        assert set(range(spans[0].start, spans[0].length)) <= set(tokens)
        whole = [set(range(span.start, span.start + span.length)) for span in spans[1:]]
        assert sum(step <= set(tokens) for step in whole) == 2
        assert sum(bool(step & set(tokens)) for step in whole) == 2
        hidden = [token for token in range(session.state.tokens) if token not in tokens]
        with torch.inference_mode():
            session.state.detailed.keys(layer)[:, :, hidden] = float("nan")
            session.state.detailed.values(layer)[:, :, hidden] = float("nan")
    assert torch.equal(session.logits(QUESTION), before)
    with torch.inference_mode():
        session.state.detailed.values(0)[:, :, chosen[0][-1]] = float("nan")
    assert session.logits(QUESTION).isnan().all()


@pytest.mark.parametrize(
    ("family", "settings"),
    [*((family, {"retrieve_carried": True}) for family in FAMILIES), ("internvl", {}), ("qwen3_vl", {})],
    ids=str,
)
def test_asking_changes_nothing(family: str, settings: dict[str, Any]) -> None:
    asked, never = (watched(family, 7, method="statekv_retrieve", budget=24, retrieve=1, **settings) for _ in range(2))
    first = session_answer(asked)
    assert torch.equal(session_answer(asked).logits, first.logits)
    assert torch.equal(asked.logits(QUESTION)[0], first.logits[0])
    for session in (asked, never):
        session.push(some_frames(5))
    assert_same_stream(asked, never)
    assert blocks_of(asked).spots == blocks_of(never).spots
    for a, b in zip(blocks_of(asked).means, blocks_of(never).means, strict=True):
        assert torch.equal(a[:, :, : len(blocks_of(asked))], b[:, :, : len(blocks_of(never))])


def blocks_of(session: Session) -> StepIndex:
    assert session.state.blocks is not None
    return session.state.blocks


@EVERY_FAMILY
def test_blocks_are_the_steps(family: str) -> None:
    session = watched(family, method="statekv_retrieve", budget=24)
    spans = [span for span in session.state.spans if span.kind == "step"]
    blocks = blocks_of(session)
    assert [(block.start, block.stop) for block in blocks.spots] == [(s.start, s.start + s.length) for s in spans]
    assert blocks.spots[0].start == session.state.spans[0].length > 0
    taken = sum(block.positions for block in blocks.spots)
    assert taken + session.state.spans[0].length == session.state.position
    g = session.state.spec
    assert session.state.nbytes["blocks"] == 64 * g.layers * g.kv_heads * g.head_dim * 4
    session.state.free()
    assert session.state.nbytes == {"carried": 0, "detailed": 0, "blocks": 0, "memories": 0}


@EVERY_FAMILY
def test_a_frame_that_waits_for_its_partner_can_be_retrieved(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    session = watched(family, 7, method="statekv_retrieve", budget=24, retrieve=1)
    monkeypatch.setattr(
        StepIndex, "scores", lambda self, *_: torch.arange(len(self)).float()[None]
    )  # the newest is best
    waiting = session.frames - session.state.frames
    assert waiting == 7 % session.runner.model.frames_per_step
    seen = [token for token in told_again(session).chosen[0] if token >= session.state.tokens]
    assert bool(seen) == bool(waiting)
    assert blocks_of(session).spots[-1].stop == session.state.tokens


def told_again(session: Session) -> Told:
    session.runner = Listener(session.runner.model)
    session.logits(QUESTION)
    return told(session)


# Positions


@IN_LINE
def test_first_steps_moved_up_are_the_stream_as_it_was_then(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes first and is closed up to the question equals a question asked right behind it."""
    per_step = shared_engine(family).model.frames_per_step
    then = watched(family, 3 * per_step, method="full")
    monkeypatch.setattr(StepIndex, "scores", lambda self, *_: -torch.arange(len(self)).float()[None])
    dials: dict[str, Any] = {"method": "full", "recall": "retrieve", "retrieve": 3}
    moved = watched(family, FRAMES, **dials, retrieve_positions="reindex")
    assert_same_answer(session_answer(moved), session_answer(then))
    kept = watched(family, FRAMES, **dials)
    assert not torch.allclose(kept.logits(QUESTION), then.logits(QUESTION), atol=1e-2)


@IN_LINE
def test_without_a_gap_nothing_moves(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepIndex, "scores", lambda self, *_: torch.arange(len(self)).float()[None])
    dials: dict[str, Any] = {"method": "statekv_retrieve", "budget": 24, "retrieve": 2, "layout": "release"}
    kept, moved = (watched(family, **dials, retrieve_positions=position) for position in ("keep", "reindex"))
    assert not [span for span in kept.state.spans if span.kind != "step"]
    assert torch.equal(kept.logits(QUESTION), moved.logits(QUESTION))


def test_a_model_whose_steps_are_not_in_line_keeps_positions() -> None:
    session = shared_engine("qwen2_5_vl").open(method="statekv_retrieve", retrieve_positions="reindex")
    with pytest.raises(ConfigError, match="beside its text") as caught:
        session.push(some_frames(6))
    assert "'keep'" in caught.value.hint
    assert session.steps == 1


@IN_LINE
def test_choosing_does_not_depend_on_positions(family: str) -> None:
    """In the first layer, whose queries have not seen any keys yet."""
    found = [
        told_again(watched(family, method="statekv_retrieve", budget=24, retrieve=2, retrieve_positions=position))
        for position in ("keep", "reindex")
    ]
    assert found[0].chosen[0] == found[1].chosen[0]
    assert not torch.equal(found[0].hidden[0], found[1].hidden[0])


@EVERY_FAMILY
def test_angles_are_those_that_keys_are_turned_by(family: str) -> None:
    """Of length 1 whatever the module multiplies them by, and scaled for the horizon."""
    model = shared_engine(family, 64).model
    positions = model.text_positions(3, 5)
    cos, sin = model.rope.angles(positions, 900)
    assert cos.shape == sin.shape == (1, 5, 16)
    assert cos.dtype == torch.float32
    torch.testing.assert_close(cos.square() + sin.square(), torch.ones_like(cos))
    with model.rope.held(900):
        expected = model.language_model.rotary_emb(torch.empty(0), positions)
        model.language_model.rotary_emb.attention_scaling, before = 1.5, model.rope.rotary.attention_scaling
        try:
            again = model.rope.angles(positions, 900)
        finally:
            model.language_model.rotary_emb.attention_scaling = before
    assert torch.equal(cos, expected[0])
    torch.testing.assert_close(again[0], cos)
