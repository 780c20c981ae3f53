"""Read-ahead of cold pages through a small ring of staging buffers."""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pagedkv.allocator import ColdStoreError
from pagedkv.tiers.cold.buffers import BufferPool
from pagedkv.tiers.cold.record import ColdRecord
from pagedkv.tiers.cold.workers import Workers
from pagedkv.tiers.store import ColdStore

Bytes = npt.NDArray[np.uint8]
Batch = tuple[ColdRecord, ...]

REQUEST_BYTES = 2 * 2**20
"""Batches are asked for together up to this size; see `docs/design.md` for rates by size."""


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
class _Request:
    """One request to the store, of one batch or of several small ones.

    Attributes:
        buffer: where their pages go.
        batches: how many it is for.
        users: how many of them are still wanted; the last one gives the buffer back.
    """

    buffer: Bytes
    batches: int
    users: int


@dataclass(eq=False)
class _Ticket:
    """A batch that is under way, or there: its part of a request."""

    batch: Batch
    data: Bytes
    done: Future[None]
    request: _Request


class ColdReader:
    """Streams batches of cold pages in order, reading ahead as far as the staging ring allows.

    Batches that are small are asked for together: a disk and its driver take as long for 256 KiB
    as for twice as much. After the last batch of a layer it goes on with the batches announced by
    `stream`, so the next layer's first pages arrive while this one is attended.
    """

    def __init__(
        self,
        store: ColdStore,
        staging_bytes: int,
        depth: int = 4,
        workers: Workers | None = None,
    ) -> None:
        """Make a reader.

        Args:
            store: where the pages are.
            staging_bytes: memory for pages on their way in; at least one batch.
            depth: requests ahead of the batch that is wanted, at most.
            workers: whom the store lets read; threads if None.
        """
        self._store = store
        self._staging_bytes, self._workers = staging_bytes, workers
        self._depth = depth
        self._unit = min(REQUEST_BYTES, staging_bytes // (depth + 1))
        self._buffers = BufferPool(staging_bytes, workers)
        self._tickets: OrderedDict[Batch, _Ticket] = OrderedDict()
        # Weak: what a read that was interrupted leaves behind is not under way.
        self._requests: weakref.WeakSet[_Request] = weakref.WeakSet()
        self._lock = threading.Lock()
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
        ahead = 0
        for i, batch in enumerate(batches):
            # Ask for this one first if it is not under way, then for what comes after it.
            ticket = self._tickets.pop(batch, None)
            if ticket is None:
                ticket, ahead = self._require(batch), i + 1
            # What follows may be this very batch again, which is not under way any more.
            ahead = self._read_ahead(wanted, max(i + 1, min(ahead, len(batches))))
            self._wait(ticket)
            try:
                yield ticket.data
            finally:
                self._release(ticket)

    def _read_ahead(self, wanted: Sequence[Batch], start: int) -> int:
        """Ask for batches from `start` on; returns the first one that is not under way."""
        while start < len(wanted) and len(self._requests) <= self._depth:
            if wanted[start] in self._tickets:
                start += 1
                continue
            group = self._group(wanted, start)
            buffer = self._buffers.take(self._buffer_bytes(group))
            if buffer is None:
                break
            for ticket in self._submit(group, buffer):
                self._tickets[ticket.batch] = ticket
            start += len(group)
        return start

    def _group(self, wanted: Sequence[Batch], start: int) -> list[Batch]:
        """Batches of one layer that one request is for: one, or several small ones."""
        group, room = [wanted[start]], self._unit - _size(wanted[start])
        for batch in wanted[start + 1 :]:
            room -= _size(batch)
            same_layer = batch[0].identity.layer == group[0][0].identity.layer
            if room < 0 or not same_layer or batch in self._tickets or batch in group:
                break
            group.append(batch)
        return group

    def _buffer_bytes(self, group: Sequence[Batch]) -> int:
        """Small requests have buffers of one size, so that they can be used again."""
        return max(self._unit, sum(map(_size, group)))

    def _require(self, batch: Batch) -> _Ticket:
        """A ticket for a batch nobody announced; throws out announced ones if it must."""
        size = self._buffer_bytes([batch])
        while (buffer := self._buffers.take(size)) is None:
            if not self._tickets:  # an interrupted read still has it; it comes back
                buffer = self._buffers.take(size, timeout=None)
                assert buffer is not None
                break
            self._discard(next(reversed(self._tickets)))
        (ticket,) = self._submit([batch], buffer)
        return ticket

    def _submit(self, group: Sequence[Batch], buffer: Bytes) -> list[_Ticket]:
        ends = list(itertools.accumulate(map(_size, group)))
        parts = [buffer[end - _size(b) : end] for b, end in zip(group, ends, strict=True)]
        records = [record for batch in group for record in batch]
        done = self._store.fetch(records, buffer[: ends[-1]])
        request = _Request(buffer, len(group), len(group))
        with self._lock:
            self._requests.add(request)
        return [_Ticket(b, part, done, request) for b, part in zip(group, parts, strict=True)]

    def _release(self, ticket: _Ticket) -> None:
        """A batch is done with; may be called by a reader thread."""
        with self._lock:
            ticket.request.users -= 1
            if ticket.request.users:
                return
            self._requests.discard(ticket.request)
        self._buffers.give(ticket.request.buffer)

    def _wait(self, ticket: _Ticket) -> None:
        if ticket.done.done():
            self.counters.hits += 1
        else:
            self.counters.misses += 1
        started = time.perf_counter()
        try:
            try:
                ticket.done.result()
            except ColdStoreError:
                if ticket.request.batches == 1:
                    raise
                # Perhaps another batch's page, which may even have been freed since.
                ticket.done = self._store.fetch(ticket.batch, ticket.data)
                ticket.done.result()
        except BaseException:
            # Interrupted while the worker still writes to the buffer: give it back only then.
            ticket.done.add_done_callback(lambda _: self._release(ticket))
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
        self._release(ticket)

    def afresh(self) -> ColdReader:
        """A reader like this one that waits for nothing; what this one is waiting for is lost."""
        twin = ColdReader(self._store, self._staging_bytes, self._depth, self._workers)
        twin.counters = self.counters
        return twin

    def close(self) -> None:
        """Wait for reads in flight and forget them."""
        for batch in list(self._tickets):
            self._discard(batch)


def _size(batch: Batch) -> int:
    return sum(record.nbytes for record in batch)
