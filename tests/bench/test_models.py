"""Models with random weights: whole, finite, of the asked dtype, and steppable."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from statekv.bench.models import SIZES, build, fill, fill_carried, products_alone, random_step, size_of, stand
from statekv.cache.carried import CarriedCache
from statekv.cache.stream import StreamState
from statekv.config import Config
from statekv.errors import ConfigError, MemoryLimitError
from statekv.models import adapter_of
from statekv.models.encoded import EncodedStep
from statekv.models.families.qwen3_vl import Qwen3VL
from statekv.models.size import Size
from statekv.runner.runner import ModelRunner
from tests.bench.small import CPU, FAMILIES, INTERNVL, QWEN3_VL, shrunk, small

SMALL = {size.family: shrunk(size) for size in SIZES.values()}
EVERY_FAMILY = pytest.mark.parametrize("size", SMALL.values(), ids=SMALL)


@EVERY_FAMILY
def test_a_built_model_steps(size: Size) -> None:
    runner = ModelRunner(small(size))
    state = runner.open(Config(budget=20))
    for number in (1, 2, 3):
        hidden = runner.enter(state, random_step(runner.model, 18, number))
        assert hidden.shape == (1, 18, size.hidden)
        assert hidden.isfinite().all()
        assert hidden.std() > 0.1  # norms are at work: nothing has vanished
    assert state.carried.length == 20
    assert runner.logits(hidden).shape == (1, size.vocab)


@EVERY_FAMILY
def test_every_weight_is_set(size: Size) -> None:
    for name, weight in small(size).model.named_parameters():
        assert weight.isfinite().all(), name
        assert weight.dim() == 1 or weight.std() < 0.1, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_that_of_all_weights_but_not_of_the_frequencies(dtype: torch.dtype) -> None:
    model = build(QWEN3_VL, CPU, dtype)
    assert {weight.dtype for weight in model.model.parameters()} == {dtype}
    assert model.language_model.rotary_emb.inv_freq.dtype == torch.float32


def test_rope_is_the_checkpoints_kind() -> None:
    assert small(INTERNVL).rope.kind == "dynamic"
    assert small(QWEN3_VL).rope.kind == "default"
    assert small(replace(INTERNVL, rope_factor=None)).rope.kind == "default"


def test_position_axes_share_a_head_as_in_the_public_configuration() -> None:
    for name, sections in (("qwen3-vl-4b", [24, 20, 20]), ("qwen2.5-vl-7b", [16, 24, 24])):
        rope = build(SIZES[name], torch.device("meta"), torch.bfloat16).text_config.rope_parameters
        assert rope["mrope_section"] == sections


def test_layers_cut_the_model() -> None:
    model = build(INTERNVL, CPU, torch.float32, layers=1)
    assert model.kv_spec().layers == len(model.language_model.layers) == 1


def test_what_does_not_fit_is_refused_before_it_is_made() -> None:
    giant = replace(INTERNVL, layers=1, hidden=1 << 20, intermediate=1 << 24)
    with pytest.raises(MemoryLimitError, match=r"with 1 layers would take .* GiB, but cpu has .* free \(try fewer"):
        build(giant, CPU, torch.float32)


META = torch.device("meta")

# bf16, KiB per token: section 6 of the design; the last three have the language model of InternVL3-8B.
KIB_PER_TOKEN = {
    "internvl3-1b": 12,
    "internvl3-2b": 28,
    "internvl3-8b": 56,
    "qwen3-vl-2b": 112,
    "qwen3-vl-4b": 144,
    "qwen3-vl-8b": 144,
    "eagle2.5-8b": 56,
    "qwen2.5-vl-7b": 56,
    "llava-onevision-7b": 56,
}


@pytest.mark.parametrize(("name", "kib"), KIB_PER_TOKEN.items())
def test_bytes_per_token_are_those_of_the_design(name: str, kib: int) -> None:
    assert SIZES[name].kv_bytes_per_token(torch.bfloat16) == kib * 1024
    assert SIZES[name].kv_bytes_per_token(torch.float32) == 2 * kib * 1024


def test_all_models_of_the_paper_are_there_and_two_more() -> None:
    assert set(SIZES) == set(KIB_PER_TOKEN)
    assert all(name == size.name for name, size in SIZES.items())


@pytest.mark.parametrize("name", SIZES)
def test_counts_are_those_of_the_model_that_is_built(name: str) -> None:
    size = SIZES[name]
    model = build(size, META, torch.bfloat16)
    weights = dict(model.language_model.named_parameters())
    embedding = weights.pop("embed_tokens.weight")
    assert sum(weight.numel() for weight in weights.values()) == size.parameters
    assert embedding.shape == (size.vocab, size.hidden)
    assert (model.model.get_output_embeddings().weight is embedding) == size.tied
    assert model.kv_spec().bytes_per_token == size.kv_bytes_per_token(torch.bfloat16)
    assert isinstance(model, adapter_of(size.family))
    assert model.trained_length == size.trained_length


def test_a_cut_model_has_fewer_layers_and_says_so() -> None:
    whole, cut = SIZES["qwen3-vl-8b"], size_of("qwen3-vl-8b", layers=9)
    assert cut.layers == 9
    assert cut.parameters - cut.hidden == (whole.parameters - whole.hidden) // 4
    assert size_of("qwen3-vl-8b") is whole


def test_layers_that_are_not_there_are_refused() -> None:
    for layers in (0, 25):
        with pytest.raises(ConfigError, match=rf"layers is {layers}, but internvl3-1b has 24 \(give 1 … 24\)"):
            size_of("internvl3-1b", layers)


def test_unknown_names_get_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown model 'gpt'.*internvl3-1b.*eagle2\.5-8b"):
        size_of("gpt")


EVERY_FAMILY_STEPS = pytest.mark.parametrize("size", FAMILIES, ids=lambda size: size.family)


@EVERY_FAMILY_STEPS
def test_steps_follow_each_other(size: Size) -> None:
    model = small(size)
    first, second = random_step(model, 20, 1), random_step(model, 20, 2)
    assert first.positions.min() == 0
    assert first.next_position == second.positions.min() == model.stride(20)
    assert second.next_position == 2 * model.stride(20)
    assert first.length == first.embeds.shape[1] == first.positions.shape[-1] == 20


def test_internvl_counts_every_token() -> None:
    assert small(INTERNVL).stride(256) == 256
    assert random_step(small(INTERNVL), 8, 3).positions.tolist() == [list(range(16, 24))]


def test_qwen_steps_are_made_as_the_adapter_makes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a 4 x 4 picture with 2 words behind it: the same positions, and extras of the same shapes."""
    model = small(QWEN3_VL)
    assert isinstance(model, Qwen3VL)
    step = random_step(model, 18, 2)
    monkeypatch.setattr(model.model.config, "video_token_id", 3)  # a small model's vocabulary ends before the real one
    features = torch.zeros(16, QWEN3_VL.hidden)
    seen = EncodedStep((), features, (4, 4), (features,) * 3)
    own = model.vision_segment([3] * 16 + [1, 2], seen, 6)
    assert torch.equal(step.positions, own.positions)
    assert step.next_position == own.next_position == 12
    assert step.extras["visual_pos_masks"] is own.extras["visual_pos_masks"]
    shapes = [[deep.shape for deep in made.extras["deepstack_visual_embeds"]] for made in (step, own)]
    assert shapes[0] == shapes[1]


@EVERY_FAMILY_STEPS
def test_products_alone_are_those_of_a_step(size: Size) -> None:
    """Torch counts two FLOPs per weight and token: all of the model's matrices, each once."""
    model = small(size)
    matrices = sum(weight.numel() for weight in model.language_model.layers.parameters() if weight.dim() == 2)
    with FlopCounterMode(display=False) as counter:
        products_alone(model, 7)()
    assert counter.get_total_flops() == 2 * 7 * matrices


TOKENS = 10  # of a step
EVERY_FAMILY_FILL = pytest.mark.parametrize("size", FAMILIES, ids=lambda size: size.family)
# Carried caches that are not yet full, exactly full, and full for long; and no carried cache at all.
EVERY_CONFIG = pytest.mark.parametrize(
    ("config", "steps"),
    [(Config(budget=64), 4), (Config(budget=40), 4), (Config(budget=16), 7), (Config.of("full"), 5)],
    ids=["growing", "just full", "long full", "all"],
)


def walked(runner: ModelRunner, config: Config, steps: int) -> StreamState:
    state = runner.open(config)
    state.detailed.reserve((steps + 1) * TOKENS)
    for number in range(1, steps + 1):
        runner.enter(state, random_step(runner.model, TOKENS, number))
    if isinstance(state.carried, CarriedCache):
        state.carried.open_slots(TOKENS)  # as the next step will
    return state


def filled(runner: ModelRunner, config: Config, steps: int) -> StreamState:
    state = runner.open(config)
    fill(state, steps * TOKENS, TOKENS)
    stand(state, steps * TOKENS, steps * runner.model.stride(TOKENS), TOKENS)
    return state


def check_alike(one: StreamState, other: StreamState) -> None:
    """Lengths, shapes and position are the same, down to the slots that a full carried cache has."""
    assert one.detailed.lengths == other.detailed.lengths
    assert one.carried.lengths == other.carried.lengths
    assert one.position == other.position
    assert [buffer.shape for buffer in one.detailed.buffers] == [buffer.shape for buffer in other.detailed.buffers]
    if isinstance(one.carried, CarriedCache) and one.carried.full:
        assert isinstance(other.carried, CarriedCache)
        assert one.carried.full == other.carried.full
        assert one.nbytes == other.nbytes
        assert [slots.shape for slots in one.carried.buffers] == [slots.shape for slots in other.carried.buffers]


@EVERY_FAMILY_FILL
@EVERY_CONFIG
def test_it_is_where_walking_leads(size: Size, config: Config, steps: int) -> None:
    runner = ModelRunner(small(size))
    there, brought = walked(runner, config, steps), filled(runner, config, steps)
    check_alike(there, brought)
    step = random_step(runner.model, TOKENS, steps + 1)
    for state in (there, brought):
        runner.enter(state, step)
    check_alike(there, brought)


@EVERY_CONFIG
@torch.inference_mode()
def test_nothing_but_the_keys_sets_it_apart(config: Config, steps: int) -> None:
    """A walked stream that is given the same keys takes the same step, bit for bit."""
    runner = ModelRunner(small(INTERNVL))
    there, brought = walked(runner, config, steps), filled(runner, config, steps)
    tokens, length = brought.tokens, brought.carried.length
    for layer in range(INTERNVL.layers):
        there.detailed.buffers[layer][..., :tokens, :] = brought.detailed.buffers[layer][..., :tokens, :]
        if isinstance(there.carried, CarriedCache) and isinstance(brought.carried, CarriedCache):
            there.carried.buffers[layer][..., :length, :] = brought.carried.buffers[layer][..., :length, :]
            there.carried.token_ids[layer][..., :length] = brought.carried.token_ids[layer][..., :length]
    step = random_step(runner.model, TOKENS, steps + 1)
    assert torch.equal(runner.enter(there, step), runner.enter(brought, step))
    for layer in range(INTERNVL.layers):
        assert torch.equal(there.detailed.keys(layer), brought.detailed.keys(layer))


def test_carried_keys_are_tokens_of_the_stream() -> None:
    runner = ModelRunner(small(INTERNVL))
    state = filled(runner, Config(budget=16), 7)
    carried = state.carried
    assert isinstance(carried, CarriedCache)
    for layer in range(INTERNVL.layers):
        kept = carried.kept(layer)  # [1, kv_heads, 16]
        assert kept.unique_consecutive(dim=-1).shape[-1] == 16
        index = kept.long().unsqueeze(-1).expand(-1, -1, -1, INTERNVL.head_dim)
        held = carried.buffers[layer][0, :, :, :16]
        assert torch.equal(state.detailed.keys(layer).gather(2, index), held)


def test_keys_differ_between_tokens_heads_and_layers() -> None:
    runner = ModelRunner(small(INTERNVL))
    state = filled(runner, Config.of("full"), 3)
    keys = torch.stack([state.detailed.keys(layer)[0] for layer in range(INTERNVL.layers)])  # [layers, heads, n, D]
    assert keys.flatten(0, 2).unique(dim=0).shape[0] == keys[..., 0].numel()


def test_streams_longer_than_what_is_drawn_repeat_it() -> None:
    runner = ModelRunner(small(INTERNVL))
    state = runner.open(Config.of("full"))
    fill(state, 2500, TOKENS)
    keys = state.detailed.keys(0)
    assert keys.shape[2] == 2500
    assert torch.equal(keys[:, :, :452], keys[:, :, 2048:])
    assert keys.isfinite().all()


def test_standing_somewhere_writes_nothing() -> None:
    runner = ModelRunner(small(INTERNVL))
    state = filled(runner, Config(budget=32), 8)
    # As bits: a slot that nothing was ever written to may hold a NaN, which equals nothing.
    before = [buffer.view(torch.int32).clone() for buffer in state.carried.buffers]
    for tokens, carried in ((0, 0), (10, 10), (40, 32), (80, 32)):
        stand(state, tokens, tokens, TOKENS)
        assert (state.tokens, state.position, state.carried.length) == (tokens, tokens, carried)
    now = [buffer.view(torch.int32) for buffer in state.carried.buffers]
    assert all(torch.equal(one, other) for one, other in zip(before, now, strict=True))


def test_steps_can_be_taken_again_and_again_from_one_place() -> None:
    runner = ModelRunner(small(INTERNVL))
    state = filled(runner, Config(budget=16), 6)
    grown, addresses = state.detailed.grown, state.detailed.addresses
    step = random_step(runner.model, TOKENS, 7)
    for _ in range(5):
        stand(state, 60, 60, TOKENS)
        runner.enter(state, step)
        assert (state.tokens, state.carried.length, len(state.spans)) == (70, 16, 7)
    assert (state.detailed.grown, state.detailed.addresses) == (grown, addresses)


def test_streams_may_share_one_detailed_cache() -> None:
    runner = ModelRunner(small(INTERNVL))
    one, other = filled(runner, Config.of("full"), 4), runner.open(Config(budget=16))
    other.detailed = one.detailed
    assert isinstance(other.carried, CarriedCache)
    fill_carried(other.carried, TOKENS)
    stand(other, 40, 40, TOKENS)
    runner.enter(other, random_step(runner.model, TOKENS, 5))
    assert one.tokens == other.tokens == 50
    stand(one, 40, 40, TOKENS)
    assert one.tokens == other.tokens == 40
