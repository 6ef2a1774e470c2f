"""Qwen3-VL: every two frames have their time written before them, and vision features enter several layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import isqrt
from typing import Any, ClassVar

import torch
from transformers import PreTrainedTokenizerBase, Qwen3VLConfig

from statekv.cache.stream import StreamState
from statekv.models.adapter import Segment, runs
from statekv.models.encoded import EncodedStep, Reduce, unchanged
from statekv.models.families.qwen_vl import SMALL_TOWER, QwenRecipe, QwenVL, qwen_tokens, temporal_patches, within
from statekv.models.prompt import Layout, VisionTokens
from statekv.models.size import Size, text_config
from statekv.ops.rope import grid_positions, text_positions


@dataclass(frozen=True)
class Qwen3VLRecipe(QwenRecipe):
    """Qwen3-VL: the bounds are for frames x height x width. Defaults are those of `Qwen3VLVideoProcessor`."""

    stock_class: ClassVar[str] = "Qwen3VLVideoProcessor"

    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    shortest_edge: int = 128 * 32 * 32
    longest_edge: int = 32 * 32 * 768
    patch_size: int = 16
    max_video_tokens: int = 768


def qwen3_vl_size(height: int, width: int, num_frames: int, recipe: Qwen3VLRecipe) -> tuple[int, int]:
    """The size to which Qwen3-VL resizes the frames of a video: `smart_resize` of transformers 5.23.

    The budget is for the whole video, so the number of frames has to be known (or chosen) before the first
    one. Stock refuses a video of a single frame; here it counts as the full temporal patch that it is padded
    to. transformers before 5.15 rounds odd counts up to the temporal patch where later ones round half to
    even: the two differ only when `num_frames % 4 == 1` and the budget lies between both roundings.

    Returns:
        (height, width) in pixels, multiples of patch_size * merge_size.

    Raises:
        VideoError: one side is more than 200 times the other.
    """
    factor = recipe.factor
    num_frames = max(num_frames, recipe.temporal_patch_size)
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    bounds = recipe.shortest_edge, _pixel_budget(num_frames, recipe)
    rounded = round(num_frames / recipe.temporal_patch_size) * recipe.temporal_patch_size
    return within(height, width, factor, bounds, num_frames, rounded)


def _pixel_budget(num_frames: int, recipe: Qwen3VLRecipe) -> int:
    if not recipe.cap_pixels_per_frame:
        return recipe.longest_edge
    ceiling = recipe.max_video_tokens * recipe.factor**2
    share = min(ceiling, recipe.longest_edge // num_frames)
    return max(share, int(recipe.shortest_edge * 1.05)) * num_frames


def qwen3_vl_step(first_seconds: float, last_seconds: float, num_tokens: int, tokens: VisionTokens) -> str:
    """The text of one Qwen3-VL temporal patch: the mean of its first and last frame's times, and its tokens.

    A patch that was filled by repeating its only frame has that frame's time.
    """
    seconds = (first_seconds + last_seconds) / 2
    return f"<{seconds:.1f} seconds>{tokens.start}{tokens.pad * num_tokens}{tokens.end}"


class _Everywhere:
    """Stands for the mask of vision tokens and selects all tokens.

    Deepstack adds features to the tokens that a mask selects, and selecting by a mask makes the host wait for the
    device in every layer. Features that are zero beside the picture may be added to all tokens as well.
    """

    def to(self, *_: object) -> slice:
        """What transformers indexes with, whatever the device."""
        return slice(None)


EVERYWHERE = _Everywhere()
_DEEPSTACK = 3  # layers that receive vision features, in all sizes


def _qwen3(name: str, hidden: int, intermediate: int, layers: int, heads: int, tied: bool) -> Size:
    """A Qwen3 with multi-axis RoPE."""
    rope: dict[str, Any] = {"rope_theta": 5e6, "rope_factor": None, "trained_length": 262144}
    alike: dict[str, Any] = {"kv_heads": 8, "head_dim": 128, "vocab": 151936, "qkv_bias": False, **rope}
    return Size(name, "qwen3_vl", hidden, intermediate, layers, heads, tied=tied, **alike)


class Qwen3VL(QwenVL):
    """`Qwen3VLForConditionalGeneration`, for example Qwen/Qwen3-VL-2B-Instruct."""

    sizes: ClassVar[tuple[Size, ...]] = (
        _qwen3("qwen3-vl-2b", 2048, 6144, 28, 16, tied=True),
        _qwen3("qwen3-vl-4b", 2560, 9728, 36, 32, tied=True),
        _qwen3("qwen3-vl-8b", 4096, 12288, 36, 32, tied=False),
    )
    recipe: Qwen3VLRecipe

    @classmethod
    def random_config(cls, size: Size) -> Any:
        vision = {**SMALL_TOWER, "out_hidden_size": size.hidden}
        sixteenth = size.head_dim // 16
        # Time, height and width share the rotated pairs.
        sections = [3 * sixteenth, 5 * sixteenth // 2, 5 * sixteenth // 2]
        rope = {"rope_type": "default", "rope_theta": size.rope_theta, "mrope_section": sections}
        return Qwen3VLConfig(
            vision_config={**vision, "deepstack_visual_indexes": [0]},
            text_config={
                "head_dim": size.head_dim,
                "rope_parameters": {**rope, "mrope_interleaved": True},
                **text_config(size),
            },
            tie_word_embeddings=size.tied,
        )

    def random_step(self, tokens: int, start: int) -> Segment:
        """The largest square is the picture, the rest is text."""
        step, side = super().random_step(tokens, start), isqrt(tokens)
        words = text_positions(start + side, tokens - side * side, self.model.device)
        positions = torch.cat([grid_positions(start, side, side, self.model.device), words], dim=-1)  # [3, 1, T]
        deep = [torch.randn_like(step.embeds) for _ in range(_DEEPSTACK)]
        extras = {"visual_pos_masks": EVERYWHERE, "deepstack_visual_embeds": deep}
        return replace(step, positions=positions, frames=self.frames_per_step, extras=extras)

    def stride(self, tokens: int) -> int:
        side = isqrt(tokens)
        return side + tokens - side * side

    def vision_tokens(self, tokenizer: PreTrainedTokenizerBase) -> VisionTokens:
        """Stock replaces only the pad token. The start and end that the chat template writes around it stay, so the
        prompt holds a `<|vision_start|>` before the first timestamp and a `<|vision_end|>` after the last step,
        besides each step's own.
        """
        return qwen_tokens(tokenizer)

    def read_recipe(self, video_json: Mapping[str, Any]) -> None:
        self.recipe = Qwen3VLRecipe.from_dict(video_json)

    def size(self, height: int, width: int, frames: int) -> tuple[int, int]:
        return qwen3_vl_size(height, width, frames, self.recipe)

    def step_text(self, seen: EncodedStep, state: StreamState) -> str:
        first, last = seen.frames[0].pts_seconds, seen.frames[-1].pts_seconds
        origin = first if state.origin_seconds is None else state.origin_seconds
        return qwen3_vl_step(first - origin, last - origin, seen.total, self.prompts[state.config.layout].tokens)

    def vision_segment(self, ids: Sequence[int], seen: EncodedStep, position: int) -> Segment:
        token = self.video_token_id if self.video_token_id in ids else self.model.config.image_token_id
        row, embeds, spot = self.embed_picture(ids, token, seen)
        positions, following = self.positions(len(ids), spot.start, seen, position)
        deep = [torch.zeros_like(embeds) for _ in seen.deepstack]
        for place, features in zip(deep, seen.deepstack, strict=True):
            place[:, spot] = features.to(place)
        extras = {"visual_pos_masks": EVERYWHERE, "deepstack_visual_embeds": deep}
        frames, seconds = max(1, len(seen.frames)), seen.pts_seconds
        return Segment("step", row, embeds, positions, following, frames, seconds, extras, kept=seen.kept)

    def max_positions(self, frames: int, height: int, width: int, layout: Layout, seconds: float | None = None) -> int:
        side = max(self.size(height, width, frames)) // self.recipe.factor
        prompt = self.prompts[layout]
        words = len(prompt.step_ids(qwen3_vl_step(99999.9, 99999.9, 0, prompt.tokens)))
        steps = -(-frames // self.frames_per_step)
        return len(prompt.head_ids(qwen3_vl_step(0, 0, 1, prompt.tokens))) + steps * (words + side)

    def segments(self, inputs: Mapping[str, Any], reduce: Reduce = unchanged) -> Iterator[Segment]:
        ids: list[int] = inputs["input_ids"][0].tolist()
        pictures = {
            token: chain.from_iterable(temporal_patches(*source)) for token, source in self.sources(inputs).items()
        }
        done, position = 0, 0
        for start, stop, token in runs(ids, list(pictures)):
            if not done and start > 1:
                prefix = self.text("prefix", ids[: start - 1], position)  # all but the picture's start token
                yield prefix
                done, position = start - 1, prefix.next_position
            patches, grid = next(pictures[token])
            (features,), deepstack = self.see(patches, [(1, *grid)], self.modality(token))
            seen = EncodedStep((), features, self.merged(grid), tuple(layer for (layer,) in deepstack))
            # The picture's end token still belongs to the step.
            step = self.vision_segment(ids[done : stop + 1], reduce(seen), position)
            yield step
            done, position = stop + 1, step.next_position
        yield self.text("question", ids[done:], position)
