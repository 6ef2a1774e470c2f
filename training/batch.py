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

from statekv.demo.render import render
from statekv.demo.world import COLORS, FIRST_TEST_SEED, SHAPES, Question, Story, questions, write_story
from training.model import PICTURE, TOKENS_PER_FRAME

IGNORE = -100
LONGEST_SPAN = 32768  # positions
LONG_CLIP = 24  # frames
_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
_STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


@dataclass(frozen=True)
class Batch:
    """pixels [B·F, 3, P, P] · input_ids, positions, labels [B, L] int64 · mask [1, 1, L, L] bool (True = may see).

    shown: [B·F, 2] int64, colour and shape of the card in each picture, behind the last name where there is none.
    new: [B·F] bool, whether the picture is the first with its card.
    numbers: [B·F] int64, the token of each frame's number, IGNORE where the layout has none.
    """

    pixels: torch.Tensor
    shown: torch.Tensor
    new: torch.Tensor
    numbers: torch.Tensor
    input_ids: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor


class BatchMaker:
    """Makes batches out of a seed; nothing is stored, the world is endless.

    Long clips come few at a time and are asked twice as many questions.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, questions_per_clip: int = 8) -> None:
        self.tokenizer = tokenizer
        self.questions_per_clip = questions_per_clip

    def make(self, rng: np.random.Generator, clips: int, frames: int) -> Batch:
        """A batch of `clips` clips of `frames` frames, in one prompt layout; deterministic in `rng`."""
        layout = "release" if rng.random() < 0.2 else "hf"
        each = self.questions_per_clip * (2 if frames >= LONG_CLIP else 1)
        pixels, shown, numbers, videos, positions, asked = [], [], [], [], [], []
        for _ in range(clips):
            story = write_story(int(rng.integers(FIRST_TEST_SEED)), float(frames))
            pixels.append(render(story, np.arange(frames, dtype=np.float64), PICTURE))
            shown.append(_shown(story, frames))
            first_label = 1 if rng.random() < 0.6 else int(rng.integers(1, 999 - frames))
            numbers.append(self._numbers(layout, frames, first_label))
            video, owner = self._video_tokens(layout, frames, first_label)
            videos.append(video)
            positions.append(_positions(rng, owner))
            asked.append([self._ask(q, layout, first_label) for q in self._choose(rng, story, layout, each)])
        ids, labels = self._blocks(asked, each)
        return _assemble(
            np.stack(pixels),
            np.concatenate(shown),
            np.concatenate(numbers),
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
        pool = [q for q in questions(story, rng, per_kind=3) if layout == "hf" or q.kind != "when"]
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
    shown: NDArray[np.int64],
    numbers: NDArray[np.int64],
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
        (frames - _MEAN) / _STD,
        torch.from_numpy(shown[:, :2]),
        torch.from_numpy(shown[:, 2]).bool(),
        torch.from_numpy(numbers),
        torch.from_numpy(np.concatenate([videos, ids.reshape(clips, -1)], 1)),
        torch.from_numpy(np.concatenate([positions, tail], 1)),
        torch.from_numpy(np.concatenate([np.full_like(videos, IGNORE), labels.reshape(clips, -1)], 1)),
        _block_mask(length, each, block),
    )


def _shown(story: Story, frames: int) -> NDArray[np.int64]:
    """[F, 3]: colour and shape in each frame, as indices, and 1 where a card shows for the first time."""
    found = np.tile(np.array([len(COLORS), len(SHAPES), 0]), (frames, 1))
    times = np.arange(frames)
    for card in story.cards:
        visible = (times >= card.start_seconds) & (times < card.end_seconds)
        found[visible, :2] = COLORS.index(card.color), SHAPES.index(card.shape)
        found[np.argmax(visible), 2] |= visible.any()
    return found


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
