"""Qwen3-VL: two frames make a step, positions have three axes, vision features enter several layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from transformers import PreTrainedTokenizerBase

from statekv.cache.stream import StreamState
from statekv.models.base import Seen, Segment, VideoModel, check_placeholders, runs
from statekv.models.pixels import Qwen3VLRecipe, patchify, qwen3_vl_size, resize_and_normalise
from statekv.models.prompt import Layout, VisionTokens, qwen3_vl_step, qwen3_vl_tokens
from statekv.ops.rope import grid_positions, text_positions
from statekv.video.frame import Frame

# The size of pictures follows from the number of frames. Where that is unknown, as in a live stream, they get the
# size that the processor gives to its longest video (its max_frames).
_FRAMES_IF_UNKNOWN = 768


Modality = Literal["image", "video"]


class _Everywhere:
    """Stands for the mask of vision tokens and selects all tokens.

    Deepstack adds features to the tokens that a mask selects, and selecting by a mask makes the host wait for the
    device in every layer. Features that are zero beside the picture may be added to all tokens as well.
    """

    def to(self, *_: object) -> slice:
        """What transformers indexes with, whatever the device."""
        return slice(None)


EVERYWHERE = _Everywhere()


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

    def look(self, steps: Sequence[Sequence[Frame]], frames_expected: int | None = None) -> list[Seen]:
        made = [self._patches(frames, frames_expected) for frames in steps]
        thw = [(1, rows, columns) for _, (rows, columns) in made]
        features, deepstack = self._see(torch.cat([patches for patches, _ in made]), thw, "video")
        return [
            Seen(tuple(frames), features[i], tuple(layer[i] for layer in deepstack), grid)
            for i, (frames, (_, grid)) in enumerate(zip(steps, made, strict=True))
        ]

    def label(self, seen: Seen, state: StreamState) -> str:
        first, last = seen.frames[0].pts_seconds, seen.frames[-1].pts_seconds
        origin = first if state.origin_seconds is None else state.origin_seconds
        return qwen3_vl_step(
            first - origin, last - origin, len(seen.features), self.prompts[state.config.layout].tokens
        )

    def picture(self, ids: Sequence[int], seen: Seen, position: int) -> Segment:
        token = self.video_token_id if self.video_token_id in ids else self.model.config.image_token_id
        row, embeds, spot = self.embed_picture(ids, token, seen.features)
        positions, following = self._positions(len(ids), spot.start, seen.grid, position)
        deep = [torch.zeros_like(embeds) for _ in seen.deepstack]
        for place, features in zip(deep, seen.deepstack, strict=True):
            place[:, spot] = features.to(place)
        extras = {"visual_pos_masks": EVERYWHERE, "deepstack_visual_embeds": deep}
        return Segment("step", row, embeds, positions, following, max(1, len(seen.frames)), seen.pts_seconds, extras)

    def span(self, frames: int, height: int, width: int, layout: Layout) -> int:
        rows, columns = qwen3_vl_size(height, width, frames, self.recipe)
        side = max(rows, columns) // (self.recipe.patch_size * self.recipe.merge_size)
        prompt = self.prompts[layout]
        words = len(prompt.step_ids(qwen3_vl_step(99999.9, 99999.9, 0, prompt.tokens)))
        steps = -(-frames // self.frames_per_step)
        return len(prompt.head_ids(qwen3_vl_step(0, 0, 1, prompt.tokens))) + steps * (words + side)

    def segments(self, inputs: Mapping[str, Any]) -> Iterator[Segment]:
        ids: list[int] = inputs["input_ids"][0].tolist()
        config = self.model.config
        sources = {
            config.image_token_id: (inputs.get("pixel_values"), inputs.get("image_grid_thw")),
            config.video_token_id: (inputs.get("pixel_values_videos"), inputs.get("video_grid_thw")),
        }
        for token, (patches, _) in sources.items():
            given = 0 if patches is None else len(patches) // config.vision_config.spatial_merge_size**2
            check_placeholders(ids.count(token), given)
        pictures = {token: _pieces(*source) for token, source in sources.items()}
        done, position = 0, 0
        for start, stop, token in runs(ids, list(pictures)):
            if not done and start > 1:
                prefix = self.text("prefix", ids[: start - 1], position)  # all but the picture's start token
                yield prefix
                done, position = start - 1, prefix.next_position
            patches, grid = next(pictures[token])
            modality: Modality = "video" if token == config.video_token_id else "image"
            (features,), deepstack = self._see(patches, [(1, *grid)], modality)
            seen = Seen((), features, tuple(layer for (layer,) in deepstack), grid)
            # The picture's end token still belongs to the step.
            step = self.picture(ids[done : stop + 1], seen, position)
            yield step
            done, position = stop + 1, step.next_position
        yield self.text("question", ids[done:], position)

    def _patches(self, frames: Sequence[Frame], frames_expected: int | None) -> tuple[torch.Tensor, tuple[int, int]]:
        height, width = frames[0].data.shape[-2:]
        size = qwen3_vl_size(height, width, frames_expected or _FRAMES_IF_UNKNOWN, self.recipe)
        pixels = torch.stack([frame.data for frame in frames]).to(self.model.device)
        patches, (_, rows, columns) = patchify(resize_and_normalise(pixels, *size, self.recipe), self.recipe)
        return patches, (rows, columns)

    def _see(
        self, patches: torch.Tensor, grids: Sequence[tuple[int, int, int]], modality: Modality
    ) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
        """Features [n, hidden] of each picture, and those of each deepstack layer, by picture again."""
        thw = torch.tensor(grids, device=self.model.device)
        model = self.model.model
        see = model.get_video_features if modality == "video" else model.get_image_features
        seen = see(patches, thw, return_dict=True)
        merged = self.model.config.vision_config.spatial_merge_size**2
        sizes = [rows * columns // merged for _, rows, columns in grids]
        deepstack = [list(_joined(layer).split(sizes)) for layer in seen.deepstack_features]
        return list(_joined(seen.pooler_output).split(sizes)), deepstack

    def _positions(self, length: int, first: int, grid: tuple[int, int], start: int) -> tuple[torch.Tensor, int]:
        """[3, 1, T] for words, one picture and words again, and the position that follows.

        A picture takes as many positions as its longer side has merged patches (transformers' get_rope_index).
        """
        merge = self.model.config.vision_config.spatial_merge_size
        rows, columns = grid[0] // merge, grid[1] // merge
        after = start + first + max(rows, columns)
        rest = length - first - rows * columns
        device = self.model.device
        pieces = [
            text_positions(start, first, device),
            grid_positions(start + first, rows, columns, device),
            text_positions(after, rest, device),
        ]
        return torch.cat(pieces, dim=-1), after + rest


def _joined(features: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    """[n, hidden]; transformers splits features by picture, but up to 5.15 left those of deepstack in one piece."""
    return features if isinstance(features, torch.Tensor) else torch.cat(tuple(features))


def _pieces(patches: torch.Tensor | None, grids: torch.Tensor | None) -> Iterator[tuple[torch.Tensor, tuple[int, int]]]:
    """Each temporal patch of each picture or video: its flat patches [h · w, d] and its grid (h, w)."""
    if patches is None or grids is None:
        return
    done = 0
    for t, h, w in grids.tolist():
        for _ in range(t):
            yield patches[done : done + h * w], (h, w)
            done += h * w
