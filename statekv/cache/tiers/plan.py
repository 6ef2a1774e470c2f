"""How a cap on a stream's memory is shared out: plain arithmetic, known before the first step enters."""

from __future__ import annotations

from dataclasses import dataclass

from statekv.cache.policies.base import Policy
from statekv.cache.spec import KVSpec
from statekv.cache.tiers import TIERS
from statekv.cache.tiers.base import GROUP, Tier
from statekv.config import WINDOWS, Config, bytes_of, told
from statekv.errors import ConfigError, MemoryLimitError
from statekv.ops.quantise import quantised_bytes

_STAGED = 4096  # tokens of one layer that an answer brings in at once where it sees all of them
_STAGED_SHARE = 1 / 16
_BLOCK_BYTES = 1 << 20  # of a block of steps, where one step alone is smaller
_RECENT_SHARE = 1 / 8
_MOST_BESIDE = 1 / 4  # for what is known of each step beside its keys
_NOTED_BYTES = 768  # of a step: where it lies and when it was, objects of Python's
_QUANTISED_SHARE = 3 / 4  # at most, of what is left for tokens
_LEAST_STEPS = 2  # held as they came
_SPARE_SHARE = 1 / 4  # of a window: tokens that nobody sees any more, before they are dropped together
_ROOMY_STEPS = 34  # before anything is left to quantised blocks, which should not be of one step each


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes and tokens of each part of `Config.memory`.

    Attributes:
        carried: bytes of the carried cache at its full size.
        shown: bytes that an answer copies out for itself.
        staged: tokens of one layer that it brings in at once where it sees all of them.
        recent: bytes of steps kept between questions.
        representatives: bytes of the steps' mean keys.
        notes: bytes of where each step lies, in the host's memory: counted where the caches lie there too.
        quantised: bytes of quantised blocks on the device.
        plain: tokens held as they came.
        answers: of these, tokens left to questions, their answers and frames that wait.
        most_steps: how many representatives and notes are good for; None: no limit.
        block_tokens: fewest tokens of a block, but for its last step's.
    """

    carried: int
    shown: int
    staged: int
    recent: int
    representatives: int
    notes: int
    quantised: int
    plain: int
    answers: int
    most_steps: int | None
    block_tokens: int

    def check_room(self, held: int, tokens: int) -> None:
        """Raise a MemoryLimitError unless a question and its answer fit beside the tokens that are held."""
        if held + tokens > self.plain:
            raise MemoryLimitError(
                f"{tokens} tokens of question and answer do not fit into the {self.plain - held} that memory leaves to "
                "them",
                "lower max_new_tokens, or open the stream with a larger memory",
            )


def spare_of(window: int) -> int:
    """Tokens that may lie before a window of so many which no answer can see any more."""
    return int(_SPARE_SHARE * window)


def window_tokens(window: int, step: int, room: int) -> int:
    """How many tokens are held at once where answers see a window of the newest (sinks included), and `room` is kept
    for a question and its answer.

    Args:
        step: tokens of the longest step; another one may wait while a question is answered.
    """
    return window + spare_of(window) + 2 * step + room


def step_bytes(spec: KVSpec, tokens: int, bits: int | None) -> int:
    """What a step of so many tokens takes in a block."""
    if bits is None:
        return tokens * spec.streams * spec.bytes_per_token
    g = spec
    return g.layers * quantised_bytes(tokens, bits, GROUP, g.streams, g.kv_heads, g.head_dim)


def plan(
    config: Config, spec: KVSpec, policy: Policy, prefix: int, step: int, room: int, id_bytes: int = 4
) -> MemoryPlan:
    """Share `config.memory` out, to the tokens that are always held (`prefix`), a question and its answer (`room`) and
    all the rest; the number of a carried token takes `id_bytes`.

    Args:
        step: tokens of the longest step.

    Raises:
        ConfigError: the cap is too small for steps of this length.
    """
    assert isinstance(config.memory, int)
    carried = _carried_bytes(config, spec, policy, step, id_bytes)
    found = _shared(config, spec, config.memory, carried, prefix, step, room)
    if found is None:
        raise ConfigError(
            f"memory is {told(config.memory)}, but a budget of {config.budget} and steps of {step} tokens need about "
            f"{_least(config, spec, config.memory, carried, prefix, step, room)}",
            "raise memory, or lower budget, retrieve, max_new_tokens or the video's resolution",
        )
    return found


def _least(config: Config, g: KVSpec, memory: int, carried: int, prefix: int, step: int, room: int) -> str:
    """An amount above this one that would do, also as it is told."""
    least = memory
    while True:
        least += max(1, least // 64)
        found = told(least)
        if found != told(memory) and _shared(config, g, bytes_of("memory", found), carried, prefix, step, room):
            return found


def _shared(
    config: Config, g: KVSpec, memory: int, carried: int, prefix: int, step: int, room: int
) -> MemoryPlan | None:
    token = g.streams * g.bytes_per_token
    answers = room + step
    layer_token = token // g.layers
    staged = min(_STAGED, max(step, int(_STAGED_SHARE * memory) // layer_token)) if _lower(config) else 0
    shown = 2 * staged * layer_token  # as they come in, and with each head's keys side by side
    recent, mean, most_steps = 0, 0, None
    noted = _NOTED_BYTES if g.devices[0].type == "cpu" else 0
    if config.recall == "retrieve":
        shown = (prefix + (config.retrieve + config.retrieve_newest) * step + answers) * token
        if config.retrieve_carried:
            shown += config.budget * token
        if _lower(config):
            recent = int(_RECENT_SHARE * memory)
        mean = 4 * g.layers * g.streams * g.kv_heads * g.head_dim  # float32
    if mean or noted:
        beyond = sum(caps_below(config).values())
        ever = 1 + int(1.25 * (memory + beyond) / step_bytes(g, step, config.bits))
        most_steps = min(ever, int(_MOST_BESIDE * memory) // (mean + noted))
    representatives, notes = (most_steps or 0) * mean, (most_steps or 0) * noted
    left = memory - carried - shown - recent - representatives - notes
    least, roomy = (prefix + answers + steps * step for steps in (_LEAST_STEPS, _ROOMY_STEPS))
    quantised = max(0, min(int(_QUANTISED_SHARE * left), left - roomy * token)) if config.bits is not None else 0
    plain = (left - quantised) // token
    if config.recall in WINDOWS:
        least = window_tokens(config.budget, step, room)
    if plain < least or (most_steps is not None and most_steps < _LEAST_STEPS):
        return None
    blocks = max(1, _BLOCK_BYTES // token)
    steps = (plain - prefix - answers) // 4  # a block should not be most of what is held
    parts = carried, shown, staged, recent, representatives, notes, quantised
    return MemoryPlan(*parts, plain, answers, most_steps, min(blocks, max(1, steps)))


def _carried_bytes(config: Config, g: KVSpec, policy: Policy, step: int, id_bytes: int) -> int:
    slots = sum(policy.slots(budget) + step for budget in policy.layer_budgets(config.budget, g.layers))
    beside = id_bytes + 4 * (len(policy.state) + policy.weighs)  # its token's number, and what the policy remembers
    return slots * g.streams * g.kv_heads * (2 * g.head_dim * g.dtype.itemsize + beside)


def caps_below(config: Config) -> dict[type[Tier], int]:
    """Bytes that the tiers below the device's memory may take."""
    caps = {kind: getattr(config, kind.setting) for kind in TIERS if kind.setting is not None}
    return {kind: cap for kind, cap in caps.items() if cap is not None}


def _lower(config: Config) -> bool:
    return config.bits is not None or bool(caps_below(config))
