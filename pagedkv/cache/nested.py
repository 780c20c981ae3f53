"""The caches inside a model's list of caches: one per layer, or several where layers nest them.

A layer that attends twice (longcat_flash), keeps keys of an index (deepseek_v32) or a recurrent
state beside its keys (falcon_h1) has a `CacheList` of mlx-lm's. What pages replace are the caches
inside, called streams here. They are numbered in the order in which they are found, so that in
a model without nested caches the number of a stream is that of its layer.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

STOCK = ("mlx_lm.models.cache", "mlx_vlm.models.cache")
"""Modules of the caches that are known; mlx-vlm's have the same names and the same protocol."""


def stock_kind(cache: Any) -> str:
    """The name of a cache's class if it is one of mlx-lm's or mlx-vlm's own, else nothing.

    A class that was derived from one of them, in a model's file or in another library, may hold
    more than we know of: it is no kind of ours.
    """
    return type(cache).__name__ if type(cache).__module__ in STOCK else ""


def inner_caches(cache: Any) -> tuple[Any, ...] | None:
    """The caches in a `CacheList`; None for any other cache."""
    return tuple(cache.caches) if stock_kind(cache) == "CacheList" else None


def streams(caches: Iterable[Any]) -> Iterator[Any]:
    """Every cache that holds tokens or a state itself, in order."""
    for cache in caches:
        inner = inner_caches(cache)
        if inner is None:
            yield cache
        else:
            yield from streams(inner)


def replaced(caches: Iterable[Any], make: Callable[[int, Any], Any]) -> list[Any]:
    """The same caches with each stream exchanged; the nesting stays.

    Args:
        caches: one per layer.
        make: called with the number of a stream and its cache; returns what takes its place.
    """
    numbers = itertools.count()

    def exchange(cache: Any) -> Any:
        inner = inner_caches(cache)
        if inner is None:
            return make(next(numbers), cache)
        twin = copy.copy(cache)
        twin.caches = tuple(exchange(c) for c in inner)
        return twin

    return [exchange(cache) for cache in caches]
