"""`statekv.generate`: what `model.generate` does, prefilled step by step through the two caches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteriaList, StopStringCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from statekv.config import Config, check_source
from statekv.engine.choice import sampler_of
from statekv.errors import ConfigError, ModelError
from statekv.models.adapter import VideoModel
from statekv.models.hooks import attention_left_as_found, generation_settings, longest_answer
from statekv.models.loading import wrap_model
from statekv.runner.decoding import SamplingParams, sampling_params
from statekv.runner.memory import memory_limit
from statekv.runner.runner import ModelRunner

# `max_new_tokens`, a setting of ours too, is meant as transformers means it.
_PARAMETERS = frozenset(name for name in vars(GenerationConfig()) if not name.startswith("_"))


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
        generation_config: what it leaves open, and None, is the model's own.
        return_dict_in_generate, output_logits: as for `model.generate`.
        inputs_and_settings: the processor's outputs; fields of `Config` such as budget; transformers' generation
            parameters, which mean what they mean in stock, but for beams and others that need several passes, which are
            refused; and the tokenizer, where there are stop strings.

    Returns:
        [1, prompt + new] token ids, for Eagle2.5 [1, new], as stock does; with return_dict_in_generate an object with
        `sequences` and `logits`.

    Raises:
        ConfigError: an unknown argument, or a value outside its range.
        ModelError: an unsupported model, more than one conversation, or inputs of another processor.
    """
    adapter = wrap_model(model)
    inputs = {name: inputs_and_settings.pop(name) for name in adapter.processor_outputs if name in inputs_and_settings}
    chosen = {name: inputs_and_settings.pop(name) for name in (*inputs_and_settings,) if name in _PARAMETERS}
    tokenizer = inputs_and_settings.pop("tokenizer", None)
    config = Config.of(method, **inputs_and_settings)
    _refuse_choice_of_frames(config)
    check_source(inputs_and_settings, "processed")
    prompt, inputs = _one_conversation(inputs)
    known = _known(adapter, inputs["input_ids"])
    settings = generation_settings(adapter.generator, chosen, generation_config)
    longest = longest_answer(
        adapter.generator, settings, chosen, generation_config, inputs["input_ids"].shape[1], known.shape[1]
    )
    if longest < 1:
        rule = (
            f"the prompt's {known.shape[1]} tokens and the answer are {settings.max_length} at most, which leaves none"
        )
        raise ConfigError(rule, "give max_new_tokens of at least 1")
    sampling = sampling_params(adapter, settings, longest, None)
    if settings.stop_strings is not None:
        sampling = replace(sampling, stopping=_stop_strings(settings.stop_strings, tokenizer))
    tokens, logits = _run(ModelRunner(adapter), config.with_(max_new_tokens=longest), inputs, sampling)
    new = torch.tensor([tokens], dtype=prompt.dtype, device=prompt.device)
    sequences = torch.cat([_known(adapter, prompt), new], dim=1)
    if not (return_dict_in_generate or settings.return_dict_in_generate):
        return sequences
    return GenerateDecoderOnlyOutput(
        sequences=sequences,  # type: ignore[arg-type]
        logits=tuple(logits) if output_logits or settings.output_logits else None,  # type: ignore[arg-type]
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
            logits = runner.ask(state, segment, sampling.max_new_tokens)
            answered = list(runner.decode(state, logits, sampling, _known(runner.model, prompt)))
    return [token for token, _ in answered], [logits.float() for _, logits in answered]


def _known(adapter: VideoModel, prompt: torch.Tensor) -> torch.Tensor:
    """What stock's loop knows of a prompt [1, T]: nothing where it is handed embeddings alone."""
    return prompt if adapter.generates_prompt else prompt[:, :0]


def _stop_strings(strings: str | list[str], tokenizer: PreTrainedTokenizerBase | None) -> StoppingCriteriaList:
    if tokenizer is None:
        rule = f"the generation config sets stop_strings={strings!r}, which no tokenizer is here for"
        raise ConfigError(rule, "pass tokenizer=processor.tokenizer, as for model.generate")
    return StoppingCriteriaList([StopStringCriteria(tokenizer, strings)])


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
