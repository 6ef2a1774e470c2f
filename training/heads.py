"""Linear readings that teach during training and are thrown away after it.

Answers alone teach slowly: a step has hundreds of frames, but few questions about a shape or a number. So three places
are asked, for every frame: the picture's tokens as the vision tower hands them on, and the token that closes the
picture twice: after the first layers of the language model for what this frame shows, where later tokens can find it
in one look, and one layer before the end for what happened until now, which only frames that see their past can know.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import InternVLForConditionalGeneration, PreTrainedTokenizerFast

from statekv.evals.cards.world import COLORS, SHAPES
from training.batch import IGNORE, Batch

SUMMARY_LAYER = 2  # of 5: one layer to gather, one to compare with the frame before, the rest to answer
HISTORY_LAYER = 4  # two more: the newest card knows the one before it, and hands both on
_CARD = len(COLORS) + 1 + len(SHAPES) + 1  # with a name for "none"


class Heads(torch.nn.Module):
    """Card off the vision tokens; card, novelty, number off the closing token, and later the cards until now."""

    def __init__(self, model: InternVLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        self.closing_id = tokenizer.vocab["</img>"]
        embedding: Any = model.get_input_embeddings()
        hidden = embedding.embedding_dim
        self.picture = torch.nn.Linear(hidden * model.config.image_seq_length, _CARD)
        self.summary = torch.nn.Linear(hidden, _CARD + 2)
        self.number = torch.nn.Linear(hidden, hidden)
        self.history = torch.nn.Linear(hidden, 2 * _CARD + len(COLORS) + 1)
        self.history_number = torch.nn.Linear(hidden, hidden)

    def forward(
        self, pictures: torch.Tensor, hidden_states: tuple[torch.Tensor, ...], embedding: torch.Tensor, batch: Batch
    ) -> torch.Tensor:
        """The sum of the mean cross-entropies.

        Args:
            pictures: [B·F, tokens, hidden], what the vision tower hands on.
            hidden_states: [B, L, hidden] before each layer, and after the last.
            embedding: [vocabulary, hidden].
            batch: for the right answers.
        """
        closes = batch.input_ids == self.closing_id
        closing, later = hidden_states[SUMMARY_LAYER][closes], hidden_states[HISTORY_LAYER][closes]  # [B·F, hidden]
        card, new = self.summary(closing).float().split([_CARD, 2], dim=1)
        last, before_last, so_far = self.history(later).float().split([_CARD, _CARD, len(COLORS) + 1], dim=1)
        return (
            _names(self.picture(pictures.flatten(1)).float(), batch.shown)
            + _names(card, batch.shown)
            + F.cross_entropy(new, batch.new.long())
            + _number(self.number(closing), embedding, batch.numbers)
            + _names(last, batch.last)
            + _names(before_last, batch.before_last)
            + F.cross_entropy(so_far, batch.so_far)
            + _number(self.history_number(later), embedding, batch.last_number)
        )


def _names(logits: torch.Tensor, named: torch.Tensor) -> torch.Tensor:
    color, shape = logits.split([len(COLORS) + 1, len(SHAPES) + 1], dim=1)
    return F.cross_entropy(color, named[:, 0]) + F.cross_entropy(shape, named[:, 1])


def _number(read: torch.Tensor, embedding: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    known = numbers != IGNORE
    if not known.any():
        return read.new_zeros(()).float()
    return F.cross_entropy((read[known] @ embedding.T).float(), numbers[known])
