"""Models of real size with random weights, and streams on them that stand where thousands of steps would bring them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    InternVLConfig,
    LlavaOnevisionConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3VLConfig,
)
from transformers.initialization import no_init_weights

from statekv.cache.carried import CarriedCache
from statekv.cache.detailed import DetailedCache
from statekv.cache.spec import Span
from statekv.cache.stream import StreamState
from statekv.errors import ConfigError
from statekv.models.adapter import Segment, VideoModel
from statekv.models.families.qwen3_vl import EVERYWHERE, Qwen3VL
from statekv.models.loading import wrap_model
from statekv.ops.rope import grid_positions, text_positions
from statekv.runner.memory import check_fits

_SPREAD = 0.02  # standard deviation of the weights, as transformers starts them
_TOWER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
_QWEN_TOWER = {"hidden_size": 32, "depth": 1, "num_heads": 2, "intermediate_size": 64}


class _EagleConfig(PreTrainedConfig):
    model_type = "eagle_2_5_vl"
    sub_configs = {"text_config": Qwen2Config}  # noqa: RUF012

    def __init__(self, text_config: dict[str, Any] | None = None, **others: Any) -> None:
        self.text_config = Qwen2Config(**(text_config or {}))
        super().__init__(**others)


class _Eagle(PreTrainedModel):
    """What of Eagle2.5 is part of transformers, under the name that it has in the code of the checkpoint."""

    config_class = _EagleConfig

    def __init__(self, config: _EagleConfig) -> None:
        super().__init__(config)
        self.language_model = Qwen2ForCausalLM(config.text_config)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> Any:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        return self.language_model.get_output_embeddings()


def build(size: Size, device: torch.device, dtype: torch.dtype, layers: int | None = None) -> VideoModel:
    """A model of this size as the stepper takes it; its vision tower is a stub, its texts are missing.

    Args:
        size: of the language model.
        device: where it lives; `meta` gives shapes alone.
        dtype: of all weights.
        layers: the first so many decoder layers; None: all.

    Raises:
        ConfigError: more layers than there are.
        MemoryLimitError: it does not fit.
    """
    size = size.with_layers(layers)
    weights = (size.parameters + size.vocabulary_parameters) * dtype.itemsize
    check_fits(f"{size.name} with {size.layers} layers", weights, device, "try fewer layers or a half dtype")
    config = _CONFIGURATIONS[size.family](size)
    with device, no_init_weights():
        if isinstance(config, _EagleConfig):
            model: Any = _Eagle._from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
        else:
            model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model = model.eval().requires_grad_(False)
    model.tie_weights()
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            weight.normal_(std=_SPREAD)
        else:
            weight.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return wrap_model(model)


def _internvl(size: Size) -> Any:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": size.rope_theta}
    if size.rope_factor is not None:
        rope |= {"rope_type": "dynamic", "factor": size.rope_factor}
    return InternVLConfig(
        vision_config=_TOWER,
        text_config={"model_type": "qwen2", "rope_parameters": rope, **_text(size)},
        tie_word_embeddings=size.tied,
    )


def _qwen3_vl(size: Size) -> Any:
    vision = {**_QWEN_TOWER, "out_hidden_size": size.hidden}
    sixteenth = size.head_dim // 16
    sections = [3 * sixteenth, 5 * sixteenth // 2, 5 * sixteenth // 2]  # time, height and width share the rotated pairs
    rope = {"rope_type": "default", "rope_theta": size.rope_theta, "mrope_section": sections, "mrope_interleaved": True}
    return Qwen3VLConfig(
        vision_config={**vision, "deepstack_visual_indexes": [0]},
        text_config={"head_dim": size.head_dim, "rope_parameters": rope, **_text(size)},
        tie_word_embeddings=size.tied,
    )


def _qwen2_5_vl(size: Size) -> Any:
    eighth = size.head_dim // 8
    sections = [eighth, 3 * eighth // 2, 3 * eighth // 2]
    rope = {"rope_type": "default", "rope_theta": size.rope_theta, "mrope_section": sections}
    return Qwen2_5_VLConfig(
        vision_config={**_QWEN_TOWER, "out_hidden_size": size.hidden, "fullatt_block_indexes": [0]},
        text_config={"rope_parameters": rope, **_text(size)},
        tie_word_embeddings=size.tied,
    )


def _llava_onevision(size: Size) -> Any:
    rope = {"rope_type": "default", "rope_theta": size.rope_theta}
    return LlavaOnevisionConfig(
        vision_config={"model_type": "siglip_vision_model", **_TOWER},
        text_config={"model_type": "qwen2", "rope_parameters": rope, **_text(size)},
        tie_word_embeddings=size.tied,
    )


def _eagle_2_5_vl(size: Size) -> Any:
    rope = {"rope_type": "default", "rope_theta": size.rope_theta}
    return _EagleConfig({"rope_parameters": rope, **_text(size)}, tie_word_embeddings=size.tied)


_CONFIGURATIONS: Mapping[str, Callable[[Size], Any]] = {
    "internvl": _internvl,
    "qwen3_vl": _qwen3_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "llava_onevision": _llava_onevision,
    "eagle_2_5_vl": _eagle_2_5_vl,
}


def _text(size: Size) -> dict[str, Any]:
    return {
        "vocab_size": size.vocab,
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "max_position_embeddings": size.trained_length,
        "tie_word_embeddings": size.tied,
        "bos_token_id": None,
        "eos_token_id": None,
    }


@dataclass(frozen=True)
class Size:
    """One language model: a stack of equal decoder layers with grouped query heads and a gated MLP.

    Attributes:
        name: as the benchmarks' `--models` spell it.
        family: adapter that steps it, a `model_type` of `statekv.models.FAMILIES`.
        hidden, intermediate, layers, heads, kv_heads, head_dim, vocab: as in the configuration.
        rope_theta: base of the rotary frequencies.
        rope_factor: dynamic-NTK scaling factor; None where RoPE is not scaled.
        trained_length: positions seen in training.
        qkv_bias: query, key and value projections have a bias (Qwen2); otherwise queries and keys are
            RMS-normalised per head (Qwen3).
        tied: the output head is the embedding.
        tokens_per_step: vision tokens of one step: a picture of 448 x 448 pixels, for Qwen3-VL 512 x 512, for
            LLaVA-OneVision any.
    """

    name: str
    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    rope_theta: float
    rope_factor: float | None
    trained_length: int
    qkv_bias: bool
    tied: bool
    tokens_per_step: int = 256

    @property
    def parameters(self) -> int:
        """Weights that every token of a step passes through: without embedding and output head."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = self.hidden * (2 * queries + 2 * keys)
        attention += queries + 2 * keys if self.qkv_bias else 2 * self.head_dim
        norms = 2 * self.hidden
        return self.layers * (attention + 3 * self.hidden * self.intermediate + norms) + self.hidden

    @property
    def vocabulary_parameters(self) -> int:
        """Weights of embedding and output head together."""
        return (1 if self.tied else 2) * self.vocab * self.hidden

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * dtype.itemsize

    def with_layers(self, layers: int | None) -> Size:
        """The same model cut to its first layers; None leaves it whole.

        Raises:
            ConfigError: fewer than one layer, or more than there are.
        """
        if layers is None:
            return self
        if not 1 <= layers <= self.layers:
            raise ConfigError(f"layers is {layers}, but {self.name} has {self.layers}", f"give 1 … {self.layers}")
        return replace(self, layers=layers)


def _qwen2(name: str, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, head_dim: int) -> Size:
    """A language model of InternVL3: Qwen2.5 with dynamic-NTK RoPE."""
    return Size(
        *(name, "internvl", hidden, intermediate, layers, heads, kv_heads, head_dim),
        vocab=151674,
        rope_theta=1e6,
        rope_factor=2.0,
        trained_length=32768,
        qkv_bias=True,
        tied=False,
    )


def _qwen3(name: str, hidden: int, intermediate: int, layers: int, heads: int, tied: bool) -> Size:
    """A language model of Qwen3-VL: Qwen3 with multi-axis RoPE."""
    return Size(
        *(name, "qwen3_vl", hidden, intermediate, layers, heads),
        kv_heads=8,
        head_dim=128,
        vocab=151936,
        rope_theta=5e6,
        rope_factor=None,
        trained_length=262144,
        qkv_bias=False,
        tied=tied,
    )


_INTERNVL_8B = _qwen2("internvl3-8b", 3584, 18944, 28, 28, 4, 128)


def _qwen2_7b(name: str, family: str, vocab: int, trained_length: int = 32768, tokens_per_step: int = 256) -> Size:
    """The same Qwen2 of 7 billion weights in another family, where its RoPE is as it was trained."""
    return replace(
        _INTERNVL_8B,
        name=name,
        family=family,
        vocab=vocab,
        rope_factor=None,
        trained_length=trained_length,
        tokens_per_step=tokens_per_step,
    )


SIZES: Mapping[str, Size] = {
    size.name: size
    for size in (
        _qwen2("internvl3-1b", 896, 4864, 24, 14, 2, 64),
        _qwen2("internvl3-2b", 1536, 8960, 28, 12, 2, 128),
        _INTERNVL_8B,
        _qwen3("qwen3-vl-2b", 2048, 6144, 28, 16, tied=True),
        _qwen3("qwen3-vl-4b", 2560, 9728, 36, 32, tied=True),
        _qwen3("qwen3-vl-8b", 4096, 12288, 36, 32, tied=False),
        _qwen2_7b("eagle2.5-8b", "eagle_2_5_vl", 152064),
        _qwen2_7b("qwen2.5-vl-7b", "qwen2_5_vl", 152064, trained_length=128000),
        _qwen2_7b("llava-onevision-7b", "llava_onevision", 152000, tokens_per_step=196),
    )
}


def size_of(name: str, layers: int | None = None) -> Size:
    """A size by name, whole or cut to its first layers.

    Raises:
        ConfigError: an unknown name; the known ones are listed.
    """
    if name not in SIZES:
        raise ConfigError(f"unknown model {name!r}", f"known: {', '.join(SIZES)}")
    return SIZES[name].with_layers(layers)


_DEEPSTACK = 3  # layers that receive vision features, in all Qwen3-VL sizes


@torch.inference_mode()
def random_step(model: VideoModel, tokens: int, number: int = 1) -> Segment:
    """One step of a stream.

    Args:
        model: whose family decides about positions and extras.
        tokens: of the step; of Qwen3-VL's, the largest square is the picture and the rest is text.
        number: of the step, from 1.

    Returns:
        A segment that begins where the steps before it end.
    """
    start = (number - 1) * stride(model, tokens)
    hidden, device = model.text_config.hidden_size, model.model.device
    embeds = torch.randn(1, tokens, hidden, device=device, dtype=model.kv_spec().dtype)
    ids = torch.zeros(1, tokens, dtype=torch.int64, device=device)
    following = start + stride(model, tokens)
    if not isinstance(model, Qwen3VL):
        return Segment("step", ids, embeds, model.text_positions(start, tokens), following, 1)
    side = isqrt(tokens)
    seen = side * side
    grid = grid_positions(start, side, side, device)
    positions = torch.cat([grid, text_positions(start + side, tokens - seen, device)], dim=-1)  # [3, 1, T]
    deep = [torch.randn_like(embeds) for _ in range(_DEEPSTACK)]
    extras = {"visual_pos_masks": EVERYWHERE, "deepstack_visual_embeds": deep}
    return Segment("step", ids, embeds, positions, following, model.frames_per_step, extras=extras)


def stride(model: VideoModel, tokens: int) -> int:
    """Positions that one step takes."""
    if not isinstance(model, Qwen3VL):
        return tokens
    side = isqrt(tokens)
    return side + tokens - side * side


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
    """Give an empty stream the memories that `tokens` tokens would have left, and room for another step.

    Args:
        state: it is left standing behind those tokens, at position `tokens`.
        tokens: how many the detailed cache is to hold.
        step: tokens of one step.
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
    carried.make_room(length + step)
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
        position: of the next token.
        step: tokens of one step.
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
