"""`statekv.generate`: what `model.generate` does, prefilled step by step through the two caches."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.utils import GenerateDecoderOnlyOutput

from statekv.config import Config, check_source
from statekv.engine.choice import sampler_of
from statekv.errors import ConfigError, ModelError
from statekv.models.adapter import VideoModel
from statekv.models.hooks import attention_left_as_found
from statekv.models.loading import wrap_model
from statekv.runner.decoding import SamplingParams
from statekv.runner.memory import memory_limit
from statekv.runner.runner import ModelRunner

_SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
_STOCK_TOP_K = 50  # what transformers draws from where nobody says otherwise

# Parameters of a GenerationConfig that change an answer and are not followed here, with the values that do nothing.
_NOT_FOLLOWED = {
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "min_new_tokens": (None, 0),
    "min_length": (None, 0),
    "no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None,),
    "stop_strings": (None,),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
    "sequence_bias": (None,),
    "guidance_scale": (None, 1),
    "min_p": (None,),
    "typical_p": (None, 1),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "penalty_alpha": (None,),
}


def generate(
    model: Any,
    *,
    method: str | None = None,
    generation_config: GenerationConfig | None = None,
    return_dict_in_generate: bool = False,
    output_logits: bool = False,
    **inputs_and_settings: Any,
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    """Answer one conversation about videos and images, as `model.generate(**inputs)` would.

    Every picture enters as a step of its own: a frame (InternVL), a temporal patch (Qwen3-VL) or an image; a reducer
    sees them all, for not every family's inputs tell frames from images. The model is left as it was found, also after
    an exception. With an unlimited budget the result is the stock model's.

    Args:
        model: a transformers model of a supported family.
        method: one of statekv.config.METHODS; None is StateKV.
        generation_config: None: the model's own.
        return_dict_in_generate, output_logits: as for `model.generate`.
        inputs_and_settings: the processor's outputs; fields of `Config` such as budget; and of transformers'
            generation parameters max_new_tokens, eos_token_id, do_sample, temperature, top_k, top_p and
            repetition_penalty.

    Returns:
        [1, prompt + new] token ids, for Eagle2.5 [1, new], as stock does; with return_dict_in_generate an object with
        `sequences` and `logits`.

    Raises:
        ConfigError: an unknown argument, or a value outside its range.
        ModelError: an unsupported model, more than one conversation, or inputs of another processor.
    """
    adapter = wrap_model(model)
    generation = generation_config or adapter.generator.generation_config
    _refuse_unfollowed(generation)
    inputs = {name: inputs_and_settings.pop(name) for name in adapter.processor_outputs if name in inputs_and_settings}
    chosen = {name: inputs_and_settings.pop(name, getattr(generation, name, None)) for name in _SAMPLING}
    ends = _end_tokens(adapter, inputs_and_settings.pop("eos_token_id", None), generation_config)
    limit = inputs_and_settings.pop("max_new_tokens", generation.max_new_tokens)
    config = Config.of(method, **({} if limit is None else {"max_new_tokens": limit}), **inputs_and_settings)
    _refuse_choice_of_frames(config)
    check_source(inputs_and_settings, "processed")
    if chosen["top_k"] is None:
        chosen["top_k"] = _STOCK_TOP_K
    sampling = SamplingParams(config.max_new_tokens, ends, **{**chosen, "do_sample": bool(chosen["do_sample"])})
    prompt, inputs = _one_conversation(inputs)
    tokens, logits = _run(ModelRunner(adapter), config, inputs, sampling)
    new = torch.tensor([tokens], dtype=prompt.dtype, device=prompt.device)
    sequences = torch.cat([_known(adapter, prompt), new], dim=1)
    if not return_dict_in_generate:
        return sequences
    return GenerateDecoderOnlyOutput(
        sequences=sequences,  # type: ignore[arg-type]
        logits=tuple(logits) if output_logits else None,  # type: ignore[arg-type]
    )


def _run(
    runner: ModelRunner, config: Config, inputs: dict[str, Any], sampling: SamplingParams
) -> tuple[list[int], list[torch.Tensor]]:
    prompt = inputs["input_ids"]
    longest = prompt.shape[1] + sampling.max_new_tokens
    # Stock scales dynamic-NTK RoPE by the longest position so far; here by the longest there will be.
    reach = runner.model.reach(inputs) + sampling.max_new_tokens
    state = runner.open(config, max(reach, runner.model.trained_length), room=0)
    with torch.inference_mode(), memory_limit(), attention_left_as_found(runner.model.model):
        state.detailed.reserve(longest)
        for segment in runner.segments_of_inputs(state, inputs):
            if segment.kind != "question":
                runner.enter(state, segment)
                continue
            if not segment.length:
                raise ModelError("the prompt ends with a picture", "end it with the question, as chat templates do")
            answered = list(runner.decode(state, segment, sampling, _known(runner.model, prompt)))
    return [token for token, _ in answered], [logits for _, logits in answered]


def _known(adapter: VideoModel, prompt: torch.Tensor) -> torch.Tensor:
    """What stock's loop knows of a prompt [1, T]: nothing where it is handed embeddings alone."""
    return prompt if adapter.generates_prompt else prompt[:, :0]


def _end_tokens(adapter: VideoModel, given: Any, generation: GenerationConfig | None) -> frozenset[int]:
    for found in (given, getattr(generation, "eos_token_id", None)):
        if found is not None:
            return frozenset([found] if isinstance(found, int) else found)
    return adapter.end_tokens


def _refuse_unfollowed(generation: GenerationConfig) -> None:
    for name, idle in _NOT_FOLLOWED.items():
        value = getattr(generation, name, None)
        if value not in idle:
            raise ConfigError(f"the generation config sets {name}={value!r}, which is not followed", f"unset {name}")


def _refuse_choice_of_frames(config: Config) -> None:
    if sampler_of(config).chooses:
        rule = (
            f"{config.method} chooses among the frames of a video, but the processor's outputs hold no video any more"
        )
        raise ConfigError(rule, "give the processor the frames to be seen, and use the method full")
    if config.on_horizon == "compact":
        rule = "on_horizon is 'compact', but a processor's outputs are one prompt of known length, with fixed positions"
        raise ConfigError(rule, "leave on_horizon out, or push the frames into a session")


def _one_conversation(inputs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    """The prompt as given, and the inputs without the padding in front of it."""
    prompt = inputs.get("input_ids")
    if not isinstance(prompt, torch.Tensor) or prompt.ndim != 2:
        raise ConfigError("input_ids [1, T] are missing", "pass the processor's outputs: generate(model, **inputs)")
    if prompt.shape[0] != 1:
        raise ModelError(f"the inputs hold {prompt.shape[0]} conversations", "call generate once for each")
    mask = inputs.pop("attention_mask", None)
    inputs.pop("mm_token_type_ids", None)
    if mask is None or bool(mask.all()):
        return prompt, inputs
    pad = int((mask[0] == 0).sum())
    if bool(mask[0, :pad].any()):
        raise ModelError("the attention mask hides tokens inside the prompt", "pad on the left only")
    return prompt, {**inputs, "input_ids": prompt[:, pad:]}
