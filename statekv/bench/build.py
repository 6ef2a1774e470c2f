"""A real transformers model of any size with random weights, in seconds: what a step costs does not depend on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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

from statekv.bench.sizes import Size
from statekv.models.base import VideoModel
from statekv.models.loading import wrap_model
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
