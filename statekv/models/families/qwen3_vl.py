"""Qwen3-VL: every two frames have their time written before them, and vision features enter several layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from statekv.cache.stream import StreamState
from statekv.models.adapter import Segment, runs
from statekv.models.encoded import EncodedStep, unchanged
from statekv.models.families.qwen_vl import Qwen3VLRecipe, QwenVL, qwen3_vl_size, temporal_patches
from statekv.models.prompt import Layout, VisionTokens, qwen3_vl_step, qwen3_vl_tokens


class _Everywhere:
    """Stands for the mask of vision tokens and selects all tokens.

    Deepstack adds features to the tokens that a mask selects, and selecting by a mask makes the host wait for the
    device in every layer. Features that are zero beside the picture may be added to all tokens as well.
    """

    def to(self, *_: object) -> slice:
        """What transformers indexes with, whatever the device."""
        return slice(None)


EVERYWHERE = _Everywhere()


class Qwen3VL(QwenVL):
    """`Qwen3VLForConditionalGeneration`, for example Qwen/Qwen3-VL-2B-Instruct."""

    recipe: Qwen3VLRecipe

    def vision_tokens(self, tokenizer: PreTrainedTokenizerBase) -> VisionTokens:
        return qwen3_vl_tokens(tokenizer)

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

    def segments(
        self, inputs: Mapping[str, Any], reduce: Callable[[EncodedStep], EncodedStep] = unchanged
    ) -> Iterator[Segment]:
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
