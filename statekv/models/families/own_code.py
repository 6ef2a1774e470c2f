"""The classes that an Eagle2.5 checkpoint brings along, completed so that transformers 5 can load them.

The public code (see eagle2_5.py) was written for transformers 4.51. Left alone it asks for flash_attention_2 on any
device, unless tower and language model are handed to its constructor; it does not call `post_init`, without which no
weights can be loaded; and it reads attributes that configurations have no more. Subclasses fill these gaps, and the
code itself stays as it came. Whoever calls these functions runs it.
"""

from __future__ import annotations

from typing import Any

from transformers import Qwen2ForCausalLM, SiglipVisionModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module


def own_config(source: str, reference: str, **hub_kwargs: Any) -> Any:
    """The configuration of a checkpoint.

    Args:
        source: a hub id or a folder.
        reference: module and class, as `auto_map` in the checkpoint's config.json has it.
        hub_kwargs: as for `from_pretrained` (revision …).

    Raises:
        OSError, ImportError, AttributeError: the code is not there, or does not run here.
    """
    return completed_config(get_class_from_dynamic_module(reference, source, **hub_kwargs)).from_pretrained(
        source, **hub_kwargs
    )


def own_model_class(source: str, reference: str, **hub_kwargs: Any) -> Any:
    """The class of a checkpoint's model; arguments and errors are those of `own_config`."""
    return completed_model(get_class_from_dynamic_module(reference, source, **hub_kwargs))


def completed_config(found: Any) -> Any:
    """A subclass that can be written down, which transformers does with each configuration that it reads."""

    class Completed(found):  # type: ignore[misc]
        _attn_implementation_autoset = False

        # Without one of its own, transformers would write a constructor that leaves out the one below.
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

    return _named_as(found, Completed)


def completed_model(found: Any) -> Any:
    """A subclass that can be built and loaded, on any device."""

    class Completed(found):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            tower, language = SiglipVisionModel(config.vision_config), Qwen2ForCausalLM(config.text_config)
            super().__init__(config, vision_model=tower, language_model=language)
            self.post_init()

        def _init_weights(self, module: Any) -> None:
            """Nothing to do: all weights come from the checkpoint."""

    return _named_as(found, Completed)


def _named_as(found: Any, completed: Any) -> Any:
    completed.__name__ = completed.__qualname__ = found.__name__
    return completed
