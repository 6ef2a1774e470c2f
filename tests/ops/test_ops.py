"""One name, several implementations, and every one of them takes everything that the name takes."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from statekv import ops
from statekv.errors import ConfigError
from statekv.ops import blocked, naive
from tests.ops.inputs import SHAPES, Shape, Ways, spoil

needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")
IMPLEMENTATIONS = ["naive", "blocked", pytest.param("triton", marks=needs_triton)]
SHAPE = Shape(2, 2, 3, 7, 40, 16)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("every", [1, 3, 7, 50])
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
def test_each_takes_everything(impl: str, causal: bool, every: int, ragged: bool, device: torch.device) -> None:
    inputs = SHAPE.tensors(slack=4, device=device)
    ways: Ways = {"causal": causal, "every": every}
    if ragged:
        ways["lengths"] = SHAPE.lengths(device)
        inputs = spoil(inputs, ways["lengths"])
    mixed, scores = ops.attention_with_key_scores(*inputs, scale=0.3, impl=impl, **ways)
    mixed_naive, scores_naive = naive.attention_with_key_scores(*inputs, scale=0.3, **ways)
    torch.testing.assert_close(mixed, mixed_naive, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores, scores_naive, atol=1e-5, rtol=1e-5)
    counted = -(-SHAPE.queries // every)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.sum(-1), torch.full_like(scores[..., 0], counted * SHAPE.group))


@pytest.mark.parametrize("impl", ["naive", "blocked"])
def test_the_named_one_runs(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    marked = torch.zeros(1), torch.ones(1)

    def mark(*_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return marked

    monkeypatch.setattr({"naive": naive, "blocked": blocked}[impl], "attention_with_key_scores", mark)
    assert ops.attention_with_key_scores(*SHAPES[0].tensors(), scale=1.0, impl=impl) is marked


def test_what_cannot_run_says_so() -> None:
    with pytest.raises(ConfigError, match="unknown kernel 'flash3'"):
        ops.attention_with_key_scores(*SHAPE.tensors(), scale=1.0, impl="flash3")
    with pytest.raises(ConfigError, match="kernel is 'triton', but "):
        ops.attention_with_key_scores(*SHAPE.tensors(torch.float64), scale=1.0, impl="triton")
