"""Which option an answer names: the readings of benchmarks with lettered options."""

from __future__ import annotations

import re
from collections.abc import Iterator

# Behind one of these, the letters of the rest of the answer count; part of the rule, in its spelling.
_PHRASES = (
    *("answer is", "the answer is", "correct answer is", "the correct answer is", "best answer is"),
    *("the best answer is", "my answer is"),
    *("correct option is", "the correct option is", "best option is", "the best option is"),
    *("choice is", "the choice is", "correct choice is", "the correct choice is", "my choice is"),
    *("i choose", "i select", "i pick"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)
# What stands around a letter, from the clearest form to none at all.
_FORMS = (("(", ")"), ("", "."), ("", ":"), ("", ")"), ("", " "), ("", ""))
_LEAD_INS = ("The best answer is", "The correct answer is", "The answer is", "The answer")


def chosen_letter(answered: str, letters: str = "ABCD") -> str:
    """The reading of lmms-eval since 0.7.2 (`extract_mcq_answer`), for Video-MME and MLVU; "" where there is no letter.

    Punctuation at both ends is dropped. Then the first of these that finds a letter decides: an answer that begins with
    a letter standing alone; that ends with one; letters behind a phrase such as "the answer is"; `(A)`; `A.`; `A:`;
    `A)`; a letter before a space; any letter. Where one form finds several letters, the last in the text counts.
    """
    text = answered.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    for places in _readings(text, letters):
        if places:
            return max(places, key=lambda letter: places[letter])
    return ""


def sole_letter(answered: str) -> str:
    """The strict reading: a letter that is the whole answer, but for brackets around it and a full stop; else ""."""
    found = re.fullmatch(r"\(?([A-Z])\)?\.?", answered.strip())
    return found[1] if found else ""


def first_letter(answered: str, letters: str = "ABCD") -> str:
    """The reading of lmms-eval up to 0.7.1 for Video-MME: the first letter behind lead-ins, even inside a word."""
    for lead_in in _LEAD_INS:
        answered = answered.replace(lead_in, "")
    return next((character for character in answered if character in letters), "")


def letter_before_bracket(answered: str) -> str:
    """The reading of lmms-eval up to 0.7.1 for MLVU: what precedes the first closing bracket, else the whole answer."""
    text = answered.strip()
    before, bracket, _ = text.partition(")")
    return before[-1:] if bracket else text


def _readings(text: str, letters: str) -> Iterator[dict[str, int]]:
    """From the clearest form on, where in the text the form finds which letter."""
    bare, padded = text.strip(), f" {text} "
    yield {letter: 0 for letter in letters if bare.startswith(letter) and not bare[1:2].isalpha()}
    yield {letter: 0 for letter in letters if bare.endswith(letter) and not bare[-2:-1].isalpha()}
    yield _behind_phrases(padded, letters)
    for before, after in _FORMS:
        places = {letter: padded.rfind(f"{before}{letter}{after}") for letter in letters}
        yield {letter: place for letter, place in places.items() if place >= 0}


def _behind_phrases(padded: str, letters: str) -> dict[str, int]:
    lowered, found = padded.lower(), dict[str, int]()
    for phrase in _PHRASES:
        begins = lowered.find(phrase)
        for letter in letters if begins >= 0 else "":
            place = padded.find(letter, begins + len(phrase))
            if place >= 0:
                found[letter] = max(place, found.get(letter, 0))
    return found
