"""Who is measured in attention alone: MLX's own, mlx-lm's quantized cache, and ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx

from pagedkv.attn.backends import choose_backend
from pagedkv.attn.driver import attend, stock_attention
from pagedkv.cache.paged_cache import PagedCache
from pagedkv.tools.bench.caches import budgeted, bytes_read, chunks, fill, own
from pagedkv.tools.bench.settings import AttentionShape, BenchSettings, short_dtype
from pagedkv.tools.bench.shuffle import LEAST_PAGES, shuffle_pages
from pagedkv.tools.bench.timing import Call

QUANTIZED_NAME = "mlx-lm quantized"
QUANTIZED_BITS, QUANTIZED_GROUP = 4, 64
SHUFFLED, COLD = " shuffled", " cold"
"""Variants of our rows, appended to their name."""

MOST_LAYERS = 16
"""Caches of one contender, at most."""

CACHE_BYTES = 64 * 2**20
"""A working set below this may fit the last cache of the processor (50 MB on an H100)."""


@dataclass(frozen=True)
class Place:
    """Where attention is measured.

    Attributes:
        shape: heads and channels.
        depth: tokens in the cache.
        dtype: of queries, and of the keys and values that are not quantized.
        settings: queries, chunk, working set, tiers.
    """

    shape: AttentionShape
    depth: int
    dtype: mx.Dtype
    settings: BenchSettings

    @property
    def mask(self) -> str | None:
        """As a model would give it."""
        return None if self.settings.queries == 1 else "causal"

    def layers(self, nbytes: int) -> int:
        """Caches of `nbytes` each that make up the working set."""
        return min(MOST_LAYERS, max(1, -(-self.settings.working_set // max(1, nbytes))))


@dataclass
class Contender:
    """One row to be.

    Attributes:
        name: of the row.
        calls: the same attention on different caches.
        nbytes: that one call must read, queries and output aside.
        facts: further entries of the row.
        caches: to be closed afterwards.
        evaluates: whether a call evaluates on its way, so that building the graph is the work.
    """

    name: str
    calls: Sequence[Call]
    nbytes: int
    facts: dict[str, Any] = field(default_factory=dict)
    caches: list[PagedCache] = field(default_factory=list)
    evaluates: bool = False

    @property
    def working_set(self) -> int:
        """Bytes of all its caches."""
        return self.nbytes * len(self.calls)

    @property
    def stall_seconds(self) -> float:
        """Time that calls have waited for the disk so far; 0 without one."""
        if not self.evaluates:
            return 0.0
        return sum(cache.stats().read_stall_seconds for cache in self.caches)

    def close(self) -> None:
        """Let go of the memory."""
        for cache in self.caches:
            cache.close()
        self.calls, self.caches = (), []


def stock_name(dtype: mx.Dtype) -> str:
    """The baseline's name, ``"mlx fp16"`` or what the type is."""
    return f"mlx {short_dtype(dtype)}"


def _dense(place: Place) -> tuple[mx.array, mx.array]:
    """All keys and values of a place, ``[1, kv_heads, depth, dim]``."""
    parts = list(chunks(place.shape.kv, place.depth, place.settings.chunk, place.dtype))
    keys = mx.concatenate([k for k, _ in parts], axis=2)
    values = mx.concatenate([v for _, v in parts], axis=2)
    mx.eval(keys, values)
    return keys, values


def stock(place: Place) -> Contender:
    """`mx.fast.scaled_dot_product_attention` over plain arrays."""
    keys, values = _dense(place)
    nbytes = keys.nbytes + values.nbytes
    scale, mask = place.shape.scale, place.mask

    def call(k: mx.array, v: mx.array) -> Call:
        return lambda q: stock_attention(q, k, v, scale=scale, mask=mask)

    pairs = [(own(keys), own(values)) for _ in range(place.layers(nbytes))]
    mx.eval(pairs)
    return Contender(stock_name(place.dtype), [call(k, v) for k, v in pairs], nbytes)


def quantized(place: Place) -> Contender:
    """mlx-lm's attention over its quantized cache."""
    from mlx_lm.models.base import quantized_scaled_dot_product_attention as sdpa

    group, bits = QUANTIZED_GROUP, QUANTIZED_BITS
    dense = _dense(place)
    scale, mask = place.shape.scale, place.mask

    def triples() -> list[list[mx.array]]:
        pair = [list(mx.quantize(x, group_size=group, bits=bits)) for x in dense]
        mx.eval(pair)
        return pair

    def call(k: list[mx.array], v: list[mx.array]) -> Call:
        # It multiplies its queries in place: give it a handle of its own.
        return lambda q: sdpa(q.astype(q.dtype), k, v, scale, mask, group, bits)

    first = triples()
    nbytes = sum(x.nbytes for part in first for x in part)
    pairs = [first, *(triples() for _ in range(place.layers(nbytes) - 1))]
    return Contender(QUANTIZED_NAME, [call(k, v) for k, v in pairs], nbytes)


def paged(place: Place, kv: str, variant: str = "") -> Contender | None:
    """Our cache.

    Args:
        place: shape, depth, type.
        kv: precision or ladder.
        variant: `SHUFFLED` for page slots in random order, `COLD` for nearly all pages on disk.

    Returns:
        None if there are too few pages for the variant.
    """
    settings, shape = place.settings, place.shape
    tiers = replace(settings.tiers, kv=kv)
    disk = 4 * place.depth * shape.kv.token_bytes() + 2**30 if variant == COLD else 0
    config = budgeted(tiers, shape.kv, 1, place.depth, disk)
    caches = [PagedCache.standalone(1, config)]
    fill([caches[0][0]], shape.kv, place.depth, settings.chunk, place.dtype)
    if variant and len(caches[0][0].view().entries) < LEAST_PAGES:
        caches[0].close()
        return None
    nbytes = bytes_read(caches[0][0])
    count = 1 if variant == COLD else place.layers(nbytes)
    more = [PagedCache.standalone(1, config) for _ in range(count - 1)]
    fill([cache[0] for cache in more], shape.kv, place.depth, settings.chunk, place.dtype)
    caches += more
    if variant == SHUFFLED:
        for seed, cache in enumerate(caches):
            shuffle_pages(cache[0], seed)
    calls = [_attends(place, cache) for cache in caches]
    facts = _facts(caches[0])
    return Contender(f"{kv}{variant}", calls, nbytes, facts, caches, variant == COLD)


def _attends(place: Place, cache: PagedCache) -> Call:
    view, scale, mask = cache[0].view(), place.shape.scale, place.mask
    mx.eval(view.keys, view.values)
    backend = choose_backend(place.settings.tiers.backend)
    return lambda q: attend(view, q, scale, mask, backend=backend)


def _facts(cache: PagedCache) -> dict[str, Any]:
    stats = cache.stats()
    return {
        "hot_tokens": stats.hot.tokens,
        "warm_tokens": stats.warm.tokens,
        "cold_tokens": stats.cold.tokens,
        "pages": stats.warm.pages + stats.cold.pages,
    }
