"""The texts of an Eagle2.5 checkpoint, and a stand-in for its processor, called as the tests call stock processors.

Written anew after NVIDIA/Isaac-GR00T, gr00t/model/backbone/eagle2_hg_model: processing_eagle2_5_vl.py
(`replace_media_placeholder`) and image_processing_eagle2_5_vl_fast.py (`_get_image_patches`). It is told the times of
a video's frames, and not their rate.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from tests import stock

_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
_CUBIC = 3  # PIL's number

Images = list[torch.Tensor]

TEMPLATE = """\
{%- set pictures = namespace(image=0, video=0) -%}
{%- for message in messages -%}
    {%- if loop.first and message['role'] != 'system' -%}
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
    {%- endif -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message['content'] is string -%}{{- message['content'] -}}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'image' -%}
                {%- set pictures.image = pictures.image + 1 -%}{{- '<image-' ~ pictures.image ~ '>' -}}
            {%- elif part['type'] == 'video' -%}
                {%- set pictures.video = pictures.video + 1 -%}{{- '<video-' ~ pictures.video ~ '>' -}}
            {%- elif part['type'] == 'text' -%}{{- part['text'] -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

# The keys of the public checkpoint's files, with a smaller tile.
JSON_FILES: dict[str, dict[str, Any]] = {
    "preprocessor_config.json": {
        "image_processor_type": "Eagle2_5_VLImageProcessorFast",
        "processor_class": "Eagle2_5_VLProcessor",
        "size": {"height": 32, "width": 32},
        "crop_size": None,
        "do_resize": False,
        "do_center_crop": None,
        "do_rescale": True,
        "do_normalize": True,
        "do_pad": False,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "min_dynamic_tiles": 1,
        "max_dynamic_tiles": 12,
        "use_thumbnail": True,
        "pad_during_tiling": False,
        "tokens_per_tile": 4,
    },
    "chat_template.json": {"chat_template": TEMPLATE},
}


class EagleProcessor:
    """Conversations to input ids and tiles.

    Args:
        tokenizer: the checkpoint's.
        values: its preprocessor_config.json.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, values: dict[str, Any]) -> None:
        self.tokenizer = tokenizer
        self.values = values
        self.chat_template = tokenizer.chat_template
        self.functional = stock.tv_functional()

    def apply_chat_template(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        )

    def __call__(
        self,
        text: list[str],
        return_tensors: str = "pt",
        images: Images | None = None,
        videos: Images | None = None,
        video_metadata: list[dict[str, Any]] | None = None,
        do_sample_frames: bool = False,
    ) -> dict[str, Any]:
        assert return_tensors == "pt"
        assert not do_sample_frames
        tiles: list[torch.Tensor] = []

        def replace(match: re.Match[str]) -> str:
            index = int(match[2]) - 1
            if match[1] == "image":
                made = self._tiles((images or [])[index], int(self.values["max_dynamic_tiles"]))
                tiles.append(made)
                return f"<image {index + 1}>{self._vision(len(made))}"
            told = (video_metadata or [])[index]
            times = [frame / told["fps"] for frame in told["frames_indices"]]
            frames = [self._tiles(frame, 1) for frame in (videos or [])[index]]
            tiles.extend(frames)
            lines = [
                f"Frame {i + 1} sample at {seconds:.2f}s: {self._vision(len(frame))}"
                for i, (seconds, frame) in enumerate(zip(times, frames, strict=True))
            ]
            return f"The {_ORDINALS[index]} video: {''.join(lines)}"

        (sample,) = (re.sub(r"<(image|video)-(\d+)>", replace, each) for each in text)
        made = dict(self.tokenizer([sample], return_tensors="pt"))
        return {**made, "pixel_values": torch.cat(tiles)} if tiles else made

    def _vision(self, tiles: int) -> str:
        return f"<img>{'<IMG_CONTEXT>' * tiles * self.values['tokens_per_tile']}</img>"

    def _tiles(self, picture: torch.Tensor, most: int) -> torch.Tensor:
        """uint8 [3, H, W] → float32 [tiles, 3, side, side], a thumbnail behind the tiles where there are several."""
        side = int(self.values["size"]["height"])
        across, down = _grid(picture.shape[2], picture.shape[1], side, most)
        whole = self._resize(picture, side * down, side * across)
        parts = [part for row in whole.split(side, dim=1) for part in row.split(side, dim=2)]
        if len(parts) > 1 and self.values["use_thumbnail"]:
            parts.append(self._resize(picture, side, side))
        factor = 1.0 / self.values["rescale_factor"]
        mean, std = (torch.tensor(self.values[key]) * factor for key in ("image_mean", "image_std"))
        found: torch.Tensor = self.functional.normalize(torch.stack(parts).float(), mean.tolist(), std.tolist())
        return found

    def _resize(self, picture: torch.Tensor, height: int, width: int) -> torch.Tensor:
        assert self.values["resample"] == _CUBIC
        cubic = self.functional.InterpolationMode.BICUBIC
        found: torch.Tensor = self.functional.resize(picture, [height, width], interpolation=cubic, antialias=True)
        return found


def _grid(width: int, height: int, side: int, most: int) -> tuple[int, int]:
    """(across, down) of at most so many tiles, whose shape and area suit the picture best."""
    grids = {(i, j) for n in range(1, most + 1) for i in range(1, n + 1) for j in range(1, n + 1) if i * j <= most}
    aspect = width / height

    def suits(grid: tuple[int, int]) -> float:
        ratio = grid[0] / grid[1]
        area = min(grid[0] * grid[1] * side * side / (width * height), 0.6)
        return area * min(ratio / aspect, aspect / ratio)

    return max(sorted(grids, key=lambda grid: grid[0] * grid[1]), key=suits)
