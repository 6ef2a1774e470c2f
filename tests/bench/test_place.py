"""Two words of the command line, or one line that says what is wrong with them."""

from __future__ import annotations

import pytest
import torch

from statekv.bench.place import place
from statekv.errors import ConfigError


def test_a_cpu_computes_in_float32_unless_told_otherwise() -> None:
    assert place("cpu", "auto") == (torch.device("cpu"), torch.float32)
    assert place("cpu", "bfloat16") == (torch.device("cpu"), torch.bfloat16)


def test_auto_takes_what_is_there() -> None:
    device, dtype = place("auto", "auto")
    assert device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert dtype == (torch.bfloat16 if device.type == "cuda" else torch.float32)


@pytest.mark.parametrize(("device", "dtype"), [("nope", "auto"), ("cuda:99", "auto"), ("cpu", "int8"), ("cpu", "nope")])
def test_what_is_not_there(device: str, dtype: str) -> None:
    with pytest.raises(ConfigError, match=device if device != "cpu" else dtype) as caught:
        place(device, dtype)
    assert "\n" not in str(caught.value)
