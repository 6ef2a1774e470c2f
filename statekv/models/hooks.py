"""Everything that touches transformers' insides: attention, rotary frequencies, and how `generate` chooses tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any
from weakref import WeakValueDictionary

import torch
from transformers import AttentionInterface, GenerationConfig, LogitsProcessorList, PreTrainedModel

from statekv.cache.view import View
from statekv.errors import ConfigError, ModelError
from statekv.ops import attention_with_key_scores
from statekv.ops.rope import dynamic_ntk_frequencies

NAME = "statekv"

# Told the index of a layer and the key scores of a segment in it, [streams, kv_heads, K] float32.
Observer = Callable[[int, torch.Tensor], None]


@dataclass(frozen=True)
class Pass:
    """One run through the language model, as its attention layers need to know it.

    Attributes:
        view: the cache that they attend to.
        evicting: whether each layer shrinks to its budget at once.
        scored: whether the eviction needs key scores.
        kernel: implementation of attention with key scores.
        score_every: score with every n-th query.
        observer: told every layer's key scores, which change nothing; None where nobody looks.
    """

    view: View
    evicting: bool
    scored: bool
    kernel: str
    score_every: int = 1
    observer: Observer | None = None


def attention_hook(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    statekv_pass: Pass | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend, and let the carried cache shrink at once, so that a layer's scores die with it.

    Args:
        module: transformers' attention layer; only its `layer_idx` is read.
        query: [streams, heads, T, head_dim].
        key, value: [streams, kv_heads, K, head_dim], carried and own, rotated.
        attention_mask: always None; the mask is prefix-causal and made here.
        statekv_pass: handed through the language model's keyword arguments.

    Returns:
        [streams, T, heads, head_dim], and None for the attention weights.
    """
    if statekv_pass is None:
        # Without a mask of ours, a padded batch would be attended to as if the padding were text.
        rule = "this model's attention belongs to statekv and was called from outside"
        raise ModelError(rule, "use statekv.generate, or model.set_attn_implementation('sdpa') to take it back")
    run, layer, scores = statekv_pass, int(module.layer_idx), None  # type: ignore[arg-type]
    scoring = partial(
        attention_with_key_scores, query, key, value, scale=scaling, bias=run.view.bias(layer), impl=run.kernel
    )
    if run.scored:
        mixed, scores = scoring(every=run.score_every)
    else:
        mixed = run.view.attend(layer, query, key, value, scaling)
    if run.observer is not None:
        # For an observer alone: mixing with the same kernel would round differently.
        run.observer(layer, scoring()[1] if scores is None else scores)
    if run.evicting:
        run.view.evict(layer, scores)
    return mixed.transpose(1, 2).contiguous(), None


def take_attention(model: PreTrainedModel) -> None:
    """Route the language model's attention through the hook; nothing happens where it is already."""
    if model.config.get_text_config()._attn_implementation != NAME:
        AttentionInterface.register(NAME, attention_hook)
        _set_attention(model, NAME)


@contextmanager
def attention_left_as_found(model: PreTrainedModel) -> Iterator[None]:
    """Whatever happens to the language model's attention inside, it is as it was afterwards."""
    before = model.config.get_text_config()._attn_implementation
    try:
        yield
    finally:
        _set_attention(model, before)


def _set_attention(model: PreTrainedModel, name: str) -> None:
    alone = model.config.get_text_config() is model.config  # a language model without a tower
    model.set_attn_implementation(name if alone else {"text_config": name})


class RopeScope:
    """Frequencies of a rotary module for any horizon.

    transformers follows the longest position seen and changes a dynamic-NTK model's frequencies in mid-stream; keys
    rotated before and after do not match. Here the length is chosen once. Other kinds of RoPE do not depend on the
    length and are left alone.

    Raises:
        ModelError: axes that do not share the frequencies, or a kind of RoPE that switches frequencies with the
            length and is not supported.
    """

    def __init__(self, rotary: torch.nn.Module, config: Any) -> None:
        self.rotary: Any = rotary
        self.kind = str(rotary.rope_type)
        self.trained_length = int(config.max_position_embeddings)
        self._config = config
        # Those that somebody holds; a recorded step reads the very tensor that its stream holds.
        self._known: WeakValueDictionary[tuple[int, torch.device], torch.Tensor] = WeakValueDictionary()
        self._mutex = Lock()
        sections = (getattr(config, "rope_parameters", None) or {}).get("mrope_section")
        if sections is not None:
            _check_sections(sections, rotary.inv_freq.numel())  # type: ignore[operator, union-attr]
        if self.kind == "longrope":
            raise ModelError("the checkpoint's RoPE is 'longrope', which changes with the length", "use another one")

    def frequencies(self, horizon: int) -> torch.Tensor:
        """[head_dim / 2] float32 for a horizon, on the rotary module's device; one tensor, while anybody holds it."""
        if self.kind != "dynamic":
            plain: torch.Tensor = self.rotary.inv_freq
            return plain
        key = horizon, self.rotary.inv_freq.device
        with self._mutex:
            found = self._known.get(key)
            if found is None:
                found = self._known[key] = self._dynamic(horizon).to(key[1])
        return found

    def _dynamic(self, horizon: int) -> torch.Tensor:
        c, parameters = self._config, self._config.rope_parameters
        dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        return dynamic_ntk_frequencies(
            theta=parameters["rope_theta"],
            dim=int(dim * parameters.get("partial_rotary_factor", 1.0)),
            trained_length=self.trained_length,
            factor=parameters["factor"],
            horizon=horizon,
        )

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


def _check_sections(sections: Any, frequencies: int) -> None:
    """Raise a ModelError unless the axes of multi-axis RoPE share its frequencies."""
    whole = isinstance(sections, (list, tuple)) and len(sections) == 3 and all(type(each) is int for each in sections)
    if not whole or min(sections) < 0 or sum(sections) != frequencies:
        rule = f"mrope_section is {sections}, but must be three whole numbers whose sum is {frequencies}"
        raise ModelError(rule, "get the checkpoint's config.json again")


# Of transformers, in the order in which `generate` looks them up; they say nothing where nothing is drawn.
DRAWING = ("temperature", "top_h", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
# Numbers that transformers refuses as whole ones.
_SHARES = ("top_p", "min_p", "typical_p")  # of which transformers ignores some that are none
_FLOATS = ("temperature", "repetition_penalty", "encoder_repetition_penalty")


def generation_settings(
    model: Any, chosen: Mapping[str, Any], given: GenerationConfig | None = None
) -> GenerationConfig:
    """What stock `generate` goes by: what is chosen, else given, else the checkpoint's, else transformers' defaults; a
    ConfigError for a parameter that transformers does not know, or a value that it refuses.
    """
    chosen = {name: float(v) if name in _FLOATS and type(v) is int else v for name, v in chosen.items()}
    if chosen.get("do_sample") is False:  # what the checkpoint draws by would only make transformers warn
        chosen = {**dict.fromkeys(DRAWING), **chosen}
    with _refused():
        found, unknown = model._prepare_generation_config(given, **chosen)
    if unknown:
        rule = f"transformers knows no generation parameter {min(unknown)!r}"
        raise ConfigError(rule, "see transformers.GenerationConfig for those that there are")
    return found  # type: ignore[no-any-return]


def longest_answer(
    model: Any,
    settings: GenerationConfig,
    chosen: Mapping[str, Any],
    given: GenerationConfig | None,
    prompt: int,
    known: int,
) -> int:
    """Tokens that stock `generate` would answer with at most behind a prompt of so many; `settings` are what
    `generation_settings` made of `chosen` and `given`.

    Args:
        known: those that the loop of `generate` knows of: 0 where it is handed embeddings alone.
    """
    said = [chosen.get("max_length"), getattr(given, "max_length", None), model.generation_config.max_length]
    name = "input_ids" if known else "inputs_embeds"
    whole = torch.empty(1, prompt, device="meta")
    with _refused():
        model._prepare_generated_length(settings, all(each is None for each in said), True, name, known, whole)
        return int(settings.max_length) - known


def logits_processors(
    model: Any, settings: GenerationConfig, prompt: torch.Tensor, longest: int
) -> LogitsProcessorList:
    """What stock `generate` does to the logits of each token before it chooses, in an answer of `longest` tokens at
    most.

    Args:
        prompt: [streams, T] tokens in front of the answer.

    Raises:
        ConfigError: a value outside its range.
    """
    if isinstance(settings.top_k, bool):
        raise ConfigError(f"top_k is {settings.top_k}, but must be a whole number", "leave top_k out")
    for name in _SHARES:
        share = getattr(settings, name, None)
        if share is not None and not (isinstance(share, (int, float)) and 0 <= share <= 1):
            raise ConfigError(f"{name} is {share!r}, but must be a number from 0 to 1", f"leave {name} out")
    with _refused():
        settings.max_length = prompt.shape[1] + longest
        if settings.pad_token_id is None and settings.eos_token_id is not None:
            ends = settings.eos_token_id  # transformers would take the same one, and say so
            settings.pad_token_id = ends if isinstance(ends, int) else ends[0]
        model._prepare_special_tokens(settings, device=prompt.device)
        found: LogitsProcessorList = model._get_logits_processor(
            settings, input_ids_seq_length=prompt.shape[1], encoder_input_ids=prompt, device=prompt.device
        )
    return found


@contextmanager
def _refused() -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, RuntimeError, OverflowError, AttributeError) as error:
        raise ConfigError(" ".join(str(error).split()), "see transformers.GenerationConfig for its range") from None
