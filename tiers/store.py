"""The cold tier: sealed pages on NVMe, written behind, read ahead, verified on every read.

The generation thread calls `put`, `free` and `fetch`; two small thread pools move the bytes.
Workers see numpy memory and files only, never an mlx array.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pagedkv.allocator import ClosedError, ConfigError, StoreLockedError
from pagedkv.tiers.checkpoints.committer import SequenceStore
from pagedkv.tiers.checkpoints.index import Checkpoints
from pagedkv.tiers.checkpoints.manifest import StoreIdentity
from pagedkv.tiers.cold.disk_budget import DiskBudget
from pagedkv.tiers.cold.page_files import PageFiles
from pagedkv.tiers.cold.page_reads import PageReads
from pagedkv.tiers.cold.record import ColdRecord, PageIdentity
from pagedkv.tiers.cold.workers import ThreadWorkers, Workers
from pagedkv.tiers.cold.writer import ColdCounters, WriteBehind
from pagedkv.tiers.disk.directory import StoreDirectory, bytes_below
from pagedkv.tiers.disk.disk import Disk, RealDisk
from pagedkv.tiers.disk.io import raise_file_limit, told
from pagedkv.tiers.disk.write_limit import WriteLimit

Bytes = npt.NDArray[np.uint8]

CONTROL_BYTES = 4096
"""Kept free for the lock and the count of bytes written."""


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
        """Wait until everything put so far was tried to be written."""
        ...

    def close(self) -> None:
        """Stop the threads and delete what is ours and was not flushed."""
        ...


class FileColdStore:
    """Cold pages in files of one directory: one file per layer and page size.

    Writing is behind: `put` copies the page into a bounded pool of aligned buffers and returns;
    a page that is not on disk yet is read from its buffer. A store with an identity lasts: the
    sequences that were committed (see `sequences`) are there when it is opened again.
    """

    def __init__(
        self,
        parent: str | None,
        budget: int,
        layers: int,
        write_buffer_bytes: int,
        readers: int = 4,
        disk: Disk | None = None,
        identity: StoreIdentity | None = None,
        write_limit: int | None = None,
        workers: Workers | None = None,
    ) -> None:
        """Open a store.

        Args:
            parent: directory in which to make the store's; the temporary directory if None.
            budget: bytes of disk that everything under `parent` may take; pages share what
                other files leave, in equal parts for the layers.
            layers: number of layers.
            write_buffer_bytes: bytes of memory for pages on their way to the disk.
            readers: reading threads.
            disk: the file system; the real one if None.
            identity: of a store that lasts; None for one that is gone when it is closed.
            write_limit: bytes written per day, at most, by all stores below `parent` that have one.
            workers: who moves the bytes in the background; threads if None.

        Raises:
            ConfigError: if `parent` cannot be used.
            StoreLockedError: if another process has the store open.
            UnsafeStoreError, ColdStoreError: if what is there cannot be trusted or read.
        """
        raise_file_limit()
        self._disk = disk or RealDisk()
        self._directory = self._open_directory(parent, identity)
        self.directory = self._directory.path
        self.budget = DiskBudget(budget, layers)
        self.counters = ColdCounters()
        self._files = PageFiles(self.directory, self._disk, self.budget)
        try:
            if parent is not None:
                self._count_others()
            checkpoints = self._open_lasting(identity) if identity else None
            counted = self.directory.parent if parent is not None else None
            self._limit = WriteLimit(self._disk, counted, write_limit)
        except BaseException:
            self._files.close()
            self._directory.close()
            raise
        self._owner = identity.digest if identity else secrets.token_bytes(16)
        # A killed process may have used numbers after the last ones that a checkpoint tells of.
        self._generation = secrets.randbits(63) if identity else 0
        workers = workers or ThreadWorkers()
        self._writer = WriteBehind(
            self._files, self._limit, write_buffer_bytes, self.counters, workers
        )
        self._reads = PageReads(self._files, self._writer.lock, self.counters)
        self._sequences = (
            SequenceStore(checkpoints, self._files, self._writer, self._reads)
            if checkpoints
            else None
        )
        self.readers = readers
        self._readers = workers.executor("pagedkv-reader", readers)
        self._closed = self._let_go = False
        self._process = os.getpid()

    def _open_directory(self, parent: str | None, identity: StoreIdentity | None) -> StoreDirectory:
        if identity is None:
            return StoreDirectory.make_temporary(parent, self._disk)
        if parent is None:
            raise ConfigError("a store that lasts needs a directory: give cold_dir")
        return StoreDirectory.open_lasting(parent, identity.directory, self._disk)

    def _count_others(self) -> None:
        """Charge the budget with what others keep in the directory that was given to us."""
        with told(f"cannot look at {self.directory.parent}"):
            self.budget.foreign = bytes_below(self.directory.parent, self._disk, self.directory)

    def _open_lasting(self, identity: StoreIdentity) -> Checkpoints:
        self.budget.foreign += CONTROL_BYTES
        return Checkpoints(self.directory, identity, self._disk, self._files)

    @property
    def sequences(self) -> SequenceStore | None:
        """Its flushed sequences, if it lasts.

        Raises:
            StoreLockedError: see `inherited`.
        """
        self._require_ours()
        return self._sequences

    def require_held(self) -> None:
        """See that the store is still this process's alone; see `StoreDirectory.require_held`."""
        self._require_ours()
        self._directory.require_held()

    # Room

    @property
    def nbytes(self) -> int:
        """Bytes of disk taken: every page file at the largest size it reached, and checkpoints."""
        return self._files.nbytes + self.budget.checkpoints

    @property
    def buffer_bytes(self) -> int:
        """Bytes of memory in write buffers, free ones included."""
        return self._writer.buffers.nbytes

    @property
    def last_error(self) -> Exception | None:
        """Why the disk does not take pages at present; None while it does."""
        return None if self.inherited else self._writer.last_error

    def room(self, layer: int, page_bytes: int, growth: int | None = None) -> int:
        """Pages that can still be put: by the disk budget, or by memory while writes fail.

        Args:
            layer: layer number.
            page_bytes: size of the pages.
            growth: bytes by which the layer's files may still grow; all that is left if None.

        Raises:
            StoreLockedError: see `inherited`.
        """
        self._require_ours()
        growth = self.growth(layer) if growth is None else growth
        room = self._files.room(layer, page_bytes, growth)
        if self.last_error is not None and not self._writer.retry():
            return min(room, self._writer.buffers.room(page_bytes))
        return room

    def growth(self, layer: int) -> int:
        """Bytes by which the layer's files may still grow within its share."""
        return self._files.growth(layer)

    # Pages

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
            ColdStoreError: if a file cannot be made.
            StoreLockedError: see `inherited`.
            ClosedError: after `close`.
        """
        self._require_open()
        place = self._files.take(layer, len(data))
        try:
            buffer = self._writer.buffer(len(data))
        except BaseException:
            self._files.let_go([place])
            raise
        buffer[: len(data)] = data
        identity = PageIdentity(self._owner, layer, page, self._generation, layout)
        self._generation += 1
        record = ColdRecord(identity, len(data), place.slot, pending=buffer)
        self._writer.add(record)
        return record

    def free(self, record: ColdRecord) -> None:
        """Forget a page. Its slot stays as it is while a checkpoint refers to it."""
        if self.inherited:
            return
        if self._writer.drop(record) and not self._closed:
            self._files.let_go([record.place])

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
        self._reads.read(records, out)

    def flush(self) -> None:
        """Wait until every queued write was tried.

        Raises:
            StoreLockedError: see `inherited`.
        """
        self._require_ours()
        self._writer.wait()

    # Life

    @property
    def inherited(self) -> bool:
        """Whether this is a forked child's copy: the store is its parent's, and so is all in it.

        A child has neither the threads nor the lock; all that it may do is to `close`.
        """
        return os.getpid() != self._process

    def _require_ours(self) -> None:
        if self.inherited:
            raise StoreLockedError(
                errno.EBUSY,
                f"the store {self.directory} belongs to process {self._process}, and this one is "
                f"a fork of it: close this cache here, and make one after the fork, with another "
                f"cold_dir",
            )

    def _require_open(self) -> None:
        self._require_ours()
        if self._closed:
            raise ClosedError("the cold tier is closed")
        self._directory.touch()

    def close(self) -> None:
        """Stop the threads, close the files, and delete what was not flushed.

        Closing twice is fine, and completes a first time that was interrupted. A forked child
        closes its copies of the descriptors and leaves all else to its parent.
        """
        if self._let_go:
            return
        self._closed = True
        if self.inherited:
            self._files.close()
            return
        self._writer.close()
        self._readers.shutdown(wait=True, cancel_futures=True)
        with suppress(OSError):  # what cannot be cut off now is at the next opening
            if self._sequences and not self._sequences.checkpoints.damaged:
                self._files.trim(self._sequences.checkpoints.places())
        self._files.close()
        self._limit.close()
        nothing = self._sequences is not None and self._sequences.checkpoints.empty
        self._directory.close(remove=nothing)
        self._let_go = True

    def recover(self, records: Sequence[ColdRecord]) -> None:
        """Hold these pages, and those of checkpoints, and no others.

        For after an operation that was broken off: what it had taken is given back.
        """
        self._writer.keep(records)
        places = [record.place for record in records]
        if self._sequences:
            self._sequences.checkpoints.recover()
            places += self._sequences.checkpoints.places()
        self._files.hold_only(places)

    def check(self) -> None:
        """Every file's slots obey the conservation law."""
        self._files.check()
