"""Steps without pictures against those that a family's adapter makes."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from statekv.bench.sizes import Size
from statekv.bench.steps import products_alone, random_step, stride
from statekv.models.base import Seen
from statekv.models.families.qwen3_vl import Qwen3VL
from tests.bench.small import FAMILIES, INTERNVL, QWEN3_VL, small

EVERY_FAMILY = pytest.mark.parametrize("size", FAMILIES, ids=lambda size: size.family)


@EVERY_FAMILY
def test_steps_follow_each_other(size: Size) -> None:
    model = small(size)
    first, second = random_step(model, 20, 1), random_step(model, 20, 2)
    assert first.positions.min() == 0
    assert first.next_position == second.positions.min() == stride(model, 20)
    assert second.next_position == 2 * stride(model, 20)
    assert first.length == first.embeds.shape[1] == first.positions.shape[-1] == 20


def test_internvl_counts_every_token() -> None:
    assert stride(small(INTERNVL), 256) == 256
    assert random_step(small(INTERNVL), 8, 3).positions.tolist() == [list(range(16, 24))]


def test_qwen_steps_are_made_as_the_adapter_makes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a 4 x 4 picture with 2 words behind it: the same positions, and extras of the same shapes."""
    model = small(QWEN3_VL)
    assert isinstance(model, Qwen3VL)
    step = random_step(model, 18, 2)
    monkeypatch.setattr(model.model.config, "video_token_id", 3)  # a small model's vocabulary ends before the real one
    merge = model.model.config.vision_config.spatial_merge_size
    features = torch.zeros(16, QWEN3_VL.hidden)
    seen = Seen((), features, (features,) * 3, (4 * merge, 4 * merge))
    own = model.picture([3] * 16 + [1, 2], seen, 6)
    assert torch.equal(step.positions, own.positions)
    assert step.next_position == own.next_position == 12
    assert step.extras["visual_pos_masks"] is own.extras["visual_pos_masks"]
    shapes = [[deep.shape for deep in made.extras["deepstack_visual_embeds"]] for made in (step, own)]
    assert shapes[0] == shapes[1]


@EVERY_FAMILY
def test_products_alone_are_those_of_a_step(size: Size) -> None:
    """Torch counts two FLOPs per weight and token: all of the model's matrices, each once."""
    model = small(size)
    matrices = sum(weight.numel() for weight in model.language_model.layers.parameters() if weight.dim() == 2)
    with FlopCounterMode(display=False) as counter:
        products_alone(model, 7)()
    assert counter.get_total_flops() == 2 * 7 * matrices
