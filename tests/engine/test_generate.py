"""`statekv.generate`: the stock model's answer, and the user's model left as found."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import statekv
from statekv.errors import ConfigError, ModelError
from tests.talk import (
    QUESTION,
    TOLERANCE,
    UNLIMITED,
    Answer,
    adapted,
    assert_same_answer,
    inputs_of,
    stock_answer,
    stock_ids,
    stock_model,
)
from tests.tiny import EVERY_MODEL, FAMILIES, KIN, TWO_FAMILIES, Tiny, tiny, video

ODD = "an odd number of frames"
CONVERSATIONS: dict[str, tuple[str | torch.Tensor, ...]] = {
    "one video": (video(4), QUESTION),
    ODD: (video(5), QUESTION),
    "two videos": (video(3), "and then", video(3, seed=1), QUESTION),
    "two videos side by side": (video(2), video(2, seed=1), QUESTION),
    "an image": (video(1)[0], QUESTION),
    "two images": (video(1)[0], "and", video(2)[1], QUESTION),
    "an image and a video": ("Look:", video(1)[0], "then", video(4, seed=2), QUESTION),
    "a video and an image": (video(2), video(1)[0], QUESTION),
    "text alone": (QUESTION,),
}
UNBOUNDED = (UNLIMITED, {"budget": 100_000})  # everything is carried; so much is that nothing is lost


def generated(made: Tiny, inputs: dict[str, Any], **settings: Any) -> Answer:
    settings = {"max_new_tokens": 6, **settings}
    out = statekv.generate(made.model, **inputs, return_dict_in_generate=True, output_logits=True, **settings)
    return Answer(out.sequences[0, -len(out.logits) :].tolist(), torch.cat(out.logits))  # type: ignore[union-attr, arg-type]


# Each conversation with every family, and in both ways with one; two with those of their kin.
@pytest.mark.parametrize(
    ("family", "name"),
    [
        *((model, name) for model in EVERY_MODEL if KIN.get(model, model) == model for name in CONVERSATIONS),
        *((model, name) for model in ("internvl3_5", "qwen3_vl_moe") for name in (ODD, "an image and a video")),
    ],
)
def test_equals_stock_generate(family: str, name: str) -> None:
    made = stock_model(family)
    inputs = inputs_of(made, *CONVERSATIONS[name])
    expected = stock_answer(made, inputs)
    for settings in UNBOUNDED if family == "internvl" or name == ODD else UNBOUNDED[1:]:
        assert_same_answer(generated(made, inputs, **settings), expected)


@pytest.mark.parametrize("family", EVERY_MODEL)
def test_plain_result_is_stocks_sequences(family: str) -> None:
    made = stock_model(family)
    inputs = inputs_of(made, video(4), QUESTION)
    found = statekv.generate(made.model, **inputs, **UNLIMITED, max_new_tokens=6)
    expected = stock_ids(made, inputs, max_new_tokens=6, do_sample=False)
    assert isinstance(found, torch.Tensor)
    assert torch.equal(found, expected)
    assert found.dtype == expected.dtype


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_the_left_changes_nothing(family: str) -> None:
    made = stock_model(family)
    inputs = inputs_of(made, video(4), QUESTION)
    padded = dict(inputs)
    padded["input_ids"] = torch.nn.functional.pad(inputs["input_ids"], (7, 0), value=made.tokenizer.pad_token_id)
    padded["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (7, 0))
    if "mm_token_type_ids" in inputs:
        padded["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (7, 0))
    found, plain = generated(made, padded, budget=16), generated(made, inputs, budget=16)
    assert found.tokens == plain.tokens
    assert torch.equal(found.logits, plain.logits)
    whole = statekv.generate(made.model, **padded, budget=16, max_new_tokens=2)
    assert isinstance(whole, torch.Tensor)
    assert torch.equal(whole[:, : padded["input_ids"].shape[1]], padded["input_ids"])


def test_dynamic_ntk_is_scaled_for_the_horizon() -> None:
    """Stock scales for the longest position so far: the prompt's length, when the first token is chosen."""
    made = tiny("internvl", max_position_embeddings=32)
    inputs = inputs_of(made, video(5), QUESTION)
    length = inputs["input_ids"].shape[1]
    expected = stock_answer(made, inputs, max_new_tokens=1)
    found = generated(made, inputs, max_new_tokens=1, horizon=length, **UNLIMITED)
    assert_same_answer(found, expected)
    other = generated(made, inputs, max_new_tokens=1, horizon=20 * length, **UNLIMITED)
    assert not torch.allclose(other.logits, expected.logits, atol=TOLERANCE)


PARAMETERS: list[dict[str, Any]] = [
    {"do_sample": True, "temperature": 0.8, "top_p": 0.6},
    {"do_sample": True, "top_k": 5, "min_p": 0.2},
    {"do_sample": True, "epsilon_cutoff": 0.02, "eta_cutoff": 0.03, "typical_p": 0.7},
    {"repetition_penalty": 0.1},  # favours the words of the prompt
    {"encoder_repetition_penalty": 10.0, "no_repeat_ngram_size": 2, "encoder_no_repeat_ngram_size": 2},
    {"min_new_tokens": 9, "eos_token_id": [3, 9], "suppress_tokens": [*range(0, 400, 2)], "begin_suppress_tokens": [7]},
    {
        "forced_eos_token_id": 9,
        "renormalize_logits": True,
        "bad_words_ids": [[3], [4, 5]],
        "sequence_bias": [[[8], 3.0]],
    },
]


def both(made: Tiny, **parameters: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What `statekv.generate` and stock return."""
    inputs = inputs_of(made, video(4), QUESTION)
    torch.manual_seed(3)
    expected = stock_ids(made, inputs, **copy.deepcopy(parameters))
    torch.manual_seed(3)
    found = statekv.generate(made.model, **inputs, **UNLIMITED, **parameters)
    assert isinstance(found, torch.Tensor)
    return found, expected


# What looks at the prompt with every model; eagle2_5's stock loop may know nothing of it, internvl's does.
@pytest.mark.parametrize(
    ("family", "parameters"),
    [
        *((family, PARAMETERS[at]) for family in EVERY_MODEL for at in (3, 4)),
        *((family, PARAMETERS[at]) for family in ("internvl", "eagle2_5") for at in (0, 1, 2, 5, 6)),
    ],
    ids=lambda each: each if isinstance(each, str) else "-".join(each),
)
def test_generation_parameters_mean_what_they_mean_in_stock(family: str, parameters: dict[str, Any]) -> None:
    found, expected = both(stock_model(family), max_new_tokens=12, **parameters)
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("parameters", PARAMETERS, ids=lambda parameters: "-".join(parameters))
def test_generation_parameters_change_the_answer(parameters: dict[str, Any]) -> None:
    made = stock_model("internvl")
    assert both(made, max_new_tokens=12, **parameters)[0].tolist() != both(made, max_new_tokens=12)[0].tolist()


@pytest.mark.parametrize("family", ["internvl", "eagle2_5"])
@pytest.mark.parametrize("way", ["model", "generation_config", "both"])
def test_what_a_generation_config_leaves_open_is_the_models_own(family: str, way: str) -> None:
    made = tiny(family)
    own: Any = adapted(made).generator.generation_config
    theirs = {"do_sample": True, "temperature": 0.7, "repetition_penalty": 0.5}
    if way != "generation_config":
        own.update(**theirs)
    arguments: dict[str, Any] = {"max_new_tokens": 12}
    if way != "model":
        arguments = {"generation_config": GenerationConfig(max_new_tokens=9, **(theirs if way != "both" else {}))}
    found, expected = both(made, **arguments)
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("family", ["internvl", "eagle2_5"])
@pytest.mark.parametrize("arguments", [{}, {"max_length": 90}, {"max_length": 300, "max_new_tokens": 3}], ids=str)
def test_an_answer_is_as_long_as_stocks(family: str, arguments: dict[str, Any]) -> None:
    made = stock_model(family)
    length = inputs_of(made, video(4), QUESTION)["input_ids"].shape[1]
    if "max_length" in arguments:
        arguments = {**arguments, "max_length": length + 7}
    found, expected = both(made, **arguments)
    assert found.tolist() == expected.tolist()


def test_an_answer_ends_at_stop_strings_and_in_time() -> None:
    made = stock_model("internvl")
    said = both(made, max_new_tokens=12)[1][0, -12:]
    stop = made.tokenizer.decode(said[1:3])
    found, expected = both(made, max_new_tokens=12, stop_strings=[stop], tokenizer=made.tokenizer)
    assert found.tolist() == expected.tolist()
    assert found.shape[1] < both(made, max_new_tokens=12)[0].shape[1]
    found, expected = both(made, max_new_tokens=12, max_time=1e-9)
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", ["argument", "generation_config", "model"])
def test_ends_at_an_end_token_wherever_it_is_said(family: str, way: str) -> None:
    made = tiny(family)
    inputs = inputs_of(made, video(4), QUESTION)
    end = stock_answer(made, inputs).tokens[3]
    arguments: dict[str, Any] = {}
    if way == "argument":
        arguments["eos_token_id"] = end
    elif way == "generation_config":
        arguments["generation_config"] = GenerationConfig(eos_token_id=end, pad_token_id=0)
    else:
        made.model.generation_config.eos_token_id = [end, 1]
    expected = stock_ids(made, inputs, max_new_tokens=12, **copy.deepcopy(arguments))
    found = statekv.generate(made.model, **inputs, **UNLIMITED, max_new_tokens=12, **arguments)
    assert isinstance(found, torch.Tensor)
    assert found[0, -1] == end
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_max_new_tokens_of_a_generation_config(family: str) -> None:
    made = stock_model(family)
    inputs = inputs_of(made, video(2), QUESTION)
    found = statekv.generate(made.model, **inputs, generation_config=GenerationConfig(max_new_tokens=3))
    assert isinstance(found, torch.Tensor)
    assert found.shape[1] == inputs["input_ids"].shape[1] + 3


@pytest.mark.parametrize("family", EVERY_MODEL)
def test_a_small_budget_changes_the_logits(family: str) -> None:
    made = stock_model(family)
    inputs = inputs_of(made, video(6), QUESTION)
    expected = stock_answer(made, inputs).logits[0]
    for budget in (1, 16):
        found, again = (generated(made, inputs, budget=budget, max_new_tokens=1).logits[0] for _ in range(2))
        assert torch.equal(found, again)
        assert not torch.allclose(found, expected, atol=1e-2)


def settings_of(made: Tiny) -> list[Any]:
    """Everything that a call could have changed without changing a weight."""
    model: Any = made.model
    rotary = made.language_model.rotary_emb
    configs = [model.config, model.config.text_config, model.config.vision_config]
    configs += [module.config for module in model.modules() if hasattr(module, "config")]
    return [
        [config._attn_implementation for config in configs],
        (rotary.rope_type, rotary.inv_freq.tolist(), rotary.original_inv_freq.tolist()),
        sorted(name for module in model.modules() for name in vars(module)),
        model.training,
        model.generation_config.to_dict(),
    ]


@pytest.mark.parametrize(
    ("family", "implementation"),
    [*((family, "sdpa") for family in EVERY_MODEL), *((family, "eager") for family in TWO_FAMILIES)],
)
def test_the_model_is_left_as_found(family: str, implementation: str) -> None:
    made = tiny(family, max_position_embeddings=64)
    made.model.set_attn_implementation(implementation)
    inputs = inputs_of(made, video(6), QUESTION)
    stock_answer(made, inputs)  # transformers notes what it has hooked, and stretches dynamic NTK for good
    before, rotary = settings_of(made), made.language_model.rotary_emb.inv_freq
    generated(made, inputs, budget=16)
    assert settings_of(made) == before

    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    hook = made.language_model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        generated(made, inputs, budget=16)
    hook.remove()
    assert settings_of(made) == before
    assert made.language_model.rotary_emb.inv_freq is rotary
    fresh = tiny(family, max_position_embeddings=64)
    fresh.model.set_attn_implementation(implementation)
    stock_answer(fresh, inputs)
    assert_same_answer(stock_answer(made, inputs), stock_answer(fresh, inputs))


def test_two_conversations_are_refused() -> None:
    made = stock_model("internvl")
    inputs: dict[str, Any] = {
        name: torch.cat([tensor] * 2) for name, tensor in inputs_of(made, video(2), QUESTION).items()
    }
    with pytest.raises(ModelError, match="2 conversations"):
        statekv.generate(made.model, **inputs)


@pytest.mark.parametrize("hidden", [[-1], [5], [5, 6]])
def test_a_mask_that_hides_more_than_padding_in_front_is_refused(hidden: list[int]) -> None:
    made = stock_model("qwen3_vl")
    inputs = inputs_of(made, video(2), QUESTION)
    inputs["attention_mask"][0, hidden] = 0
    with pytest.raises(ModelError, match="left only"):
        statekv.generate(made.model, **inputs)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"num_beams": 3}, "num_beams"),
        ({"bugdet": 5}, "bugdet"),
        ({"streamer": object()}, "streamer"),
        ({"method": "statekw"}, "statekw"),
        ({"budget": 0}, "budget"),
        ({"stop_strings": "a"}, "tokenizer"),
        ({"output_scores": True}, "output_scores"),
        ({"max_new_tokens": "3"}, "str"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"on_horizon": "compact"}, "on_horizon"),
        ({"do_sample": True, "temperature": -1.0}, "temperature"),
    ],
)
def test_a_wrong_argument_is_named(arguments: dict[str, Any], told: str) -> None:
    made = stock_model("internvl")
    with pytest.raises(ConfigError, match=told):
        statekv.generate(made.model, **inputs_of(made, video(2), QUESTION), **arguments)


def test_inputs_that_make_no_sense_are_refused() -> None:
    made = stock_model("qwen3_vl")
    inputs = inputs_of(made, video(4), QUESTION)
    with pytest.raises(ConfigError, match="input_ids"):
        statekv.generate(made.model, pixel_values_videos=inputs["pixel_values_videos"])
    end = int((inputs["input_ids"][0] == made.config.video_token_id).nonzero().max()) + 2
    with pytest.raises(ModelError, match="ends with a picture"):
        statekv.generate(made.model, **{**inputs, "input_ids": inputs["input_ids"][:, :end], "attention_mask": None})


@pytest.mark.parametrize("wrong", ["too many pictures", "too few pictures", "no pictures"])
@pytest.mark.parametrize("family", EVERY_MODEL)
def test_pictures_and_placeholders_that_do_not_match_are_refused(family: str, wrong: str) -> None:
    made = stock_model(family)
    few, many = (inputs_of(made, video(frames), QUESTION) for frames in (2, 4))
    inputs = {
        "too many pictures": {**many, "input_ids": few["input_ids"]},
        "too few pictures": {**few, "input_ids": many["input_ids"]},
        "no pictures": {"input_ids": many["input_ids"]},
    }[wrong]
    inputs.pop("attention_mask", None)
    with pytest.raises(ModelError):
        statekv.generate(made.model, **inputs, max_new_tokens=1)


def test_another_kind_of_model_is_refused() -> None:
    with pytest.raises(ModelError, match="Linear"):
        statekv.generate(torch.nn.Linear(2, 2), input_ids=torch.zeros(1, 3, dtype=torch.long))
