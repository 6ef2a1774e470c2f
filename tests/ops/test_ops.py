"""One name, several implementations, and every one of them takes everything that the name takes."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from statekv import ops
from statekv.config import SETTINGS
from statekv.errors import ConfigError, SpeedWarning
from statekv.ops import IMPLEMENTATIONS, cpu, implementation, reference
from tests.ops.inputs import SHAPES, Shape, Ways, spoil

needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")
FORCED = ["naive", "blocked", pytest.param("triton", marks=needs_triton)]
SHAPE = Shape(2, 2, 3, 7, 40, 16)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
@pytest.mark.parametrize("impl", FORCED)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("every", [1, 3, 7, 50])
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
def test_each_takes_everything(impl: str, causal: bool, every: int, ragged: bool, device: torch.device) -> None:
    inputs = SHAPE.tensors(slack=4, device=device)
    ways: Ways = {"causal": causal, "every": every}
    if ragged:
        ways["lengths"] = SHAPE.lengths(device)
        inputs = spoil(inputs, ways["lengths"])
    mixed, scores = ops.attention_with_key_scores(*inputs, scale=0.3, impl=impl, **ways)
    mixed_naive, scores_naive = reference.attention_with_key_scores(*inputs, scale=0.3, **ways)
    torch.testing.assert_close(mixed, mixed_naive, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores, scores_naive, atol=1e-5, rtol=1e-5)
    counted = -(-SHAPE.queries // every)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.sum(-1), torch.full_like(scores[..., 0], counted * SHAPE.group))


@pytest.mark.parametrize("impl", ["naive", "blocked"])
def test_the_named_one_runs(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    marked = torch.zeros(1), torch.ones(1)

    def mark(*_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return marked

    monkeypatch.setattr({"naive": reference, "blocked": cpu}[impl], "attention_with_key_scores", mark)
    assert ops.attention_with_key_scores(*SHAPES[0].tensors(), scale=1.0, impl=impl) is marked


def test_what_cannot_run_says_so() -> None:
    with pytest.raises(ConfigError, match="unknown kernel 'flash3'"):
        ops.attention_with_key_scores(*SHAPE.tensors(), scale=1.0, impl="flash3")
    with pytest.raises(ConfigError, match="kernel is 'triton', but "):
        ops.attention_with_key_scores(*SHAPE.tensors(torch.float64), scale=1.0, impl="triton")


CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing forced from outside, nothing remembered."""
    monkeypatch.delenv(ops.VARIABLE, raising=False)
    _forget()
    yield
    _forget()


def _forget() -> None:
    ops._obstacle.cache_clear()
    ops._announce.cache_clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were an H100, and triton had been imported to compile for it."""
    flash = pytest.importorskip("statekv.ops.triton", reason="triton is not installed")
    monkeypatch.setattr(flash, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setenv("CC", "cc")  # which Triton launches kernels with


def test_the_configuration_knows_every_implementation() -> None:
    assert set(SETTINGS["kernel"].kind.known) == {"auto", *IMPLEMENTATIONS}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_each_can_be_forced(impl: str, monkeypatch: pytest.MonkeyPatch, gpu: None) -> None:
    assert implementation(impl, GPU) == impl
    monkeypatch.setenv(ops.VARIABLE, impl)
    assert implementation("auto", GPU) == implementation() == impl


def test_what_is_asked_for_in_code_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ops.VARIABLE, "naive")
    assert implementation("blocked", CPU) == "blocked"


@pytest.mark.parametrize("impl", ["", "flash3", "Naive"])
def test_an_unknown_one_lists_the_known(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=rf"unknown kernel '{impl}'.*auto.*naive.*blocked.*triton"):
        implementation(impl)
    monkeypatch.setenv(ops.VARIABLE, "flash3")
    with pytest.raises(ConfigError, match=r"unknown STATEKV_ATTENTION 'flash3'.*auto.*naive.*blocked.*triton"):
        implementation()


def test_auto_on_a_cpu_is_blocked_even_where_triton_is_interpreted() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert implementation("auto", CPU) == "blocked"


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_auto_on_a_gpu_is_triton(dtype: torch.dtype, head_dim: int) -> None:
    assert implementation("auto", GPU, dtype, head_dim) == "triton"


OBSTACLES = {
    "dtype": (GPU, torch.float64, 128, "takes float16, bfloat16, float32, not float64", "load the model in one"),
    "head size": (GPU, torch.bfloat16, 257, "heads of up to 256, not 257", "blocked"),
}


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("case", OBSTACLES.values(), ids=OBSTACLES)
def test_auto_announces_its_fallback_once_and_triton_fails(
    case: tuple[torch.device, torch.dtype, int, str, str],
) -> None:
    device, dtype, head_dim, reason, way_out = case
    with pytest.warns(SpeedWarning, match=reason):
        assert implementation("auto", device, dtype, head_dim) == "blocked"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert implementation("auto", device, dtype, head_dim) == "blocked"
    with pytest.raises(ConfigError, match=f"kernel is 'triton', but .*{reason}") as refused:
        implementation("triton", device, dtype, head_dim)
    assert way_out in refused.value.hint
    assert "\n" not in str(refused.value)


@pytest.mark.usefixtures("gpu")
def test_an_old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.raises(ConfigError, match=r"generation 8\.0"):
        implementation("triton", GPU)


@pytest.mark.usefixtures("gpu")
def test_a_gpu_beside_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    with pytest.warns(SpeedWarning, match="falls back to 'blocked': Triton finds no C compiler"):
        assert implementation("auto", GPU) == "blocked"
    _forget()
    monkeypatch.setenv("CC", "/opt/bin/cc")
    assert implementation("auto", GPU) == "triton"


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "statekv.ops.triton", None)
    monkeypatch.delattr("statekv.ops.triton", raising=False)
    with pytest.warns(SpeedWarning, match="triton does not load"):
        assert implementation("auto", GPU) == "blocked"
    monkeypatch.setenv(ops.VARIABLE, "triton")
    with pytest.raises(
        ConfigError, match="STATEKV_ATTENTION is 'triton', but the package triton does not load"
    ) as told:
        implementation("auto", GPU)
    assert "pip install 'statekv[gpu]'" in told.value.hint


@pytest.mark.usefixtures("gpu")
def test_tensors_on_a_cpu_want_an_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="tensors are on cpu") as told:
        implementation("triton", CPU)
    assert "TRITON_INTERPRET=1" in told.value.hint
    _forget()
    monkeypatch.setattr("statekv.ops.triton.INTERPRETED", True)
    assert implementation("triton", CPU) == "triton"
    with pytest.raises(ConfigError, match="TRITON_INTERPRET is set"):
        implementation("triton", GPU)
