"""The hook: what it computes, what it shrinks, and that it leaves nothing behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AttentionInterface

from statekv.cache.carried import CarriedCache
from statekv.cache.detailed import DetailedCache
from statekv.cache.geometry import Geometry
from statekv.cache.policies.carry import Rule
from statekv.errors import ModelError
from statekv.models.attention import NAME, Pass, attention_hook, attention_left_as_found, take_attention
from statekv.ops.naive import attention_with_key_scores
from tests.tiny import FAMILIES, tiny

GEOMETRY = Geometry(kv_heads=2, head_dim=8, dtype=torch.float32, devices=(torch.device("cpu"),) * 3)


class Layer(torch.nn.Module):
    layer_idx = 1


def tensors(queries: int = 5, keys: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 4, queries, 8), (1, 2, keys, 8), (1, 2, keys, 8))
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return query, key, value


@pytest.mark.parametrize("scored", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (5, 12), (1, 12), (1, 1)])
def test_it_is_prefix_causal_attention(queries: int, keys: int, scored: bool) -> None:
    query, key, value = tensors(queries, keys)
    run = Pass(evicting=None, scored=scored, kernel="auto")
    mixed, weights = attention_hook(Layer(), query, key, value, None, scaling=0.3, statekv_pass=run)
    expected, _ = attention_with_key_scores(query, key, value, scale=0.3)
    torch.testing.assert_close(mixed, expected.transpose(1, 2), atol=1e-6, rtol=0)
    assert mixed.is_contiguous()
    assert weights is None


def test_it_shrinks_its_own_layer_to_the_best_keys() -> None:
    rule = Rule("attention", sinks=0, seed=0, pinned=0)
    carried = CarriedCache(GEOMETRY, 3, rule, DetailedCache(GEOMETRY))
    carried.make_room(5)
    query, key, value = tensors()
    for layer in range(3):
        carried.update(key, value, layer)
    attention_hook(Layer(), query, key, value, None, scaling=0.3, statekv_pass=Pass(carried, True, "naive"))
    assert carried.lengths == [5, 3, 5]
    best = attention_with_key_scores(query, key, value, scale=0.3)[1].topk(3).indices.sort(-1).values
    assert torch.equal(carried.kept(1), best.int())


def test_called_from_outside_it_refuses() -> None:
    query, key, value = tensors()
    with pytest.raises(ModelError, match="belongs to statekv") as told:
        attention_hook(Layer(), query, key, value, None, scaling=0.3)
    assert "sdpa" in told.value.hint


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_taking_it_touches_the_language_model_alone_and_restores_it(family: str, implementation: str) -> None:
    model: Any = tiny(family).model
    model.set_attn_implementation(implementation)
    before = [(module, module.config._attn_implementation) for module in model.modules() if hasattr(module, "config")]

    def inside() -> list[str]:
        return [module.config._attn_implementation for module, _ in before]

    with attention_left_as_found(model):
        take_attention(model)
        assert {
            module.config._attn_implementation
            for module in model.model.language_model.layers[0].children()
            if hasattr(module, "config")
        } == {NAME}
        assert set(inside()) == {NAME, implementation}
        assert model.config.vision_config._attn_implementation == implementation
        take_attention(model)
        with attention_left_as_found(model):
            pass
        assert set(inside()) == {NAME, implementation}
    assert inside() == [found for _, found in before]

    def fail() -> None:
        with attention_left_as_found(model):
            take_attention(model)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert inside() == [found for _, found in before]
    assert NAME in AttentionInterface().valid_keys()
