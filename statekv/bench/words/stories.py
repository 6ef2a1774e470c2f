"""Long texts of plain invented sentences into which guests come one by one, and questions about them.

A guest comes in with a thing, between sentences about other people and other matters:

    Before dawn the farmer ate soup with Ruth and said that the mill stood still. The nurse comes in. The nurse has a
    lemon. It is the lemon of the nurse. That makes three guests.

Three kinds of questions: the *needle* (what does the nurse have?), the *order* (who came in first, who last?) and the
*count* (how many guests are there?), whose answer the story itself has told, a smaller number each time before.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from statekv.errors import ConfigError

KINDS = ("needle", "order", "count")
MOMENTS = 4  # at which is asked: quarters of the story
_NEEDLES = 2  # at each moment
_FEWEST = 4  # guests of a story
_ROOM = 2  # of a story's tokens, one in so many is for guests at most

_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
_GUESTS = ("captain", "nurse", "painter", "judge", "miller", "queen", "thief", "monk", "gardener", "butcher")
_THINGS = ("lemon", "spoon", "coin", "candle", "key", "shell", "watch", "hat", "knife", "letter", "stone", "brush")

_PEOPLE = ("Anna", "Tom", "the baker", "the old teacher", "Maria", "a young sailor", "Peter", "the farmer", "Ruth")
_PLACES = ("the market", "the harbour", "the long road", "the school", "the river", "the station", "the small church")
_WEATHER = ("rain", "a cold wind", "thick fog", "warm sun", "light snow", "a grey sky")
_TIMES = ("in the morning", "at noon", "late in the evening", "on Monday", "after the meal", "before dawn")
_FOODS = ("bread", "soup", "cheese", "apples", "fish", "rice", "plums", "beans")
_ANIMALS = ("a dog", "two geese", "an old horse", "a cat", "some sparrows", "a goat")
_SAYINGS = (
    *(
        "the winter would be hard",
        "the bridge had to be mended",
        "nobody had seen the boat",
        "the prices were too high",
    ),
    *("the road was safe again", "a new doctor had arrived", "the mill stood still", "the feast was not far away"),
)
_FRAMES = (
    "{time} {person} walked to {place} and came back with {food}.",
    "{time} there was {weather} over {place}, and {animal} stood still.",
    "{time} {person} ate {food} with {other} and said that {saying}.",
    "{person} told {other} that {saying}.",
    "near {place} {animal} ran after {person}.",
    "there was {weather}, so {person} stayed at home and cooked {food}.",
    "{person} bought {food} at {place} and gave half of it to {other}.",
    "some people at {place} believed that {saying}, but {person} did not.",
    "{other} wrote to {person} about {weather} and about {food}.",
    "{time} {person} waited near {place} and thought of {other}.",
)


@dataclass(frozen=True)
class Question:
    """One question with its only right option.

    Attributes:
        kind: one of KINDS.
        after: tokens of the story that have been read when it is asked.
        text: what is asked, and how the answer begins.
        options: words that may come next.
        right: which of them does.
    """

    kind: str
    after: int
    text: str
    options: tuple[str, ...]
    right: int


@dataclass(frozen=True)
class Guest:
    """Who came in with what, and the tokens of the story before it was told and once it was."""

    who: str
    thing: str
    begun: int
    told: int


@dataclass(frozen=True)
class Story:
    """A text as tokens, its guests in order, and what is asked about them."""

    ids: tuple[int, ...]
    guests: tuple[Guest, ...]
    questions: tuple[Question, ...]


def tell(seed: int, tokens: int, step: int, encode: Callable[[str], list[int]]) -> Story:
    """Invent a story; the same seed, length and tokenizer always give the same one.

    Args:
        tokens: of the story; the last sentence is cut off where they end.
        step: questions are asked behind whole steps of so many tokens, or at the end.
        encode: a text's tokens.

    Raises:
        ConfigError: too few tokens for so many guests.
    """
    rng = random.Random(seed)
    count = rng.randint(_FEWEST, len(_NUMBERS))
    cast = list(zip(rng.sample(_GUESTS, count), rng.sample(_THINGS, count), strict=True))
    _check_room(cast, tokens, encode)
    ids, guests = _written(cast, tokens, encode, rng)
    asked = [question for after in _moments(guests, tokens, step) for question in _questions(guests, after, rng)]
    return Story(ids, tuple(guests), tuple(asked))


def _check_room(cast: Sequence[tuple[str, str]], tokens: int, encode: Callable[[str], list[int]]) -> None:
    taken = len(encode(" ".join(_entrance(number, *guest) for number, guest in enumerate(cast))))
    if _ROOM * taken > tokens:
        rule = f"tokens is {tokens}, but a story of {len(cast)} guests takes {_ROOM * taken}"
        raise ConfigError(rule, "read more tokens")


def _written(
    cast: Sequence[tuple[str, str]], tokens: int, encode: Callable[[str], list[int]], rng: random.Random
) -> tuple[tuple[int, ...], list[Guest]]:
    """The text's tokens, with a guest somewhere in each of equal parts of it."""
    room = (1 - 1 / (2 * len(cast))) * tokens  # the last one has come in before the end
    due = [(number + rng.uniform(0.1, 0.8)) * room / len(cast) for number in range(len(cast))]
    sentences: list[str] = []
    guests: list[Guest] = []
    length = 0
    while length < tokens or len(encode(" ".join(sentences))) < tokens:
        if len(guests) < len(cast) and length >= due[len(guests)]:
            begun = len(encode(" ".join(sentences)))
            sentences.append(_entrance(len(guests), *cast[len(guests)]))
            length = len(encode(" ".join(sentences)))
            guests.append(Guest(*cast[len(guests)], begun, length))
        else:
            sentences.append(_aside(rng))
            length += len(encode(" " + sentences[-1]))
    return tuple(encode(" ".join(sentences))[:tokens]), guests


def _moments(guests: Sequence[Guest], tokens: int, step: int) -> list[int]:
    """After how many tokens is asked: quarters, each up to where a step ends and nobody is just coming in."""
    ends = [*range(step, tokens, step), tokens]
    quiet = [end for end in ends if not any(guest.begun < end < guest.told for guest in guests)]
    found = [next((end for end in quiet if end * MOMENTS >= part * tokens), None) for part in range(1, MOMENTS + 1)]
    return sorted({end for end in found if end is not None})


def _entrance(number: int, who: str, thing: str) -> str:
    many = f"{_NUMBERS[number]} guest{'s' if number else ''}"
    return f"The {who} comes in. The {who} has a {thing}. It is the {thing} of the {who}. That makes {many}."


def _aside(rng: random.Random) -> str:
    person, other = rng.sample(_PEOPLE, 2)
    words = {"time": _TIMES, "place": _PLACES, "weather": _WEATHER, "food": _FOODS, "animal": _ANIMALS}
    drawn = {name: rng.choice(choices) for name, choices in {**words, "saying": _SAYINGS}.items()}
    told = rng.choice(_FRAMES).format(person=person, other=other, **drawn)
    return told[0].upper() + told[1:]


def _questions(guests: Sequence[Guest], after: int, rng: random.Random) -> Iterator[Question]:
    """What can be asked once so many tokens have been read; nothing where nobody has come in yet."""
    here = [guest for guest in guests if guest.told <= after]
    if not here:
        return
    things = tuple(guest.thing for guest in guests)
    for number in sorted(rng.sample(range(len(here)), min(_NEEDLES, len(here)))):
        who = here[number].who
        text = f"What does the {who} have?\nAnswer: The {who} has a"
        yield Question("needle", after, text, things, number)
    if len(here) > 1:
        names = tuple(guest.who for guest in here)
        for place, right in (("first", 0), ("last", len(here) - 1)):
            text = f"Which guest came in {place}?\nAnswer: The guest who came in {place} was the"
            yield Question("order", after, text, names, right)
    yield Question("count", after, "How many guests are there?\nAnswer: That makes", _NUMBERS, len(here) - 1)
