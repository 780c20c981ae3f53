"""A store to trust: what was flushed is there, bit for bit, whenever and however the process ends."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import pagedkv
from pagedkv.tiers import RealDisk
from tests.models import random_tokens, tiny_llama
from tests.stores import (
    DyingDisk,
    Recorder,
    check,
    empty_cache,
    extend,
    same,
    settings,
)


def store_of(cold_dir: Path) -> Path:
    (store,) = [p for p in cold_dir.iterdir() if p.name.startswith("store-")]
    return store


# Going on


@pytest.mark.parametrize("kv", ["K4V4", "fp16", "K8V4:700,K4V4"])
@pytest.mark.parametrize("hot_dtype", [None, "bfloat16", "model"])
def test_a_resumed_sequence_goes_on_bit_for_bit(
    tmp_path: Path, kv: str, hot_dtype: str | None
) -> None:
    config = settings(tmp_path, kv=kv, hot_dtype=hot_dtype, warm="500KB")
    with empty_cache(config) as cache:
        extend(cache, 1500, 1, 700)
        flushed = cache.flush()
        assert (flushed.tokens, flushed.pages) == (2201, 16)
        expected = [extend(cache, 1), extend(cache, 300), extend(cache, 1)]
    with empty_cache(config) as cache:
        cache.resume()
        assert cache.offset == 2201
        check(cache)
        assert all(same(a, extend(cache, n)) for a, n in zip(expected, (1, 300, 1), strict=True))
        check(cache)
        again = cache.flush()
        assert (again.sequence, again.tokens) == (flushed.sequence, 2503)
        assert [s.tokens for s in cache.stored_sequences()] == [2503]


def test_a_model_goes_on_bit_for_bit(tmp_path: Path) -> None:
    model = tiny_llama(kv_heads=1)
    config = settings(tmp_path, cold="8MB", warm="300KB")
    with pagedkv.wrap(model, config) as cache:
        mx.eval(model(random_tokens(2000), cache=cache))
        cache.flush()
        expected = model(random_tokens(3, seed=1), cache=cache)
        mx.eval(expected)
    pagedkv.unwrap(model)
    for again in (False, True):  # with and without wrapping before
        if again:
            pagedkv.wrap(model, config)
        with pagedkv.resume(model, config) as cache:
            assert cache.offset == 2000
            actual = model(random_tokens(3, seed=1), cache=cache)
            assert mx.array_equal(actual, expected).item()
        pagedkv.unwrap(model)


def test_several_sequences_share_a_store(tmp_path: Path) -> None:
    config = settings(tmp_path)
    with empty_cache(config) as first:
        extend(first, 1000)
        one = first.flush()
        with first.fork() as second:
            extend(second, 400)
            two = second.flush()
        expected = extend(first, 3)
    with empty_cache(config) as cache:
        assert [s.sequence for s in cache.stored_sequences()] == [two.sequence, one.sequence]
        cache.resume(one.sequence)
        assert same(extend(cache, 3), expected)
        with pytest.raises(pagedkv.SequenceNotFoundError, match=r"no sequence f{16}; there are .*1,400"):
            cache.discard("f" * 16)
        cache.discard(two.sequence)
        assert [s.sequence for s in cache.stored_sequences()] == [one.sequence]
        cache.discard()
    assert list(tmp_path.iterdir()) == []


def test_a_trimmed_and_an_empty_sequence_come_back_as_they_are(tmp_path: Path) -> None:
    config = settings(tmp_path)
    with empty_cache(config) as cache:
        extend(cache, 1000)
        cache.trim(333)
        cache.flush()
        expected = extend(cache, 2)
    with empty_cache(config) as cache:
        cache.resume()
        assert same(extend(cache, 2), expected)
        cache.trim(cache.offset)
        cache.flush()
    with empty_cache(config) as cache:
        cache.resume()
        assert cache.offset == 0
        extend(cache, 5)


def test_a_flush_writes_a_page_once(tmp_path: Path) -> None:
    config = settings(tmp_path, warm="1MB")
    with empty_cache(config) as cache:
        extend(cache, 1500)
        cache.flush()
        cold = cache.context.pager.cold
        written = cold.counters.pages_written
        assert written == 10
        extend(cache, 1)
        cache.flush()
        assert cold.counters.pages_written == written
        stats = cache.stats()
        assert stats.warm.pages == 10  # they stayed where they were, and can go down for nothing
        for layer in cache.paged_layers:
            layer._pager._demote_farthest(layer._pager.precisions[0])
        cold.flush()
        assert cold.counters.pages_written == written


def test_the_token_path_neither_syncs_nor_writes_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Recorder()
    monkeypatch.setattr("pagedkv.tiers.pager.RealDisk", lambda: disk)
    with empty_cache(settings(tmp_path)) as cache:
        extend(cache, 3000, 1, 1)
        assert not {"sync", "rename", "fsync"} & set(disk.calls)
        cache.flush()
        assert "sync" not in disk.calls
        cache.flush("power")
        done = disk.calls
        last_write = max(i for i, call in enumerate(done) if call == "rename")
        assert done.count("sync") >= 6  # two page files, the checkpoint, three directories
        assert done[last_write + 1 :].count("sync") == 1  # the directory with the new name


# Ending at any moment


def live(cold_dir: Path) -> dict[int, list[mx.array]]:
    """What a process would have gone on with at each flush: the attention of the next token."""
    expected = {}
    with empty_cache(settings(cold_dir / "expected")) as cache:
        for count in STEPS:
            extend(cache, count)
            with cache.fork() as twin:
                expected[cache.offset] = extend(twin, 1)
    return expected


STEPS = (1100, 900, 300)


def run_and_die(cold_dir: Path, durability: str) -> int:
    """Flush, go on past the flush, flush; the tokens of the last flush that returned."""
    flushed = 0
    try:
        cache = empty_cache(settings(cold_dir, durability=durability))
        for count in STEPS:
            extend(cache, count)
            flushed = cache.flush().tokens
        extend(cache, 600)
        cache.trim(800)
        extend(cache, 700)  # pages in the slots of what was trimmed, if those were free
    except pagedkv.PagedKVError:
        pass
    return flushed


@pytest.mark.parametrize("durability", ["process", "power"])
@pytest.mark.parametrize("tear", [False, True])
def test_death_at_every_single_call_leaves_the_last_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durability: str, tear: bool
) -> None:
    expected = live(tmp_path)
    disk = Recorder()
    monkeypatch.setattr("pagedkv.tiers.pager.RealDisk", lambda: disk)
    assert run_and_die(tmp_path / "whole", durability) == sum(STEPS)
    calls = [call for call in disk.calls if call != "close"]
    gc.collect()
    seen = set()
    for at in range(5, len(calls), 1 if not tear else 3):
        cold_dir = tmp_path / f"{at}"
        monkeypatch.setattr("pagedkv.tiers.pager.RealDisk", lambda at=at: DyingDisk(at, tear))
        flushed = run_and_die(cold_dir, durability)
        gc.collect()  # the lock is dropped
        monkeypatch.setattr("pagedkv.tiers.pager.RealDisk", RealDisk)
        with empty_cache(settings(cold_dir)) as cache:
            try:
                cache.resume()
            except pagedkv.SequenceNotFoundError:
                assert flushed == 0, at
                continue
            # The flush that died may have come as far as its last step.
            following = [n for n in expected if n > flushed][:1]
            assert cache.offset in (flushed, *following), at
            seen.add(cache.offset)
            assert same(expected[cache.offset], extend(cache, 1)), at
            check(cache)
    assert seen == set(expected)
