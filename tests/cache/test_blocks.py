"""Every step has its mean key, taken back to before rotation, and the question's score is a product with it."""

from __future__ import annotations

import pytest
import torch

from statekv.cache.blocks import Block, Blocks
from statekv.cache.detailed import DetailedCache
from statekv.cache.geometry import Geometry
from statekv.ops.rope import rotate

HEADS, GROUP, DIM = 2, 3, 8


def geometry(layers: int = 2, dtype: torch.dtype = torch.float32) -> Geometry:
    return Geometry(HEADS, DIM, dtype, (torch.device("cpu"),) * layers)


def angles(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[1, T] → cos and sin [1, T, DIM]."""
    turned = positions[..., None].float() * torch.tensor([1.0, 0.3, 0.1, 0.01]).repeat(2)
    return turned.cos(), turned.sin()


def feed(detailed: DetailedCache, raw: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Let keys [layers, kv_heads, T, DIM] enter, rotated by their positions from `start` on; returns the angles."""
    cos, sin = angles(torch.arange(start, start + raw.shape[2])[None])
    for layer, keys in enumerate(raw):
        rotated = rotate(keys[None], cos[:, None], sin[:, None])
        detailed.append(rotated, rotated, layer)
    return cos, sin


def filled(steps: int, dtype: torch.dtype = torch.float32) -> tuple[Blocks, DetailedCache, list[torch.Tensor]]:
    """Steps of growing length behind three tokens of text, and their keys before rotation."""
    g, generator = geometry(dtype=dtype), torch.Generator().manual_seed(0)
    detailed, blocks, entered = DetailedCache(g), Blocks(g), []
    feed(detailed, torch.randn(2, HEADS, 3, DIM, generator=generator), 0)
    for step in range(steps):
        raw = torch.randn(2, HEADS, 4 + step % 3, DIM, generator=generator)
        start = detailed.length
        turn = feed(detailed, raw, 7 * start)  # positions run ahead of tokens
        blocks.add(detailed, Block(start, detailed.length, 5), *turn)
        entered.append(raw)
    return blocks, detailed, entered


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_a_representative_is_the_mean_key_before_rotation(dtype: torch.dtype, tolerance: float) -> None:
    blocks, _, entered = filled(5, dtype)
    assert len(blocks) == 5
    for layer in range(2):
        expected = torch.stack([raw[layer].mean(-2) for raw in entered], dim=1)
        assert blocks.means[layer].dtype == torch.float32
        torch.testing.assert_close(blocks.means[layer][0, :, :5], expected, atol=tolerance, rtol=0)


def test_a_score_is_the_sum_over_all_heads() -> None:
    blocks, _, entered = filled(4)
    query = torch.randn(1, HEADS * GROUP, DIM)
    for layer in range(2):
        by_hand = [
            sum(float(query[0, h] @ raw[layer, h // GROUP].mean(0)) for h in range(HEADS * GROUP)) for raw in entered
        ]
        torch.testing.assert_close(blocks.scores(layer, query)[0], torch.tensor(by_hand), atol=1e-4, rtol=0)


@pytest.mark.parametrize("planted", [0, 3, 6])
def test_a_planted_step_scores_highest(planted: int) -> None:
    g, query = geometry(), torch.randn(1, HEADS * GROUP, DIM, generator=torch.Generator().manual_seed(1))
    detailed, blocks = DetailedCache(g), Blocks(g)
    wanted = query.view(HEADS, GROUP, DIM).sum(1)
    for step in range(7):
        raw = 0.1 * torch.randn(2, HEADS, 6, DIM, generator=torch.Generator().manual_seed(step))
        if step == planted:
            raw[:, :, 2] += wanted
        turn = feed(detailed, raw, 1000 * step)
        blocks.add(detailed, Block(6 * step, 6 * step + 6, 6), *turn)
    for layer in range(2):
        assert int(blocks.scores(layer, query).argmax()) == planted


def test_entering_never_touches_older_representatives() -> None:
    blocks, detailed, _ = filled(3)
    before, address = blocks.means[0][:, :, :3].clone(), blocks.means[0].data_ptr()
    with torch.inference_mode():
        detailed.keys(0)[:] = float("nan")  # nothing old is read again
    turn = feed(detailed, torch.ones(2, HEADS, 4, DIM), 0)
    blocks.add(detailed, Block(detailed.length - 4, detailed.length, 4), *turn)
    assert torch.equal(blocks.means[0][:, :, :3], before)
    assert blocks.means[0].data_ptr() == address


def test_growing_keeps_what_was_there() -> None:
    blocks, _, entered = filled(70)
    expected = torch.stack([raw[1].mean(-2) for raw in entered], dim=1)
    torch.testing.assert_close(blocks.means[1][0, :, :70], expected, atol=1e-5, rtol=0)


def test_bytes_are_the_formula() -> None:
    assert Blocks(geometry()).nbytes == 0
    for steps, capacity in ((1, 64), (64, 64), (65, 128)):
        assert filled(steps)[0].nbytes == 2 * HEADS * DIM * 4 * capacity


def test_crop_forgets_what_does_not_lie_within() -> None:
    blocks, _, _ = filled(4)
    stops = [block.stop for block in blocks.spots]
    for tokens, left in ((stops[3], 4), (stops[3] - 1, 3), (stops[1], 2), (stops[0] - 1, 0), (0, 0)):
        blocks.crop(tokens)
        assert len(blocks) == left
    assert blocks.scores(0, torch.zeros(1, HEADS, DIM)).shape == (1, 0)


def test_restored_blocks_score_the_same_and_go_on() -> None:
    blocks, detailed, _ = filled(3)
    other, query = Blocks(blocks.geometry), torch.randn(1, HEADS, DIM)
    other.restore(list(blocks.spots), [means[:, :, :3].clone() for means in blocks.means])
    turn = feed(detailed, torch.ones(2, HEADS, 4, DIM), 0)
    for each in (blocks, other):
        each.add(detailed, Block(detailed.length - 4, detailed.length, 4), *turn)
    assert other.spots == blocks.spots
    assert torch.equal(other.scores(1, query), blocks.scores(1, query))
