"""FLOPs of a stream's steps through the language model, by formula."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from statekv.models.size import Size


@dataclass(frozen=True)
class Widths:
    """What the formula needs to know of a language model: equal decoder layers, grouped query heads, a gated MLP."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, text_config: Any) -> Widths:
        """Of transformers' configuration of a dense language model."""
        c = text_config
        head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        return cls(
            *(c.hidden_size, c.intermediate_size, c.num_hidden_layers),
            *(c.num_attention_heads, c.num_key_value_heads, head_dim),
        )


Stack = Widths | Size


def matrix_weights(stack: Stack) -> int:
    """Weights that are factors of a product with every token; norms and biases are not."""
    attention = 2 * stack.hidden * (stack.heads + stack.kv_heads) * stack.head_dim
    return stack.layers * (attention + 3 * stack.hidden * stack.intermediate)


def pairs_flops(stack: Stack, tokens: int, pairs: tuple[int, int], scored_products: int = 3) -> int:
    """FLOPs of all steps of a stream, as the sum of `step_flops`; pairs of queries and keys are those of steps that do
    not evict, and of those that do.
    """
    plain, evicting = pairs
    attention = 2 * stack.layers * stack.heads * stack.head_dim * (2 * plain + scored_products * evicting)
    return 2 * matrix_weights(stack) * tokens + attention


def step_flops(
    stack: Stack, steps: Iterable[int], budget: int | None = None, scored_products: int = 3
) -> Iterator[int]:
    """FLOPs of each step: products with the weights, and of every query with every key.

    As in `torch.utils.flop_counter`, masked pairs count and everything but products is free.

    Args:
        budget: carried keys at most; None carries all of them, as the stock model does.
        scored_products: products between queries and keys' side in a step that makes key scores: queries with keys,
            probabilities with values, and in two passes queries with keys once more. Other steps make two.

    Source: StateKV's step as in `ModelRunner.prefill`: only a step that evicts is scored.
    """
    carried = 0
    for tokens in steps:
        keys = carried + tokens
        evicts = budget is not None and keys > budget
        products = scored_products if evicts else 2
        attention = 2 * stack.layers * stack.heads * stack.head_dim * tokens * keys * products
        yield 2 * matrix_weights(stack) * tokens + attention
        carried = budget if evicts and budget is not None else keys
