"""Qwen3-VL: two frames make a step, positions have three axes, vision features enter several layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from transformers import PreTrainedTokenizerBase

from statekv.cache.stream import StreamState
from statekv.models.base import Segment, VideoModel, check_placeholders, fill_placeholders, runs
from statekv.models.pixels import Qwen3VLRecipe, patchify, qwen3_vl_size, resize_and_normalise
from statekv.models.prompt import Layout, VisionTokens, qwen3_vl_step, qwen3_vl_tokens
from statekv.ops.rope import grid_positions, text_positions
from statekv.video.frame import Frame

# The size of pictures follows from the number of frames. Where that is unknown, as in a live stream, they get the
# size that the processor gives to its longest video (its max_frames).
_FRAMES_IF_UNKNOWN = 768


class Qwen3VL(VideoModel):
    """`Qwen3VLForConditionalGeneration`, for example Qwen/Qwen3-VL-2B-Instruct."""

    frames_per_step: ClassVar[int] = 2

    def vision_tokens(self, tokenizer: PreTrainedTokenizerBase) -> VisionTokens:
        return qwen3_vl_tokens(tokenizer)

    @property
    def video_token_id(self) -> int:
        return int(self.model.config.video_token_id)

    def read_recipe(self, video_json: Mapping[str, Any]) -> None:
        self.recipe = Qwen3VLRecipe.from_dict(video_json)

    def text_positions(self, start: int, length: int) -> torch.Tensor:
        return text_positions(start, length, self.model.device)

    def enter(self, frames: Sequence[Frame], state: StreamState) -> list[Segment]:
        height, width = frames[0].data.shape[-2:]
        size = qwen3_vl_size(height, width, state.frames_expected or _FRAMES_IF_UNKNOWN, self.recipe)
        pixels = torch.stack([frame.data for frame in frames]).to(self.model.device)
        patches, (_, rows, columns) = patchify(resize_and_normalise(pixels, *size, self.recipe), self.recipe)
        origin = frames[0].pts_seconds if state.origin_seconds is None else state.origin_seconds
        first_seconds, last_seconds = frames[0].pts_seconds - origin, frames[-1].pts_seconds - origin
        prompt = self.prompts[state.config.layout]
        text = qwen3_vl_step(first_seconds, last_seconds, rows * columns // self.recipe.merge_size**2, prompt.tokens)
        grid, time = (1, rows, columns), frames[0].pts_seconds
        if state.frames:
            return [self._picture(prompt.step_ids(text), patches, grid, state.position, "video", len(frames), time)]
        entering: list[Segment] = []
        if head := prompt.head_ids(text):
            entering.append(self.text("prefix", head, state.position))
        position = entering[-1].next_position if entering else state.position
        first = prompt.first_step_ids(text)
        return [*entering, self._picture(first, patches, grid, position, "video", len(frames), time)]

    def span(self, frames: int, height: int, width: int, layout: Layout) -> int:
        rows, columns = qwen3_vl_size(height, width, frames, self.recipe)
        side = max(rows, columns) // (self.recipe.patch_size * self.recipe.merge_size)
        prompt = self.prompts[layout]
        words = len(prompt.step_ids(qwen3_vl_step(99999.9, 99999.9, 0, prompt.tokens)))
        steps = -(-frames // self.frames_per_step)
        return len(prompt.head_ids(qwen3_vl_step(0, 0, 1, prompt.tokens))) + steps * (words + side)

    def segments(self, inputs: Mapping[str, Any]) -> Iterator[Segment]:
        ids: torch.Tensor = inputs["input_ids"][0]
        config = self.model.config
        sources = {
            config.image_token_id: (inputs.get("pixel_values"), inputs.get("image_grid_thw")),
            config.video_token_id: (inputs.get("pixel_values_videos"), inputs.get("video_grid_thw")),
        }
        for token, (patches, _) in sources.items():
            given = 0 if patches is None else len(patches) // config.vision_config.spatial_merge_size**2
            check_placeholders(int((ids == token).sum()), given)
        pictures = {token: _pieces(*source) for token, source in sources.items()}
        done, position = 0, 0
        for start, stop, token in runs(ids, list(pictures)):
            if not done and start > 1:
                prefix = self.text("prefix", ids[: start - 1], position)  # all but the picture's start token
                yield prefix
                done, position = start - 1, prefix.next_position
            patches, grid = next(pictures[token])
            modality = "video" if token == config.video_token_id else "image"
            # The picture's end token still belongs to the step.
            step = self._picture(ids[done : stop + 1], patches, grid, position, modality, 1, None)
            yield step
            done, position = stop + 1, step.next_position
        yield self.text("question", ids[done:], position)

    def _picture(
        self,
        ids: Sequence[int] | torch.Tensor,
        patches: torch.Tensor,
        grid: tuple[int, int, int],
        position: int,
        modality: str,
        frames: int,
        pts_seconds: float | None,
    ) -> Segment:
        row = torch.as_tensor(ids, device=self.model.device).view(1, -1)
        token = self.model.config.video_token_id if modality == "video" else self.model.config.image_token_id
        spots = row == token
        thw = torch.tensor([grid], device=self.model.device)
        if modality == "video":
            seen = self.model.model.get_video_features(patches, thw, return_dict=True)
        else:
            seen = self.model.model.get_image_features(patches, thw, return_dict=True)
        positions, following = self._positions(spots[0], grid, position)
        return Segment(
            "step",
            row,
            fill_placeholders(self.embed(row), spots, _joined(seen.pooler_output)),
            positions,
            following,
            frames,
            pts_seconds,
            {
                "visual_pos_masks": spots,
                "deepstack_visual_embeds": [_joined(feature) for feature in seen.deepstack_features],
            },
        )

    def _positions(self, spots: torch.Tensor, grid: tuple[int, int, int], start: int) -> tuple[torch.Tensor, int]:
        """[3, 1, T] for words, one picture and words again, and the position that follows.

        A picture takes as many positions as its longer side has merged patches (transformers' get_rope_index).
        """
        merge = self.model.config.vision_config.spatial_merge_size
        rows, columns = grid[1] // merge, grid[2] // merge
        first = int(spots.nonzero()[0])
        after = start + first + max(rows, columns)
        rest = spots.shape[0] - first - rows * columns
        device = spots.device
        pieces = [
            text_positions(start, first, device),
            grid_positions(start + first, rows, columns, device),
            text_positions(after, rest, device),
        ]
        return torch.cat(pieces, dim=-1), after + rest


def _joined(features: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    """[n, hidden]; transformers splits features by picture, but up to 5.15 left those of deepstack in one piece."""
    return features if isinstance(features, torch.Tensor) else torch.cat(tuple(features))


def _pieces(
    patches: torch.Tensor | None, grids: torch.Tensor | None
) -> Iterator[tuple[torch.Tensor, tuple[int, int, int]]]:
    """Each temporal patch of each picture or video: its flat patches [h · w, d] and its grid (1, h, w)."""
    if patches is None or grids is None:
        return
    done = 0
    for t, h, w in grids.tolist():
        for _ in range(t):
            yield patches[done : done + h * w], (1, h, w)
            done += h * w
