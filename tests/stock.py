"""The stock Hugging Face processors, for tests to compare with.

They need torchvision, whose compiled half may belong to another build of torch. Its Python half then fails at
import, because it describes two operators that were never declared; declaring them is enough for everything
that processors use. With such a torchvision installed, transformers cannot even import a model;
`tests/__init__.py` therefore declares them before anything else happens, and `make test` installs torchvision into a
folder of its own, where only the tests find it.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def find_torchvision() -> None:
    """Put the folder that `make test` installs torchvision into behind the other places to import from."""
    folder = str(Path(sys.prefix) / "stock")
    if folder not in sys.path:
        sys.path.append(folder)


@functools.cache
def declare_operators() -> torch.library.Library | None:
    """Declare torchvision's operators where its compiled half does not load; keep what is returned."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    for compiled in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(str(compiled))
            return None
        except OSError:
            continue
    library = torch.library.Library("torchvision", "DEF")
    for operator in _OPERATORS:
        library.define(operator)
    return library


def _require_torchvision() -> None:
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed: no stock processor to compare with")
    declare_operators()


def video_processor(family: str, values: dict[str, Any]) -> Any:
    """The stock video processor of a family with the values of a checkpoint's JSON."""
    _require_torchvision()
    from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor
    from transformers.models.llava_onevision.video_processing_llava_onevision import LlavaOnevisionVideoProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    classes: dict[str, Any] = {
        "internvl": InternVLVideoProcessor,
        "qwen3_vl": Qwen3VLVideoProcessor,
        "qwen2_5_vl": Qwen2VLVideoProcessor,
        "llava_onevision": LlavaOnevisionVideoProcessor,
    }
    return classes[family].from_dict(values)


def smart_resize(family: str) -> Any:
    """Stock's rule for the size of a Qwen video."""
    _require_torchvision()
    from transformers.models.qwen2_vl import video_processing_qwen2_vl
    from transformers.models.qwen3_vl import video_processing_qwen3_vl

    rules = {"qwen3_vl": video_processing_qwen3_vl, "qwen2_5_vl": video_processing_qwen2_vl}
    return rules[family].smart_resize


def tv_functional() -> Any:
    """torchvision.transforms.v2.functional"""
    _require_torchvision()
    from torchvision.transforms.v2 import functional

    return functional


def processor(folder: str) -> Any:
    """AutoProcessor on a checkpoint folder."""
    _require_torchvision()
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder)
