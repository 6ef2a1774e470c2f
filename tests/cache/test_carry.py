"""A policy of the user's own is tried before a stream begins, and looked at in its steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from statekv.cache.carry import Checked, policy_of, tried
from statekv.cache.policies import Candidates, Policy
from statekv.config import Config
from statekv.errors import ConfigError, PolicyError, StateKVError

KEYS = torch.empty(1, 2, 1, 4)  # two heads of 4
LAYERS, BUDGET, OWN = 3, 20, 16


def zeros(candidates: Candidates) -> torch.Tensor:
    return torch.zeros(candidates.token_ids.shape)


def own(score: Callable[[Candidates], Any] = zeros, **more: Any) -> Policy:
    """A policy of the user's own, which answers by a function of what it is shown."""
    found: Policy = type("Own", (Policy,), {"score": lambda _, shown: score(shown), **more})()
    return found


def weigh(_: Policy, shown: Candidates, scores: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    assert kept.sum(-1).unique().tolist() == [min(BUDGET, scores.shape[-1])]
    return scores


# Everything that a policy may ask for.
ALL: dict[str, Any] = {
    **dict.fromkeys(("needs_attention", "every_step", "weighs"), True),
    "state": {"age": 3.0},
    "log_weights": weigh,
}


def trial(policy: Policy, budget: int = BUDGET) -> None:
    tried(policy_of(Config(carry=policy, budget=budget)), budget, LAYERS, KEYS)


def test_the_trial_is_a_step_that_overflows() -> None:
    seen: list[Candidates] = []
    trial(own(lambda shown: seen.append(shown) or zeros(shown)))  # type: ignore[func-returns-value]
    (shown,) = seen
    assert (shown.layer, shown.budget, shown.first_own, shown.attention, shown.state) == (0, BUDGET, BUDGET, None, {})
    assert shown.keys.shape == shown.values.shape == (2, 2, BUDGET + OWN, 4)
    assert (shown.token_ids == torch.arange(BUDGET + OWN)).all()
    assert shown.token_ids.dtype == torch.int32


def test_who_judges_every_step_is_shown_one_that_does_not_overflow_too() -> None:
    seen: list[Candidates] = []
    trial(own(lambda shown: seen.append(shown) or zeros(shown), **ALL))  # type: ignore[func-returns-value]
    assert [shown.token_ids.shape[-1] for shown in seen] == [OWN, BUDGET + OWN]
    assert [shown.first_own for shown in seen] == [0, BUDGET]
    for shown in seen:
        assert shown.attended.shape == shown.token_ids.shape
        assert {name: tensor.unique().tolist() for name, tensor in shown.state.items()} == {
            "age": [3.0],
            "log_weights": [0.0],
        }


@pytest.mark.parametrize(
    ("budget", "budgets", "told"), [(20, [30, 10, 20], 10), (20, [1, 1, 58], 1), (9999, [9999] * 3, 4096)]
)
def test_the_trial_has_the_smallest_budget_of_a_layer(budget: int, budgets: list[int], told: int) -> None:
    seen: list[Candidates] = []
    more: dict[str, Any] = {"layer_budgets": lambda *_: budgets, "slots": lambda _, share: share + 1}
    trial(own(lambda shown: seen.append(shown) or zeros(shown), **more), budget)  # type: ignore[func-returns-value]
    assert [(shown.budget, shown.token_ids.shape[-1]) for shown in seen] == [(told, told + 1 + OWN)]


def failing(_: object) -> torch.Tensor:
    raise ZeroDivisionError("by\nzero")


WRONG: dict[str, tuple[Policy, str]] = {
    "nothing": (own(lambda shown: None), "gave scores of type NoneType .*floats"),
    "numbers": (own(lambda shown: [0.0] * 36), "gave scores of type list"),
    "whole": (own(lambda shown: shown.token_ids), "gave scores of type torch.int32"),
    "shape": (own(lambda shown: zeros(shown)[0]), r"scores of shape \[2, 36\] for keys of shape \[2, 2, 36\]"),
    "device": (own(lambda shown: zeros(shown).to("meta")), "gave scores on meta for keys on cpu"),
    "nan": (own(lambda shown: zeros(shown) + float("nan")), "scores that are NaN or infinite in layer 0"),
    "infinite": (own(lambda shown: zeros(shown).index_fill(-1, torch.tensor(7), float("inf"))), "NaN or infinite"),
    "fails": (own(failing), "policy Own failed in score: ZeroDivisionError: by zero \\("),
    "keys": (own(lambda shown: zeros(shown) + 0 * shown.keys.zero_()[..., 0]), "changed the keys that it was shown"),
    "values": (own(lambda shown: shown.values.add_(1)[..., 0]), "changed the values"),
    "tokens": (own(lambda shown: shown.token_ids.add_(1).float()), "changed the token numbers"),
    "attention": (own(lambda shown: shown.attended.add_(1), **ALL), "changed the attention"),
    "weights": (own(lambda shown: shown.log_weights.add_(1), **ALL), "changed the log weights"),
    "undeclared": (own(log_weights=weigh), "has log_weights, but does not say so .*weighs = True"),
    "importance": (own(state={"importance": 0.0}), "declares the state 'importance', which is not its own"),
    "log_weights": (own(state={"log_weights": 0.0}), "declares the state 'log_weights'"),
    "name": (own(state={3: 0.0}), "declares the state 3"),
    "text": (own(state={"age": "old"}), "declares the state 'age' with 'old'"),
    "replaced": (
        own(lambda shown: shown.state.update(age=3) or zeros(shown), state={"age": 0.0}),  # type: ignore[attr-defined]
        r"put something else in place of its state 'age' \(change it in place",
    ),
    "a list": (own(state=["age"]), r"declares its state as a list \(give a dict"),
    "truth": (own(state={"age": True}), "declares the state 'age' with True"),
    "few budgets": (
        own(layer_budgets=lambda *_: [20, 20]),
        r"gave \[20, 20\] as budgets of 3 layers .*return 3 .* 60 in all",
    ),
    "no budget": (own(layer_budgets=lambda *_: [0, 20, 20]), r"gave \[0, 20, 20\] as budgets"),
    "half a key": (own(layer_budgets=lambda *_: [1.5, 20, 20]), "as budgets of 3 layers"),
    "much": (own(layer_budgets=lambda *_: [20, 20, 21]), "as budgets of 3 layers"),
    "no budgets": (own(layer_budgets=lambda *_: 3), "failed in layer_budgets: TypeError"),
    "few slots": (own(slots=lambda _, share: share - 1), "gave 19 slots for a budget of 20"),
    "text slots": (own(slots=lambda _, share: str(share)), "gave '20' slots"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_policy_is_refused_before_a_stream_begins(name: str) -> None:
    policy, told = WRONG[name]
    with pytest.raises(PolicyError, match=told) as caught:
        trial(policy)
    assert "\n" not in str(caught.value)


def test_wrong_log_weights_are_refused() -> None:
    with pytest.raises(PolicyError, match="gave log weights of shape"):
        trial(own(**{**ALL, "log_weights": lambda _, shown, scores, kept: scores[..., 1:]}))


@pytest.mark.parametrize("error", [MemoryError("none left"), StateKVError("something else", "a way out")])
def test_errors_that_are_not_the_policys_pass(error: Exception) -> None:
    def fail(_: object) -> torch.Tensor:
        raise error

    with pytest.raises(type(error)) as caught:
        trial(own(fail))
    assert caught.value is error


def test_each_layer_is_looked_at_once() -> None:
    """What a policy does to later steps of a layer would cost every step a copy."""
    shown = Candidates(1, 2, torch.ones(1, 1, 3, 4), torch.ones(1, 1, 3, 4), torch.arange(3).view(1, 1, 3))
    checked = Checked(own(lambda shown: zeros(shown) + shown.keys.mul_(2)[..., 0]))
    with pytest.raises(PolicyError, match="changed the keys"):
        checked.score(shown)
    assert checked.score(shown).shape == (1, 1, 3)
    with pytest.raises(PolicyError, match="changed the keys"):
        checked.score(replace(shown, layer=2))


def test_ours_and_shapes_alone_are_not_tried() -> None:
    tried(policy_of(Config(carry="attention", decay=0.5)), BUDGET, LAYERS, KEYS)
    tried(policy_of(Config(carry=own(failing))), BUDGET, LAYERS, KEYS.to("meta"))
    with pytest.raises(PolicyError):
        tried(policy_of(Config(carry=own(failing), layer_slope=0.5, sinks=2)), BUDGET, LAYERS, KEYS)


@pytest.mark.parametrize(
    ("settings", "pinned", "expected"),
    [
        ({}, 0, "Pinned(Attention(), first=0)"),
        ({"sinks": 3}, 5, "Pinned(Attention(), first=5)"),
        ({"carry": "ada_kv"}, 0, "Pinned(AdaKV(floor=0.2, most=2.0), first=0)"),
        ({"carry": "sink_recent"}, 2, "Pinned(SinkRecent(), first=4)"),
        ({"carry": "random", "seed": 9, "sinks": 6}, 0, "Pinned(Random(seed=9), first=6)"),
        ({"carry": "random(seed=2)", "seed": 9, "sinks": 0}, 0, "Pinned(Random(seed=2), first=0)"),
        ({"memory": "1MiB"}, 0, "Pinned(Noted(Attention()), first=0)"),
        (
            {"decay": 0.5, "memory": "1MiB", "value_norms": True, "coverage": 0.25, "layer_slope": 0.1, "seed": 7},
            3,
            "Pinned(Sloped(Covered(ValueNorms(Decayed(Attention(), decay=0.5)), share=0.25, pinned=3, seed=7), "
            "slope=0.1), first=3)",
        ),
    ],
    ids=str,
)
def test_what_the_dials_put_around_a_policy(settings: dict[str, Any], pinned: int, expected: str) -> None:
    assert repr(policy_of(Config(**settings), pinned)) == expected


def test_sinks_of_a_policy_leave_room_for_others() -> None:
    policy_of(Config(budget=5, carry=own(sinks=4)))
    with pytest.raises(ConfigError, match=r"carry Own\(\) keeps 4 sinks, which fill a budget of 4"):
        policy_of(Config(budget=4, carry=own(sinks=4)))
