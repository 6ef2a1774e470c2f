"""One name, several implementations."""

from __future__ import annotations

import pytest
import torch

from statekv import ops
from statekv.config import KERNELS
from statekv.errors import ConfigError
from tests.ops.inputs import Shape


def test_the_configuration_knows_every_implementation() -> None:
    assert set(KERNELS) == {"auto", *ops.IMPLEMENTATIONS}
    assert ops.implementation() == ops.implementation("auto")
    assert ops.implementation("auto") in ops.IMPLEMENTATIONS


@pytest.mark.parametrize("impl", sorted(ops.IMPLEMENTATIONS))
def test_each_can_be_forced(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ops.implementation(impl) == impl
    shape = Shape(1, 1, 1, 2, 3, 4)
    marked = torch.zeros(1), torch.ones(1)
    monkeypatch.setitem(ops.IMPLEMENTATIONS, impl, lambda *_, **__: marked)
    assert ops.attention_with_key_scores(*shape.tensors(), scale=1.0, impl=impl) is marked


@pytest.mark.parametrize("impl", ["", "flash3", "Naive"])
def test_an_unknown_one_lists_the_known(impl: str) -> None:
    shape = Shape(1, 1, 1, 2, 3, 4)
    with pytest.raises(ConfigError, match=f"unknown kernel '{impl}'.*auto.*naive.*blocked"):
        ops.attention_with_key_scores(*shape.tensors(), scale=1.0, impl=impl)
