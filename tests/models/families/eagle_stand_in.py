"""A stand-in for the code that Eagle2.5's checkpoint brings along: the same parts, names and calls, any size.

Written anew after NVlabs/Eagle, Eagle2_5/eaglevl/model/eagle2_5 (configuration and modeling), with what keeps those
from loading in transformers 5; what serves training or other towers is left out. A checkpoint's folder gets a copy of
this file, as the real one has its own: it imports nothing of ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)


class Eagle2_5_VLConfig(PreTrainedConfig):  # noqa: N801
    """As in the checkpoint: a tower, a language model and how the one's features become the other's embeddings."""

    model_type = "eagle_2_5_vl"
    sub_configs = {"vision_config": SiglipVisionConfig, "text_config": Qwen2Config}  # noqa: RUF012

    def __init__(
        self,
        vision_config: dict[str, Any] | None = None,
        text_config: dict[str, Any] | None = None,
        force_image_size: int | None = None,
        downsample_ratio: float = 0.5,
        image_token_index: int = 151667,
        **others: Any,
    ) -> None:
        self.vision_config = SiglipVisionConfig(**(vision_config or {}))
        self.text_config = Qwen2Config(**(text_config or {}))
        self.force_image_size = force_image_size
        self.downsample_ratio = downsample_ratio
        self.image_token_index = image_token_index
        super().__init__(**others)

    def to_dict(self) -> dict[str, Any]:
        output: dict[str, Any] = super().to_dict()
        output["_attn_implementation_autoset"] = self._attn_implementation_autoset
        return output


class Eagle2_5_VLForConditionalGeneration(PreTrainedModel, GenerationMixin):  # noqa: N801
    """A SigLIP tower, four neighbouring patches put together, two linear layers, Qwen2."""

    config_class = Eagle2_5_VLConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, config: Eagle2_5_VLConfig, vision_model: Any = None, language_model: Any = None) -> None:
        super().__init__(config)
        tower: Any = config.vision_config
        language: Any = config.text_config
        side = (config.force_image_size or tower.image_size) // tower.patch_size
        self.num_image_token = int(side**2 * config.downsample_ratio**2)
        if vision_model is None:
            tower._attn_implementation = "flash_attention_2"
        self.vision_model = vision_model or SiglipVisionModel(tower)
        self.language_model = language_model or Qwen2ForCausalLM(language)
        wide = tower.hidden_size * int(1 / config.downsample_ratio) ** 2
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(wide),
            nn.Linear(wide, language.hidden_size),
            nn.GELU(),
            nn.Linear(language.hidden_size, language.hidden_size),
        )

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(mean=0.0, std=self.config.initializer_range)

    def get_input_embeddings(self) -> Any:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        return self.language_model.get_output_embeddings()

    def extract_feature(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[tiles, 3, H, W] → [tiles, num_image_token, hidden]"""
        features = self.vision_model(pixel_values=pixel_values).last_hidden_state
        found: torch.Tensor = self.mlp1(self.pixel_shuffle(features))
        return found

    def pixel_shuffle(self, features: torch.Tensor) -> torch.Tensor:
        """[n, side · side, c] → [n, side · side / 4, 4 · c]: each square of 2 x 2 patches, row by row."""
        tiles, patches, channels = features.shape
        half = int(patches**0.5) // 2
        squares = features.view(tiles, half, 2, half, 2, channels).permute(0, 1, 3, 2, 4, 5)
        return squares.reshape(tiles, half * half, 4 * channels)

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> Any:
        """One pass over a whole prompt; features stand where the placeholders are."""
        return self.language_model(
            inputs_embeds=self._embed(pixel_values, input_ids), attention_mask=attention_mask, return_dict=True
        )

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        generation_config: Any = None,
        image_sizes: Any = None,
        **parameters: Any,
    ) -> Any:
        """The language model's own `generate` on embeddings: it returns new tokens without the prompt."""
        decoder: Any = self.language_model
        return decoder.generate(
            inputs_embeds=self._embed(pixel_values, input_ids),
            attention_mask=attention_mask,
            generation_config=generation_config,
            use_cache=True,
            **parameters,
        )

    def _embed(self, pixel_values: torch.Tensor | None, input_ids: torch.Tensor | None) -> torch.Tensor:
        embeds: torch.Tensor = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            features = self.extract_feature(pixel_values)
            embeds[input_ids == self.config.image_token_index] = features.flatten(0, 1)
        return embeds
