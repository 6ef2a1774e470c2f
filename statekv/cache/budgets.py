"""How a carried cache's tokens are shared out among the layers."""

from __future__ import annotations

import math


def layer_budgets(budget: int, layers: int, slope: float) -> list[int]:
    """Tokens of each layer, along a line from the first to the last, `layers` · `budget` in all.

    A linear decline is PyramidKV's (arXiv 2406.02069). StateKV's figure 6 is why one may want it: the first layers
    spread their attention over the most keys.

    Args:
        budget: mean tokens of a layer.
        slope: the first layer gets `budget` · (1 + slope), the last `budget` · (1 - slope), between -1 and 1; 0 gives
            every layer the same.
    """
    if layers == 1:
        return [budget]
    line = [budget * (1 + slope * (1 - 2 * layer / (layers - 1))) for layer in range(layers)]
    whole = [math.floor(share) for share in line]
    largest_rests = sorted(range(layers), key=lambda layer: whole[layer] - line[layer])
    for layer in largest_rests[: layers * budget - sum(whole)]:
        whole[layer] += 1
    return whole
