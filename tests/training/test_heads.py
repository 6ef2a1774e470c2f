"""Readings: they read the frame they stand at, and only what they can know."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from statekv.demo.world import COLORS, SHAPES
from training.batch import IGNORE, Batch, BatchMaker
from training.heads import Heads
from training.model import build_model
from training.tokenizer import build_tokenizer

TOKENIZER = build_tokenizer()
MODEL = build_model(TOKENIZER)
EMBEDDING = torch.eye(192).repeat(20, 1)[: len(TOKENIZER)]


def batch(seed: int = 0) -> Batch:
    return BatchMaker(TOKENIZER).make(np.random.default_rng(seed), clips=4, frames=8)


def perfect(found: Batch) -> tuple[Heads, torch.Tensor, torch.Tensor]:
    """Heads that copy, with pictures and closing tokens that hold the right answers."""
    heads = Heads(MODEL, TOKENIZER).requires_grad_(False)
    for layer in (heads.picture, heads.summary, heads.number):
        torch.nn.init.eye_(layer.weight).mul_(50)
        torch.nn.init.zeros_(layer.bias)
    pictures, closing = torch.zeros(len(found.shown), 4, 192), torch.zeros(len(found.shown), 192)
    rows = torch.arange(len(found.shown))
    color, shape = found.shown.T
    for place in (pictures[:, 0], closing):
        place[rows, color] = place[rows, len(COLORS) + 1 + shape] = 1
    closing[rows, len(COLORS) + len(SHAPES) + 2 + found.new.long()] = 1
    return heads, pictures, closing


def test_the_right_readings_cost_nothing_and_each_wrong_one_costs() -> None:
    found = dataclasses.replace(batch(), numbers=torch.full_like(batch().numbers, IGNORE))
    heads, pictures, closing = perfect(found)
    assert heads(pictures, closing, EMBEDDING, found) < 1e-6
    wrong = (
        dataclasses.replace(found, shown=found.shown.roll(1, 0)),
        dataclasses.replace(found, new=~found.new),
    )
    assert all(heads(pictures, closing, EMBEDDING, other) > 1 for other in wrong)
    assert heads(pictures.roll(1, 0), closing, EMBEDDING, found) > 1
    assert heads(pictures, closing.roll(1, 0), EMBEDDING, found) > 1


def test_a_number_is_read_through_the_embedding() -> None:
    found = next(b for b in map(batch, range(9)) if (b.numbers != IGNORE).all())
    heads, pictures, closing = perfect(found)
    torch.manual_seed(0)
    embedding = torch.nn.functional.normalize(torch.randn(len(TOKENIZER), 192), dim=1)
    without = heads(
        pictures, closing, embedding, dataclasses.replace(found, numbers=torch.full_like(found.numbers, IGNORE))
    )
    assert heads(pictures, closing, embedding, found) > without + 1
    told = closing + embedding[found.numbers] * 40
    assert heads(pictures, told, embedding, dataclasses.replace(found, numbers=found.numbers.roll(1))) > 10
    heads.summary.weight.zero_()  # what it reads is blurred by the number now
    blind = heads(pictures, told, embedding, dataclasses.replace(found, numbers=torch.full_like(found.numbers, IGNORE)))
    assert heads(pictures, told, embedding, found) - blind < 1e-3
