"""A bounded pool of aligned buffers, shared between the generation thread and the workers."""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt

from pagedkv.tiers.files import aligned_buffer
from pagedkv.tiers.workers import ThreadWorkers, Workers

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
        self._allocated = 0
        self._changed = threading.Condition()

    @property
    def nbytes(self) -> int:
        """Bytes allocated, in use or not."""
        return self._allocated

    def room(self, nbytes: int) -> int:
        """Buffers of `nbytes` that could be taken now without waiting."""
        with self._changed:
            idle = sum(size * len(buffers) for size, buffers in self._free.items())
            return (self.limit - self._allocated + idle) // nbytes

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
            if free:
                return free.pop()
            self._allocated += nbytes
            return aligned_buffer(nbytes)

    def give(self, buffer: Bytes) -> None:
        """Return a buffer from `take`."""
        with self._changed:
            self._free.setdefault(len(buffer), []).append(buffer)
            self._changed.notify_all()

    def _fits(self, nbytes: int) -> bool:
        if self._free.get(nbytes):
            return True
        for size in list(self._free):  # drop idle buffers of other sizes before waiting
            while self._free[size] and self._allocated + nbytes > self.limit:
                self._free[size].pop()
                self._allocated -= size
        return self._allocated + nbytes <= self.limit
