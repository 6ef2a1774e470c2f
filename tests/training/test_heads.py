"""Readings: they read the frame they stand at, and only what they can know."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from statekv.evals.cards.world import COLORS, SHAPES
from training.batch import IGNORE, Batch, BatchMaker
from training.heads import HISTORY_LAYER, SUMMARY_LAYER, Heads
from training.model import build_model
from training.tokenizer import build_tokenizer

TOKENIZER = build_tokenizer()
MODEL = build_model(TOKENIZER)
_CARD = len(COLORS) + 1 + len(SHAPES) + 1
EMBEDDING = torch.eye(192).repeat(20, 1)[: len(TOKENIZER)]


def batch(seed: int = 0) -> Batch:
    return BatchMaker(TOKENIZER).make(np.random.default_rng(seed), clips=4, frames=8)


def silent(found: Batch) -> Batch:
    """The same without frame numbers."""
    nothing = torch.full_like(found.numbers, IGNORE)
    return dataclasses.replace(found, numbers=nothing, last_number=nothing)


@dataclass
class Perfect:
    """Heads that copy, with pictures and closing tokens that hold the right answers."""

    found: Batch

    def __post_init__(self) -> None:
        found = self.found
        self.heads = Heads(MODEL, TOKENIZER).requires_grad_(False)
        for layer in self.heads.children():
            assert isinstance(layer, torch.nn.Linear)
            torch.nn.init.eye_(layer.weight).mul_(50)
            torch.nn.init.zeros_(layer.bias)
        frames = len(found.shown)
        self.pictures = torch.zeros(frames, 4, 192)
        self.states = {layer: torch.zeros(frames, 192) for layer in (SUMMARY_LAYER, HISTORY_LAYER)}
        _mark(self.pictures[:, 0], [*_card(found.shown)])
        _mark(self.states[SUMMARY_LAYER], [*_card(found.shown), _CARD + found.new.long()])
        past = [*_card(found.last), *_card(found.before_last, _CARD), 2 * _CARD + found.so_far]
        _mark(self.states[HISTORY_LAYER], past)

    def cost(self, found: Batch, embedding: torch.Tensor = EMBEDDING) -> torch.Tensor:
        """What the heads lose on a batch."""
        closes = found.input_ids == self.heads.closing_id
        states = []
        for layer in range(6):
            spread = torch.zeros(*found.input_ids.shape, 192)
            if layer in self.states:
                spread[closes] = self.states[layer]
            states.append(spread)
        cost: torch.Tensor = self.heads(self.pictures, tuple(states), embedding, found)
        return cost


def _card(named: torch.Tensor, start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    color, shape = named.T
    return start + color, start + len(COLORS) + 1 + shape


def _mark(place: torch.Tensor, columns: list[torch.Tensor]) -> None:
    for column in columns:
        place[torch.arange(len(place)), column] = 1


def test_the_right_readings_cost_nothing_and_each_wrong_one_costs() -> None:
    found = silent(batch())
    perfect = Perfect(found)
    assert perfect.cost(found) < 1e-6
    for name in ("shown", "last", "before_last", "so_far"):
        wrong = dataclasses.replace(found, **{name: getattr(found, name).roll(1, 0)})
        assert perfect.cost(wrong) > 0.5, name
    assert perfect.cost(dataclasses.replace(found, new=~found.new)) > 1
    for place in (perfect.pictures, *perfect.states.values()):
        kept = place.clone()
        place.copy_(place.roll(1, 0))
        assert perfect.cost(found) > 1
        place.copy_(kept)


@pytest.mark.parametrize(("name", "layer"), [("numbers", SUMMARY_LAYER), ("last_number", HISTORY_LAYER)])
def test_a_number_is_read_through_the_embedding(name: str, layer: int) -> None:
    found = next(b for b in map(batch, range(9)) if (b.numbers != IGNORE).all())
    numbers = getattr(found, name)
    known = numbers != IGNORE
    torch.manual_seed(0)
    embedding = torch.nn.functional.normalize(torch.randn(len(TOKENIZER), 192), dim=1)
    asked = dataclasses.replace(silent(found), **{name: numbers})
    perfect = Perfect(found)
    assert perfect.cost(asked, embedding) > perfect.cost(silent(found), embedding) + 1
    perfect.states[layer][known] += embedding[numbers[known]] * 40
    for reading in (perfect.heads.summary, perfect.heads.history):  # what they read is blurred by the number now
        reading.weight.zero_()
    told = perfect.cost(asked, embedding) - perfect.cost(silent(found), embedding)
    assert told < 1e-3
    wrong = dataclasses.replace(asked, **{name: numbers.roll(1)})
    assert perfect.cost(wrong, embedding) - perfect.cost(silent(found), embedding) > 1
