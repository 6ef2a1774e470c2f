"""Eagle2.5: one frame is one step with its time before it, and what its own code does is what an answer is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import statekv
from statekv.cache.stream import StreamState
from statekv.config import Config
from statekv.errors import ConfigError, ModelError
from statekv.models import FAMILIES
from statekv.models.adapter import Segment
from statekv.models.families.eagle2_5 import completed_config, completed_model
from statekv.models.loading import load_model
from tests.models.families.eagle_stand_in import Eagle2_5_VLConfig, Eagle2_5_VLForConditionalGeneration
from tests.talk import (
    QUESTION,
    TOLERANCE,
    UNLIMITED,
    entering,
    frames_of,
    inputs_of,
    shared_engine,
    some_frames,
    stock_answer,
    stock_model,
)
from tests.tiny import tiny, video

FAMILY = "eagle2_5"
TILE = "<img>" + "<IMG_CONTEXT>" * 4 + "</img>"
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


def stream(layout: str = "hf") -> StreamState:
    return shared_engine(FAMILY).runner.open(Config(budget=100_000, layout=layout))


def entered(count: int, layout: str = "hf", fps: float = 1.0) -> list[Segment]:
    """The segments of a video and a question, as a stream makes them."""
    engine, state = shared_engine(FAMILY), stream(layout)
    found: list[Segment] = []
    with torch.inference_mode():
        for frame in frames_of(video(count), fps):
            step = entering(engine.model, [frame], state)
            for segment in step:
                engine.runner.enter(state, segment)
            found += step
        found.append(engine.model.question(QUESTION, state))
    return found


def text_of(segment: Segment) -> str:
    return str(shared_engine(FAMILY).model.tokenizer.decode(segment.ids[0]))


def test_each_frame_is_a_step_with_its_number_and_time() -> None:
    assert [(segment.kind, text_of(segment)) for segment in entered(3, fps=1.5)] == [
        # The space before the first label belongs to its first token.
        ("prefix", f"{SYSTEM}<|im_start|>user\nThe first video:"),
        ("step", f" Frame 1 sample at 0.00s: {TILE}"),
        ("step", f"Frame 2 sample at 0.67s: {TILE}"),
        ("step", f"Frame 3 sample at 1.33s: {TILE}"),
        ("question", f"{QUESTION}<|im_end|>\n<|im_start|>assistant\n"),
    ]


def test_layout_release_has_no_chat_before_the_video() -> None:
    assert [(segment.kind, text_of(segment)) for segment in entered(2, "release")] == [
        ("prefix", "The first video:"),
        ("step", f" Frame 1 sample at 0.00s: {TILE}"),
        ("step", f"Frame 2 sample at 1.00s: {TILE}"),
        ("question", f"{SYSTEM}<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"),
    ]


@pytest.mark.parametrize("fps", [1.0, 2.0, 0.3])
def test_together_they_are_the_processors_input(fps: float) -> None:
    inputs = inputs_of(stock_model(FAMILY), video(12), QUESTION, fps=fps)
    segments = entered(12, fps=fps)
    assert torch.equal(torch.cat([segment.ids for segment in segments], dim=1), inputs["input_ids"])
    assert torch.equal(
        torch.cat([segment.positions for segment in segments], dim=1), torch.arange(inputs["input_ids"].shape[1])[None]
    )
    assert [segment.frames for segment in segments] == [0] + [1] * 12 + [0]


def test_an_image_keeps_its_tiles_together() -> None:
    inputs = inputs_of(stock_model(FAMILY), video(1, 40, 100)[0], "then", video(2), QUESTION)
    with torch.inference_mode():
        segments = list(shared_engine(FAMILY).model.segments(inputs))
    assert [segment.kind for segment in segments] == ["prefix", "step", "step", "step", "question"]
    assert torch.equal(torch.cat([segment.ids for segment in segments], dim=1), inputs["input_ids"])
    tiles = [int((segment.ids == shared_engine(FAMILY).model.video_token_id).sum()) // 4 for segment in segments]
    assert tiles[1] > 2
    assert tiles[2:] == [1, 1, 0]
    assert len(inputs["pixel_values"]) == sum(tiles)


def test_both_doors_give_the_same_embeddings() -> None:
    inputs = inputs_of(stock_model(FAMILY), video(3), QUESTION)
    with torch.inference_mode():
        ready = torch.cat([segment.embeds for segment in shared_engine(FAMILY).model.segments(inputs)], dim=1)
    streamed = torch.cat([segment.embeds for segment in entered(3)], dim=1)
    torch.testing.assert_close(ready, streamed, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(32, 32), (240, 320), (33, 47), (100, 900)])
def test_pixels_are_the_processors(size: tuple[int, int]) -> None:
    model: Any = shared_engine(FAMILY).model
    pictures = video(2, *size)
    expected = inputs_of(stock_model(FAMILY), pictures, QUESTION)["pixel_values"]
    assert torch.equal(model._pixels(pictures), expected)


def test_logits_are_those_of_one_pass_over_the_whole_prompt() -> None:
    """`forward` of the model, where the answer's first token comes from."""
    made = stock_model(FAMILY)
    with torch.no_grad():
        expected = made.model(**inputs_of(made, video(5), QUESTION)).logits[0, -1]
    session = shared_engine(FAMILY).open(**UNLIMITED)
    session.push(some_frames(5))
    torch.testing.assert_close(session.logits(QUESTION)[0], expected, atol=TOLERANCE, rtol=0)


def test_an_answer_comes_without_its_prompt_as_from_stock() -> None:
    made = tiny(FAMILY)
    inputs = inputs_of(made, video(2), QUESTION)
    found: Any = statekv.generate(made.model, **inputs, **UNLIMITED, max_new_tokens=5)
    assert found.tolist() == [stock_answer(made, inputs, 5).tokens]
    assert found.shape == (1, 5)


def test_settings_of_the_part_that_decodes_hold() -> None:
    """The outer model has generation settings too, which stock never looks at."""
    made = tiny(FAMILY)
    inputs = inputs_of(made, video(2), QUESTION)
    tokens = stock_answer(made, inputs).tokens
    outer: Any = made.model
    outer.generation_config.max_new_tokens = 1
    outer.language_model.generation_config.max_new_tokens = 3
    outer.language_model.generation_config.eos_token_id = tokens[1]
    found: Any = statekv.generate(made.model, **inputs, **UNLIMITED)
    assert found.tolist() == [tokens[:2]]


def test_entering_changes_nothing_in_the_stream() -> None:
    state = stream()
    with torch.inference_mode():
        first, again = (entering(shared_engine(FAMILY).model, some_frames(1), state) for _ in range(2))
    assert [segment.ids.tolist() for segment in first] == [segment.ids.tolist() for segment in again]
    assert (state.tokens, state.position, state.frames, state.spans) == (0, 0, 0, [])


@pytest.mark.parametrize("layout", ["hf", "release"])
@pytest.mark.parametrize("count", [1, 9, 12])
def test_span_is_enough_and_not_wasteful(layout: str, count: int) -> None:
    taken = entered(count, layout)[-2].next_position
    promised = shared_engine(FAMILY).model.max_positions(count, 40, 56, layout)  # type: ignore[arg-type]
    # Late times have more digits, and tiny tokenizers few merges.
    assert taken <= promised <= taken + 6 * count


@pytest.mark.parametrize("token", ["<video-1>", "<image-1>", "<IMG_CONTEXT>", "</img>"])
def test_a_question_cannot_hold_what_the_processor_would_replace(token: str) -> None:
    with pytest.raises(ConfigError, match=token):
        shared_engine(FAMILY).model.question(f"What is {token}?", stream())


NAME = "nvidia/Eagle2.5-8B"


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test asks the hub, and the code of checkpoints is copied where the test ends with it."""
    import huggingface_hub.constants
    from transformers import dynamic_module_utils

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny("eagle2_5").save(tmp_path / "checkpoint")


def test_a_folder_with_code_loads_and_answers_as_stock_does(folder: Path) -> None:
    engine = statekv.load(str(folder), trust_remote_code=True, max_new_tokens=6, **UNLIMITED)
    assert type(engine.model.model).__name__ == "Eagle2_5_VLForConditionalGeneration"
    assert type(engine.model.model).__mro__[1] is not Eagle2_5_VLForConditionalGeneration  # the folder's own copy
    session = engine.open()
    session.push(frames_of(video(3)))
    made = tiny("eagle2_5")
    expected = stock_answer(made, inputs_of(made, video(3), QUESTION)).tokens
    assert session.ask(QUESTION) == made.tokenizer.decode(expected, skip_special_tokens=True)


def test_it_loads_although_its_configuration_asks_for_flash_attention(folder: Path) -> None:
    """As the public checkpoints' do; without our class the code insists on it."""
    values = json.loads((folder / "config.json").read_text())
    for part in (values, values["text_config"]):
        part["_attn_implementation"] = "flash_attention_2"
    values.pop("_attn_implementation_autoset")  # written by transformers 4 alone
    (folder / "config.json").write_text(json.dumps(values))
    model = load_model(str(folder), trust_remote_code=True, dtype="bfloat16").model
    assert model.config.text_config._attn_implementation == "sdpa"
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_untrusted_code_is_not_run(folder: Path) -> None:
    code = folder / "modeling_eagle2_5_vl.py"
    code.write_text(f"open({str(folder / 'ran')!r}, 'w')\n{code.read_text()}")
    with pytest.raises(ModelError, match="set trust_remote_code to trust it"):
        load_model(str(folder))
    assert not (folder / "ran").exists()


def test_a_known_checkpoint_asks_for_trust_before_anything_is_fetched() -> None:
    with pytest.raises(ModelError, match=rf"{NAME} brings code of its own .*set trust_remote_code to trust it"):
        load_model(NAME)


def test_without_a_commit_known_here_one_has_to_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    (checkpoint,) = FAMILIES["eagle_2_5_vl"].checkpoints
    assert (checkpoint.name, checkpoint.revision) == (NAME, None)
    with pytest.raises(ModelError, match=r"no commit of it is pinned here .*name the commit with revision"):
        load_model(NAME, trust_remote_code=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ModelError, match=rf"HF_HUB_OFFLINE is set, and '{NAME}' is neither a folder nor in the hub's cache"
    ):
        load_model(NAME, trust_remote_code=True, revision="0" * 40)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("import no_such_package_anywhere", "no_such_package_anywhere"),
        ("class Eagle2_5_VLConfig: pass", "has no attribute"),
    ],
)
def test_code_that_does_not_run_here_is_told_in_one_line(folder: Path, line: str, told: str) -> None:
    (folder / "modeling_eagle2_5_vl.py").write_text(f"{line}\n")
    with pytest.raises(ModelError, match=f"does not run here: .*{told}") as error:
        load_model(str(folder), trust_remote_code=True)
    assert "\n" not in str(error.value)


def test_completing_changes_no_weight_and_no_name() -> None:
    values: dict[str, Any] = {
        "text_config": {"hidden_size": 64, "num_hidden_layers": 1},
        "vision_config": {"num_hidden_layers": 1},
    }
    with pytest.raises(AttributeError, match="_attn_implementation_autoset"):
        Eagle2_5_VLConfig(**values).to_dict()
    config = completed_config(Eagle2_5_VLConfig)(**values)
    assert config.to_dict()["text_config"]["hidden_size"] == 64
    with torch.device("meta"):
        model = completed_model(Eagle2_5_VLForConditionalGeneration)(config)
        with pytest.raises((ImportError, ValueError), match=r"Flash ?Attention"):
            Eagle2_5_VLForConditionalGeneration(config)
    assert {name.split(".")[0] for name in model.state_dict()} == {"vision_model", "mlp1", "language_model"}
    assert type(model).__name__ == "Eagle2_5_VLForConditionalGeneration"
    assert type(config).__name__ == "Eagle2_5_VLConfig"
