"""Sizes of language models, and what transformers' configurations call them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from statekv.errors import ConfigError


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
        """The same model cut to its first layers, None: whole; a ConfigError for none, or more than there are."""
        if layers is None:
            return self
        if not 1 <= layers <= self.layers:
            raise ConfigError(f"layers is {layers}, but {self.name} has {self.layers}", f"give 1 … {self.layers}")
        return replace(self, layers=layers)


def qwen2(
    name: str,
    family: str,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    **others: Any,
) -> Size:
    """A Qwen2.5, which several families speak; `others` are further fields of `Size`."""
    rope = {"rope_theta": 1e6, "rope_factor": None, "trained_length": 32768, "qkv_bias": True, "tied": False}
    return Size(name, family, hidden, intermediate, layers, heads, kv_heads, head_dim, **{**rope, **others})


def qwen2_7b(name: str, family: str, vocab: int, **others: Any) -> Size:
    """The one of 7 billion weights."""
    return qwen2(name, family, 3584, 18944, 28, 28, 4, 128, vocab=vocab, **others)


def text_config(size: Size) -> dict[str, Any]:
    """What transformers' configuration of a language model of this size has in all families."""
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
