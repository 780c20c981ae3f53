"""Caches that a model brings: which are paged, which stay, and what models do with them."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import cache as stock

import pagedkv
from tests.models import random_tokens, tiny_llama

CONFIG = pagedkv.TierConfig(
    hot_tokens=64, sink_tokens=4, kv="fp16", page_tokens=256, hot_dtype="model", layer_kv="same",
    warm="64MB", cold=0,
)  # fmt: skip


class CountingCache(stock.KVCache):  # type: ignore[misc]
    """Holds more than keys and values, as derived classes in models' files do."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        self.calls += 1
        return super().update_and_fetch(keys, values * self.calls)


class CountingRing(stock.RotatingKVCache):  # type: ignore[misc]
    """The same of a window; a long one, for llama makes one mask for all its layers."""


class CountingList(stock.CacheList):  # type: ignore[misc]
    """The same of several caches: what becomes of those inside, only it knows."""


def with_caches(model: Any, *caches: Any) -> Any:
    """The model with a `make_cache` of its own."""
    own = {"make_cache": lambda self: [make() for make in caches]}
    model.__class__ = type("Model", (type(model),), own)
    return model


def logits_of_chunks(model: Any, cache: Any) -> list[mx.array]:
    logits = []
    for start, count in ((0, 300), (300, 300), (600, 1), (601, 1)):
        out = model(random_tokens(count, seed=start), cache=cache)
        logits.append(getattr(out, "logits", out))
        mx.eval(logits[-1])
    return logits


def require_alike(actual: list[mx.array], expected: list[mx.array]) -> None:
    """As far as 16-bit pages in a float32 model go."""
    for a, b in zip(actual, expected, strict=True):
        assert mx.abs(a - b).max().item() < 5e-3 * mx.abs(b).max().item()


@pytest.mark.parametrize(
    "make", [CountingCache, lambda: CountingRing(2048)], ids=["plain", "window"]
)
def test_a_derived_class_stays_as_it_is_and_is_reported(make: Any) -> None:
    model = with_caches(tiny_llama(), make, stock.KVCache)
    expected = logits_of_chunks(model, model.make_cache())
    with pagedkv.wrap(model, CONFIG) as cache:
        require_alike(logits_of_chunks(model, cache), expected)
        assert cache.stats().layers == (type(make()).__name__, "paged")
        assert type(cache[0]) is type(make())
    pagedkv.unwrap(model)


def test_a_derived_list_of_caches_stays_whole() -> None:
    class Model(type(tiny_llama())):  # type: ignore[misc]
        def __call__(self, ids: mx.array, cache: Any) -> mx.array:
            return super().__call__(ids, cache=[cache[0][0], cache[1]])  # type: ignore[no-any-return]

    model = with_caches(tiny_llama(), lambda: CountingList(stock.KVCache()), stock.KVCache)
    model.__class__ = type("Listed", (Model,), {"make_cache": type(model).make_cache})
    with pagedkv.wrap(model, CONFIG) as cache:
        assert isinstance(cache[0], CountingList) and type(cache[0][0]) is stock.KVCache
        assert cache.stats().layers[1] == "paged"
    pagedkv.unwrap(model)


def pair_of(cache: Any) -> tuple[mx.array, mx.array]:
    """The state that mlx-vlm's plain cache has."""
    return cache.keys[:, :, : cache.offset], cache.values[:, :, : cache.offset]


VlmCache = type(
    "KVCache", (stock.KVCache,), {"__module__": "mlx_vlm.models.cache", "state": property(pair_of)}
)


class Sharing(nn.Module):
    """Two layers of attention; the second reads the first one's keys as its cache's state."""

    def __init__(self, unpacked: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 64)
        self.layers = [nn.Linear(64, 192), nn.Linear(64, 64)]
        self.unpacked = unpacked

    def __call__(self, ids: mx.array, cache: Any = None) -> mx.array:
        (cache,) = cache
        x = self.embed(ids)
        q, k, v = (_heads(t) for t in mx.split(self.layers[0](x), 3, axis=-1))
        keys, values = cache.update_and_fetch(k, v)
        x = x + _attended(q, keys, values)
        if self.unpacked:
            keys, values = cache.state
        else:
            state = cache.state
            keys, values = state[0], state[1]
        return self.embed.as_linear(x + _attended(_heads(self.layers[1](x)), keys, values))

    def make_cache(self) -> list[Any]:
        return [VlmCache()]


def _heads(x: mx.array) -> mx.array:
    return x.reshape(1, -1, 2, 32).swapaxes(1, 2)


def _attended(q: mx.array, keys: mx.array, values: mx.array) -> mx.array:
    mask = "causal" if q.shape[2] > 1 else None
    out = mx.fast.scaled_dot_product_attention(q, keys, values, scale=32**-0.5, mask=mask)
    return out.swapaxes(1, 2).reshape(1, -1, 64)


@pytest.mark.parametrize("unpacked", [False, True])
def test_layers_that_share_keys_may_read_them_as_the_state(unpacked: bool) -> None:
    mx.random.seed(0)
    model = Sharing(unpacked)
    mx.eval(model.parameters())
    expected = logits_of_chunks(model, model.make_cache())
    with pagedkv.wrap(model, CONFIG) as cache:
        assert cache.paged_layers[0].readers == 2
        require_alike(logits_of_chunks(model, cache), expected)
        assert cache.stats().layers == ("paged",)
        assert cache.stats().warm.tokens == 512
    pagedkv.unwrap(model)


class Flagged(Sharing):
    """Keeps flags of tokens in a second plain cache, and masks by them."""

    def __call__(self, ids: mx.array, cache: Any = None) -> mx.array:
        cache, flags = cache
        x = self.embed(ids)
        odd = (ids % 2 == 1)[:, None, :, None]
        seen, _ = flags.update_and_fetch(odd, odd)
        q, k, v = (_heads(t) for t in mx.split(self.layers[0](x), 3, axis=-1))
        keys, values = cache.update_and_fetch(k, v)
        share = seen.astype(mx.float32).mean()
        return self.embed.as_linear(x + share * _attended(q, keys, values))

    def make_cache(self) -> list[Any]:
        return [stock.KVCache(), stock.KVCache()]


def test_a_cache_of_flags_is_left_alone() -> None:
    mx.random.seed(0)
    model = Flagged(False)
    mx.eval(model.parameters())
    expected = logits_of_chunks(model, model.make_cache())
    with pagedkv.wrap(model, CONFIG) as cache:
        require_alike(logits_of_chunks(model, cache), expected)
        assert cache.stats().layers == ("paged", "KVCache")
    pagedkv.unwrap(model)


def test_keys_that_are_no_floating_point_numbers_are_refused() -> None:
    with pagedkv.PagedCache.standalone(1) as cache:
        flags = mx.ones((1, 2, 3, 4), mx.bool_)
        with pytest.raises(pagedkv.ShapeError, match="layer 0: keys of .*bool"):
            cache[0].update_and_fetch(flags, flags)


def test_retrieval_layers_are_found_where_logits_come_among_other_things() -> None:
    plain, model = tiny_llama(layers=4), tiny_llama(layers=4)
    kind = type(plain)

    def call(self: Any, *args: Any, **options: Any) -> Any:
        return SimpleNamespace(logits=kind.__call__(self, *args, **options))

    model.__class__ = type("LanguageModel", (kind,), {"__call__": call})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pagedkv.wrap(plain) as cache, pagedkv.wrap(model) as other:
            assert cache.stats().ladders == other.stats().ladders
    pagedkv.unwrap(plain)
    pagedkv.unwrap(model)


def test_positions_of_one_look_are_not_those_of_the_next() -> None:
    """A model that goes on with the positions of its first call, whatever its next one is like."""
    model = tiny_llama()
    kind = type(model)
    model.positions = None

    def call(self: Any, ids: mx.array, cache: Any) -> Any:
        if not cache[0].offset:
            if self.positions is None:
                self.positions = ids.shape[1]
            assert self.positions == ids.shape[1]
        return kind.__call__(self, ids, cache=cache)

    model.__class__ = type("Remembering", (kind,), {"__call__": call})
    with pagedkv.wrap(model, CONFIG) as cache:
        assert all(layer.shape is not None for layer in cache.paged_layers)
        assert model.positions is None
    pagedkv.unwrap(model)
