"""The method at small budgets equals a layer loop by hand: kept sets, hidden states, detailed keys and values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from statekv.cache.carried import CarriedCache
from statekv.cache.stream import StreamState
from statekv.engine.session import Session
from statekv.models.adapter import Segment
from statekv.runner.runner import ModelRunner
from tests.method.byhand import ByHand, Keep, always, best, newest, pieces_of
from tests.talk import QUESTION, frames_of, inputs_of, session_answer, shared_engine, stock_model
from tests.tiny import EVERY_MODEL, FAMILIES, TWO_FAMILIES, Tiny, video

PREFIX = {
    "internvl": "<|im_start|>user\n",
    "qwen3_vl": "<|im_start|>user\n<|vision_start|>",
    "qwen2_5_vl": "<|im_start|>user\n<|vision_start|>",
    "llava_onevision": "<|im_start|>user\n",
    "eagle2_5": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nThe first video:",
}


class Watcher(ModelRunner):
    """Keeps what every segment came out as."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.hidden: list[torch.Tensor] = []

    def prefill(self, state: StreamState, segment: Segment, *args: Any, **kwargs: Any) -> torch.Tensor:
        hidden = super().prefill(state, segment, *args, **kwargs)
        self.hidden.append(hidden)
        return hidden


def compare(
    family: str,
    frames: int,
    keep: Keep = best,
    horizon: int = 0,
    trained: int = 4096,
    by_hand: Callable[..., ByHand] = ByHand,
    **settings: Any,
) -> None:
    """Feed a session and the loop by hand with the same video, and look at both after every step."""
    made, engine = stock_model(family, trained), shared_engine(family, trained)
    pictures = video(frames, seed=5)
    prefix = prefix_of(made)
    pieces = pieces_of(made, inputs_of(made, pictures, QUESTION), prefix)
    hand = by_hand(made, settings["budget"], keep, horizon)
    session = engine.open(**settings, horizon=horizon or None)
    watcher = session.runner = Watcher(engine.model)
    per_step = engine.model.frames_per_step
    expected = [hand.step(pieces[0])]
    for step, piece in enumerate(pieces[1:-1]):
        session.push(frames_of(pictures)[step * per_step : (step + 1) * per_step])
        expected.append(hand.step(piece))
        assert_same(session, hand)
    assert session.steps == len(pieces) - 2
    assert len(watcher.hidden) == len(expected)
    for found, hidden in zip(watcher.hidden, expected, strict=True):
        assert_close(found[0], hidden.float())


def prefix_of(made: Tiny) -> int:
    return len(made.tokenizer(PREFIX[made.family])["input_ids"])


def assert_same(session: Session, hand: ByHand) -> None:
    carried = session.state.carried
    assert isinstance(carried, CarriedCache)
    for layer in range(session.state.spec.layers):
        assert tokens_of(carried.kept(layer)) == tokens_of(hand.kept(layer))
        keys, values = hand.detailed(layer)
        assert_close(session.state.detailed.keys(layer), keys)
        assert_close(session.state.detailed.values(layer), values)


def tokens_of(kept: torch.Tensor) -> list[list[int]]:
    """Of each head; empty slots are none."""
    return [[token for token in head if token >= 0] for head in kept[0].tolist()]


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To 1e-5 of the largest number: float32 against float64."""
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize(
    ("family", "budget", "kernel"),
    [
        *((family, budget, kernel) for family in EVERY_MODEL for budget, kernel in ((3, "naive"), (24, "blocked"))),
        *((family, budget, kernel) for family in TWO_FAMILIES for budget, kernel in ((24, "naive"), (3, "blocked"))),
    ],
)
def test_attention_keeps_the_keys_with_the_highest_scores(family: str, budget: int, kernel: str) -> None:
    compare(family, frames=8, budget=budget, kernel=kernel)


@pytest.mark.parametrize("family", EVERY_MODEL)
def test_a_budget_that_is_just_enough_evicts_nothing(family: str) -> None:
    made = stock_model(family)
    tokens = inputs_of(made, video(4, seed=5), QUESTION)["input_ids"].shape[1]
    compare(family, frames=4, budget=tokens)


@pytest.mark.parametrize("family", EVERY_MODEL)
def test_a_pinned_prefix_stays_whatever_its_scores(family: str) -> None:
    prefix = prefix_of(stock_model(family))
    compare(family, frames=6, keep=always(prefix, best), budget=prefix + 4, pin_prefix=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_recent_keeps_the_newest(family: str) -> None:
    compare(family, frames=6, keep=newest, budget=20, carry="recent")


@pytest.mark.parametrize("family", FAMILIES)
def test_sink_recent_keeps_the_first_and_the_newest(family: str) -> None:
    compare(family, frames=6, keep=always(5, newest), budget=20, carry="sink_recent", sinks=5)


def test_dynamic_ntk_is_scaled_for_the_horizon_from_the_first_step() -> None:
    compare("internvl", frames=6, budget=24, horizon=900, trained=64)


@pytest.mark.parametrize("family", FAMILIES)
def test_random_keeps_as_many_and_the_same_for_the_same_seed(family: str) -> None:
    def kept(seed: int) -> list[torch.Tensor]:
        session = shared_engine(family).open(carry="random", budget=20, seed=seed)
        session.push(frames_of(video(6)))
        carried = session.state.carried
        assert isinstance(carried, CarriedCache)
        return [carried.kept(layer) for layer in range(session.state.spec.layers)]

    first, again, other = kept(1), kept(1), kept(2)
    assert all(layer.shape == (1, 2, 20) for layer in first)
    assert all(len(set(head.tolist())) == 20 for layer in first for head in layer[0])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recall", ["recent", "sink_recent"])
def test_an_answer_sees_what_recall_says(family: str, recall: str) -> None:
    """The keys outside the window and the sinks are set to nonsense, and the answer stays the same."""
    session = shared_engine(family).open(recall=recall, budget=16, sinks=4)
    session.push(frames_of(video(6)))
    before = session_answer(session)
    detailed = session.state.detailed
    first, window = (4, 12) if recall == "sink_recent" else (0, 16)
    layers = range(session.state.spec.layers)
    with torch.inference_mode():
        for held in (cache(layer) for layer in layers for cache in (detailed.keys, detailed.values)):
            assert first < held.shape[-2] - window
            held[..., first : held.shape[-2] - window, :] = float("nan")
    again = session_answer(session)
    assert again.tokens == before.tokens
    assert torch.equal(again.logits, before.logits)
    with torch.inference_mode():
        detailed.keys(0)[..., detailed.lengths[0] - window, :] = float("nan")
    assert session_answer(session).logits.isnan().all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recall", ["all", "recent", "sink_recent"])
def test_logits_are_those_of_the_answers_first_token(family: str, recall: str) -> None:
    session = shared_engine(family).open(recall=recall, budget=16)
    session.push(frames_of(video(5)))
    torch.testing.assert_close(session.logits(QUESTION)[0], session_answer(session).logits[0], atol=0, rtol=0)
