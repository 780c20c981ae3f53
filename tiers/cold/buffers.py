"""A bounded pool of aligned buffers, shared between the generation thread and the workers."""

from __future__ import annotations

import threading
import weakref

import numpy as np
import numpy.typing as npt

from pagedkv.tiers.cold.workers import ThreadWorkers, Workers
from pagedkv.tiers.disk.io import aligned_buffer

Bytes = npt.NDArray[np.uint8]


class BufferPool:
    """Aligned buffers that together never take more than `limit` bytes.

    Buffers are kept and reused by size: allocating and freeing large blocks in a loop is slow
    everywhere and suspected of worse on macOS.
    """

    def __init__(self, limit: int, workers: Workers | None = None) -> None:
        self.limit = limit
        self._workers = workers or ThreadWorkers()
        self._free: dict[int, list[Bytes]] = {}
        # Weak: a buffer that is lost, because who took it was interrupted, is memory given back.
        self._lent: dict[int, tuple[weakref.ref[Bytes], int]] = {}
        self._changed = threading.Condition()

    @property
    def nbytes(self) -> int:
        """Bytes allocated, in use or not."""
        with self._changed:
            return self._allocated()

    def room(self, nbytes: int) -> int:
        """Buffers of `nbytes` that could be taken now without waiting."""
        with self._changed:
            return (self.limit - self._in_use()) // nbytes

    def take(self, nbytes: int, timeout: float | None = 0.0) -> Bytes | None:
        """A buffer of `nbytes`, or None if none came free in `timeout` seconds.

        Args:
            nbytes: size; at most `limit`.
            timeout: 0 does not wait; None waits for ever.
        """
        with self._changed:
            if nbytes > self.limit:
                raise ValueError(f"a buffer of {nbytes:,} bytes exceeds the pool's {self.limit:,}")
            if not self._workers.wait_for(self._changed, lambda: self._fits(nbytes), timeout):
                return None
            free = self._free.get(nbytes)
            buffer = free.pop() if free else aligned_buffer(nbytes)
            self._lent[id(buffer)] = weakref.ref(buffer), nbytes
            return buffer

    def give(self, buffer: Bytes) -> None:
        """Return a buffer from `take`."""
        with self._changed:
            if self._lent.pop(id(buffer), None):
                self._free.setdefault(len(buffer), []).append(buffer)
            self._changed.notify_all()

    def _in_use(self) -> int:
        """Bytes of the buffers that somebody has."""
        for key in [key for key, (buffer, _) in self._lent.items() if buffer() is None]:
            del self._lent[key]
        return sum(size for _, size in self._lent.values())

    def _allocated(self) -> int:
        return self._in_use() + sum(size * len(free) for size, free in self._free.items())

    def _fits(self, nbytes: int) -> bool:
        if self._free.get(nbytes):
            return True
        beyond = self._allocated() + nbytes - self.limit
        for size, free in self._free.items():  # drop idle buffers of other sizes before waiting
            while free and beyond > 0:
                free.pop()
                beyond -= size
        return beyond <= 0
