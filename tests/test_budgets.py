"""Budgets are limits, and closing gives everything back."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import mlx.core as mx
import numpy as np
import psutil
import pytest

import pagedkv
from pagedkv.tiers import WarmSlab
from tests.models import random_tokens, tiny_llama


def real_bytes(cache: pagedkv.PagedCache) -> dict[str, int]:
    """Bytes each tier really has: of arrays, of files, of buffers."""
    pager = cache.context.pager
    slabs = [s.array.nbytes for layer in pager.layer_pagers for s in layer._slabs.values()]
    files = list(pager.open_cold.directory.iterdir()) if pager.open_cold else []
    return {
        "warm": sum(slabs),
        "cold": sum(f.stat().st_size for f in files),
        "staging": pager.open_reader.nbytes if pager.open_reader else 0,
        "write_buffer": pager.open_cold.buffer_bytes if pager.open_cold else 0,
        "hot": sum(a.nbytes for layer in cache.paged_layers for a in layer._hot.arrays),
    }


@pytest.mark.parametrize("kv", ["K4V4", "K8V8:600,K4V4:900,K2V2", "fp16"])
def test_no_tier_ever_exceeds_its_budget(kv: str) -> None:
    config = pagedkv.TierConfig(
        hot_tokens=100,
        sink_tokens=4,
        kv=kv,
        page_tokens=256,
        warm=1_500_000,
        cold=1_200_000,
        staging=1_100_000,
        write_buffer=300_000,
    )
    limits = {"warm": 1_500_000, "cold": 1_200_000, "staging": 1_100_000, "write_buffer": 300_000}
    model = tiny_llama(layers=3, heads=4, kv_heads=2, dim=128)
    peaks = dict.fromkeys(["hot", *limits], 0)
    with pagedkv.wrap(model, config) as cache:
        step = 0
        with pytest.raises(pagedkv.OutOfPagesError) as full:
            while True:
                n = 333 if step % 5 else 1
                mx.eval(model(random_tokens(n, seed=step), cache=cache))
                step += 1
                for tier, nbytes in real_bytes(cache).items():
                    peaks[tier] = max(peaks[tier], nbytes)
                stats = cache.stats()
                assert stats.warm.allocated <= stats.warm.budget
                assert stats.cold.allocated <= stats.cold.budget
        for tier, limit in limits.items():
            assert 0 < peaks[tier] <= limit, tier
        # The window, a page and one chunk of 333 tokens, for three layers; never the context.
        token = 3 * 2 * 2 * 32 * 2
        assert peaks["hot"] <= (4 + 100 + 256 + 64 + 333) * token
        assert peaks["warm"] > 0.5 * limits["warm"]
        assert peaks["cold"] > 0.5 * limits["cold"]
        assert "out of pages" in str(full.value)
        check_nothing_was_lost(model, cache)


def check_nothing_was_lost(model: object, cache: pagedkv.PagedCache) -> None:
    """After OutOfPagesError every layer is as it was, and works on after a trim."""
    offsets = {layer.offset for layer in cache.paged_layers}
    assert len(offsets) == 1
    before = offsets.pop()
    assert cache.trim(400) == 400
    out = model(random_tokens(1), cache=cache)  # type: ignore[operator]
    assert not mx.isnan(out).any().item()
    assert cache.offset == before - 399


def test_memory_is_flat_over_cycles_and_nothing_is_left(tmp_path: Path) -> None:
    config = pagedkv.TierConfig(
        hot_tokens=64,
        sink_tokens=4,
        page_tokens=256,
        warm=400_000,
        cold="64MB",
        cold_dir=str(tmp_path),
    )
    model = tiny_llama()
    process = psutil.Process()
    gc.collect()  # other tests' caches end their threads
    threads = threading.active_count()
    mlx_memory, resident, files = [], [], []
    for cycle in range(7):
        with pagedkv.wrap(model, config) as cache:
            for seed in range(3):
                mx.eval(model(random_tokens(900, seed=seed), cache=cache))
            assert cache.stats().cold.pages > 0
            assert len(list(tmp_path.iterdir())) == 1
            assert oct(next(tmp_path.iterdir()).stat().st_mode & 0o777) == "0o700"
            pager = cache.context.pager
        del cache
        pagedkv.unwrap(model)
        gc.collect()
        mx.clear_cache()
        assert list(tmp_path.iterdir()) == []
        assert threading.active_count() == threads, cycle
        assert not pager.layer_pagers
        del pager  # it knows the model's treatments
        mlx_memory.append(mx.get_active_memory())
        resident.append(process.memory_info().rss)
        files.append(process.num_fds())
    assert len(set(mlx_memory)) == 1
    assert len(set(files)) == 1
    assert resident[-1] - resident[3] < 16 * 2**20


def test_a_dropped_cache_gives_its_pages_back() -> None:
    """A server drops caches without closing them: their pages must not stay for ever."""
    model = tiny_llama()
    config = pagedkv.TierConfig(
        hot_tokens=64, sink_tokens=4, page_tokens=256, warm="8MB", cold="64MB"
    )
    keeper = pagedkv.wrap(model, config)
    other = model.make_cache()
    mx.eval(model(random_tokens(1200), cache=other))
    layer = keeper.paged_layers[0]
    assert layer._pager.allocator.used == 4
    del other
    gc.collect()
    mx.eval(model(random_tokens(1), cache=keeper))  # the next safe point
    assert layer._pager.allocator.used == 0
    keeper.close()


def test_the_longest_unused_sequence_is_demoted_first() -> None:
    model = tiny_llama(layers=1)
    config = pagedkv.TierConfig(
        hot_tokens=64, sink_tokens=4, page_tokens=256, warm=500_000, cold="64MB"
    )
    first = pagedkv.wrap(model, config)
    second = model.make_cache()
    slots = first.paged_layers[0]._pager._slabs
    room = next(iter(slots.values())).max_slots
    mx.eval(model(random_tokens(68 + 256 * room), cache=first))
    assert (first.stats().warm.pages, first.stats().cold.pages) == (room, 0)
    mx.eval(model(random_tokens(68 + 256 * 2), cache=second))
    assert (first.stats().warm.pages, first.stats().cold.pages) == (room - 2, 2)
    assert second.stats().cold.pages == 0
    tiers = [page.slot is None for page, _ in first.paged_layers[0].located_pages()]
    assert tiers == [True, True] + [False] * (room - 2)  # the oldest pages went
    first.close()
    second.close()


def test_pages_come_back_up_when_there_is_room() -> None:
    model = tiny_llama(layers=1)
    config = pagedkv.TierConfig(
        hot_tokens=64, sink_tokens=4, page_tokens=256, warm=100_000, cold="64MB"
    )
    with pagedkv.wrap(model, config) as cache:
        mx.eval(model(random_tokens(68 + 256 * 12), cache=cache))
        mx.eval(model(random_tokens(1), cache=cache))
        cold = cache.stats().cold.pages
        assert cold > 4
        cache.trim(256 * 7)
        mx.eval(model(random_tokens(1), cache=cache))
        stats = cache.stats()
        assert stats.pages_promoted > 0
        (slab,) = cache.paged_layers[0]._pager._slabs.values()
        assert stats.warm.pages == slab.max_slots


def test_shared_memory_view_of_rows_is_a_copy() -> None:
    """What staging hands to MLX must not follow the staging buffer when it is reused."""
    rows = np.arange(8, dtype=np.uint32).reshape(2, 4)
    array = mx.array(rows)
    rows[:] = 0
    assert array.sum().item() == 28


def test_no_file_is_left_open() -> None:
    model = tiny_llama(layers=1)
    before = psutil.Process().num_fds()
    with pagedkv.wrap(model, pagedkv.TierConfig(cold="1GB")):
        pass
    assert psutil.Process().num_fds() == before


@pytest.mark.parametrize("name", ["staging", "write_buffer"])
def test_a_buffer_that_holds_nothing_is_refused_at_once(name: str) -> None:
    config = pagedkv.TierConfig(page_tokens=256, warm="1MB", cold="64MB", **{name: 10_000})
    with pytest.raises(pagedkv.ConfigError, match=f"{name} budget 10,000 bytes is smaller"):
        pagedkv.wrap(tiny_llama(), config)
    with pagedkv.wrap(tiny_llama(), pagedkv.TierConfig(**{**config.to_dict(), "cold": 0})):
        pass  # without a disk nothing moves through them


def test_a_saved_cache_larger_than_memory_is_loaded_page_by_page(tmp_path: Path) -> None:
    model, path = tiny_llama(), str(tmp_path / "long.safetensors")
    config = pagedkv.TierConfig(
        hot_tokens=128, sink_tokens=4, kv="fp16", page_tokens=256, warm=500_000, cold="64MB"
    )
    with pagedkv.wrap(model, config) as cache:
        for layer in cache:
            for seed in range(16):
                k = mx.random.normal((1, 2, 2048, 16), key=mx.random.key(seed)).astype(mx.float16)
                layer.append(k, k)
                mx.eval(layer.state)
        cache.save(path)
        del k
    held = Path(path).stat().st_size
    assert held > 5_000_000
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    with pagedkv.load(path, model) as loaded:
        assert loaded.offset == 16 * 2048
        assert mx.get_peak_memory() - before < 2_000_000  # the warm tier, hot tokens, a page
    pagedkv.unwrap(model)


@pytest.mark.parametrize("share", [1, 2, 3, 5, 64, 65, 1157])
def test_a_slab_that_grows_is_never_copied_from_more_than_half(share: int) -> None:
    slab, sizes = WarmSlab(16384, share), [0]
    for used in range(1, share + 1):
        slab.take()
        held = slab.nbytes // 16384
        assert used <= held <= share
        if held != sizes[-1]:
            # Old and new exist together for a moment: one and a half shares are set aside.
            assert sizes[-1] + held <= 1.5 * share + 1
            sizes.append(held)
    assert sizes[-1] == share
    assert len(sizes) <= share.bit_length() + 2


def test_a_closed_cache_takes_no_memory_even_while_it_is_referred_to() -> None:
    model = tiny_llama(layers=2, dim=128)
    config = pagedkv.TierConfig(hot_tokens=64, warm="64MB", cold="64MB", page_tokens=256)
    tokens = random_tokens(3000)
    with pagedkv.wrap(model, config) as first:
        mx.eval(model(tokens, cache=first))  # its matrices are for all that follow, and stay
    gc.collect()
    before = mx.get_active_memory()
    cache = model.make_cache()
    mx.eval(model(tokens, cache=cache))
    full = mx.get_active_memory() - before
    assert full > cache.stats().warm.bytes > 500_000
    fork = cache.fork()
    cache.close()
    assert mx.get_active_memory() - before > full // 2  # the fork's
    fork.close()
    assert mx.get_active_memory() - before < full // 20
    with pytest.raises(pagedkv.PagedKVError, match="closed"):
        model(tokens[:, :1], cache=cache)
    pagedkv.unwrap(model)


def test_a_cache_that_was_dropped_is_found_after_its_tiers_were_closed() -> None:
    model = tiny_llama(layers=1)
    config = pagedkv.TierConfig(hot_tokens=64, warm="64MB", cold=0, page_tokens=256)
    with pagedkv.wrap(model, config) as cache:
        dropped = cache.fork()
        mx.eval(model(random_tokens(900), cache=dropped))
        pager = cache.context.pager
        pager.users -= set(dropped.paged_layers)  # as if the collector had begun with it
    del dropped
    gc.collect()
    assert pager.abandoned
    with model.make_cache() as another:
        mx.eval(model(random_tokens(900), cache=another))
        assert another.stats().warm.pages > 0
    pagedkv.unwrap(model)


def test_writing_to_a_slab_that_grows_takes_no_third_copy() -> None:
    page, slots = 16384, 2048
    slab = WarmSlab(page, slots)
    record = mx.zeros((1, page // 4), mx.uint32)
    mx.eval(record)
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in range(slots):
        slab.write([slab.take()], record)
        mx.eval(slab.array)
    assert mx.get_peak_memory() - before < 1.6 * page * slots
