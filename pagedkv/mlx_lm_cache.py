"""Our layer caches as mlx-lm's; the only module that imports mlx-lm's cache classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as stock

from pagedkv.batch import BatchPagedLayerCache
from pagedkv.config import KEPT_TOKENS
from pagedkv.context import SequenceContext
from pagedkv.errors import CacheStateError
from pagedkv.layer import PagedLayerCache
from pagedkv.streams import stock_kind
from pagedkv.window import ChunkedLayerCache, WindowedLayerCache

_AS_PLAIN = {("mlx_vlm.models.hy_v4.cache", "HyV4KVCache")}
"""Classes in models' files that keep what `KVCache` keeps, and allot their arrays otherwise."""

Maker = Callable[[SequenceContext, int], PagedLayerCache]
"""Makes the paged cache of a stream: what its sequence's layers share, and its number."""


class _MayLackValues(PagedLayerCache):
    """Takes values without channels: pages have values, so one of zeros is kept in their place.

    An index of keys has such (minimax_m3_vl), and a latent that is key and value in one
    (mlx-vlm's deepseek_v4).
    """

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """See `PagedLayerCache.update_and_fetch`."""
        if values.shape[-1]:
            return super().update_and_fetch(keys, values)
        nothing = mx.zeros((*values.shape[:-1], 1), values.dtype)
        keys, nothing = super().update_and_fetch(keys, nothing)
        return keys, nothing[..., :0]


class PagedKVCache(_MayLackValues, stock._BaseCache):  # type: ignore[misc]
    """`PagedLayerCache` for mlx-lm: found by name when a saved cache is loaded."""

    @classmethod
    def merge(cls, caches: Sequence[PagedLayerCache]) -> BatchPagedKVCache:
        """A batch of these caches, for mlx-lm's batch generator and server."""
        return BatchPagedKVCache.merge(caches)


class PagedRotatingKVCache(_MayLackValues, WindowedLayerCache, stock._BaseCache):  # type: ignore[misc]
    """`WindowedLayerCache` for mlx-lm."""

    @classmethod
    def merge(cls, caches: Sequence[PagedLayerCache]) -> BatchPagedKVCache:
        """See `PagedKVCache.merge`."""
        return BatchPagedKVCache.merge(caches)


class PagedChunkedKVCache(_MayLackValues, ChunkedLayerCache, stock._BaseCache):  # type: ignore[misc]
    """`ChunkedLayerCache` for mlx-lm; like mlx-lm's it makes no batches."""


class BatchPagedKVCache(BatchPagedLayerCache, stock._BaseCache):  # type: ignore[misc]
    """`BatchPagedLayerCache` for mlx-lm."""

    @property
    def state(self) -> Any:
        """The rows' states and kinds; evaluating it touches the hot arrays only."""
        return [(row.state, type(row).__name__) for row in self.rows]

    @classmethod
    def from_state(cls, state: Any) -> BatchPagedKVCache:
        """A batch from its rows' saved states, each row with its own tiers.

        Raises:
            CacheStateError: if a state is damaged or not ours.
        """
        try:
            rows = [(_ROWS[kind], row) for row, kind in state]
        except (KeyError, TypeError, ValueError) as e:
            raise CacheStateError("this is not the state of a batch of paged caches") from e
        return cls(kind.from_state(row) for kind, row in rows)


_ROWS: dict[str, type[PagedLayerCache]] = {
    kind.__name__: kind for kind in (PagedKVCache, PagedRotatingKVCache, PagedChunkedKVCache)
}


def paged_kind(cache: Any) -> Maker | None:
    """What makes the cache that takes the place of a stock one; None if it has to stay.

    A kind of stock cache that can be paged has a line here. Lists of caches are taken apart
    before (`pagedkv.streams`). Classes derived from these, wherever they are defined, stay: what
    they hold beside keys and values, and what their methods do with it, we do not know.

    Args:
        cache: a layer's stock cache, still empty.
    """
    kind = stock_kind(cache)
    if kind == "KVCache" or (type(cache).__module__, type(cache).__name__) in _AS_PLAIN:
        return _plain
    if kind == "RotatingKVCache":
        return lambda context, number: PagedRotatingKVCache(
            context, number, cache.max_size, cache.keep
        )
    if kind == "ChunkedKVCache":
        return lambda context, number: PagedChunkedKVCache(context, number, cache.chunk_size)
    return None


def keeps_all(cache: Any) -> bool:
    """Whether what takes the place of a stock cache has no window of the layer's own."""
    return paged_kind(cache) is _plain


def _plain(context: SequenceContext, number: int) -> PagedLayerCache:
    """In place of a cache without a window: one with, if the user wants it bounded."""
    if (limit := context.config.max_kv_size) is not None:
        return PagedRotatingKVCache(context, number, limit, KEPT_TOKENS)
    return PagedKVCache(context, number)


def register() -> None:
    """Let mlx-lm's `load_prompt_cache` find the classes; it looks names up in its own module."""
    for kind in (*_ROWS.values(), BatchPagedKVCache):
        setattr(stock, kind.__name__, kind)
