"""Layers with ladders of their own: as text, in budgets and plans, and in caches."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pagedkv
from pagedkv import KVShape, PagedCache, TierConfig
from pagedkv.allocator import Ladder, LayerLadders, Precision
from pagedkv.integrations.mlx_lm.model_notes import FOLDER
from pagedkv.tiers.budget import TierBudget
from pagedkv.tiers.cold.disk_budget import DiskBudget
from tests.models import lively, random_tokens, tiny_llama
from tests.stores import filled_with_zeros

COMMON = Ladder.parse("K4V4")
EIGHT = Ladder.parse("K8V8")
SMALL = {"hot_tokens": 64, "sink_tokens": 4, "page_tokens": 256}

# As text


def test_ladders_of_layers_as_text() -> None:
    ladders = LayerLadders.parse("K4V4", "K8V8@7,17-19 ; K8V4:2048,K2V2@0")
    assert ladders.of(7) == ladders.of(18) == EIGHT
    assert str(ladders.of(0)) == "K8V4:2048,K2V2"
    assert ladders.of(1) == ladders.of(20) == COMMON
    assert ladders.others_text == "K8V4:2048,K2V2@0;K8V8@7,17,18,19"
    assert LayerLadders.parse("K4V4", ladders.others_text) == ladders
    assert str(LayerLadders.parse("k4v4")) == "K4V4"
    assert LayerLadders.parse("K4V4", "K4V4@3") == LayerLadders.parse("K4V4")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("K8V8", "layer_kv is 'auto', 'same', or a ladder and the layers"),
        ("none", "layer_kv is 'auto', 'same'"),
        ("K8V8@", "is no layer number"),
        ("K8V8@x", "'x' is no layer number"),
        ("K8V8@3-1", "'3-1' is no layer number"),
        ("K8V8@99999999999", "is no layer number"),
        ("K9V8@1", "unknown precision K9V8"),
        ("K8V8@1;K2V2@0-3", "layer 1 has two ladders"),
        ("K8V8@1;", "write a ladder and the layers"),
    ],
)
def test_bad_text_says_what_would_do(text: str, says: str) -> None:
    with pytest.raises(pagedkv.ConfigError, match=says):
        TierConfig(layer_kv=text)


def test_layer_kv_is_text() -> None:
    with pytest.raises(
        pagedkv.ConfigError, match="layer_kv is 'auto', 'same', or a ladder and the layers"
    ):
        TierConfig(layer_kv=8)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kv", "more"),
    [
        ("K4V4", "K8V8"),
        ("K2V2", "K4V4"),
        ("K3V3", "K8V8"),
        ("K4V2", "K8V4"),
        ("K8V8", "K8V8"),
        ("fp16", "fp16"),
        ("K8V4:2048,K4V4", "K8V8"),
        ("fp16:512,K8V4:8192,K4V4:65536,K4V2", "fp16:512,K8V8:65536,K8V4"),
        ("K8V2:100,K4V4", "K8V8"),
    ],
)
def test_twice_the_bits(kv: str, more: str) -> None:
    assert str(Ladder.parse(kv).doubled) == more


precisions = st.sampled_from(
    [Precision(16, 16), *(Precision(k, v) for k in (2, 3, 4, 8) for v in (2, 3, 4, 8))]
)


@given(st.lists(precisions, min_size=1, max_size=4))
def test_twice_the_bits_of_any_ladder(found: list[Precision]) -> None:
    """It is a ladder again, and nowhere has fewer bits than the one it was made of."""
    steps = tuple(sorted(found, key=lambda p: -p.key_bits - p.value_bits))
    ladder = Ladder(steps, tuple(range(100, 100 * len(steps), 100)))
    for distance in range(0, 600, 50):
        before, after = ladder.at(distance), ladder.doubled.at(distance)
        assert (after.key_bits, after.value_bits) >= (before.key_bits, before.value_bits)
        assert after.value_bits >= before.value_bits


# Budgets


def budget(ladders: LayerLadders, **given: Any) -> TierBudget:
    numbers = {"warm_bytes": 10**9, "cold_bytes": 10**9, "cold_dir": None}
    return TierBudget(**{**numbers, "hot_tokens": 0, "sink_tokens": 0, **given}, ladders=ladders)


@given(
    layers=st.integers(1, 40),
    others=st.dictionaries(st.integers(0, 39), precisions, max_size=40),
    common=precisions,
    total=st.integers(0, 2**40),
)
def test_shares_are_never_more_than_there_is(
    layers: int, others: dict[int, Precision], common: Precision, total: int
) -> None:
    own = {n: Ladder((p,)) for n, p in others.items() if n < layers}
    ladders = LayerLadders.of_layers(Ladder((common,)), own)
    held = budget(ladders, warm_bytes=total, cold_bytes=total)
    warm = [held.warm_share(layers, n) for n in range(layers)]
    # Half of the largest share is left for a slab that doubles.
    assert sum(warm) + max(warm) / 2 <= total
    assert total - sum(warm) - max(warm) / 2 <= 2 * layers
    disk = DiskBudget(total, layers, ladders=ladders)
    cold = [disk.layer_share(n) for n in range(layers)]
    assert cold == [held.cold_share(layers, n) for n in range(layers)]
    assert total - layers <= sum(cold) <= total


def test_layers_hold_as_many_tokens_whatever_their_bits() -> None:
    config = TierConfig(warm="1GB", cold="4GB", layer_kv="K8V8@3,9;K2V2@4", page_tokens=256)
    with PagedCache.standalone(12, config) as cache:
        for layer in cache:
            layer.append(mx.zeros((1, 8, 1, 128)), mx.zeros((1, 8, 1, 128)))
        pagers = cache.context.pager.layer_pagers
        slots = [p._slabs[p.precisions[0]].max_slots for p in pagers]
        told = [str(p.precisions[0]) for p in pagers]
    assert [told[n] for n in (0, 3, 4, 9)] == ["K4V4", "K8V8", "K2V2", "K8V8"]
    assert max(slots) - min(slots) <= max(slots) // 100


def test_a_share_below_a_page_says_what_would_do() -> None:
    config = TierConfig(layer_kv="K8V8@1", warm=300_000, **SMALL)
    needed = 0
    for number in (0, 1):
        with PagedCache.standalone(2, config) as cache:
            cache[0].append(mx.zeros((1, 2, 1, 64)), mx.zeros((1, 2, 1, 64)))
            pages = [cache.context.pager.budget.warm_share(2, n) for n in (0, 1)]
            assert pages[1] > 1.8 * pages[0]
        with (
            PagedCache.standalone(2, TierConfig(layer_kv="K8V8@1", warm=1000, **SMALL)) as cache,
            pytest.raises(pagedkv.ConfigError, match=f"layer {number} gets .* give at least") as e,
        ):
            cache[number].append(mx.zeros((1, 2, 1, 64)), mx.zeros((1, 2, 1, 64)))
        needed = max(needed, int(str(e.value).rpartition("at least ")[2].replace(",", "")))
    with PagedCache.standalone(2, TierConfig(layer_kv="K8V8@1", warm=needed, **SMALL)) as cache:
        for layer in cache:
            layer.append(mx.zeros((1, 2, 1, 64)), mx.zeros((1, 2, 1, 64)))


@pytest.mark.parametrize("tokens", [700, 2300, 3000])
def test_a_plan_is_what_happens(tokens: int) -> None:
    shape, layers = KVShape(2, 64, 64), 3
    config = TierConfig(layer_kv="K8V8@1", warm="1100KB", cold="64MB", **SMALL)
    plan = pagedkv.plan(shape, layers, tokens, config)
    with PagedCache.standalone(layers, config) as cache:
        stats = filled_with_zeros(cache, tokens)
    assert stats.warm.bytes == plan.warm_bytes
    assert stats.cold.bytes == plan.cold_bytes
    assert stats.ladders == ("K4V4", "K8V8", "K4V4")


def test_a_plan_counts_layers_that_are_not_known_yet() -> None:
    shape, config = KVShape(8, 128, 128), TierConfig(warm="1GB", cold=0)
    auto, five = (
        pagedkv.plan(shape, 32, 16_384, c)
        for c in (config, TierConfig(warm="1GB", cold=0, layer_kv="K8V8@3,7,20-25"))
    )
    same = pagedkv.plan(shape, 32, 16_384, TierConfig(warm="1GB", cold=0, layer_kv="same"))
    assert auto == five
    assert auto.warm_bytes > same.warm_bytes
    assert auto.max_context < same.max_context


# Caches


def read(model: Any, cache: Any, n: int, seed: int = 0) -> mx.array:
    tokens = random_tokens(n, seed)
    parts = [model(tokens[:, at : at + 300], cache=cache) for at in range(0, n, 300)]
    mx.eval(parts)
    return parts[-1][0, -1]


def test_pages_of_each_layer_are_as_it_says() -> None:
    model = lively(tiny_llama(layers=3))
    config = TierConfig(kv="K8V4:400,K2V2", layer_kv="K8V8@1;K4V4@2", cold=0, **SMALL)
    with pagedkv.wrap(model, config) as cache:
        read(model, cache, 1400)
        held = [[str(p.precision) for p, _ in c.located_pages()] for c in cache.paged_layers]
        assert held[0] == ["K2V2"] * 3 + ["K8V4"] * 2
        assert set(held[1]) == {"K8V8"}
        assert set(held[2]) == {"K4V4"}
        told = cache.stats()
        assert told.ladders == ("K8V4:400,K2V2", "K8V8", "K4V4")
        assert told.treatments[1] == "none", "8 bits are left as they are"
    pagedkv.unwrap(model)


def test_more_bits_are_nearer_to_the_models_own_cache() -> None:
    model = lively(tiny_llama(layers=2))

    def away(layer_kv: str) -> float:
        config = TierConfig(kv="K2V2", layer_kv=layer_kv, treatment="none", **SMALL)
        with pagedkv.wrap(model, config) as cache:
            found = read(model, cache, 1400)
        pagedkv.unwrap(model)
        return float(mx.abs(found - exact).max())

    exact = read(model, model_cache(model), 1400)
    assert away("K8V8@0-1") < 0.1 * away("same")
    assert away("K8V8@1") < away("same")


def model_cache(model: Any) -> Any:
    from mlx_lm.models.cache import make_prompt_cache

    return make_prompt_cache(model)


def test_a_saved_cache_knows_its_layers(tmp_path: Any) -> None:
    model = lively(tiny_llama(layers=2))
    config = TierConfig(layer_kv="K8V8@1", cold=0, **SMALL)
    path = str(tmp_path / "a.safetensors")
    with pagedkv.wrap(model, config) as cache:
        read(model, cache, 900)
        cache.save(path)
        want = read(model, cache, 3, seed=4)
    pagedkv.unwrap(model)
    with pagedkv.load(path, model) as cache:
        assert cache.context.settled.layer_kv == "K8V8@1"
        assert mx.array_equal(read(model, cache, 3, seed=4), want).item()
    pagedkv.unwrap(model)
    with pytest.raises(pagedkv.CacheStateError, match=r"layer 1.* is K8V8, which .*'K4V4'"):
        pagedkv.load(path, model, TierConfig(layer_kv="same", cold=0, **SMALL))


def test_a_file_from_before_has_layers_alike(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER, "/dev/null/nowhere")
    monkeypatch.setattr(
        "pagedkv.integrations.mlx_lm.retrieval_layers.echoes", lambda model: {1: 0.5}
    )
    model = lively(tiny_llama(layers=4))
    path = str(tmp_path / "a.safetensors")
    real = TierConfig.to_dict

    def without(config: TierConfig) -> dict[str, Any]:
        return {name: value for name, value in real(config).items() if name != "layer_kv"}

    with pagedkv.wrap(model, TierConfig(layer_kv="same", cold=0, **SMALL)) as cache:
        read(model, cache, 900)
        with monkeypatch.context() as patch:
            patch.setattr(TierConfig, "to_dict", without)
            cache.save(path)
        want = read(model, cache, 3, seed=4)
    pagedkv.unwrap(model)
    with pagedkv.load(path, model) as cache:
        assert mx.array_equal(read(model, cache, 3, seed=4), want).item()
    pagedkv.unwrap(model)


def test_layers_that_a_cache_does_not_have_are_refused() -> None:
    with pytest.raises(
        pagedkv.ConfigError, match=r"names layers \[100, 101\], but this cache has 8"
    ):
        PagedCache.standalone(8, TierConfig(layer_kv="K2V2@100-101,7"))
