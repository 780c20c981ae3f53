"""Slots with a free list, and pages with reference counts on top of them."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping

from pagedkv.allocator.errors import OutOfPagesError, PagedKVError


class SlotPool:
    """Numbers 0 … capacity-1, each free or taken; the lowest free one is taken first.

    Lowest first keeps files and slabs dense at the front, so consecutive takes are mostly
    consecutive slots: that is what lets neighbouring pages be read with one request.
    """

    def __init__(self, capacity: int = 0) -> None:
        self._capacity = 0
        self._free: list[int] = []
        self._taken: set[int] = set()
        self.grow(capacity)

    @property
    def capacity(self) -> int:
        """Slots in all."""
        return self._capacity

    @property
    def free(self) -> int:
        """Slots that can be taken now."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Slots that are taken."""
        return len(self._taken)

    def grow(self, capacity: int) -> None:
        """Raise the capacity to `capacity` slots; never shrinks."""
        for slot in range(self._capacity, capacity):
            heapq.heappush(self._free, slot)
        self._capacity = max(self._capacity, capacity)

    def claim(self, slots: Iterable[int]) -> None:
        """Take these slots, growing as far as they reach.

        Raises:
            PagedKVError: if one of them is taken already.
        """
        wanted = set(slots)
        if wanted & self._taken:
            raise PagedKVError(f"slots {sorted(wanted & self._taken)} are taken twice")
        self.grow(max(wanted, default=-1) + 1)
        self._free = sorted(set(self._free) - wanted)  # sorted, it is a heap
        self._taken |= wanted

    def take(self) -> int:
        """Take the lowest free slot.

        Raises:
            OutOfPagesError: if none is free.
        """
        if not self._free:
            raise OutOfPagesError(f"all {self._capacity} slots are taken")
        slot = heapq.heappop(self._free)
        self._taken.add(slot)
        return slot

    def give(self, slot: int) -> None:
        """Give a taken slot back.

        Raises:
            PagedKVError: if the slot is not taken (a double free is a bug, never ignored).
        """
        if slot not in self._taken:
            raise PagedKVError(f"slot {slot} is given back but was not taken")
        self._taken.remove(slot)
        heapq.heappush(self._free, slot)

    def reset(self, taken: Iterable[int]) -> None:
        """Take these slots and no others, whatever was taken before; the capacity stays."""
        self._taken = set(taken)
        self._capacity = max(self._capacity, max(self._taken, default=-1) + 1)
        self._free = [slot for slot in range(self._capacity) if slot not in self._taken]

    def taken(self) -> frozenset[int]:
        """The slots in use."""
        return frozenset(self._taken)

    def check(self) -> None:
        """Conservation: every slot is either free or taken, exactly once.

        Raises:
            PagedKVError: naming the numbers that do not add up.
        """
        free = set(self._free)
        if len(free) != len(self._free) or free & self._taken:
            raise PagedKVError(f"slots {sorted(free & self._taken)} are both free and taken")
        if free | self._taken != set(range(self._capacity)):
            raise PagedKVError(
                f"{len(free)} free + {len(self._taken)} taken slots do not make {self._capacity}"
            )


class PageAllocator:
    """Logical pages with reference counts.

    A page number says *which* page; where its bytes are (a warm slot, a cold record) is the
    pager's business. Several page tables may hold one page: it lives until the last lets go.
    """

    def __init__(self) -> None:
        self._slots = SlotPool()
        self._references: dict[int, int] = {}

    @property
    def used(self) -> int:
        """Pages that are held by someone."""
        return self._slots.used

    def allocate(self) -> int:
        """A new page with one reference."""
        if not self._slots.free:
            self._slots.grow(max(64, 2 * self._slots.capacity))
        page = self._slots.take()
        self._references[page] = 1
        return page

    def retain(self, page: int) -> None:
        """Add a reference to a live page."""
        self._require(page)
        self._references[page] += 1

    def release(self, page: int) -> bool:
        """Drop a reference.

        Returns:
            True if it was the last: the page number is free again, and so must its bytes be.
        """
        self._require(page)
        self._references[page] -= 1
        if self._references[page]:
            return False
        del self._references[page]
        self._slots.give(page)
        return True

    def references(self, page: int) -> int:
        """How many hold `page`; 0 if nobody does."""
        return self._references.get(page, 0)

    def pages(self) -> frozenset[int]:
        """All live pages."""
        return frozenset(self._references)

    def reset(self, references: Mapping[int, int]) -> None:
        """Have these pages with so many references each, and no others."""
        self._references = dict(references)
        self._slots.reset(references)

    def _require(self, page: int) -> None:
        if page not in self._references:
            raise PagedKVError(f"page {page} is not allocated")

    def check(self, held: Iterable[Iterable[int]] | None = None) -> None:
        """Conservation: live pages = taken slots, and references = what the tables hold.

        Args:
            held: the pages of every table that exists; omit to check the allocator alone.

        Raises:
            PagedKVError: naming the page and the counts that differ.
        """
        self._slots.check()
        if self._slots.taken() != self._references.keys():
            raise PagedKVError("taken page slots and reference counts name different pages")
        if held is None:
            return
        counts: dict[int, int] = {}
        for pages in held:
            for page in pages:
                counts[page] = counts.get(page, 0) + 1
        if counts != self._references:
            wrong = {
                p: (counts.get(p, 0), self.references(p))
                for p in counts.keys() | self._references.keys()
                if counts.get(p, 0) != self.references(p)
            }
            raise PagedKVError(f"pages held by tables and reference counts differ: {wrong}")
