"""From the setting `carry` and its dials to the policy of a stream; one of the user's own is not taken on trust."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch

from statekv.cache.policies.base import LOG_WEIGHTS, Candidates, Policy
from statekv.cache.policies.wrappers import IMPORTANCE, Covered, Decayed, Noted, Pinned, Sloped, ValueNorms, Wrapper
from statekv.config import CARRIES, Config, check_attention
from statekv.config.spelling import load_named
from statekv.errors import ConfigError, PolicyError, StateKVError, kind_of

_OWN_KEYS = 16  # of the step of a trial
_TRIED_BUDGET = 4096  # at most: a policy may count on its budget, but a trial should take no time


def policy_of(config: Config, pinned: int = 0) -> Policy:
    """The policy of a stream, with everything that the configuration puts around it.

    Args:
        pinned: tokens of the prefix that stay.

    Raises:
        ConfigError: there is no such policy, or it does not go with the dials.
        PolicyError: what a policy of the user's own declares cannot be kept.
    """
    c, found = config, load_named(config.carry, CARRIES, "`carry`", Policy)
    sinks, ours = found.sinks if c.sinks is None else c.sinks, type(found).__module__.startswith("statekv.")
    if "seed" in getattr(found, "__dataclass_fields__", ()) and found.seed is None:
        found = replace(found, seed=c.seed)
    if not found.needs_attention:
        check_attention(c)
    if sinks and sinks >= c.budget:
        rule = f"`carry` {c.carry!r} keeps {sinks} sinks, which fill a `budget` of {c.budget}"
        raise ConfigError(rule, "raise `budget` or lower `sinks`")
    policy: Policy = found if ours else Checked(found)
    if c.decay:
        policy = Decayed(policy, c.decay)
    elif c.memory is not None:
        policy = Noted(policy)
    if c.value_norms:
        policy = ValueNorms(policy)
    if c.coverage:
        policy = Covered(policy, c.coverage, pinned, c.seed)
    if c.layer_slope:
        policy = Sloped(policy, c.layer_slope)
    return Pinned(policy, max(pinned, sinks))


class Checked(Wrapper):
    """A policy of the user's own: what it answers is looked at, and once in each layer whether it changed its inputs.

    Raises:
        PolicyError: what it declares is not what it does, or cannot be kept; in a step: it fails, answers something
            else than a number below infinity for each key, on the keys' device, or changes what it is shown.
    """

    def __init__(self, inner: Policy) -> None:
        super().__init__(inner)
        self._name = type(inner).__name__
        self._looked_at: set[int] = set()
        if type(inner).log_weights is not Policy.log_weights and not inner.weighs:
            self._refuse("has log_weights, but does not say so", "set weighs = True")
        if not isinstance(inner.state, Mapping):
            self._refuse(f"declares its state as {kind_of(inner.state)}", "give a dict, from name to first value")
        for name, value in inner.state.items():
            if name in (LOG_WEIGHTS, IMPORTANCE) or not isinstance(name, str):
                self._refuse(f"declares the state {name!r}, which is not its own", "choose another name")
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                self._refuse(
                    f"declares the state {name!r} with {value!r}", "give the number that a new key begins with"
                )

    def score(self, candidates: Candidates) -> torch.Tensor:
        first = candidates.layer not in self._looked_at
        before, state = _shown(candidates) if first else [], dict(candidates.state)
        found = self._numbers("scores", self._asked("score", lambda: self.inner.score(candidates)), candidates)
        for name, tensor in state.items():
            if candidates.state.get(name) is not tensor:
                self._refuse(
                    f"put something else in place of its state {name!r}", "change it in place: tensor.copy_(…)"
                )
        if first:
            self._looked_at.add(candidates.layer)
            for (what, then), (_, now) in zip(before, _shown(candidates), strict=True):
                if not torch.equal(then, now):
                    self._refuse(f"changed the {what} that it was shown", "work on a copy: tensor.clone()")
        return found

    def log_weights(self, candidates: Candidates, scores: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        found = self._asked("log_weights", lambda: self.inner.log_weights(candidates, scores, kept))
        return self._numbers("log weights", found, candidates)

    def layer_budgets(self, budget: int, layers: int) -> Sequence[int]:
        found: list[int] = self._asked("layer_budgets", lambda: list(self.inner.layer_budgets(budget, layers)))
        whole = all(isinstance(share, int) and share >= 1 for share in found)
        if len(found) != layers or not whole or sum(found) > layers * budget:
            rule = f"gave {found} as budgets of {layers} layers"
            self._refuse(rule, f"return {layers} whole numbers of at least 1, {layers * budget} in all")
        return found

    def slots(self, budget: int) -> int:
        found: int = self._asked("slots", lambda: self.inner.slots(budget))
        if not isinstance(found, int) or found < budget:
            self._refuse(f"gave {found!r} slots for a budget of {budget}", "return a whole number, no less than that")
        return found

    def _asked(self, what: str, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except (StateKVError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            told = " ".join(f"{type(error).__name__}: {error}".split())
            raise PolicyError(f"policy {self._name} failed in {what}: {told}", "mend the policy") from error

    def _numbers(self, what: str, found: object, candidates: Candidates) -> torch.Tensor:
        """What a policy has answered, if it is what it must be."""
        expected, layer = candidates.token_ids, candidates.layer
        if not isinstance(found, torch.Tensor) or not found.is_floating_point():
            kind = str(found.dtype) if isinstance(found, torch.Tensor) else type(found).__name__
            self._refuse(f"gave {what} of type {kind}", "return a tensor of floats")
        if found.shape != expected.shape:
            rule = f"gave {what} of shape {list(found.shape)} for keys of shape {list(expected.shape)}"
            self._refuse(rule, "return one number for each key: [streams, kv_heads, K]")
        if found.device != expected.device:
            self._refuse(f"gave {what} on {found.device} for keys on {expected.device}", "stay on the keys' device")
        # A recording cannot wait; the step before it has looked. NaN is not below infinity either.
        if not (found.is_cuda and torch.cuda.is_current_stream_capturing()) and not bool((found < float("inf")).all()):
            self._refuse(f"gave {what} that are NaN or infinite in layer {layer}", "return numbers below infinity")
        return found

    def _refuse(self, rule: str, way_out: str) -> NoReturn:
        raise PolicyError(f"policy {self._name} {rule}", way_out)


def tried(policy: Policy, budget: int, layers: int, keys: torch.Tensor) -> None:
    """Ask a policy of the user's own once about random keys, so that a wrong one is refused before a stream begins.

    Args:
        policy: with whatever is put around it; ours are trusted.
        keys: [any, kv_heads, any, head_dim], one of the model's tensors, of whose kind the keys are.

    Raises:
        PolicyError: as `Checked`.
    """
    while isinstance(policy, Wrapper) and not isinstance(policy, Checked):
        policy = policy.inner
    if not isinstance(policy, Checked) or keys.is_meta:
        return
    own = Checked(policy.inner)  # which has not looked at any layer yet
    share = min(_TRIED_BUDGET, *own.layer_budgets(budget, layers))
    slots = own.slots(share)
    # Where every step is judged, so are those before anything has to go.
    for length in (_OWN_KEYS, slots + _OWN_KEYS) if own.every_step else (slots + _OWN_KEYS,):
        candidates = _candidates(own, share, length, keys)
        scores = own.score(candidates)
        if own.weighs:
            own.log_weights(candidates, scores, torch.arange(length, device=keys.device).expand(scores.shape) < slots)


def _candidates(policy: Policy, budget: int, length: int, like: torch.Tensor) -> Candidates:
    """Random keys of two streams, the last of them a step's own."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, like.shape[1], length)
    keys, values = torch.randn(2, *shape, like.shape[-1], generator=generator).to(like)
    token_ids = torch.arange(length, dtype=torch.int32, device=like.device).expand(shape).clone()
    attention = torch.rand(shape, generator=generator).to(like.device) if policy.needs_attention else None
    begins = {**policy.state, **({LOG_WEIGHTS: 0.0} if policy.weighs else {})}
    state = {name: torch.full(shape, float(value), device=like.device) for name, value in begins.items()}
    return Candidates(0, budget, keys, values, token_ids, attention, length - _OWN_KEYS, state=state)


def _shown(candidates: Candidates) -> list[tuple[str, torch.Tensor]]:
    """Copies of what a policy must leave as it is."""
    shown = {
        "keys": candidates.keys,
        "values": candidates.values,
        "token numbers": candidates.token_ids,
        "attention": candidates.attention,
        "log weights": candidates.state.get(LOG_WEIGHTS),
    }
    return [(what, tensor.nan_to_num()) for what, tensor in shown.items() if tensor is not None]
