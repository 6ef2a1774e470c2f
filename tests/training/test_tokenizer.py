"""The demo's tokenizer: the same each time, and every word and number of the world is one token."""

from __future__ import annotations

import functools
import re

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from statekv.evals.cards.world import COLORS, SHAPES, questions, write_story
from statekv.models.loading import DEMO
from training.tokenizer import SPECIAL, build_tokenizer


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def ids(text: str) -> list[int]:
    found: list[int] = tokenizer().encode(text, add_special_tokens=False)
    return found


def world() -> list[str]:
    """Questions and answers."""
    stories = [write_story(seed, 200.0) for seed in range(60)]
    asked = [q for story in stories for q in questions(story, np.random.default_rng(story.seed), per_kind=3)]
    return sorted({q.text for q in asked} | {q.answer for q in asked})


def test_two_builds_are_equal() -> None:
    assert build_tokenizer().backend_tokenizer.to_str() == build_tokenizer().backend_tokenizer.to_str()


def test_the_shipped_tokenizer_is_this_one() -> None:
    shipped = AutoTokenizer.from_pretrained(DEMO)
    assert shipped.get_vocab() == tokenizer().get_vocab()
    assert shipped.chat_template == tokenizer().chat_template
    assert all(shipped.encode(text) == ids(text) for text in world())


def test_every_number_below_a_thousand_is_one_token() -> None:
    assert all(len(ids(str(number))) == 1 for number in range(1000))
    assert len({ids(str(number))[0] for number in range(1000)}) == 1000
    # Also where it stands: in a frame's label, behind a space.
    assert all(ids(f"\nFrame{n}: ")[1:-1] == ids(f"at {n}")[2:] == ids(str(n)) for n in (1, 10, 100, 999))


def test_every_word_of_the_world_is_one_token() -> None:
    words = {word for text in world() for word in re.findall(r"[a-z]+", text)}
    assert words >= {*COLORS, *SHAPES, "nothing", "appear"}
    for word in words:
        assert len(ids(word)) == len(ids(f" {word}")) == 1, word
        assert ids(word) == ids(word.upper())  # case does not matter


@pytest.mark.parametrize("text", world()[::7])
def test_round_trip(text: str) -> None:
    assert tokenizer().decode(ids(text)) == text


@pytest.mark.parametrize("text", ["größe, straße", "视频里有什么", "a  b\n\nc\t!", "1234567", "it's 3.5 %"])
def test_round_trip_of_anything_else(text: str) -> None:
    assert tokenizer().decode(ids(text)) == text


def test_special_tokens_are_one_token_each_and_cut_the_text() -> None:
    found = {name: ids(token) for name, token in SPECIAL.items()}
    assert all(len(tokens) == 1 for tokens in found.values())
    assert len({tokens[0] for tokens in found.values()}) == len(SPECIAL)
    assert tokenizer().eos_token == "<|im_end|>"
    assert tokenizer().pad_token != tokenizer().eos_token
    for token in SPECIAL.values():
        assert ids(f"red{token}blue") == [*ids("red"), *ids(token), *ids("blue")]
    for name in ("start_image_token", "end_image_token", "context_image_token", "video_token"):
        assert getattr(tokenizer(), name) == SPECIAL[name]


def test_special_tokens_disappear_from_an_answer() -> None:
    assert tokenizer().decode(ids("cyan ring<|im_end|>"), skip_special_tokens=True) == "cyan ring"


def test_the_vocabulary_is_small() -> None:
    assert 1300 < len(tokenizer()) <= 2400
