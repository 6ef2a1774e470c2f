"""The model class that lmms-eval makes: it needs lmms-eval, which the rest of the package does without."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from lmms_eval.api.model import lmms
from tqdm import tqdm

from statekv.config import Config
from statekv.engine.engine import load
from statekv.errors import ConfigError
from statekv.evals.lmms_eval import answer_all, question_of

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
        """Raise a ConfigError: statekv answers, it does not rate answers."""
        raise _not_offered("log-likelihoods", requests)

    def generate_until_multi_round(self, requests: Sequence[Any]) -> NoReturn:
        """Raise a ConfigError: each question is asked by itself."""
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
