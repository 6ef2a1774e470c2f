"""What a reducer may do, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
import torch

from statekv.errors import ConfigError
from statekv.models.encoded import EncodedStep
from statekv.reduce.base import Memory, Reducer, reduced


class Doing(Reducer):
    """Whatever a test wants."""

    def __init__(self, does: Callable[[EncodedStep, Memory], Any]) -> None:
        self._does = does

    def reduce(self, step: EncodedStep, memory: Memory) -> EncodedStep:
        found: EncodedStep = self._does(step, memory)
        return found


def step_of(total: int = 6) -> EncodedStep:
    features = torch.arange(total * 2.0).view(total, 2)
    return EncodedStep((), features, (2, total // 2), (features + 100,))


def with_kept(kept: Any, tokens: int = 2) -> Callable[[EncodedStep, Memory], EncodedStep]:
    def does(step: EncodedStep, memory: Memory) -> EncodedStep:
        layers = tuple(layer[:tokens] for layer in step.deepstack)
        return replace(step, features=step.features[:tokens], deepstack=layers, kept=kept)

    return does


WRONG: list[tuple[Callable[[EncodedStep, Memory], Any], str]] = [
    (lambda step, memory: None, r"returned None.*step\.keep"),
    (lambda step, memory: step.features, r"returned a Tensor"),
    (lambda step, memory: step.keep(torch.zeros(6, dtype=torch.bool)), r"left no token.*at least one"),
    (lambda step, memory: step.keep(torch.tensor([1, 99])), r"numbers from 1 to 99 for 6 tokens.*from 0 to 5"),
    (lambda step, memory: step.keep(torch.tensor([-1])), r"numbers from -1 to -1 for 6 tokens"),
    (lambda step, memory: step.keep(torch.tensor([0.5])), r"given torch\.float32 \[1\].*bool \[6\]"),
    (lambda step, memory: step.keep([0, 1]), r"step\.keep was given list"),  # type: ignore[arg-type]
    (lambda step, memory: step.keep(torch.ones(5, dtype=torch.bool)), r"a mask of 5 for 6 tokens"),
    (lambda step, memory: 1 // 0, r"failed: ZeroDivisionError: integer.*mend the reducer"),
    (lambda step, memory: replace(step, grid=(1, 6)), r"a grid of \(1, 6\) for \(2, 3\)"),
    (lambda step, memory: replace(step, features=step.features[:2]), r"features \[2, 2\], \[6, 2\], must be 2 times"),
    (lambda step, memory: replace(step, features=step.features[:, :1]), r"features \[6, 1\], \[6, 2\]"),
    (lambda step, memory: replace(step, features=step.features.repeat(2, 1)), r"features \[12, 2\]"),
    (lambda step, memory: replace(step, deepstack=()), r"must be 2 times \[6, 2\]"),
    (lambda step, memory: replace(step.keep(torch.tensor([1, 2])), deepstack=step.deepstack), r"\[2, 2\], \[6, 2\]"),
    (lambda step, memory: replace(step, features=step.features / 0 * 0), r"not numbers \(NaN\)"),
    (lambda step, memory: replace(step, deepstack=(step.features.log().sub(torch.inf) * 0,)), r"not numbers \(NaN\)"),
    (with_kept(torch.tensor([4, 1])), r"kept \[4, 1\], must be ascending and below 6"),
    (with_kept(torch.tensor([1, 1])), r"kept \[1, 1\], must be ascending"),
    (with_kept(torch.tensor([1, 6])), r"kept \[1, 6\], must be ascending and below 6"),
    (with_kept(torch.tensor([-1, 2])), r"kept \[-1, 2\], must be ascending"),
    (with_kept(torch.arange(12), 12), r"kept \[0, 1, 2, 3, 4, 5, 6, 7, …\]"),
    (with_kept(torch.tensor([1.0, 2.0])), r"kept as torch\.float32 \[2\] on cpu.*int64 \[n\] on the CPU"),
    (with_kept(torch.tensor([[1], [2]])), r"kept as torch\.int64 \[2, 1\]"),
    (with_kept(torch.tensor([1, 2, 3])), r"must be 2 times \[3, 2\]"),
    (lambda step, memory: memory.update(seen={1, 2}) or step, r"remembers 'seen' as a set, which a save cannot hold"),
    (lambda step, memory: memory.update(seen=[(1, 2)]) or step, r"remembers 'seen' as a list"),
    (lambda step, memory: memory.update(dict.fromkeys(cast("list[str]", [3]))) or step, r"remembers 3 as None"),
]


@pytest.mark.parametrize(("does", "told"), WRONG)
def test_what_cannot_enter_is_refused_in_one_line(does: Callable[[EncodedStep, Memory], Any], told: str) -> None:
    with pytest.raises(ConfigError, match=rf"^reducer Doing .*{told}") as caught:
        reduced(Doing(does), step_of(), {})
    assert "\n" not in str(caught.value)
    assert caught.value.hint


def test_a_tower_that_does_not_give_numbers_is_not_the_reducers_fault() -> None:
    step = replace(step_of(), features=torch.full((6, 2), torch.nan))
    found, _ = reduced(Doing(lambda step, memory: step.keep(torch.tensor([2]))), step, {})
    assert found.places.tolist() == [2]


def test_a_reducer_works_on_copies() -> None:
    def does(step: EncodedStep, memory: Memory) -> EncodedStep:
        step.features.zero_()
        step.deepstack[0].zero_()
        memory["tensor"].zero_()
        memory["list"].append(3)
        memory["new"] = {"a": [None, True, 1.5, "x"]}
        return step

    step, memory = step_of(), {"tensor": torch.ones(2), "list": [1, 2]}
    found, after = reduced(Doing(does), step, memory)
    assert torch.equal(step.features, step_of().features)
    assert torch.equal(step.deepstack[0], step_of().deepstack[0])
    assert memory["list"] == [1, 2]
    assert torch.equal(memory["tensor"], torch.ones(2))  # type: ignore[arg-type]
    assert not found.features.any()
    assert after["list"] == [1, 2, 3]
    assert not after["tensor"].any()
    assert after["new"] == {"a": [None, True, 1.5, "x"]}
