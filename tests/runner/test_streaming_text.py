"""Pieces add up, characters stay whole, and nothing of a stop string gets out."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from statekv.runner.streaming_text import StreamingText
from tests.tiny import FAMILIES, tiny

TEXTS = [
    "",
    "What is written on the board?",
    "Größe, Straße, naïve",
    "视频里有什么",
    "🎬👩‍👩‍👧‍👦 e\u0301 🎬",
    "  spaces,\n\nlines \t and  more ",
    "a�b�",
]


@pytest.fixture(scope="module", params=FAMILIES)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return tiny(request.param).tokenizer


@pytest.fixture(scope="module")
def bytewise() -> PreTrainedTokenizerBase:
    return tiny("internvl").tokenizer


def tokens_of(tokenizer: Any, text: str, split: bool = False) -> list[int]:
    """Token ids; with `split`, one for each byte."""
    if not split:
        return list(tokenizer(text)["input_ids"])
    splitter = tokenizer.backend_tokenizer.pre_tokenizer
    symbols = [symbol for character in text for word, _ in splitter.pre_tokenize_str(character) for symbol in word]
    return list(tokenizer.convert_tokens_to_ids(symbols))


def pieces(
    tokenizer: PreTrainedTokenizerBase, tokens: list[int], stop: tuple[str, ...] = ()
) -> tuple[list[str], StreamingText]:
    """What comes out as the session drives it."""
    text = StreamingText(tokenizer, stop)
    given = []
    for token in tokens:
        given.append(text.push(token))
        if text.stopped:
            return given, text
    given.append(text.rest())
    return given, text


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_add_up_to_the_decoded_whole(tokenizer: PreTrainedTokenizerBase, text: str, split: bool) -> None:
    tokens = tokens_of(tokenizer, text, split)
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    given, streamed = pieces(tokenizer, tokens)
    assert "".join(given) == whole == text.replace("e\u0301", "e\u0301" if split else "\u00e9")
    assert not streamed.stopped


@pytest.mark.parametrize("text", ["Größe", "视频里有什么", "🎬👩‍👩‍👧‍👦"])
def test_characters_are_never_split(bytewise: PreTrainedTokenizerBase, text: str) -> None:
    tokens = tokens_of(bytewise, text, split=True)
    assert len(tokens) == len(text.encode())
    given, _ = pieces(bytewise, tokens)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in given)
    sizes = [len(character.encode()) for character in text]
    expected = [piece for size, character in zip(sizes, text, strict=True) for piece in [""] * (size - 1) + [character]]
    assert given == [*expected, ""]  # and each comes as soon as it is whole


def test_an_answer_cut_inside_a_character_still_adds_up(bytewise: PreTrainedTokenizerBase) -> None:
    tokens = tokens_of(bytewise, "ab🎬", split=True)[:-1]
    given, _ = pieces(bytewise, tokens)
    assert "".join(given) == bytewise.decode(tokens) == "ab\N{REPLACEMENT CHARACTER}"


def test_special_tokens_are_not_text(tokenizer: Any) -> None:
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    given, _ = pieces(tokenizer, [*tokens_of(tokenizer, "board"), end])
    assert "".join(given) == "board"


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("the red square", ("red",), "the "),
        ("the red square", ("the",), ""),
        ("the red square", ("blue", "square", "red"), "the "),
        ("the red square", ("ed sq",), "the r"),
        ("the red square", ("square moves", "red!"), "the red square"),
        ("aaab", ("aab",), "a"),
        ("ababac", ("abac",), "ab"),
        ("ab abc abcd", ("abcd", "abcx"), "ab abc "),
        ("one\n\ntwo", ("\n\n",), "one"),
        ("视频里有什么", ("有什",), "视频里"),
        ("视频里有什么", ("有🎬",), "视频里有什么"),
        ("🎬Größe", ("öß",), "🎬Gr"),
        ("abxyzq", ("abxyq", "xyz"), "ab"),
        ("the board", ("h", "t"), ""),  # both in one token
        ("xabcd", ("abcd", "cz"), "x"),
        ("anything", ("",), "anything"),
        ("anything", (), "anything"),
    ],
)
def test_stop_strings_cut(
    tokenizer: PreTrainedTokenizerBase, text: str, stop: tuple[str, ...], expected: str, split: bool
) -> None:
    given, streamed = pieces(tokenizer, tokens_of(tokenizer, text, split), stop)
    assert "".join(given) == expected
    assert streamed.stopped == (expected != text)


@pytest.mark.parametrize("stop", ["red", "red square", "square", "e r", "\n"])
def test_no_beginning_of_a_stop_string_is_ever_given(bytewise: PreTrainedTokenizerBase, stop: str) -> None:
    text = StreamingText(bytewise, (stop,))
    whole = f"the red square{stop} more"
    certain = whole[: whole.find(stop)]
    given = ""
    for token in tokens_of(bytewise, whole, split=True):
        given += text.push(token)
        assert certain.startswith(given)
        if text.stopped:
            break
    assert given == certain


def test_text_that_cannot_become_a_stop_string_is_not_held(bytewise: PreTrainedTokenizerBase) -> None:
    given, _ = pieces(bytewise, tokens_of(bytewise, "st stop", split=True), ("stop!",))
    assert given == ["", "", "st ", "", "", "", "", "stop"]


def test_after_a_stop_nothing_comes(bytewise: PreTrainedTokenizerBase) -> None:
    given, text = pieces(bytewise, tokens_of(bytewise, "one stop two", split=True), ("stop",))
    assert "".join(given) == "one "
    assert [text.push(token) for token in tokens_of(bytewise, " three stop", split=True)] == [""] * 11
    assert text.rest() == ""
