"""Steps without pictures: random embeddings, at the positions and with the extras that a family's real steps have."""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt

import torch

from statekv.models.base import Segment, VideoModel
from statekv.models.families.qwen3_vl import EVERYWHERE, Qwen3VL
from statekv.ops.rope import grid_positions, text_positions

_DEEPSTACK = 3  # layers that receive vision features, in all Qwen3-VL sizes


@torch.inference_mode()
def random_step(model: VideoModel, tokens: int, number: int = 1) -> Segment:
    """One step of a stream.

    Args:
        model: whose family decides about positions and extras.
        tokens: of the step; of Qwen3-VL's, the largest square is the picture and the rest is text.
        number: of the step, from 1.

    Returns:
        A segment that begins where the steps before it end.
    """
    start = (number - 1) * stride(model, tokens)
    hidden, device = model.text_config.hidden_size, model.model.device
    embeds = torch.randn(1, tokens, hidden, device=device, dtype=model.geometry().dtype)
    ids = torch.zeros(1, tokens, dtype=torch.int64, device=device)
    following = start + stride(model, tokens)
    if not isinstance(model, Qwen3VL):
        return Segment("step", ids, embeds, model.text_positions(start, tokens), following, 1)
    side = isqrt(tokens)
    seen = side * side
    grid = grid_positions(start, side, side, device)
    positions = torch.cat([grid, text_positions(start + side, tokens - seen, device)], dim=-1)  # [3, 1, T]
    deep = [torch.randn_like(embeds) for _ in range(_DEEPSTACK)]
    extras = {"visual_pos_masks": EVERYWHERE, "deepstack_visual_embeds": deep}
    return Segment("step", ids, embeds, positions, following, model.frames_per_step, extras=extras)


def stride(model: VideoModel, tokens: int) -> int:
    """Positions that one step takes."""
    if not isinstance(model, Qwen3VL):
        return tokens
    side = isqrt(tokens)
    return side + tokens - side * side


@torch.inference_mode()
def products_alone(model: VideoModel, tokens: int) -> Callable[[], None]:
    """What multiplies random activations [T, in] with every weight of the language model's layers, and does no more.

    The time that this takes says how much of a step's distance to its floor lies in the shapes of its products.
    """
    layers = [module for module in model.language_model.layers.modules() if isinstance(module, torch.nn.Linear)]
    geometry = model.geometry()
    inputs = {
        width: torch.randn(tokens, width, device=geometry.devices[0], dtype=geometry.dtype)
        for width in {layer.in_features for layer in layers}
    }

    @torch.inference_mode()
    def call() -> None:
        for layer in layers:
            layer(inputs[layer.in_features])

    return call
