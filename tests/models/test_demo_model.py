"""The checkpoint that statekv ships: an ordinary Hugging Face folder, and it answers questions about unseen videos."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer, PreTrainedModel

import statekv
from statekv.cache.stream import StreamState
from statekv.engine.engine import Engine
from statekv.engine.session import Session
from statekv.evals.cards.render import write_film
from statekv.evals.cards.world import FIRST_TEST_SEED, KINDS, questions, write_story
from statekv.models.adapter import Segment
from statekv.models.loading import DEMO
from statekv.runner.runner import ModelRunner
from statekv.video.file import read_frames
from statekv.video.frame import Frame
from tests import stock
from tests.talk import Answer, assert_same_answer, session_answer

UNSEEN = FIRST_TEST_SEED + 500_000
FILMS, FRAMES = 12, 24
QUESTION = "how many cards?"


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = statekv.load("demo")
    yield engine
    engine.close()


@functools.cache
def stock_model() -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForImageTextToText.from_pretrained(DEMO, dtype=torch.float32).eval()
    return model


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    write_film(write_story(UNSEEN, 12.0), path)
    return path


def stock_inputs(frames: list[Frame], question: str) -> dict[str, Any]:
    processor = stock.processor(str(DEMO))
    content = [{"type": "video", "video": ""}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    told = {"total_num_frames": len(frames), "fps": 1.0, "frames_indices": list(range(len(frames)))}
    video = torch.stack([frame.data for frame in frames])
    vision = {"videos": [video], "video_metadata": [told], "do_sample_frames": False}
    return dict(processor(text=[text], return_tensors="pt", **vision))


class Watcher(ModelRunner):
    """Keeps the tokens of everything that enters."""

    def __init__(self, runner: ModelRunner) -> None:
        super().__init__(runner.model)
        self.ids: list[int] = []

    def prefill(self, state: StreamState, segment: Segment, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.ids += segment.ids[0].tolist()
        return super().prefill(state, segment, *args, **kwargs)


# The folder


def test_the_folder_is_small_and_holds_no_code_and_no_pickle() -> None:
    paths = [path for path in DEMO.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in paths) <= 25e6
    assert {path.suffix for path in paths} == {".json", ".jinja", ".md", ".safetensors"}


def test_the_model_is_small() -> None:
    assert sum(parameter.numel() for parameter in stock_model().parameters()) < 8e6


def test_transformers_opens_the_folder_and_misses_nothing() -> None:
    loaded: Any = AutoModelForImageTextToText.from_pretrained(DEMO, output_loading_info=True)
    model, report = loaded
    assert type(model).__name__ == "InternVLForConditionalGeneration"
    assert not any(report.values())
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_the_stock_processor_and_tokenizer_open_the_folder() -> None:
    assert type(stock.processor(str(DEMO))).__name__ == "InternVLProcessor"
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    assert tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>") == stock_model().config.image_token_id
    assert stock_model().generation_config.eos_token_id == tokenizer.eos_token_id


# As the stock model


def test_tokens_are_those_of_the_stock_processor(engine: Engine, film: Path) -> None:
    frames = list(read_frames(film, fps=1.0))
    with engine.open(film) as session:
        watcher = session.runner = Watcher(session.runner)
        session.watch()
        session.logits(QUESTION)
    assert watcher.ids == stock_inputs(frames, QUESTION)["input_ids"][0].tolist()


@pytest.mark.parametrize(
    "settings", [{"method": "full"}, {"method": "statekv", "budget": 100_000}], ids=lambda s: s["method"]
)
def test_an_unlimited_budget_is_stock_generate(engine: Engine, film: Path, settings: dict[str, Any]) -> None:
    frames = list(read_frames(film, fps=1.0))
    assert len(frames) == 12
    story = write_story(UNSEEN, 12.0)
    with engine.open(film, **settings) as session:
        session.watch()
        model: Any = stock_model()
        for question in questions(story, np.random.default_rng(0)):
            inputs = stock_inputs(frames, question.text)
            out = model.generate(
                **inputs, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True
            )
            expected = Answer(out.sequences[0, inputs["input_ids"].shape[1] :].tolist(), torch.cat(out.logits))
            assert_same_answer(session_answer(session, question.text), expected)


# Its answers


@dataclass(frozen=True)
class Row:
    kind: str
    chance: float
    right: dict[str, bool]


def answers(engine: Engine, path: Path, seed: int, methods: dict[str, dict[str, Any]]) -> list[Row]:
    story = write_story(seed, float(FRAMES))
    write_film(story, path)
    sessions = {name: engine.open(path, **settings) for name, settings in methods.items()}
    for session in sessions.values():
        session.watch()
    rows = []
    for question in questions(story, np.random.default_rng([seed, 3]), per_kind=2):
        right = {name: ask(session, question.text) == question.answer for name, session in sessions.items()}
        rows.append(Row(question.kind, question.chance, right))
    for session in sessions.values():
        session.close()
    return rows


def ask(session: Session, question: str) -> str:
    return session.ask(question, max_new_tokens=8).strip()


@pytest.fixture(scope="module")
def rows(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    folder = tmp_path_factory.mktemp("unseen")
    third = engine.model.max_positions(FRAMES, 64, 64, "hf") // 3
    methods: dict[str, dict[str, Any]] = {"full": {"method": "full"}, "statekv": {"method": "statekv", "budget": third}}
    return [row for i in range(FILMS) for row in answers(engine, folder / f"{i}.mp4", UNSEEN + i, methods)]


def accuracy(rows: list[Row], method: str) -> float:
    return sum(row.right[method] for row in rows) / len(rows)


def told(rows: list[Row], method: str) -> str:
    kinds = {kind: [row for row in rows if row.kind == kind] for kind in KINDS}
    parts = [f"{kind} {accuracy(found, method):.2f} of {len(found)}" for kind, found in kinds.items() if found]
    chance = sum(row.chance for row in rows) / len(rows)
    return f"{method}: {accuracy(rows, method):.2f} of {len(rows)} (guessing: {chance:.2f}); {', '.join(parts)}"


# Under what the shipped weights reach, so that a fault in the pipeline shows. The goal is 0.95 (docs/log/training.md).
FLOOR = 0.93


def test_it_answers_questions_about_unseen_films(rows: list[Row]) -> None:
    assert len(rows) > 80
    assert {row.kind for row in rows} == set(KINDS)
    assert accuracy(rows, "full") >= FLOOR, told(rows, "full")


def test_a_third_of_the_tokens_does_nearly_as_well(rows: list[Row]) -> None:
    gap = accuracy(rows, "full") - accuracy(rows, "statekv")
    assert abs(gap) <= 0.1, f"{told(rows, 'full')} | {told(rows, 'statekv')}"


def test_answers_repeat(engine: Engine, rows: list[Row], tmp_path: Path) -> None:
    again = answers(engine, tmp_path / "again.mp4", UNSEEN, {"full": {"method": "full"}})
    assert [row.right["full"] for row in again] == [row.right["full"] for row in rows[: len(again)]]
