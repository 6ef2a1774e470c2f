"""Sizes that build in no time, with everything that sets the real ones apart from each other."""

from __future__ import annotations

from dataclasses import replace

import torch

from statekv.bench.models import SIZES, build
from statekv.models.adapter import VideoModel
from statekv.models.size import Size

CPU = torch.device("cpu")


def shrunk(size: Size) -> Size:
    return replace(size, hidden=128, intermediate=48, layers=3, heads=4, kv_heads=2, head_dim=32, vocab=64)


INTERNVL = shrunk(SIZES["internvl3-1b"])
QWEN3_VL = shrunk(SIZES["qwen3-vl-2b"])
FAMILIES = (INTERNVL, QWEN3_VL)


def small(size: Size) -> VideoModel:
    return build(size, CPU, torch.float32)
