"""Quantized pages inside a window: against float64, and everything that may happen to a cache."""

from __future__ import annotations

import copy
import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import pagedkv
from pagedkv.attn.backends import KernelBackend
from pagedkv.cache.persistence import snapshot as state
from pagedkv.config.window_sizes import SLACK
from pagedkv.integrations.mlx_lm.caches import PagedKVCache, PagedRotatingKVCache
from tests import reference
from tests.emulator import HostLauncher
from tests.models import random_tokens
from tests.test_attention import ROUNDING, error
from tests.test_window_models import PAGES, windowed
from tests.test_windows import held, window

HEADS, REPEATS, DIM = 2, 2, 64
SCALE = DIM**-0.5
BITS = ["K4V4", "K8V8", "K8V4", "K4V2"]
SIZES = [(128, 4, 64), (128, 0, 512), (1024, 4, 64), (1024, 0, 64), (900, 0, 200)]


def numbers(n: int, seed: int, dtype: mx.Dtype = mx.float32) -> tuple[mx.array, mx.array, mx.array]:
    """Queries, keys with outlier channels, and values of n tokens."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((1, HEADS * REPEATS, n, DIM)).astype(np.float32)
    k, v = (rng.standard_normal((1, HEADS, n, DIM)).astype(np.float32) for _ in range(2))
    k[..., ::17] = 3 * k[..., ::17] + 5
    return mx.array(q).astype(dtype), mx.array(k).astype(dtype), mx.array(v).astype(dtype)


def seen(cache: Any, before: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the queries of the last call see, in float64, and their mask.

    By its definition: the sequence's first `keep` tokens and the newest, `max_size` for a single
    token; a longer call sees one token less of what was before, and then the newest of all columns.
    """
    keys, values = reference.stored(cache)
    keep, size = cache.keep, cache.max_size
    newest = min(before, size - 1) - min(before, keep) + new
    columns = np.r_[: min(before, keep), keys.shape[1] - newest : keys.shape[1]]
    row = len(columns) - new + np.arange(new)[:, None]
    visible = (row >= np.arange(len(columns))) & (row < np.arange(len(columns)) + size)
    return keys[:, columns], values[:, columns], np.where(visible, 0.0, -np.inf)


def step(cache: Any, n: int, seed: int, sinks: mx.array | None = None) -> mx.array:
    q, k, v = numbers(n, seed, dtype_of(cache))
    return pagedkv.attention(q, k, v, cache=cache, scale=SCALE, sinks=sinks)


def dtype_of(cache: Any) -> mx.Dtype:
    """16 bit where the kernels are tried; the CPU is slow in it."""
    return mx.float16 if isinstance(cache._backend, KernelBackend) else mx.float32


def checked_step(cache: Any, n: int, seed: int, sinks: mx.array | None = None) -> None:
    """A call beside float64 over what is stored when it has come: long ones are sealed after."""
    before = cache.offset
    q, k, v = numbers(n, seed, dtype_of(cache))
    sinks = None if sinks is None else sinks.astype(q.dtype)
    mask = cache.causal_mask(n, n)
    view = cache.append(k, v)
    keys, values, visible = seen(cache, before, n)
    logits = None if sinks is None else np.asarray(sinks).astype(np.float64)
    exact = reference.attention(np.asarray(q)[0], keys, values, SCALE, visible, logits)
    out = cache.attend_tagged(view, q, SCALE, mask, sinks)
    tolerance = ROUNDING[q.dtype] * (2 if n > 8 else 1)  # MLX rounds a prompt's weights as well
    assert error(out, exact) < tolerance, (cache.offset, n)


@pytest.mark.parametrize("kv", BITS)
@pytest.mark.parametrize(("size", "keep", "hot"), SIZES)
def test_what_queries_see_is_what_is_stored(kv: str, size: int, keep: int, hot: int) -> None:
    """Hundreds of steps past the end of the window, some of them of a few or many tokens."""
    cache = window(size, keep, kv=kv, hot_tokens=hot, hot_dtype="float16")
    sinks = mx.array(np.random.default_rng(1).standard_normal(HEADS * REPEATS).astype(np.float32))
    mx.eval(step(cache, size + 50, 0))
    for i in range(330):
        if i % (97 if size > 500 else 11) == 5:
            checked_step(cache, 1, i, sinks if i % 2 else None)
        else:
            mx.eval(step(cache, 1, i))
    for i, n in enumerate((2, 8, 400, 1, 5, 64)):
        checked_step(cache, n, 1000 + i, sinks if i % 2 else None)
    assert cache.seals == (size > 500)
    assert bool(len(cache._table)) == cache.seals
    assert cache.dropped > 300
    cache._pager.check(held(cache))


@pytest.mark.parametrize(("kv", "keep"), [("K4V4", 0), ("K8V4:400,K4V2", 4)])
def test_the_kernels_see_the_same(kv: str, keep: int) -> None:
    """One split and many, and prefill; the window begins anywhere in a page."""
    cache = window(1000, keep, kv=kv, hot_tokens=64, hot_dtype="float16")
    cache._backend = KernelBackend(HostLauncher())
    sinks = mx.array(np.random.default_rng(1).standard_normal(HEADS * REPEATS).astype(np.float16))
    for i, n in enumerate((1050, 1, 40, 1, 77, 1, 1, 64, 1, 1, 300, 1, 3, 1)):
        checked_step(cache, n, i, sinks if i % 2 else None)
        cache._settle()
    assert cache.dropped > 250


def test_the_fast_path_is_taken_for_single_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """One token over pages that are partly behind the window goes to the kernels."""
    attention = importlib.import_module("pagedkv.attn.driver")
    cache = window(1024, kv="K4V4", hot_tokens=64, hot_dtype="float16")
    cache._backend = KernelBackend(HostLauncher())
    mx.eval(step(cache, 1100, 0))
    assert len(cache._table)

    def fail(*_: Any) -> None:
        raise AssertionError("composed")

    monkeypatch.setattr(attention._Tiles, "attend", fail)
    for i in range(20):
        mx.eval(step(cache, 1, i))
        assert cache.view().hidden > 0
    with pytest.raises(AssertionError, match="composed"):
        step(cache, 3, 0)  # what each of several tokens sees is another window


@pytest.mark.parametrize("kv", ["K4V4", "K8V4:500,K4V2"])
def test_nothing_grows_and_nothing_leaks(kv: str) -> None:
    cache = window(1024, 4, kv=kv, hot_tokens=64, hot_dtype="float16", warm="150KB", cold="64MB")
    pager, most, pages = cache._pager, 0, 0
    sizes = []
    for i in range(60):
        mx.eval(step(cache, 300 if i % 3 else 90, i))
        for j in range(5):
            mx.eval(step(cache, 1, 1000 * i + j))
        pager = cache._pager
        pager.check(held(cache))
        assert cache.offset == cache.dropped + cache._table.tokens + cache._hot.used
        pages = max(pages, len(pager.pages))
        most = max(most, cache.nbytes)
        sizes.append((pager.warm_bytes, pager._pager.cold.nbytes))
    assert cache.offset > 10_000
    assert pages <= 2 * 6  # a long call's pages come before those of the call before go
    assert pager.warm_bytes <= 150_000
    assert max(sizes[30:]) <= max(sizes[:30])
    assert most < 600_000  # 10,000 tokens in 16 bit are 5 MB
    cache.close()
    assert not pager.pages and not pager.allocator.pages()


@pytest.mark.parametrize("n", [1, 8, SLACK])
def test_a_few_tokens_can_always_be_taken_back(n: int) -> None:
    cache = window(600, 4, kv="K4V4", hot_tokens=64, hot_dtype="float16")
    mx.eval(step(cache, 900, 0))
    for i in range(300):
        mx.eval(step(cache, 1, i))
        if i % 50 == 0:
            for m in range(n):
                mx.eval(step(cache, 1, 500 + m))
            assert cache.trim(n) == n
            assert cache.offset == 901 + i
            checked_step(cache, 1, 77)
            assert cache.trim(1) == 1
    assert not cache.is_trimmable()
    before = cache.offset, cache.dropped, cache._table.entries
    for too_many in (300, 10**6):
        assert not cache.can_trim(too_many)
        assert cache.trim(too_many) == 0
    assert (cache.offset, cache.dropped, cache._table.entries) == before
    assert cache.trim(-3) == cache.trim(0) == 0


def test_the_last_call_can_be_taken_back_and_made_again() -> None:
    """Also if it was longer than the window: the pages of before are held until the next call."""
    cache = window(600, 4, kv="K4V4", hot_tokens=64, hot_dtype="float16")
    mx.eval(step(cache, 900, 0), step(cache, 1, 1))
    pages = cache._table.entries
    expected = step(cache, 1500, 2)
    mx.eval(expected)
    cache._settle()
    assert {e.page for e in cache._table.entries}.isdisjoint(e.page for e in pages)
    cache._pager.check(held(cache))
    assert cache.trim(700) == 0
    assert cache.trim(1500) == 1500
    assert (cache.offset, cache._table.entries) == (901, pages)
    assert mx.array_equal(step(cache, 1500, 2), expected).item()
    cache._settle()
    mx.eval(step(cache, 1, 3))
    assert cache.trim(1501) == 0  # the call before the last one is for good
    cache._pager.check([cache._table])


def test_to_quantized_is_itself_again_and_again() -> None:
    cache: Any = window(1024, 4, kv="K4V4", hot_tokens=64, hot_dtype="float16")
    for i in range(4):
        assert cache.to_quantized(group_size=64, bits=8) is cache
        mx.eval(step(cache, 500, i))
        assert cache.to_quantized() is cache
        checked_step(cache, 1, 50 + i)
    assert cache.dropped and len(cache._table)


def test_forks_go_their_own_ways() -> None:
    cache = window(700, kv="K4V4", hot_tokens=64, hot_dtype="float16")
    mx.eval(step(cache, 1000, 0))
    twin = copy.deepcopy(cache)
    for i in range(300):
        mx.eval(step(cache, 1, i), step(twin, 1, 5000 + i))
    checked_step(cache, 1, 1)
    checked_step(twin, 1, 2)
    cache._pager.check([*held(cache), *held(twin)])
    twin.close()
    checked_step(cache, 1, 3)
    cache._pager.check(held(cache))


def test_tokens_that_fit_nowhere_are_refused_before_anything_changes() -> None:
    """Warm memory for a single page, no disk: the second page of the window has no place."""
    one = pagedkv.PageGeometry(
        pagedkv.KVShape(HEADS, DIM, DIM), 256, pagedkv.Precision.parse("K4V4")
    )
    cache = window(
        1024, kv="K4V4", hot_tokens=64, hot_dtype="float16", warm=one.page_bytes * 2, cold=0
    )
    mx.eval(step(cache, 300, 0))
    with pytest.raises(pagedkv.OutOfPagesError, match="out of pages at 300"):
        step(cache, 400, 1)
    assert (cache.offset, cache.dropped) == (300, 0)
    small = window(
        330, kv="K4V4", hot_tokens=64, hot_dtype="float16", warm=one.page_bytes * 3, cold=0
    )
    for i in range(60):  # two slots are enough for ever for a window that has room for one page
        mx.eval(step(small, 50 + i, i))
    assert small.offset > 4000


SEQUENCE = [900, *[1] * 5, 600, 3, *[1] * 5, 200, 8, *[1] * 200]


@pytest.mark.parametrize("kv", ["K4V4", "K8V4:400,K4V2"])
def test_placement_does_not_change_a_bit(kv: str) -> None:
    """All warm, and nearly all on disk; windows and full contexts in one model."""
    model = windowed("gemma3_text", 800)
    config = replace(PAGES, kv=kv, warm="64MB", cold="64MB")
    outputs = []
    for settings in (config, replace(config, warm="130KB", cold="64MB")):
        with pagedkv.wrap(model, settings) as cache:
            rows = []
            for i, n in enumerate(SEQUENCE):
                rows.append(model(random_tokens(n, i), cache=cache))
                mx.eval(rows[-1])
            outputs.append(rows)
            stats = cache.stats()
            cold = [p for p, _ in cache[0].located_pages() if p.slot is None]
            for layer in cache:
                layer._pager.check(held(layer) if hasattr(layer, "_earlier") else [layer._table])
    assert stats.nvme_bytes_read > 0 and cold
    for a, b in zip(*outputs, strict=True):
        assert mx.array_equal(a, b).item()
    pagedkv.unwrap(model)


@pytest.mark.parametrize("kv", ["K4V4", "K8V4:400,K4V2"])
def test_flushed_windows_go_on_where_they_were(tmp_path: Path, kv: str) -> None:
    model = windowed("gemma3_text", 800)
    config = replace(PAGES, kv=kv, warm="64MB", cold="64MB", cold_dir=str(tmp_path))
    following = mx.array([[5]])
    with pagedkv.wrap(model, config) as cache:
        for seed in range(3):
            mx.eval(model(random_tokens(700, seed), cache=cache))
        mx.eval(model(following, cache=cache))
        dropped = [c.dropped for c in cache]
        assert dropped[0] > 1000 and not dropped[1]
        cache.flush()
        expected = [model(following, cache=cache) for _ in range(3)]
        mx.eval(expected)
    pagedkv.unwrap(model)
    with pagedkv.resume(model, config) as cache:
        assert [c.dropped for c in cache] == dropped
        assert cache.offset == 2101
        for wanted in expected:
            assert mx.array_equal(model(following, cache=cache), wanted).item()
        for layer in cache:
            layer._pager.check([layer._table])
    pagedkv.unwrap(model)
    # The same sequence in a cache that keeps everything, or keeps other tokens, is none of its.
    with pytest.raises(pagedkv.StoreMismatchError, match="max_kv_size=500"):
        pagedkv.resume(model, replace(config, max_kv_size=500))


def test_a_state_that_cannot_be_is_refused() -> None:
    cache = window(700, kv="K4V4", hot_tokens=64, hot_dtype="float16")
    mx.eval(step(cache, 1000, 0))
    saved = dict(cache.state.items())
    for old, new in (
        ('"dropped": ', '"dropped": 1'),
        ('"max_size": 700', '"max_size": 800'),
        ('"keep": 0', '"keep": 701'),
    ):
        assert old in saved["meta"]
        with pytest.raises((pagedkv.CacheStateError, pagedkv.ConfigError)):
            type(cache).from_state({**saved, "meta": saved["meta"].replace(old, new)})
    with pytest.raises(pagedkv.CacheStateError, match="this one has none"):
        PagedKVCache.from_state(saved)
    full = PagedKVCache(cache._context.fork(), 0)
    mx.eval(step(full, 100, 0))
    with pytest.raises(pagedkv.CacheStateError, match="not that of a PagedRotatingKVCache"):
        PagedRotatingKVCache.from_state(dict(full.state.items()))


@pytest.mark.parametrize("size", [True, 0, 7, -1, 4.5, "many"])
def test_sizes_that_are_none(size: Any) -> None:
    with pytest.raises(pagedkv.ConfigError, match="max_kv_size is a number of tokens from 8 up"):
        pagedkv.TierConfig(max_kv_size=size)


def test_a_bounded_cache_for_hand_written_models() -> None:
    config = pagedkv.TierConfig(max_kv_size=600, hot_tokens=64, cold=0)
    with pagedkv.PagedCache.standalone(1, config) as cache:
        layer = cache[0]
        mx.eval(step(layer, 700, 0))
        for i, n in enumerate((1, 300, 5, 1, 1000, 1)):
            checked_step(layer, n, i)
        q, k, v = numbers(20, 5)
        a = pagedkv.attention(q[:, :, 15:], k, v, cache=layer, scale=SCALE)
        assert cache.trim(20) == 20
        b = pagedkv.attention(q, k, v, cache=layer, scale=SCALE)
        assert mx.abs(a - b[:, :, 15:]).max().item() < 1e-3
        assert cache.stats().layers == ("paged window 600",)
        assert cache.stats().hot.tokens + cache.stats().warm.tokens == layer.offset - layer.dropped


@pytest.mark.parametrize("n", [1, 5, 40, 900])
def test_a_damaged_page_takes_the_call_back_from_windows_too(n: int) -> None:
    """The last layer cannot read its cold page when those before have moved their windows on."""
    model = windowed("gemma3_text", 700, num_hidden_layers=4)
    config = replace(PAGES, kv="K4V4", warm="200KB", cold="64MB")
    with pagedkv.wrap(model, config) as cache:
        mx.eval(model(random_tokens(1500), cache=cache))
        mx.eval(model(random_tokens(1), cache=cache))
        expected = model(random_tokens(n, seed=2), cache=cache.fork())
        mx.eval(expected)
        store = cache.context.pager.cold
        store.flush()
        cache.context.pager.reader.close()
        file = next(store.directory.glob("layer-0003*"))
        good = file.read_bytes()
        file.write_bytes(bytes(len(good)))
        before = [(c.offset, c.dropped) for c in cache]
        for _ in range(2):
            with pytest.raises(pagedkv.CorruptPageError, match="layer 3"):
                mx.eval(model(random_tokens(n, seed=2), cache=cache))
            assert [c.offset for c in cache] == [1501] * 4
        assert [(c.offset, c.dropped) for c in cache] == before
        file.write_bytes(good)
        again = model(random_tokens(n, seed=2), cache=cache)
        # Layers that keep everything have sealed tokens of a long call, which a trim does not undo.
        assert mx.abs(again - expected).max().item() <= (0.05 if n == 900 else 0)
    pagedkv.unwrap(model)


@pytest.mark.parametrize("hot", [64, 512])
@pytest.mark.parametrize("kv", ["K4V4", "fp16"])
def test_a_plan_counts_what_a_window_holds(hot: int, kv: str) -> None:
    config = pagedkv.TierConfig(
        max_kv_size=1024, hot_tokens=hot, kv=kv, cold=0, hot_dtype="float16"
    )
    shape = pagedkv.KVShape(HEADS, DIM, DIM)
    most = dict.fromkeys(("warm", "hot"), 0)
    with pagedkv.PagedCache.standalone(1, config) as cache:
        for n in (*[37] * 60, *[1] * 300):
            mx.eval(step(cache[0], n, n))
            planned = pagedkv.plan(shape, 1, cache.offset, config)
            stats = cache.stats()
            assert stats.warm.bytes <= planned.warm_bytes
            # What a long call leaves behind is held until the next one, to go back to.
            held = planned.hot_bytes * (2 if n > SLACK else 1)
            assert stats.hot.allocated <= held + 300 * shape.token_bytes()
            if n == 1:
                # A page is sealed before the next token comes.
                assert stats.hot.tokens - planned.hot_tokens in (0, 256)
                most["warm"] = max(most["warm"], stats.warm.bytes)
        assert most["warm"] == planned.warm_bytes
        assert stats.fp16_bytes == planned.fp16_bytes == 1024 * shape.token_bytes()
    longer = pagedkv.plan(shape, 1, 10**6, config)
    assert longer.warm_bytes == planned.warm_bytes
    assert longer.memory_bytes <= planned.memory_bytes + 300 * shape.token_bytes()
    assert longer.fits and longer.max_context >= 2**32 - 1
    mixed = pagedkv.plan(shape, 6, 50_000, replace(config, max_kv_size=None), windows=[1024] * 5)
    alone = pagedkv.plan(shape, 1, 50_000, replace(config, max_kv_size=None))
    assert mixed.warm_bytes < alone.warm_bytes + 5 * longer.warm_bytes + 5 * 2**17
    assert mixed.warm_bytes > alone.warm_bytes
    assert mixed.hot_tokens + mixed.warm_tokens + mixed.cold_tokens == 50_000
    with pytest.raises(pagedkv.ConfigError, match="2 windows of 1 layers"):
        pagedkv.plan(shape, 1, 10, windows=[5, 5])


def test_placement_does_not_change_a_bit_for_the_kernels() -> None:
    """Stretches of staged pages know of the window as well; a query with sinks and without."""
    outputs = []
    for warm in ("64MB", "180KB"):
        cache = window(
            1500, kv="K8V4:600,K4V4", hot_tokens=64, hot_dtype="float16", warm=warm, cold="64MB"
        )
        cache._backend = KernelBackend(HostLauncher())
        mx.eval(step(cache, 1600, 0), step(cache, 200, 1))
        cache._settle()
        sinks = mx.array(np.linspace(-1, 1, HEADS * REPEATS).astype(np.float16))
        outputs.append([step(cache, 1, i, sinks if i % 2 else None) for i in range(4)])
        mx.eval(outputs[-1])
        assert cache.view().hidden > 0
        cold = [p for p, _ in cache.located_pages() if p.slot is None]
        assert bool(cold) == (warm != "64MB")
        cache.close()
    for a, b in zip(*outputs, strict=True):
        assert mx.array_equal(a, b).item()


def test_a_resume_that_fails_leaves_an_empty_cache(tmp_path: Path) -> None:
    model = windowed("gemma3_text", 800)
    config = replace(PAGES, kv="K4V4", warm="64MB", cold="64MB", cold_dir=str(tmp_path))
    with pagedkv.wrap(model, config) as cache:
        mx.eval(model(random_tokens(2000), cache=cache))
        cache.flush()
        expected = model(random_tokens(900, seed=1), cache=model.make_cache())
        mx.eval(expected)
    store = next(tmp_path.glob("*/*.checkpoint"), None) or next(tmp_path.rglob("*.checkpoint"))
    content = store.read_bytes()
    store.write_bytes(content[:-5] + b"wrong")  # of the hot tokens, which come last
    cache = model.make_cache()
    with pytest.raises(pagedkv.CorruptStoreError):
        cache.resume()
    assert [(c.offset, c.dropped) for c in cache] == [(0, 0)] * 2
    assert mx.array_equal(model(random_tokens(900, seed=1), cache=cache), expected).item()
    pagedkv.unwrap(model)


def test_pages_of_a_window_that_seals_no_more_fall_behind() -> None:
    """Loaded with more hot tokens than the window has: its last page is seen in part, then gone."""
    saved = window(700, 4, kv="K4V4", hot_tokens=64, hot_dtype="float16")
    mx.eval(step(saved, 1000, 0), step(saved, 1, 1))
    cache = window(700, 4, kv="K4V4", hot_tokens=2000, hot_dtype="float16")
    value = dict(saved.state.items())
    state.restore(cache, state.parse_meta(value), value)
    assert len(cache._table) == 2 and not cache.seals
    for i in range(750):
        if i % 5:
            mx.eval(step(cache, 1, i))
        else:
            checked_step(cache, 1, i)
    assert cache.dropped > 900 and not len(cache._table)
    cache._pager.check([cache._table])


def test_a_page_that_is_held_though_nobody_sees_it() -> None:
    """For the tokens that may be taken back: kernels and composed backends pass it by."""
    cache = window(1000, kv="K4V4", hot_tokens=64, hot_dtype="float16")
    mx.eval(step(cache, 1100, 0), step(cache, 1, 1))
    while cache.view().hidden < 255:
        mx.eval(step(cache, 1, cache.offset))
    composed, kernels = cache._backend, KernelBackend(HostLauncher())
    for i in range(3):
        cache._backend = kernels if i % 2 else composed
        checked_step(cache, 1, i)
        first = cache.view().entries[0]
        assert cache.view().hidden >= first.tokens
        checked_step(cache, 3, i)
    for _ in range(12):
        mx.eval(step(cache, 1, 0))
    assert cache._table.entries[0] is not first


def test_precision_goes_by_distance_in_windows_too() -> None:
    cache = window(1500, 4, kv="K8V8:500,K4V2", hot_tokens=64, hot_dtype="float16")
    for i, n in enumerate((1600, 700, *[1] * 400)):
        mx.eval(step(cache, n, i))
    pages = list(cache.located_pages())
    assert [p.position for p, _ in pages] == [
        4 + cache.dropped + 256 * i for i in range(len(pages))
    ]
    kinds = set()
    for page, tokens in pages:
        distance = cache.offset - page.position - tokens
        kinds.add(str(page.precision))
        if distance <= 500:
            assert str(page.precision) == "K8V8"
        if distance > 500 + 256:  # pages are lowered when others are sealed
            assert str(page.precision) == "K4V2"
    assert kinds == {"K8V8", "K4V2"}
    assert cache.dropped > 500


def test_pages_that_go_make_room_for_those_that_come() -> None:
    """The same token seals a page and leaves one behind: memory for one of them is enough."""
    size = 564  # of which that is so, with 64 hot tokens, 4 kept ones and pages of 256
    page = pagedkv.PageGeometry(
        pagedkv.KVShape(HEADS, DIM, DIM), 256, pagedkv.Precision.parse("K4V4")
    )
    two_for_each_layer = 5 * page.page_bytes
    config = pagedkv.TierConfig(
        max_kv_size=size, hot_tokens=64, warm=two_for_each_layer, cold=0, page_tokens=256
    )
    _, k, v = numbers(1, 0)
    with pagedkv.PagedCache.standalone(2, config) as cache:
        for i in range(1200):
            views = [layer.append(k, v) for layer in cache]
            if i % 16 == 0:
                mx.eval([view.keys for view in views])
        assert [len(layer._pager.pages) for layer in cache] == [2, 2]
        assert cache[0].dropped > 256
