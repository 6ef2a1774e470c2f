"""Models with random weights: whole, finite, of the asked dtype, and steppable."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from statekv.bench.build import build
from statekv.bench.sizes import SIZES, Size
from statekv.bench.steps import random_step
from statekv.config import Config
from statekv.errors import MemoryLimitError
from statekv.runner.stepper import Stepper
from tests.bench.small import CPU, INTERNVL, QWEN3_VL, shrunk, small

SMALL = {size.family: shrunk(size) for size in SIZES.values()}
EVERY_FAMILY = pytest.mark.parametrize("size", SMALL.values(), ids=SMALL)


@EVERY_FAMILY
def test_a_built_model_steps(size: Size) -> None:
    stepper = Stepper(small(size))
    state = stepper.open(Config(budget=20))
    for number in (1, 2, 3):
        hidden = stepper.prefill(state, random_step(stepper.model, 18, number))
        assert hidden.shape == (1, 18, size.hidden)
        assert hidden.isfinite().all()
        assert hidden.std() > 0.1  # norms are at work: nothing has vanished
    assert state.carried.length == 20
    assert stepper.logits(hidden).shape == (1, size.vocab)


@EVERY_FAMILY
def test_every_weight_is_set(size: Size) -> None:
    for name, weight in small(size).model.named_parameters():
        assert weight.isfinite().all(), name
        assert weight.dim() == 1 or weight.std() < 0.1, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_that_of_all_weights_but_not_of_the_frequencies(dtype: torch.dtype) -> None:
    model = build(QWEN3_VL, CPU, dtype)
    assert {weight.dtype for weight in model.model.parameters()} == {dtype}
    assert model.language_model.rotary_emb.inv_freq.dtype == torch.float32


def test_rope_is_the_checkpoints_kind() -> None:
    assert small(INTERNVL).rope.kind == "dynamic"
    assert small(QWEN3_VL).rope.kind == "default"
    assert small(replace(INTERNVL, rope_factor=None)).rope.kind == "default"


def test_position_axes_share_a_head_as_in_the_public_configuration() -> None:
    for name, sections in (("qwen3-vl-4b", [24, 20, 20]), ("qwen2.5-vl-7b", [16, 24, 24])):
        rope = build(SIZES[name], torch.device("meta"), torch.bfloat16).text_config.rope_parameters
        assert rope["mrope_section"] == sections


def test_layers_cut_the_model() -> None:
    model = build(INTERNVL, CPU, torch.float32, layers=1)
    assert model.geometry().layers == len(model.language_model.layers) == 1


def test_what_does_not_fit_is_refused_before_it_is_made() -> None:
    giant = replace(INTERNVL, layers=1, hidden=1 << 20, intermediate=1 << 24)
    with pytest.raises(MemoryLimitError, match=r"with 1 layers would take .* GiB, but cpu has .* free \(try fewer"):
        build(giant, CPU, torch.float32)
