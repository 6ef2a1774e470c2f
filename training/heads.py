"""Linear readings that teach during training and are thrown away after it.

Answers alone teach slowly: a step has hundreds of frames, but few questions about a shape or a number. So two places
are asked, for every frame, for what the answers need: the picture's tokens as the vision tower hands them on, and the
token that closes the picture, after the first layers of the language model, where later tokens can find it in one look.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import InternVLForConditionalGeneration, PreTrainedTokenizerFast

from statekv.demo.world import COLORS, SHAPES
from training.batch import IGNORE, Batch

SUMMARY_LAYER = 2  # of 5: one layer to gather, one to compare with the frame before, the rest to answer


class Heads(torch.nn.Module):
    """Colour and shape off the vision tokens; colour, shape, novelty and the frame's number off its closing token."""

    def __init__(self, model: InternVLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        self.closing_id = tokenizer.vocab["</img>"]
        embedding: Any = model.get_input_embeddings()
        hidden = embedding.embedding_dim
        self.picture = torch.nn.Linear(hidden * model.config.image_seq_length, len(COLORS) + len(SHAPES) + 2)
        self.summary = torch.nn.Linear(hidden, len(COLORS) + len(SHAPES) + 2 + 2)
        self.number = torch.nn.Linear(hidden, hidden)

    def forward(
        self, pictures: torch.Tensor, closing: torch.Tensor, embedding: torch.Tensor, batch: Batch
    ) -> torch.Tensor:
        """The sum of the mean cross-entropies.

        Args:
            pictures: [B·F, tokens, hidden], what the vision tower hands on.
            closing: [B·F, hidden], the tokens behind the pictures, after SUMMARY_LAYER layers.
            embedding: [vocabulary, hidden].
            batch: for the right answers.
        """
        named = len(COLORS) + len(SHAPES) + 2
        summary = self.summary(closing).float()
        loss = _names(self.picture(pictures.flatten(1)).float(), batch) + _names(summary[:, :named], batch)
        loss = loss + F.cross_entropy(summary[:, named:], batch.new.long())
        numbered = batch.numbers != IGNORE
        if numbered.any():
            read = (self.number(closing[numbered]) @ embedding.T).float()
            loss = loss + F.cross_entropy(read, batch.numbers[numbered])
        return loss


def _names(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    color, shape = logits.split([len(COLORS) + 1, len(SHAPES) + 1], dim=1)
    return F.cross_entropy(color, batch.shown[:, 0]) + F.cross_entropy(shape, batch.shown[:, 1])
