"""Tokens are chosen as transformers chooses them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from statekv.errors import ConfigError
from statekv.runner.decoding import Sampling
from tests.tiny import Tiny, tiny

IDS = torch.tensor([[1, 2, 3], [4, 4, 4]])


def logits(seed: int = 0, vocabulary: int = 50) -> torch.Tensor:
    return 3 * torch.randn(2, vocabulary, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model() -> Tiny:
    return tiny("internvl")


def test_greedy_takes_the_most_likely() -> None:
    chosen = Sampling(5).choose(IDS, logits())
    assert chosen.dtype == torch.int64
    assert torch.equal(chosen, logits().argmax(-1))


@pytest.mark.parametrize("ignored", [{"temperature": 0.1}, {"top_k": 1}, {"top_p": 0.1}, {"seed": 3}])
def test_greedy_ignores_the_shape_of_the_distribution(ignored: dict[str, Any]) -> None:
    assert torch.equal(Sampling(5, **ignored).choose(IDS, logits()), logits().argmax(-1))


def test_half_precision_logits() -> None:
    rounded = logits().bfloat16()
    assert torch.equal(Sampling(5).choose(IDS, rounded), rounded.float().argmax(-1))
    Sampling(5, do_sample=True, seed=0, temperature=0.7, top_p=0.9).choose(IDS, rounded)


def draws(count: int = 30, **settings: Any) -> list[list[int]]:
    sampling = Sampling(5, do_sample=True, **settings)
    return [sampling.choose(IDS, logits()).tolist() for _ in range(count)]


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
    torch.manual_seed(5)
    assert draws() == first


def test_samples_follow_the_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    sampling = Sampling(5, do_sample=True, seed=0)
    chosen = sampling.choose(torch.zeros(20_000, 1, dtype=torch.long), probabilities.log().expand(20_000, 4))
    shares = torch.bincount(chosen, minlength=4) / 20_000
    torch.testing.assert_close(shares, probabilities, atol=0.015, rtol=0)


def test_top_k_draws_from_the_k_most_likely() -> None:
    best = logits().topk(3).indices
    for row, drawn in enumerate(zip(*draws(200, top_k=3, seed=0), strict=True)):
        assert set(drawn) == set(best[row].tolist())


def test_top_p_draws_from_the_fewest_that_reach_p() -> None:
    row = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    sampling = Sampling(5, do_sample=True, top_p=0.7, seed=0)
    assert {int(sampling.choose(IDS[:1], row)) for _ in range(100)} == {0, 1}


def test_a_low_temperature_is_greedy() -> None:
    assert draws(temperature=1e-3, seed=0) == [logits().argmax(-1).tolist()] * 30


@pytest.mark.parametrize("penalty", [1.3, 5.0, 0.5])
def test_the_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    for seed in range(20):
        ids = logits(seed).topk(2).indices  # the favourites have been said already
        expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits(seed).clone()).argmax(-1)
        assert torch.equal(Sampling(5, repetition_penalty=penalty).choose(ids, logits(seed)), expected)
        if penalty == 5.0:
            assert not torch.equal(expected, logits(seed).argmax(-1))


@pytest.mark.parametrize("neutral", [{}, {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}])
def test_neutral_parameters_change_nothing(neutral: dict[str, Any]) -> None:
    assert draws(seed=4, **neutral) == draws(seed=4)


def test_the_caller_keeps_its_logits() -> None:
    given = logits()
    Sampling(5, do_sample=True, temperature=0.5, top_k=2, repetition_penalty=2.0, seed=0).choose(IDS, given)
    assert torch.equal(given, logits())


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False},
        {"do_sample": False, "repetition_penalty": 1.5},
        {"do_sample": True, "top_k": 0},
        {"do_sample": True, "temperature": 0.6, "top_k": 12, "top_p": 0.8, "repetition_penalty": 1.2},
    ],
    ids=str,
)
@torch.no_grad()
def test_answers_equal_stock_generate(model: Tiny, settings: dict[str, Any]) -> None:
    prompt = torch.tensor([model.tokenizer("What is written on the board?")["input_ids"]])
    stock_model: Any = model.model
    torch.manual_seed(11)
    stock = stock_model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, **settings)
    torch.manual_seed(11)
    sampling = Sampling(12, frozenset([stock_model.generation_config.eos_token_id]), **settings)
    ids = prompt
    for _ in range(sampling.max_new_tokens):
        token = sampling.choose(ids, stock_model(input_ids=ids).logits[:, -1])
        ids = torch.cat([ids, token[:, None]], dim=1)
        if int(token) in sampling.end_tokens:
            break
    assert ids.tolist() == stock.tolist()


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
        Sampling(5, **settings)
    assert "\n" not in str(caught.value)
    assert str(value) in str(caught.value)
    assert name.removeprefix("repetition_") in str(caught.value)


def test_seeds_make_settings_equal() -> None:
    assert Sampling(5, seed=1) == Sampling(5, seed=1) != Sampling(5, seed=2)
