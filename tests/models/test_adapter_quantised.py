"""Models whose weights are codes: what is kept of a stream has the dtype of the keys that come out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from statekv.bench.models import products_alone
from statekv.config import Config
from statekv.engine.engine import Engine
from statekv.engine.generate import generate
from statekv.errors import ModelError
from statekv.models import loading
from statekv.models.loading import identify
from tests.runner.test_runner import push_together
from tests.talk import QUESTION, adapted, assert_same_stream, inputs_of, some_frames
from tests.tiny import TWO_FAMILIES, Tiny, tiny, video


class Codes(nn.Linear):
    """Stands in for a quantised layer: it multiplies with what its codes stand for, in the dtype of its input.

    Subclasses say where the codes lie; these are of 16 levels, with one scale for all.
    """

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta")
        del self.weight
        self.bias = plain.bias
        self.scale = plain.weight.detach().abs().max() / 7
        self.pack((plain.weight.detach() / self.scale).round().to(torch.int8))

    def pack(self, codes: torch.Tensor) -> None:
        raise NotImplementedError

    def codes(self) -> torch.Tensor:
        raise NotImplementedError

    def dense(self) -> torch.Tensor:
        return self.codes() * self.scale

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return nn.functional.linear(input, self.dense().to(input.dtype), bias)


class Eight(Codes):
    """As bitsandbytes has 8 bits: int8 in the weight's own shape."""

    def pack(self, codes: torch.Tensor) -> None:
        self.weight = nn.Parameter(codes, requires_grad=False)

    def codes(self) -> torch.Tensor:
        return self.weight


class Four(Codes):
    """As bitsandbytes has 4 bits: two codes a byte, uint8 [n, 1]."""

    def pack(self, codes: torch.Tensor) -> None:
        low, high = (codes + 8).to(torch.uint8).view(-1, 2).T
        self.weight = nn.Parameter((low | high << 4)[:, None], requires_grad=False)

    def codes(self) -> torch.Tensor:
        both = torch.stack([self.weight[:, 0] & 15, self.weight[:, 0] >> 4], dim=-1)
        return (both.to(torch.int8) - 8).view(self.out_features, self.in_features)


class Buffered(Codes):
    """As GPTQ and AWQ have them: no weight at all, codes in a buffer."""

    def pack(self, codes: torch.Tensor) -> None:
        self.register_buffer("qweight", codes.int())

    def codes(self) -> torch.Tensor:
        return self.get_buffer("qweight")


KINDS = pytest.mark.parametrize("kind", [Eight, Four, Buffered])
EVERY_FAMILY = pytest.mark.parametrize("family", TWO_FAMILIES)


def quantised(family: str, kind: type[Codes], dense: bool = False, dtype: torch.dtype = torch.float32) -> Tiny:
    """A tiny model whose decoder layers are quantised, or one with the weights that their codes stand for."""
    made = tiny(family)
    model: Any = made.model
    model.to(dtype)
    for layer in adapted(made).language_model.layers:
        for name, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear):
                codes = kind(module)
                if dense:
                    module.weight.data = codes.dense().to(dtype)
                else:
                    layer.set_submodule(name, codes)
    if not dense:
        model.config.quantization_config = {"quant_method": "stand-in"}
    return made


def engine(made: Tiny) -> Engine:
    return Engine(adapted(made), Config(budget=20, max_new_tokens=6))


@KINDS
@EVERY_FAMILY
def test_a_stream_is_that_of_the_weights_that_the_codes_stand_for(
    family: str, kind: type[Codes], tmp_path: Path
) -> None:
    packed, dense = engine(quantised(family, kind)), engine(quantised(family, kind, dense=True))
    found, expected = packed.open(), dense.open()
    for session in (found, expected):
        session.push(some_frames(12))
    assert found.state.spec == expected.state.spec
    assert_same_stream(found, expected)
    assert torch.equal(found.logits(QUESTION), expected.logits(QUESTION))
    assert found.ask(QUESTION) == expected.ask(QUESTION)
    found.save(tmp_path / "saved")
    with pytest.raises(ModelError, match="the weights of"):
        dense.restore(tmp_path / "saved")
    assert_same_stream(engine(quantised(family, kind)).restore(tmp_path / "saved"), expected)


@KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_keys_have_the_dtype_that_comes_out(kind: type[Codes], dtype: torch.dtype) -> None:
    model = adapted(quantised("internvl", kind, dtype=dtype))
    assert model.kv_spec().dtype == model.random_step(3, 0).embeds.dtype == dtype
    assert identify(model).dtype == str(dtype).removeprefix("torch.")
    products_alone(model, 4)()


def test_a_norm_in_float32_makes_keys_of_float32() -> None:
    """As training on quantised weights leaves it."""
    made = quantised("internvl", Four, dtype=torch.bfloat16)
    model = adapted(made)
    for layer in model.language_model.layers:
        layer.input_layernorm.float()
    assert model.kv_spec().dtype == torch.float32


@KINDS
def test_batches_and_the_drop_in(kind: type[Codes]) -> None:
    packed, dense = quantised("internvl", kind), quantised("internvl", kind, dense=True)
    films = [some_frames(8, seed) for seed in range(2)]
    both = []
    for made in (packed, dense):
        opener = engine(made)
        both.append([opener.open(), opener.open()])
        push_together(both[-1], films, 0, 8)
    for found, expected in zip(*both, strict=True):
        assert_same_stream(found, expected)
    inputs = inputs_of(packed, "What is this?", video(4))
    found_ids, expected_ids = (generate(made.model, **inputs, budget=20, max_new_tokens=4) for made in (packed, dense))
    assert torch.equal(found_ids, expected_ids)  # type: ignore[arg-type]


@KINDS
def test_other_codes_are_another_model(kind: type[Codes]) -> None:
    made = quantised("internvl", kind)
    before = identify(adapted(made)).weights
    assert identify(adapted(quantised("internvl", kind))).weights == before
    layer = adapted(made).language_model.layers[2].mlp.down_proj
    codes = next(tensor for tensor in (*layer.parameters(), *layer.buffers()) if not tensor.is_floating_point())
    codes.data.add_(1)
    assert identify(adapted(made)).weights != before


def test_packed_weights_are_loaded_where_they_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantised models refuse to be moved."""
    made = tiny("internvl")
    made.config.quantization_config = {"quant_method": "stand-in"}
    made._save_texts(tmp_path)
    asked: list[dict[str, Any]] = []

    def read(source: str, name: str, settings: dict[str, Any], own_config: Any) -> Any:
        asked.append(settings)
        monkeypatch.setattr(made.model, "to", None)
        return made.model

    monkeypatch.setattr(loading, "_read_weights", read)
    loading.load_model(str(tmp_path), device="cpu")
    assert asked[0]["device_map"] == {"": torch.device("cpu")}
