"""Which columns of a batched call are whose tokens, and the masks that go with them.

mlx-lm gives a batch of sequences as a rectangle: short rows are padded. Nothing of the padding is
stored here; this is the map between the rectangle and the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from pagedkv.allocator import KVShape
from pagedkv.attn.driver import KVView
from pagedkv.errors import ShapeError

Mask = mx.array | str | None


@dataclass(frozen=True)
class RowPlace:
    """Which of a call's new columns are a row's.

    Attributes:
        held: tokens that the row had before.
        first: new columns before its first one: padding.
        count: new columns that are its tokens; those after them are padding too.
    """

    held: int
    first: int
    count: int


@dataclass(frozen=True)
class BatchLayout:
    """The rectangle of one call.

    Its columns are those that mlx-lm's batch cache would have: every row's new columns come last,
    and what a row held ends where they begin.

    Attributes:
        new: columns that the call adds.
        rows: what each row has of them.
    """

    new: int
    rows: tuple[RowPlace, ...]

    @property
    def width(self) -> int:
        """Columns in all."""
        return max(row.held for row in self.rows) + self.new

    def end(self, row: int) -> int:
        """The column after a row's last token."""
        place = self.rows[row]
        return self.width - self.new + place.first + place.count

    def start(self, row: int) -> int:
        """The column of a row's first token."""
        return self.width - self.new + self.rows[row].first - self.rows[row].held

    def queries(self, row: int, length: int) -> tuple[int, int]:
        """A row's query tokens among the `length` last columns: the first, and after the last."""
        place = self.rows[row]
        before = self.new - length
        first, last = place.first - before, place.first + place.count - before
        return max(0, first), max(0, last)


@dataclass(frozen=True)
class Mark:
    """Where a batch was before a call.

    Attributes:
        offsets: tokens that the rows had seen.
        seen: columns since their padding was announced.
        left: per row, columns of padding still to come before its first token.
        calls: of the model, that the layer had taken.
    """

    offsets: tuple[int, ...]
    seen: int
    left: tuple[int, ...]
    calls: int


@dataclass(eq=False)
class BatchView:
    """The keys and values of all rows of one layer at one moment.

    Attributes:
        layout: of the call that this is for.
        views: of the rows; None for one without tokens.
        shape: heads and channels per token.
        before: where the batch was before the call.
    """

    layout: BatchLayout
    views: tuple[KVView | None, ...]
    shape: KVShape
    before: Mark

    def dense(self, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """All keys and values, dequantized, zero where there is padding.

        Returns:
            ``[rows, kv_heads, width, key_dim]`` and ``[rows, kv_heads, width, value_dim]``.
        """
        width, rows = self.layout.width, []
        dims = (self.shape.key_dim, self.shape.value_dim)
        nothing = [mx.zeros((1, self.shape.kv_heads, width, dim), dtype) for dim in dims]
        for i, view in enumerate(self.views):
            if view is None:
                rows.append(nothing)
                continue
            end = self.layout.end(i)
            pads = [(0, 0), (0, 0), (end - view.tokens, width - end), (0, 0)]
            rows.append([mx.pad(x.astype(dtype), pads) for x in view.dense(dtype)])
        keys, values = (mx.concatenate(list(parts)) for parts in zip(*rows, strict=True))
        return keys, values


class BatchMask(mx.array):
    """A batch's mask: the array that a model may read, and what it says of each row.

    The array is bool ``[rows, 1, new, width]``, as mlx-lm's batch cache makes it, and lazy. A mask
    that reaches attention as it was made is not looked at: the rows' own masks are cheaper.

    Attributes:
        layout: of the call that it is for.
        rows: per row None, ``"causal"``, or an array ``[count, tokens]``.
    """

    layout: BatchLayout
    rows: tuple[Mask, ...]


def batch_mask(layout: BatchLayout, masks: Sequence[Mask]) -> BatchMask:
    """A mask of all rows out of their own.

    Args:
        layout: of the call.
        masks: as `PagedLayerCache.make_mask` gives them for a row's count of new tokens.
    """
    if any(isinstance(mask, mx.array) for mask in masks):
        array = mx.concatenate([_spread(layout, i, mask) for i, mask in enumerate(masks)])
    else:
        array = _causal(layout)
    out = BatchMask(array)
    out.layout, out.rows = layout, tuple(masks)
    return out


def _causal(layout: BatchLayout) -> mx.array:
    """What a token may see if that is every token of its row up to itself."""
    columns = mx.arange(layout.width)
    starts = mx.array([layout.start(i) for i in range(len(layout.rows))])
    mask = columns >= starts[:, None, None, None]
    if layout.new > 1:
        rows = mx.arange(layout.width - layout.new, layout.width)
        return mask & (columns <= rows[:, None])
    return mask


def _spread(layout: BatchLayout, row: int, mask: Mask) -> mx.array:
    """One row's mask over the whole rectangle, ``[1, 1, new, width]``; padding sees nothing."""
    place, end = layout.rows[row], layout.end(row)
    if not isinstance(mask, mx.array):
        mask = _row_causal(place)
    if mask.ndim == 1:
        mask = mask[None]
    tokens = int(mask.shape[1])
    after = layout.new - place.first - place.count
    pads = [(place.first, after), (end - tokens, layout.width - end)]
    return mx.pad(mask, pads, constant_values=mx.array(False))[None, None]


def _row_causal(place: RowPlace) -> mx.array:
    queries = mx.arange(place.held, place.held + place.count)
    return queries[:, None] >= mx.arange(place.held + place.count)


def row_masks(mask: Mask, view: BatchView, length: int) -> list[Mask]:
    """Each row's mask for its own queries and tokens.

    Args:
        mask: what the model gave to attention.
        view: what is attended.
        length: query columns.

    Raises:
        ShapeError: if an array does not fit the rectangle.
    """
    layout = view.layout
    if isinstance(mask, BatchMask) and mask.layout == layout and length == layout.new:
        return list(mask.rows)
    if not isinstance(mask, mx.array):
        return [mask] * len(view.views)
    wanted = (len(view.views), 0, length, layout.width)
    sizes = (1,) * (4 - mask.ndim) + tuple(mask.shape)
    if mask.ndim > 4 or any(n not in (1, w) for n, w in zip(sizes, wanted, strict=True) if w):
        raise ShapeError(
            f"mask {mask.shape} does not broadcast to [{wanted[0]}, heads, {length}, "
            f"{layout.width}]: a batch's columns are those of its longest row"
        )
    mask = mask.reshape(sizes)
    return [_cut(mask, view, i, length) for i in range(len(view.views))]


def _cut(mask: mx.array, view: BatchView, row: int, length: int) -> Mask:
    """The part of an array mask that is one row's."""
    kv = view.views[row]
    if kv is None:
        return None
    if mask.shape[0] > 1:
        mask = mask[row : row + 1]
    if mask.shape[2] > 1:
        first, last = view.layout.queries(row, length)
        mask = mask[:, :, first:last]
    if mask.shape[3] > 1:
        end = view.layout.end(row)
        mask = mask[..., end - kv.tokens : end]
    return mask
