"""The demo model's tokenizer: byte-level BPE over the words of the demo world, every number below 1000 one token."""

from __future__ import annotations

from itertools import product

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from statekv.evals.cards.world import COLORS, SHAPES

SPECIAL = {
    "pad_token": "<|endoftext|>",
    "eos_token": "<|im_end|>",
    "start_of_turn": "<|im_start|>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif content['type'] == 'video' %}{{ '<video>\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_WORDS = r"\n?Frame|\n?frame|\n| ?[A-Za-z]+|\d{1,3}|: | ?[^\sA-Za-z\d]+|\s+"
_COMMON = """
you are a helpful assistant. who what when where which how many much is was were are the a an of in on at to
and or not no yes nothing none there did does do came come come after before first last next right left appear
appeared seen see show shown shows card cards color colors shape shapes colour picture video frame frames second
seconds it user system assistant please tell me describe only answer with one word
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tokenizer; the same words always give the same vocabulary."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2400,
        min_frequency=1,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_corpus(), trainer)
    names = dict(SPECIAL)
    turn = names.pop("start_of_turn")
    vision = {name: names[name] for name in names if name not in ("pad_token", "eos_token")}
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=names["pad_token"],
        eos_token=names["eos_token"],
        additional_special_tokens=[turn],
        extra_special_tokens=vision,
        chat_template=CHAT_TEMPLATE,
        model_max_length=32768,
        clean_up_tokenization_spaces=False,
    )


def _corpus() -> list[str]:
    words = sorted({*_COMMON.split(), *COLORS, *SHAPES})
    cards = [f"{color} {shape}" for color, shape in product(COLORS, SHAPES)]
    numbers = [str(number) for number in range(1000)]
    return [*words, *(f" {word}" for word in words), *cards, *numbers, "\nframe", "frame", ": ", "?", "\n"]
