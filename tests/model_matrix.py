"""What is done to every model type with a paged cache and with mlx-lm's own, side by side."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as stock

import pagedkv
from pagedkv.allocator import KVShape, PageGeometry, Precision
from pagedkv.streams import replaced, streams
from pagedkv.tiers.codec import codec_for
from pagedkv.window import ChunkedLayerCache

PREFILL = (256, 256, 24)
"""Chunks of the prompt: two pages of 256 tokens are out of a window of 16 then."""

SHORT_PREFILL = (240, 24)
"""Where nothing is sealed: past every window and chunk, and past the first 256 hot tokens."""

PAGES = 2
TRIMMED = 150
"""Tokens that are taken back: into the middle of the second page."""

SINKS, HOT = 4, 16


def tokens(count: int, seed: int, vocabulary: int = 120) -> mx.array:
    """Random token numbers ``[1, count]``."""
    return mx.random.randint(0, vocabulary, (1, count), key=mx.random.key(seed))


def error(actual: mx.array, expected: mx.array) -> float:
    """How far logits are from others: their distance over what the others spread; NaN is 1e9."""
    finite = mx.isfinite(expected)
    a = mx.where(finite, actual, 0.0)
    b = mx.where(finite, expected, 0.0)
    spread = b - b.sum(axis=-1, keepdims=True) / finite.sum(axis=-1, keepdims=True)
    spread = mx.where(finite, spread, 0.0)
    ratio = mx.sqrt(mx.square(a - b).sum() / mx.square(spread).sum()).item()
    return float(ratio) if ratio == ratio else 1e9


def everything_hot() -> pagedkv.TierConfig:
    """Nothing is sealed, and hot tokens are float32 as the model is."""
    return pagedkv.TierConfig(hot_tokens=4096, hot_dtype="model", warm="64MB", cold=0)


def tiny_budgets(cache: pagedkv.PagedCache, kv: str = "K8V8") -> pagedkv.TierConfig:
    """One warm page per stream, the others on disk.

    Args:
        cache: an empty one of the model, for the shapes of its streams.
        kv: precision of the pages.
    """
    precision = Precision.parse(kv)
    pages = [
        PageGeometry(layer.shape, 256, precision).page_bytes
        for layer in cache.paged_layers
        if layer.shape is not None
    ]
    return pagedkv.TierConfig(
        hot_tokens=HOT, sink_tokens=SINKS, kv=kv, page_tokens=256, hot_dtype="model",
        warm=2 * len(cache.paged_layers) * max(pages, default=2**16), cold="64MB",
        staging="8MiB", write_buffer="1MiB",
    )  # fmt: skip


class OrderedCache(stock.RotatingKVCache):  # type: ignore[misc]
    """mlx-lm's ring, its tokens handed out from the oldest to the newest.

    Sums over tokens in another order differ in their last bits, and muse_spark makes more of it.
    """

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """What a single token sees, and what layers that share keys see."""
        keys, values = super().keys_and_values()
        if self.offset > self.max_size == keys.shape[2]:
            return self._temporal_order(keys), self._temporal_order(values)
        return keys, values


def ordered_caches(model: Any) -> list[Any]:
    """mlx-lm's caches for a model, windows in order."""

    def ordered(_: int, cache: Any) -> Any:
        if type(cache) is not stock.RotatingKVCache:
            return cache
        return OrderedCache(cache.max_size, cache.keep)

    return replaced(stock.make_prompt_cache(model), ordered)


class RoundedCache(stock.KVCache):  # type: ignore[misc]
    """mlx-lm's cache, with the pages that ours would have sealed rounded in place.

    What a paged cache has to agree with closely, whatever its precision: it differs from it in
    the order of float32 operations only.
    """

    def __init__(self, config: pagedkv.TierConfig) -> None:
        super().__init__()
        self.config = config
        self.sealed = config.sink_tokens  # where the next page begins

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Round the pages that have left the window, then append."""
        while self.offset - self.sealed - self.config.hot_tokens >= 256:
            page = slice(self.sealed, self.sealed + 256)
            rounded = _rounded(self.keys[0, :, page], self.values[0, :, page], self.config.kv)
            self.keys[0, :, page], self.values[0, :, page] = rounded
            self.sealed += 256
        return super().update_and_fetch(keys, values)  # type: ignore[no-any-return]

    def trim(self, n: int) -> int:
        """What is left of a page stays as it is, and the next page begins behind it."""
        n = super().trim(n)
        self.sealed = min(self.sealed, max(self.offset, self.config.sink_tokens))
        return n


def _rounded(keys: mx.array, values: mx.array, kv: str) -> tuple[mx.array, mx.array]:
    """A page's keys and values ``[kv_heads, 256, dim]`` as they come back from a record."""
    heads, _, key_dim = keys.shape
    shape = KVShape(heads, key_dim, max(1, values.shape[2]))
    codec = codec_for(shape, 256, Precision.parse(kv), mx.float32)
    if not values.shape[2]:
        record = codec.encode(keys, mx.zeros((heads, 256, 1)))
        return codec.keys(record, mx.float32)[0].swapaxes(1, 2), values
    record = codec.encode(keys, values)
    return (
        codec.keys(record, mx.float32)[0].swapaxes(1, 2),
        codec.values(record, mx.float32)[0],
    )


def rounded_caches(model: Any, config: pagedkv.TierConfig) -> list[Any]:
    """The same, those that are paged rounded as pages would be."""

    def rounded(_: int, cache: Any) -> Any:
        return RoundedCache(config) if type(cache) is stock.KVCache else cache

    return replaced(ordered_caches(model), rounded)


Logits = dict[str, mx.array]


@dataclass
class Run:
    """One pass over a model.

    Attributes:
        logits: by the name of what was done.
        trimmable: whether the cache could forget tokens.
        reloaded: of the same step before and after saving and loading the cache.
    """

    logits: Logits
    trimmable: bool
    reloaded: list[tuple[mx.array, mx.array]]


def exercise(
    model: Any, cache: list[Any], folder: Path | None, prefill: Sequence[int] = PREFILL
) -> Run:
    """Prefill in chunks, decode, copy, trim, extend, go on with the copy, save and load.

    Nothing is trimmed in chunks: mlx-lm does it as far as the present chunk reaches, and the next
    chunk then begins elsewhere.

    Args:
        model: called with tokens and cache.
        cache: an empty one.
        folder: for saved caches; None saves none.
        prefill: tokens of each chunk of the prompt.
    """
    logits: Logits = {}

    def step(name: str, given: mx.array, on: list[Any]) -> None:
        logits[name] = model(given, cache=on)
        mx.eval(logits[name], [c.state for c in on])

    for i, count in enumerate(prefill):
        step(f"prefill {i}", tokens(count, seed=i), cache)
    for i in range(2):
        step(f"decode {i}", tokens(1, seed=10 + i), cache)
    twin = copy.deepcopy(cache)
    chunked = any(isinstance(c, stock.ChunkedKVCache | ChunkedLayerCache) for c in streams(cache))
    trimmable = stock.can_trim_prompt_cache(cache) and not chunked
    if trimmable:
        stock.trim_prompt_cache(cache, TRIMMED)
    step("extend", tokens(40, seed=20), cache)
    step("decode after", tokens(1, seed=21), cache)
    step("copy", tokens(3, seed=22), twin)
    step("decode beside the copy", tokens(1, seed=24), cache)
    reloaded = []
    for loaded in _saved_and_loaded(twin, folder) if folder else ():
        given = tokens(1, seed=23)
        mine = model(given, cache=copy.deepcopy(twin))
        reloaded.append((mine, model(given, cache=loaded)))
        mx.eval(reloaded)
    return Run(logits, trimmable, reloaded)


def _saved_and_loaded(cache: list[Any], folder: Path) -> Iterator[list[Any]]:
    path = str(folder / "cache.safetensors")
    stock.save_prompt_cache(path, cache)
    yield stock.load_prompt_cache(path)
    if isinstance(cache, pagedkv.PagedCache) and cache.is_fully_paged:
        cache.save(path)
        yield stock.load_prompt_cache(path)


def broken(model: Any, cache: list[Any]) -> mx.array | None:
    """Logits of a decode step with mlx-lm's cache, one page of its values moved by a token.

    What a test that compares logits has to notice. None if no stream is a plain `KVCache`.
    """
    twin = copy.deepcopy(cache)
    plain = [c for c in streams(twin) if type(c) is stock.KVCache and not c.empty()]
    for layer in plain:
        page = layer.values[:, :, SINKS : SINKS + 256]
        layer.values[:, :, SINKS : SINKS + 256] = mx.roll(page, 1, axis=2)
    return model(tokens(1, seed=30), cache=twin) if plain else None
