"""Tokens are chosen as transformers chooses them."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
)

from statekv.errors import ConfigError
from statekv.runner.decoding import Detokenizer, Sampler, SamplingParams, refuse_unfollowed, sampling_params
from tests.talk import shared_engine, stock_model
from tests.tiny import TWO_FAMILIES, Tiny, tiny

IDS = torch.tensor([[1, 2, 3], [4, 4, 4]])


def logits(seed: int = 0, vocabulary: int = 50) -> torch.Tensor:
    return 3 * torch.randn(2, vocabulary, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model() -> Tiny:
    return tiny("internvl")


def chosen(ids: torch.Tensor, scores: torch.Tensor, seed: int | None = None, **generation: Any) -> torch.Tensor:
    return sampler(ids, seed, **generation).choose(scores)


def sampler(ids: torch.Tensor, seed: int | None = None, **generation: Any) -> Sampler:
    made: Any = stock_model("internvl").model
    return SamplingParams(5, generation=GenerationConfig(**generation), seed=seed).begin(made, ids)


def test_greedy_takes_the_most_likely() -> None:
    found = chosen(IDS, logits())
    assert found.dtype == torch.int64
    assert torch.equal(found, logits().argmax(-1))


@pytest.mark.parametrize("ignored", [{"temperature": 0.1}, {"top_k": 1}, {"top_p": 0.1}, {"seed": 3}])
def test_greedy_ignores_the_shape_of_the_distribution(ignored: dict[str, Any]) -> None:
    assert torch.equal(chosen(IDS, logits(), **ignored), logits().argmax(-1))


def test_half_precision_logits() -> None:
    rounded = logits().bfloat16()
    assert torch.equal(chosen(IDS, rounded), rounded.float().argmax(-1))
    settings: dict[str, Any] = {"do_sample": True, "temperature": 0.7, "top_p": 0.9}
    for seed in range(20):  # what is drawn from is not rounded once more
        assert torch.equal(chosen(IDS, rounded, seed, **settings), chosen(IDS, rounded.float(), seed, **settings))


def test_draws_are_made_in_float32() -> None:
    """So many of them that shares of half precision would draw another token here and there."""
    rows = torch.randn(20_000, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = rows.float().div(0.7).softmax(-1).multinomial(1, generator=torch.Generator().manual_seed(3))[:, 0]
    found = chosen(torch.zeros(20_000, 1, dtype=torch.long), rows, 3, do_sample=True, temperature=0.7)
    assert torch.equal(found, expected)


def draws(count: int = 30, seed: int | None = None, **settings: Any) -> list[list[int]]:
    """Of one answer after the other, each with as many tokens."""
    one = sampler(IDS, seed, do_sample=True, **settings)
    return [one.choose(logits()).tolist() for _ in range(count)]


def test_samples_repeat_themselves_with_the_seed() -> None:
    assert draws(seed=1) == draws(seed=1)
    assert draws(seed=1) != draws(seed=2)
    assert len({tuple(draw) for draw in draws(seed=1)}) > 5


def test_a_seed_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    draws(seed=1)
    assert torch.equal(torch.rand(4), expected)


def test_without_a_seed_the_global_generator_draws() -> None:
    torch.manual_seed(5)
    first = draws()
    assert draws() != first
    torch.manual_seed(5)
    assert draws() == first


def test_samples_follow_the_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    found = chosen(torch.zeros(20_000, 1, dtype=torch.long), probabilities.log().expand(20_000, 4), 0, do_sample=True)
    shares = torch.bincount(found, minlength=4) / 20_000
    torch.testing.assert_close(shares, probabilities, atol=0.015, rtol=0)


def test_top_k_draws_from_the_k_most_likely() -> None:
    best = logits().topk(3).indices
    for row, drawn in enumerate(zip(*draws(200, top_k=3, seed=0), strict=True)):
        assert set(drawn) == set(best[row].tolist())


def test_top_p_draws_from_the_fewest_that_reach_p() -> None:
    row = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    one = sampler(IDS[:1], 0, do_sample=True, top_p=0.7)
    assert {int(one.choose(row)) for _ in range(100)} == {0, 1}


def test_a_low_temperature_is_greedy() -> None:
    assert draws(temperature=1e-3, seed=0) == [logits().argmax(-1).tolist()] * 30


@pytest.mark.parametrize("penalty", [1.3, 5.0, 0.5])
def test_the_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    for seed in range(20):
        ids = logits(seed).topk(2).indices  # the favourites have been said already
        expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits(seed).clone()).argmax(-1)
        assert torch.equal(chosen(ids, logits(seed), repetition_penalty=penalty), expected)
        if penalty == 5.0:
            assert not torch.equal(expected, logits(seed).argmax(-1))


@pytest.mark.parametrize("neutral", [{}, {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}])
def test_neutral_parameters_change_nothing(neutral: dict[str, Any]) -> None:
    assert draws(seed=4, **neutral) == draws(seed=4)


def test_the_caller_keeps_its_logits() -> None:
    given = logits()
    chosen(IDS, given, 0, do_sample=True, temperature=0.5, top_k=2, repetition_penalty=2.0)
    assert torch.equal(given, logits())


def test_time_ends_an_answer() -> None:
    for deadline, ended in ((time.monotonic() - 1, True), (time.monotonic() + 1000, False)):
        one = SamplingParams(5, deadline=deadline).begin(cast(Any, stock_model("internvl").model), IDS)
        one.choose(logits())
        assert one.ended is ended


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "temperature": 0.0},
        {"do_sample": True, "temperature": -1.0},
        {"do_sample": True, "top_k": -3},
        {"do_sample": True, "top_p": 1.5},
        {"do_sample": True, "top_p": -0.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": -2.0},
    ],
    ids=str,
)
def test_impossible_parameters_are_refused_in_one_line(settings: dict[str, Any]) -> None:
    name, value = list(settings.items())[-1]
    with pytest.raises(ConfigError) as caught:
        sampler(IDS, **settings)
    assert "\n" not in str(caught.value)
    assert str(value) in str(caught.value)
    assert name.removeprefix("repetition_") in str(caught.value)


def test_criteria_end_an_answer_once_they_hold_for_all_streams() -> None:
    stopping = StoppingCriteriaList([lambda ids, *_: torch.tensor([True, ids.shape[1] > 4])])  # type: ignore[list-item]
    one = SamplingParams(5, stopping=stopping).begin(cast(Any, stock_model("internvl").model), IDS)
    for ended in (False, True):
        one.choose(logits())
        assert one.ended is ended


@pytest.mark.parametrize(("given", "ends"), [(7, {7}), ([7, 9], {7, 9})])
def test_tokens_that_end_an_answer(given: Any, ends: set[int]) -> None:
    settings = GenerationConfig(eos_token_id=given)
    assert sampling_params(shared_engine("internvl").model, settings, 5, None).end_tokens == ends


@pytest.mark.parametrize("given", ["7", [7, "9"], 7.5])
def test_what_is_no_token_ends_no_answer(given: Any) -> None:
    settings = GenerationConfig()
    settings.eos_token_id = given
    with pytest.raises(ConfigError, match=r"eos_token_id is .* must be tokens"):
        sampling_params(shared_engine("internvl").model, settings, 5, None)


@pytest.mark.parametrize(
    ("name", "idle", "other"),
    [
        ("num_beams", 1, 2),
        ("num_return_sequences", 1, 2),
        ("guidance_scale", 1, 1.5),
        ("penalty_alpha", 0, 0.6),
        *((name, False, True) for name in ("token_healing", "output_scores", "output_attentions")),
    ],
)
def test_what_is_not_followed_is_refused_unless_it_does_nothing(name: str, idle: Any, other: Any) -> None:
    for value in (None, idle):
        refuse_unfollowed(cast(Any, SimpleNamespace(**{name: value})))
    with pytest.raises(ConfigError, match=f"sets {name}={other}, which is not followed"):
        refuse_unfollowed(cast(Any, SimpleNamespace(**{name: other})))


TEXTS = [
    "",
    "What is written on the board?",
    "Größe, Straße, naïve",
    "视频里有什么",
    "🎬👩‍👩‍👧‍👦 e\u0301 🎬",
    "  spaces,\n\nlines \t and  more ",
    "a�b�",
]


@pytest.fixture(scope="module", params=TWO_FAMILIES)
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
) -> tuple[list[str], Detokenizer]:
    """What comes out as the session drives it."""
    text = Detokenizer(tokenizer, stop)
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
    text = Detokenizer(bytewise, (stop,))
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
