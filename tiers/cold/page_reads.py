"""Reading pages from the cold files, each one verified."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from pagedkv.allocator import ColdStoreError, CorruptPageError
from pagedkv.tiers.cold.page_files import PageFiles
from pagedkv.tiers.cold.record import ColdRecord, unpack
from pagedkv.tiers.cold.writer import ColdCounters
from pagedkv.tiers.disk.checksum import checksums
from pagedkv.tiers.disk.io import aligned_buffer, reason
from pagedkv.tiers.disk.page_file import PageFile

Bytes = npt.NDArray[np.uint8]


class PageReads:
    """Reads and verifies; used by the reader threads."""

    def __init__(self, files: PageFiles, lock: threading.Lock, counters: ColdCounters) -> None:
        self._files = files
        self._lock = lock
        self._counters = counters
        self._reading = 0
        self._since = 0.0

    def read(self, records: Sequence[ColdRecord], out: Bytes) -> None:
        """Read pages into `out`, back to back, neighbours with one request.

        Raises:
            CorruptPageError: naming a page that is missing or not what was stored.
            ColdStoreError: if the disk fails.
        """
        start = at = 0
        while start < len(records):
            stop = _run_end(records, start)
            run = records[start:stop]
            end = at + sum(record.nbytes for record in run)
            self._read_run(run, out[at:end])
            start, at = stop, end

    def _read_run(self, records: Sequence[ColdRecord], out: Bytes) -> None:
        """Read one page, or neighbours in one file, into `out`."""
        first = records[0]
        if len(records) == 1:
            if (kept := first.kept) is not None:  # once: another thread may let it go
                out[:] = kept
                return
            with self._lock:
                if first.pending is not None:
                    out[:] = first.pending[: first.nbytes]
                    self._counters.reads_from_write_queue += 1
                    return
        whole = first.stored_bytes == first.nbytes
        into = out if whole else aligned_buffer(first.stored_bytes)
        with self._timed():
            self._fill(records, into)
        if not whole:
            unpack(first.identity, into, out)
        self._verify(records, out)
        with self._lock:
            self._counters.bytes_read += len(into)
            self._counters.pages_read += len(records)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Count the time in which any thread is reading."""
        with self._lock:
            if not self._reading:
                self._since = time.perf_counter()
            self._reading += 1
        try:
            yield
        finally:
            with self._lock:
                self._reading -= 1
                if not self._reading:
                    self._counters.read_seconds += time.perf_counter() - self._since

    def read_stored(self, record: ColdRecord) -> Bytes:
        """What lies in the file for a page, packed if it is: verified, to be written once more.

        Raises:
            CorruptPageError, ColdStoreError: as `read`.
        """
        stored = page = aligned_buffer(record.stored_bytes)
        self._fill([record], stored)
        if record.stored_bytes != record.nbytes:
            page = aligned_buffer(record.nbytes)
            unpack(record.identity, stored, page)
        self._verify([record], page)
        return stored

    def _fill(self, records: Sequence[ColdRecord], into: Bytes) -> None:
        """Read what the file has for neighbouring records."""
        first = records[0]
        file = self._files.extent(first.place).file
        try:
            file.read([into], first.offset)
        except EOFError as e:
            lost = _first_beyond(records, file)
            raise CorruptPageError(
                errno.EBADMSG, f"cold {lost.identity} is missing: {file.path.name}: {e}"
            ) from e
        except OSError as e:
            raise ColdStoreError(
                e.errno or errno.EIO, f"cannot read cold {first.identity}: {reason(e)}"
            ) from e

    def _verify(self, records: Sequence[ColdRecord], pages: Bytes) -> None:
        found = checksums([record.identity.pack() for record in records], pages)
        for record, digest in zip(records, found, strict=True):
            if digest != record.checksum:
                name = self._files.extent(record.place).file.path.name
                raise CorruptPageError(
                    errno.EBADMSG,
                    f"cold {record.identity} does not match its checksum: {name} "
                    f"was damaged or changed at byte {record.offset:,}",
                )


def _first_beyond(records: Sequence[ColdRecord], file: PageFile) -> ColdRecord:
    """The first of neighbouring records that the file does not hold whole."""
    try:
        size = file.size
    except OSError:
        return records[0]  # nothing more can be told
    return next((r for r in records if r.offset + r.stored_bytes > size), records[-1])


def _run_end(records: Sequence[ColdRecord], start: int) -> int:
    """The end of the longest stretch from `start` that one request can read."""
    first, stop = records[start], start + 1
    in_memory = first.kept is not None or first.pending is not None
    if in_memory or first.stored_bytes != first.nbytes:
        return stop
    while stop < len(records):
        record = records[stop]
        neighbour = (
            record.identity.layer == first.identity.layer
            and record.nbytes == record.stored_bytes == first.nbytes
            and record.slot == first.slot + stop - start
            and record.pending is None
            and record.kept is None
        )
        if not neighbour:
            break
        stop += 1
    return stop
