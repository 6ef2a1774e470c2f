"""Frequencies and positions equal those of transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from statekv.ops.rope import dynamic_ntk_frequencies, grid_positions, rotate, text_positions
from tests.tiny import tiny

CPU = torch.device("cpu")


@pytest.mark.parametrize("horizon", [1, 4095, 4096, 4097, 8192, 100_000, 2_000_000])
@pytest.mark.parametrize(("dim", "theta", "factor"), [(64, 1e6, 2.0), (128, 1e4, 1.0), (80, 5e5, 4.0)])
def test_dynamic_frequencies_equal_transformers(dim: int, theta: float, factor: float, horizon: int) -> None:
    config = Qwen2Config(
        hidden_size=2 * dim,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "dynamic", "rope_theta": theta, "factor": factor},
    )
    stock, scaling = ROPE_INIT_FUNCTIONS["dynamic"](config, CPU, seq_len=horizon)
    assert scaling == 1.0
    assert torch.equal(dynamic_ntk_frequencies(theta, dim, 4096, factor, horizon), stock)


@pytest.mark.parametrize("horizon", [1, 100, 4096])
def test_nothing_is_scaled_up_to_the_trained_length(horizon: int) -> None:
    unscaled = 1.0 / 1e6 ** (torch.arange(0, 64, 2).float() / 64)
    assert torch.equal(dynamic_ntk_frequencies(1e6, 64, 4096, 2.0, horizon), unscaled)


def test_a_longer_horizon_turns_slower() -> None:
    near, far = (dynamic_ntk_frequencies(1e6, 64, 4096, 2.0, horizon) for horizon in (5000, 10_000))
    assert near[0] == far[0] == 1
    assert (far[1:] < near[1:]).all()


def test_text_counts_up_on_all_axes() -> None:
    assert text_positions(7, 3, CPU).tolist() == [[[7, 8, 9]]] * 3
    assert text_positions(7, 0, CPU).shape == (3, 1, 0)


def test_a_grid_stands_still_in_time() -> None:
    golden = [[[5, 5, 5, 5, 5, 5]], [[5, 5, 5, 6, 6, 6]], [[5, 6, 7, 5, 6, 7]]]
    assert grid_positions(5, 2, 3, CPU).tolist() == golden


@pytest.mark.parametrize(("start", "height", "width"), [(0, 1, 1), (3, 2, 5), (11, 4, 3)])
def test_a_grid_equals_transformers(start: int, height: int, width: int) -> None:
    model = tiny("qwen3_vl").model.model
    if not hasattr(model, "get_vision_position_ids"):
        pytest.skip("this transformers has it inside get_rope_index, which the next test compares with")
    stock = model.get_vision_position_ids(start, torch.tensor([1, 2 * height, 2 * width]), 1, 2)
    assert torch.equal(grid_positions(start, height, width, CPU)[:, 0], stock)


def test_words_and_pictures_equal_transformers() -> None:
    """Text, a picture, text, a picture, text: each goes on behind the longer side of the picture before it."""
    model = tiny("qwen3_vl").model
    words, grids = [4, 2, 3], [(2, 3), (3, 1)]
    pieces, kinds, position = [], [], 0
    for length, (height, width) in zip(words, [*grids, (0, 0)], strict=True):
        pieces += [text_positions(position, length, CPU), grid_positions(position + length, height, width, CPU)]
        kinds += [0] * length + [2] * (height * width)
        position += length + max(height, width)
    video, word = model.config.video_token_id, 1
    ids = torch.tensor([[video if kind else word for kind in kinds]])
    stock, delta = model.model.get_rope_index(
        ids,
        mm_token_type_ids=torch.tensor([kinds]),
        video_grid_thw=torch.tensor([[1, 2 * height, 2 * width] for height, width in grids]),
    )
    assert torch.equal(torch.cat(pieces, -1), stock)
    assert position == int(delta) + len(kinds)


def angles(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[T] → cos and sin [T, 16]."""
    turned = positions[:, None].double() * dynamic_ntk_frequencies(1e4, 16, 64, 1.0, 64).double().repeat(2)
    return turned.cos(), turned.sin()


def test_rotating_is_stocks() -> None:
    query, key = torch.randn(2, 1, 2, 5, 16, dtype=torch.float64)
    cos, sin = angles(torch.arange(5))
    stock = apply_rotary_pos_emb(query, key, cos[None], sin[None])
    assert torch.equal(rotate(query, cos, sin), stock[0])
    assert torch.equal(rotate(key, cos, sin), stock[1])


def test_rotations_add_up_and_go_back() -> None:
    x = torch.randn(1, 2, 5, 16, dtype=torch.float64)
    one, two = torch.tensor([3, 7, 0, 100, 5]), torch.tensor([9, -7, 4, 1, 1000])
    turned = rotate(x, *angles(one))
    torch.testing.assert_close(rotate(turned, *angles(two)), rotate(x, *angles(one + two)))
    cos, sin = angles(one)
    torch.testing.assert_close(rotate(turned, cos, -sin), x)
