"""The caches of one layer for several sequences at once, as mlx-lm's batches want them."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from pagedkv.allocator import KVShape
from pagedkv.attn.driver import DECODE_TOKENS, KVView
from pagedkv.attn.stand_in import stand_ins
from pagedkv.cache import sdpa_hook as hook
from pagedkv.cache.batch_layout import (
    BatchLayout,
    BatchMask,
    BatchView,
    Mark,
    RowPlace,
    batch_mask,
    row_masks,
)
from pagedkv.config.window_sizes import SLACK
from pagedkv.errors import CacheStateError, OutOfPagesError, PagedKVError, ShapeError
from pagedkv.sequence.admission import Wish, refused
from pagedkv.sequence.layer import PagedLayerCache
from pagedkv.tiers.turn import Turn, exclusive

if TYPE_CHECKING:
    from typing import Self

IN_FLIGHT = 2
"""Rows of a prefill chunk that are attended at once: each has its pages dequantized."""


class BatchPagedLayerCache:
    """One layer's keys and values of several sequences, each a `PagedLayerCache` of its own.

    Speaks the protocol of mlx-lm's `BatchKVCache`: what the model gives and gets is a rectangle
    with padding. Each row keeps its own tokens alone, in its own tiers, so a row is what it would
    be by itself, and joining, leaving and copying move page numbers, no bytes.
    """

    def __init__(self, rows: Iterable[PagedLayerCache]) -> None:
        """Make a batch.

        Args:
            rows: caches of the same layer, which belong to the batch from now on; see `merge`.
        """
        self._left = list[int]()  # per row, columns of padding to come before its first token
        self._stop: list[int] | None = None  # per row, its length after what is prepared
        self._padding: list[int] | None = None  # per row, padding that is stored until `finalize`
        self._seen = 0  # columns since `prepare`
        self._start = list[int]()  # per row, its length then
        self._last: BatchLayout | None = None  # of the last call
        self._positions: mx.array | None = None
        self._calls = 0  # of the model, that this layer has taken
        self._before: Mark | None = None  # what there was before the last of them
        self._hold(rows)
        self._left = [0] * len(self.rows)

    def _hold(self, rows: Iterable[PagedLayerCache]) -> None:
        """Have these rows and no others."""
        self.rows = list(rows)
        mine = weakref.ref(self)
        for row in self.rows:
            row.batch = mine
        self.reaches_hook = {
            single: _agreed([row.reaches_hook[single] for row in self.rows])
            for single in (False, True)
        }
        self._last = self._positions = self._before = None

    @property
    def _turn(self) -> Turn:
        return self.rows[0]._turn if self.rows else Turn()

    # Appending

    @exclusive
    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append each row's own columns; see `PagedLayerCache.update_and_fetch`.

        Args:
            keys: ``[rows, kv_heads, n, key_dim]``, positions already encoded.
            values: ``[rows, kv_heads, n, value_dim]``.

        Returns:
            Keys and values of the rectangle, as arrays or stand-ins for them.

        Raises:
            OutOfPagesError: if no tier has room for the pages of a row, which `rows` names;
                nothing has changed then.
            ShapeError: if they do not fit the cache.
            CacheStateError: if an earlier call was broken off; see `SequenceContext.begin`.
            ClosedError: if a row is closed.
        """
        self._check(keys, values)
        self._require_whole()
        new = int(keys.shape[2])
        layout, mark = self._layout(new), self._mark()
        if next(self.rows[0].siblings()) is self.rows[0]:
            self._admit(layout)
        shape = KVShape(int(keys.shape[1]), int(keys.shape[3]), int(values.shape[3]))
        self._before = mark
        with self._taken_back_to(mark):
            views = tuple(self._append(i, layout, keys, values) for i in range(len(self.rows)))
            self._seen += new
            self._calls += 1
            self._left = [max(0, n - new) for n in self._left]
            self._last, self._positions = layout, None
            self._chain(views)
            return self._fetched(BatchView(layout, views, shape, mark), keys.dtype)

    def _check(self, keys: mx.array, values: mx.array) -> None:
        rows = len(self.rows)
        if keys.ndim != 4 or values.ndim != 4 or keys.shape[:3] != values.shape[:3]:
            raise ShapeError(
                f"keys {keys.shape} and values {values.shape} are not [rows, kv_heads, n, dim] "
                f"with the same rows, heads and n"
            )
        if not rows or keys.shape[0] != rows or keys.shape[2] == 0:
            raise ShapeError(
                f"this batch has {rows} rows and was given keys of {keys.shape}: expected "
                f"[{rows}, kv_heads, n, dim] with n at least 1"
            )

    def _layout(self, new: int) -> BatchLayout:
        """Where the tokens of the next call are, if it has `new` columns."""
        places = []
        for i, row in enumerate(self.rows):
            first = min(new, self._left[i])
            count = new - first
            if self._stop is not None:
                count = min(count, max(0, self._stop[i] - row.offset))
            places.append(RowPlace(row.carried, first, count))
        return BatchLayout(new, tuple(places))

    def _admit(self, layout: BatchLayout) -> None:
        """Refuse a call whose pages do not fit, before any row of any layer has taken it."""
        wishes = [Wish(row, p.count) for row, p in zip(self.rows, layout.rows, strict=True)]
        if not any(wish.due for wish in wishes):
            return
        problems = refused(wishes)
        if problems:
            row, problem = next(iter(problems.items()))
            error = OutOfPagesError(
                f"out of pages at {self.rows[row].offset:,} tokens of row {row} "
                f"(+{wishes[row].tokens:,}; {len(self.rows)} rows): {problem}; "
                f"raise the warm or cold budget, lower the precision, or serve fewer at once"
            )
            error.rows = tuple(problems)
            raise error

    def _append(
        self, i: int, layout: BatchLayout, keys: mx.array, values: mx.array
    ) -> KVView | None:
        row, place = self.rows[i], layout.rows[i]
        if place.count == 0:
            return None if row.empty() else row.view()
        cut = slice(place.first, place.first + place.count)
        with _naming(i):
            own = keys[i : i + 1, :, cut], values[i : i + 1, :, cut]
            row._context.require_start(row, own[0].shape)
            return row.append(*own)

    def _chain(self, views: Sequence[KVView | None]) -> None:
        """What is read from disk after a row's pages is the next row's, then the next layer's."""
        held = [(row, view) for row, view in zip(self.rows, views, strict=True) if view]
        for (_, view), (after, _) in itertools.pairwise(held):
            view.following = after._cold_batches
        if len(held) > 1:
            held[-1][1].following = held[0][0]._following_batches

    def _fetched(self, view: BatchView, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """What the model gets: tagged, with numbers only where they may be looked at."""
        dtype = next((v.hot.keys.dtype for v in view.views if v is not None), dtype)
        if self.reaches_hook[view.layout.new == 1] and hook.installed():
            return self._stand_ins(view, dtype)
        dense = view.dense(dtype)
        return hook.tag_pair(self, view, *dense) if hook.installed() else dense

    def _stand_ins(self, view: BatchView, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """What the model gets where it is known to do nothing but attend."""

        def dense() -> tuple[mx.array, mx.array]:
            with self._taken_back_to(view.before):
                return view.dense(dtype)

        shape, layer = view.shape, self.rows[0].layer
        form = (shape.kv_heads, view.layout.width, (shape.key_dim, shape.value_dim), dtype)
        return stand_ins(self, layer, view, len(self.rows), *form, dense)

    # Attending

    @exclusive
    def attend_tagged(
        self,
        view: BatchView,
        q: mx.array,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None,
    ) -> mx.array:
        """Attention of each row over its own tokens; zero where a query is padding.

        Args:
            view: what `update_and_fetch` made.
            q: ``[rows, query_heads, L, key_dim]``: the last L columns of the call.
            scale: multiplies the products of queries and keys.
            mask: None, ``"causal"``, what `make_mask` made, or an array that broadcasts to
                ``[rows, query_heads, L, width]``.
            sinks: learned attention sinks, ``[query_heads]``.

        Returns:
            ``[rows, query_heads, L, value_dim]`` in q's type.

        Raises:
            CorruptPageError, ColdStoreError: if a cold page of a row, which `rows` names, cannot
                be read; the tokens of this call are taken back from all rows.
            ShapeError: if the arrays do not fit.
        """
        layout = view.layout
        if q.ndim != 4 or q.shape[0] != len(view.views) or not 0 < q.shape[2] <= layout.new:
            raise ShapeError(
                f"queries {q.shape} do not fit a batch of {len(view.views)} rows and "
                f"{layout.new} new columns"
            )
        if not self.reaches_hook[layout.new == 1]:
            for known in (self.reaches_hook, *(row.reaches_hook for row in self.rows)):
                known[layout.new == 1] = True
        masks = row_masks(mask, view, int(q.shape[2]))
        with self._taken_back_to(view.before):
            outs = self._attend_rows(view, q, scale, masks, sinks)
        for row in self.rows:
            if row._attended:  # none may write into the slabs before all have read them
                row._attended = tuple(outs)
        return outs[0] if len(outs) == 1 else mx.concatenate(outs)

    def _attend_rows(
        self,
        view: BatchView,
        q: mx.array,
        scale: float,
        masks: Sequence[mx.array | str | None],
        sinks: mx.array | None,
    ) -> list[mx.array]:
        length, outs = int(q.shape[2]), list[mx.array]()
        many = list[mx.array]()
        for i, (row, kv) in enumerate(zip(self.rows, view.views, strict=True)):
            first, last = view.layout.queries(i, length)
            if kv is None or first == last:
                outs.append(mx.zeros((1, *q.shape[1:3], view.shape.value_dim), q.dtype))
                continue
            with _naming(i):
                own = q[i : i + 1] if last - first == length else q[i : i + 1, :, first:last]
                out = row.attend_view(kv, own, scale, masks[i], sinks)
            if last - first > DECODE_TOKENS and kv.entries:
                many.append(out)
                if len(many) == IN_FLIGHT:
                    mx.eval(many.pop(0))
            if last - first < length:
                out = mx.pad(out, [(0, 0), (0, 0), (first, length - last), (0, 0)])
            outs.append(out)
        return outs

    # Taking back

    def _mark(self) -> Mark:
        offsets = tuple(row.offset for row in self.rows)
        return Mark(offsets, self._seen, tuple(self._left), self._calls)

    def _back_to(self, mark: Mark) -> None:
        """Be as before the call at whose beginning the mark was made."""
        for row, offset in zip(self.rows, mark.offsets, strict=True):
            row._context.torn |= not row.take_back_to(offset)
        self._seen, self._left, self._calls = mark.seen, list(mark.left), mark.calls
        self._last = self._positions = None

    @contextmanager
    def _taken_back_to(self, mark: Mark) -> Iterator[None]:
        """If anything fails inside, take the call's tokens back, from all rows and layers."""
        try:
            yield
        except BaseException as e:
            if not isinstance(e, PagedKVError):
                self.rows[0]._context.recover()
            for batch in self._siblings():
                batch._back_to(mark)
                if batch is self:
                    break
            raise

    def _require_whole(self) -> None:
        """See that no layer lags behind; see `SequenceContext.begin`.

        Raises:
            CacheStateError: if a call was broken off. Its tokens are taken back from all rows.
        """
        layers = [batch for batch in self._siblings() if batch.rows[0].in_step]
        calls = min((b._calls for b in layers if not b.empty()), default=self._calls)
        if calls >= self._calls:
            return
        for batch in layers:
            if batch._calls > calls and batch._before is not None:
                batch._back_to(batch._before)
        held = ", ".join(f"{row.offset:,}" for row in self.rows)
        raise CacheStateError(
            f"the last call of the model was broken off, and not all layers have its tokens: every "
            f"layer's rows hold {held} tokens now, go on with those that come after them"
        )

    def _siblings(self) -> Iterator[BatchPagedLayerCache]:
        """This batch's layers in model order."""
        for row in self.rows[0].siblings():
            batch = row.batch and row.batch()
            if isinstance(batch, BatchPagedLayerCache) and len(batch.rows) == len(self.rows):
                yield batch

    # Masks and positions

    @property
    def offset(self) -> Any:
        """Each row's position of the next column, int32 ``[rows]``; negative in left padding.

        Models that run the rows of a prompt by themselves set it when they put them together.
        """
        if self._positions is None:
            self._positions = mx.array(self._offsets())
        return self._positions

    @offset.setter
    def offset(self, positions: mx.array) -> None:
        self._place(positions)

    def _place(self, positions: mx.array) -> None:
        """Set `offset`: padding that is still to come is all that may differ.

        Raises:
            ShapeError: if rows hold more or fewer tokens.
        """
        left = [row.offset - n for row, n in zip(self.rows, _listed(positions), strict=True)]
        padded = [n for n, row in zip(left, self.rows, strict=True) if n and row.offset]
        if min(left, default=0) < 0 or padded or self._midway:
            held = [row.offset for row in self.rows]
            raise ShapeError(
                f"the rows hold {held} tokens and cannot be at {_listed(positions)}: a row is at "
                f"its length, or before its first token by the padding to come"
            )
        self._left, self._positions = left, None

    @property
    def _idx(self) -> int:
        """Columns so far, as mlx-vlm asks for them."""
        return max(0, *self._offsets()) if self.rows else 0

    @property
    def left_padding(self) -> npt.NDArray[np.int32]:
        """Per row, the column of its first token in what the last call returned, int32 ``[rows]``.

        Padding that is still to come counts. No array of mlx: with one, models of mlx-vlm go
        through keys row by row, where attention over the rows' own tokens is right and less work.
        """
        layout = self._last or self._layout(0)
        starts = [layout.start(i) + left for i, left in enumerate(self._left)]
        return np.array(starts, np.int32)

    @left_padding.setter
    def left_padding(self, columns: Any) -> None:
        here, given = self.left_padding.tolist(), _listed(columns)
        if here != given:
            raise ShapeError(
                f"the rows begin at columns {here}, which follows from their lengths, and cannot "
                f"be moved to {given}"
            )

    def _offsets(self) -> list[int]:
        """While padding is being read, positions count it, as the model's columns do."""
        if self._stop is None:
            return [row.offset - n for row, n in zip(self.rows, self._left, strict=True)]
        return [start + self._seen for start in self._start]

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> BatchMask:
        """The causal mask for N new columns.

        Returns:
            Bool ``[rows, 1, N, width]`` and lazy; it knows the rows' own masks.
        """
        layout = self._layout(N)
        masks = [
            row.make_mask(place.count, window_size=window_size) if place.count else None
            for row, place in zip(self.rows, layout.rows, strict=True)
        ]
        return batch_mask(layout, masks)

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """All keys and values, dense, in the columns of the last call."""
        views = tuple(None if row.empty() else row.view() for row in self.rows)
        some = next((view for view in views if view is not None), None)
        shape = next((row.shape for row in self.rows if row.shape is not None), None)
        if some is None or shape is None:
            raise ShapeError("the batch is empty: it has no keys and values yet")
        layout = self._last or self._layout(0)
        return BatchView(layout, views, shape, self._mark()).dense(some.hot.keys.dtype)

    @property
    def keys(self) -> mx.array | None:
        """What depends on all rows' hot keys, and has no numbers; None before the first token.

        Models make it depend on other arrays (`mx.depends`), an index's or what they send to other
        processes, so that those are evaluated with the rows, and set it.
        """
        return self._standing_for([row.keys for row in self.rows])

    @keys.setter
    def keys(self, array: mx.array) -> None:
        for row in self.rows:
            if row.keys is not None:
                row.keys = mx.depends(row.keys, array)

    @property
    def values(self) -> mx.array | None:
        """The same for values; a model that needs none sets zeros, and they stay."""
        return self._standing_for([row.values for row in self.rows])

    @values.setter
    def values(self, array: mx.array) -> None:
        for row in self.rows:
            if row.values is not None:
                row.values = mx.depends(row.values, array)

    @staticmethod
    def _standing_for(arrays: Sequence[mx.array | None]) -> mx.array | None:
        there = [array for array in arrays if array is not None]
        # One axis: whoever takes it for keys cannot index it.
        return mx.depends(mx.zeros((0,), there[0].dtype), there) if there else None

    # Batches

    @classmethod
    def merge(cls, caches: Sequence[PagedLayerCache]) -> Self:
        """A batch of copies of these caches: page numbers are copied, no pages.

        Args:
            caches: of one layer, one per sequence; they stay as they are.
        """
        for cache in caches:
            if not isinstance(cache, PagedLayerCache):
                raise ShapeError(
                    f"a {type(cache).__name__} cannot join a batch of paged caches: make the "
                    f"caches of all sequences with the wrapped model"
                )
        return cls(_twin(cache) for cache in caches)

    def prepare(
        self,
        *,
        left_padding: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        """Say where the padding of the next calls is.

        Args:
            left_padding: per row, columns before its first token; for rows that are empty.
            lengths: per row, how many of the columns to come are its tokens.
            right_padding: per row, the columns after them, up to `finalize`.

        Raises:
            ValueError: if there is left padding and the batch is not empty.
            ShapeError: if these are not as many numbers as there are rows.
        """
        for given in (left_padding, lengths, right_padding):
            if given is not None and len(given) != len(self.rows):
                raise ShapeError(f"padding of {len(given)} rows for a batch of {len(self.rows)}")
        if left_padding is not None:
            if any(row.offset for row in self.rows):
                raise ShapeError("only an empty batch can be padded on the left")
            self._left = [n + int(m) for n, m in zip(self._left, left_padding, strict=True)]
        if right_padding is not None and max(right_padding) > 0:
            self._start, self._seen = self._offsets(), 0
            if lengths is not None:
                offsets = [row.offset for row in self.rows]
                self._stop = [n + int(m) for n, m in zip(offsets, lengths, strict=True)]
            else:
                self._padding = [int(n) for n in right_padding]
        self._positions = None

    def finalize(self) -> None:
        """The padded columns are over: what comes next follows each row's last token.

        Raises:
            CacheStateError: if the padding was stored, and a row cannot forget it.
        """
        if self._padding is not None:
            self._trim_rows(self._padding)
        self._stop = self._padding = None
        self._last = self._positions = None

    def filter(self, batch_indices: Any) -> None:
        """Keep these rows, in this order; the others give their pages back.

        Args:
            batch_indices: row numbers; one that comes twice is copied.
        """
        keep = _listed(batch_indices)
        taken = set[int]()
        rows = list[PagedLayerCache]()
        for i in keep:
            row = self.rows[i]
            rows.append(_twin(row) if id(row) in taken else row)
            taken.add(id(row))
        self._left = [self._left[i] for i in keep]
        if self._stop is not None:
            self._stop = [self._stop[i] for i in keep]
            self._start = [self._start[i] for i in keep]
        if self._padding is not None:
            self._padding = [self._padding[i] for i in keep]
        self._hold(rows)

    def extend(self, other: BatchPagedLayerCache) -> None:
        """Add copies of another batch's rows behind these; it stays as it is.

        Raises:
            ShapeError: if either is in the middle of a padded prompt.
        """
        if self._midway or other._midway:
            raise ShapeError("batches are joined between prompts: call finalize() first")
        self._left += other._left
        self._hold([*self.rows, *(_twin(row) for row in other.rows)])

    @property
    def _midway(self) -> bool:
        return self._stop is not None or self._padding is not None

    def extract(self, idx: int) -> PagedLayerCache:
        """One row as a cache of its own; the batch keeps it too. No page is copied."""
        return _twin(self.rows[idx])

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = type(self)(copy.deepcopy(row, memo) for row in self.rows)
        twin._left, twin._start, twin._seen = list(self._left), list(self._start), self._seen
        twin._stop = None if self._stop is None else list(self._stop)
        twin._padding = None if self._padding is None else list(self._padding)
        return twin

    # The rest of mlx-lm's protocol

    def size(self) -> int:
        """Tokens of the longest row."""
        return max((row.size() for row in self.rows), default=0)

    def empty(self) -> bool:
        """Whether no row holds a token, or knows of padding before its first one."""
        return all(row.empty() for row in self.rows) and not any(self._left)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows' tokens at their stored size; what rows share counts for each."""
        return sum(row.nbytes for row in self.rows)

    def is_trimmable(self) -> bool:
        """Whether tokens can be taken off the end of every row."""
        return all(row.is_trimmable() for row in self.rows)

    def can_trim(self, n: int) -> bool:
        """Whether every row can forget its last n tokens."""
        return all(row.can_trim(n) for row in self.rows)

    def trim(self, n: int) -> int:
        """Forget the last n tokens of every row; a shorter row is empty then.

        Returns:
            The tokens forgotten by the longest row.

        Raises:
            CacheStateError: if a row cannot forget so many; nothing has changed then.
        """
        return self._trim_rows([n] * len(self.rows))

    @exclusive
    def _trim_rows(self, counts: Sequence[int]) -> int:
        """Forget so many of each row's last tokens: all of it, or nothing and an error.

        Who trims a batch looks at `is_trimmable`, if at anything, and goes on.
        """
        mine = [row.offset for row in self.rows]
        # Layers are trimmed one by one: the first one speaks for those that come after it.
        for batch in (self, *self._siblings()):
            if [row.offset for row in batch.rows] == mine:
                batch._require_trimmable(counts)
        self._last = self._positions = None
        return max((row.trim(n) for row, n in zip(self.rows, counts, strict=True)), default=0)

    def _require_trimmable(self, counts: Sequence[int]) -> None:
        for i, (row, n) in enumerate(zip(self.rows, counts, strict=True)):
            if not row.can_trim(n):
                error = CacheStateError(
                    f"layer {row.layer}: row {i} of {row.offset:,} tokens cannot forget the last "
                    f"{n:,}: what they saw is behind its window; take back at most {SLACK} or the "
                    f"whole last call, or go on with what extract({i}) gave before it"
                )
                error.rows = (i,)
                raise error

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> Self:
        """Itself: pages have their own precision."""
        return self

    def close(self) -> None:
        """Release the rows' pages and memory."""
        for row in self.rows:
            row.close()

    @property
    def state(self) -> Any:
        """The rows' states; evaluating it touches the hot arrays only."""
        return [row.state for row in self.rows]


def _twin(row: PagedLayerCache) -> PagedLayerCache:
    """A copy that shares every page, and its sequence with the copies of the other layers."""
    return row.fork(row._context.fork_for(row))


def _agreed(known: Sequence[bool | None]) -> bool | None:
    """What all rows know; None if one does not, False if one knows better."""
    if False in known:
        return False
    return None if None in known or not known else True


def _listed(indices: Any) -> list[int]:
    return [int(i) for i in (np.asarray(indices) if isinstance(indices, mx.array) else indices)]


@contextmanager
def _naming(row: int) -> Iterator[None]:
    """Let errors say which row they come from."""
    try:
        yield
    except PagedKVError as e:
        e.rows = (row,)
        raise
