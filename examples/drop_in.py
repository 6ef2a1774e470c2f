"""`statekv.generate` in place of `model.generate`, on a tiny random model: python examples/drop_in.py

A real one comes from `AutoModelForImageTextToText.from_pretrained`, its inputs from its processor.
"""

import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration

import statekv

PICTURE = 99  # the token that stands for a picture's features
FRAMES, TOKENS_PER_FRAME = 12, 4

torch.manual_seed(0)
text = {"model_type": "qwen2", "vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
heads = {"initializer_range": 0.3, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
config = InternVLConfig(
    text_config={**text, **heads},
    vision_config={**vision, "image_size": [32, 32], "patch_size": [8, 8]},
    image_token_id=PICTURE,
    image_seq_length=TOKENS_PER_FRAME,
)
model = InternVLForConditionalGeneration(config).eval()

frame = [7, 8, *[PICTURE] * TOKENS_PER_FRAME, 9]  # a label, the picture between two marks
inputs = {
    "input_ids": torch.tensor([[1, 2, 3, *frame * FRAMES, 4, 5, 6]]),
    "pixel_values": torch.randn(FRAMES, 3, 32, 32),
}
settings = {"max_new_tokens": 8, "do_sample": False}
stock = model.generate(**inputs, **settings)
print("stock:            ", stock[0, -8:].tolist())
print("unlimited budget: ", statekv.generate(model, **inputs, budget=10_000, **settings)[0, -8:].tolist())
print("24 keys carried:  ", statekv.generate(model, **inputs, budget=24, **settings)[0, -8:].tolist())
