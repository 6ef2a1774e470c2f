"""What the runner needs from a model family: frames and questions turned into segments."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, ClassVar, get_args

import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel, PreTrainedTokenizerBase

from statekv.cache.spec import KVSpec
from statekv.cache.stream import StreamState
from statekv.errors import ModelError
from statekv.models.encoded import EncodedStep, Reduce, unchanged
from statekv.models.hooks import RopeScope
from statekv.models.prompt import Layout, Prompt, VisionTokens
from statekv.models.size import Size
from statekv.video.frame import Frame

# Of weights that are multiplied as they are; float8 is not among them.
_PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Segment:
    """A piece that enters the language model at once.

    Attributes:
        kind: prefix, step, question or token.
        ids: [streams, T] int64.
        embeds: [streams, T, hidden]; vision features stand where the placeholders are.
        positions: [streams, T], or [3, streams, T] for multi-axis RoPE.
        next_position: where the following segment goes on.
        frames: pictures inside.
        pts_seconds: time of the first picture.
        extras: further keyword arguments of the language model.
        moment: where it stands on the axis of time, where the family counts that beside its text; else None.
        kept: which tokens of its picture it has; see `EncodedStep`.
        words: the different ones of `ids`, where penalties are to know of them; on the host.
    """

    kind: str
    ids: torch.Tensor
    embeds: torch.Tensor
    positions: torch.Tensor
    next_position: int
    frames: int = 0
    pts_seconds: float | None = None
    extras: dict[str, Any] = field(default_factory=dict)
    moment: int | None = None
    kept: torch.Tensor | None = None
    words: frozenset[int] = frozenset()

    @property
    def reach(self) -> int:
        """One past the highest position that it asks for."""
        return max(self.next_position, 0 if self.moment is None else self.moment + 1)

    @property
    def length(self) -> int:
        """Tokens."""
        return self.ids.shape[1]


@dataclass(frozen=True)
class Texts:
    """A checkpoint's own way of writing: needed to feed frames and questions, not for ready-made inputs."""

    tokenizer: PreTrainedTokenizerBase
    chat_template: str
    video_json: Mapping[str, Any]


class VideoModel(ABC):
    """One checkpoint of a family, seen as a maker of segments. It keeps nothing of any stream.

    Args:
        model: the transformers model, untouched.
        texts: tokenizer, chat template and video processor JSON; None where inputs come from a processor.

    Raises:
        ModelError: the checkpoint uses something that is not supported.
    """

    frames_per_step: ClassVar[int] = 1
    generates_prompt: ClassVar[bool] = True  # whether stock `generate` returns the prompt in front of the answer
    own_time: ClassVar[bool] = False  # whether steps count time on an axis that text does not follow
    sizes: ClassVar[tuple[Size, ...]] = ()  # public language models, whose speed can be measured without their weights
    # What a processor may return for `generate`.
    processor_outputs: ClassVar[tuple[str, ...]] = (
        *("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "pixel_values_videos", "image_sizes"),
        *("image_grid_thw", "video_grid_thw", "second_per_grid_ts", "batch_num_images"),
    )

    def __init__(self, model: PreTrainedModel, texts: Texts | None = None) -> None:
        self.model: Any = model
        self.text_config: Any = model.config.get_text_config()
        kinds = set(getattr(self.text_config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            found = ", ".join(sorted(kinds))
            raise ModelError(f"the checkpoint has {found} layers", "only full attention is supported")
        self.rope = RopeScope(self.language_model.rotary_emb, self.text_config)
        self.texts = texts
        self.prompts: dict[str, Prompt] = {}
        if texts is not None:
            self._read(texts)

    @classmethod
    def random_config(cls, size: Size) -> Any:
        """Transformers' configuration of a model of one of `sizes`, with a vision tower that costs nothing."""
        raise ModelError(f"{cls.__name__} has no models of random weights", "give it `sizes` and `random_config`")

    @classmethod
    def random_model(cls, size: Size, dtype: torch.dtype) -> Any:
        """A model of one of `sizes`, its weights still to be set."""
        return AutoModelForImageTextToText.from_config(cls.random_config(size), dtype=dtype)

    def random_step(self, tokens: int, start: int) -> Segment:
        """A step of so many tokens with random embeddings, from position `start` on."""
        device, hidden = self.model.device, self.text_config.hidden_size
        embeds = torch.randn(1, tokens, hidden, device=device, dtype=self.kv_spec().dtype)
        ids = torch.zeros(1, tokens, dtype=torch.int64, device=device)
        return Segment("step", ids, embeds, self.text_positions(start, tokens), start + self.stride(tokens), 1)

    def stride(self, tokens: int) -> int:
        """Positions that a step of so many tokens takes."""
        return tokens

    @property
    def language_model(self) -> Any:
        return self.model.model.language_model

    @property
    def generator(self) -> Any:
        """What stock `generate` decodes with, and whose generation settings hold."""
        return self.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        assert self.texts is not None
        return self.texts.tokenizer

    @property
    def trained_length(self) -> int:
        """Positions that the checkpoint was trained for."""
        return self.rope.trained_length

    @property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end an answer, as the checkpoint's generation settings say."""
        generation = getattr(self.generator, "generation_config", None)
        for found in (getattr(generation, "eos_token_id", None), self.text_config.eos_token_id):
            if found is not None:
                return frozenset([found] if isinstance(found, int) else found)
        return frozenset()

    def kv_spec(self) -> KVSpec:
        """Sizes of the keys, and where each layer's keys live."""
        c = self.text_config
        return KVSpec(
            kv_heads=c.num_key_value_heads,
            head_dim=getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads,
            dtype=self._key_dtype(),
            devices=tuple(_device_of(layer.self_attn.k_proj) for layer in self.language_model.layers),
        )

    @abstractmethod
    def vision_tokens(self, tokenizer: PreTrainedTokenizerBase) -> VisionTokens:
        """The strings that mark vision in this family's text."""

    @property
    @abstractmethod
    def video_token_id(self) -> int:
        """The id that stands for a vision feature of a video."""

    @abstractmethod
    def read_recipe(self, video_json: Mapping[str, Any]) -> None:
        """Take over what the checkpoint's video processor does to pixels."""

    @abstractmethod
    def encode(self, steps: Sequence[Sequence[Frame]], frames_expected: int | None = None) -> list[EncodedStep]:
        """Send the pictures of several steps through the vision tower together.

        Args:
            steps: 1 … frames_per_step pictures for each step; fewer are filled up as the stock processor does.
            frames_expected: frames of the whole video where that is known; some families size pictures by it.

        Returns:
            One for each step, in order; no step's depends on another's but by rounding.
        """

    def size(self, height: int, width: int, frames: int) -> tuple[int, int]:
        """(height, width) in pixels that frames of this size get in a video of so many."""
        return height, width

    @abstractmethod
    def step_text(self, seen: EncodedStep, state: StreamState) -> str:
        """The text around one step's pictures, with a placeholder for each token of the whole picture."""

    @abstractmethod
    def vision_segment(self, ids: Sequence[int], seen: EncodedStep, position: int) -> Segment:
        """A step out of its text, with one picture in it, and what the vision tower made of that picture.

        Args:
            ids: with a placeholder for each token of the whole picture; those that are not kept leave their places.
            seen: the picture.
            position: of the first token.
        """

    @abstractmethod
    def max_positions(self, frames: int, height: int, width: int, layout: Layout, seconds: float | None = None) -> int:
        """Positions that a prompt with this many frames takes at most, without the question.

        Args:
            frames: how many will be seen.
            height, width: of the frames as decoded, in pixels.
            layout: of the prompt.
            seconds: length of the video, where known; some families place frames by their time.
        """

    @abstractmethod
    def segments(self, inputs: Mapping[str, Any], reduce: Reduce = unchanged) -> Iterator[Segment]:
        """Cut a stock processor's inputs for one conversation into segments, vision computed piece by piece.

        Args:
            inputs: what the processor returned.
            reduce: applied to each picture before it becomes a step.
        """

    def reach(self, inputs: Mapping[str, Any]) -> int:
        """Positions that a stock processor's inputs take at most."""
        return int(inputs["input_ids"].shape[1])

    def segments_of(self, seen: EncodedStep, state: StreamState) -> list[Segment]:
        """Segments of one step; the first step of a stream brings the prompt's prefix along.

        Args:
            seen: what `encode` made of the step's pictures.
            state: the stream that they enter; it is not changed.
        """
        prompt, text = self.prompts[state.config.layout], self.step_text(seen, state)
        head = [] if state.frames else prompt.head_ids(text)
        own = prompt.step_ids(text) if state.frames else prompt.first_step_ids(text)
        step = self.vision_segment(own, seen, state.position + len(head))
        prefix = [replace(self.text("prefix", head, state.position), words=frozenset(head))] if head else []
        return [*prefix, replace(step, words=frozenset(own))]

    def question(self, text: str, state: StreamState) -> Segment:
        """The question and the answer's header, at the stream's next position.

        Raises:
            ConfigError: an empty question, or one that holds the model's vision tokens.
        """
        return self.text("question", self.prompts[state.config.layout].tail_ids(text), state.position)

    def token(self, token: torch.Tensor, state: StreamState) -> Segment:
        """One generated token [streams] at the stream's next position."""
        ids = token.view(-1, 1)
        return Segment("token", ids, self.embed(ids), self.text_positions(state.position, 1), state.position + 1)

    def text(self, kind: str, ids: Sequence[int] | torch.Tensor, position: int) -> Segment:
        """A segment without pictures."""
        row = torch.as_tensor(ids, dtype=torch.int64, device=self.model.device).view(1, -1)
        length = row.shape[1]
        return Segment(kind, row, self.embed(row), self.text_positions(position, length), position + length)

    def embed_picture(
        self, ids: Sequence[int], token: int, seen: EncodedStep
    ) -> tuple[torch.Tensor, torch.Tensor, slice]:
        """Text with one picture in it: ids [1, T], embeds [1, T, hidden], and where the picture lies.

        Args:
            ids: known to the host, so that nothing has to wait for the device.
            token: the placeholders' id; they stand in one run, one for each token of the whole picture.
            seen: the picture; T counts the tokens of it that are kept.

        Raises:
            ModelError: there are more or fewer placeholders than the whole picture has tokens.
        """
        check_placeholders(ids.count(token), seen.total)
        first = ids.index(token)
        spot = slice(first, first + len(seen.features))
        row = torch.tensor([without_dropped(ids, first, seen)], device=self.model.device)
        embeds = self.embed(row)
        embeds[:, spot] = seen.features.to(embeds)
        return row, embeds, spot

    def kept_positions(self, positions: torch.Tensor, first: int, seen: EncodedStep) -> torch.Tensor:
        """Positions of the tokens that a step has, out of those that it would have with its whole picture.

        Args:
            positions: [1, T] or [3, 1, T], with the whole picture.
            first: words in front of the picture.
            seen: the picture.
        """
        if seen.kept is None:
            return positions
        words = torch.arange(positions.shape[-1])
        here = torch.cat([words[:first], first + seen.kept, words[first + seen.total :]])
        return positions[..., here.to(positions.device)]

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """[streams, T] → [streams, T, hidden]."""
        embedded: torch.Tensor = self.model.get_input_embeddings()(ids)
        return embedded

    def text_positions(self, start: int, length: int) -> torch.Tensor:
        """[1, length]; families with multi-axis RoPE return [3, 1, length]."""
        return torch.arange(start, start + length, device=self.model.device).unsqueeze(0)

    def frequencies(self, horizon: int) -> torch.Tensor:
        """[head_dim / 2] float32, see `RopeScope.frequencies`."""
        return self.rope.frequencies(horizon)

    def angles(self, positions: torch.Tensor, horizon: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What keys at these positions are turned by, see `RopeScope.angles`."""
        return self.rope.angles(positions, horizon)

    def moved(self, by: torch.Tensor, horizon: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What keys are turned by whose steps move so far, [T] int64 on the CPU."""
        return self.rope.angles(self.displacement(by.to(self.model.device)), horizon)

    def displacement(self, by: torch.Tensor) -> torch.Tensor:
        """Positions to rotate keys by whose steps move along the stream: [T] → [1, T], or [3, 1, T].

        A step moves as a whole, so rows and columns that are counted from its place move with it.
        """
        return by.expand(*self.text_positions(0, 1).shape[:-1], -1)

    @torch.inference_mode()
    def _key_dtype(self) -> torch.dtype:
        """What the projection to keys gives: its weights' own dtype, but of quantised ones codes tell nothing."""
        layer = self.language_model.layers[0]
        weight = getattr(layer.self_attn.k_proj, "weight", None)
        if weight is not None and weight.dtype in _PLAIN:
            plain: torch.dtype = weight.dtype
            return plain
        token = self.embed(torch.zeros(1, 1, dtype=torch.int64, device=self.model.device))
        normalised = layer.input_layernorm(token.to(_device_of(layer.input_layernorm)))
        found: torch.Tensor = layer.self_attn.k_proj(normalised)
        return found.dtype

    def _read(self, texts: Texts) -> None:
        self.read_recipe(texts.video_json)
        tokens = self.vision_tokens(texts.tokenizer)
        found = texts.tokenizer.convert_tokens_to_ids(tokens.pad)
        if found != self.video_token_id:
            rule = f"the tokenizer gives {tokens.pad} the id {found}, the model expects {self.video_token_id}"
            raise ModelError(rule, "use the tokenizer of the same checkpoint")
        rows, last = self.model.get_input_embeddings().num_embeddings, max(texts.tokenizer.get_vocab().values())
        if last >= rows:
            rule = f"the tokenizer has a token {last}, the model embeds {rows}"
            raise ModelError(rule, "use the tokenizer of the same checkpoint")
        for layout in get_args(Layout):
            self.prompts[layout] = Prompt(texts.tokenizer, texts.chat_template, tokens, layout)


def _device_of(module: torch.nn.Module) -> torch.device:
    """Where a layer computes; some quantised ones have no parameters."""
    return next(chain(module.parameters(), module.buffers())).device


def without_dropped(ids: Sequence[int], first: int, seen: EncodedStep) -> list[int]:
    """Ids of a step with a placeholder for each token that is kept, out of those with the whole picture."""
    stop = first + seen.total
    return [*ids[: first + len(seen.features)], *ids[stop:]]


def check_placeholders(placeholders: int, features: int) -> None:
    """Raise a ModelError unless the text has room for exactly the pictures that came with it."""
    if placeholders != features:
        rule = f"the text has placeholders for {placeholders} vision features, the pictures make {features}"
        raise ModelError(rule, "pass all that one call of the checkpoint's own processor returned")


def runs(ids: Sequence[int], tokens: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(start, stop, token) of each unbroken run of one of `tokens`."""
    found = [(i, token) for i, token in enumerate(ids) if token in tokens]
    start = 0
    for k, (i, token) in enumerate(found):
        ends = k + 1 == len(found) or found[k + 1] != (i + 1, token)
        if ends:
            yield found[start][0], i + 1, token
            start = k + 1
