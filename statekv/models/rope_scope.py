"""Holds a language model's rotary frequencies to one horizon while a stream runs through it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from statekv.errors import ModelError
from statekv.ops.rope import dynamic_ntk_frequencies


class RopeScope:
    """Frequencies of a rotary module for any horizon.

    transformers follows the longest position seen and changes a dynamic-NTK model's frequencies in mid-stream; keys
    rotated before and after do not match. Here the length is chosen once. Other kinds of RoPE do not depend on the
    length and are left alone.

    Args:
        rotary: the language model's `rotary_emb`.
        config: the language model's configuration.

    Raises:
        ModelError: a kind of RoPE that switches frequencies with the length and is not supported.
    """

    def __init__(self, rotary: torch.nn.Module, config: Any) -> None:
        self.rotary: Any = rotary
        self.kind = str(rotary.rope_type)
        self.trained_length = int(config.max_position_embeddings)
        self._config = config
        self._known: dict[tuple[int, torch.device], torch.Tensor] = {}
        if self.kind == "longrope":
            raise ModelError("the checkpoint's RoPE is 'longrope', which changes with the length", "use another one")

    def frequencies(self, horizon: int) -> torch.Tensor:
        """[head_dim / 2] float32 for a horizon, on the rotary module's device."""
        if self.kind != "dynamic":
            found: torch.Tensor = self.rotary.inv_freq
            return found
        device = self.rotary.inv_freq.device
        if (horizon, device) not in self._known:
            parameters = self._config.rope_parameters
            dim = getattr(self._config, "head_dim", None) or (
                self._config.hidden_size // self._config.num_attention_heads
            )
            self._known[horizon, device] = dynamic_ntk_frequencies(
                theta=parameters["rope_theta"],
                dim=int(dim * parameters.get("partial_rotary_factor", 1.0)),
                trained_length=self.trained_length,
                factor=parameters["factor"],
                horizon=horizon,
            ).to(device)
        return self._known[horizon, device]

    def angles(self, positions: torch.Tensor, horizon: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What the module turns keys by, without the factor that some kinds of RoPE put on top.

        Args:
            positions: [streams, T], or [3, streams, T] for multi-axis RoPE.
            horizon: positions that RoPE is scaled for.

        Returns:
            cos and sin [streams, T, head_dim], float32: of length 1, so that turning back is exact but for rounding.
        """
        with self.held(horizon):
            cos, sin = self.rotary(torch.empty(0, device=positions.device), positions)
        return cos / self.rotary.attention_scaling, sin / self.rotary.attention_scaling

    @contextmanager
    def held(self, horizon: int) -> Iterator[None]:
        """Inside, the module rotates by the horizon's frequencies; afterwards it is as it was found.

        One thread at a time: the module is shared by all streams of the model.
        """
        if self.kind != "dynamic":
            yield
            return
        before = self.rotary.inv_freq, self.rotary.rope_type
        self.rotary.inv_freq = self.frequencies(horizon)
        self.rotary.rope_type = "default"  # keeps transformers from following the positions
        try:
            yield
        finally:
            self.rotary.inv_freq, self.rotary.rope_type = before
