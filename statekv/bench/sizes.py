"""Sizes of language models, the paper's and two more families', from their public configurations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

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
