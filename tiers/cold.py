"""The cold tier: sealed pages on NVMe, written behind, read ahead, verified on every read.

The generation thread calls `put`, `free` and `fetch`; two small thread pools move the bytes.
Workers see numpy memory and files only, never an mlx array.
"""

from __future__ import annotations

import errno
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pagedkv.allocator import (
    ClosedError,
    ColdStoreError,
    CorruptPageError,
    OutOfPagesError,
    SlotPool,
)
from pagedkv.tiers.buffers import BufferPool
from pagedkv.tiers.disk import Disk, RealDisk
from pagedkv.tiers.files import PageFile, aligned_buffer
from pagedkv.tiers.records import ColdRecord, PageIdentity, checksum, pack, unpack
from pagedkv.tiers.store_directory import private_directory, remove_directory

Bytes = npt.NDArray[np.uint8]


@dataclass
class ColdCounters:
    """Traffic since the store was made: bytes as moved to and from the disk, seconds waited."""

    bytes_written: int = 0
    bytes_read: int = 0
    pages_written: int = 0
    pages_read: int = 0
    reads_from_write_queue: int = 0
    write_errors: int = 0
    write_stall_seconds: float = 0.0


class ColdStore(Protocol):
    """Where cold pages live. `FileColdStore` is the one there is."""

    counters: ColdCounters

    @property
    def nbytes(self) -> int:
        """Bytes taken on disk."""
        ...

    @property
    def buffer_bytes(self) -> int:
        """Memory for pages on their way to the disk."""
        ...

    @property
    def last_error(self) -> Exception | None:
        """Why pages cannot be written at present; None while they can."""
        ...

    def growth(self, layer: int) -> int:
        """Bytes of new space that the layer may still take."""
        ...

    def room(self, layer: int, page_bytes: int, growth: int | None = None) -> int:
        """Pages of this size that can still be put for this layer, with so much new space."""
        ...

    def put(self, layer: int, page: int, layout: tuple[int, int, int], data: Bytes) -> ColdRecord:
        """Take over a copy of a page; it can be fetched from now on."""
        ...

    def free(self, record: ColdRecord) -> None:
        """Forget a page."""
        ...

    def fetch(self, records: Sequence[ColdRecord], out: Bytes) -> Future[None]:
        """Read pages into `out`, back to back, in the background, each one verified."""
        ...

    def flush(self) -> None:
        """Wait until everything put so far is on disk."""
        ...

    def close(self) -> None:
        """Stop the threads and delete what is ours."""
        ...


@dataclass
class _Extent:
    """The file of one layer and page size, with its slots."""

    file: PageFile
    page_bytes: int
    slots: SlotPool = field(default_factory=SlotPool)


class FileColdStore:
    """Cold pages in files of a private directory: one file per layer and page size.

    Writing is behind: `put` copies the page into a bounded pool of aligned buffers and returns;
    a page that is not on disk yet is read from its buffer. A page whose write failed (a full
    disk, an I/O error) stays in its buffer, readable, and is tried again before the pool is
    declared full.
    """

    def __init__(
        self,
        parent: str | None,
        budget: int,
        layers: int,
        write_buffer_bytes: int,
        readers: int = 2,
        disk: Disk | None = None,
    ) -> None:
        """Open a store.

        Args:
            parent: directory in which to make a private one; the temporary directory if None.
            budget: bytes of disk that all layers may take together, in equal shares.
            layers: number of layers.
            write_buffer_bytes: bytes of memory for pages on their way to the disk.
            readers: reading threads.
            disk: the file system; the real one if None.
        """
        self._disk = disk or RealDisk()
        self.directory: Path = private_directory(parent, self._disk)
        # Also at exit.
        self._remove = weakref.finalize(self, remove_directory, self.directory, self._disk)
        self.budget = budget
        self.counters = ColdCounters()
        self._layer_budget = budget // max(layers, 1)
        self._extents: dict[tuple[int, int], _Extent] = {}
        self._owner = np.random.default_rng().bytes(16)
        self._generation = 0
        self._buffers = BufferPool(write_buffer_bytes)
        self._failed: list[ColdRecord] = []
        self._lock = threading.Lock()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="pagedkv-writer")
        self._readers = ThreadPoolExecutor(readers, thread_name_prefix="pagedkv-reader")
        self._closed = False

    # Room

    @property
    def nbytes(self) -> int:
        """Bytes of disk taken: every file at the largest size it reached."""
        return sum(e.slots.capacity * e.page_bytes for e in self._extents.values())

    @property
    def buffer_bytes(self) -> int:
        """Bytes of memory in write buffers, free ones included."""
        return self._buffers.nbytes

    @property
    def last_error(self) -> Exception | None:
        """Why the disk does not take pages at present; None while it does."""
        with self._lock:
            return self._failed[0].error if self._failed else None

    def room(self, layer: int, page_bytes: int, growth: int | None = None) -> int:
        """Pages that can still be put: by the disk budget, or by memory while writes fail.

        Args:
            layer: layer number.
            page_bytes: size of the pages.
            growth: bytes by which the layer's files may still grow; all that is left if None.
        """
        extent = self._extents.get((layer, page_bytes))
        free = extent.slots.free if extent else 0
        growth = self.growth(layer) if growth is None else growth
        room = free + max(0, growth) // page_bytes
        if self.last_error is not None and not self._retry_failed():
            return min(room, self._buffers.room(page_bytes))
        return room

    def growth(self, layer: int) -> int:
        """Bytes by which the layer's files may still grow within its share."""
        taken = sum(
            e.slots.capacity * e.page_bytes for (i, _), e in self._extents.items() if i == layer
        )
        return self._layer_budget - taken

    # Writing

    def put(self, layer: int, page: int, layout: tuple[int, int, int], data: Bytes) -> ColdRecord:
        """Copy a page into the write queue.

        Args:
            layer: layer number.
            page: page number.
            layout: key bits, value bits, tokens per page.
            data: the page's bytes; the caller may reuse them at once.

        Raises:
            OutOfPagesError: if the layer's disk share is full, or writes fail and no buffer is
                left to hold the page in memory.
            ClosedError: after `close`.
        """
        self._require_open()
        nbytes = len(data)
        extent = self._extent(layer, nbytes)
        buffer = self._write_buffer(nbytes)
        buffer[:nbytes] = data
        identity = PageIdentity(self._owner, layer, page, self._generation, layout)
        self._generation += 1
        record = ColdRecord(identity, nbytes, extent.slots.take(), pending=buffer)
        self._writer.submit(self._write, record)
        return record

    def _extent(self, layer: int, page_bytes: int) -> _Extent:
        """The file for these pages, with at least one free slot."""
        extent = self._extents.get((layer, page_bytes))
        if extent and extent.slots.free:
            return extent
        if self.growth(layer) < page_bytes:
            raise OutOfPagesError(
                f"cold tier full: layer {layer} has used its {self._layer_budget:,} of "
                f"{self.budget:,} bytes; raise the cold budget or trim the context"
            )
        if not extent:
            name = f"layer-{layer:04d}-{page_bytes // 1024}k.pages"
            try:
                extent = _Extent(PageFile(self.directory / name, self._disk), page_bytes)
            except OSError as e:
                raise ColdStoreError(
                    e.errno or errno.EIO, f"cannot open {self.directory / name}: {e.strerror}"
                ) from e
            self._extents[layer, page_bytes] = extent
        extent.slots.grow(extent.slots.capacity + 1)
        return extent

    def _write_buffer(self, nbytes: int) -> Bytes:
        started = time.perf_counter()
        try:
            while (buffer := self._buffers.take(nbytes, timeout=0.05)) is None:
                if not self._retry_failed():
                    raise self._cannot_write()
        finally:
            self.counters.write_stall_seconds += time.perf_counter() - started
        return buffer

    def _retry_failed(self) -> bool:
        """Try once more to write what failed; whether anything got through, or nothing waits."""
        with self._lock:
            failed, self._failed = self._failed, []
        for record in failed:
            self._writer.submit(self._write, record)
        self.flush()
        with self._lock:
            return not failed or len(self._failed) < len(failed)

    def _cannot_write(self) -> OutOfPagesError:
        with self._lock:
            stuck, held = list(self._failed), sum(r.nbytes for r in self._failed)
        return OutOfPagesError(
            f"cold tier cannot write to {self.directory} ({stuck[0].error}): {len(stuck)} "
            f"pages ({held:,} bytes) wait in memory and no buffer is left; free disk space "
            f"or trim the context"
        )

    def _write(self, record: ColdRecord) -> None:
        """On the writer thread: pack, checksum, write, and let the buffer go."""
        with self._lock:
            data = record.pending
            if not record.live or data is None:
                return
        page = data[: record.nbytes]
        try:
            digest, stored = checksum(record.identity, page), pack(page)
            extent = self._extents[record.identity.layer, record.nbytes]
            extent.file.write(stored, record.slot * record.nbytes)
        except Exception as e:  # whatever it is, the page stays readable in its buffer
            with self._lock:
                self.counters.write_errors += 1
                record.error = e
                if record.live:
                    self._failed.append(record)
            return
        with self._lock:
            record.checksum, record.stored_bytes = digest, len(stored)
            record.error = None
            self.counters.bytes_written += len(stored)
            self.counters.pages_written += 1
            if record.pending is not None:
                self._buffers.give(record.pending)
                record.pending = None

    def free(self, record: ColdRecord) -> None:
        """Forget a page. Its slot is reused only after the writes already queued."""
        with self._lock:
            if not record.live:
                return
            record.live = False
            if record in self._failed:
                self._failed.remove(record)
            if record.pending is not None and record.error is not None:
                self._buffers.give(record.pending)
                record.pending = None
        if self._closed:
            return
        # One writer thread, first in, first out: a write queued for this slot is over before
        # any later put can write there. A live write in progress gives its buffer back itself.
        self._writer.submit(self._drop, record)
        self._extents[record.identity.layer, record.nbytes].slots.give(record.slot)

    def _drop(self, record: ColdRecord) -> None:
        with self._lock:
            if record.pending is not None:
                self._buffers.give(record.pending)
                record.pending = None

    def flush(self) -> None:
        """Wait until every queued write was tried."""
        if not self._closed:
            self._writer.submit(lambda: None).result()

    # Reading

    def fetch(self, records: Sequence[ColdRecord], out: Bytes) -> Future[None]:
        """Read pages into `out`, back to back, on a reader thread.

        Args:
            records: live records.
            out: uint8, as long as the pages together, aligned as by `aligned_buffer`.

        Returns:
            A future; its result is None once every page is there and verified, or
            `CorruptPageError` / `ColdStoreError` naming the page.
        """
        self._require_open()
        return self._readers.submit(self._read, list(records), out)

    def _read(self, records: list[ColdRecord], out: Bytes) -> None:
        places, at = [], 0
        for record in records:
            places.append(out[at : at + record.nbytes])
            at += record.nbytes
        start = 0
        while start < len(records):
            stop = self._run_end(records, start)
            self._read_run(records[start:stop], places[start:stop])
            start = stop

    def _run_end(self, records: list[ColdRecord], start: int) -> int:
        """The end of the longest stretch from `start` that one request can read."""
        first, stop = records[start], start + 1
        if first.pending is not None or first.stored_bytes != first.nbytes:
            return stop
        while stop < len(records):
            record = records[stop]
            neighbour = (
                record.identity.layer == first.identity.layer
                and record.nbytes == record.stored_bytes == first.nbytes
                and record.slot == first.slot + stop - start
                and record.pending is None
            )
            if not neighbour:
                break
            stop += 1
        return stop

    def _read_run(self, records: list[ColdRecord], places: list[Bytes]) -> None:
        first = records[0]
        if len(records) == 1:
            with self._lock:
                if first.pending is not None:
                    places[0][:] = first.pending[: first.nbytes]
                    self.counters.reads_from_write_queue += 1
                    return
        extent = self._extents[first.identity.layer, first.nbytes]
        whole = first.stored_bytes == first.nbytes
        into = places if whole else [aligned_buffer(first.stored_bytes)]
        try:
            extent.file.read(into, first.slot * first.nbytes)
        except EOFError as e:
            raise CorruptPageError(f"cold {first.identity} is missing: {e}") from e
        except OSError as e:
            raise ColdStoreError(
                e.errno or errno.EIO, f"cannot read cold {first.identity}: {e.strerror}"
            ) from e
        if not whole:
            unpack(first.identity, into[0], places[0])
        for record, page in zip(records, places, strict=True):
            if checksum(record.identity, page) != record.checksum:
                raise CorruptPageError(
                    f"cold {record.identity} does not match its checksum: {extent.file.path.name} "
                    f"was damaged or changed at byte {record.slot * record.nbytes:,}"
                )
        with self._lock:
            self.counters.bytes_read += sum(len(b) for b in into)
            self.counters.pages_read += len(records)

    # Life

    def _require_open(self) -> None:
        if self._closed:
            raise ClosedError("the cold tier is closed")

    def close(self) -> None:
        """Stop the threads, close and delete the files. Closing twice is fine."""
        if self._closed:
            return
        self._closed = True
        self._writer.shutdown(wait=True, cancel_futures=True)
        self._readers.shutdown(wait=True, cancel_futures=True)
        for extent in self._extents.values():
            extent.file.close()
        self._extents.clear()
        self._remove()

    def check(self) -> None:
        """Every file's slots obey the conservation law."""
        for extent in self._extents.values():
            extent.slots.check()
