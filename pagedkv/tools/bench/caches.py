"""Caches full of random tokens, with exactly the memory they need, and what attention reads."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx

from pagedkv.allocator import KVShape
from pagedkv.config.planner import plan
from pagedkv.config.tier_config import TierConfig
from pagedkv.errors import ConfigError
from pagedkv.sequence.layer import PagedLayerCache
from pagedkv.tools.bench.result import Row, failed, first_words
from pagedkv.tools.bench.settings import BenchSettings

SPARE_TOKENS = 256
"""Room in the warm tier beyond the tokens asked for."""


def budgeted(
    config: TierConfig, shape: KVShape, layers: int, tokens: int, cold: int = 0
) -> TierConfig:
    """The same settings with just enough warm memory for some tokens, beside what the disk takes.

    Args:
        config: precision, windows, page size, backend.
        shape: of one layer.
        layers: that share the budget.
        tokens: that every layer must hold.
        cold: bytes of disk.

    Raises:
        ConfigError: if no budget is enough.
    """

    def fits(warm: int) -> bool:
        try:
            return plan(shape, layers, wanted, replace(config, warm=warm, cold=cold)).fits
        except ConfigError:  # not even one page
            return False

    config = config.without_model
    wanted = tokens + SPARE_TOKENS
    low, high = 0, 2**20
    while not fits(high):
        if high > 2**50:
            plan(shape, layers, wanted, replace(config, warm=high, cold=cold))  # says what is wrong
            raise ConfigError(f"no warm budget holds {wanted:,} tokens of {shape}")
        low, high = high, 2 * high
    while high - low > max(1024, high // 2048):
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return replace(config, warm=high, cold=cold)


def random_tokens(
    shape: KVShape, start: int, count: int, dtype: mx.Dtype
) -> tuple[mx.array, mx.array]:
    """Random keys and values of `count` tokens from `start` on; the same for the same place.

    Returns:
        ``[1, kv_heads, count, key_dim]`` and ``[1, kv_heads, count, value_dim]``, evaluated.
    """
    first, second = mx.random.split(mx.random.key(start))
    heads = (1, shape.kv_heads, count)
    keys = mx.random.normal((*heads, shape.key_dim), key=first).astype(dtype)
    values = mx.random.normal((*heads, shape.value_dim), key=second).astype(dtype)
    mx.eval(keys, values)
    return keys, values


def chunks(
    shape: KVShape, depth: int, chunk: int, dtype: mx.Dtype
) -> Iterator[tuple[mx.array, mx.array]]:
    """`depth` random tokens, `chunk` at a time."""
    for start in range(0, depth, chunk):
        yield random_tokens(shape, start, min(chunk, depth - start), dtype)


def own(x: mx.array) -> mx.array:
    """A copy: a cache may keep what it is given, and caches must not share memory here."""
    return x * 1


def append_and_seal(layer: PagedLayerCache, keys: mx.array, values: mx.array) -> tuple[float, int]:
    """Append a chunk, and seal what it pushes out of the hot window as after its attention.

    Returns:
        Seconds of sealing, and tokens sealed by it.
    """
    view = layer.append(keys, values)
    mx.eval(view.keys, view.values)
    before = view.paged_tokens
    del view  # a view in use would make the slab's next write a copy
    started = time.perf_counter()
    layer._settle()
    mx.synchronize()
    return time.perf_counter() - started, layer.view().paged_tokens - before


def fill(
    layers: Sequence[PagedLayerCache], shape: KVShape, depth: int, chunk: int, dtype: mx.Dtype
) -> None:
    """Append the same random tokens to paged layers of one shape, sealing as a prompt would."""
    for keys, values in chunks(shape, depth, chunk, dtype):
        for layer in layers:
            append_and_seal(layer, own(keys), own(values))


def fill_model(
    caches: Sequence[Any], shapes: Sequence[KVShape], depth: int, chunk: int, dtype: mx.Dtype
) -> None:
    """Put random tokens into a model's caches, ours or mlx-lm's, as a prompt would.

    Args:
        caches: one per layer.
        shapes: of the layers; layers of one shape get the same tokens.
        depth: tokens.
        chunk: tokens at a time.
        dtype: of the model.
    """
    for start in range(0, depth, chunk):
        count = min(chunk, depth - start)
        fresh = {shape: random_tokens(shape, start, count, dtype) for shape in set(shapes)}
        for cache, shape in zip(caches, shapes, strict=True):
            keys, values = map(own, fresh[shape])
            if isinstance(cache, PagedLayerCache):
                append_and_seal(cache, keys, values)
            else:
                cache.update_and_fetch(keys, values)
        mx.eval([cache.state for cache in caches])


def rows_by_precision(
    settings: BenchSettings, base: Row, measure: Callable[[BenchSettings, Row], Row]
) -> list[Row]:
    """A row for each precision that is asked for; one that cannot be measured says why.

    Args:
        settings: `kv` has the precisions.
        base: entries that all rows have.
        measure: makes the row, given the settings with that precision and the row's beginning.
    """
    rows = []
    for kv in settings.kv:
        row = {**base, "what": kv}
        try:
            rows.append(measure(replace(settings, tiers=replace(settings.tiers, kv=kv)), row))
        except Exception as e:
            rows.append(failed(row, f"does not run: {first_words(e)}"))
        release()
    return rows


def release() -> None:
    """Give memory that nothing holds back to the machine."""
    gc.collect()
    mx.synchronize()
    mx.clear_cache()


def bytes_read(layer: PagedLayerCache) -> int:
    """Bytes that attention over a paged layer must read: page payloads and hot tokens."""
    view, shape = layer.view(), layer.shape
    assert shape is not None
    nbytes = view.keys.shape[2] * shape.token_bytes(layer.hot_bits)
    for entry in view.entries:
        assert view.pager is not None
        geometry = view.pager.codecs[view.pager.pages[entry.page].precision].geometry
        nbytes += geometry.payload_bytes * entry.tokens // geometry.tokens
    return int(nbytes)


def stock_bytes_read(cache: Any) -> int:
    """Bytes that attention over one of mlx-lm's caches must read."""
    keys = cache.keys[0] if isinstance(cache.keys, (tuple, list)) else cache.keys
    return int(cache.nbytes * cache.offset // keys.shape[2])
