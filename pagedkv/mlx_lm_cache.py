"""Our layer caches as mlx-lm's; the only module that imports mlx-lm's cache classes."""

from __future__ import annotations

from typing import Any

from mlx_lm.models import cache as stock

from pagedkv.layer import PagedLayerCache, SequenceContext
from pagedkv.window import ChunkedLayerCache, WindowedLayerCache

KEEP = 4
"""First tokens that a bounded cache keeps for ever, as in mlx-lm."""


class PagedKVCache(PagedLayerCache, stock._BaseCache):  # type: ignore[misc]
    """`PagedLayerCache` for mlx-lm: found by name when a saved cache is loaded."""


class PagedRotatingKVCache(WindowedLayerCache, stock._BaseCache):  # type: ignore[misc]
    """`WindowedLayerCache` for mlx-lm."""


class PagedChunkedKVCache(ChunkedLayerCache, stock._BaseCache):  # type: ignore[misc]
    """`ChunkedLayerCache` for mlx-lm."""


def is_pageable(cache: Any) -> bool:
    """Whether a layer's stock cache is of a kind that pages replace."""
    return type(cache) in (stock.KVCache, stock.RotatingKVCache, stock.ChunkedKVCache)


def paged(cache: Any, context: SequenceContext, layer: int) -> PagedLayerCache:
    """An empty paged cache in place of a stock one that `is_pageable`."""
    if type(cache) is stock.RotatingKVCache:
        return PagedRotatingKVCache(context, layer, cache.max_size, cache.keep)
    if type(cache) is stock.ChunkedKVCache:
        return PagedChunkedKVCache(context, layer, cache.chunk_size)
    if context.config.max_kv_size is not None:
        return PagedRotatingKVCache(context, layer, context.config.max_kv_size, KEEP)
    return PagedKVCache(context, layer)


def register() -> None:
    """Let mlx-lm's `load_prompt_cache` find the classes; it looks names up in its own module."""
    for kind in (PagedKVCache, PagedRotatingKVCache, PagedChunkedKVCache):
        setattr(stock, kind.__name__, kind)
