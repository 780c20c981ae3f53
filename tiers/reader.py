"""Read-ahead of cold pages through a small ring of staging buffers."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pagedkv.tiers.buffers import BufferPool
from pagedkv.tiers.cold import ColdStore
from pagedkv.tiers.records import ColdRecord
from pagedkv.tiers.workers import Workers

Bytes = npt.NDArray[np.uint8]
Batch = tuple[ColdRecord, ...]


@dataclass
class ReadCounters:
    """How reading kept up with attending.

    Attributes:
        hits: batches that were in staging before they were wanted.
        misses: batches that had to be waited for.
        stall_seconds: time waited.
    """

    hits: int = 0
    misses: int = 0
    stall_seconds: float = 0.0


@dataclass(eq=False)
class _Ticket:
    batch: Batch
    buffer: Bytes
    done: Future[None]


class ColdReader:
    """Streams batches of cold pages in order, reading ahead as far as the staging ring allows.

    After the last batch of a layer it goes on with the batches announced by `announce`, so the
    next layer's first pages arrive while this one is attended.
    """

    def __init__(
        self,
        store: ColdStore,
        staging_bytes: int,
        depth: int = 3,
        workers: Workers | None = None,
    ) -> None:
        """Make a reader.

        Args:
            store: where the pages are.
            staging_bytes: memory for pages on their way in; at least one batch.
            depth: batches in flight at most.
            workers: whom the store lets read; threads if None.
        """
        self._store = store
        self._depth = depth
        self._buffers = BufferPool(staging_bytes, workers)
        self._tickets: OrderedDict[Batch, _Ticket] = OrderedDict()
        self.counters = ReadCounters()

    @property
    def nbytes(self) -> int:
        """Bytes of staging memory allocated."""
        return self._buffers.nbytes

    def stream(self, batches: Sequence[Batch], following: Iterable[Batch] = ()) -> Iterator[Bytes]:
        """Yield the bytes of each batch, in order.

        A yielded array is valid until the next one is asked for.

        Args:
            batches: what to read, each batch at most one staging buffer.
            following: batches that will probably be asked for next (by another call).

        Raises:
            CorruptPageError, ColdStoreError: from the batch that failed.
        """
        wanted = [*batches, *following]
        kept = set(wanted)
        for stale in [b for b in self._tickets if b not in kept]:
            self._discard(stale)  # a seal or a trim changed what a batch holds
        for i, batch in enumerate(batches):
            # Ask for this one first if it is not under way, then for what comes after it.
            ticket = self._tickets.pop(batch, None) or self._require(batch)
            self._read_ahead(wanted[i + 1 : i + self._depth])
            self._wait(ticket)
            try:
                yield ticket.buffer
            finally:
                self._buffers.give(ticket.buffer)

    def _read_ahead(self, batches: Sequence[Batch]) -> None:
        for batch in batches:
            if batch in self._tickets:
                continue
            buffer = self._buffers.take(_size(batch))
            if buffer is None:
                return
            self._tickets[batch] = self._submit(batch, buffer)

    def _require(self, batch: Batch) -> _Ticket:
        """A ticket for a batch nobody announced; throws out announced ones if it must."""
        while (buffer := self._buffers.take(_size(batch))) is None:
            if not self._tickets:  # an interrupted read still has it; it comes back
                buffer = self._buffers.take(_size(batch), timeout=None)
                assert buffer is not None
                break
            self._discard(next(reversed(self._tickets)))
        return self._submit(batch, buffer)

    def _submit(self, batch: Batch, buffer: Bytes) -> _Ticket:
        return _Ticket(batch, buffer, self._store.fetch(batch, buffer))

    def _wait(self, ticket: _Ticket) -> None:
        if ticket.done.done():
            self.counters.hits += 1
        else:
            self.counters.misses += 1
        started = time.perf_counter()
        try:
            ticket.done.result()
        except BaseException:
            # Interrupted while the worker still writes to the buffer: give it back only then.
            ticket.done.add_done_callback(lambda _: self._buffers.give(ticket.buffer))
            raise
        finally:
            self.counters.stall_seconds += time.perf_counter() - started

    def forget_freed(self) -> None:
        """Drop read-ahead whose pages were freed meanwhile; their slots may hold others now."""
        for batch in [b for b in self._tickets if not all(r.live for r in b)]:
            self._discard(batch)

    def _discard(self, batch: Batch) -> None:
        ticket = self._tickets.pop(batch)
        ticket.done.exception()  # waits; a failure concerns nobody any more
        self._buffers.give(ticket.buffer)

    def close(self) -> None:
        """Wait for reads in flight and forget them."""
        for batch in list(self._tickets):
            self._discard(batch)


def _size(batch: Batch) -> int:
    return sum(record.nbytes for record in batch)
