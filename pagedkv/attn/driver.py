"""Exact attention over hot, warm and cold keys in one softmax."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx

from pagedkv.allocator import TableEntry
from pagedkv.attn.backends import (
    Backend,
    KernelBackend,
    Partial,
    choose_backend,
    dense_partial,
    page_partial,
    sink_partial,
)
from pagedkv.errors import ShapeError
from pagedkv.tiers import HotTokens, LayerPager, Run, Treatment
from pagedkv.tiers.cold.prefetch import Batch

stock_attention: Callable[..., mx.array] = mx.fast.scaled_dot_product_attention
"""MLX's own attention, kept from before the dispatcher takes its place."""

_hot_attention = stock_attention


def set_hot_attention(attention: Callable[..., mx.array]) -> None:
    """Say what attends while no token is in a page: what a model would call without us."""
    global _hot_attention
    _hot_attention = attention


DECODE_TOKENS = 8
"""Up to this many query tokens pages are attended one run at a time, above it dequantized."""

SCORE_BYTES = 64 * 2**20
"""Memory for the float32 scores of one tile."""


@dataclass(eq=False)
class KVView:
    """The keys and values of one layer at one moment, as attention sees them; never changed.

    In token order: the sinks (first `sinks` tokens of the hot arrays), the pages, the rest of the
    hot arrays. Tokens behind a sliding window may still be there: no query sees those, and they
    are not counted.

    Attributes:
        pager: the layer's pages.
        entries: the pages of this sequence, oldest first.
        hot: the hot tokens.
        sinks: how many of the hot tokens come before the pages.
        paged_tokens: tokens in the pages.
        hidden: tokens behind the window: the first ones of the pages, and fewer than those have;
            where there are no pages, the first ones behind the sinks.
        following: the next layer's pages, to be read ahead.
    """

    pager: LayerPager | None
    entries: tuple[TableEntry, ...]
    hot: HotTokens
    sinks: int
    paged_tokens: int = 0
    following: Callable[[], Sequence[Batch]] = tuple
    hidden: int = 0

    @cached_property
    def keys(self) -> mx.array:
        """Hot keys ``[1, kv_heads, hot, key_dim]``."""
        return self._visible_hot(self.hot.keys)

    @cached_property
    def values(self) -> mx.array:
        """Hot values ``[1, kv_heads, hot, value_dim]``."""
        return self._visible_hot(self.hot.values)

    def _visible_hot(self, x: mx.array) -> mx.array:
        if not self.hidden or self.entries:
            return x[:, :, : self.hot.used]
        return without(x[:, :, : self.hot.used], self.sinks, self.hidden)

    @property
    def tokens(self) -> int:
        """Tokens in all that a query may see."""
        return self.paged_tokens + self.hot.used - self.hidden

    @property
    def paged_visible(self) -> int:
        """Of them, those in pages."""
        return self.paged_tokens - self.hidden if self.entries else 0

    def hidden_in(self, entries: Sequence[TableEntry], before: int) -> list[int]:
        """How many tokens at the beginning of each of these pages are behind the window.

        Args:
            entries: consecutive pages.
            before: tokens of the pages before them, hidden ones included.
        """
        first = []
        for entry in entries:
            first.append(min(max(0, self.hidden - before), entry.tokens))
            before += entry.tokens
        return first

    def runs(self) -> Iterator[tuple[Run, mx.array, bool]]:
        """The page records, run by run; see `LayerPager.records`."""
        assert self.pager is not None
        return self.pager.records(self.pager.runs(self.entries), self.following())

    def dense(self, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """All keys and values in token order, dequantized.

        Returns:
            ``[1, kv_heads, tokens, key_dim]`` and ``[1, kv_heads, tokens, value_dim]``.
        """
        if not self.entries:
            return self.keys, self.values
        heads, key_dim, value_dim = self.keys.shape[1], self.keys.shape[3], self.values.shape[3]
        keys = mx.zeros((1, heads, self.tokens, key_dim), dtype)
        values = mx.zeros((1, heads, self.tokens, value_dim), dtype)
        at = 0
        # Each update is donated, so memory is the result and one run, not twice the result.
        for part_keys, part_values, cold in self._parts(dtype):
            if not part_keys.shape[2]:
                continue
            start = mx.array([at])
            keys = mx.slice_update(keys, part_keys, start, [2])
            values = mx.slice_update(values, part_values, start, [2])
            at += int(part_keys.shape[2])
            if cold:
                mx.eval(keys, values)
        return keys, values

    def _parts(self, dtype: mx.Dtype) -> Iterator[tuple[mx.array, mx.array, bool]]:
        """Keys and values in token order, piece by piece, and whether a piece was cold."""
        yield *self._hot(0, self.sinks, dtype), False
        before = 0
        for run, records, cold in self.runs():
            yield *self._decode(run, records, before, dtype), cold
            before += run.tokens
        yield *self._hot(self.sinks, int(self.keys.shape[2]), dtype), False

    def _hot(self, start: int, stop: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        hot_keys, hot_values = self.keys[:, :, start:stop], self.values[:, :, start:stop]
        return hot_keys.astype(dtype), hot_values.astype(dtype)

    def _decode(
        self, run: Run, records: mx.array, before: int, dtype: mx.Dtype
    ) -> tuple[mx.array, mx.array]:
        """A run's visible tokens as ``[1, kv_heads, n, dim]`` keys and values.

        `before` counts the tokens of the pages before them, hidden ones included.
        """
        assert self.pager is not None
        codec = self.pager.codecs[run.precision]
        keys = codec.keys(records, dtype).transpose(1, 0, 3, 2)
        values = codec.values(records, dtype).transpose(1, 0, 2, 3)
        first = self.hidden_in(run.entries, before)
        full = not any(first) and all(e.tokens == self.pager.page_tokens for e in run.entries)

        def join(x: mx.array) -> mx.array:
            if full:
                return x.reshape(1, x.shape[0], -1, x.shape[3])
            pieces = zip(run.entries, first, strict=True)
            valid = [x[:, i, start : e.tokens] for i, (e, start) in enumerate(pieces)]
            return mx.concatenate(valid, axis=1)[None]

        return join(keys), join(values)


def attend(
    view: KVView,
    q: mx.array,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
    backend: Backend | None = None,
    scratch_bytes: int = 256 * 2**20,
) -> mx.array:
    """Softmax attention of `q` over everything in `view`.

    Args:
        view: the cache, the new tokens included.
        q: ``[1, query_heads, L, key_dim]``; query head h reads KV head ``h // (query_heads /
            kv_heads)``. The queries are the last L tokens of the view.
        scale: multiplies the products of queries and keys.
        mask: None, ``"causal"``, or an array that broadcasts to ``[1, query_heads, L, tokens]``:
            bool (True attends) or added to the scores.
        sinks: learned attention sinks of the model, ``[query_heads]``.
        backend: how to multiply with pages; chosen for the device if None.
        scratch_bytes: memory for dequantized keys and values when there are many queries.

    Returns:
        ``[1, query_heads, L, value_dim]`` in q's type.

    Raises:
        ShapeError: if the query or mask does not fit.
        CorruptPageError, ColdStoreError: if a cold page cannot be read.
    """
    length = q.shape[2]
    if (
        isinstance(backend, KernelBackend)
        and view.entries
        and length <= DECODE_TOKENS
        and not isinstance(mask, mx.array)
    ):
        assert view.pager is not None
        out = backend.fused.attend(
            view.pager,
            view.entries,
            view.hot,
            q,
            scale,
            mask == "causal",
            sinks,
            lambda: check_view(view, q, mask, sinks),
            view.following,
            view.hidden,
        )
        if out is not None:
            return out
    check_view(view, q, mask, sinks)
    if not view.entries:
        return _hot_attention(q, view.keys, view.values, scale=scale, mask=mask, sinks=sinks)
    backend = backend or choose_backend("auto")
    # MLX's 16-bit products are slow on the CPU, ours widen to float32: tiles win there.
    on_gpu = mx.default_device() == mx.gpu or isinstance(backend, KernelBackend)
    slow_dense = q.dtype != mx.float32 and not on_gpu
    if length > DECODE_TOKENS and not slow_dense:
        per_token = view.hot.keys.shape[1] * (view.hot.keys.shape[3] + view.hot.values.shape[3])
        if view.tokens * per_token * q.dtype.size <= scratch_bytes:
            keys, values, treatment = _dense(view, q.dtype, backend)
            if treatment is None:
                return stock_attention(q, keys, values, scale=scale, mask=mask, sinks=sinks)
            treated = _rows(q, view, treatment.page_queries).astype(q.dtype)
            out = stock_attention(treated, keys, values, scale=scale, mask=mask, sinks=sinks)
            return _rows(out, view, treatment.own_values).astype(q.dtype)
    return _Tiles(view, q, scale, mask, backend).attend(sinks)


def _rows(x: mx.array, view: KVView, change: Callable[[mx.array], mx.array]) -> mx.array:
    """Queries or outputs ``[1, query_heads, L, dim]``, changed as rows of their KV heads."""
    heads = view.hot.keys.shape[1]
    return change(x.reshape(heads, -1, x.shape[3])).reshape(*x.shape[:3], -1)


def _dense(
    view: KVView, dtype: mx.Dtype, backend: Backend
) -> tuple[mx.array, mx.array, Treatment | None]:
    """All keys and values of the view, by a kernel where there is one.

    Returns:
        Keys, values, and how they are treated: a kernel leaves them as pages hold them.
    """
    if isinstance(backend, KernelBackend):
        assert view.pager is not None
        dense = backend.fused.expand(view.pager, view.entries, view.hot, view.sinks, dtype)
        if dense is not None:
            keys, values = (without(x, view.sinks, view.hidden) for x in dense)
            return keys, values, view.pager.treatment
    return (*view.dense(dtype), None)


def without(x: mx.array, start: int, count: int) -> mx.array:
    """An array ``[1, kv_heads, tokens, dim]`` without `count` tokens from `start` on, lazily."""
    if not count:
        return x
    rest = x[:, :, start + count :]
    return mx.concatenate([x[:, :, :start], rest], axis=2) if start else rest


def check_queries(
    q: mx.array,
    kv_heads: int,
    key_dim: int,
    tokens: int,
    mask: mx.array | str | None,
    sinks: mx.array | None,
) -> None:
    """Check queries, mask and sinks against a layer's keys.

    Raises:
        ShapeError: saying what was given and what would fit.
    """
    if q.ndim != 4 or q.shape[0] != 1 or q.shape[3] != key_dim or q.shape[1] % kv_heads:
        raise ShapeError(
            f"queries {q.shape} do not fit a cache of {kv_heads} KV heads of {key_dim} channels: "
            f"expected [1, a multiple of {kv_heads}, L, {key_dim}]"
        )
    if not 0 < q.shape[2] <= tokens:
        raise ShapeError(f"{q.shape[2]} query tokens were given for {tokens} new ones")
    if isinstance(mask, str) and mask != "causal":
        raise ShapeError(f"mask is None, 'causal' or an array, got {mask!r}")
    if sinks is not None and sinks.size != q.shape[1]:
        raise ShapeError(f"{sinks.size} attention sinks were given for {q.shape[1]} query heads")


def check_view(
    view: KVView, q: mx.array, mask: mx.array | str | None, sinks: mx.array | None
) -> None:
    """Check queries, mask and sinks against everything a view holds.

    Raises:
        ShapeError: see `check_queries`; or if the mask does not broadcast.
    """
    heads, key_dim = int(view.hot.keys.shape[1]), int(view.hot.keys.shape[3])
    check_queries(q, heads, key_dim, view.tokens, mask, sinks)
    if isinstance(mask, mx.array):
        wanted = (1, int(q.shape[1]), int(q.shape[2]), view.tokens)
        pairs = zip(reversed(mask.shape), reversed(wanted), strict=False)
        if mask.ndim > 4 or any(have not in (1, want) for have, want in pairs):
            raise ShapeError(f"mask {mask.shape} does not broadcast to {list(wanted)}")


class _Tiles:
    """Attention as merged partials: tiles of queries by runs of pages, then the hot tokens."""

    def __init__(
        self,
        view: KVView,
        q: mx.array,
        scale: float,
        mask: mx.array | str | None,
        backend: Backend,
    ) -> None:
        assert view.pager is not None
        self._view, self._pager, self._backend = view, view.pager, backend
        self._q = q
        self._heads = int(view.keys.shape[1])
        self._repeats = int(q.shape[1]) // self._heads
        self._length = int(q.shape[2])
        self._scaled = q.astype(mx.float32) * scale
        self._mask = mask if isinstance(mask, str) or mask is None else self._additive(mask)

    def _additive(self, mask: mx.array) -> mx.array:
        """The mask in float32, added to scores, ``[query_heads or 1, L or 1, tokens]``."""
        if mask.dtype == mx.bool_:
            mask = mx.where(mask, mx.array(0.0), mx.array(-mx.inf))
        mask = mask.astype(mx.float32)
        while mask.ndim < 3:
            mask = mask[None]
        return mask.reshape(mask.shape[-3:])

    def attend(self, sinks: mx.array | None) -> mx.array:
        """Merge everything; the order depends on logical positions only, never on tiers."""
        value_dim = int(self._view.values.shape[3])
        tiles = self._query_tiles()
        parts: list[Partial | None] = [None] * len(tiles)
        if sinks is not None:
            parts = [
                sink_partial(sinks, self._heads, stop - start, value_dim) for start, stop in tiles
            ]
        before = 0
        behind: tuple[mx.array, ...] = ()
        for run, records, cold in self._view.runs():
            codec = self._pager.codecs[run.precision]
            there = self._there(run, before)
            for i, (start, stop) in enumerate(tiles):
                mask = self._run_mask(run, before, there, start, stop)
                q = self._rows(start, stop)
                part = page_partial(self._backend, q, codec, records, mask, there)
                parts[i] = merged = _merge(parts[i], part)
                if self._length > DECODE_TOKENS:
                    mx.eval(*merged)  # the scores' memory is reused by the next tile
                elif cold:  # two runs' pages are in memory: one is attended, one is copied
                    mx.async_eval(*merged)  # type: ignore[no-untyped-call]
                    mx.eval(*behind)
                    behind = merged
            before += run.tokens
        done = []
        for i, (start, stop) in enumerate(tiles):
            hot = dense_partial(
                self._rows(start, stop),
                self._view.keys[0],
                self._view.values[0],
                self._hot_mask(start, stop),
            )
            out = _merge(parts[i], hot).finish()
            done.append(out.reshape(1, self._heads * self._repeats, stop - start, value_dim))
            if len(tiles) > 1:
                mx.eval(done[-1])
        out = done[0] if len(done) == 1 else mx.concatenate(done, axis=2)
        return out.astype(self._q.dtype)

    def _query_tiles(self) -> list[tuple[int, int]]:
        """Query tokens in tiles whose scores over one run, or the hot tokens, fit the memory."""
        keys = max(self._pager.run_tokens, int(self._view.keys.shape[2]))
        per_token = 4 * self._heads * self._repeats * keys
        step = max(DECODE_TOKENS, SCORE_BYTES // per_token)
        return [(i, min(i + step, self._length)) for i in range(0, self._length, step)]

    def _rows(self, start: int, stop: int) -> mx.array:
        """Queries as ``[kv_heads, repeats * L, key_dim]``."""
        return self._scaled[0, :, start:stop].reshape(self._heads, -1, self._q.shape[3])

    def _there(self, run: Run, before: int) -> mx.array | None:
        """Tokens of a run's pages that are valid and not behind the window.

        Args:
            run: of pages.
            before: tokens of the pages before them, hidden ones included.

        Returns:
            bool ``[pages, tokens]``; None if all are.
        """
        tokens = self._pager.page_tokens
        hidden = self._view.hidden_in(run.entries, before)
        if not any(hidden) and all(e.tokens == tokens for e in run.entries):
            return None
        place = mx.arange(tokens)
        valid = mx.array([e.tokens for e in run.entries])[:, None] > place
        return valid & (place >= mx.array(hidden)[:, None])

    def _run_mask(
        self, run: Run, before: int, there: mx.array | None, start: int, stop: int
    ) -> mx.array | None:
        """Added to the scores of a run: the caller's mask, and minus infinity elsewhere.

        That is past valid tokens, and behind the window. Pages are older than every query, so a
        causal mask leaves the rest visible. `before` counts the tokens of the pages before the
        run's, hidden ones included.
        """
        tokens = self._pager.page_tokens
        hidden = self._view.hidden_in(run.entries, before)
        if isinstance(self._mask, mx.array):
            columns, at = [], self._view.sinks + max(0, before - self._view.hidden)
            for entry, first in zip(run.entries, hidden, strict=True):
                column = self._mask_rows(start, stop, slice(at, at + entry.tokens - first))
                gap = (first, tokens - entry.tokens)
                columns.append(mx.pad(column, [(0, 0), (0, 0), gap], constant_values=-mx.inf))
                at += entry.tokens - first
            return mx.stack(columns)
        if there is not None:
            return mx.where(there, mx.array(0.0), mx.array(-mx.inf))[:, None, None, :]
        return None

    def _hot_mask(self, start: int, stop: int) -> mx.array | None:
        hot = int(self._view.keys.shape[2])
        if isinstance(self._mask, mx.array):
            after = self._view.sinks + self._view.paged_visible
            return mx.concatenate(
                [
                    self._mask_rows(start, stop, slice(0, self._view.sinks)),
                    self._mask_rows(start, stop, slice(after, self._view.tokens)),
                ],
                axis=2,
            )
        if self._mask == "causal" and self._length > 1:
            position = mx.arange(start, stop)[:, None] + (hot - self._length)
            visible = position >= mx.arange(hot)
            added = mx.where(visible, mx.array(0.0), mx.array(-mx.inf))
            return mx.tile(added, (self._repeats, 1))[None]
        return None

    def _mask_rows(self, start: int, stop: int, columns: slice) -> mx.array:
        """The caller's mask for some queries and tokens as ``[kv_heads, repeats * L, n]``."""
        assert isinstance(self._mask, mx.array)
        heads = self._heads * self._repeats
        full = mx.broadcast_to(self._mask, (heads, self._length, self._view.tokens))
        return full[:, start:stop, columns].reshape(self._heads, self._repeats * (stop - start), -1)


def _merge(first: Partial | None, second: Partial) -> Partial:
    return second if first is None else first.merge(second)
