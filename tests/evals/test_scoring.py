"""Readings of an answer: what the rules say, and the same as lmms-eval where it is installed."""

from __future__ import annotations

import importlib.util
import random
from typing import Any

import pytest

from statekv.evals.scoring import chosen_letter, first_letter, letter_before_bracket, sole_letter
from tests.evals.lmms.stock_lmms import FOLDER, needs_lmms


@pytest.mark.parametrize(
    ("answered", "letter"),
    [
        ("C", "C"),
        (" (C) ", "C"),
        ("C.", "C"),
        ('"C"', "C"),
        ("C. A red ring", "C"),
        ("The answer is B", "B"),
        ("the correct option is (D), as before", "D"),
        ("the correct option is (D), as A is wrong", "A"),  # the last one behind the phrase: that is the rule
        ("It is (B) and not a circle", "B"),
        ("First (A), on second thoughts (B) it seems", "B"),
        ("Definitely", "D"),
        ("red ring", ""),
        ("...", ""),
        ("", ""),
    ],
)
def test_the_chosen_letter(answered: str, letter: str) -> None:
    assert chosen_letter(answered) == letter


@pytest.mark.parametrize(
    ("answered", "letter"),
    [("C", "C"), ("(C)", "C"), ("C.", "C"), (" C\n", "C"), ("C. A ring", ""), ("CC", ""), ("c", ""), ("", "")],
)
def test_the_strict_letter(answered: str, letter: str) -> None:
    assert sole_letter(answered) == letter


def test_earlier_rules() -> None:
    """Of lmms-eval up to 0.7.1: what differs is why figures of MLVU from then are low."""
    assert first_letter("The best answer is: B") == "B"
    assert first_letter("It could Be C") == "B"
    assert first_letter("none") == ""
    assert letter_before_bracket("B) a cross") == letter_before_bracket("(B) a cross") == "B"
    assert letter_before_bracket(" B\n") == "B"
    assert letter_before_bracket("B.") == "B."
    assert letter_before_bracket(")") == ""


@needs_lmms
def test_the_chosen_letter_is_that_of_lmms_eval() -> None:
    path = FOLDER / "lmms_eval" / "tasks" / "_task_utils" / "mcq_extract.py"
    spec = importlib.util.spec_from_file_location("mcq_extract", path)
    assert spec is not None
    assert spec.loader is not None
    theirs: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    pieces = [
        *"ABCDE",
        *"abcd",
        *" .,:;()!?'\"\n",
        " ",
        " ",
        "the answer is",
        "The best option is",
        "I choose",
        "答案是",
    ]
    pieces += ["because", "Answer", "not", "A.", "(B)", "C)", "D:"]
    draws = random.Random(7)
    for _ in range(20_000):
        answered = "".join(draws.choices(pieces, k=draws.randint(0, 9)))
        assert chosen_letter(answered) == theirs.extract_mcq_answer(answered, choices=list("ABCD")), repr(answered)
