"""What one layer of a sequence holds, hot tokens and sealed pages, and when a page is sealed."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import mlx.core as mx

from pagedkv.allocator import KVShape, Ladder, PageTable, Precision, TableEntry
from pagedkv.allocator.precision import GROUP_TOKENS
from pagedkv.attn.backends import KernelBackend, choose_backend
from pagedkv.attn.driver import DECODE_TOKENS
from pagedkv.config.sizes import whole_number
from pagedkv.errors import (
    CacheStateError,
    ClosedError,
    ColdStoreError,
    OutOfPagesError,
    ShapeError,
)
from pagedkv.sequence.interruption import interruptible
from pagedkv.sequence.sequence import SequenceContext
from pagedkv.tiers import HotBuffer, HotTokens, LayerPager, Page, Treatment
from pagedkv.tiers.codec.rounding import set_apart
from pagedkv.tiers.turn import Turn, exclusive

if TYPE_CHECKING:
    from pagedkv.sequence.layer import PagedLayerCache


class LayerPages:
    """Hot tokens and a table of sealed pages.

    In token order: the sinks and, once a window has left some behind, `dropped` tokens that are
    gone; the pages; the other hot tokens.

    Attributes:
        layer: index among the model's layers.
        offset: tokens that ever came, less those that were trimmed.
        sink_tokens: first tokens, which stay hot.
        dropped: tokens between the sinks and the first page that a window left behind.
    """

    def __init__(self, context: SequenceContext, layer: int) -> None:
        self.layer = layer
        self.offset = 0
        self.sink_tokens = context.config.sink_tokens
        self.dropped = 0
        self._context = context
        self._pager: LayerPager | None = None
        self._table: PageTable | None = None
        self._hot = HotBuffer(0)
        self._full = 0  # hot tokens that make a page due
        self._may_promote = False
        self._closed = False
        self.splits = False  # whether a call may give it its tokens in several parts
        self.in_step = True  # whether it is given as many tokens as the model in every call
        self._attended: tuple[mx.array, ...] = ()  # what may still be reading the slabs
        self._backend = choose_backend(context.config.backend)

    @property
    def _turn(self) -> Turn:
        return self._context.pager.turn

    @exclusive
    def bind(self, shape: KVShape, dtype: mx.Dtype) -> None:
        """Fix heads, channels and types; done by the first tokens, or when a model is wrapped.

        Args:
            shape: what the layer caches per token.
            dtype: the model's type; see `TierConfig.hot_dtype` for what is kept.

        Raises:
            ConfigError: if the warm budget is smaller than one page.
        """
        config = self._context.config
        self._dtype = _hot_dtype(config.hot_dtype, dtype)
        self._pager = self._context.pager.layer(self.layer, shape, self._dtype, self._span)
        if self._pager.shape != shape:
            raise ShapeError(
                f"layer {self.layer}: keys of {shape} do not fit this model's {self._pager.shape}"
            )
        self._table = self._pager.table()
        self._full = self._hot_room(self._pager.page_tokens)
        self._hot = HotBuffer(self._full + DECODE_TOKENS)

    def require_open(self) -> None:
        """See that the cache was not closed.

        Raises:
            ClosedError: if it was.
        """
        if self._closed:
            raise ClosedError(f"layer {self.layer}: the cache is closed; make a new one")

    def located_pages(self) -> Iterator[tuple[Page, int]]:
        """This sequence's pages in order, each with its valid tokens."""
        if self._pager is not None and self._table is not None:
            for entry in self._table:
                yield self._pager.pages[entry.page], entry.tokens

    def page_bytes(self, precision: Precision) -> int:
        """Bytes of a page of this layer."""
        assert self._pager is not None
        return self._pager.codecs[precision].geometry.page_bytes

    @property
    def shape(self) -> KVShape | None:
        """Heads and channels; None before the first tokens."""
        return self._pager.shape if self._pager else None

    @property
    def treatment(self) -> Treatment | None:
        """What is done to keys and values in pages; None for nothing or before the first tokens."""
        return self._pager.treatment if self._pager else None

    @property
    def page_tokens(self) -> int:
        """Tokens of a page; 0 before the first tokens."""
        return self._pager.page_tokens if self._pager else 0

    @property
    def hot_bits(self) -> int:
        """Bits of a hot number."""
        return 8 * self._dtype.size if self._pager else 16

    @property
    def hot_bytes(self) -> int:
        """Bytes allocated for hot tokens."""
        return self._hot.nbytes

    @property
    def hot_held(self) -> int:
        """Hot tokens held, those that a window has just left behind included."""
        return self._hot.used

    @property
    def keeps_all(self) -> bool:
        """Whether no token is ever forgotten unasked."""
        return True

    @property
    def frees_pages(self) -> bool:
        """Whether sealing may free pages: those that are lowered."""
        return len(self.ladder.steps) > 1

    @property
    def ladder(self) -> Ladder:
        """Precision of its pages by distance."""
        return self._context.pager.budget.ladders.of(self.layer)

    def siblings(self) -> Iterator[PagedLayerCache]:
        """The paged layers of the same sequence, this one included."""
        return self._context.alive()

    @property
    def _span(self) -> int | None:
        """Tokens of a sequence that are ever in pages; None for any number."""
        return None

    def _hot_room(self, page_tokens: int) -> int:
        """Hot tokens with which there is something to do: a page to be sealed."""
        return self.sink_tokens + self._context.config.hot_tokens + page_tokens

    def _pages_due(self, extra: int = 0) -> int:
        """Pages of hot tokens that are out of the window, once `extra` more are appended."""
        if self._pager is None:
            return 0
        beyond = self._hot.used + extra - self.sink_tokens - self._context.config.hot_tokens
        return max(0, beyond // self._pager.page_tokens)

    def _overflowing(self) -> bool:
        return self._pages_due() > 0

    def _page_precisions(self, count: int, offset: int) -> list[Precision]:
        """Precision of the next `count` pages to be sealed, the current token being `offset`."""
        assert self._pager is not None and self._table is not None
        ends = self._first_unsealed(offset) + self._pager.page_tokens
        ladder = self.ladder
        return [ladder.at(offset - ends - i * self._pager.page_tokens) for i in range(count)]

    def _first_unsealed(self, offset: int) -> int:
        """Where the next page begins, the current token being `offset`."""
        return self._sealed_end()

    def _sealed_end(self) -> int:
        """Where the pages end."""
        assert self._table is not None
        return self.sink_tokens + self.dropped + self._table.tokens

    def _admit(self, count: int) -> None:
        """Refuse tokens whose pages would not fit, before any layer has taken them."""
        first: LayerPages = next(self._context.alive(), self)
        layers: Sequence[LayerPages] = [self] if first is not self else [*first.siblings()]
        if first is self:
            bound = [c for c in layers if c._pager is not None]
            room = (c._full - c._hot.used + max(self.offset, c.offset) for c in bound)
            self._context.admitted = min(room, default=self.offset) - 1
        for cache in layers:
            # A layer's second stream may be called before its first, and have the tokens already.
            coming = max(0, count - max(0, cache.offset - self.offset))
            if cache._pager is None or not cache._pages_due(coming):
                continue
            problem = cache._pager.shortage(cache._pages_to_come(coming))
            while problem and self._context.pager.relieve():
                # Counted again: a page that was shared frees its slot now when it is lowered.
                problem = cache._pager.shortage(cache._pages_to_come(coming))
            if problem is None and cache is self and self._overflowing():
                problem = "the disk failed while pages were being stored"
            if problem:
                raise OutOfPagesError(
                    f"out of pages at {self.offset:,} tokens (+{count:,}): {problem}; "
                    f"raise the warm or cold budget, lower the precision, or trim"
                )

    def _pages_to_come(self, count: int) -> dict[Precision, int]:
        """By precision, pages sealed or lowered into it less pages that leave it, `count` on."""
        assert self._pager is not None
        offset = self.offset + count
        more = Counter(self._page_precisions(self._pages_due(count), offset))
        for _, entry, present, wanted in self._to_lower(offset):
            more[wanted] += 1
            more[present] -= self._pager.allocator.references(entry.page) == 1
        return dict(more)

    def _settle(self) -> None:
        """Seal pages that left the hot window, and lower those that crossed a step."""
        if self._pager is None or self._table is None:
            return
        if self._may_promote:
            self._may_promote = False
            self._pager.promote(self._table.entries)
        due = self._pages_due()
        if not due:
            return
        self._wait()
        self._lower()  # first: it makes room where the new pages go
        sealed: list[int] = []
        precisions = self._page_precisions(due, self.offset)
        for precision, group in itertools.groupby(precisions):
            wanted = len(list(group))
            done = self._seal(len(sealed), wanted, precision)
            sealed += done
            if len(done) < wanted:
                break  # no room (a disk error came late): the tokens simply stay hot
        if sealed:
            # In one step: at any time a token is either hot or in a page of the table.
            left = self._hot.without(self.sink_tokens, len(sealed) * self._pager.page_tokens)
            self._table.extend(sealed)
            self._hot = left
            # Started and not waited for: what uses them comes later in the same stream.
            mx.async_eval(*self._hot.arrays, *self._pager.slabs)  # type: ignore[no-untyped-call]

    def _seal(self, first: int, count: int, precision: Precision) -> list[int]:
        """Seal `count` pages from the `first` unsealed one on; returns those that it did."""
        assert self._pager is not None and self._table is not None
        tokens, sinks = self._pager.page_tokens, self.sink_tokens
        end, sealed = self._sealed_end(), list[int]()
        per_call = max(1, self._pager.run_tokens // tokens)  # bounds the memory of encoding
        while len(sealed) < count:
            now = min(per_call, count - len(sealed))
            behind = (first + len(sealed)) * tokens
            records = self._encode(sinks + behind, now, precision)
            positions = [end + behind + i * tokens for i in range(now)]
            lineage = self._context.lineage
            pages = self._pager.seal(records, precision, positions, lineage)
            sealed += pages
            if len(pages) < now:
                break
            if len(sealed) < count:
                mx.eval(*self._pager.slabs)
        return sealed

    def _encode(self, start: int, pages: int, precision: Precision) -> mx.array:
        """Records of the pages that begin at hot token `start`, lazily."""
        assert self._pager is not None
        if isinstance(self._backend, KernelBackend):
            fused, hot, first = self._backend.fused, self._hot.tokens, start
            if precision.quantized:
                count = pages * self._pager.page_tokens
                apart = set_apart(*self._hot.view(start, start + count), GROUP_TOKENS)
                hot, first = HotTokens(*apart, count, count), 0
            records = fused.seal(self._pager, hot, first, pages, precision)
            if records is not None:
                return records
        keys, values = self._hot.view(start, start + pages * self._pager.page_tokens)
        return self._pager.codecs[precision].encode(keys[0], values[0])

    def _lower(self) -> None:
        """Re-encode pages that are now farther away than their precision's step."""
        assert self._pager is not None and self._table is not None
        due = list(self._to_lower(self.offset))
        if not due:
            return
        at_once = self._pager.pages_per_run  # bounds the memory of encoding
        try:
            for n, (i, entry, _, wanted) in enumerate(due, 1):
                self._table.replace(i, self._pager.lower(entry.page, wanted))
                if n % at_once == 0:
                    mx.eval(*self._pager.slabs)
        except OutOfPagesError:
            return  # keep the better precision until there is room
        finally:
            # Slots that became free are written to next: nothing may be reading them.
            mx.eval(*self._pager.slabs)

    def _to_lower(self, offset: int) -> Iterator[tuple[int, TableEntry, Precision, Precision]]:
        """Entries beyond their precision's step: index, entry, present and wanted precision."""
        if self._pager is None or self._table is None or len(self._pager.precisions) == 1:
            return
        ladder = self.ladder
        end = self.sink_tokens + self.dropped
        for i, entry in enumerate(self._table.entries):
            end += entry.tokens
            present = self._pager.pages[entry.page].precision
            if present == ladder.steps[-1]:
                continue  # as most pages are
            wanted = ladder.at(offset - end)
            if ladder.rank(wanted) > ladder.rank(present):
                yield i, entry, present, wanted

    def _wait(self) -> None:
        """Until nothing reads the slabs, that pages be written in place: else MLX copies them."""
        mx.eval(*self._attended, *self._hot.arrays)
        self._attended = ()

    @contextmanager
    def _taken_back_to(self, length: int) -> Iterator[None]:
        """If the disk fails inside, take back what came after `length`, in other layers too."""
        try:
            yield
        except (ColdStoreError, OutOfPagesError):  # the second from a disk that failed just now
            self._context.take_back_to(length)
            raise

    @exclusive
    @interruptible
    def trim(self, n: int) -> int:
        """Forget the last n tokens.

        Args:
            n: tokens; more than there are means all.

        Returns:
            The tokens forgotten.

        Raises:
            CacheStateError: if another layer of the sequence, with a window, cannot forget so many;
                nothing has changed.
        """
        self._context.pager.reclaim()
        n = min(max(whole_number(n, "the tokens to trim"), 0), self.offset)
        if self._table is None:
            return n
        if n:
            self._require_alike(n)
        return self._trim(n)

    def _trim(self, n: int) -> int:
        """See `trim`; no more tokens than there are."""
        if n:
            self._context.admitted = 0
            self._context.taken = {}
            self.offset -= n  # first: what is held is cut to it, sooner or later
            self._cut()
        return n

    def _cut(self) -> None:
        """Hold no more than `offset` tokens."""
        assert self._table is not None
        left, sealed_end = self.offset, self._sealed_end()
        if not len(self._table):
            self._hot.truncate(max(0, left - self.dropped))
        elif left >= sealed_end:
            self._hot.truncate(left - self._table.tokens - self.dropped)
        else:
            self._may_promote = True
            self._context.forget_prefix_beyond(left)
            self._hot.truncate(min(left, self.sink_tokens))
            self._table.trim(sealed_end - max(left, self.sink_tokens))

    def _require_alike(self, n: int) -> None:
        """Refuse a trim after which layers would hold different tokens.

        mlx-lm trims layer by layer, and does not look whether all of them did it.

        Args:
            n: tokens.

        Raises:
            CacheStateError: if some of the layers that hold as much as this one can, and some not.
        """
        alike = [cache for cache in self.siblings() if cache.offset == self.offset]
        able = [cache.can_trim(n) for cache in alike]
        if any(able) and not all(able):
            first = alike[able.index(False)]
            raise CacheStateError(
                f"the last {n:,} of {self.offset:,} tokens cannot be forgotten: layer "
                f"{first.layer} ({first.kind}) has left behind what comes before them; ask "
                f"can_trim({n}), or fork() the cache while they can be"
            )

    @exclusive
    @interruptible
    def forget_all(self) -> None:
        """Hold no token, as when it was made."""
        self._context.taken = {}
        self._context.admitted = 0
        self.offset = self.dropped = 0
        if self._table is not None:
            self._cut()
        self._may_promote = False

    @exclusive
    @interruptible
    def take_back_to(self, length: int) -> bool:
        """Forget what came after the first `length` tokens; False if that cannot be."""
        if length <= 0 < self.offset:
            self.forget_all()
        return self.offset <= length or self._trim(self.offset - length) > 0

    def recover(self) -> None:
        """Hold what `offset` says, after an operation that was broken off."""
        if self._table is not None:
            self._table.recover()
            self._cut()

    @exclusive
    @interruptible
    def take_over(self, other: PagedLayerCache) -> None:
        """Hold the tokens of another cache of this layer, and none else; it keeps them too.

        Raises:
            ClosedError: if one of both is closed.
        """
        self.require_open()
        other.require_open()
        self._context.pager.reclaim()
        table, hot = self._table, self._hot
        if other._pager is not None and other._table is not None:
            if self._pager is None:
                self.bind(other._pager.shape, other._dtype)
            table, hot = other._table.fork(), other._hot.share()
        self.in_step, self.splits = other.in_step, other.splits
        self._hold(table, hot, other.offset, other.dropped)

    def _hold(self, table: PageTable | None, hot: HotBuffer, offset: int, dropped: int) -> None:
        """Hold other pages and tokens, in one step."""
        before = self._table
        self._table, self._hot, self.offset, self.dropped = table, hot, offset, dropped
        if before is not None and before is not table:
            before.clear()

    @interruptible
    def compact(self) -> None:
        """Give back the memory of hot tokens that are not held any more."""
        if self._hot.used < self._hot.capacity:
            held = [mx.contiguous(array) for array in self._hot.view()]
            mx.eval(*held)
            self._hot.load(*held)


def _hot_dtype(wanted: str | None, model: mx.Dtype) -> mx.Dtype:
    if wanted is None:
        return mx.bfloat16 if model == mx.bfloat16 else mx.float16
    if wanted == "model":
        return model
    return mx.float16 if wanted == "float16" else mx.bfloat16
