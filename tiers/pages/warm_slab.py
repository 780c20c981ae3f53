"""The warm tier: the sealed pages of one layer and precision, in unified memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from pagedkv.allocator import OutOfPagesError, SlotPool
from pagedkv.tiers.arrays import evaluated

Bytes = npt.NDArray[np.uint8]


class WarmSlab:
    """One array of page slots, ``uint32 [slots, page_bytes / 4]``.

    A slot is written once per page, in place: the slab is the only holder of its array when it
    writes, and nothing reads it at that time, so MLX donates the buffer. If a caller still holds an
    unevaluated graph over the old contents MLX copies instead: slower for once, never wrong.
    """

    def __init__(self, page_bytes: int, max_slots: int) -> None:
        self._words = page_bytes // 4
        self.page_bytes = page_bytes
        self.max_slots = max_slots
        self._slots = SlotPool()
        self._array = mx.zeros((0, self._words), mx.uint32)
        mx.eval(self._array)  # a lazy array could only be evaluated by the thread that made it

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self._slots.capacity * self.page_bytes

    @property
    def used(self) -> int:
        """Slots that hold a page."""
        return self._slots.used

    @property
    def capacity(self) -> int:
        """Slots there are at present."""
        return self._slots.capacity

    @property
    def free(self) -> int:
        """Slots that can be taken without growing."""
        return self._slots.free

    @property
    def array(self) -> mx.array:
        """The slab itself: read it, never assign to it or keep it across a write."""
        return self._array

    @property
    def room(self) -> int:
        """Pages that fit without demoting one."""
        return self.max_slots - self._slots.used

    def take(self) -> int:
        """Take a slot, growing the slab (by doubling, up to its share) if none is free.

        Raises:
            OutOfPagesError: if all `max_slots` are taken.
        """
        if not self._slots.free:
            if not self.room:
                raise OutOfPagesError(f"all {self.max_slots} warm slots are taken")
            self.reserve(self._slots.capacity + 1)
        return self._slots.take()

    def reserve(self, slots: int) -> None:
        """Grow by doubling, up to the slab's share, until it has so many slots.

        The last doubling ends at the share: what is copied then is half of it, and no more.
        """
        wanted = max(2, min(slots, self.max_slots))
        if min(slots, self.max_slots) > self._slots.capacity:
            capacity = self.max_slots
            while (half := -(-capacity // 2)) >= wanted:
                capacity = half
            self._grow(capacity)

    def gathered(self, slots: int, kept: Sequence[int]) -> mx.array:
        """A smaller array with the pages moved together, to `exchange` for this one's.

        Nothing may be reading or writing the slab.

        Args:
            slots: that the slab then has, at least as many as are kept.
            kept: the slots that are taken, in the order of their new numbers, from 0 on.
        """
        rows = [*kept, *[kept[0] if kept else 0] * (slots - len(kept))]
        array = self.records(rows)
        mx.eval(array)
        return array

    def exchange(self, array: mx.array, taken: Sequence[int]) -> None:
        """Have this array, of whose slots these are taken."""
        slots = SlotPool(int(array.shape[0]))
        slots.claim(taken)
        self._array, self._slots = array, slots

    def give(self, slot: int) -> None:
        """Give a slot back; its bytes become meaningless."""
        self._slots.give(slot)

    def write(self, slots: Sequence[int], records: mx.array) -> None:
        """Store pages, lazily: evaluate `array`, or start to, before the slab is used again.

        Args:
            slots: taken slots.
            records: uint32 ``[len(slots), page_bytes / 4]``.
        """
        start = 0
        for i in range(1, len(slots) + 1):  # neighbouring slots in one update
            if i == len(slots) or slots[i] != slots[i - 1] + 1:
                where = _index(slots[start])
                self._array = mx.slice_update(self._array, records[start:i], where, [0])
                start = i

    def records(self, slots: list[int]) -> mx.array:
        """Pages by slot, lazily: ``uint32 [len(slots), page_bytes / 4]``."""
        return mx.take(self._array, mx.array(slots, mx.uint32), axis=0)

    def page_view(self, slot: int) -> Bytes:
        """A page's bytes, to be copied before anything else happens to the slab."""
        return np.asarray(evaluated(self._array[slot])).view(np.uint8)

    def check(self) -> None:
        """The slot conservation law; see `SlotPool.check`."""
        self._slots.check()

    def _grow(self, slots: int) -> None:
        larger = mx.zeros((slots, self._words), mx.uint32)
        if self._slots.capacity:
            larger = mx.slice_update(larger, self._array, mx.array([0]), [0])  # in place
        # Waited for: while it is under way what is written next would be written to a copy, and
        # three slabs would be there at once.
        mx.eval(larger)
        self._array = larger
        self._slots.grow(slots)


@lru_cache(maxsize=64)  # the layers of a model write to the same slots in turn
def _index(i: int) -> mx.array:
    return mx.array([i])
