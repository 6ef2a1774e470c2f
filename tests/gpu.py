"""What a test that needs a GPU does without one."""

from __future__ import annotations

import os

import pytest
import torch


def need_gpu() -> None:
    """Skip without a CUDA device; STATEKV_REQUIRE=gpu turns that into a failure."""
    if torch.cuda.is_available():
        return
    if "gpu" in os.environ.get("STATEKV_REQUIRE", "").split(","):
        pytest.fail("STATEKV_REQUIRE asks for a GPU and there is none")
    pytest.skip("no GPU")
