"""Training batches: clips of the demo world with their questions, as pixels, tokens, positions and labels.

One clip serves several questions at once: the sequence is [video | question 1 + answer 1 | question 2 …], a mask
keeps the questions from seeing each other, and each one's positions continue the video's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from statekv.evals.cards.render import render
from statekv.evals.cards.world import COLORS, FIRST_TEST_SEED, SHAPES, Question, Story, questions, write_story
from training.model import PICTURE, TOKENS_PER_FRAME

IGNORE = -100
LONGEST_SPAN = 32768  # positions
LONG_CLIP = 24  # frames
WHEN_ALONE = 0.4  # share of the clips that are asked for frames' numbers only: the hardest kind, and an exact one
_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
_STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


@dataclass(frozen=True)
class Batch:
    """pixels [B·F, 3, P, P] · input_ids, positions, labels [B, L] int64 · mask [1, 1, L, L] bool (True = may see).

    shown: [B·F, 2] int64, colour and shape of the card in each picture, behind the last name where there is none.
    new: [B·F] bool, whether the picture is the first with its card.
    numbers: [B·F] int64, the token of each frame's number, IGNORE where the layout has none.
    so_far: [B·F] int64, how many cards have appeared up to each frame, its own included.
    last, before_last: [B·F, 2] int64, colour and shape of the newest of these cards and of the one before it.
    last_number: [B·F] int64, the number's token of the frame in which the newest of them appeared, or IGNORE.
    """

    pixels: torch.Tensor
    shown: torch.Tensor
    new: torch.Tensor
    numbers: torch.Tensor
    so_far: torch.Tensor
    last: torch.Tensor
    before_last: torch.Tensor
    last_number: torch.Tensor
    input_ids: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor


class BatchMaker:
    """Makes batches out of a seed; nothing is stored, the world is endless.

    Long clips come few at a time and are asked twice as many questions.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, questions_per_clip: int = 10) -> None:
        self.tokenizer = tokenizer
        self.questions_per_clip = questions_per_clip

    def make(self, rng: np.random.Generator, clips: int, frames: int) -> Batch:
        """A batch of `clips` clips of `frames` frames, in one prompt layout; deterministic in `rng`."""
        layout = "release" if rng.random() < 0.2 else "hf"
        each = self.questions_per_clip * (2 if frames >= LONG_CLIP else 1)
        pixels, frame_labels, videos, positions, asked = [], [], [], [], []
        for _ in range(clips):
            story = write_story(int(rng.integers(FIRST_TEST_SEED)), float(frames))
            pixels.append(render(story, np.arange(frames, dtype=np.float64), PICTURE))
            first_label = 1 if rng.random() < 0.6 else int(rng.integers(1, 999 - frames))
            frame_labels.append(_label_frames(story, self._numbers(layout, frames, first_label)))
            video, owner = self._video_tokens(layout, frames, first_label)
            videos.append(video)
            positions.append(_positions(rng, owner))
            asked.append([self._ask(q, layout, first_label) for q in self._choose(rng, story, layout, each)])
        ids, labels = self._blocks(asked, each)
        return _assemble(
            np.stack(pixels),
            {name: np.concatenate([labels[name] for labels in frame_labels]) for name in frame_labels[0]},
            np.stack(videos),
            np.stack(positions),
            ids,
            labels,
        )

    def _numbers(self, layout: str, frames: int, first_label: int) -> NDArray[np.int64]:
        if layout != "hf":
            return np.full(frames, IGNORE, np.int64)
        names = [str(first_label + i) for i in range(frames)]
        return np.array([self.tokenizer.encode(name, add_special_tokens=False)[0] for name in names], np.int64)

    def _video_tokens(self, layout: str, frames: int, first_label: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens of the frames and, for each token, the number of the frame it belongs to."""
        picture = "<img>" + "<IMG_CONTEXT>" * TOKENS_PER_FRAME + "</img>"
        if layout == "hf":
            pieces = [f"\nFrame{first_label + i}: {picture}" for i in range(frames)]
            pieces[0] = "<|im_start|>user" + pieces[0]
        else:
            pieces = [f"{picture}\n"] * frames
        encoded = [self.tokenizer.encode(piece, add_special_tokens=False) for piece in pieces]
        owner = np.repeat(np.arange(frames), [len(ids) for ids in encoded])
        return np.concatenate(encoded).astype(np.int64), owner

    def _choose(self, rng: np.random.Generator, story: Story, layout: str, count: int) -> list[Question]:
        pool = questions(story, rng, per_kind=6)
        if layout != "hf":
            pool = [question for question in pool if question.kind != "when"]
        elif rng.random() < WHEN_ALONE:
            pool = [question for question in pool if question.kind == "when"]
        shuffled = [pool[i] for i in rng.permutation(len(pool))]
        # One of each kind first, then the kind that is hardest to learn, then whatever is left.
        firsts = {question.kind: question for question in reversed(shuffled)}
        order = [question is not firsts[question.kind] for question in shuffled]
        order = [late and 2 - (question.kind == "when") for late, question in zip(order, shuffled, strict=True)]
        chosen = [shuffled[i] for i in np.argsort(order, kind="stable")]
        chosen = chosen[:count]
        rng.shuffle(chosen)  # type: ignore[arg-type]
        return (chosen * count)[:count]

    def _ask(self, question: Question, layout: str, first_label: int) -> tuple[list[int], list[int]]:
        answer = question.answer
        if question.kind == "when":
            answer = str(int(answer) + first_label - 1)
        head = "\n" if layout == "hf" else "<|im_start|>user\n"
        prompt = f"{head}{question.text}<|im_end|>\n<|im_start|>assistant\n"
        encode = self.tokenizer.encode
        return encode(prompt, add_special_tokens=False), encode(f"{answer}<|im_end|>", add_special_tokens=False)

    def _blocks(
        self, asked: list[list[tuple[list[int], list[int]]]], each: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Token ids and labels of the questions, [B, each, block]."""
        block = max(len(prompt) + len(answer) for clip in asked for prompt, answer in clip)
        ids = np.full((len(asked), each, block), self.tokenizer.pad_token_id, np.int64)
        labels = np.full_like(ids, IGNORE)
        for c, clip in enumerate(asked):
            for q, (prompt, answer) in enumerate(clip):
                ids[c, q, : len(prompt) + len(answer)] = prompt + answer
                # The label of a position is the token after it.
                labels[c, q, len(prompt) - 1 : len(prompt) - 1 + len(answer)] = answer
        return ids, labels


def _assemble(
    pixels: NDArray[np.uint8],
    frame_labels: dict[str, NDArray[np.int64]],
    videos: NDArray[np.int64],
    positions: NDArray[np.int64],
    ids: NDArray[np.int64],
    labels: NDArray[np.int64],
) -> Batch:
    clips, length = videos.shape
    _, each, block = ids.shape
    tail = positions[:, -1:, None] + 1 + np.arange(block)  # [B, 1, block]
    tail = np.broadcast_to(tail, ids.shape).reshape(clips, -1)
    frames = torch.from_numpy(pixels).flatten(0, 1).permute(0, 3, 1, 2).float() / 255
    return Batch(
        pixels=(frames - _MEAN) / _STD,
        input_ids=torch.from_numpy(np.concatenate([videos, ids.reshape(clips, -1)], 1)),
        positions=torch.from_numpy(np.concatenate([positions, tail], 1)),
        labels=torch.from_numpy(np.concatenate([np.full_like(videos, IGNORE), labels.reshape(clips, -1)], 1)),
        mask=_block_mask(length, each, block),
        **{name: torch.from_numpy(values) for name, values in frame_labels.items()},
    )


def _label_frames(story: Story, numbers: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """What is to be read off every frame of a clip, by the names of `Batch`."""
    times = np.arange(len(numbers))
    names = np.array([(COLORS.index(card.color), SHAPES.index(card.shape)) for card in story.cards])  # [cards, 2]
    nothing = np.array([[len(COLORS), len(SHAPES)]])
    starts = np.array([card.start_seconds for card in story.cards])
    ends = np.array([card.end_seconds for card in story.cards])
    so_far = np.searchsorted(starts, times, side="right")  # [F]
    past = np.concatenate([nothing, nothing, names])  # [2 + cards, 2]; card n, from 1, is past[n + 1]
    last = past[so_far + 1]
    on_screen = (so_far > 0) & (times < ends[so_far - 1])
    appeared = np.ceil(starts).astype(np.int64)
    return {
        "shown": np.where(on_screen[:, None], last, nothing),
        "new": np.diff(so_far, prepend=0) > 0,
        "numbers": numbers,
        "so_far": so_far,
        "last": last,
        "before_last": past[np.maximum(so_far, 1)],
        "last_number": np.where(so_far > 0, numbers[appeared[so_far - 1]], IGNORE),
    }


def _positions(rng: np.random.Generator, owner: NDArray[np.int64]) -> NDArray[np.int64]:
    """Plain positions for most clips; for the rest a random start and random gaps between frames."""
    plain = np.arange(len(owner))
    if rng.random() < 0.7:
        return plain
    frames, length = int(owner[-1]) + 1, len(owner)
    spare = LONGEST_SPAN - length - 64
    extra = int(np.exp(rng.uniform(0.0, np.log(spare))))
    cuts = np.sort(rng.integers(0, extra + 1, size=frames))
    return plain + cuts[owner]


def _block_mask(video: int, blocks: int, block: int) -> torch.Tensor:
    length = video + blocks * block
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    number = torch.arange(blocks).repeat_interleave(block)
    mask[video:, video:] &= number[:, None] == number[None, :]
    return mask[None, None]
