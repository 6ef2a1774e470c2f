"""The public checkpoints as module trees without memory, from the values of their configurations."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from statekv.models import FAMILIES, Checkpoint
from statekv.models.adapter import VideoModel
from statekv.models.families import qwen_vl
from statekv.models.families.eagle2_5 import completed_config, completed_model
from statekv.models.families.qwen2_5_vl import Qwen25VLRecipe, qwen2_5_vl_size
from statekv.models.families.qwen3_vl import Qwen3VLRecipe, qwen3_vl_size
from statekv.models.loading import wrap_model
from tests.models.families.eagle_stand_in import Eagle2_5_VLConfig, Eagle2_5_VLForConditionalGeneration


def text(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **others: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **others,
    }


QWEN_05B = text(896, 4864, 24, 14, 2)
QWEN_15B = text(1536, 8960, 28, 12, 2)
QWEN_7B = text(3584, 18944, 28, 28, 4)


def internvl(language: dict[str, Any], **words: Any) -> Any:
    tower = {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "image_size": [448, 448],
        "patch_size": [14, 14],
        "attention_bias": True,
    }
    words = {"model_type": "qwen2", "vocab_size": 151674, "tie_word_embeddings": False, **words}
    return AutoConfig.for_model(
        "internvl", vision_config=tower, text_config=language | words, tie_word_embeddings=False, image_seq_length=256
    )


def internvl3_5(language: dict[str, Any]) -> Any:
    return internvl(language, model_type="qwen3", vocab_size=151936, head_dim=128)


def qwen3_vl(
    language: dict[str, Any],
    depth: int,
    tower_hidden: int,
    tower_between: int,
    tied: bool,
    model_type: str = "qwen3_vl",
) -> Any:
    tower = {
        "depth": depth,
        "hidden_size": tower_hidden,
        "intermediate_size": tower_between,
        "num_heads": 16,
        "out_hidden_size": language["hidden_size"],
        "deepstack_visual_indexes": [depth // 5, depth // 2, depth - 7],
    }
    words = {"vocab_size": 151936, "head_dim": 128, "tie_word_embeddings": tied}
    return AutoConfig.for_model(model_type, vision_config=tower, text_config=language | words, tie_word_embeddings=tied)


def qwen2_5_vl(language: dict[str, Any], vocabulary: int, tied: bool) -> Any:
    tower = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": language["hidden_size"],
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    words = {"vocab_size": vocabulary, "tie_word_embeddings": tied}
    return AutoConfig.for_model(
        "qwen2_5_vl", vision_config=tower, text_config=language | words, tie_word_embeddings=tied
    )


def llava_onevision(language: dict[str, Any], vocabulary: int, tied: bool) -> Any:
    tower = {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 26,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
        "vision_use_head": False,
    }
    words = {"model_type": "qwen2", "vocab_size": vocabulary, "tie_word_embeddings": tied}
    return AutoConfig.for_model(
        "llava_onevision", vision_config=tower, text_config=language | words, tie_word_embeddings=tied
    )


def eagle2_5(language: dict[str, Any]) -> Any:
    """As its public code and report have it; the checkpoint's own configuration has not been seen here."""
    tower = {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 448,
        "patch_size": 14,
    }
    words = {"vocab_size": 152064, "tie_word_embeddings": False}
    return completed_config(Eagle2_5_VLConfig)(vision_config=tower, text_config=language | words)


EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
CONFIGURATIONS = {
    "OpenGVLab/InternVL3-1B-hf": lambda: internvl(QWEN_05B),
    "OpenGVLab/InternVL3-2B-hf": lambda: internvl(QWEN_15B),
    "OpenGVLab/InternVL3-8B-hf": lambda: internvl(QWEN_7B),
    "OpenGVLab/InternVL3_5-1B-HF": lambda: internvl3_5(text(1024, 3072, 28, 16, 8)),
    "OpenGVLab/InternVL3_5-2B-HF": lambda: internvl3_5(text(2048, 6144, 28, 16, 8)),
    "OpenGVLab/InternVL3_5-4B-HF": lambda: internvl3_5(text(2560, 9728, 36, 32, 8)),
    "OpenGVLab/InternVL3_5-8B-HF": lambda: internvl3_5(text(4096, 12288, 36, 32, 8)),
    "Qwen/Qwen3-VL-2B-Instruct": lambda: qwen3_vl(text(2048, 6144, 28, 16, 8), 24, 1024, 4096, tied=True),
    "Qwen/Qwen3-VL-4B-Instruct": lambda: qwen3_vl(text(2560, 9728, 36, 32, 8), 24, 1024, 4096, tied=True),
    "Qwen/Qwen3-VL-8B-Instruct": lambda: qwen3_vl(text(4096, 12288, 36, 32, 8), 27, 1152, 4304, tied=False),
    "Qwen/Qwen3-VL-30B-A3B-Instruct": lambda: qwen3_vl(
        text(2048, 6144, 48, 32, 4, **EXPERTS), 27, 1152, 4304, tied=False, model_type="qwen3_vl_moe"
    ),
    "Qwen/Qwen2.5-VL-3B-Instruct": lambda: qwen2_5_vl(text(2048, 11008, 36, 16, 2), 151936, tied=True),
    "Qwen/Qwen2.5-VL-7B-Instruct": lambda: qwen2_5_vl(QWEN_7B, 152064, tied=False),
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": lambda: llava_onevision(QWEN_05B, 152000, tied=True),
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": lambda: llava_onevision(QWEN_7B, 152000, tied=False),
    "nvidia/Eagle2.5-8B": lambda: eagle2_5(QWEN_7B),
}
KNOWN = {known.name: (name, known) for name, family in FAMILIES.items() for known in family.checkpoints}
EVERY_CHECKPOINT = pytest.mark.parametrize("name", KNOWN)


@functools.cache
def built(name: str) -> VideoModel:
    with torch.device("meta"):
        if name == "nvidia/Eagle2.5-8B":
            return wrap_model(completed_model(Eagle2_5_VLForConditionalGeneration)(CONFIGURATIONS[name]()).bfloat16())
        return wrap_model(AutoModelForImageTextToText.from_config(CONFIGURATIONS[name](), dtype=torch.bfloat16))


def test_every_checkpoint_of_the_table_is_here() -> None:
    assert set(CONFIGURATIONS) == set(KNOWN)


@EVERY_CHECKPOINT
def test_its_keys_are_as_the_table_says(name: str) -> None:
    family, known = KNOWN[name]
    model = built(name)
    assert model.model.config.model_type == family
    spec = model.kv_spec()
    assert (spec.layers, spec.kv_heads, spec.head_dim) == (known.layers, known.kv_heads, known.head_dim)
    assert spec.bytes_per_token == known.bytes_per_token


@EVERY_CHECKPOINT
def test_it_has_as_many_parameters_as_it_is_named_for(name: str) -> None:
    known: Checkpoint = KNOWN[name][1]
    # The hub counts a head that is tied to the embedding once, as torch does.
    counted = sum(weight.numel() for weight in built(name).model.parameters())
    assert counted / 1e9 == pytest.approx(known.billions, rel=0.01)


@EVERY_CHECKPOINT
def test_a_key_projection_has_the_shape_of_its_heads(name: str) -> None:
    known = KNOWN[name][1]
    layer = built(name).language_model.layers[-1]
    assert layer.self_attn.k_proj.weight.shape[0] == known.kv_heads * known.head_dim
    assert len(built(name).language_model.layers) == known.layers


def test_tokens_of_a_frame() -> None:
    config = built("OpenGVLab/InternVL3-8B-hf").model.config
    side = config.vision_config.image_size[0] / config.vision_config.patch_size[0] * config.downsample_ratio
    assert side**2 == config.image_seq_length == FAMILIES["internvl"].tokens_per_frame
    assert built("nvidia/Eagle2.5-8B").model.num_image_token == FAMILIES["eagle_2_5_vl"].tokens_per_frame
    tower = built("llava-hf/llava-onevision-qwen2-7b-ov-hf").model.config.vision_config
    pooled = -(-(tower.image_size // tower.patch_size) // 2)
    assert pooled**2 == FAMILIES["llava_onevision"].tokens_per_frame


@pytest.mark.parametrize(("family", "factor"), [("qwen3_vl", 32), ("qwen2_5_vl", 28)])
def test_tokens_of_a_frame_by_its_size(family: str, factor: int) -> None:
    known = FAMILIES[family]
    assert known.of_pixels is not None
    width, height = known.of_pixels
    if family == "qwen3_vl":  # whose public bounds differ from the class's
        recipe = Qwen3VLRecipe(shortest_edge=4096, longest_edge=25165824)
        rows, columns = qwen3_vl_size(height, width, qwen_vl._FRAMES_IF_UNKNOWN, recipe)
    else:
        rows, columns = qwen2_5_vl_size(height, width, 512, Qwen25VLRecipe())
    assert rows * columns / factor**2 / 2 == known.tokens_per_frame
