"""What all families share: features put in their places, sizes read off the model."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from statekv.cache.stream import StreamState
from statekv.config import Config
from statekv.engine.engine import Engine
from statekv.errors import ModelError
from statekv.models import FAMILIES as KNOWN
from statekv.models import Family, adapter_of
from statekv.models.adapter import Segment, Texts, runs
from statekv.models.encoded import EncodedStep
from statekv.models.families.internvl import InternVL
from statekv.video.frame import Frame
from tests.talk import shared_engine, some_frames, stock_model
from tests.tiny import EVERY_MODEL, FAMILIES, tiny


@torch.inference_mode()
def test_features_stand_where_the_placeholders_are() -> None:
    model = shared_engine("internvl").model
    hidden = model.text_config.hidden_size
    ids, token = [5, 9, 9, 6], 9
    features = torch.tensor([[1.0], [2.0]], dtype=torch.float64).expand(2, hidden)
    row, embeds, spot = model.embed_picture(ids, token, EncodedStep((), features, (1, 2)))
    assert (row.tolist(), spot) == ([ids], slice(1, 3))
    assert embeds.dtype == torch.float32
    assert embeds[0, 1:3, 0].tolist() == [1, 2]
    assert torch.equal(embeds[:, ::3], model.embed(torch.tensor([[5, 6]])))
    for wrong in (1, 3):
        with pytest.raises(ModelError, match=f"placeholders for 2 vision features, the pictures make {wrong}"):
            model.embed_picture(ids, token, EncodedStep((), torch.zeros(wrong, hidden), (1, wrong)))


@pytest.mark.parametrize("family", EVERY_MODEL)
@torch.inference_mode()
def test_looking_at_several_steps_is_looking_at_each(family: str) -> None:
    model = shared_engine(family).model
    frames, size = some_frames(6), model.frames_per_step
    steps = [frames[i : i + size] for i in range(0, 6, size)]
    together = model.encode(steps)
    assert [list(seen.frames) for seen in together] == steps
    for seen, step in zip(together, steps, strict=True):
        (alone,) = model.encode([step])
        assert seen.grid == alone.grid
        for mine, other in zip((seen.features, *seen.deepstack), (alone.features, *alone.deepstack), strict=True):
            torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", EVERY_MODEL)
@torch.inference_mode()
def test_pictures_of_several_sizes_can_be_looked_at_together(family: str) -> None:
    model = shared_engine(family).model
    size = model.frames_per_step
    steps = [[Frame(torch.full((3, *shape), 90, dtype=torch.uint8), 0.0)] * size for shape in ((40, 56), (64, 32))]
    for seen, step in zip(model.encode(steps), steps, strict=True):
        (alone,) = model.encode([step])
        torch.testing.assert_close(seen.features, alone.features, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", EVERY_MODEL)
def test_sizes_are_read_off_the_model(family: str) -> None:
    model = shared_engine(family).model
    spec = model.kv_spec()
    assert (spec.kv_heads, spec.head_dim, spec.layers, spec.streams) == (2, 16, 3, 1)
    assert spec.dtype == torch.float32
    assert spec.bytes_per_token == 2 * 3 * 2 * 16 * 4
    assert model.trained_length == 4096
    assert model.end_tokens == {model.tokenizer.convert_tokens_to_ids("<|im_end|>")}


@pytest.mark.parametrize("family", EVERY_MODEL)
def test_end_tokens_fall_back_on_the_text_configuration(family: str) -> None:
    made = tiny(family)
    model = adapter_of(made.config.model_type)(made.model)
    model.generator.generation_config.eos_token_id = [3, 5]
    assert model.end_tokens == {3, 5}
    model.generator.generation_config.eos_token_id = None
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
        adapter_of("internvl")(made.model)


def test_rope_that_switches_with_the_length_is_refused() -> None:
    made = tiny("internvl")
    made.model.model.language_model.rotary_emb.rope_type = "longrope"
    with pytest.raises(ModelError, match="longrope"):
        adapter_of("internvl")(made.model)


def test_unknown_families_fail_with_the_known_ones() -> None:
    with pytest.raises(ModelError, match=r"'llava'.*internvl, qwen3_vl"):
        adapter_of("llava")


def test_every_family_of_the_table_has_a_tiny_model() -> None:
    assert {stock_model(name).config.model_type for name in EVERY_MODEL} == set(KNOWN)


@pytest.mark.parametrize("family", KNOWN)
def test_the_table_of_families_holds(family: str) -> None:
    assert adapter_of(family).__name__ == KNOWN[family].adapter
    assert all(known.name.count("/") == 1 for known in KNOWN[family].checkpoints)
    assert KNOWN[family].own_code or not any(known.revision for known in KNOWN[family].checkpoints)


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
    assert list(runs(ids, [8, 9])) == expected


def test_families_are_listed_without_waiting_for_torch() -> None:
    code = "import sys; from statekv.models import FAMILIES; assert FAMILIES; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class OneFile(InternVL):
    """A family of a user's own: InternVL, but for the word before a frame."""

    def step_text(self, seen: EncodedStep, state: StreamState) -> str:
        return super().step_text(seen, state).replace("Frame", "Picture")


def test_a_family_is_one_file_and_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KNOWN, "one_file", Family(__name__, "OneFile", (), tokens_per_frame=4))
    made = tiny("internvl")
    texts = Texts(made.tokenizer, made.chat_template, made.video_json)
    session = Engine(adapter_of("one_file")(made.model, texts), Config(budget=30)).open()
    session.push(some_frames(3))
    plain = shared_engine("internvl").open(budget=30)
    plain.push(some_frames(3))
    assert session.ask("What happens?", max_new_tokens=3)
    assert session.state.frames == plain.state.frames == 3
    assert session.state.tokens != plain.state.tokens
