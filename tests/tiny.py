"""Tiny random checkpoints of all families: real tokenizer, real JSON files, random weights; built in well
under a second.

Weights are much larger than a fresh model's, so that logits differ clearly and greedy decoding does not tie.
"""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from statekv.models.families.eagle2_5 import completed_config, completed_model
from tests import stock
from tests.models.families import eagle_processor, eagle_stand_in
from tests.models.families.eagle_stand_in import Eagle2_5_VLConfig, Eagle2_5_VLForConditionalGeneration

FAMILIES = ("internvl", "qwen3_vl", "qwen2_5_vl", "llava_onevision")
# Two families with another language model, and one whose code comes with its checkpoint: for the tests of exactness.
KIN = {"internvl3_5": "internvl", "qwen3_vl_moe": "qwen3_vl", "eagle2_5": "eagle2_5"}
EVERY_MODEL = (*FAMILIES, *KIN)
# What streams, sessions and what is kept of them can tell of a model: one frame to a step, and positions on one axis
# whose frequencies go by the horizon; two frames, three axes, and features for more than one layer.
TWO_FAMILIES = ("internvl", "qwen3_vl")

# Merges come from these lines: the words of the prompts, so that seams between pieces are seams of real
# tokens.
_CORPUS = """system user assistant You are a helpful assistant.
Frame1: Frame2: Frame10: Frame11: <0.5 seconds> <1.2 seconds> <10.0 seconds>
What is written on the board? What happens in the video, and when? Describe the video. How many people are
there? The red square moves to the left; the blue circle is behind it. Was ist zu sehen? Größe, Straße, naïve,
视频里有什么
"""

_CHAT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_INTERNVL_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
_LLAVA_TOKENS = {"image_token": "<image>", "video_token": "<video>"}
_QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")

_INTERNVL_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message['content'] is string -%}{{- message['content'] -}}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'image' -%}{{- '<IMG_CONTEXT>\\n' -}}
            {%- elif part['type'] == 'video' -%}{{- '<video>\\n' -}}
            {%- elif part['type'] == 'text' -%}{{- part['text'] -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

_QWEN_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- if message.content is string -%}{{- message.content -}}
    {%- else -%}
        {%- for part in message.content -%}
            {%- if part.type == 'image' or 'image' in part -%}<|vision_start|><|image_pad|><|vision_end|>
            {%- elif part.type == 'video' or 'video' in part -%}<|vision_start|><|video_pad|><|vision_end|>
            {%- elif 'text' in part -%}{{- part.text -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

# Pictures come first, with nothing between them, wherever they stand in the message.
_LLAVA_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message['content'] is string -%}{{- message['content'] -}}
    {%- else -%}
        {%- for part in message['content'] if part['type'] == 'image' -%}{{- '<image>' -}}{%- endfor -%}
        {%- for part in message['content'] if part['type'] == 'video' -%}{{- '<video>' -}}{%- endfor -%}
        {%- for part in message['content'] if part['type'] == 'text' -%}{{- '\\n' + part['text'] -}}{%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
_CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_SQUARE = {
    "size": {"height": 32, "width": 32},
    "resample": 3,
    "do_resize": True,
    "do_rescale": True,
    **_IMAGENET,
}
_GRIDS = [[40, 40], [40, 80], [80, 40], [80, 80], [40, 120]]
_PATCHES = {"patch_size": 8, "temporal_patch_size": 2, "merge_size": 2, **_HALF}

# The JSON files beside the weights, each with the keys that the public checkpoints have.
_JSON_FILES: dict[str, dict[str, dict[str, Any]]] = {
    "internvl": {
        "preprocessor_config.json": {
            "image_processor_type": "GotOcr2ImageProcessorFast",
            "processor_class": "InternVLProcessor",
            "crop_to_patches": False,
            "min_patches": 1,
            "max_patches": 12,
            "do_normalize": True,
            "rescale_factor": 1 / 255,
            **_SQUARE,
        },
        "video_preprocessor_config.json": {
            "video_processor_type": "InternVLVideoProcessor",
            "processor_class": "InternVLProcessor",
            "do_center_crop": None,
            "do_normalize": True,
            "rescale_factor": 1 / 255,
            **_SQUARE,
        },
        "processor_config.json": {"processor_class": "InternVLProcessor", "image_seq_length": 4},
    },
    "qwen3_vl": {
        "preprocessor_config.json": {
            "image_processor_type": "Qwen2VLImageProcessorFast",
            "processor_class": "Qwen3VLProcessor",
            "size": {"shortest_edge": 256, "longest_edge": 16777216},
            **_PATCHES,
        },
        "video_preprocessor_config.json": {
            "video_processor_type": "Qwen3VLVideoProcessor",
            "processor_class": "Qwen3VLProcessor",
            "size": {"shortest_edge": 512, "longest_edge": 25165824},
            **_PATCHES,
        },
        "chat_template.json": {"chat_template": _QWEN_TEMPLATE},
    },
    # The bounds are for one frame, and the video processor has no file of its own.
    "qwen2_5_vl": {
        "preprocessor_config.json": {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
            "min_pixels": 256,
            "max_pixels": 16777216,
            **_PATCHES,
            **_CLIP,
        },
        "chat_template.json": {"chat_template": _QWEN_TEMPLATE},
    },
    "llava_onevision": {
        "preprocessor_config.json": {
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "processor_class": "LlavaOnevisionProcessor",
            "image_grid_pinpoints": _GRIDS,
            "do_pad": True,
            **_SQUARE,
            "size": {"height": 40, "width": 40},
        },
        "video_preprocessor_config.json": {
            "video_processor_type": "LlavaOnevisionVideoProcessor",
            "processor_class": "LlavaOnevisionProcessor",
            "do_normalize": True,
            "rescale_factor": 1 / 255,
            **_SQUARE,
            "size": {"height": 40, "width": 40},
        },
        "processor_config.json": {
            "processor_class": "LlavaOnevisionProcessor",
            "num_image_tokens": 25,
            "vision_feature_select_strategy": "full",
        },
        "chat_template.json": {"chat_template": _LLAVA_TEMPLATE},
    },
    "eagle2_5": eagle_processor.JSON_FILES,
}

_TEMPLATES = {
    "internvl": _INTERNVL_TEMPLATE,
    "qwen3_vl": _QWEN_TEMPLATE,
    "qwen2_5_vl": _QWEN_TEMPLATE,
    "llava_onevision": _LLAVA_TEMPLATE,
    "eagle2_5": eagle_processor.TEMPLATE,
}
_NAMED_TOKENS = {"internvl": _INTERNVL_TOKENS, "llava_onevision": _LLAVA_TOKENS}
_EAGLE_TOKENS = ("<img>", "</img>", "<IMG_CONTEXT>")
_EAGLE_CODE = "modeling_eagle2_5_vl"


@dataclass(frozen=True)
class Tiny:
    """A random checkpoint in memory: float32, eval mode; `family` says how it looks and reads."""

    family: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def language_model(self) -> Any:
        """The decoder layers, without the head."""
        model: Any = self.model
        return model.language_model.model if self.family == "eagle2_5" else model.model.language_model

    @property
    def tower(self) -> torch.nn.Module:
        """What looks at pictures, without what fits its features to the decoder where that is a module of its own."""
        model: Any = self.model
        if self.family == "eagle2_5":
            found = model.vision_model
        else:
            found = model.model.visual if "qwen" in self.family else model.model.vision_tower
        assert isinstance(found, torch.nn.Module)
        return found

    @property
    def chat_template(self) -> str:
        return _TEMPLATES[self.family]

    @property
    def video_json(self) -> dict[str, Any]:
        """What the checkpoint's file for the video processor holds."""
        files = _JSON_FILES[self.family]
        return dict(files.get("video_preprocessor_config.json") or files["preprocessor_config.json"])

    @functools.cached_property
    def processor(self) -> Any:
        """The stock processor; skips the test where torchvision is not installed."""
        if self.family == "eagle2_5":
            return eagle_processor.EagleProcessor(self.tokenizer, self.video_json)
        with tempfile.TemporaryDirectory() as folder:
            self._save_texts(Path(folder))
            return stock.processor(folder)

    def save(self, folder: str | Path) -> Path:
        """Write the checkpoint as the hub holds it: weights, config, tokenizer, chat template, processors."""
        self.model.save_pretrained(folder)
        self._save_texts(Path(folder))
        return Path(folder)

    def _save_texts(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)
        for name, values in _JSON_FILES[self.family].items():
            (folder / name).write_text(json.dumps(values, indent=2), encoding="utf-8")
        self.config.save_pretrained(folder)
        if self.family == "eagle2_5":
            shutil.copy(eagle_stand_in.__file__, folder / f"{_EAGLE_CODE}.py")


def tiny(name: str, seed: int = 0, max_position_embeddings: int = 4096) -> Tiny:
    """A tiny random model of `EVERY_MODEL` with its tokenizer; equal seeds give equal weights."""
    family = KIN.get(name, name)
    tokenizer = _tokenizer(family)
    builders = {
        "internvl": _internvl,
        "qwen3_vl": _qwen3_vl,
        "qwen2_5_vl": _qwen2_5_vl,
        "llava_onevision": _llava_onevision,
        "internvl3_5": _internvl3_5,
        "qwen3_vl_moe": _qwen3_vl_moe,
        "eagle2_5": _eagle2_5,
    }
    model = builders[name](tokenizer, max_position_embeddings).eval()
    _randomise(model, seed)
    decodes: Any = model.language_model if name == "eagle2_5" else model
    decodes.generation_config = GenerationConfig(
        eos_token_id=_id(tokenizer, "<|im_end|>"), pad_token_id=tokenizer.pad_token_id
    )
    return Tiny(family, model, tokenizer)


def video(num_frames: int, height: int = 40, width: int = 56, seed: int = 0) -> torch.Tensor:
    """A video of coarse random blocks, other ones in every frame: uint8 [N, 3, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (num_frames, 3, 4, 4), generator=generator, dtype=torch.uint8)
    return torch.nn.functional.interpolate(blocks, size=(height, width), mode="nearest")


def _internvl(tokenizer: PreTrainedTokenizerBase, max_position_embeddings: int) -> PreTrainedModel:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}
    text = {"model_type": "qwen2", "rope_parameters": rope, **_text(tokenizer, max_position_embeddings)}
    return _internvl_with(text, tokenizer)


def _internvl3_5(tokenizer: PreTrainedTokenizerBase, max_position_embeddings: int) -> PreTrainedModel:
    words = {"model_type": "qwen3", "head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    return _internvl_with({**words, **_text(tokenizer, max_position_embeddings)}, tokenizer)


def _internvl_with(text: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = InternVLConfig(
        vision_config={**vision, "attention_bias": True, "image_size": [32, 32], "patch_size": [8, 8]},
        text_config=text,
        image_token_id=_id(tokenizer, "<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    return InternVLForConditionalGeneration(config)


def _qwen3_vl(tokenizer: PreTrainedTokenizerBase, max_position_embeddings: int) -> PreTrainedModel:
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(**_of_qwen3_vl(tokenizer, max_position_embeddings)))


def _qwen3_vl_moe(tokenizer: PreTrainedTokenizerBase, max_position_embeddings: int) -> PreTrainedModel:
    config = _of_qwen3_vl(tokenizer, max_position_embeddings)
    # One layer in three has a plain MLP, so that both kinds are there.
    config["text_config"] |= {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "mlp_only_layers": [1],
    }
    return Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(**config))


def _of_qwen3_vl(tokenizer: PreTrainedTokenizerBase, max_position_embeddings: int) -> dict[str, Any]:
    vision = {"hidden_size": 32, "depth": 3, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 64}
    pieces = {"patch_size": 8, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 2]}
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    return {
        "vision_config": {**vision, **pieces},
        "text_config": {"head_dim": 16, "rope_parameters": rope, **_text(tokenizer, max_position_embeddings)},
        "image_token_id": _id(tokenizer, "<|image_pad|>"),
        "video_token_id": _id(tokenizer, "<|video_pad|>"),
        "vision_start_token_id": _id(tokenizer, "<|vision_start|>"),
        "vision_end_token_id": _id(tokenizer, "<|vision_end|>"),
        "tie_word_embeddings": False,
    }


def _qwen2_5_vl(tokenizer: PreTrainedTokenizerBase, max_position_embeddings: int) -> PreTrainedModel:
    vision = {"hidden_size": 32, "depth": 3, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 64}
    # Windows of 2 x 2 tokens, so that a picture has several; and a clock so fast that a video of a few steps reaches
    # positions beyond its question's.
    pieces = {"patch_size": 8, "window_size": 32, "fullatt_block_indexes": [1], "tokens_per_second": 16}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 2, 2]}
    config = Qwen2_5_VLConfig(
        vision_config={**vision, **pieces},
        text_config={"rope_parameters": rope, **_text(tokenizer, max_position_embeddings)},
        image_token_id=_id(tokenizer, "<|image_pad|>"),
        video_token_id=_id(tokenizer, "<|video_pad|>"),
        vision_start_token_id=_id(tokenizer, "<|vision_start|>"),
        vision_end_token_id=_id(tokenizer, "<|vision_end|>"),
        tie_word_embeddings=False,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def _llava_onevision(tokenizer: PreTrainedTokenizerBase, max_position_embeddings: int) -> PreTrainedModel:
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    rope = {"rope_type": "default", "rope_theta": 1e6}
    # Five patches a side: an odd number is pooled unevenly, as the 27 of real checkpoints.
    pieces = {"model_type": "siglip_vision_model", "image_size": 40, "patch_size": 8, "vision_use_head": False}
    config = LlavaOnevisionConfig(
        vision_config={**vision, **pieces},
        text_config={"model_type": "qwen2", "rope_parameters": rope, **_text(tokenizer, max_position_embeddings)},
        image_token_index=_id(tokenizer, "<image>"),
        video_token_index=_id(tokenizer, "<video>"),
        image_grid_pinpoints=_GRIDS,
        tie_word_embeddings=False,
    )
    return LlavaOnevisionForConditionalGeneration(config)


def _eagle2_5(tokenizer: PreTrainedTokenizerBase, max_position_embeddings: int) -> PreTrainedModel:
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    rope = {"rope_type": "default", "rope_theta": 1e6}
    config = completed_config(Eagle2_5_VLConfig)(
        vision_config={**vision, "image_size": 32, "patch_size": 8, "vision_use_head": False},
        text_config={"rope_parameters": rope, **_text(tokenizer, max_position_embeddings)},
        image_token_index=_id(tokenizer, "<IMG_CONTEXT>"),
        tie_word_embeddings=False,
        auto_map={
            "AutoConfig": f"{_EAGLE_CODE}.Eagle2_5_VLConfig",
            "AutoModel": f"{_EAGLE_CODE}.Eagle2_5_VLForConditionalGeneration",
        },
    )
    model: PreTrainedModel = completed_model(Eagle2_5_VLForConditionalGeneration)(config)
    return model


def _id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int)
    return found


def _text(tokenizer: PreTrainedTokenizerBase, max_position_embeddings: int) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": max_position_embeddings,
        "eos_token_id": _id(tokenizer, "<|im_end|>"),
        "bos_token_id": None,
        "tie_word_embeddings": False,
    }


@torch.no_grad()
def _randomise(model: PreTrainedModel, seed: int) -> None:
    # Every parameter, also those that a fresh model sets to zero (class token, positions) or one (norms,
    # layer scale).
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        around_one = ("norm" in name and name.endswith("weight")) or "lambda" in name
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + 0.2 * noise if around_one else 0.2 * noise)


@functools.cache
def _bpe() -> tuple[dict[str, int], list[tuple[str, str]]]:
    # Trained once per test run: vocabulary and merges of a byte-level BPE with Qwen2's splitting rule.
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    trained.train_from_iterator(_CORPUS.splitlines(), trainer)
    state = json.loads(trained.to_str())["model"]
    return state["vocab"], [tuple(pair) for pair in state["merges"]]


def _tokenizer(family: str) -> PreTrainedTokenizerBase:
    vocab, merges = _bpe()
    named = _NAMED_TOKENS.get(family)
    tokenizer = Qwen2Tokenizer(
        vocab=dict(vocab),
        merges=list(merges),  # type: ignore[arg-type]
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=named or {},
        chat_template=_TEMPLATES[family],
    )
    unnamed = _EAGLE_TOKENS if family == "eagle2_5" else _QWEN_TOKENS
    special = [*_CHAT_TOKENS, *(named.values() if named else unnamed)]
    tokenizer.add_tokens(special, special_tokens=True)
    return tokenizer
