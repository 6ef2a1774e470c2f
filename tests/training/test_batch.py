"""What the demo model learns from is what statekv shows it: the same tokens, positions and visibility."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from transformers import InternVLForConditionalGeneration, PreTrainedTokenizerFast

from statekv.evals.cards.render import render
from statekv.evals.cards.world import COLORS, FIRST_TEST_SEED, SHAPES, Story, frame_of, questions, write_story
from statekv.models.families.internvl import internvl_step, internvl_tokens
from statekv.models.prompt import Layout, Prompt
from training import batch as batching
from training.batch import IGNORE, LONG_CLIP, Batch, BatchMaker
from training.heads import Heads
from training.model import TOKENS_PER_FRAME, build_model
from training.tokenizer import CHAT_TEMPLATE, build_tokenizer
from training.train import loss_of

CLIPS, FRAMES, QUESTIONS = 3, 6, 4
NAMES = (("color", COLORS), ("shape", SHAPES))


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def decode(ids: list[int], skip_special_tokens: bool = False) -> str:
    text = tokenizer().decode(ids, skip_special_tokens=skip_special_tokens)
    assert isinstance(text, str)
    return text


def make(seed: int, clips: int = CLIPS, frames: int = FRAMES) -> Batch:
    return BatchMaker(tokenizer(), QUESTIONS).make(np.random.default_rng(seed), clips, frames)


@dataclass(frozen=True)
class Clip:
    """One row of a batch, cut at its seams: token ids of video and questions, each with answer and positions."""

    video: list[int]
    video_positions: list[int]
    questions: list[list[int]]
    answers: list[list[int]]
    positions: list[list[int]]

    @property
    def layout(self) -> Layout:
        return "hf" if decode(self.video[:1]) == "<|im_start|>" else "release"

    def texts(self) -> Iterator[tuple[str, str]]:
        """(question, answer)"""
        for prompt, answer in zip(self.questions, self.answers, strict=True):
            text = decode(prompt, skip_special_tokens=True)
            assert text.endswith("\nassistant\n")
            text = text.removesuffix("\nassistant\n").removeprefix("user").strip()
            yield text, decode(answer, skip_special_tokens=True)


def video_length(batch: Batch) -> int:
    """The rest is made of equal blocks that do not see each other."""
    sees = batch.mask[0, 0]
    return int(sees[-1].sum() - (~sees[-1]).sum() / (QUESTIONS - 1))


def clips_of(batch: Batch) -> list[Clip]:
    video = video_length(batch)
    found = []
    for ids, labels, positions in zip(batch.input_ids, batch.labels, batch.positions, strict=True):
        assert (labels[:video] == IGNORE).all()
        blocks = [t[video:].view(QUESTIONS, -1).tolist() for t in (ids, labels, positions)]
        starts = [next(i for i, label in enumerate(row) if label != IGNORE) + 1 for row in blocks[1]]
        prompts = [row[:start] for row, start in zip(blocks[0], starts, strict=True)]
        answers = [[label for label in row if label != IGNORE] for row in blocks[1]]
        found.append(Clip(ids[:video].tolist(), positions[:video].tolist(), prompts, answers, blocks[2]))
    return found


@functools.cache
def some_clips() -> list[Clip]:
    return [clip for seed in range(40) for clip in clips_of(make(seed))]


@functools.cache
def some_model() -> InternVLForConditionalGeneration:
    torch.manual_seed(0)
    model: InternVLForConditionalGeneration = build_model(tokenizer()).eval()
    return model


def test_a_seed_gives_the_same_batch() -> None:
    first, again, other = make(1), make(1), make(2)
    for field in dataclasses.fields(Batch):
        assert torch.equal(getattr(first, field.name), getattr(again, field.name))
    assert not torch.equal(first.pixels, other.pixels)


def test_pixels_are_those_of_the_stories_normalised(monkeypatch: pytest.MonkeyPatch) -> None:
    stories = _recorded(monkeypatch)
    pixels = make(1).pixels.view(CLIPS, FRAMES, 3, 32, 32)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for clip, story in zip(pixels, stories, strict=True):
        expected = torch.from_numpy(render(story, np.arange(FRAMES, dtype=np.float64), 32)).float() / 255
        torch.testing.assert_close(clip.permute(0, 2, 3, 1), (expected - mean) / std)


def _recorded(monkeypatch: pytest.MonkeyPatch) -> list[Story]:
    """Stories that batches are made of from here on."""
    stories: list[Story] = []

    def record(seed: int, duration: float) -> Story:
        stories.append(write_story(seed, duration))
        return stories[-1]

    monkeypatch.setattr(batching, "write_story", record)
    return stories


def test_what_each_picture_shows_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    stories = _recorded(monkeypatch)
    batch = make(1, frames=16)
    shown, new = batch.shown.view(CLIPS, 16, 2).tolist(), batch.new.view(CLIPS, 16).tolist()
    for clip, story in enumerate(stories):
        seen: set[str] = set()
        for time in range(16):
            cards = [card for card in story.cards if card.start_seconds <= time < card.end_seconds]
            color, shape = (names.index(getattr(cards[0], kind)) if cards else len(names) for kind, names in NAMES)
            assert shown[clip][time] == [color, shape]
            assert new[clip][time] == any(card.color not in seen for card in cards)
            seen |= {card.color for card in cards}


def test_what_has_happened_until_each_frame_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    stories = _recorded(monkeypatch)
    batch = make(1, frames=16)
    told = {name: getattr(batch, name).view(CLIPS, 16, -1).tolist() for name in ("so_far", "last", "before_last")}
    numbers, last_numbers = batch.numbers.view(CLIPS, 16).tolist(), batch.last_number.view(CLIPS, 16).tolist()
    for clip, story in enumerate(stories):
        for time in range(16):
            past = [card for card in story.cards if card.start_seconds <= time]
            assert told["so_far"][clip][time] == [len(past)]
            for name, card in (("last", past[-1:]), ("before_last", past[-2:-1])):
                expected = [names.index(getattr(card[0], kind)) if card else len(names) for kind, names in NAMES]
                assert told[name][clip][time] == expected
            first = numbers[clip][frame_of(past[-1], 1.0) - 1] if past else IGNORE
            assert last_numbers[clip][time] == first


def test_numbers_of_frames_are_those_of_their_labels() -> None:
    layouts = set()
    for seed in range(30):
        batch = make(seed, clips=2)
        for ids, numbers in zip(batch.input_ids, batch.numbers.view(2, -1), strict=True):
            labels = [int(part.split(":")[0]) for part in decode(ids.tolist()).split("\nframe")[1:]]
            layouts.add(bool(labels))
            expected = [decode([int(token)]) for token in numbers] if labels else []
            assert expected == [str(label) for label in labels]
            assert labels or (numbers == IGNORE).all()
    assert layouts == {True, False}


def test_long_clips_are_asked_twice_as_much() -> None:
    short, long = make(1, frames=LONG_CLIP - 1), make(1, frames=LONG_CLIP)
    asked = [(batch.labels == tokenizer().eos_token_id).sum(dim=1).tolist() for batch in (short, long)]
    assert asked == [[QUESTIONS] * CLIPS, [2 * QUESTIONS] * CLIPS]


def test_training_never_sees_a_test_story(monkeypatch: pytest.MonkeyPatch) -> None:
    stories = _recorded(monkeypatch)
    for seed in range(30):
        make(seed, clips=10, frames=2)
    assert len({story.seed for story in stories}) == 300
    assert min(story.seed for story in stories) >= 0
    assert 0.9 * FIRST_TEST_SEED < max(story.seed for story in stories) < FIRST_TEST_SEED


def test_labels_are_the_tokens_that_follow() -> None:
    for seed in range(10):
        batch = make(seed)
        ids, labels = batch.input_ids[:, 1:], batch.labels[:, :-1]
        assert torch.equal(labels[labels != IGNORE], ids[labels != IGNORE])
        assert (batch.labels[:, -1] == IGNORE).all()
        assert not (batch.labels == tokenizer().pad_token_id).any()
    for clip in some_clips():
        for prompt, answer in zip(clip.questions, clip.answers, strict=True):
            assert answer[-1] == tokenizer().eos_token_id
            assert decode(prompt).endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_answers_are_those_of_the_story(monkeypatch: pytest.MonkeyPatch) -> None:
    stories = _recorded(monkeypatch)
    clips = [clip for seed in range(15) for clip in clips_of(make(seed, frames=16))]
    kinds = set()
    for story, clip in zip(stories, clips, strict=True):
        right = {q.text: q for seed in range(60) for q in questions(story, np.random.default_rng(seed), per_kind=8)}
        first = 1
        if clip.layout == "hf":
            first = int(decode(clip.video).split("frame")[1].split(":")[0])
        for text, answer in clip.texts():
            kinds.add(right[text].kind)
            expected = right[text].answer
            # Frames are numbered as their labels say; without labels nobody can tell.
            if right[text].kind == "when":
                assert clip.layout == "hf"
                expected = str(int(expected) + first - 1)
            assert answer == expected
    assert kinds == {"color", "shape", "first", "after", "count", "when"}


def test_a_question_sees_the_video_and_itself_only() -> None:
    batch = make(3)
    sees, video = batch.mask[0, 0], video_length(batch)
    block = (len(sees) - video) // QUESTIONS
    expected = torch.zeros_like(sees)
    for row in range(len(sees)):
        start = video + (row - video) // block * block if row >= video else 0
        expected[row, : min(row + 1, video)] = True
        expected[row, start : row + 1] = True
    assert batch.mask.shape == (1, 1, len(sees), len(sees))
    assert torch.equal(sees, expected)


@torch.no_grad()
def test_the_loss_of_one_question_does_not_change_with_another() -> None:
    batch, model = make(3), some_model()
    video = video_length(batch)
    block = (batch.input_ids.shape[1] - video) // QUESTIONS

    def only(question: int, other: Batch) -> torch.Tensor:
        labels = torch.full_like(other.labels, IGNORE)
        mine = slice(video + question * block, video + (question + 1) * block)
        labels[:, mine] = other.labels[:, mine]
        return loss_of(model, Heads(model, tokenizer()), dataclasses.replace(other, labels=labels))[0]

    ids = batch.input_ids.clone()
    ids[:, video + block : video + 2 * block] = 1000
    changed = dataclasses.replace(batch, input_ids=ids)
    for question in (0, 2, 3):
        torch.testing.assert_close(only(question, changed), only(question, batch), rtol=0, atol=1e-6)
    assert abs(only(1, changed) - only(1, batch)) > 1e-4
    # The pictures do matter, to all of them.
    blind = dataclasses.replace(batch, pixels=batch.pixels.flip(0))
    assert all(abs(only(question, blind) - only(question, batch)) > 1e-6 for question in range(QUESTIONS))


def test_questions_go_on_where_the_video_ends() -> None:
    for clip in some_clips():
        for positions in clip.positions:
            start = clip.video_positions[-1] + 1
            assert positions == list(range(start, start + len(positions)))


def test_positions_are_whole_frames_apart_and_most_of_them_plain() -> None:
    plain = 0
    for clip in some_clips():
        steps = np.diff(clip.video_positions)
        assert (steps >= 1).all()
        plain += clip.video_positions == list(range(len(clip.video)))
        inside = np.flatnonzero(np.isin(clip.video[1:], [tokenizer().convert_tokens_to_ids("<IMG_CONTEXT>")]))
        assert (steps[inside] == 1).all()
        assert max(max(positions) for positions in clip.positions) < 32768
    assert 0.55 < plain / len(some_clips()) < 0.85


@pytest.mark.parametrize("layout", ["hf", "release"])
def test_tokens_are_those_that_statekv_feeds(layout: Layout) -> None:
    names = internvl_tokens(tokenizer())
    prompt = Prompt(tokenizer(), CHAT_TEMPLATE, names, layout)
    steps = [internvl_step(index, TOKENS_PER_FRAME, names, layout) for index in range(FRAMES)]
    first = prompt.head_ids(steps[0]) + prompt.first_step_ids(steps[0])
    expected = first + [token for step in steps[1:] for token in prompt.step_ids(step)]
    clips = [clip for clip in some_clips() if clip.layout == layout]
    numbered_from_one = [clip for clip in clips if layout == "release" or clip.video[: len(first)] == first]
    assert len(numbered_from_one) > 10
    assert all(clip.video == expected for clip in numbered_from_one)
    for clip in clips:
        for (question, _), ids in zip(clip.texts(), clip.questions, strict=True):
            assert ids == prompt.tail_ids(question), question


def test_labels_of_frames_count_on_from_any_number() -> None:
    firsts = set()
    for clip in some_clips():
        if clip.layout == "hf":
            numbers = [int(part.split(":")[0]) for part in decode(clip.video).split("frame")[1:]]
            assert numbers == list(range(numbers[0], numbers[0] + FRAMES))
            assert numbers[-1] < 1000
            firsts.add(numbers[0])
    assert min(firsts) == 1
    assert max(firsts) > 500
