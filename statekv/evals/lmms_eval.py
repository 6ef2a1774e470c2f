"""statekv as a model of lmms-eval: its entry point, and requests as questions, with one prefill for each video."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from statekv.engine.engine import Engine
from statekv.errors import ConfigError

# lmms-eval adds it as an end to tasks that name none; its own video models leave it out, and so do chat models.
_PARAGRAPH = "\n\n"
_DRAWING = ("temperature", "top_k", "top_p")


@dataclass(frozen=True)
class VideoQuestion:
    """A question about a whole video (path or URL), with further arguments of `Session.ask`."""

    video: str
    prompt: str
    answering: Mapping[str, Any] = field(default_factory=dict)


def question_of(prompt: str, wanted: Mapping[str, Any], visuals: Any, task: str) -> VideoQuestion:
    """A request as a question.

    Args:
        wanted: the task's `generation_kwargs`; those that do not concern decoding are left aside.
        visuals: what the task's `doc_to_visual` returns.

    Raises:
        ConfigError: not exactly one video, or beam search.
    """
    shown = visuals if isinstance(visuals, (list, tuple)) else [visuals]
    if len(shown) != 1 or not isinstance(shown[0], str):
        found = ", ".join(type(visual).__name__ for visual in shown) or "nothing"
        rule = f"task {task} shows {found}, but statekv watches one video, given by its path"
        raise ConfigError(rule, "choose a task with one video for each question")
    if wanted.get("num_beams") not in (None, 1):
        rule = f"task {task} wants num_beams {wanted['num_beams']}, but statekv decodes one answer"
        raise ConfigError(rule, "--gen_kwargs num_beams=1")
    ends = wanted.get("until") or ()
    answering: dict[str, Any] = {
        "max_new_tokens": wanted.get("max_new_tokens"),
        "stop": tuple(end for end in ([ends] if isinstance(ends, str) else ends) if end != _PARAGRAPH),
    }
    draws = bool(wanted.get("do_sample")) and wanted.get("temperature") != 0
    answering |= {"do_sample": draws, **{name: wanted[name] for name in _DRAWING if draws and name in wanted}}
    return VideoQuestion(shown[0], prompt, answering)


def answer_all(
    engine: Engine, questions: Sequence[VideoQuestion], on_answer: Callable[[int, str], None] | None = None
) -> list[str]:
    """Watch each video once and ask all questions about it.

    Args:
        on_answer: called after each answer, with the question's number and the text.

    Returns:
        The answers, in the order of the questions.

    Raises:
        StateKVError: as `Engine.open`, `Session.watch` and `Session.ask`; a video's failure ends the run.
    """
    about: dict[str, list[int]] = {}
    for number, question in enumerate(questions):
        about.setdefault(question.video, []).append(number)
    answers = [""] * len(questions)
    for video, numbers in about.items():
        with engine.open(video) as session:
            session.watch()
            for number in numbers:
                answers[number] = session.ask(questions[number].prompt, **questions[number].answering)
                if on_answer is not None:
                    on_answer(number, answers[number])
    return answers


def manifest() -> Any:
    """What lmms-eval asks every package for that brings models: the model's name and its class."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="statekv", simple_class_path="statekv.evals.lmms_model.StateKV")
