"""How far a benchmark's figure can be trusted: a bootstrap over videos.

Questions of one video share its frames, and a headline may be a mean of means, so that neither the questions'
number nor a normal approximation tells: whole videos are drawn, with replacement, and the headline is computed anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Rows = Sequence[Mapping[str, Any]]

_DRAWS = 1000
_SEED = 0  # the same videos are drawn for every method


def interval(
    rows: Mapping[str, Rows], figure: Callable[[Rows], float], other: Mapping[str, Rows] | None = None
) -> tuple[float, float]:
    """95 % of the resampled figures, or of its differences to another's, lie between these two.

    Args:
        rows: of each video.
        figure: of rows.
        other: of the same videos; their figure is subtracted, video by video the same ones drawn.

    Returns:
        NaN twice with fewer than two videos.
    """
    names = sorted(rows)
    if len(names) < 2:
        return math.nan, math.nan
    rng = np.random.default_rng(_SEED)
    found = []
    for drawn in rng.integers(len(names), size=(_DRAWS, len(names))):
        taken = [names[index] for index in drawn]
        value = figure([row for name in taken for row in rows[name]])
        if other is not None:
            value -= figure([row for name in taken for row in other[name]])
        found.append(value)
    low, high = np.nanquantile(found, (0.025, 0.975))
    return float(low), float(high)
