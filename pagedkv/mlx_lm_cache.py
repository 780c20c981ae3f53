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
from pagedkv.window import ChunkedLayerCache, WindowedLayerCache

_STOCK = (stock.__name__, "mlx_vlm.models.cache")
"""mlx-vlm has caches of its own, under the same names and with the same protocol."""

Maker = Callable[[SequenceContext, int], PagedLayerCache]
"""Makes the paged cache of a stream: what its sequence's layers share, and its number."""


class PagedKVCache(PagedLayerCache, stock._BaseCache):  # type: ignore[misc]
    """`PagedLayerCache` for mlx-lm: found by name when a saved cache is loaded."""

    @classmethod
    def merge(cls, caches: Sequence[PagedLayerCache]) -> BatchPagedKVCache:
        """A batch of these caches, for mlx-lm's batch generator and server."""
        return BatchPagedKVCache.merge(caches)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """See `PagedLayerCache.update_and_fetch`.

        An index of keys (minimax_m3_vl) has values without channels. Pages have values, so one
        channel of zeros is kept in their place.
        """
        if values.shape[-1]:
            return super().update_and_fetch(keys, values)
        nothing = mx.zeros((*values.shape[:-1], 1), values.dtype)
        keys, nothing = super().update_and_fetch(keys, nothing)
        return keys, nothing[..., :0]


class PagedRotatingKVCache(WindowedLayerCache, stock._BaseCache):  # type: ignore[misc]
    """`WindowedLayerCache` for mlx-lm."""

    @classmethod
    def merge(cls, caches: Sequence[PagedLayerCache]) -> BatchPagedKVCache:
        """See `PagedKVCache.merge`."""
        return BatchPagedKVCache.merge(caches)


class PagedChunkedKVCache(ChunkedLayerCache, stock._BaseCache):  # type: ignore[misc]
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
    before (`pagedkv.streams`).

    Args:
        cache: a layer's stock cache, still empty.
    """
    kind = type(cache).__name__ if type(cache).__module__ in _STOCK else ""
    if kind == "KVCache":
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
