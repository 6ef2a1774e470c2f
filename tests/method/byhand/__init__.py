"""StateKV by hand: one plain layer loop in float64 over a model's own weights, heads and keys in Python lists.

Written from the paper's section 3 and the two architectures, sharing no line with the library. Token ids, vision
features and multi-axis positions come from the stock processor and the stock model, for the whole video at once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tests.tiny import Tiny

# (scores of each key, birth of each key, budget) → indices of those that stay.
Keep = Callable[[torch.Tensor, list[int], int], list[int]]


def best(scores: torch.Tensor, token_ids: list[int], budget: int) -> list[int]:
    """The keys with the highest scores."""
    return sorted(range(len(token_ids)), key=lambda j: -float(scores[j]))[:budget]


def newest(scores: torch.Tensor, token_ids: list[int], budget: int) -> list[int]:
    """The newest keys."""
    return sorted(range(len(token_ids)), key=lambda j: -token_ids[j])[:budget]


def always(first: int, rule: Keep) -> Keep:
    """Tokens born before `first` stay; `rule` chooses among the others."""

    def keep(scores: torch.Tensor, token_ids: list[int], budget: int) -> list[int]:
        fixed = [j for j, token in enumerate(token_ids) if token < first]
        free = [j for j, token in enumerate(token_ids) if token >= first]
        chosen = rule(scores[free], [token_ids[j] for j in free], budget - len(fixed))
        return fixed + [free[i] for i in chosen]

    return keep


@dataclass(frozen=True)
class Piece:
    """What enters at once: [T, hidden], [axes, T], and for each deepstack layer what is added to it [T, hidden]."""

    embeds: torch.Tensor
    positions: torch.Tensor
    added: list[torch.Tensor]


@dataclass
class Head:
    """What one key head of one layer remembers."""

    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    all_keys: list[torch.Tensor] = field(default_factory=list)
    all_values: list[torch.Tensor] = field(default_factory=list)

    def keep_only(self, stay: list[int]) -> None:
        """Carry these keys alone, told by their place."""
        self.keys = [self.keys[j] for j in stay]
        self.values = [self.values[j] for j in stay]
        self.token_ids = [self.token_ids[j] for j in stay]


class ByHand:
    """A language model that is stepped by hand.

    Args:
        made: whose weights.
        budget: keys kept per layer and head.
        keep: who stays.
        horizon: length that dynamic NTK is scaled for.
    """

    def __init__(self, made: Tiny, budget: int, keep: Keep = best, horizon: int = 0) -> None:
        self.config = made.config.get_text_config()
        self.budget, self.keep = budget, keep
        self.weights: dict[str, torch.Tensor] = {
            name: value.double() for name, value in made.language_model.state_dict().items()
        }
        self.heads, self.kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        self.dim: int = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.heads
        self.frequencies = self._frequencies(horizon)
        self.memory = [[Head() for _ in range(self.kv_heads)] for _ in range(self.config.num_hidden_layers)]

    def step(self, piece: Piece) -> torch.Tensor:
        """[T, hidden], the last layer's normalised states."""
        x = piece.embeds.double()
        angles = self._angles(piece.positions)
        for layer, heads in enumerate(self.memory):
            x = x + self._attention(layer, heads, self._norm(x, f"layers.{layer}.input_layernorm"), angles)
            y = self._norm(x, f"layers.{layer}.post_attention_layernorm")
            x = x + self._mlp(layer, y)
            if layer < len(piece.added):
                x = x + piece.added[layer].double()
        return self._norm(x, "norm")

    def kept(self, layer: int) -> torch.Tensor:
        """[1, kv_heads, length], ascending; -1 in front where heads hold fewer than others."""
        held = [sorted(head.token_ids) for head in self.memory[layer]]
        most = max(map(len, held))
        return torch.tensor([[[-1] * (most - len(tokens)) + tokens for tokens in held]], dtype=torch.int32)

    def detailed(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of every token, each [1, kv_heads, tokens, head_dim]."""
        keys = torch.stack([torch.stack(head.all_keys) for head in self.memory[layer]])
        values = torch.stack([torch.stack(head.all_values) for head in self.memory[layer]])
        return keys[None].float(), values[None].float()

    def _attention(self, layer: int, heads: list[Head], x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        own, group = len(x), self.heads // self.kv_heads
        queries = self._rotate(self._project(layer, "q", x), angles)  # [heads, T, D]
        keys = self._rotate(self._project(layer, "k", x), angles)
        values = self._project(layer, "v", x)
        mixed = torch.empty(self.heads, own, self.dim, dtype=torch.float64)
        received, times = [], self._times(layer)
        for h, head in enumerate(heads):
            past = len(head.keys)
            head.token_ids.extend(range(len(head.all_keys), len(head.all_keys) + own))
            for mine, fresh in ((head.keys, keys[h]), (head.values, values[h])):
                mine.extend(fresh)
            head.all_keys.extend(keys[h])
            head.all_values.extend(values[h])
            seen = [*list(range(past)) * times, *range(past, past + own)]  # former keys as often as they count
            visible_keys = torch.stack([head.keys[j] for j in seen])
            visible_values = torch.stack([head.values[j] for j in seen])
            scores = torch.zeros(past + own, dtype=torch.float64)
            for g in range(h * group, (h + 1) * group):
                products = queries[g] @ visible_keys.T / self.dim**0.5  # [own, times * past + own]
                products = products + self._added(layer, h)
                for i in range(own):
                    products[i, times * past + i + 1 :] = -torch.inf
                attention = torch.exp(products - products.amax(-1, keepdim=True))
                attention = attention / attention.sum(-1, keepdim=True)
                mixed[g] = attention @ visible_values
                scores.index_add_(0, torch.tensor(seen), attention.sum(0))
            received.append(scores)
        self._evict_layer(layer, received)
        return self._linear(mixed.transpose(0, 1).reshape(own, -1), f"layers.{layer}.self_attn.o_proj")

    def _times(self, layer: int) -> int:
        """How often a former key counts."""
        return 1

    def _added(self, layer: int, h: int) -> torch.Tensor:
        """To the logits of each key."""
        return torch.zeros(1, dtype=torch.float64)

    def _evict_layer(self, layer: int, received: list[torch.Tensor]) -> None:
        for h, scores in enumerate(received):
            self._evict(layer, h, scores)

    def _evict(self, layer: int, h: int, scores: torch.Tensor) -> None:
        head = self.memory[layer][h]
        if len(head.token_ids) > self.budget:
            head.keep_only(self.keep(scores, head.token_ids, self.budget))

    def _project(self, layer: int, name: str, x: torch.Tensor) -> torch.Tensor:
        projected = self._linear(x, f"layers.{layer}.self_attn.{name}_proj")
        projected = projected.view(len(x), -1, self.dim).transpose(0, 1)
        norm = f"layers.{layer}.self_attn.{name}_norm"
        return self._norm(projected, norm) if f"{norm}.weight" in self.weights else projected

    def _mlp(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        name = f"layers.{layer}.mlp"
        if f"{name}.experts.down_proj" in self.weights:
            return torch.stack([self._experts(name, token) for token in x])
        gate, up = (self._linear(x, f"{name}.{each}_proj") for each in ("gate", "up"))
        return self._linear(gate * torch.sigmoid(gate) * up, f"{name}.down_proj")

    def _experts(self, name: str, token: torch.Tensor) -> torch.Tensor:
        """[hidden] through the few experts that suit it best, mixed in proportion."""
        shares = torch.softmax(self.weights[f"{name}.gate.weight"] @ token, dim=0)
        chosen = shares.topk(self.config.num_experts_per_tok)
        mixed = torch.zeros_like(token)
        for share, expert in zip(chosen.values / chosen.values.sum(), chosen.indices.tolist(), strict=True):
            gate, up = (self.weights[f"{name}.experts.gate_up_proj"][expert] @ token).chunk(2)
            mixed += share * (self.weights[f"{name}.experts.down_proj"][expert] @ (gate * torch.sigmoid(gate) * up))
        return mixed

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        product = x @ self.weights[f"{name}.weight"].T
        bias = self.weights.get(f"{name}.bias")
        return product if bias is None else product + bias

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        size = (x.square().mean(-1, keepdim=True) + float(self.config.rms_norm_eps)).sqrt()
        return x / size * self.weights[f"{name}.weight"]

    def _frequencies(self, horizon: int) -> torch.Tensor:
        rope = self.config.rope_parameters
        theta, trained = rope["rope_theta"], self.config.max_position_embeddings
        if rope["rope_type"] == "dynamic" and horizon > trained:
            stretch = rope["factor"] * horizon / trained - (rope["factor"] - 1)
            theta = theta * stretch ** (self.dim / (self.dim - 2))
        return torch.tensor([theta ** (-2 * i / self.dim) for i in range(self.dim // 2)], dtype=torch.float64)

    def _angles(self, positions: torch.Tensor) -> torch.Tensor:
        """[T, head_dim / 2]; three axes take turns, time, rows, columns, time …, or have a block each."""
        axes = [0] * (self.dim // 2)
        if len(positions) == 3 and not self.config.rope_parameters.get("mrope_interleaved"):
            time, rows, columns = self.config.rope_parameters["mrope_section"]
            axes = [0] * time + [1] * rows + [2] * columns
        elif len(positions) == 3:
            _, rows, columns = self.config.rope_parameters["mrope_section"]
            for turn in range(rows):
                axes[3 * turn + 1] = 1
            for turn in range(columns):
                axes[3 * turn + 2] = 2
        return positions.double()[axes].T * self.frequencies

    def _rotate(self, x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        left, right = x.chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


@torch.no_grad()
def pieces_of(made: Tiny, inputs: dict[str, Any], prefix: int) -> list[Piece]:
    """A conversation about one video, cut behind `prefix` tokens and behind every end of a picture.

    The last piece is the question.
    """
    model: Any = made.model
    ids = inputs["input_ids"]
    embeds = model.get_input_embeddings()(ids)[0].double()
    added: list[torch.Tensor] = []
    if made.family == "internvl":
        spots = ids[0] == made.config.image_token_id
        features = model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True).pooler_output
        embeds[spots] = features.flatten(0, 1).double()
        positions = torch.arange(ids.shape[1])[None]
    elif made.family == "eagle2_5":
        spots = ids[0] == made.config.image_token_index
        embeds[spots] = model.extract_feature(inputs["pixel_values"]).flatten(0, 1).double()
        positions = torch.arange(ids.shape[1])[None]
    elif made.family == "llava_onevision":
        spots = ids[0] == made.config.video_token_id
        features = model.get_video_features(inputs["pixel_values_videos"], return_dict=True).pooler_output[0]
        newline = model.model.image_newline[None]  # some versions of transformers hand it out with the features
        embeds[spots] = torch.cat([features, newline])[: int(spots.sum())].double()
        positions = torch.arange(ids.shape[1])[None]
    else:
        spots = ids[0] == made.config.video_token_id
        grid = inputs["video_grid_thw"]
        seen = model.model.get_video_features(inputs["pixel_values_videos"], grid, return_dict=True)
        embeds[spots] = joined(seen.pooler_output).double()
        for feature in getattr(seen, "deepstack_features", None) or ():
            added.append(torch.zeros_like(embeds))
            added[-1][spots] = joined(feature).double()
        known = {name: inputs[name] for name in ("mm_token_type_ids", "second_per_grid_ts") if name in inputs}
        positions = model.model.get_rope_index(ids, video_grid_thw=grid, **known)[0][:, 0]
    ends = _ends(made, inputs, spots)
    cuts = [0, prefix, *ends, ids.shape[1]]
    return [Piece(embeds[a:b], positions[:, a:b], [layer[a:b] for layer in added]) for a, b in itertools.pairwise(cuts)]


def _ends(made: Tiny, inputs: dict[str, Any], spots: torch.Tensor) -> list[int]:
    """Where each step ends: behind an end token that follows a picture, or where bare pictures of one size do."""
    ids, where = inputs["input_ids"][0].tolist(), spots.nonzero()[:, 0].tolist()
    if made.family in ("qwen2_5_vl", "llava_onevision"):
        qwen = made.family == "qwen2_5_vl"
        steps = int(inputs["video_grid_thw"][0, 0]) if qwen else inputs["pixel_values_videos"].shape[1]
        each = len(where) // steps  # LLaVA's newline is left over
        return [where[0] + (step + 1) * each for step in range(steps)]
    end = made.tokenizer.convert_tokens_to_ids("<|vision_end|>" if made.family == "qwen3_vl" else "</img>")
    # Qwen3-VL's template writes one more end token behind the last step.
    return [i + 1 for i in range(1, len(ids)) if ids[i] == end and spots[i - 1]]


def joined(features: Any) -> torch.Tensor:
    """[n, hidden] of all pictures; versions of transformers differ in whether they hand out one tensor or a tuple."""
    return features if isinstance(features, torch.Tensor) else torch.cat(tuple(features))


_WORD = 2**64 - 1


class ByHandDials(ByHand):
    """A language model stepped by hand, whose first piece is the prefix and whose others are steps.

    Args:
        arguments: of `ByHand`.
        decay, value_norms, pin_newest, coverage: as in `Config`.
        layer_slope: likewise; one that leaves every layer a whole number of keys.
        seed: of the sample.
    """

    def __init__(
        self,
        *arguments: Any,
        decay: float = 0.0,
        value_norms: bool = False,
        layer_slope: float = 0.0,
        pin_newest: int = 0,
        coverage: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(*arguments)
        self.decay, self.value_norms = decay, value_norms
        last = len(self.memory) - 1
        line = [self.budget * (1 + layer_slope - 2 * layer_slope * layer / last) for layer in range(last + 1)]
        self.budgets = [round(share) for share in line]
        assert line == pytest.approx(self.budgets)
        self.pin_newest, self.coverage, self.seed = pin_newest, coverage, seed
        self.starts: list[int] = []  # first token of each step
        self.scores: dict[tuple[int, int], dict[int, float]] = {}  # of each layer and head, by token

    def step(self, piece: Piece) -> torch.Tensor:
        seen = len(self.memory[0][0].all_keys)
        if seen:
            self.starts.append(seen)
        return super().step(piece)

    def _evict(self, layer: int, h: int, scores: torch.Tensor) -> None:
        head, budget = self.memory[layer][h], self.budgets[layer]
        former = self.scores.get((layer, h), {})
        now = zip(head.token_ids, scores.tolist(), strict=True)
        total = {token: score + self.decay * former.get(token, 0.0) for token, score in now}
        if len(head.token_ids) > budget:
            worth = dict(total)
            if self.value_norms:
                for token, value in zip(head.token_ids, head.values, strict=True):
                    worth[token] *= math.sqrt(sum(x * x for x in value.tolist()))
            sure = self._sample(layer, h, round(self.coverage * budget)) | self._newest(layer)
            assert sure <= set(head.token_ids)
            free = sorted(set(head.token_ids) - sure, key=lambda token: -worth[token])
            kept = sure | set(free[: budget - len(sure)])
            head.keep_only([j for j, token in enumerate(head.token_ids) if token in kept])
        self.scores[layer, h] = {token: total[token] for token in head.token_ids}

    def _newest(self, layer: int) -> set[int]:
        """Tokens of the newest steps, the one that has just been attended among them."""
        steps = self.starts[-self.pin_newest :] if self.pin_newest else []
        return set(range(steps[0], len(self.memory[layer][0].all_keys))) if steps else set()

    def _sample(self, layer: int, h: int, size: int) -> set[int]:
        """The tokens of the whole stream with the highest lots."""
        tokens = range(len(self.memory[layer][h].all_keys))
        return set(sorted(tokens, key=lambda token: -lot(token, layer, h, self.seed))[:size])


def lot(token: int, layer: int, h: int, seed: int, draw: int = 0) -> int:
    """splitmix64 of what tells one token, layer, head, seed and draw from another."""
    bits = (token + (h << 34)) ^ ((layer * 0x9E3779B1 + seed * 0x85EBCA77) % 2**62)
    bits = bits + draw * 0x9E3779B1 & _WORD
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB & _WORD
    return bits >> 11
