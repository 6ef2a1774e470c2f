"""Never more than the budget, always whole, always the right keys."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from statekv.cache.carried import CarriedCache, one_block
from statekv.cache.detailed import DetailedCache
from statekv.cache.policies.wrappers import IMPORTANCE
from statekv.cache.spec import KVSpec, PositionShift
from statekv.ops import select
from statekv.ops.rope import rotate
from tests.cache.test_detailed import turns
from tests.cache.tokens import check_whole, keys, kv_spec, policy, values

CPU, META = torch.device("cpu"), torch.device("meta")
CARRIES = ["attention", "recent", "sink_recent", "random"]


def carried(
    budget: int, carry: str = "attention", g: KVSpec | None = None, sinks: int = 4, seed: int = 0, pinned: int = 0
) -> CarriedCache:
    g = g or kv_spec()
    sinks = sinks if carry == "sink_recent" else 0
    made = policy(carry, pinned, sinks=sinks, seed=seed, budget=max(budget, sinks + 1))
    return CarriedCache(g, budget, made, DetailedCache(g))


def random_scores(cache: CarriedCache, layer: int, seed: int) -> torch.Tensor:
    shape = (cache.spec.streams, cache.spec.kv_heads, cache.lengths[layer])
    return torch.rand(shape, generator=torch.Generator().manual_seed(1000 * layer + seed))


def held(cache: CarriedCache, layer: int) -> torch.Tensor:
    """[streams, kv_heads, length] token numbers in slot order, read off the keys themselves."""
    key, value = cache.buffers[layer][..., : cache.lengths[layer], :]
    return check_whole(cache.spec, layer, key, value)


def step(cache: CarriedCache, tokens: int, seed: int = 0, evict: bool = True) -> None:
    """One step, as the attention layers make it: layer by layer append, attend, evict."""
    g, start = cache.spec, cache.detailed.length
    new = range(start, start + tokens)
    cache.open_slots(tokens)
    for layer in range(g.layers):
        before = held(cache, layer)
        key, value = cache.update(keys(g, layer, new), values(g, layer, new), layer)
        seen = check_whole(g, layer, key, value)
        assert torch.equal(seen[..., : before.shape[-1]], before)
        assert (seen[..., before.shape[-1] :] == torch.tensor(list(new))).all()  # the own keys last, in order
        if evict:
            cache.evict(layer, random_scores(cache, layer, seed))


def sizes(seed: int, longest: int, steps: int = 40) -> list[int]:
    draw = random.Random(seed)
    return [draw.randint(1, longest) for _ in range(steps)]


@pytest.mark.parametrize(
    ("budget", "longest", "streams"), [(20, 7, 1), (20, 20, 2), (20, 55, 1), (20, 55, 2), (1, 3, 2)]
)
@pytest.mark.parametrize("carry", CARRIES)
def test_stays_within_the_budget_and_whole(carry: str, budget: int, longest: int, streams: int) -> None:
    cache = carried(budget, carry, kv_spec(streams=streams), sinks=0 if budget == 1 else 4)
    total = 0
    for number, tokens in enumerate(sizes(budget + longest, longest)):
        total += tokens
        step(cache, tokens, seed=number)
        assert cache.length == cache.get_seq_length() == min(total, budget)
        assert set(cache.lengths) == {cache.length}
        for layer in range(cache.spec.layers):
            tokens_held = held(cache, layer).sort(-1).values
            assert torch.equal(cache.kept(layer), tokens_held)
            assert (tokens_held.diff(dim=-1) > 0).all()  # none twice
    assert cache.detailed.length == total
    for layer in range(cache.spec.layers):
        detailed = check_whole(cache.spec, layer, cache.detailed.keys(layer), cache.detailed.values(layer))
        assert (detailed == torch.arange(total)).all()


@pytest.mark.parametrize(("budget", "longest"), [(20, 7), (20, 55)])
def test_keeps_what_a_gather_would(budget: int, longest: int) -> None:
    """Sets of tokens per layer and head, chosen by hand from the same scores, over many steps."""
    cache = carried(budget, "attention", kv_spec(streams=2))
    expected: dict[tuple[int, int, int], list[int]] = {}
    for number, tokens in enumerate(sizes(3, longest)):
        start = cache.detailed.length
        cache.open_slots(tokens)
        for layer in range(3):
            new = range(start, start + tokens)
            cache.update(keys(cache.spec, layer, new), values(cache.spec, layer, new), layer)
            scores = random_scores(cache, layer, number)
            slots = held(cache, layer)
            for s in range(2):
                for h in range(2):
                    known = expected.get((layer, s, h), [])
                    assert sorted(slots[s, h].tolist()) == sorted([*known, *new])
                    ranked = sorted(zip(scores[s, h].tolist(), slots[s, h].tolist(), strict=True), reverse=True)
                    expected[layer, s, h] = [token for _, token in ranked[:budget]]
            cache.evict(layer, scores)
    for (layer, s, h), tokens_kept in expected.items():
        assert cache.kept(layer)[s, h].tolist() == sorted(tokens_kept)
    assert len({tuple(sorted(tokens_kept)) for tokens_kept in expected.values()}) == len(expected)


@pytest.mark.parametrize("carry", CARRIES)
def test_addresses_are_constant_once_full(carry: str) -> None:
    cache = carried(20, carry)
    for tokens in (7, 7, 7, 9):
        step(cache, tokens)
    assert cache.length == 20
    before = [buffer.data_ptr() for buffer in [*cache.buffers, *cache.token_ids]]
    nbytes = cache.nbytes
    for number, tokens in enumerate(sizes(1, 9)):
        step(cache, tokens, seed=number)
    assert [buffer.data_ptr() for buffer in [*cache.buffers, *cache.token_ids]] == before
    assert cache.nbytes == nbytes


def test_slots_and_bytes_are_the_budget_and_the_longest_step() -> None:
    g = kv_spec(streams=2)
    cache = carried(20, g=g)
    longest = 0
    for tokens in (3, 9, 4, 9, 2, 30, 30, 8):
        longest = max(longest, tokens)
        step(cache, tokens)
        assert max(cache.slots) <= 20 + longest
    assert cache.slots == [50] * 3
    births = 4 * g.layers * g.streams * g.kv_heads
    assert cache.nbytes == 50 * (g.streams * g.bytes_per_token + births)


def test_layers_share_one_block() -> None:
    cache = carried(20)
    step(cache, 9)
    storages = {buffer.untyped_storage().data_ptr() for buffer in cache.buffers}
    assert len(storages) == 1


def test_layers_of_any_size_share_a_block_and_do_not_overlap() -> None:
    shapes = [(2, 3, 4), (2, 0, 4), (2, 5, 4), (1, 1)]
    tensors = one_block(shapes, torch.int32, [CPU] * 4)
    assert [tuple(tensor.shape) for tensor in tensors] == shapes
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    assert all((tensor == number).all() for number, tensor in enumerate(tensors))
    assert tensors[0].untyped_storage().nbytes() == 4 * sum(tensor.numel() for tensor in tensors)


def test_each_device_has_its_own_block() -> None:
    tensors = one_block([(2,), (3,), (4,)], torch.float32, [CPU, META, CPU])
    assert [tensor.device.type for tensor in tensors] == ["cpu", "meta", "cpu"]
    assert tensors[0].untyped_storage().nbytes() == 24
    assert tensors[1].untyped_storage().nbytes() == 12


def test_growing_to_a_large_budget_copies_a_linear_number_of_tokens() -> None:
    cache = carried(10_000, g=kv_spec(layers=1))
    copied = 0
    while cache.length < 10_000:
        before, length = cache.buffers[0], cache.length
        step(cache, 50)
        if cache.buffers[0].data_ptr() != before.data_ptr():
            copied += length
    assert copied <= 2 * 10_000


@pytest.mark.parametrize("filled", [0, 1, 3, 6])
@pytest.mark.parametrize("carry", CARRIES)
def test_a_peek_leaves_everything_as_it_was(carry: str, filled: int) -> None:
    def state(cache: CarriedCache) -> list[torch.Tensor]:
        return [held(cache, layer) for layer in range(3)] + [cache.kept(layer) for layer in range(3)]

    cache, twin = carried(20, carry), carried(20, carry)
    for number in range(filled):
        step(cache, 6, seed=number)
        step(twin, 6, seed=number)
    length, tokens, before = cache.length, cache.detailed.length, state(cache)
    step(cache, 33, evict=False)
    assert cache.length == length + 33
    cache.truncate(length)
    cache.detailed.truncate(tokens)
    assert cache.length == length
    for number in range(4):
        assert all(torch.equal(a, b) for a, b in zip(state(cache), before, strict=True))
        step(cache, 6, seed=50 + number)
        step(twin, 6, seed=50 + number)
        before = state(twin)


def test_within_the_budget_nothing_is_touched() -> None:
    cache = carried(20, "random")
    step(cache, 12)
    step(cache, 8)
    assert all((held(cache, layer) == torch.arange(20)).all() for layer in range(3))


@pytest.mark.parametrize("longest", [5, 30])
def test_recent_carries_exactly_the_newest(longest: int) -> None:
    cache = carried(12, "recent")
    for tokens in sizes(0, longest):
        step(cache, tokens)
        total = cache.detailed.length
        newest = torch.arange(max(0, total - 12), total)
        assert all((cache.kept(layer) == newest).all() for layer in range(3))


@pytest.mark.parametrize(("sinks", "pinned"), [(4, 0), (4, 6), (0, 3)])
@pytest.mark.parametrize("longest", [5, 30])
def test_sink_recent_carries_exactly_the_first_and_the_newest(longest: int, sinks: int, pinned: int) -> None:
    cache = carried(12, "sink_recent", sinks=sinks, pinned=pinned)
    first = max(sinks, pinned)
    for tokens in sizes(0, longest):
        step(cache, tokens)
        total = cache.detailed.length
        expected = [t for t in range(total) if t < first or t >= total - (12 - first)]
        assert all((cache.kept(layer) == torch.tensor(expected)).all() for layer in range(3))


@pytest.mark.parametrize("carry", ["attention", "random"])
def test_a_pinned_prefix_survives_every_step(carry: str) -> None:
    cache = carried(12, carry, pinned=5)
    for number, tokens in enumerate(sizes(0, 30)):
        step(cache, tokens, seed=number)
        first = torch.arange(min(5, cache.detailed.length))
        assert all((cache.kept(layer)[..., :5] == first).all() for layer in range(3))


def after_random_steps(seed: int, g: KVSpec, steps: int = 12, budget: int = 32) -> CarriedCache:
    cache = carried(budget, "random", g, seed=seed)
    for _ in range(steps):
        step(cache, 16)
    return cache


def test_random_repeats_itself_with_its_seed() -> None:
    g = kv_spec()
    first, again, other = (after_random_steps(seed, g) for seed in (1, 1, 2))
    assert all(torch.equal(first.kept(layer), again.kept(layer)) for layer in range(3))
    assert not any(torch.equal(first.kept(layer), other.kept(layer)) for layer in range(3))


def test_random_differs_across_heads_and_layers_and_draws_in_a_batch_as_alone() -> None:
    cache = after_random_steps(0, kv_spec(kv_heads=4, streams=2))
    rows = [tuple(row) for layer in range(3) for row in cache.kept(layer)[0].tolist()]
    assert len(set(rows)) == len(rows) == 12
    assert all(torch.equal(*cache.kept(layer)) for layer in range(3))


def random_shares(steps: int) -> torch.Tensor:
    """[steps]: how much of each step is still carried after all of them, averaged over 1600 heads."""
    cache = after_random_steps(0, kv_spec(layers=1, kv_heads=1600), steps=steps)
    counts = torch.bincount(cache.kept(0).flatten() // 16, minlength=steps)
    return counts / (1600 * 16)


def test_random_treats_the_tokens_of_one_step_alike() -> None:
    shares = random_shares(3)  # 32 of 48 stay
    torch.testing.assert_close(shares, torch.full((3,), 2 / 3), atol=0.02, rtol=0)


def test_random_keeps_any_token_of_the_stream_with_equal_chance() -> None:
    """B keys at random, not a soft recency window: a draw among the carried and the new ones alone would halve old
    tokens' chances again and again."""
    shares = random_shares(12)  # 32 of 192 stay
    torch.testing.assert_close(shares, torch.full((12,), 1 / 6), atol=0.02, rtol=0)


def test_evicting_moves_no_more_than_what_arrives() -> None:
    cache = carried(20)
    step(cache, 20)
    cache.open_slots(3)
    g = cache.spec
    cache.update(keys(g, 0, range(20, 23)), values(g, 0, range(20, 23)), 0)
    before = held(cache, 0)
    scores = random_scores(cache, 0, 5)
    cache.evict(0, scores)
    stayed = select.best(scores, 20)[..., :20]
    assert torch.equal(held(cache, 0)[stayed], before[..., :20][stayed])


def dialled(budget: int, slope: float = 0.0, decay: float = 0.0, streams: int = 1) -> CarriedCache:
    g = kv_spec(streams=streams)
    return CarriedCache(g, budget, policy(layer_slope=slope, decay=decay), DetailedCache(g))


@pytest.mark.parametrize("decay", [0.25, 1.0])
def test_scores_add_up_by_hand(decay: float) -> None:
    """Also in the steps before the first eviction; what is kept takes its score along into its new slot."""
    cache = dialled(20, decay=decay, streams=2)
    expected: dict[tuple[int, int, int], dict[int, float]] = {}
    for number, tokens in enumerate(sizes(3, 9)):
        cache.open_slots(tokens)
        start = cache.detailed.length
        for layer in range(3):
            new = range(start, start + tokens)
            cache.update(keys(cache.spec, layer, new), values(cache.spec, layer, new), layer)
            scores, slots = random_scores(cache, layer, number), held(cache, layer)
            cache.evict(layer, scores)
            for s, h in [(0, 0), (0, 1), (1, 0), (1, 1)]:
                former = expected.get((layer, s, h), {})
                own = dict(zip(slots[s, h].tolist(), scores[s, h].tolist(), strict=True))
                total = {token: score + decay * former.get(token, 0.0) for token, score in own.items()}
                best = sorted(total, key=lambda token: -total[token])[:20]
                expected[layer, s, h] = {token: total[token] for token in best}
                length = cache.lengths[layer]
                found = zip(
                    held(cache, layer)[s, h].tolist(),
                    cache.state[layer][IMPORTANCE][s, h, :length].tolist(),
                    strict=True,
                )
                assert dict(found) == pytest.approx(expected[layer, s, h])


def test_scores_cost_four_bytes_a_slot_and_nothing_without_decay() -> None:
    plain, adding = dialled(20), dialled(20, decay=0.5)
    for cache in (plain, adding):
        for _ in range(4):
            step(cache, 9)
    assert plain.state == [{}] * 3
    assert adding.nbytes - plain.nbytes == 4 * sum(adding.slots) * adding.spec.kv_heads


@pytest.mark.parametrize("slope", [0.5, -0.5, 0.31])
def test_layers_keep_what_their_budgets_say_and_sum_to_the_flat_total(slope: float) -> None:
    cache = dialled(20, slope)
    assert sum(cache.budgets) == 60
    for number, tokens in enumerate(sizes(3, 9)):
        step(cache, tokens, seed=number)
        assert cache.lengths == [min(cache.detailed.length, budget) for budget in cache.budgets]
        assert cache.full == (cache.detailed.length >= max(cache.budgets))
        assert cache.length == max(cache.lengths)
        for layer in range(3):
            held(cache, layer)  # whole
    assert all(slots <= budget + 9 for slots, budget in zip(cache.slots, cache.budgets, strict=True))
    births = 4 * cache.spec.kv_heads
    per_slot = cache.spec.bytes_per_token // 3 + births
    assert cache.nbytes == sum(cache.slots) * per_slot


@pytest.mark.parametrize("filled", [0, 1, 2, 3, 6])
def test_a_peek_leaves_layers_of_any_budget_as_they_were(filled: int) -> None:
    """With 6, 12 and 18 tokens some layers are full and some are not."""
    cache, twin = dialled(13, 0.6, 0.5), dialled(13, 0.6, 0.5)
    for number in range(filled):
        step(cache, 6, seed=number)
        step(twin, 6, seed=number)
    length, tokens = cache.length, cache.detailed.length
    step(cache, 17, evict=False)
    cache.truncate(length)
    cache.detailed.truncate(tokens)
    assert cache.lengths == twin.lengths
    for number in range(3):
        step(cache, 6, seed=50 + number)
        step(twin, 6, seed=50 + number)
        for layer in range(3):
            assert torch.equal(cache.kept(layer), twin.kept(layer))
            length = cache.lengths[layer]
            assert torch.equal(
                cache.state[layer][IMPORTANCE][..., :length], twin.state[layer][IMPORTANCE][..., :length]
            )


def test_a_step_is_judged_where_it_overflows_or_scores_add_up() -> None:
    flat, layered, adding = dialled(20), dialled(20, 0.5), dialled(20, decay=0.1)
    assert [flat.must_evict(20), flat.must_evict(21)] == [False, True]
    assert [layered.must_evict(10), layered.must_evict(11)] == [False, True]
    assert adding.must_evict(1)


def test_pinning_the_newest_moves_on_in_place() -> None:
    cache = carried(12)
    for number in range(8):
        start = cache.detailed.length
        cache.pin_from(start)
        step(cache, 7, seed=number)
        assert all((cache.kept(layer)[..., -7:] == torch.arange(start, start + 7)).all() for layer in range(3))
    addresses = {place.data_ptr() for place in cache.newest.values()}
    cache.pin_from(1000)
    assert {place.data_ptr() for place in cache.newest.values()} == addresses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_carried_keys_turn_by_what_their_tokens_move(dtype: torch.dtype) -> None:
    """In float32. Each head holds other tokens; those before the first moved one keep their bits, like all values."""
    cache = carried(20, g=kv_spec(streams=2, dtype=dtype))
    for number in range(12):
        step(cache, 7, seed=number)
    first, before = 30, [buffer.clone() for buffer in cache.buffers]
    by = -(1 + torch.arange(84 - first) // 5)
    cache.rotate(PositionShift(range(first, first + len(by)), by.tolist()), turns)
    for layer, buffer in enumerate(before):
        token_ids = cache.token_ids[layer][..., :20].long()
        for s, h, slot in itertools.product(range(2), range(2), range(20)):
            token, (key, value) = int(token_ids[s, h, slot]), buffer[:, s, h, slot]
            far = int(by[token - first]) if token >= first else 0
            expected = rotate(key.float(), *(part[0, 0] for part in turns(torch.tensor([far])))).to(dtype)
            assert torch.equal(cache.buffers[layer][0, s, h, slot], expected if far else key)
            assert torch.equal(cache.buffers[layer][1, s, h, slot], value)


def remembering(budget: int = 20, decay: float = 0.0, remembers: bool = True, carry: str = "attention") -> CarriedCache:
    g = kv_spec(streams=2)
    made = policy(carry, decay=decay, memory=1 << 40 if remembers else None)
    return CarriedCache(g, budget, made, DetailedCache(g))


@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("starts", [[0], [0, 9, 40], [13, 14, 77, 500], list(range(0, 90, 7))], ids=str)
def test_a_segments_worth_is_that_of_its_slots(starts: list[int], decay: float) -> None:
    cache = remembering(decay=decay)
    for number, tokens in enumerate(sizes(3, 9, steps=20)):
        step(cache, tokens, seed=number)
        expected: dict[int, tuple[float, int]] = {}
        for layer, s, h in itertools.product(range(3), range(2), range(2)):
            for slot in range(cache.lengths[layer]):
                before = [start for start in starts if start <= int(cache.token_ids[layer][s, h, slot])]
                if before:
                    score, count = expected.get(before[-1], (0.0, 0))
                    expected[before[-1]] = score + float(cache.state[layer][IMPORTANCE][s, h, slot]), count + 1
        found = cache.importance(starts)
        assert found.keys() == expected.keys()
        for start, (score, count) in expected.items():
            assert found[start][0] == pytest.approx(score, rel=1e-12)
            assert found[start][1] == count
    assert sum(score for score, _ in found.values()) > 0


def test_a_worth_is_that_of_the_newest_step_that_was_judged() -> None:
    """By hand: what is kept has the scores that it was kept for; until something has to go, none has any."""
    cache = remembering()
    step(cache, 12, evict=False)
    step(cache, 8, evict=False)
    assert not cache.must_evict(0)
    assert cache.importance([0, 12]) == {0: (0.0, 12 * 12), 12: (0.0, 8 * 12)}
    cache.open_slots(5)
    expected = [0.0, 0.0, 0.0]
    for layer in range(3):
        own = range(20, 25)
        cache.update(keys(cache.spec, layer, own), values(cache.spec, layer, own), layer)
        scores, slots = random_scores(cache, layer, 2), held(cache, layer)
        for s, h in itertools.product(range(2), range(2)):
            best = sorted(zip(scores[s, h].tolist(), slots[s, h].tolist(), strict=True), reverse=True)[:20]
            for score, token in best:
                expected[(token >= 12) + (token >= 20)] += score
        cache.evict(layer, scores)
    found = cache.importance([0, 12, 20])
    assert [found[start][0] for start in (0, 12, 20)] == pytest.approx(expected)


@pytest.mark.parametrize("carry", CARRIES)
def test_remembering_scores_changes_nothing_else(carry: str) -> None:
    cache, plain = remembering(carry=carry), remembering(carry=carry, remembers=False)
    for number, tokens in enumerate(sizes(5, 30)):
        for each in (cache, plain):
            step(each, tokens, seed=number)
        assert cache.lengths == plain.lengths
        assert cache.must_evict(tokens) == plain.must_evict(tokens)
        for layer in range(3):
            assert torch.equal(held(cache, layer), held(plain, layer))  # slot by slot
            assert torch.equal(cache.token_ids[layer][..., : cache.lengths[layer]], held(plain, layer))
    assert plain.state == [{}] * 3
    assert cache.nbytes - plain.nbytes == 4 * sum(cache.slots) * 2 * 2


def test_a_fork_remembers_too() -> None:
    cache = remembering()
    for number in range(5):
        step(cache, 9, seed=number)
    other = cache.fork(DetailedCache(cache.spec))
    assert other.importance([0, 20]) == cache.importance([0, 20])
    before = other.importance([0, 20])
    step(cache, 9, seed=9)
    assert other.importance([0, 20]) == before != cache.importance([0, 20])
