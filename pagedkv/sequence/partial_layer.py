"""Layers that see a part of the sequence: what lies behind it is given back.

In token order such a layer holds the first `keep` tokens in 16 bit, pages, and hot tokens. `offset`
counts every token that ever came; `dropped` those between the kept ones and the first page that are
no longer there. A page goes when all of it is behind every later query's window, so the first one
may be visible in part: `KVView.hidden` says how much of it is not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx

from pagedkv.allocator import PageTable, Precision, TableEntry
from pagedkv.attn.driver import KVView
from pagedkv.config.sizes import whole_number
from pagedkv.config.window_sizes import MOST_PROPOSED, SLACK, WindowSizes
from pagedkv.errors import CacheStateError
from pagedkv.sequence.interruption import interruptible
from pagedkv.sequence.layer import PagedLayerCache
from pagedkv.sequence.sequence import SequenceContext
from pagedkv.tiers import HotBuffer, Page


@dataclass(eq=False)
class _Earlier:
    """What a layer held before a call that dropped tokens which the call before still needs.

    Attributes:
        offset: the layer's then.
        dropped: likewise.
        table: the pages.
        hot: the hot tokens.
    """

    offset: int
    dropped: int
    table: PageTable
    hot: HotBuffer


class PartialLayerCache(PagedLayerCache):
    """A layer whose queries do not see the whole sequence; says what they do see in subclasses."""

    def __init__(self, context: SequenceContext, layer: int, keep: int = 0) -> None:
        """Make an empty cache.

        Args:
            context: shared with the other layers.
            layer: index among the model's layers.
            keep: first tokens that every query sees; they stay hot.
        """
        super().__init__(context, layer)
        self.keep = self.sink_tokens = keep
        self._selection = None  # its bounds know nothing of tokens that a page has and nobody sees
        self._call_start = 0  # tokens that there were before the last call
        self._earlier: _Earlier | None = None
        self._proposed = False  # whether the last call is one that speculative decoding may make

    # What is seen, and what may go

    @property
    def reach(self) -> int:
        """Tokens that a query sees, at most."""
        raise NotImplementedError

    def needed(self, offset: int) -> int:
        """The first token behind the kept ones that is seen by queries after `offset` tokens."""
        raise NotImplementedError

    def _first_visible(self) -> int:
        """The same for the queries of the last call."""
        return self.needed(self._call_start)

    def _behind(self, offset: int) -> int:
        """Up to which token nothing is wanted again, if no more than the slack is taken back."""
        return max(self.keep, self.needed(offset) - SLACK)

    @property
    def _held_from(self) -> int:
        """The first token behind the kept ones that is still there."""
        return self.keep + self.dropped

    @property
    def seals(self) -> bool:
        """Whether there are ever pages: a window that the hot tokens fill has none."""
        return self._pager is not None and self._sizes(self._pager.page_tokens).seals

    def _sizes(self, page_tokens: int) -> WindowSizes:
        return WindowSizes(self.reach, self.keep, self._context.config.hot_tokens, page_tokens)

    @property
    def kind(self) -> str:
        """How the layer is cached, for `stats`."""
        sealed = self._pager is None or self.seals
        return f"{'paged' if sealed else '16-bit'} {self._window_name}"

    @property
    def _window_name(self) -> str:
        return f"window {self.reach}"

    @property
    def hot_bytes(self) -> int:
        """Bytes allocated for hot tokens, those that are held to go back to included."""
        return super().hot_bytes + (self._earlier.hot.nbytes if self._earlier else 0)

    @property
    def frees_pages(self) -> bool:
        """Always: those behind the window."""
        return True

    @property
    def keeps_all(self) -> bool:
        """Never: what is behind the window is forgotten."""
        return False

    def view(self) -> KVView:
        """What the queries of the last call see, for attention."""
        self.require_open()
        table, hot = self._table, self._hot.tokens
        assert table is not None
        sinks, paged = min(self.keep, hot.used), table.tokens
        hidden = max(self._first_visible(), self._held_from) - self._held_from
        entries = table.entries
        if hidden >= paged:
            entries, paged, hidden = (), 0, hidden - paged
        return KVView(self._pager, entries, hot, sinks, paged, self._following_batches, hidden)

    def _start_call(self, count: int) -> None:
        """Give back what is behind the window."""
        self._forget_earlier()
        if self._table is not None:
            self._drop_pages(self._behind(self.offset))
        self._call_start = self.offset
        # A batch is not speculated for; its prompts end with such calls.
        self._proposed = self.batch is None and 1 < count <= MOST_PROPOSED

    # Dropping

    def _drop_pages(self, end: int) -> None:
        """Give back the pages of which all is before token `end`."""
        table = self._table
        assert table is not None
        while len(table) and self._held_from + next(iter(table)).tokens <= end:
            self.dropped += table.drop_first()

    def _leave_behind(self) -> None:
        """Drop pages and hot tokens that are behind the window."""
        assert self._table is not None
        end = self._behind(self.offset)
        if self.needed(self._call_start) < end and self._earlier is None:
            new = self.offset - self._call_start
            if new <= self._hot.used - self.keep and not self._proposed:
                self._earlier = self._remember(new)
            else:  # some stay, or they are partly sealed: nothing goes before the next call
                end = self.needed(self._call_start)
        if end <= self._held_from:
            return
        if self._attended:
            self._wait()
        self._drop_pages(end)
        if len(self._table) or end <= self._held_from:
            return
        gone = end - self._held_from
        left = self._hot.without(self.keep, gone)
        self._hot, self.dropped = left, self.dropped + gone
        # Started and not waited for: what uses them comes later in the same stream.
        mx.async_eval(*self._hot.arrays)  # type: ignore[no-untyped-call]

    def _remember(self, new: int) -> _Earlier:
        """The state before the call that added `new` tokens, all of them hot."""
        assert self._table is not None
        held = self._hot.copy(self._hot.used - new)
        return _Earlier(self._call_start, self.dropped, self._table.fork(), held)

    def _forget_earlier(self) -> None:
        earlier, self._earlier = self._earlier, None
        if earlier is not None:
            earlier.table.clear()

    def _settle(self) -> None:
        if self._table is not None:
            self._leave_behind()
        super()._settle()
        if self._earlier is not None:
            mx.async_eval(*self._earlier.hot.arrays)  # type: ignore[no-untyped-call]

    # Sealing what remains

    @property
    def _span(self) -> int | None:
        return self.reach - self.keep

    def _hot_room(self, page_tokens: int) -> int:
        return self._sizes(page_tokens).hot_room

    def _pages_due(self, extra: int = 0) -> int:
        if self._pager is None or not self.seals:
            return 0
        offset = self.offset + extra
        beyond = offset - self._first_unsealed(offset) - self._context.config.hot_tokens
        return max(0, beyond // self._pager.page_tokens)

    def _overflowing(self) -> bool:
        return self._pages_due() > 0 or (self._pager is not None and self._hot.used >= self._full)

    def _first_unsealed(self, offset: int) -> int:
        return max(self._sealed_end(), self._behind(offset))

    def _pages_to_come(self, count: int) -> dict[Precision, int]:
        more = Counter(super()._pages_to_come(count))
        for page in self._pages_to_go(count):
            more[page.precision] -= 1
        return dict(more)

    def _pages_to_go(self, count: int) -> Iterator[Page]:
        """Pages that nobody holds any more when those that `count` tokens push out are sealed."""
        assert self._pager is not None and self._table is not None
        # The pages that a long call leaves behind are held until the next one.
        end = self._behind(self.offset + (count if count <= SLACK else 0))
        released = Counter(e.page for e in self._earlier.table) if self._earlier else Counter[int]()
        held = released + Counter(e.page for e in self._table)
        released += Counter(e.page for e in self._entries_before(end))
        for number, times in released.items():
            if times == held[number] == self._pager.allocator.references(number):
                yield self._pager.pages[number]

    def _entries_before(self, end: int) -> Iterator[TableEntry]:
        at = self._held_from
        for entry in self._table or ():
            at += entry.tokens
            if at > end:
                return
            yield entry

    def _to_lower(self, offset: int) -> Iterator[tuple[int, TableEntry, Precision, Precision]]:
        gone = sum(1 for _ in self._entries_before(self._behind(offset)))
        return (found for found in super()._to_lower(offset) if found[0] >= gone)

    # The rest of mlx-lm's protocol

    @property
    def _all_there(self) -> bool:
        """Whether queries see any part of the sequence, to whatever length it is cut back."""
        return not self.dropped

    def size(self) -> int:
        """Tokens that the next query sees, at most."""
        return min(self.offset, self.reach)

    def is_trimmable(self) -> bool:
        """Whether mlx-lm may call `trim`.

        It does not say for how many tokens it asks. Any number can be forgotten as long as none was
        dropped; later the answer is yes between a call of a few tokens and what comes next, where
        speculative decoding takes back some of that call, and does not look whether it could.
        """
        return self._all_there or self._proposed

    def can_trim(self, n: int) -> bool:
        """Whether what a query sees once the last n tokens are forgotten is still there."""
        left = self.offset - min(max(whole_number(n, "the tokens to trim"), 0), self.offset)
        return self._holds(left) or (self._earlier is not None and self._earlier.offset == left)

    def _holds(self, left: int) -> bool:
        """Whether what queries after `left` tokens see is there."""
        return self._all_there or left == self.offset or self.needed(left) >= self._held_from

    def _trim(self, n: int) -> int:
        """Forget the last n tokens, if what a query sees then is still there; else 0 of them.

        That is so for 16 tokens at any time, for those of the last call, and for any number while
        nothing was dropped.
        """
        left = self.offset - n
        self._proposed = False
        if not self.can_trim(n):
            return 0
        if self._holds(left):
            super()._trim(n)
        else:
            self._go_back()
        self._call_start = min(self._call_start, left)
        return n

    def _go_back(self) -> None:
        """To the state before the last call."""
        earlier, self._earlier = self._earlier, None
        assert earlier is not None
        self._hold(earlier.table, earlier.hot, earlier.offset, earlier.dropped)
        self._context.admitted = 0
        self._context.taken = {}
        self._may_promote = True

    @interruptible
    def forget_all(self) -> None:
        """See `LayerPages.forget_all`."""
        super().forget_all()
        self._forget_earlier()
        self.accept_dropped(0, 0)

    def recover(self) -> None:
        """See `LayerPages.recover`; what was dropped is what is not there."""
        self._call_start = min(self._call_start, self.offset)
        if self._earlier is not None:
            self._earlier.table.recover()
        if self._table is not None:
            self._table.recover()
            missing = self.offset - self._hot.used - self._table.tokens
            self.dropped = max(self.dropped, missing)
        super().recover()

    def continue_from(self, other: PagedLayerCache) -> None:
        """See `PagedLayerCache.continue_from`."""
        assert isinstance(other, PartialLayerCache)
        super().continue_from(other)
        self._call_start, self._proposed = other._call_start, other._proposed

    @interruptible
    def close(self) -> None:
        """See `PagedLayerCache.close`."""
        super().close()
        self._forget_earlier()

    # State

    def accept_dropped(self, dropped: int, offset: int) -> None:
        """Take over a saved cache's count of dropped tokens.

        Raises:
            CacheStateError: if a window like this one cannot have dropped so many of `offset`.
        """
        if not 0 <= dropped <= self.needed(offset) - self.keep:
            raise CacheStateError(
                f"layer {self.layer}: {dropped} of {offset} tokens were dropped, which a "
                f"{self._window_name} does not allow: it was saved with another window"
            )
        self.dropped, self._call_start = dropped, offset

    def _require_same(self, saved: dict[str, int], mine: dict[str, int]) -> None:
        """Refuse a saved cache with another window."""
        theirs = {name: saved.get(name) for name in mine}
        if theirs != mine or saved.keys() - mine.keys() - {"dropped"}:
            raise CacheStateError(
                f"layer {self.layer}: this cache has {_told(mine)} and the saved one "
                f"{_told(saved) or 'no window'}: load it with the same model and max_kv_size"
            )


def _told(window: dict[str, int]) -> str:
    return ", ".join(f"{name}={value}" for name, value in window.items() if name != "dropped")
