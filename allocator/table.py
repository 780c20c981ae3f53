"""One sequence's pages, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from pagedkv.allocator.errors import PagedKVError
from pagedkv.allocator.slots import PageAllocator


@dataclass(frozen=True)
class TableEntry:
    """A page in a table.

    Attributes:
        page: the page number.
        tokens: how many of its tokens, from the first, belong to this sequence. A trim lowers
            it and leaves the page's bytes alone.
    """

    page: int
    tokens: int


class PageTable:
    """The pages of one sequence; page contents are shared with forks and never change.

    The table holds one reference to each of its pages. What happens to a page that nobody holds
    any more is told through `on_free`.

    Its entries are what counts: they change in one step, and references follow. Where an operation
    is broken off in between (Ctrl-C, no memory), `recover` and `PageAllocator.reset` make
    the rest agree with them.
    """

    def __init__(
        self,
        allocator: PageAllocator,
        page_tokens: int,
        on_free: Callable[[int], None] | None = None,
        watch: Callable[[PageTable, list[TableEntry]], None] | None = None,
    ) -> None:
        """Make an empty table.

        Args:
            allocator: counts the references.
            page_tokens: tokens of a whole page.
            on_free: called with the number of a page that nobody holds any more.
            watch: called with this table, and every fork of it, and the list of its entries,
                which outlives the table.
        """
        self._allocator = allocator
        self._page_tokens = page_tokens
        self._on_free = on_free or (lambda page: None)
        self._watch = watch
        self._entries: list[TableEntry] = []
        self._snapshot: tuple[TableEntry, ...] | None = None
        self._tokens = 0
        if watch:
            watch(self, self._entries)

    @property
    def tokens(self) -> int:
        """Tokens of the sequence that lie in these pages."""
        return self._tokens

    @property
    def entries(self) -> tuple[TableEntry, ...]:
        """A snapshot of the table, oldest page first: the same object until the table changes."""
        if self._snapshot is None:
            self._snapshot = tuple(self._entries)
        return self._snapshot

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[TableEntry]:
        return iter(self._entries)

    def append(self, page: int, tokens: int | None = None) -> None:
        """Put `page` at the end; the table takes over the caller's reference.

        Args:
            page: a page that the caller allocated or retained.
            tokens: valid tokens in it; all of them if not given.
        """
        n = self._page_tokens if tokens is None else tokens
        if not 0 < n <= self._page_tokens:
            raise PagedKVError(f"a page of {self._page_tokens} tokens cannot hold {n}")
        self._entries.append(TableEntry(page, n))
        self._snapshot = None
        self._tokens += n

    def extend(self, pages: Sequence[int]) -> None:
        """Put whole pages at the end, all or none; the table takes over their references."""
        more = [TableEntry(page, self._page_tokens) for page in pages]
        self._entries += more
        self._snapshot = None
        self._tokens += len(more) * self._page_tokens

    def trim(self, tokens: int) -> int:
        """Drop `tokens` tokens from the end, across page borders.

        A page that loses all its tokens is released. A page that loses some stays as it is,
        with a shorter valid length here; forks still see all of it.

        Returns:
            The number of tokens dropped: `tokens`, or all there were.
        """
        dropped = min(max(tokens, 0), self._tokens)
        left, end = dropped, len(self._entries)
        while left and self._entries[end - 1].tokens <= left:
            end -= 1
            left -= self._entries[end].tokens
        gone = self._entries[end:]
        shorter = self._entries[end - 1 : end] if left else []
        cut = [TableEntry(entry.page, entry.tokens - left) for entry in shorter]
        self._entries[end - len(cut) :] = cut
        self._snapshot = None
        self._tokens -= dropped
        self._release(gone)
        return dropped

    def drop_first(self) -> int:
        """Drop the first page, which its sequence has left behind for good.

        Returns:
            Its valid tokens.

        Raises:
            PagedKVError: if there is none.
        """
        if not self._entries:
            raise PagedKVError("an empty page table has no first page")
        first = self._entries.pop(0)
        self._snapshot = None
        self._tokens -= first.tokens
        self._release([first])
        return first.tokens

    def fork(self) -> PageTable:
        """A second table over the same pages: copies page numbers, no bytes."""
        twin = PageTable(self._allocator, self._page_tokens, self._on_free, self._watch)
        for entry in self._entries:
            self._allocator.retain(entry.page)
            twin.append(entry.page, entry.tokens)
        return twin

    def replace(self, index: int, page: int) -> None:
        """Copy on write: put `page` (whose reference is taken over) in place of entry `index`.

        The old page is released here and stays what it was for every fork that holds it.
        """
        old = self._entries[index]
        self._entries[index] = TableEntry(page, old.tokens)
        self._snapshot = None
        self._release([old])

    def adopt(self, entries: list[TableEntry]) -> None:
        """Take over the entries of a table that is gone, and empty its list; this one is empty."""
        self._entries += entries
        entries.clear()
        self.recover()

    def clear(self) -> None:
        """Release every page."""
        gone = self._entries[:]
        self._entries.clear()
        self._snapshot, self._tokens = None, 0
        self._release(gone)

    def recover(self) -> None:
        """Agree with the entries again, after an operation that was broken off."""
        self._snapshot = None
        self._tokens = sum(entry.tokens for entry in self._entries)

    def _release(self, gone: Iterable[TableEntry]) -> None:
        for entry in gone:
            if self._allocator.release(entry.page):
                self._on_free(entry.page)

    def check(self) -> None:
        """Every entry holds a live page and a possible length, and the lengths add up.

        Raises:
            PagedKVError: naming the entry that does not.
        """
        for i, entry in enumerate(self._entries):
            if not 0 < entry.tokens <= self._page_tokens:
                raise PagedKVError(f"entry {i} claims {entry.tokens} of {self._page_tokens} tokens")
            if not self._allocator.references(entry.page):
                raise PagedKVError(f"entry {i} holds page {entry.page}, which is free")
        if sum(e.tokens for e in self._entries) != self._tokens:
            raise PagedKVError(f"entries do not add up to {self._tokens} tokens")
