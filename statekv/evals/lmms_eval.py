"""statekv as a model of lmms-eval: found by entry point, one prefill for each video."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from lmms_eval.api.model import lmms
from tqdm import tqdm

from statekv.config import Config
from statekv.engine.engine import Engine, load
from statekv.errors import ConfigError

# As `statekv eval` has it for the public benchmarks.
_FPS, _MOST_FRAMES = 1.0, 512


class StateKV(lmms):  # type: ignore[misc]  # lmms-eval has no types
    """Watches each video once, at 1 frame a second and 512 frames at most unless told otherwise.

    Args:
        pretrained: a hub id, a folder, or demo.
        method: one of statekv.config.METHODS.
        batch_size: 1; one stream is watched at a time.
        max_batch_size: lmms-eval's, without meaning here.
        device: None: where the process of this rank belongs.
        settings: further arguments of `statekv.load`, such as budget, fps, max_frames and dtype.

    Raises:
        ConfigError: another batch size, an unknown method or setting, or a value outside its range.
        ModelError: as `statekv.load`.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = "demo",
        method: str = "statekv",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if str(batch_size) != "1":
            raise ConfigError(f"batch_size is {batch_size}, but one stream is watched at a time", "leave it out")
        most = Config.of(method).max_frames or _MOST_FRAMES
        settings = {"fps": _FPS, "max_frames": most} | settings
        self._engine = load(pretrained, method, device=device or _own_device(), **settings)
        self.device = self._engine.model.model.device

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers in the order of the requests."""
        questions = []
        for request in requests:
            prompt, wanted, doc_to_visual, doc_id, task, split = request.args
            visuals = doc_to_visual(self.task_dict[task][split][doc_id])
            questions.append(question_of(prompt, wanted, visuals, task))
        with tqdm(total=len(questions), disable=self.rank != 0, desc="Model Responding") as bar:

            def tell(number: int, answer: str) -> None:
                prompt, wanted, *_ = requests[number].args
                self.cache_hook.add_partial("generate_until", (prompt, wanted), answer)
                bar.update()

            return answer_all(self._engine, questions, tell)

    def loglikelihood(self, requests: Sequence[Any]) -> NoReturn:
        """Not offered: statekv answers, it does not rate answers.

        Raises:
            ConfigError: always.
        """
        raise _not_offered("log-likelihoods", requests)

    def generate_until_multi_round(self, requests: Sequence[Any]) -> NoReturn:
        """Not offered.

        Raises:
            ConfigError: always.
        """
        raise _not_offered("several rounds", requests)

    def clean(self) -> None:
        """Called by lmms-eval once everything has been answered; the model cannot be used any more."""
        self._engine.close()
        del self._engine
        super().clean()


def _own_device() -> str:
    """Under `accelerate launch`, each process has a GPU of its own."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if several and torch.cuda.is_available() else "auto"


def _not_offered(what: str, requests: Sequence[Any]) -> ConfigError:
    task = requests[0].args[-2] if requests else "this task"
    return ConfigError(f"task {task} asks for {what}, but statekv answers questions", "choose a task of generate_until")


# lmms-eval adds it as an end to tasks that name none; its own video models leave it out, and so do chat models.
_PARAGRAPH = "\n\n"
_DRAWING = ("temperature", "top_k", "top_p")


@dataclass(frozen=True)
class VideoQuestion:
    """A question about a whole video.

    Attributes:
        video: path or URL.
        prompt: what the model is asked.
        answering: further arguments of `Session.ask`.
    """

    video: str
    prompt: str
    answering: Mapping[str, Any] = field(default_factory=dict)


def question_of(prompt: str, wanted: Mapping[str, Any], visuals: Any, task: str) -> VideoQuestion:
    """A request as a question.

    Args:
        prompt: the task's text.
        wanted: the task's `generation_kwargs`; those that do not concern decoding are left aside.
        visuals: what the task's `doc_to_visual` returns.
        task: its name, for messages.

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
    if wanted.get("do_sample") and wanted.get("temperature") != 0:
        answering |= {"do_sample": True, **{name: wanted[name] for name in _DRAWING if name in wanted}}
    return VideoQuestion(shown[0], prompt, answering)


def answer_all(
    engine: Engine, questions: Sequence[VideoQuestion], on_answer: Callable[[int, str], None] | None = None
) -> list[str]:
    """Watch each video once and ask all questions about it.

    Args:
        engine: a loaded model, with the settings to watch with.
        questions: in any order.
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

    return ModelManifest(model_id="statekv", simple_class_path="statekv.evals.lmms_eval.StateKV")
