"""Which cold pages a decode step reads: those that can matter, or those that may matter most.

Exact attention reads every cold page at every step. From what memory keeps of a page's keys
(`pagedkv.tiers.pages.bounds`) follows a bound on the weight that the softmax can give it; the hot
tokens give a floor to what the softmax divides by. A page is left out when the bounds of all that
is left out stay below a limit that the user set, or when it is not among the N that could weigh
most. What was left out is bounded, and reported.

With Z the sum of ``exp(score)`` over what is attended and S the same over what is left out, the
output misses by ``S / (Z + S) · (attended - left out)``, at most ``S / (Z + S)`` times the largest
attended output plus the largest value that was left out; S / (Z + S) grows with S and falls with Z.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from pagedkv.allocator import TableEntry
from pagedkv.attn.driver import KVView
from pagedkv.tiers import LayerPager
from pagedkv.tiers.arrays import evaluated

Floats = npt.NDArray[np.float32]


@dataclass
class SkipCounters:
    """What was left out so far, in decode steps of all layers.

    Attributes:
        steps: decode steps with cold pages, one count per layer.
        pages: cold pages that there were.
        skipped_pages: of them, those that were not read.
        bytes: of all those cold pages.
        skipped_bytes: of those not read.
        weight_bound: the largest share of the softmax that any query head may have missed in a
            step.
        error_bound: the most by which any output number may differ for it.
    """

    steps: int = 0
    pages: int = 0
    skipped_pages: int = 0
    bytes: int = 0
    skipped_bytes: int = 0
    weight_bound: float = 0.0
    error_bound: float = 0.0


@dataclass
class _LeftOut:
    """A step whose bound waits for its output."""

    weight: Floats  # [kv_heads, rows]
    value_peak: Floats  # [kv_heads]
    out: mx.array  # [1, query_heads, L, value_dim]


class ColdSelection:
    """Chooses the cold pages of each decode step of one layer."""

    def __init__(self, skip_below: float, cold_pages: int | None) -> None:
        """Make one.

        Args:
            skip_below: the share of the softmax that any query head may miss; 0 for none.
            cold_pages: cold pages to read, at most; None for no limit.
        """
        self._skip_below = skip_below
        self._cold_pages = cold_pages
        self._counters = SkipCounters()
        self._left_out: _LeftOut | None = None
        self._weight: Floats | None = None
        self._value_peak: Floats | None = None
        self._out: set[int] = set()  # pages that the last step left out

    @property
    def counters(self) -> SkipCounters:
        """What was left out so far."""
        self._settle()
        return self._counters

    def narrowed(
        self, view: KVView, q: mx.array, scale: float, mask: str | None, sinks: mx.array | None
    ) -> KVView:
        """The view with those pages alone that are to be read.

        Args:
            view: everything.
            q: ``[1, query_heads, L, key_dim]``, a few query tokens.
            scale: multiplies the products of queries and keys.
            mask: None or ``"causal"``.
            sinks: the model's attention sinks, ``[query_heads]``.
        """
        self._settle()
        self._weight, self._out = None, set()
        pager = view.pager
        assert pager is not None
        cold = [e for e in view.entries if pager.pages[e.page].slot is None]
        if not cold:
            return view
        heads = int(view.hot.keys.shape[1])
        rows = (q.astype(mx.float32) * scale).reshape(heads, -1, q.shape[3])
        floor = _hot_log_mass(view, rows, int(q.shape[2]), mask, sinks)
        if pager.treatment:
            rows = pager.treatment.page_queries(rows)
        bounds = pager.bounds.upper(rows, (e.page for e in cold))
        # Shares of the floor; a page that could be anything is infinite.
        with np.errstate(over="ignore"):
            mass = np.exp(bounds.log_mass - floor, dtype=np.float64)
        order = np.argsort(mass.max(axis=(1, 2)), kind="stable")
        sums = np.cumsum(mass[order], axis=0)
        out = self._count_left_out(sums, len(cold))
        self._out = {bounds.numbers[i] for i in order[:out]}
        if out:
            self._weight = _share(sums[out - 1]).astype(np.float32)
            self._value_peak = bounds.value_peak[order[:out]].max(axis=0)
            if pager.treatment:
                self._value_peak = self._value_peak * pager.treatment.output_gain
        self._count(pager, cold)
        gone = sum(e.tokens for e in cold if e.page in self._out)
        entries = self.expected(view.entries)
        return replace(view, entries=entries, paged_tokens=view.paged_tokens - gone)

    def expected(self, entries: tuple[TableEntry, ...]) -> tuple[TableEntry, ...]:
        """Pages without those that the last step left out: what the next one will read, mostly."""
        return tuple(e for e in entries if e.page not in self._out) if self._out else entries

    def _count_left_out(self, sums: npt.NDArray[np.float64], cold: int) -> int:
        """How many of the pages, those that matter least first, are left out.

        Args:
            sums: of their masses over the floor, one after the other: ``[pages, kv_heads, rows]``.
            cold: cold pages, also those of which nothing is known.
        """
        small = _share(sums).max(axis=(1, 2)) <= self._skip_below if len(sums) else np.zeros(0)
        out = int(small.sum()) if self._skip_below else 0
        if self._cold_pages is not None:
            out = max(out, min(len(sums), cold - self._cold_pages))
        return max(out, 0)

    def attended(self, out: mx.array) -> None:
        """Tell what came of the view; bounds are worked out when it is there.

        Args:
            out: ``[1, query_heads, L, value_dim]``.
        """
        if self._weight is not None and self._value_peak is not None:
            self._left_out = _LeftOut(self._weight, self._value_peak, out)
            self._weight = None

    def _count(self, pager: LayerPager, cold: Sequence[TableEntry]) -> None:
        counters = self._counters
        sizes = {e.page: pager.page_bytes(e.page) for e in cold}
        counters.steps += 1
        counters.pages += len(cold)
        counters.skipped_pages += len(self._out)
        counters.bytes += sum(sizes.values())
        counters.skipped_bytes += sum(sizes[number] for number in self._out)

    def _settle(self) -> None:
        """Take the last step's bounds into account."""
        if self._left_out is None:
            return
        step, self._left_out = self._left_out, None
        heads, rows = step.weight.shape
        largest = mx.abs(step.out.astype(mx.float32)).reshape(heads, rows, -1).max(axis=2)
        error = step.weight * (np.array(evaluated(largest)) + step.value_peak[:, None])
        counters = self._counters
        counters.weight_bound = max(counters.weight_bound, float(step.weight.max()))
        counters.error_bound = max(counters.error_bound, float(error.max()))


def _share(over_floor: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """S / (Z + S) from S / Z; 1 where S could be anything."""
    with np.errstate(invalid="ignore"):
        share = over_floor / (1 + over_floor)
    return np.where(np.isfinite(over_floor), share, 1.0)


def _hot_log_mass(
    view: KVView, rows: mx.array, length: int, mask: str | None, sinks: mx.array | None
) -> Floats:
    """Logarithm of the sum of ``exp(score)`` over the hot tokens that a query sees.

    Args:
        view: with the hot tokens.
        rows: float32 ``[kv_heads, rows, key_dim]``, scaled.
        length: query tokens.
        mask: None or ``"causal"``.
        sinks: logits, ``[query_heads]``.

    Returns:
        ``[kv_heads, rows]``.
    """
    scores = rows @ view.keys[0].astype(mx.float32).swapaxes(1, 2)
    heads, count, hot = scores.shape
    if mask == "causal" and length > 1:
        seen = mx.arange(hot) <= mx.arange(hot - length, hot)[:, None]
        scores = mx.where(mx.tile(seen, (count // length, 1)), scores, mx.array(-mx.inf))
    if sinks is not None:
        logits = mx.repeat(sinks.astype(mx.float32), length).reshape(heads, count, 1)
        scores = mx.concatenate([scores, logits], axis=2)
    return np.array(evaluated(mx.logsumexp(scores, axis=2)))
