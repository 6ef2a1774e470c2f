"""The text around the frames, as token ids: exactly what the stock processor makes of the same conversation.

The stock processor renders the chat template, replaces the video placeholder by the text of all steps and
tokenises the whole. Here the pieces are tokenised one by one. That is exact because every step ends in a
special token, which no other token can cross; only the seam between the head and the first step needs care.

Layouts: `hf` is the stock processor's. `release` is that of StateKV's public code: the frames first, without
any chat prefix, then the chat template with the question alone. The public code knows InternVL alone; for the others
the same order is used.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal

from jinja2 import TemplateError, TemplateRuntimeError
from transformers import PreTrainedTokenizerBase

from statekv.errors import ConfigError, ModelError, kind_of
from statekv.models.checkpoint import MISFITS, read_checkpoint_file, read_checkpoint_json, told

Layout = Literal["hf", "release"]

# Stands for the question where only the text before the video is wanted.
_ANY_QUESTION = "?"
_LONGEST = 1 << 20  # characters of a template's own
_MOST_LINES, _CODE_OF_TEMPLATES = 200_000, "<template>"  # as jinja compiles them
_FAILURES: tuple[type[Exception], ...] = (TemplateError, *MISFITS)
_ORIGINAL = "use the chat template of the original checkpoint"


@dataclass(frozen=True)
class VisionTokens:
    """The strings that mark vision in a family's text.

    `placeholder` is what the chat template writes for a video; `opens`, the steps and `closes` stand in its place.
    `pad` is repeated once per vision token, between `start` and `end` where each step has them; `reserved` may not
    occur in a question.
    """

    start: str
    end: str
    pad: str
    placeholder: str
    reserved: tuple[str, ...]
    opens: str = ""
    closes: str = ""


class Prompt:
    """Token ids of a conversation of one video and one question, in the pieces that a stream needs them in.

    `head_ids + first_step_ids + step_ids + … + tail_ids` is the stock processor's `input_ids` (layout `hf`).

    Raises:
        ModelError: a slow tokenizer, or a template that fails, leaves the question out or does not write the
            placeholder exactly once.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, chat_template: str, tokens: VisionTokens, layout: Layout = "hf"
    ) -> None:
        if not tokenizer.is_fast:
            rule = f"{type(tokenizer).__name__} is a slow tokenizer, it cannot tell offsets"
            raise ModelError(rule, "a checkpoint with a tokenizer.json is needed")
        self.tokens = tokens
        self.layout = layout
        self._tokenizer = tokenizer
        # In a question they would end its turn, and forge another.
        self._special = sorted(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
        self._chat_template = chat_template
        head, tail = self._render(_ANY_QUESTION)
        if _ANY_QUESTION not in tail:
            raise ModelError("the chat template leaves the question out", _ORIGINAL)
        self._head = tokens.opens if layout == "release" else head

    def head_ids(self, first_step: str) -> list[int]:
        """What comes before the first step, whose text is needed up to its first special token: system prompt and user
        header, none of them in layout `release`.
        """
        return self._cut_head(first_step)[0]

    def first_step_ids(self, text: str) -> list[int]:
        """The first step's text. A token that crosses from the head into it belongs to it."""
        return self._cut_head(text)[1]

    def step_ids(self, text: str) -> list[int]:
        """The text of any later step."""
        return self._encode(text)

    def tail_ids(self, question: str) -> list[int]:
        """What comes after the last step: the question, and the header of the answer.

        Raises:
            ConfigError: an empty question, or one that holds a special token.
        """
        self._check(question)
        return self._encode(self._render(question)[1])

    def _check(self, question: str) -> None:
        if not isinstance(question, str):
            raise ConfigError(f"the question is {kind_of(question)}, but must be a text", "give a string")
        if not question.isascii() and any("\ud800" <= letter <= "\udfff" for letter in question):
            raise ConfigError(f"the question {question!r} holds half a character", "decode its bytes as UTF-8")
        if not question.strip():
            raise ConfigError("the question is empty", "ask something about the video")
        for token in (*self.tokens.reserved, *self._special):
            if token in question:
                rule = f"the question holds the special token {token}"
                raise ConfigError(rule, "leave it out or write it otherwise")

    def _render(self, question: str) -> tuple[str, str]:
        """The chat around the video: the text before and after it."""
        video = [{"type": "video", "video": ""}] if self.layout == "hf" else []
        messages: list[dict[str, Any]] = [{"role": "user", "content": [*video, {"type": "text", "text": question}]}]
        try:
            with _bounded():
                rendered = self._tokenizer.apply_chat_template(
                    messages, chat_template=self._chat_template, tokenize=False, add_generation_prompt=True
                )
        except _FAILURES as error:  # it is a program, and comes with the checkpoint
            raise ModelError(f"the chat template fails: {told(error)}", _ORIGINAL) from None
        text = str(rendered)
        if len(text) > _LONGEST + len(question):
            raise ModelError(f"the chat template writes {len(text):,} characters around a question", _ORIGINAL)
        opens, closes = self.tokens.opens, self.tokens.closes
        if self.layout == "release":
            return opens, closes + text
        before, *after = text.split(self.tokens.placeholder)
        if len(after) != 1:
            rule = f"the chat template writes {self.tokens.placeholder} {len(after)} times for one video"
            raise ModelError(rule, _ORIGINAL)
        return before + opens, closes + after[0]

    def _cut_head(self, first_step: str) -> tuple[list[int], list[int]]:
        encoded = self._tokenizer(
            self._head + first_step, add_special_tokens=self.layout == "hf", return_offsets_mapping=True
        )
        ids: list[int] = encoded["input_ids"]
        ends: Sequence[tuple[int, int]] = encoded["offset_mapping"]
        cut = sum(end <= len(self._head) for _, end in ends)
        return ids[:cut], ids[cut:]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


@contextmanager
def _bounded() -> Iterator[None]:
    """Let no template run for long: it is a program, and may have loops in loops."""
    left = _MOST_LINES

    def count(frame: FrameType, *_: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename != _CODE_OF_TEMPLATES:
            return None
        left -= 1
        if left < 0:
            raise TemplateRuntimeError(f"it runs for more than {_MOST_LINES:,} lines")
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        yield
    finally:
        sys.settrace(before)


def load_chat_template(name_or_path: str, tokenizer: PreTrainedTokenizerBase, **hub_kwargs: Any) -> str:
    """The chat template that `AutoProcessor` would use, which cannot itself be loaded without torchvision.

    In stock order: processor_config.json, chat_template.json (which no tokenizer reads), chat_template.jinja;
    then the tokenizer's own.

    Raises:
        ModelError: no template anywhere.
    """
    for filename in ("processor_config.json", "chat_template.json"):
        template = (read_checkpoint_json(name_or_path, filename, **hub_kwargs) or {}).get("chat_template")
        if isinstance(template, str):
            return template
    template = read_checkpoint_file(name_or_path, "chat_template.jinja", **hub_kwargs) or tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template is None:
        raise ModelError(f"{name_or_path} has no chat template", "use an instruction-tuned checkpoint")
    return str(template)
