"""Steps on packed weights equal plain ones; when they begin depends on their own stream alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from statekv.engine.session import Session
from statekv.ops.packed import PackedProducts, packable
from statekv.runner import packing
from statekv.runner.packing import StepProducts
from statekv.runner.runner import ModelRunner
from tests.talk import session_answer, shared_engine, some_frames
from tests.tiny import FAMILIES

AFTER = 3
pytestmark = pytest.mark.skipif(not packable(torch.zeros(2, 2)), reason="torch without MKL")


class Watched(StepProducts):
    """Remembers for each segment whether it ran on packed weights."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.packed: list[bool] = []

    def around(self, *args: Any) -> Any:
        found = super().around(*args)
        self.packed.append(isinstance(found, PackedProducts))
        return found


def session(family: str, **settings: Any) -> tuple[Session, Watched]:
    runner = ModelRunner(shared_engine(family).model)
    products = Watched(runner.model.language_model.layers, after=AFTER, worth=1)
    runner.products = products
    config = shared_engine(family).config.with_(budget=20, **settings)
    return Session(runner, runner.open(config)), products


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_steps_equal_plain_ones(family: str) -> None:
    mine, products = session(family)
    other, none = session(family, pack=False)
    for each in (mine, other):
        each.push(some_frames(18))
    assert any(products.packed)
    assert not none.packed
    for layer in range(mine.state.spec.layers):
        keys = (each.state.detailed.keys(layer) for each in (mine, other))
        torch.testing.assert_close(*keys, atol=1e-5, rtol=1e-5)
        kept = [each.state.carried.kept(layer) for each in (mine, other)]  # type: ignore[union-attr]
        assert torch.equal(*kept)
    torch.testing.assert_close(session_answer(mine).logits, session_answer(other).logits, atol=1e-4, rtol=1e-4)


def test_it_begins_when_steps_of_one_length_have_come_in_a_row() -> None:
    watched, products = session("internvl")
    watched.push(some_frames(16))
    # Frame0 … Frame9 are as long as each other, Frame10 … Frame15 one token longer; the first ones make the lengths.
    spans = watched.state.spans
    lengths = [span.length if span.kind == "step" else -1 for span in spans]
    before = [set(lengths[max(0, i - AFTER) : i]) for i in range(len(lengths))]
    # A step of another length meets products that were packed for the former one, and is run without them.
    expected = [i >= AFTER and len(before[i]) == 1 and min(before[i]) > 0 for i in range(len(lengths))]
    assert products.packed == expected
    assert len({min(each) for each, packed in zip(before, expected, strict=True) if packed}) == 2


def test_a_stream_computes_the_same_bits_whatever_ran_before() -> None:
    runner = session("internvl")[0].runner
    states = []
    for _ in range(2):
        watched = Session(runner, runner.open(shared_engine("internvl").config.with_(budget=20)))
        watched.push(some_frames(14))
        states.append(watched.state)
    for layer in range(states[0].spec.layers):
        assert torch.equal(states[0].detailed.keys(layer), states[1].detailed.keys(layer))


def test_changed_weights_are_packed_anew() -> None:
    runner = ModelRunner(shared_engine("internvl").model)
    runner.products = StepProducts(runner.model.language_model.layers, after=1, worth=1)
    config = shared_engine("internvl").config
    weight = runner.products.weights[0]
    kept = weight.detach().clone()
    try:
        one = Session(runner, runner.open(config))
        one.push(some_frames(6))
        with torch.no_grad():
            weight.mul_(-3.0)
        keys = []
        for pack in (True, False):
            watched = Session(runner, runner.open(config.with_(pack=pack)))
            watched.push(some_frames(6))
            keys.append(watched.state.detailed.keys(1))
        torch.testing.assert_close(*keys, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(one.state.detailed.keys(1), keys[0], atol=1e-3)
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_copies_that_do_not_fit_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "free_bytes", lambda device: 0)
    watched, products = session("internvl")
    watched.push(some_frames(9))
    assert products.packed
    assert not any(products.packed)


def test_small_products_are_not_worth_it() -> None:
    runner = ModelRunner(shared_engine("internvl").model)
    watched = Session(runner, runner.open(shared_engine("internvl").config))
    watched.push(some_frames(14))
    assert runner.products._held is None
