"""Sizes against the arithmetic that the design states, and against the models that they build."""

from __future__ import annotations

import pytest
import torch

from statekv.bench.build import build
from statekv.bench.sizes import SIZES, size_of
from statekv.errors import ConfigError
from statekv.models import adapter

META = torch.device("meta")

# bf16, KiB per token: section 6 of the design; the last three have the language model of InternVL3-8B.
KIB_PER_TOKEN = {
    "internvl3-1b": 12,
    "internvl3-2b": 28,
    "internvl3-8b": 56,
    "qwen3-vl-2b": 112,
    "qwen3-vl-4b": 144,
    "qwen3-vl-8b": 144,
    "eagle2.5-8b": 56,
    "qwen2.5-vl-7b": 56,
    "llava-onevision-7b": 56,
}


@pytest.mark.parametrize(("name", "kib"), KIB_PER_TOKEN.items())
def test_bytes_per_token_are_those_of_the_design(name: str, kib: int) -> None:
    assert SIZES[name].kv_bytes_per_token(torch.bfloat16) == kib * 1024
    assert SIZES[name].kv_bytes_per_token(torch.float32) == 2 * kib * 1024


def test_all_models_of_the_paper_are_there_and_two_more() -> None:
    assert set(SIZES) == set(KIB_PER_TOKEN)
    assert all(name == size.name for name, size in SIZES.items())


@pytest.mark.parametrize("name", SIZES)
def test_counts_are_those_of_the_model_that_is_built(name: str) -> None:
    size = SIZES[name]
    model = build(size, META, torch.bfloat16)
    weights = dict(model.language_model.named_parameters())
    embedding = weights.pop("embed_tokens.weight")
    assert sum(weight.numel() for weight in weights.values()) == size.parameters
    assert embedding.shape == (size.vocab, size.hidden)
    assert (model.model.get_output_embeddings().weight is embedding) == size.tied
    assert model.geometry().bytes_per_token == size.kv_bytes_per_token(torch.bfloat16)
    assert isinstance(model, adapter(size.family))
    assert model.trained_length == size.trained_length


def test_a_cut_model_has_fewer_layers_and_says_so() -> None:
    whole, cut = SIZES["qwen3-vl-8b"], size_of("qwen3-vl-8b", layers=9)
    assert cut.layers == 9
    assert cut.parameters - cut.hidden == (whole.parameters - whole.hidden) // 4
    assert size_of("qwen3-vl-8b") is whole


def test_layers_that_are_not_there_are_refused() -> None:
    for layers in (0, 25):
        with pytest.raises(ConfigError, match=rf"layers is {layers}, but internvl3-1b has 24 \(give 1 … 24\)"):
            size_of("internvl3-1b", layers)


def test_unknown_names_get_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown model 'gpt'.*internvl3-1b.*eagle2\.5-8b"):
        size_of("gpt")
