"""Our layer caches as mlx-lm's; the only module that imports mlx-lm's cache classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, cast

import mlx.core as mx
from mlx_lm.models import cache as stock

from pagedkv.cache.nested import stock_kind
from pagedkv.config.tier_config import KEPT_TOKENS
from pagedkv.errors import CacheStateError, ShapeError
from pagedkv.integrations.mlx_vlm_protocol import BatchVLMProtocol, VLMProtocol
from pagedkv.sequence.layer import PagedLayerCache
from pagedkv.sequence.sequence import SequenceContext
from pagedkv.sequence.window import ChunkedLayerCache, WindowedLayerCache
from pagedkv.tiers.turn import exclusive

_AS_PLAIN = {("mlx_vlm.models.hy_v4.cache", "HyV4KVCache")}
"""Classes in models' files that keep what `KVCache` keeps, and allot their arrays otherwise."""

Append = Callable[[mx.array, mx.array], tuple[mx.array, mx.array]]
"""Appends keys and values, and returns all of them."""

Maker = Callable[[SequenceContext, int], PagedLayerCache]
"""Makes the paged cache of a stream: what its sequence's layers share, and its number."""


def _with_values(append: Append, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
    """Append, with a channel of zeros in place of values without any: pages have values.

    An index of keys has such (minimax_m3_vl), and a latent that is key and value in one
    (mlx-vlm's deepseek_v4).
    """
    if values.shape[-1]:
        return append(keys, values)
    keys, nothing = append(keys, mx.zeros((*values.shape[:-1], 1), values.dtype))
    return keys, nothing[..., :0]


class _Sequence(VLMProtocol):
    """What the classes of one sequence have in common."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """See `PagedLayerCache.update_and_fetch`; several rows make an empty cache a batch."""
        if keys.ndim == 4 and keys.shape[0] > 1 and not self._closed:
            self._become_rows(keys.shape[0])
            return self.update_and_fetch(keys, values)  # it has another class now
        return _with_values(super().update_and_fetch, keys, values)

    @property
    def _batch(self) -> type[BatchPagedKVCache]:
        return BatchPagedKVCache

    @exclusive
    def _become_rows(self, count: int) -> None:
        """Become a batch of empty rows, with the other layers.

        In place: the model's call that brings the rows is under way, and it and its caller hold
        these objects.

        Raises:
            ShapeError: if a layer holds tokens.
        """
        context = self._context
        layers = [*context.alive()]
        for layer in layers:
            if layer.offset:
                raise ShapeError(
                    f"{count} rows were given to a cache whose layer {layer.layer} holds one "
                    f"sequence of {layer.offset:,} tokens: make a new cache for them"
                )
        contexts = [context, *(context.fork() for _ in range(count - 1))]
        context.layers = []  # the first row's are there from now on
        rows = [[layer.fork(own) for own in contexts] for layer in layers]
        for layer, its_rows in zip(layers, rows, strict=True):
            layer.close()
            layer.__dict__.clear()
            layer.__class__ = PagedRowsKVCache
            PagedRowsKVCache.__init__(cast("PagedRowsKVCache", layer), its_rows)


class PagedKVCache(_Sequence, stock._BaseCache):  # type: ignore[misc]
    """`PagedLayerCache` for mlx-lm: found by name when a saved cache is loaded."""

    @classmethod
    def merge(cls, caches: Sequence[PagedLayerCache]) -> BatchPagedKVCache:
        """A batch of these caches, for mlx-lm's batch generator and server."""
        return BatchPagedKVCache.merge(caches)


class PagedRotatingKVCache(_Sequence, WindowedLayerCache, stock._BaseCache):  # type: ignore[misc]
    """`WindowedLayerCache` for mlx-lm."""

    @classmethod
    def merge(cls, caches: Sequence[PagedLayerCache]) -> BatchPagedKVCache:
        """See `PagedKVCache.merge`."""
        return BatchPagedKVCache.merge(caches)


class PagedChunkedKVCache(_Sequence, ChunkedLayerCache, stock._BaseCache):  # type: ignore[misc]
    """`ChunkedLayerCache` for mlx-lm; like mlx-lm's it makes no batches."""


class BatchPagedKVCache(BatchVLMProtocol, stock._BaseCache):  # type: ignore[misc]
    """`BatchPagedLayerCache` for mlx-lm."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """See `BatchPagedLayerCache.update_and_fetch`."""
        return _with_values(super().update_and_fetch, keys, values)

    @property
    def state(self) -> _BatchState:
        """The rows' states and kinds; evaluating it touches the hot arrays only."""
        return _BatchState(self)

    @classmethod
    def from_state(cls, state: Any) -> BatchPagedKVCache:
        """A batch from its rows' saved states, each row with its own tiers.

        Raises:
            CacheStateError: if a state is damaged or not ours.
        """
        try:
            states = state["rows"] if isinstance(state, dict) else state  # a list in older files
            rows = [(_ROWS[kind], row) for row, kind in states]
        except (KeyError, TypeError, ValueError) as e:
            raise CacheStateError("this is not the state of a batch of paged caches") from e
        return cls(kind.from_state(row) for kind, row in rows)


class _BatchState(dict[str, Any]):
    """A batch's rows, to be evaluated and saved; and the pair of its keys and values.

    Layers of mlx-vlm's models that share keys (gemma3n, afm7) read that pair as a plain cache's
    state has it.
    """

    def __init__(self, batch: BatchPagedKVCache) -> None:
        super().__init__(rows=[(row.state, type(row).__name__) for row in batch.rows])
        self._batch = batch

    def __getitem__(self, key: str | int) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self._pair[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._pair)

    @cached_property
    def _pair(self) -> tuple[mx.array, mx.array]:
        return self._batch.keys_and_values()


class PagedRowsKVCache(BatchPagedKVCache):
    """Rows of one length, which the model takes for the cache of one sequence.

    That is what mlx-lm's own caches are if a model is called with several rows: there is no
    padding, one position, and one mask for all. Where rows come to differ it is a batch.
    """

    @property
    def _alike(self) -> bool:
        return not self._midway and not any(self._left) and len(set(self._offsets())) == 1

    @property
    def offset(self) -> Any:
        """Tokens that each row has seen."""
        return self.rows[0].offset if self._alike else super().offset

    @offset.setter
    def offset(self, positions: mx.array) -> None:
        self._place(positions)

    def make_mask(self, N: int, **options: Any) -> Any:  # type: ignore[override]
        """The mask of any row; see `PagedLayerCache.make_mask`."""
        if self._alike:
            return self.rows[0].make_mask(N, **options)
        return super().make_mask(N, **options)

    # llama4's chunks: attributes that only rows with chunks have

    @property
    def start_position(self) -> int:
        """See `ChunkedLayerCache.start_position`."""
        row: Any = self.rows[0]
        return int(row.start_position)

    @property
    def maybe_trim_front(self) -> Callable[[], None]:
        """See `ChunkedLayerCache.maybe_trim_front`."""
        rows: list[Any] = self.rows
        each = [row.maybe_trim_front for row in rows]

        def trim() -> None:
            for one in each:
                one()

        return trim


_ROWS: dict[str, type[PagedLayerCache]] = {
    kind.__name__: kind for kind in (PagedKVCache, PagedRotatingKVCache, PagedChunkedKVCache)
}


def paged_kind(cache: Any) -> Maker | None:
    """What makes the cache that takes the place of a stock one; None if it has to stay.

    A kind of stock cache that can be paged has a line here. Lists of caches are taken apart
    before (`cache.nested`). Classes derived from these, wherever they are defined, stay: what
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
    for kind in (*_ROWS.values(), BatchPagedKVCache, PagedRowsKVCache):
        setattr(stock, kind.__name__, kind)
