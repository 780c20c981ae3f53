"""Pages on their way to the disk: one writer thread, bounded buffers, and another try."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pagedkv.allocator import OutOfPagesError
from pagedkv.tiers.cold.buffers import BufferPool
from pagedkv.tiers.cold.page_files import PageFiles
from pagedkv.tiers.cold.record import ColdRecord, pack
from pagedkv.tiers.cold.workers import ThreadWorkers, Workers
from pagedkv.tiers.disk.checksum import checksum
from pagedkv.tiers.disk.io import told
from pagedkv.tiers.disk.write_limit import WriteLimit

Bytes = npt.NDArray[np.uint8]


@dataclass
class ColdCounters:
    """Traffic since the store was made: bytes as moved to and from the disk, seconds waited.

    `read_seconds` is the time in which at least one request was reading.
    """

    bytes_written: int = 0
    bytes_read: int = 0
    pages_written: int = 0
    pages_read: int = 0
    read_seconds: float = 0.0
    reads_from_write_queue: int = 0
    write_errors: int = 0
    write_stall_seconds: float = 0.0


TOGETHER_BYTES = 2 * 2**20
"""Pages that follow each other in the queue and in their file are written together up to this size:
a disk takes large requests faster (`docs/design.md`)."""


class _Packed(NamedTuple):
    """A page that is ready to be written."""

    record: ColdRecord
    checksum: bytes
    stored: Bytes


class WriteBehind:
    """Writes pages in the background, first in, first out.

    A page whose write failed (a full disk, an I/O error) stays in its buffer, readable, and is
    tried again before the buffers are declared full.
    """

    def __init__(
        self,
        files: PageFiles,
        limit: WriteLimit,
        buffer_bytes: int,
        counters: ColdCounters,
        workers: Workers | None = None,
    ) -> None:
        workers = workers or ThreadWorkers()
        self._files = files
        self._limit = limit
        self._counters = counters
        self.buffers = BufferPool(buffer_bytes, workers)
        self.lock = threading.Lock()
        self._failed: list[ColdRecord] = []
        self._queue: deque[ColdRecord] = deque()
        self._thread = workers.executor("pagedkv-writer", 1)
        self._closed = False

    @property
    def last_error(self) -> Exception | None:
        """Why the disk does not take pages at present; None while it does."""
        with self.lock:
            return self._failed[0].error if self._failed else None

    def buffer(self, nbytes: int) -> Bytes:
        """A buffer for a page, waiting for one if need be.

        Raises:
            OutOfPagesError: if writes fail and no buffer will come free.
        """
        started = time.perf_counter()
        try:
            while (buffer := self.buffers.take(nbytes, timeout=0.05)) is None:
                if not self.retry():
                    raise self._cannot_write()
        finally:
            self._counters.write_stall_seconds += time.perf_counter() - started
        return buffer

    def add(self, record: ColdRecord) -> None:
        """Queue a page, whose bytes are in its `pending` buffer."""
        self._queue.append(record)
        self._thread.submit(self._write_next)

    def retry(self) -> bool:
        """Try once more to write what failed; whether anything got through, or nothing waits."""
        with self.lock:
            failed = list(self._failed)
        for record in failed:
            self.add(record)
            with self.lock:  # one by one: what an interruption leaves here is tried next time
                if record in self._failed:
                    self._failed.remove(record)
        self.wait()
        with self.lock:
            return not failed or len(self._failed) < len(failed)

    def wait(self) -> None:
        """Return when every queued write was tried."""
        if not self._closed:
            self._thread.submit(lambda: None).result()

    def drop(self, record: ColdRecord) -> bool:
        """Forget a page; whether it was live.

        One writer thread, first in, first out: a write queued for its slot is over before any
        later page can be written there. A write in progress gives its buffer back itself.
        """
        with self.lock:
            if not record.live:
                return False
            record.live = False
            if record in self._failed:
                self._failed = [other for other in self._failed if other is not record]
                self._give_back(record)
        if not self._closed:
            self._thread.submit(self._drop, record)
        return True

    def charge(self, nbytes: int) -> None:
        """Count a checkpoint that is about to be written.

        Raises:
            ColdStoreError: if it is too much for today.
        """
        with told(f"cannot write to {self._files.directory}"):
            self._limit.charge(nbytes)
        with self.lock:
            self._counters.bytes_written += nbytes

    def close(self) -> None:
        """Stop the thread; what is still queued is not written."""
        self._closed = True
        self._thread.shutdown(wait=True, cancel_futures=True)

    def unwritten(self, records: Iterable[ColdRecord]) -> list[ColdRecord]:
        """Those of the pages that are not on disk."""
        with self.lock:
            return [r for r in records if r.pending is not None]

    def keep(self, records: Iterable[ColdRecord]) -> None:
        """Forget pages that wait to be written and are none of these; see to the others."""
        known = set(records)
        with self.lock:
            lost = {*list(self._queue), *self._failed} - known  # a list: the writer takes from it
        for record in lost:
            self.drop(record)
        if not self._closed:
            self._thread.submit(self._write_rest)

    def _write_rest(self) -> None:
        """On the writer thread: write what nobody asked for, for who queued it was interrupted."""
        while self._queue:
            self._write_next()

    def _write_next(self) -> None:
        """On the writer thread: write what is first in the queue, and what follows it in its file.

        There are as many calls as pages were added; those that find nothing left do nothing.
        """
        together: list[_Packed] = []
        while self._queue and (not together or self._follows(together, self._queue[0])):
            packed = self._pack(self._queue.popleft())
            if packed is None:
                continue
            if together and len(packed.stored) != packed.record.nbytes:
                self._write(together)  # a packed page leaves a gap behind it
                together = []
            together.append(packed)
        self._write(together)

    def _follows(self, together: Sequence[_Packed], record: ColdRecord) -> bool:
        """Whether a page lies behind others in the file, and is to be written with them."""
        first, last = together[0].record, together[-1]
        return (
            record.slot == last.record.slot + 1
            and record.place[:2] == first.place[:2]
            and len(last.stored) == last.record.nbytes
            and (len(together) + 1) * record.nbytes <= TOGETHER_BYTES
        )

    def _pack(self, record: ColdRecord) -> _Packed | None:
        """Checksum and pack a page, and charge for it; None if it is not to be written."""
        with self.lock:
            data = record.pending
            if not record.live or data is None:
                return None
        page = data[: record.nbytes]
        try:
            digest, stored = checksum(record.identity.pack(), page), pack(page)
            self._limit.charge(len(stored))
        except Exception as e:  # whatever it is, the page stays readable in its buffer
            self._note_failure(record, e)
            return None
        return _Packed(record, digest, stored)

    def _write(self, together: Sequence[_Packed]) -> None:
        """Write pages with one request, and let their buffers go."""
        if not together:
            return
        first = together[0].record
        try:
            extent = self._files.extent(first.place)
            failures = extent.failures
            extent.file.write_several([packed.stored for packed in together], first.offset)
        except Exception as e:
            if len(together) == 1:
                self._note_failure(first, e)
            else:  # some of them may get through, such as where the disk is nearly full
                for packed in together:
                    self._write([packed])
            return
        with self.lock:
            for record, digest, stored in together:
                record.checksum, record.stored_bytes = digest, len(stored)
                record.error, record.failures = None, failures
                self._counters.bytes_written += len(stored)
                self._counters.pages_written += 1
                self._give_back(record)

    def _note_failure(self, record: ColdRecord, error: Exception) -> None:
        with self.lock:
            self._counters.write_errors += 1
            record.error = error
            if record.live:
                self._failed.append(record)

    def _drop(self, record: ColdRecord) -> None:
        with self.lock:
            self._give_back(record)

    def _give_back(self, record: ColdRecord) -> None:
        if record.pending is not None:
            self.buffers.give(record.pending)
            record.pending = None

    def _cannot_write(self) -> OutOfPagesError:
        with self.lock:
            stuck, held = list(self._failed), sum(r.nbytes for r in self._failed)
        return OutOfPagesError(
            f"cold tier cannot write to {self._files.directory} ({stuck[0].error}; "
            f"{self._files.free_space}): {len(stuck)} pages ({held:,} bytes) wait in memory and no "
            f"buffer is left; free disk space or trim the context"
        )
