"""What Qwen3-VL and Qwen2.5-VL share: two frames make a step, positions have three axes, one way to look."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch

from statekv.models.base import Seen, VideoModel
from statekv.models.families.qwen_pixels import QwenRecipe, patchify
from statekv.models.pixels import resize_and_normalise
from statekv.models.placeholders import check_placeholders
from statekv.ops.rope import grid_positions, text_positions
from statekv.video.frame import Frame

# The size of pictures may follow from the number of frames. Where that is unknown, as in a live stream, they get the
# size that the processor gives to its longest video (its max_frames).
_FRAMES_IF_UNKNOWN = 768

Modality = Literal["image", "video"]


class QwenVL(VideoModel):
    """Either family; `recipe` is set by `read_recipe`."""

    frames_per_step: ClassVar[int] = 2
    recipe: QwenRecipe

    @property
    def video_token_id(self) -> int:
        return int(self.model.config.video_token_id)

    @abstractmethod
    def size(self, height: int, width: int, frames: int) -> tuple[int, int]:
        """(height, width) in pixels that frames of this size get in a video of so many."""

    def text_positions(self, start: int, length: int) -> torch.Tensor:
        return text_positions(start, length, self.model.device)

    def look(self, steps: Sequence[Sequence[Frame]], frames_expected: int | None = None) -> list[Seen]:
        made = [self._patches(frames, frames_expected) for frames in steps]
        thw = [(1, rows, columns) for _, (rows, columns) in made]
        features, deepstack = self.see(torch.cat([patches for patches, _ in made]), thw, "video")
        return [
            Seen(tuple(frames), features[i], tuple(layer[i] for layer in deepstack), grid)
            for i, (frames, (_, grid)) in enumerate(zip(steps, made, strict=True))
        ]

    def see(
        self, patches: torch.Tensor, grids: Sequence[tuple[int, int, int]], modality: Modality
    ) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
        """Features [n, hidden] of each picture, and those of each deepstack layer, by picture again."""
        thw = torch.tensor(grids, device=self.model.device)
        model = self.model.model
        see = model.get_video_features if modality == "video" else model.get_image_features
        seen = see(patches, thw, return_dict=True)
        merged = self.model.config.vision_config.spatial_merge_size**2
        sizes = [rows * columns // merged for _, rows, columns in grids]
        layers = getattr(seen, "deepstack_features", None) or ()
        return list(_joined(seen.pooler_output).split(sizes)), [list(_joined(layer).split(sizes)) for layer in layers]

    def modality(self, token: int) -> Modality:
        """What a placeholder stands for."""
        return "video" if token == self.video_token_id else "image"

    def sources(self, inputs: Mapping[str, Any]) -> dict[int, tuple[torch.Tensor | None, torch.Tensor | None]]:
        """Patches [n, d] and grids [pictures, 3] that came with a prompt, by placeholder.

        Raises:
            ModelError: there are more or fewer patches than the prompt has room for.
        """
        config, ids = self.model.config, inputs["input_ids"][0].tolist()
        sources = {
            config.image_token_id: (inputs.get("pixel_values"), inputs.get("image_grid_thw")),
            config.video_token_id: (inputs.get("pixel_values_videos"), inputs.get("video_grid_thw")),
        }
        for token, (patches, _) in sources.items():
            given = 0 if patches is None else len(patches) // config.vision_config.spatial_merge_size**2
            check_placeholders(ids.count(token), given)
        return sources

    def merged(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tokens out of those of patches."""
        merge = self.model.config.vision_config.spatial_merge_size
        return grid[0] // merge, grid[1] // merge

    def positions(
        self, length: int, first: int, grid: tuple[int, int], start: int, moment: int = 0
    ) -> tuple[torch.Tensor, int]:
        """[3, 1, T] for words, one picture and words again, and the position that follows.

        A picture takes as many positions as its longer side has merged patches (transformers' get_rope_index).

        Args:
            length: T.
            first: words in front of the picture.
            grid: rows and columns of patches.
            start: position of the first token.
            moment: how far the picture lies behind the words on the axis of time.
        """
        rows, columns = self.merged(grid)
        after = start + first + max(rows, columns)
        rest = length - first - rows * columns
        device = self.model.device
        picture = grid_positions(start + first, rows, columns, device)
        picture[0] += moment
        pieces = [text_positions(start, first, device), picture, text_positions(after, rest, device)]
        return torch.cat(pieces, dim=-1), after + rest

    def _patches(self, frames: Sequence[Frame], frames_expected: int | None) -> tuple[torch.Tensor, tuple[int, int]]:
        height, width = frames[0].data.shape[-2:]
        size = self.size(height, width, frames_expected or _FRAMES_IF_UNKNOWN)
        pixels = torch.stack([frame.data for frame in frames]).to(self.model.device)
        patches, (_, rows, columns) = patchify(resize_and_normalise(pixels, *size, self.recipe), self.recipe)
        return patches, (rows, columns)


def temporal_patches(
    patches: torch.Tensor | None, grids: torch.Tensor | None
) -> Iterator[list[tuple[torch.Tensor, tuple[int, int]]]]:
    """For each picture or video its temporal patches: their flat patches [h · w, d] and grid (h, w)."""
    if patches is None or grids is None:
        return
    done = 0
    for t, h, w in grids.tolist():
        size = h * w
        yield [(patches[done + i * size : done + (i + 1) * size], (h, w)) for i in range(t)]
        done += t * size


def _joined(features: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    """[n, hidden]; transformers splits features by picture, but up to 5.15 left those of deepstack in one piece."""
    return features if isinstance(features, torch.Tensor) else torch.cat(tuple(features))
