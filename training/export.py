"""Write the trained weights as an ordinary checkpoint folder: `python -m training.export --run runs/demo`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from training.model import PICTURE, TOKENS_PER_FRAME, build_model
from training.tokenizer import CHAT_TEMPLATE, build_tokenizer

TARGET = Path(__file__).parent.parent / "statekv" / "checkpoints" / "demo"

_PIXELS: dict[str, Any] = {
    "do_resize": True,
    "size": {"height": PICTURE, "width": PICTURE},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "do_convert_rgb": True,
    "processor_class": "InternVLProcessor",
}
_FILES: dict[str, dict[str, Any]] = {
    "preprocessor_config.json": {
        "image_processor_type": "GotOcr2ImageProcessor",
        "crop_to_patches": False,
        "min_patches": 1,
        "max_patches": 1,
        **_PIXELS,
    },
    "video_preprocessor_config.json": {"video_processor_type": "InternVLVideoProcessor", **_PIXELS},
    "processor_config.json": {"processor_class": "InternVLProcessor", "image_seq_length": TOKENS_PER_FRAME},
}


def export(run: Path, target: Path) -> None:
    """Weights in float16 (they are small and were trained in bfloat16), tokenizer, processors, chat template."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    model.load_state_dict(torch.load(run / "state.pt", weights_only=True)["model"])
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    model.half().save_pretrained(target)
    tokenizer.save_pretrained(target)
    (target / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    for name, values in _FILES.items():
        (target / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"))
    parser.add_argument("--target", type=Path, default=TARGET)
    args = parser.parse_args()
    export(args.run, args.target)


if __name__ == "__main__":
    main()
