"""Where the kernels run: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.gpu import need_gpu


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where tensors lie in a test of the kernels."""
    if request.param == "cuda":
        need_gpu()
    elif torch.cuda.is_available():
        pytest.skip("beside a GPU the kernels are compiled, not interpreted")
    return torch.device(request.param)
