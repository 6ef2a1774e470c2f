"""Tokens to text as they come, and where a stop string cuts it."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase


class StreamingText:
    """Turns tokens into pieces of text that add up to the decoded whole.

    A piece is held back while it may still change: an unfinished UTF-8 character, or the beginning of a stop string.

    Args:
        tokenizer: decodes.
        stop: strings that end the text; neither they nor what follows are handed out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...] = ()) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(text for text in stop if text)
        self._tokens: list[int] = []
        self._given = 0  # characters

    def push(self, token: int) -> str:
        """The text that this token makes certain."""
        self._tokens.append(token)
        text = self._decode()
        cuts = [text.find(stop) for stop in self._stop if stop in text]
        if cuts:
            self.stopped = True
            return self._give(text, min(cuts))
        return self._give(text, self._certain(text))

    def rest(self) -> str:
        """What was held back, at the end of the answer; nothing after a stop string."""
        if self.stopped:
            return ""
        text = self._decode()
        return self._give(text, len(text))

    def _decode(self) -> str:
        return str(self._tokenizer.decode(self._tokens, skip_special_tokens=True))

    def _certain(self, text: str) -> int:
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return self._given
        held = 0
        for stop in self._stop:
            held = max(held, max((n for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0))
        return len(text) - held

    def _give(self, text: str, until: int) -> str:
        piece = text[self._given : until]
        self._given = max(self._given, until)
        return piece
