"""The hook: what it computes, what it shrinks, and that it leaves nothing behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AttentionInterface, DynamicCache, Qwen2Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from statekv.cache.carried import CarriedCache
from statekv.cache.detailed import DetailedCache
from statekv.cache.spec import KVSpec
from statekv.errors import ModelError
from statekv.models.hooks import NAME, Pass, RopeScope, attention_hook, attention_left_as_found, take_attention
from statekv.ops.reference import attention_with_key_scores
from tests.cache.tokens import policy
from tests.tiny import FAMILIES, Tiny, tiny

GEOMETRY = KVSpec(kv_heads=2, head_dim=8, dtype=torch.float32, devices=(torch.device("cpu"),) * 3)


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
    run = Pass(DetailedCache(GEOMETRY), evicting=False, scored=scored, kernel="auto")
    mixed, weights = attention_hook(Layer(), query, key, value, None, scaling=0.3, statekv_pass=run)
    expected, _ = attention_with_key_scores(query, key, value, scale=0.3)
    torch.testing.assert_close(mixed, expected.transpose(1, 2), atol=1e-6, rtol=0)
    assert mixed.is_contiguous()
    assert weights is None


def test_it_shrinks_its_own_layer_to_the_best_keys() -> None:
    carried = CarriedCache(GEOMETRY, 3, policy(), DetailedCache(GEOMETRY))
    carried.open_slots(5)
    query, key, value = tensors()
    for layer in range(3):
        carried.update(key, value, layer)
    attention_hook(Layer(), query, key, value, None, scaling=0.3, statekv_pass=Pass(carried, True, True, "naive"))
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


TRAINED = 16
LENGTH = 60  # far past the trained length


def scope(kind: str, **parameters: Any) -> RopeScope:
    config = Qwen2Config(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=TRAINED,
        rope_parameters={"rope_type": kind, "rope_theta": 1e6, **parameters},
    )
    return RopeScope(Qwen2RotaryEmbedding(config), config)


def rotate(rope: RopeScope, positions: range) -> torch.Tensor:
    """cos and sin, as the model's forward computes them."""
    turned: tuple[torch.Tensor, torch.Tensor] = rope.rotary(torch.zeros(1), torch.tensor([list(positions)]))
    return torch.stack(turned)


@pytest.mark.parametrize("horizon", [1, TRAINED, TRAINED + 1, 100, 100_000])
def test_inside_the_frequencies_are_the_horizons(horizon: int) -> None:
    rope = scope("dynamic", factor=2.0)
    found = rope.rotary.inv_freq
    stock, _ = ROPE_INIT_FUNCTIONS["dynamic"](rope.rotary.config, torch.device("cpu"), seq_len=horizon)
    with rope.held(horizon):
        assert torch.equal(rope.rotary.inv_freq, stock)
        rotate(rope, range(2))
        rotate(rope, range(500))
        rotate(rope, range(3))
        assert torch.equal(rope.rotary.inv_freq, stock)
    assert rope.rotary.inv_freq is found
    assert rope.rotary.rope_type == "dynamic"
    assert torch.equal(rope.frequencies(horizon), stock)


def test_head_dim_and_partial_rotation_are_the_checkpoints() -> None:
    rope = scope("dynamic", factor=2.0, partial_rotary_factor=0.5)
    assert torch.equal(rope.frequencies(TRAINED), rope.rotary.inv_freq)
    rope.rotary.config.head_dim = 32
    assert rope.frequencies(TRAINED + 1).shape == (8,)


def test_outside_transformers_goes_on_as_before() -> None:
    rope, untouched = scope("dynamic", factor=2.0), scope("dynamic", factor=2.0)
    for number, positions in enumerate((range(3), range(40), range(30, 50), range(3))):
        with rope.held(1000 * (number + 1)):
            rotate(rope, range(200))
        assert torch.equal(rotate(rope, positions), rotate(untouched, positions))
    assert rope.rotary.state_dict().keys() == untouched.rotary.state_dict().keys()
    assert {name for name, _ in rope.rotary.named_buffers()} == {name for name, _ in untouched.rotary.named_buffers()}


def test_restored_after_an_exception() -> None:
    rope = scope("dynamic", factor=2.0)
    found = rope.rotary.inv_freq
    with pytest.raises(RuntimeError), rope.held(1000):
        raise RuntimeError
    assert rope.rotary.inv_freq is found
    assert rope.rotary.rope_type == "dynamic"


def test_scopes_may_be_nested() -> None:
    rope = scope("dynamic", factor=2.0)
    with rope.held(100):
        with rope.held(1000):
            assert torch.equal(rope.rotary.inv_freq, rope.frequencies(1000))
        assert torch.equal(rope.rotary.inv_freq, rope.frequencies(100))


def test_frequencies_are_kept_for_as_long_as_somebody_holds_them() -> None:
    """A recorded step reads the tensor that its stream holds; streams of many horizons leave nothing behind."""
    rope = scope("dynamic", factor=2.0)
    mine = rope.frequencies(77)
    for horizon in range(100, 300):
        with rope.held(horizon), rope.held(77):
            assert rope.rotary.inv_freq is mine
    assert len(rope._known) == 1
    del mine
    assert not len(rope._known)


OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("default", {}),
    ("linear", {"factor": 4.0}),
    ("yarn", {"factor": 4.0, "original_max_position_embeddings": 4}),
    (
        "llama3",
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 4},
    ),
]


@pytest.mark.parametrize(("kind", "parameters"), OTHERS)
def test_other_kinds_are_left_alone(kind: str, parameters: dict[str, Any]) -> None:
    rope = scope(kind, **parameters)
    found, expected = rope.rotary.inv_freq, rotate(rope, range(500))
    with rope.held(100_000):
        assert rope.rotary.inv_freq is found
        assert rope.rotary.rope_type == kind
        assert torch.equal(rotate(rope, range(500)), expected)
        assert torch.equal(rope.frequencies(100_000), found)
    assert rope.rotary.inv_freq is found


def test_longrope_is_refused() -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 4}
    with pytest.raises(ModelError, match="longrope"):
        scope("longrope", factor=4.0, **factors)


@pytest.fixture(scope="module")
def model() -> Tiny:
    return tiny("internvl", max_position_embeddings=TRAINED)


def scope_of(model: Tiny) -> RopeScope:
    return RopeScope(model.model.model.language_model.rotary_emb, model.config.text_config)


@torch.no_grad()
def hidden(model: Tiny, sizes: list[int]) -> torch.Tensor:
    """[1, LENGTH, hidden] of LENGTH random embeddings that enter in pieces."""
    embeds = torch.randn(1, LENGTH, 64, generator=torch.Generator().manual_seed(0))
    cache, start, pieces = DynamicCache(), 0, []
    for size in sizes:
        piece = slice(start, start + size)
        pieces.append(
            model.model.model.language_model(
                inputs_embeds=embeds[:, piece],
                position_ids=torch.arange(start, start + size)[None],
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
        )
        start += size
    assert start == LENGTH
    return torch.cat(pieces, 1)


STEPS = [10] * 6


def test_a_long_stream_keeps_one_base(model: Tiny) -> None:
    """Step by step inside the scope is the stock model that saw everything at once and scaled for it."""
    at_once = hidden(model, [LENGTH])
    hidden(model, [5] * 12)
    with scope_of(model).held(LENGTH):
        stepwise = hidden(model, STEPS)
    torch.testing.assert_close(stepwise, at_once, atol=1e-4, rtol=1e-4)


def test_without_the_scope_it_would_not(model: Tiny) -> None:
    assert not torch.allclose(hidden(model, STEPS), hidden(model, [LENGTH]), atol=1e-2)


def test_another_horizon_is_another_base(model: Tiny) -> None:
    rope = scope_of(model)
    with rope.held(LENGTH):
        near = hidden(model, STEPS)
    with rope.held(10 * LENGTH):
        far = hidden(model, STEPS)
    assert not torch.allclose(near, far, atol=1e-2)
