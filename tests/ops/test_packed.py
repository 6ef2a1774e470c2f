"""Products with packed weights against the plain ones."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F

from statekv.ops.packed import PackedProducts, packable

ROWS = 24
pytestmark = pytest.mark.skipif(not packable(torch.zeros(2, 2)), reason="torch without MKL")


def layer(bias: bool = True) -> torch.nn.Linear:
    return torch.nn.Linear(48, 80, bias=bias)


class Calls:
    """Counts what reaches MKL's packed product."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self._real = 0, torch.ops.mkl._mkl_linear
        monkeypatch.setattr(torch.ops.mkl, "_mkl_linear", self)

    def __call__(self, *args: object) -> torch.Tensor:
        self.count += 1
        found: torch.Tensor = self._real(*args)
        return found


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(ROWS, 48), (1, ROWS, 48), (2, ROWS // 2, 48)], ids=str)
def test_it_equals_the_plain_product(bias: bool, shape: tuple[int, ...], calls: Calls) -> None:
    module, inputs = layer(bias), torch.randn(shape)
    with torch.inference_mode(), PackedProducts([module.weight], ROWS):
        found = module(inputs)
    assert calls.count == 1
    assert found.shape == (*shape[:-1], 80)
    torch.testing.assert_close(found, F.linear(inputs, module.weight, module.bias), atol=1e-5, rtol=1e-5)


def test_an_input_of_any_strides_is_right(calls: Calls) -> None:
    module, inputs = layer(), torch.randn(48, ROWS).t()
    with torch.inference_mode(), PackedProducts([module.weight], ROWS):
        found = module(inputs)
    assert calls.count == 1
    torch.testing.assert_close(found, F.linear(inputs.contiguous(), module.weight, module.bias))


def test_other_rows_other_weights_and_other_functions_are_left_alone(calls: Calls) -> None:
    known, other = layer(), layer()
    inputs, fewer = torch.randn(ROWS, 48), torch.randn(ROWS - 1, 48)
    with torch.inference_mode(), PackedProducts([known.weight], ROWS):
        assert torch.equal(other(inputs), F.linear(inputs, other.weight, other.bias))
        assert torch.equal(known(fewer), F.linear(fewer, known.weight, known.bias))
        assert torch.equal(F.relu(inputs), inputs.clamp(min=0))
    assert calls.count == 0


def test_nothing_stays_behind_and_other_threads_see_nothing(calls: Calls) -> None:
    module, inputs = layer(), torch.randn(ROWS, 48)
    with torch.inference_mode(), PackedProducts([module.weight], ROWS):
        thread = threading.Thread(target=lambda: module(inputs))
        thread.start()
        thread.join()
    module(inputs)
    assert calls.count == 0


def test_it_knows_when_a_weight_has_changed() -> None:
    module = layer()
    packed = PackedProducts([module.weight], ROWS)
    assert not packed.stale
    with torch.no_grad():
        module.weight.mul_(2.0)
    assert packed.stale


def test_what_cannot_be_packed() -> None:
    assert not packable(torch.zeros(2, 2, dtype=torch.bfloat16))
    assert not packable(torch.zeros(2, 2, device="meta"))
    assert not packable(torch.zeros(2))
