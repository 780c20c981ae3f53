"""One sequence's pages, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    """

    def __init__(
        self,
        allocator: PageAllocator,
        page_tokens: int,
        on_free: Callable[[int], None] | None = None,
    ) -> None:
        self._allocator = allocator
        self._page_tokens = page_tokens
        self._on_free = on_free or (lambda page: None)
        self._entries: list[TableEntry] = []
        self._snapshot: tuple[TableEntry, ...] | None = None
        self._tokens = 0

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

    def trim(self, tokens: int) -> int:
        """Drop `tokens` tokens from the end, across page borders.

        A page that loses all its tokens is released. A page that loses some stays as it is,
        with a shorter valid length here; forks still see all of it.

        Returns:
            The number of tokens dropped: `tokens`, or all there were.
        """
        dropped = min(max(tokens, 0), self._tokens)
        left = dropped
        self._snapshot = None
        while left:
            last = self._entries.pop()
            if last.tokens > left:
                self._entries.append(TableEntry(last.page, last.tokens - left))
                left = 0
            else:
                left -= last.tokens
                self._release(last.page)
        self._tokens -= dropped
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
        self._release(first.page)
        return first.tokens

    def fork(self) -> PageTable:
        """A second table over the same pages: copies page numbers, no bytes."""
        twin = PageTable(self._allocator, self._page_tokens, self._on_free)
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
        self._release(old.page)

    def clear(self) -> None:
        """Release every page."""
        self.trim(self._tokens)

    def _release(self, page: int) -> None:
        if self._allocator.release(page):
            self._on_free(page)

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
