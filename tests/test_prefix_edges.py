"""Prefixes where something is unusual: the cache, its budgets, its life, the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import pagedkv
from pagedkv.cache.paged_cache import PagedCache
from tests.models import tiny_llama
from tests.test_prefixes import HOT, SINKS, UNIT, check, config, flushed, ids, read

# Which caches


def test_a_draft_model_on_the_same_list_shares_nothing() -> None:
    model, draft, prompt = tiny_llama(), tiny_llama(layers=1, seed=1), ids(900)
    with pagedkv.wrap(model, config()) as cache, pagedkv.wrap(draft, config()) as other:
        cache += other
        for part in (cache[:2], cache[2:]):
            (model if len(part) == 2 else draft)(mx.array([prompt]), cache=part)
        assert cache.remember(prompt) == 0
        assert "several models" in cache.stats().prefix_reuse
        with model.make_cache() as alone:
            assert alone.reuse(prompt) == 0
            read(model, alone, prompt)
            assert alone.remember(prompt) == SINKS + 3 * UNIT
        with model.make_cache() as alone, draft.make_cache() as second:
            alone += second
            assert alone.reuse(prompt) == 0
    pagedkv.unwrap(model)
    pagedkv.unwrap(draft)


def test_some_of_a_model_s_layers_are_not_remembered() -> None:
    model, prompt = tiny_llama(), ids(900)
    with pagedkv.wrap(model, config()) as cache:
        read(model, cache, prompt)
        assert PagedCache.of(cache[:1]).remember(prompt) == 0
        with model.make_cache() as fresh:
            assert PagedCache.of(fresh[:1]).reuse(prompt) == 0
            assert fresh.reuse(prompt) == 0
    pagedkv.unwrap(model)


def test_after_a_call_that_was_broken_off_layers_are_cut_to_the_same_length() -> None:
    model, prompt = tiny_llama(), ids(900)
    with pagedkv.wrap(model, config()) as cache:
        read(model, cache, prompt)
        cache[1].trim(300)  # one layer got fewer tokens than the other
        assert cache.remember(prompt) == SINKS + 2 * UNIT
        with model.make_cache() as other:
            assert other.reuse(prompt) == SINKS + 2 * UNIT
            assert [layer.offset for layer in other] == [SINKS + 2 * UNIT] * 2
    pagedkv.unwrap(model)


def test_only_full_pages_are_remembered(tmp_path: Path) -> None:
    model, prompt = tiny_llama(layers=1), ids(900)
    other = [*prompt[: SINKS + UNIT + 100], *ids(900, 1)]
    with pagedkv.wrap(model, config(tmp_path)) as cache:
        read(model, cache, prompt)
        cache.trim(900 - SINKS - UNIT - 100)  # the second page is cut
        read(model, cache, other)
        assert [n for _, n in cache[0].located_pages()][:3] == [UNIT, 100, UNIT]
        assert cache.remember(other) == SINKS + UNIT
        assert len(cache.flush().prefix) == 1
    pagedkv.unwrap(model)


def test_a_layer_that_is_never_used_is_no_obstacle() -> None:
    k = mx.random.normal((1, 2, 900, 16))
    with PagedCache.standalone(2, config()) as cache:
        pagedkv.attention(k, k, k, cache=cache[1], scale=1.0)
        assert cache.remember(ids(900)) == SINKS + 3 * UNIT
        cache.trim(900)
        assert cache.reuse(ids(900)) == SINKS + 3 * UNIT
        assert [layer.offset for layer in cache] == [0, SINKS + 3 * UNIT]
        check(cache)


def test_a_closed_cache_says_so() -> None:
    model, prompt = tiny_llama(layers=1), ids(900)
    with pagedkv.wrap(model, config()) as cache:
        read(model, cache, prompt)
        cache.remember(prompt)
    with pytest.raises(pagedkv.ClosedError, match="closed"):
        cache.reuse(prompt)
    with pytest.raises(pagedkv.ClosedError, match="closed"):
        cache.remember(prompt)
    assert not cache[0].offset
    pagedkv.unwrap(model)


@pytest.mark.parametrize("wrong", [5, None, mx.array(5), np.array([[1, 2]]), [[1, 2]], "12", [1.5]])
def test_what_are_no_token_ids_is_told(wrong: Any) -> None:
    model = tiny_llama(layers=1)
    refused = pytest.raises((pagedkv.ConfigError, pagedkv.CacheStateError), match="tokens are")
    with pagedkv.wrap(model, config()) as cache, refused:
        cache.reuse(wrong)
    pagedkv.unwrap(model)


def test_any_kind_of_integers_will_do() -> None:
    model, prompt = tiny_llama(layers=1), ids(600)
    with pagedkv.wrap(model, config()) as cache:
        read(model, cache, prompt)
        assert cache.remember(np.array(prompt, np.int16)) == SINKS + 2 * UNIT
    for same in (np.array(prompt, np.uint64), mx.array(prompt, mx.uint8), tuple(prompt)):
        with model.make_cache() as cache:
            assert cache.reuse(same) == SINKS + 2 * UNIT
    pagedkv.unwrap(model)


def test_without_sinks_there_is_nothing_hot_after_reuse(tmp_path: Path) -> None:
    model, prompt = tiny_llama(), ids(900)
    tiers = config(tmp_path / "cold", sink_tokens=0)
    with pagedkv.wrap(model, tiers) as cache:
        read(model, cache, prompt)
        cache.remember(prompt)
        cache.flush()
    for again in (0, 1):  # from memory, from disk
        if again:
            pagedkv.unwrap(model)
            pagedkv.wrap(model, tiers)
        with model.make_cache() as cache:
            assert cache.reuse(prompt) == 3 * UNIT
            fork = cache.fork()
            cache.save(str(tmp_path / "saved.safetensors"))
            stored = cache.flush()
            expected = read(model, cache, prompt)
            assert mx.array_equal(read(model, fork, prompt), expected).item()
            fork.close()
        with pagedkv.load(str(tmp_path / "saved.safetensors"), model) as loaded:
            assert loaded.offset == 3 * UNIT
            assert mx.array_equal(read(model, loaded, prompt), expected).item()
        with pagedkv.resume(model, sequence=stored.sequence) as resumed:
            assert mx.array_equal(read(model, resumed, prompt), expected).item()
    pagedkv.unwrap(model)


# Their life


def test_a_hand_written_model_s_files_go_with_its_last_cache(tmp_path: Path) -> None:
    tiers = config(tmp_path)
    k = mx.random.normal((1, 2, 900, 16))
    for _ in range(2):  # the second one needs the store's lock
        with PagedCache.standalone(1, tiers, model="mine") as cache:
            pagedkv.attention(k, k, k, cache=cache[0], scale=1.0)
            fork = cache.fork()
            assert cache.remember(ids(900)) == SINKS + 3 * UNIT
            cache.flush()
        assert len(fork.context.prefixes) == 1
        fork.close()
        assert not cache.context.pager.users
        assert cache.context.pager.open_cold is None


def test_remembered_ones_go_with_the_last_cache_of_an_unwrapped_model() -> None:
    model, prompt = tiny_llama(), ids(900)
    cache = pagedkv.wrap(model, config())
    read(model, cache, prompt)
    pagedkv.unwrap(model)
    cache.remember(prompt)
    cache.close()
    assert not cache.context.pager.users


def test_wrapping_again_with_other_budgets_takes_over_the_store(tmp_path: Path) -> None:
    model, prompt = tiny_llama(), ids(900)
    with pagedkv.wrap(model, config(tmp_path)) as cache:
        read(model, cache, prompt)
        cache.remember(prompt)
        cache.flush()
    with pagedkv.wrap(model, config(tmp_path, warm="1MB")) as cache:
        assert cache.reuse(prompt) == SINKS + 3 * UNIT
    pagedkv.unwrap(model)


# Budgets


def test_they_give_way_to_a_saved_cache(tmp_path: Path) -> None:
    model, path = tiny_llama(), str(tmp_path / "saved.safetensors")
    with pagedkv.wrap(model, config(warm="300KB", cold=0)) as cache:
        room = cache[0]._pager._slabs[cache[0]._pager.precisions[0]].max_slots
        text = ids(SINKS + HOT + room * UNIT, 5)
        read(model, cache, text)
        cache.save(path)
        assert cache.remember(text)
    with pagedkv.load(path, model) as cache:
        assert cache.offset == len(text)
        check(cache)
    pagedkv.unwrap(model)


def test_they_give_way_to_pages_that_are_flushed(tmp_path: Path) -> None:
    model = tiny_llama()
    tiers = config(tmp_path, warm="300KB", cold="640KB")
    with pagedkv.wrap(model, tiers) as cache:
        read(model, cache, ids(3000, 1))
        cache.remember(ids(3000, 1))
    with model.make_cache() as cache:
        read(model, cache, ids(2200, 2))
        assert cache.stats().prefixes_remembered == 1
        assert cache.flush().tokens == 2200
        assert cache.stats().prefixes_remembered == 0
        check(cache)
    pagedkv.unwrap(model)


def test_pages_in_use_again_stay_in_memory_before_those_of_an_idle_cache() -> None:
    model, prompt = tiny_llama(layers=1), ids(900)
    with pagedkv.wrap(model, config(warm="150KB")) as idle, model.make_cache() as first:
        room = idle[0]._pager._slabs[idle[0]._pager.precisions[0]].max_slots
        read(model, first, prompt)
        first.remember(prompt)
        read(model, idle, ids(SINKS + HOT + (room - 3) * UNIT, 1))  # used after them
        with model.make_cache() as second:
            assert second.reuse([*prompt, *ids(600, 2)]) == SINKS + 3 * UNIT
            read(model, second, [*prompt, *ids(600, 2)])  # two pages more than there is room
            assert all(page.slot is not None for page, _ in second[0].located_pages())
            assert sum(page.slot is None for page, _ in idle[0].located_pages()) == 2
    pagedkv.unwrap(model)


def test_pages_that_are_lowered_are_counted_again_when_one_gave_way() -> None:
    model = tiny_llama(layers=1)
    tiers = config(kv="K8V4:512,K4V4", warm="400KB", cold=0)
    with pagedkv.wrap(model, tiers) as cache:
        n = 0
        while True:  # as long as it goes
            n += 512
            try:
                read(model, cache, ids(6000)[:n])
            except pagedkv.OutOfPagesError:
                break
        most = cache.offset
    pagedkv.unwrap(model)
    with pagedkv.wrap(model, tiers) as cache:
        for n in range(512, most + 1, 512):
            read(model, cache, ids(6000)[:n])
            cache.remember(ids(6000)[:n])
        assert cache.offset == most
        check(cache)
    pagedkv.unwrap(model)


def test_the_sinks_of_many_take_a_share_of_the_budget_and_no_more() -> None:
    model = tiny_llama(layers=1)
    tiers = config(sink_tokens=64, warm="300KB")
    sinks = 64 * 2 * 16 * 2 * 2  # tokens, heads, channels, keys and values, bytes
    with pagedkv.wrap(model, tiers) as cache:
        for i in range(6):
            read(model, cache, ids(400, i))
            assert cache.remember(ids(400, i)) == 64 + UNIT
            cache.trim(400)
            remembered = cache.context.prefixes
            assert remembered.hot_bytes == sinks * len(remembered) <= 300_000 / 8
        assert len(remembered) == 4
        assert [cache.reuse(ids(400, i)) for i in (0, 1, 5)] == [0, 0, 64 + UNIT]
        check(cache)
    pagedkv.unwrap(model)


# On disk


def test_pages_of_another_window_are_computed_again(tmp_path: Path) -> None:
    model = tiny_llama()
    ladder = {"kv": "K8V4:512,K4V4"}
    flushed(model, ids(1500), config(tmp_path, **ladder))
    with pagedkv.wrap(model, config(tmp_path, **ladder, hot_tokens=600)) as cache:
        with pytest.warns(UserWarning, match="window of 600"):  # no K8V4 beyond it
            assert cache.reuse(ids(1500)) == 0
        check(cache)
    pagedkv.unwrap(model)


def test_a_model_tuned_further_shares_nothing(tmp_path: Path) -> None:
    model = tiny_llama(layers=4)
    flushed(model, ids(900), config(tmp_path))
    layer = model.layers[2].self_attn
    layer.v_proj.weight = layer.v_proj.weight * 1.5
    with pagedkv.wrap(model, config(tmp_path)) as cache:
        assert cache.reuse(ids(900)) == 0
    pagedkv.unwrap(model)


def test_leaving_pages_out_is_a_setting_too(tmp_path: Path) -> None:
    model = tiny_llama()
    flushed(model, ids(900), config(tmp_path, cold_pages=0))
    with pagedkv.wrap(model, config(tmp_path)) as cache:
        assert cache.reuse(ids(900)) == 0
    pagedkv.unwrap(model)


def test_digests_of_more_than_its_pages_are_damage(tmp_path: Path) -> None:
    model = tiny_llama()
    with pagedkv.wrap(model, config(tmp_path)) as cache:
        read(model, cache, ids(900))
        cache.remember(ids(900))
        cache.context.prefix.append(bytes(32))
        stored = cache.flush()
    pagedkv.unwrap(model)
    with pytest.warns(UserWarning, match="digests of 4 units"):
        cache = pagedkv.wrap(model, config(tmp_path))
    with cache:
        assert cache.reuse(ids(900)) == 0
        with pytest.raises(pagedkv.CorruptStoreError):
            cache.resume(stored.sequence)
    pagedkv.unwrap(model)


def test_forks_and_resumed_sequences_know_their_own_digests(tmp_path: Path) -> None:
    model = tiny_llama(layers=1)
    with pagedkv.wrap(model, config(tmp_path)) as cache:
        read(model, cache, ids(900))
        cache.remember(ids(900))
        with cache.fork() as fork:
            fork.trim(500)
            assert len(fork.flush().prefix) == 1
        stored = cache.flush()
        assert len(stored.prefix) == 3
    pagedkv.unwrap(model)
    with pagedkv.resume(model, config(tmp_path), sequence=stored.sequence) as cache:
        assert cache.flush().prefix == stored.prefix
    pagedkv.unwrap(model)
