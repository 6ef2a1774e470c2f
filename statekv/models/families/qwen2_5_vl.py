"""Qwen2.5-VL: steps are bare vision tokens, and a step's time is where it stands on the first axis of positions.

All steps of a video start at the position behind the text in front of it: rows and columns repeat, time moves on with
the clock. Text goes on behind the longer side of one picture, so a question stands at the same place however long the
video was, and its answer behind it. That is what `generate` of transformers 5.23 does (get_rope_index); the code that
the checkpoints came with lets text follow the highest position of the video instead. transformers 5.10 drops
the fraction of a step's seconds, so that a video of more than 2 frames a second stands still there; 5.23 does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLConfig

from statekv.cache.stream import StreamState
from statekv.models.adapter import Segment, check_placeholders, runs
from statekv.models.encoded import EncodedStep, Reduce, unchanged
from statekv.models.families.qwen_vl import SMALL_TOWER, QwenRecipe, QwenVL, qwen_tokens, temporal_patches, within
from statekv.models.preprocess import value_of
from statekv.models.prompt import Layout, VisionTokens
from statekv.models.size import Size, qwen2_7b, text_config

# Times are differences of floats: what falls short of a whole position by less than this is one.
_ROUNDING = 1e-4


@dataclass(frozen=True)
class Qwen25VLRecipe(QwenRecipe):
    """Qwen2.5-VL: the bounds are for height x width. Defaults are those of `Qwen2VLVideoProcessor`."""

    stock_class: ClassVar[str] = "Qwen2VLVideoProcessor"

    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    shortest_edge: int = 128 * 28 * 28
    longest_edge: int = 28 * 28 * 768
    patch_size: int = 14
    max_video_tokens: int = 128000

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Qwen25VLRecipe:
        """As for any of these; the JSON of older checkpoints names the bounds min_pixels and max_pixels."""
        size = value_of(values, "size", {"shortest_edge": cls.shortest_edge, "longest_edge": cls.longest_edge})
        if isinstance(size, Mapping):
            bounds = {"shortest_edge": values.get("min_pixels"), "longest_edge": values.get("max_pixels")}
            size = {**size, **{edge: bound for edge, bound in bounds.items() if bound is not None}}
        return super().from_dict({**values, "size": size})


def qwen2_5_vl_size(height: int, width: int, num_frames: int, recipe: Qwen25VLRecipe) -> tuple[int, int]:
    """The size to which Qwen2.5-VL resizes the frames of a video of so many: Qwen2-VL's `smart_resize` of transformers
    5.23.

    Only with `cap_pixels_per_frame` does it depend on their number, and then only for long videos.

    Returns:
        (height, width) in pixels, multiples of patch_size * merge_size.

    Raises:
        VideoError: one side is more than 200 times the other.
    """
    factor, largest = recipe.factor, recipe.longest_edge
    if recipe.cap_pixels_per_frame:
        total = int(recipe.max_video_tokens * factor * factor * 0.9)
        share = total * recipe.temporal_patch_size // num_frames
        largest = max(min(largest, share), int(recipe.shortest_edge * 1.05))
    return within(height, width, factor, (recipe.shortest_edge, largest))


def qwen2_5_vl_tokens(tokenizer: PreTrainedTokenizerBase) -> VisionTokens:
    """Qwen2.5-VL's tokens are Qwen3-VL's, but steps are bare: one start and one end enclose the whole video."""
    tokens = qwen_tokens(tokenizer)
    whole = tokens.start + tokens.pad + tokens.end
    return replace(tokens, placeholder=whole, opens=tokens.start, closes=tokens.end)


class Qwen25VL(QwenVL):
    """`Qwen2_5_VLForConditionalGeneration`, for example Qwen/Qwen2.5-VL-3B-Instruct."""

    own_time: ClassVar[bool] = True
    sizes: ClassVar[tuple[Size, ...]] = (qwen2_7b("qwen2.5-vl-7b", "qwen2_5_vl", 152064, trained_length=128000),)
    recipe: Qwen25VLRecipe

    @classmethod
    def random_config(cls, size: Size) -> Any:
        eighth = size.head_dim // 8
        sections = [eighth, 3 * eighth // 2, 3 * eighth // 2]
        rope = {"rope_type": "default", "rope_theta": size.rope_theta, "mrope_section": sections}
        return Qwen2_5_VLConfig(
            vision_config={**SMALL_TOWER, "out_hidden_size": size.hidden, "fullatt_block_indexes": [0]},
            text_config={"rope_parameters": rope, **text_config(size)},
            tie_word_embeddings=size.tied,
        )

    def vision_tokens(self, tokenizer: PreTrainedTokenizerBase) -> VisionTokens:
        return qwen2_5_vl_tokens(tokenizer)

    def read_recipe(self, video_json: Mapping[str, Any]) -> None:
        self.recipe = Qwen25VLRecipe.from_dict(video_json)

    def size(self, height: int, width: int, frames: int) -> tuple[int, int]:
        return qwen2_5_vl_size(height, width, frames, self.recipe)

    def step_text(self, seen: EncodedStep, state: StreamState) -> str:
        return self.prompts[state.config.layout].tokens.pad * seen.total

    def segments_of(self, seen: EncodedStep, state: StreamState) -> list[Segment]:
        prompt, moment = self.prompts[state.config.layout], self._moment(seen.frames[0].pts_seconds, state)
        head = prompt.head_ids(prompt.tokens.pad)
        words = frozenset(head)
        prefix = [] if state.frames or not head else [replace(self.text("prefix", head, 0), words=words)]
        ids = [self.video_token_id] * seen.total
        step = self.vision_segment(ids, seen, len(head), moment - state.compaction.gained)
        return [*prefix, replace(step, words=frozenset(ids))]

    def vision_segment(self, ids: Sequence[int], seen: EncodedStep, position: int, moment: int = 0) -> Segment:
        """As for any family; `moment` is the step's place on the axis of time, counted from the video's start."""
        token = self.video_token_id if self.video_token_id in ids else self.model.config.image_token_id
        row, embeds, spot = self.embed_picture(ids, token, seen)
        positions, following = self.positions(len(ids), spot.start, seen, position, moment)
        stands, frames = position + spot.start + moment, max(1, len(seen.frames))
        times = {"pts_seconds": seen.pts_seconds, "moment": stands}
        return Segment("step", row, embeds, positions, following, frames, **times, kept=seen.kept)

    def max_positions(self, frames: int, height: int, width: int, layout: Layout, seconds: float | None = None) -> int:
        head = len(self.prompts[layout].head_ids(self.prompts[layout].tokens.pad))
        side = max(self.size(height, width, frames)) // self.recipe.factor
        return head + max(side, int((seconds or 0) * self._per_second) + 1)

    def reach(self, inputs: Mapping[str, Any]) -> int:
        grids = inputs.get("video_grid_thw")
        steps = [] if grids is None else grids[:, 0].tolist()
        waits = (self._moments(count, each)[-1] for count, each in zip(steps, self._intervals(inputs), strict=False))
        return super().reach(inputs) + sum(waits)

    def segments(self, inputs: Mapping[str, Any], reduce: Reduce = unchanged) -> Iterator[Segment]:
        ids: list[int] = inputs["input_ids"][0].tolist()
        pictures = {token: temporal_patches(*source) for token, source in self.sources(inputs).items()}
        intervals = iter(self._intervals(inputs))
        done = position = 0
        for start, stop, token in runs(ids, list(pictures)):
            if not done and start:
                yield self.text("prefix", ids[:start], 0)
                done = position = start
            pieces = next(pictures[token], [])
            moments = self._moments(len(pieces), next(intervals, 0) if token == self.video_token_id else 0)
            begin = position + start - done
            for (patches, grid), moment in zip(pieces, moments, strict=True):
                (features,), _ = self.see(patches, [(1, *grid)], self.modality(token))
                end = max(done, start) + len(features)
                seen = reduce(EncodedStep((), features, self.merged(grid)))
                step = self.vision_segment(ids[done:end], seen, position, moment)
                yield step
                done, position = end, begin
            check_placeholders(stop - start, done - start)
            position = step.next_position
        yield self.text("question", ids[done:], position)

    def displacement(self, by: torch.Tensor) -> torch.Tensor:
        """Rows and columns are counted from the video's start, which stays: steps move on the axis of time alone."""
        return torch.stack([by, torch.zeros_like(by), torch.zeros_like(by)]).unsqueeze(1)

    @property
    def _per_second(self) -> int:
        return int(self.model.config.vision_config.tokens_per_second)

    def _moment(self, pts_seconds: float, state: StreamState) -> int:
        """Stock counts steps of a steady frame rate; the clock gives the same there, and stays right elsewhere."""
        origin = pts_seconds if state.origin_seconds is None else state.origin_seconds
        return int((pts_seconds - origin) * self._per_second + _ROUNDING)

    def _intervals(self, inputs: Mapping[str, Any]) -> list[float]:
        """Positions from one step of a video to the next, for each video; stock's default is a second."""
        grids, seconds = inputs.get("video_grid_thw"), inputs.get("second_per_grid_ts")
        if seconds is None:
            seconds = [1.0] * (0 if grids is None else len(grids))
        return [self._per_second * float(second) for second in seconds]

    def _moments(self, steps: int, interval: float) -> list[int]:
        # In float32, as stock does: a product that falls just short of a whole number is cut off there too.
        found: list[int] = (torch.arange(steps) * interval).long().tolist()
        return found
