"""Our layer cache as one of mlx-lm's; the only module that imports mlx-lm's cache classes."""

from __future__ import annotations

from typing import Any

from mlx_lm.models import cache as stock

from pagedkv.layer import PagedLayerCache


class PagedKVCache(PagedLayerCache, stock._BaseCache):  # type: ignore[misc]
    """`PagedLayerCache` for mlx-lm: found by name when a saved cache is loaded."""


def is_pageable(cache: Any) -> bool:
    """Whether a layer's stock cache is the plain kind that pages replace."""
    return type(cache) is stock.KVCache


def register() -> None:
    """Let mlx-lm's `load_prompt_cache` find the class; it looks names up in its own module."""
    stock.PagedKVCache = PagedKVCache
