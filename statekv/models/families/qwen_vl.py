"""What Qwen3-VL and Qwen2.5-VL share: two frames make a step, positions have three axes, one way to look.

Both read the same keys of the video processor's JSON, and mean different things by them: Qwen3-VL's bounds are for the
whole video, Qwen2.5-VL's for each frame.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from statekv.errors import ModelError, VideoError
from statekv.models.adapter import Texts, VideoModel, check_placeholders
from statekv.models.encoded import EncodedStep
from statekv.models.preprocess import PixelRecipe, common_of, count_of, resize_and_normalise, size_of, switch_of
from statekv.models.prompt import VisionTokens
from statekv.ops.rope import grid_positions, text_positions
from statekv.video.frame import Frame

# The size of pictures may follow from the number of frames. Where that is unknown, as in a live stream, they get the
# size that the processor gives to its longest video (its max_frames).
_FRAMES_IF_UNKNOWN = 768
_LARGEST_FLOOR = 1 << 22  # pixels that every picture is enlarged to; the public checkpoints ask for 131,072 at most

Modality = Literal["image", "video"]


# A vision tower that costs nothing, for models with random weights.
SMALL_TOWER = {"hidden_size": 32, "depth": 1, "num_heads": 2, "intermediate_size": 64}


class QwenVL(VideoModel):
    """Either family; `recipe` is set by `read_recipe`."""

    frames_per_step: ClassVar[int] = 2
    recipe: QwenRecipe

    def _read(self, texts: Texts) -> None:
        super()._read(texts)
        vision, recipe = self.model.config.vision_config, self.recipe
        cut = recipe.patch_size, recipe.temporal_patch_size, recipe.merge_size
        tower = vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size
        if cut != tower:
            rule = (
                f"the video processor's patch_size, temporal_patch_size and merge_size are {cut}, the model's {tower}"
            )
            raise ModelError(rule, "use the JSON files of the same checkpoint")

    @property
    def video_token_id(self) -> int:
        return int(self.model.config.video_token_id)

    @abstractmethod
    def size(self, height: int, width: int, frames: int) -> tuple[int, int]: ...

    def text_positions(self, start: int, length: int) -> torch.Tensor:
        return text_positions(start, length, self.model.device)

    def encode(self, steps: Sequence[Sequence[Frame]], frames_expected: int | None = None) -> list[EncodedStep]:
        made = [self._patches(frames, frames_expected) for frames in steps]
        thw = [(1, rows, columns) for _, (rows, columns) in made]
        features, deepstack = self.see(torch.cat([patches for patches, _ in made]), thw, "video")
        return [
            EncodedStep(tuple(frames), features[i], self.merged(grid), tuple(layer[i] for layer in deepstack))
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
        """Patches [n, d] and grids [pictures, 3] that came with a prompt, by placeholder; a ModelError unless the
        prompt has room for just these.
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
        self, length: int, first: int, seen: EncodedStep, start: int, moment: int = 0
    ) -> tuple[torch.Tensor, int]:
        """[3, 1, T] for words, one picture and words again, and the position that follows.

        A picture takes as many positions as its longer side has merged patches (transformers' get_rope_index), however
        many of its tokens are kept.

        Args:
            length: T, with the whole picture.
            moment: how far the picture lies behind the words on the axis of time.
        """
        rows, columns = seen.grid
        after = start + first + max(rows, columns)
        rest = length - first - rows * columns
        device = self.model.device
        picture = grid_positions(start + first, rows, columns, device)
        picture[0] += moment
        pieces = [text_positions(start, first, device), picture, text_positions(after, rest, device)]
        return self.kept_positions(torch.cat(pieces, dim=-1), first, seen), after + rest

    def _patches(self, frames: Sequence[Frame], frames_expected: int | None) -> tuple[torch.Tensor, tuple[int, int]]:
        height, width = frames[0].data.shape[-2:]
        size = self.size(height, width, frames_expected or _FRAMES_IF_UNKNOWN)
        pixels = torch.stack([frame.data for frame in frames]).to(self.model.device)
        patches, (_, rows, columns) = patchify(resize_and_normalise(pixels, *size, self.recipe), self.recipe)
        return patches, (rows, columns)


def qwen_tokens(tokenizer: PreTrainedTokenizerBase) -> VisionTokens:
    """Both families' tokens: as the tokenizer names them, or the usual ones, as in the stock processors."""
    start = str(getattr(tokenizer, "vision_start_token", "<|vision_start|>"))
    end = str(getattr(tokenizer, "vision_end_token", "<|vision_end|>"))
    pad = str(getattr(tokenizer, "video_token", "<|video_pad|>"))
    image = str(getattr(tokenizer, "image_token", "<|image_pad|>"))
    return VisionTokens(start, end, pad, placeholder=pad, reserved=(start, end, pad, image))


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


Recipe = TypeVar("Recipe", bound="QwenRecipe")


@dataclass(frozen=True)
class QwenRecipe(PixelRecipe):
    """What the JSON of either family says. `shortest_edge` and `longest_edge` bound pixels, despite their names."""

    stock_class: ClassVar[str]

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    shortest_edge: int = 0
    longest_edge: int = 0
    patch_size: int = 0
    temporal_patch_size: int = 2
    merge_size: int = 2
    cap_pixels_per_frame: bool = False
    max_video_tokens: int = 0

    @classmethod
    def from_dict(cls: type[Recipe], values: Mapping[str, Any]) -> Recipe:
        """Read the JSON of a checkpoint, as `common_of`; missing and null keys take the stock class's defaults."""
        size = size_of(values, {"shortest_edge": cls.shortest_edge, "longest_edge": cls.longest_edge})
        if not size[0] <= min(size[1], _LARGEST_FLOOR):
            rule = f"the video processor's size is {size}, but its least may be {_LARGEST_FLOOR} pixels and its most"
            raise ModelError(rule, "use the JSON files of the original checkpoint")
        names = ("patch_size", "temporal_patch_size", "merge_size", "max_video_tokens")
        own: dict[str, Any] = {name: count_of(values, name, getattr(cls, name)) for name in names}
        own["cap_pixels_per_frame"] = switch_of(values, "cap_pixels_per_frame", cls.cap_pixels_per_frame)
        common = common_of(values, cls.stock_class, cls())
        return cls(**common, shortest_edge=size[0], longest_edge=size[1], **own)

    @property
    def factor(self) -> int:
        """Pixels of a token's side."""
        return self.patch_size * self.merge_size


def within(
    height: int, width: int, factor: int, bounds: tuple[int, int], frames: int = 1, rounded_frames: int = 1
) -> tuple[int, int]:
    """Multiples of `factor` that keep the shape, and the pixels of so many frames between the bounds."""
    if max(height, width) / min(height, width) > 200:
        found = f"frames are {width}x{height} pixels, one side may be at most 200 times the other"
        raise VideoError(found, "crop the video first")
    smallest, largest = bounds
    rounded_h, rounded_w = round(height / factor) * factor, round(width / factor) * factor
    volume = rounded_frames * rounded_h * rounded_w
    if volume > largest:
        shrink = math.sqrt(frames * height * width / largest)
        rounded_h = max(factor, math.floor(height / shrink / factor) * factor)
        rounded_w = max(factor, math.floor(width / shrink / factor) * factor)
    elif volume < smallest:
        grow = math.sqrt(smallest / (frames * height * width))
        rounded_h = math.ceil(height * grow / factor) * factor
        rounded_w = math.ceil(width * grow / factor) * factor
    return rounded_h, rounded_w


def patchify(pixels: torch.Tensor, recipe: QwenRecipe) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """Cut frames into flat patches; the last frame is repeated to fill a temporal patch.

    Args:
        pixels: float32 [N, 3, H, W], height and width multiples of patch_size * merge_size.

    Returns:
        float32 [t * h * w, 3 * temporal_patch_size * patch_size ** 2] and the grid (t, h, w), in patches. The
        patches of a merge_size x merge_size block follow each other, as one token is made of them.
    """
    patch, merge, temporal = recipe.patch_size, recipe.merge_size, recipe.temporal_patch_size
    missing = -pixels.shape[0] % temporal
    if missing:
        pixels = torch.cat((pixels, pixels[-1:].expand(missing, -1, -1, -1)))
    frames, channels, height, width = pixels.shape
    t, h, w = frames // temporal, height // patch, width // patch
    cut = pixels.reshape(t, temporal, channels, h // merge, merge, patch, w // merge, merge, patch)
    flat = cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, channels * temporal * patch * patch)
    return flat, (t, h, w)
