"""Layers with several caches: paged inside their `CacheList`, saved, flushed, and taken back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import cache as stock

import pagedkv
from pagedkv.cache.nested import inner_caches, replaced, streams
from pagedkv.cli.doctor import _verdict
from pagedkv.cli.doctor_checks import OK, WARN
from tests.model_matrix import tiny_budgets
from tests.model_zoo import build
from tests.models import random_tokens as tokens
from tests.models import tiny_llama

NESTED = "longcat_flash"  # two streams per layer, all of them paged


@pytest.fixture(scope="module")
def nested() -> Any:
    return build(NESTED)


def budgets(model: Any, **changes: Any) -> pagedkv.TierConfig:
    with pagedkv.wrap(model, pagedkv.TierConfig(hot_dtype="model")) as cache:
        config = tiny_budgets(cache)
    pagedkv.unwrap(model)
    return pagedkv.TierConfig(**{**config.to_dict(), **changes})


def test_streams_are_numbered_in_order_and_nesting_stays() -> None:
    lists = [
        stock.KVCache(),
        stock.CacheList(stock.KVCache(), stock.CacheList(stock.ArraysCache(1))),
        stock.RotatingKVCache(8),
    ]
    seen = replaced(lists, lambda number, cache: (number, type(cache).__name__))
    assert seen[0] == (0, "KVCache")
    assert seen[1].caches[0] == (1, "KVCache")
    assert seen[1].caches[1].caches == ((2, "ArraysCache"),)
    assert seen[2] == (3, "RotatingKVCache")
    assert [type(c).__name__ for c in streams(lists)] == [name for _, name in [
        seen[0], seen[1][0], seen[1][1][0], seen[2]]]  # fmt: skip
    assert inner_caches(lists[0]) is None
    assert type(lists[1].caches[0]) is stock.KVCache  # the first list is as it was


def test_each_stream_has_a_number_and_pages_of_its_own(nested: Any) -> None:
    with pagedkv.wrap(nested, budgets(nested)) as cache:
        mx.eval(nested(tokens(600, seed=1), cache=cache), [c.state for c in cache])
        assert isinstance(cache[0], stock.CacheList)
        assert [layer.layer for layer in cache.paged_layers] == list(range(2 * len(cache)))
        assert cache.is_fully_paged
        mx.eval(nested(tokens(1, seed=2), cache=cache))
        assert [len(list(c.located_pages())) for c in cache.paged_layers] == [2] * 2 * len(cache)
        assert cache.stats().warm.pages + cache.stats().cold.pages == 4 * len(cache)
        assert set(cache.stats().layers) == {"CacheList(paged (dense), paged (dense))"}
        assert cache.offset == 601
        assert cache.trim(100) == 100
        assert {layer.offset for layer in cache.paged_layers} == {501}
    pagedkv.unwrap(nested)


def test_a_file_of_ours_is_read_by_both_loaders(nested: Any, tmp_path: Path) -> None:
    ours, theirs = str(tmp_path / "ours.safetensors"), str(tmp_path / "theirs.safetensors")
    step = tokens(1, seed=5)
    with pagedkv.wrap(nested, budgets(nested)) as cache:
        mx.eval(nested(tokens(600, seed=1), cache=cache))
        mx.eval(nested(step, cache=cache))
        assert cache.stats().cold.pages > 0
        cache.save(ours)
        stock.save_prompt_cache(theirs, cache)
        a, b = mx.load(ours), mx.load(theirs)
        assert a.keys() == b.keys()  # the same tree, array by array
        expected = nested(step, cache=cache.fork())
        for path in (ours, theirs):
            for loaded in (pagedkv.load(path, nested), stock.load_prompt_cache(path)):
                assert mx.array_equal(nested(step, cache=loaded), expected).item()
    pagedkv.unwrap(nested)


def test_a_flushed_sequence_is_resumed(nested: Any, tmp_path: Path) -> None:
    config = budgets(nested, cold_dir=str(tmp_path))
    step = tokens(1, seed=5)
    with pagedkv.wrap(nested, config) as cache:
        mx.eval(nested(tokens(600, seed=1), cache=cache))
        mx.eval(nested(step, cache=cache))
        cache.flush()
        expected = nested(step, cache=cache)
        mx.eval(expected)
    pagedkv.unwrap(nested)
    with pagedkv.resume(nested, config) as cache:
        assert cache.offset == 601
        assert mx.array_equal(nested(step, cache=cache), expected).item()
    pagedkv.unwrap(nested)


def test_recurrent_streams_beside_pages_cannot_be_flushed_and_are_named(tmp_path: Path) -> None:
    model = build("falcon_h1")
    with pagedkv.wrap(model, budgets(model, cold_dir=str(tmp_path))) as cache:
        mx.eval(model(tokens(40, seed=1), cache=cache))
        assert not cache.is_fully_paged
        with pytest.raises(pagedkv.CacheStateError, match="ArraysCache"):
            cache.flush()
        with pytest.raises(pagedkv.CacheStateError, match=r"0\.0\.0 is a ArraysCache"):
            cache.save(str(tmp_path / "cache.safetensors"))
    pagedkv.unwrap(model)


# A call that fails


def test_a_refused_call_takes_nothing_whatever_the_order_of_a_layers_streams() -> None:
    """minimax_m3_vl calls the second stream of a layer, its index, before the first."""
    model = build("minimax_m3_vl")
    with pagedkv.wrap(model, budgets(model, cold=0)) as cache:
        # One page per stream, and place for three of the index: nobody counts its tokens twice.
        mx.eval(model(tokens(525, seed=1), cache=cache))
        mx.eval(model(tokens(1, seed=1), cache=cache))  # now streams without a hook are sealed too
        whole = cache.fork()
        with pytest.raises(pagedkv.OutOfPagesError):
            for i in range(40):
                before = cache.offset
                mx.eval(model(tokens(100, seed=2 + i), cache=cache))
        assert {layer.offset for layer in cache.paged_layers} == {before}
        assert cache.trim(before - 400) == before - 400
        assert whole.trim(126) == 126
        extra = tokens(20, seed=9)
        assert mx.array_equal(model(extra, cache=cache), model(extra, cache=whole)).item()
    whole.close()
    pagedkv.unwrap(model)


def test_a_recurrent_model_does_not_go_on_after_a_call_that_failed() -> None:
    """Its states have taken the tokens of that call, and nothing can take them back."""
    model = build("falcon_h1")
    with pagedkv.wrap(model, budgets(model, cold=0)) as cache:
        mx.eval(model(tokens(300, seed=1), cache=cache))
        whole, step = cache.fork(), tokens(1, seed=4)
        expected = model(step, cache=cache.fork())
        with pytest.raises(pagedkv.OutOfPagesError):
            for i in range(40):
                mx.eval(model(tokens(100, seed=2 + i), cache=cache))
        for again in (cache, copy.deepcopy(cache)):
            with pytest.raises(pagedkv.CacheStateError, match="go on from a copy"):
                model(tokens(1, seed=3), cache=again)
        assert mx.array_equal(model(step, cache=whole), expected).item()
        for other in (whole, again):
            other.close()
    pagedkv.unwrap(model)


# What models do with a cache's arrays


def test_keys_without_values_are_cached() -> None:
    model = build("minimax_m3_vl")
    with pagedkv.wrap(model, budgets(model)) as cache:
        index = cache[0][1]
        keys, values = index.update_and_fetch(mx.ones((1, 1, 5, 16)), mx.zeros((1, 1, 5, 0)))
        assert (keys.shape, values.shape) == ((1, 1, 5, 16), (1, 1, 5, 0))
        assert mx.array_equal(keys, mx.ones((1, 1, 5, 16))).item()
    pagedkv.unwrap(model)


def test_arrays_of_a_cache_can_be_set_to_such_as_fit() -> None:
    model = tiny_llama(layers=1)
    with pagedkv.wrap(model, budgets(model)) as cache:
        layer = cache[0]
        assert layer.keys is None
        assert layer.values is None
        expected = [model(tokens(40, seed=1), cache=cache), model(tokens(1, seed=2), cache=cache)]
        cache.trim(1)
        layer.keys = mx.depends(layer.keys, mx.ones((3,)))  # as deepseek_v32 does
        assert mx.array_equal(model(tokens(1, seed=2), cache=cache), expected[1]).item()
        layer.values = mx.zeros_like(layer.values)
        assert not mx.array_equal(model(tokens(1, seed=2), cache=cache), expected[1]).item()
        with pytest.raises(pagedkv.ShapeError, match="cannot take the place"):
            layer.keys = layer.keys[:, :, :4]
        with pytest.raises(pagedkv.ShapeError, match="cannot take the place"):
            layer.values = layer.values.astype(mx.bfloat16)
    pagedkv.unwrap(model)


@pytest.mark.parametrize(
    ("kind", "status", "hint"),
    [
        ("paged", OK, ""),
        ("CacheList(paged, paged)", OK, ""),
        ("CacheList(paged, paged (dense))", WARN, "slower"),
        ("paged (dense)", WARN, "slower"),
        ("CacheList(ArraysCache, paged)", WARN, "partly paged"),
        ("RotatingKVCache", WARN, "not paged"),
    ],
)
def test_doctor_says_what_is_paged(kind: str, status: str, hint: str) -> None:
    found = _verdict(kind, "layers 0-3")
    assert found[0] == status
    assert hint in found[2]
