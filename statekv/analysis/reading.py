"""Where a language model's attention goes in a text, and how long it stays there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from statekv.analysis.concentration import Concentration, Curves, layers_to_look_at
from statekv.config import Config
from statekv.errors import ConfigError
from statekv.models.families.text import TextModel
from statekv.runner.runner import ModelRunner

_LEAST = 3  # steps: one to be history, one to have a choice, one to choose again


@torch.inference_mode()
def read(
    model: TextModel,
    config: Config,
    ids: torch.Tensor,
    step: int,
    *,
    layers: Sequence[int] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Curves:
    """Read a text in steps, with full attention and by a rule side by side, and say where attention goes.

    Args:
        config: how the carried cache is chosen.
        ids: [1, tokens].
        step: tokens of a step.
        layers: indices of the layers to look at; None: all.
        on_step: called after each step with the tokens read.

    Raises:
        ConfigError: no such layer, too few steps, or a carry of all, which has no carried cache.
        HorizonError, MemoryLimitError: as `ModelRunner.enter`.
    """
    spec, tokens = model.kv_spec(), ids.shape[1]
    chosen = layers_to_look_at(layers, spec.layers, config)
    if tokens <= (_LEAST - 1) * step:
        rule = f"the text has {tokens} tokens, which are less than {_LEAST} steps of {step}"
        raise ConfigError(rule, "give a longer text, or shorter steps")
    runner = ModelRunner(model)
    horizon = config.horizon or max(model.trained_length, tokens)
    state, full = (runner.open(each, horizon, room=0) for each in (config, config.with_(carry="all")))
    carried, concentration = state.bounded, Concentration(chosen)
    assert carried is not None
    for start in range(0, tokens, step):
        segment = model.step(ids[:, start : start + step], start)
        if start:
            concentration.begin(start, {layer: carried.kept(layer)[0].long() for layer in chosen})
        runner.enter(full, segment, observer=concentration.observe if start else None)
        runner.enter(state, segment)
        if on_step is not None:
            on_step(state.tokens)
    return Curves(
        budget=config.budget,
        steps=-(-tokens // step),
        tokens=tokens,
        kv_heads=spec.kv_heads,
        shares=concentration.shares(),
    )
