"""Policies by hand: what each says of a key, in Python lists, for the layer loop of `byhand`."""

from __future__ import annotations

import math
from typing import Any

import torch

from tests.method.byhand import ByHand, Piece, lot


class ByHandTokens(ByHand):
    """As `ByHand`, with keys ranked by what a policy says of each; the first `sinks` tokens stay.

    Args:
        arguments: of `ByHand`.
        sinks: how many.
        parameters: of the policy.
    """

    def __init__(self, *arguments: Any, sinks: int = 0, **parameters: Any) -> None:
        super().__init__(*arguments)
        self.sinks, self.parameters = sinks, parameters
        self.first_own = 0
        self.former: dict[tuple[int, int], dict[int, float]] = {}  # of each layer and head, by token

    def step(self, piece: Piece) -> torch.Tensor:
        self.first_own = len(self.memory[0][0].all_keys)
        return super().step(piece)

    def worth(self, layer: int, h: int, scores: list[float]) -> list[float]:
        """Of each key of a head; the highest stay."""
        raise NotImplementedError

    def _evict_layer(self, layer: int, received: list[torch.Tensor]) -> None:
        worth = [self.worth(layer, h, scores.tolist()) for h, scores in enumerate(received)]
        for head, ranks in zip(self.memory[layer], worth, strict=True):
            if len(head.token_ids) > self.budget:
                order = sorted(range(len(ranks)), key=lambda j: (head.token_ids[j] >= self.sinks, -ranks[j]))
                head.keep_only(order[: self.budget])


class ByHandRandom(ByHandTokens):
    """Each token has one lot for life."""

    def worth(self, layer: int, h: int, scores: list[float]) -> list[float]:
        seed = self.parameters["seed"]
        return [lot(token, layer, h, seed) for token in self.memory[layer][h].token_ids]


class ByHandStochastic(ByHandTokens):
    """A key is drawn with odds of its attention to the power of 1 / temperature, anew in each step."""

    def worth(self, layer: int, h: int, scores: list[float]) -> list[float]:
        seed, temperature = self.parameters["seed"], self.parameters["temperature"]
        found = []
        for token, score in zip(self.memory[layer][h].token_ids, scores, strict=True):
            u = min(max(lot(token, layer, h, seed, self.first_own) / 2**53, 1e-12), 1 - 1e-12)
            found.append(math.log(max(score, 1e-30)) / temperature - math.log(-math.log(u)))
        return found


class ByHandKeyNorm(ByHandTokens):
    """The shortest keys, all heads together."""

    def worth(self, layer: int, h: int, scores: list[float]) -> list[float]:
        heads = self.memory[layer]
        assert all(head.token_ids == heads[0].token_ids for head in heads)
        squares = [sum(float(head.keys[j].square().sum()) for head in heads) for j in range(len(scores))]
        return [-square for square in squares]


class ByHandAccumulated(ByHandTokens):
    """Attention of all steps so far: added up with a decay, or the most of it."""

    def worth(self, layer: int, h: int, scores: list[float]) -> list[float]:
        decay, maximum = self.parameters["decay"], self.parameters["maximum"]
        former = self.former.setdefault((layer, h), {})
        for token, score in zip(self.memory[layer][h].token_ids, scores, strict=True):
            before = decay * former.get(token, 0.0)
            former[token] = max(before, score) if maximum else before + score
        return [former[token] for token in self.memory[layer][h].token_ids]


class ByHandCaote(ByHandTokens):
    """How far the mixed value moves if one key is left out and the others take over its share."""

    def worth(self, layer: int, h: int, scores: list[float]) -> list[float]:
        values, whole = self.memory[layer][h].values, sum(scores)
        shares = [score / whole for score in scores]
        mixed = torch.stack([share * value for share, value in zip(shares, values, strict=True)]).sum(0)
        found = []
        for share, value in zip(shares, values, strict=True):
            without = (mixed - share * value) / (1 - share)
            found.append(float((without - mixed).norm()))
        return found


class ByHandAdaKV(ByHandTokens):
    """The best keys of all heads together, so many for sure in each head, and never more than so many."""

    def _evict_layer(self, layer: int, received: list[torch.Tensor]) -> None:
        heads = self.memory[layer]
        if len(heads[0].all_keys) <= self.budget:
            return
        floor, most = (int(self.parameters[name] * self.budget) for name in ("floor", "most"))
        ranked = [sorted(range(len(s)), key=lambda j, s=s: -float(s[j])) for s in received]  # type: ignore[misc]
        stay = [set(order[:floor]) for order in ranked]
        others = [(float(received[h][j]), h, j) for h, order in enumerate(ranked) for j in order[floor:]]
        for _, h, j in sorted(others, reverse=True):
            if sum(map(len, stay)) < self.budget * len(heads) and len(stay[h]) < most:
                stay[h].add(j)
        for head, chosen in zip(heads, stay, strict=True):
            head.keep_only(sorted(chosen))


class ByHandDoubled(ByHandTokens):
    """Even tokens before odd ones, by attention; what has been kept counts twice from then on."""

    def worth(self, layer: int, h: int, scores: list[float]) -> list[float]:
        tokens = self.memory[layer][h].token_ids
        return [score + 1000 * (token % 2 == 0) for token, score in zip(tokens, scores, strict=True)]

    def _times(self, layer: int) -> int:
        return 2 if len(self.memory[layer][0].all_keys) > self.budget else 1


class ByHandWeighted(ByHandTokens):
    """A priority sample, in which a kept key counts as often as it stands for keys; the first `sinks` always stay."""

    def __init__(self, *arguments: Any, **parameters: Any) -> None:
        super().__init__(*arguments, **parameters)
        self.logs: dict[tuple[int, int], dict[int, float]] = {}  # of each layer and head, by token

    def _added(self, layer: int, h: int) -> torch.Tensor:
        logs = self.logs.get((layer, h), {})
        return torch.tensor([logs.get(token, 0.0) for token in self.memory[layer][h].token_ids], dtype=torch.float64)

    def sizes(self, layer: int, h: int, scores: list[float]) -> list[float]:
        """Of each key: what each query gave it that saw it; or how far the mixed value moves without it."""
        head, whole = self.memory[layer][h], sum(scores)
        own = len(head.all_keys) - self.first_own
        seen_by = [min(own, len(head.all_keys) - token) for token in head.token_ids]
        each = [score / queries for score, queries in zip(scores, seen_by, strict=True)]
        if not self.parameters["output_error"]:
            return each
        mixed = torch.stack([s / whole * value for s, value in zip(scores, head.values, strict=True)]).sum(0)
        found = []
        for score, value in zip(each, head.values, strict=True):
            share = score / (self.heads // self.kv_heads)
            found.append(share / (1 - share) * float((value - mixed).norm()))
        return found

    def _evict_layer(self, layer: int, received: list[torch.Tensor]) -> None:
        for h, scores in enumerate(received):
            head, logs = self.memory[layer][h], self.logs.setdefault((layer, h), {})
            if len(head.token_ids) <= self.budget:
                continue
            size = dict(zip(head.token_ids, self.sizes(layer, h, scores.tolist()), strict=True))
            priority = {
                token: s / (lot(token, layer, h, self.parameters["seed"], self.first_own) / 2**53)
                for token, s in size.items()
            }
            order = sorted(head.token_ids, key=lambda token: (token >= self.sinks, -priority[token]))
            kept, dropped = order[: self.budget], order[self.budget :]
            line = max(priority[token] for token in dropped)
            for token in kept[self.sinks :]:
                gained = math.log(max(1.0, line / size[token]))
                logs[token] = min(logs.get(token, 0.0) + gained, self.parameters["cap"])
            head.keep_only([j for j, token in enumerate(head.token_ids) if token in kept])
