"""Which warm page goes to disk next, found without looking at every page."""

from __future__ import annotations

import heapq
import itertools

from pagedkv.tiers.pages.page import Lineage, Page


class DemotionOrder:
    """The warm pages of one layer and precision, the farthest of each sequence at hand.

    Pages that left the tier are dropped when they come to the top, or when they are most of
    what is kept.
    """

    def __init__(self) -> None:
        self._heaps: dict[Lineage, list[tuple[int, int, Page]]] = {}
        self._order = itertools.count()  # so that pages themselves are never compared
        self._kept = 0

    def add(self, page: Page, warm: int) -> None:
        """Note a page that is warm from now on.

        Args:
            page: of this layer and precision.
            warm: pages that are warm now, this one included.
        """
        if self._kept > 2 * warm + 64:
            self._compact()
        entry = (page.position, next(self._order), page)
        heapq.heappush(self._heaps.setdefault(page.lineage, []), entry)
        self._kept += 1

    def farthest(self) -> Page:
        """Of the sequence longest unused, the oldest token's page; there must be one."""
        for lineage in sorted(self._heaps, key=lambda lineage: lineage.tick):
            heap = self._heaps[lineage]
            while heap and heap[0][2].slot is None:
                heapq.heappop(heap)
                self._kept -= 1
            if heap:
                return heap[0][2]
            del self._heaps[lineage]
        raise LookupError("no page is warm")

    def _compact(self) -> None:
        for lineage, heap in list(self._heaps.items()):
            # A page that came back is here twice: once is enough.
            warm = {id(e[2]): e for e in heap if e[2].slot is not None}
            self._heaps[lineage] = sorted(warm.values())  # which is a heap
            if not warm:
                del self._heaps[lineage]
        self._kept = sum(map(len, self._heaps.values()))
