"""Models of real size with random weights, and streams on them that stand where thousands of steps would bring them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers.initialization import no_init_weights

from statekv.bench.harness import Setting
from statekv.cache.carried import CarriedCache
from statekv.cache.detailed import DetailedCache
from statekv.cache.spec import Span
from statekv.cache.stream import StreamState
from statekv.errors import ConfigError
from statekv.models import FAMILIES, adapter_of
from statekv.models.adapter import Segment, VideoModel
from statekv.models.loading import wrap_model
from statekv.models.size import Size
from statekv.runner.memory import check_fits

_SPREAD = 0.02  # standard deviation of the weights, as transformers starts them


def build(size: Size, device: torch.device, dtype: torch.dtype, layers: int | None = None) -> VideoModel:
    """A model of this size as the runner takes it; its vision tower is a stub, its texts are missing.

    Args:
        device: where it lives; `meta` gives shapes alone.
        layers: the first so many decoder layers; None: all.

    Raises:
        ConfigError: more layers than there are.
        MemoryLimitError: it does not fit.
    """
    size = size.with_layers(layers)
    weights = (size.parameters + size.vocabulary_parameters) * dtype.itemsize
    check_fits(f"{size.name} with {size.layers} layers", weights, device, "try fewer layers or a half dtype")
    with device, no_init_weights():
        model: Any = adapter_of(size.family).random_model(size, dtype)
    model = model.eval().requires_grad_(False)
    model.tie_weights()
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            weight.normal_(std=_SPREAD)
        else:
            weight.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return wrap_model(model)


SIZES: Mapping[str, Size] = {size.name: size for family in FAMILIES for size in adapter_of(family).sizes}


def size_of(name: str, layers: int | None = None) -> Size:
    """A size by name, whole or cut to its first layers; a ConfigError for an unknown one lists those that are known."""
    if name not in SIZES:
        raise ConfigError(f"unknown model {name!r}", f"known: {', '.join(SIZES)}")
    return SIZES[name].with_layers(layers)


def setting_of(size: Size, dtype: torch.dtype, tokens: int) -> Setting:
    """What rows about steps of so many tokens of a model have in common."""
    return {"model": size.name, "layers": size.layers, "dtype": str(dtype).removeprefix("torch."), "tokens": tokens}


@torch.inference_mode()
def random_step(model: VideoModel, tokens: int, number: int = 1) -> Segment:
    """One step of a stream, of so many tokens: number `number`, from 1, which begins where the steps before it end."""
    return model.random_step(tokens, (number - 1) * model.stride(tokens))


@torch.inference_mode()
def products_alone(model: VideoModel, tokens: int) -> Callable[[], None]:
    """What multiplies random activations [T, in] with every weight of the language model's layers, and does no more.

    The time that this takes says how much of a step's distance to its floor lies in the shapes of its products.
    """
    layers = [module for module in model.language_model.layers.modules() if isinstance(module, torch.nn.Linear)]
    spec = model.kv_spec()
    inputs = {
        width: torch.randn(tokens, width, device=spec.devices[0], dtype=spec.dtype)
        for width in {layer.in_features for layer in layers}
    }

    @torch.inference_mode()
    def call() -> None:
        for layer in layers:
            layer(inputs[layer.in_features])

    return call


_NEWEST = 16  # steps that whoever looks at the steps before will ask for at most
_PIECE = 1024  # tokens drawn; the rest repeats them, for what a step costs does not depend on its keys


@torch.inference_mode()
def fill(state: StreamState, tokens: int, step: int) -> None:
    """Give an empty stream the memories that `tokens` tokens would have left, and room for another step; it is left
    standing behind those tokens, at position `tokens`.
    """
    fill_detailed(state.detailed, tokens, step)
    if isinstance(state.carried, CarriedCache):
        fill_carried(state.carried, step)
    stand(state, tokens, tokens, step)


@torch.inference_mode()
def fill_detailed(detailed: DetailedCache, tokens: int, step: int) -> None:
    """Random keys and values for `tokens` tokens, written straight into the buffers, with room for another step."""
    detailed.reserve(tokens + step)
    for buffer in detailed.buffers:  # [2, streams, kv_heads, capacity, head_dim]
        drawn = torch.randn_like(buffer[..., : min(tokens, _PIECE), :])
        for start in range(0, tokens, _PIECE):
            stop = min(start + _PIECE, tokens)
            buffer[..., start:stop, :] = drawn[..., : stop - start, :]
    _hold(detailed, tokens)


@torch.inference_mode()
def fill_carried(carried: CarriedCache, step: int) -> None:
    """Carry as many of the detailed cache's tokens as the budget allows, spread evenly, with room for another step."""
    tokens = carried.detailed.length
    length = min(tokens, carried.budget)
    carried.truncate(0)
    carried.open_slots(length + step)
    if length:
        for layer, device in enumerate(carried.spec.devices):
            chosen = torch.arange(length, device=device) * tokens // length  # [length], ascending
            carried.buffers[layer][..., :length, :] = carried.detailed.buffers[layer][..., chosen, :]
            carried.token_ids[layer][..., :length] = chosen
    carried.lengths = [length] * carried.spec.layers


def stand(state: StreamState, tokens: int, position: int, step: int) -> None:
    """Move a filled stream to another moment by its lengths alone; nothing is written.

    The carried cache then holds as many keys as it would have at that moment, though not the same ones.

    Args:
        state: counts of what it saw are cleared, and all spans but those of the newest steps.
        tokens: at most as many as were filled in.
    """
    assert tokens <= state.detailed.capacity
    _hold(state.detailed, tokens)
    carried = state.carried
    if isinstance(carried, CarriedCache):
        carried.lengths = [min(tokens, carried.budget)] * state.spec.layers
    state.position, state.frames, state.origin_seconds = position, 0, None
    newest = range(max(0, tokens - _NEWEST * step), tokens - step + 1, step)
    state.spans[:] = [Span("step", start, step, None, start) for start in newest]


def _hold(detailed: DetailedCache, tokens: int) -> None:
    detailed.truncate(0)
    detailed.advance(tokens)
