"""What all families share: runs of placeholders, features put in their places, sizes read off the model."""

from __future__ import annotations

import pytest
import torch

from statekv.errors import ModelError
from statekv.models import FAMILIES as KNOWN
from statekv.models import adapter
from statekv.models.base import Segment, fill_placeholders, runs
from tests.talk import shared_engine, stock_model
from tests.tiny import FAMILIES, tiny


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([], []),
        ([1, 2], []),
        ([9], [(0, 1, 9)]),
        ([1, 9, 9, 2, 9], [(1, 3, 9), (4, 5, 9)]),
        ([9, 9, 8, 8, 9], [(0, 2, 9), (2, 4, 8), (4, 5, 9)]),
    ],
)
def test_runs_of_placeholders(ids: list[int], expected: list[tuple[int, int, int]]) -> None:
    assert list(runs(torch.tensor(ids, dtype=torch.long), [8, 9])) == expected


def test_features_stand_where_the_placeholders_are() -> None:
    embeds, spots = torch.zeros(1, 4, 3, dtype=torch.float64), torch.tensor([[False, True, True, False]])
    filled = fill_placeholders(embeds, spots, torch.tensor([[1.0] * 3, [2.0] * 3]))
    assert filled[0, :, 0].tolist() == [0, 1, 2, 0]
    assert filled.dtype == torch.float64
    assert not embeds.any()
    for wrong in (1, 3):
        with pytest.raises(ModelError, match=f"placeholders for 2 vision features, the pictures make {wrong}"):
            fill_placeholders(embeds, spots, torch.zeros(wrong, 3))


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_read_off_the_model(family: str) -> None:
    model = shared_engine(family).model
    geometry = model.geometry()
    assert (geometry.kv_heads, geometry.head_dim, geometry.layers, geometry.streams) == (2, 16, 3, 1)
    assert geometry.dtype == torch.float32
    assert geometry.bytes_per_token == 2 * 3 * 2 * 16 * 4
    assert model.trained_length == 4096
    assert model.end_tokens == {model.tokenizer.convert_tokens_to_ids("<|im_end|>")}


@pytest.mark.parametrize("family", FAMILIES)
def test_end_tokens_fall_back_on_the_text_configuration(family: str) -> None:
    made = tiny(family)
    model = adapter(family)(made.model)
    made.model.generation_config.eos_token_id = [3, 5]
    assert model.end_tokens == {3, 5}
    made.model.generation_config.eos_token_id = None
    assert model.end_tokens == {made.config.text_config.eos_token_id}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_length_is_that_of_the_tokens(family: str) -> None:
    segment = shared_engine(family).model.text("question", [1, 2, 3], 7)
    assert isinstance(segment, Segment)
    assert segment.length == 3
    assert segment.next_position == 10
    assert segment.positions.shape[-2:] == (1, 3)
    assert segment.positions.flatten()[:3].tolist() == [7, 8, 9]


def test_sliding_windows_are_refused() -> None:
    made = tiny("internvl")
    made.config.text_config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    with pytest.raises(ModelError, match="sliding_attention"):
        adapter("internvl")(made.model)


def test_rope_that_switches_with_the_length_is_refused() -> None:
    made = tiny("internvl")
    made.model.model.language_model.rotary_emb.rope_type = "longrope"
    with pytest.raises(ModelError, match="longrope"):
        adapter("internvl")(made.model)


def test_unknown_families_fail_with_the_known_ones() -> None:
    with pytest.raises(ModelError, match=r"'llava'.*internvl, qwen3_vl"):
        adapter("llava")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_of_families_holds(family: str) -> None:
    assert set(KNOWN) == set(FAMILIES)
    assert adapter(family).__name__ == KNOWN[family].adapter
    assert all(name.count("/") == 1 for name in KNOWN[family].checkpoints)
    assert stock_model(family).config.model_type == family
