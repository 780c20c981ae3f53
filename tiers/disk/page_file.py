"""A file of pages, past the page cache where the system can."""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Sequence
from pathlib import Path

from pagedkv.tiers.disk.disk import CREATE, READ_WRITE, Disk, RealDisk
from pagedkv.tiers.disk.io import (
    Bytes,
    again,
    open_private,
    read_exactly,
    remove_file,
    write_exactly,
)

DIRECT_UNIT = 4096
"""Where uncached I/O may begin: a request that stopped elsewhere goes on from the unit before."""


class PageFile:
    """A file of aligned records, read and written past the page cache where the system can.

    `F_NOCACHE` on macOS, `O_DIRECT` on Linux file systems that have it; else plain I/O with the
    pages dropped from the cache after use. Offsets, sizes and buffers are multiples of 16 KiB.
    """

    def __init__(self, path: Path, disk: Disk | None = None, create: bool = True) -> None:
        """Create the file, which must not exist, or open it, which must be there.

        Raises:
            OSError: from the disk.
            UnsafeStoreError: if an existing file is a link, or not ours alone.
        """
        self.path = path
        self._disk = disk or RealDisk()
        self.direct = False
        self._fd = self._open(CREATE if create else READ_WRITE)
        self._close = weakref.finalize(self, self._disk.close, self._fd)  # also when dropped
        try:
            self.direct |= again(self._disk.bypass_cache, self._fd)
        except BaseException:
            self.close()
            raise

    def _open(self, flags: int) -> int:
        direct = getattr(os, "O_DIRECT", 0)
        if direct:
            try:
                fd = open_private(self._disk, self.path, flags | direct)
                self.direct = True
                return fd
            except OSError as e:
                if e.errno != errno.EINVAL:
                    raise
                if flags == CREATE:  # some systems create the file before they refuse
                    remove_file(self._disk, self.path)
        return open_private(self._disk, self.path, flags)

    @property
    def _unit(self) -> int:
        return DIRECT_UNIT if self.direct else 1

    @property
    def size(self) -> int:
        """Bytes from the first to the last."""
        return again(self._disk.fstat, self._fd).st_size

    def in_place(self) -> bool:
        """Whether the file is still the one of its name.

        Raises:
            OSError: from the disk.
        """
        try:
            named = again(self._disk.lstat, self.path)
        except FileNotFoundError:
            return False
        return os.path.samestat(again(self._disk.fstat, self._fd), named)

    def write(self, data: Bytes, offset: int) -> None:
        """Write all of `data` at `offset`."""
        self.write_several([data], offset)

    def write_several(self, pages: Sequence[Bytes], offset: int) -> None:
        """Write all of `pages`, one after the other, from `offset` on."""
        write_exactly(self._disk, self._fd, pages, offset, self._unit)
        self._forget(offset, sum(map(len, pages)))

    def read(self, buffers: Sequence[Bytes], offset: int) -> None:
        """Fill `buffers` one after the other from `offset`.

        Raises:
            EOFError: if the file ends before they are full.
        """
        read_exactly(self._disk, self._fd, buffers, offset, self._unit)
        self._forget(offset, sum(len(b) for b in buffers))

    def truncate(self, length: int) -> None:
        """Cut the file off."""
        again(self._disk.truncate, self._fd, length)

    def sync(self) -> None:
        """Return when a power failure cannot undo what was written."""
        again(self._disk.sync, self._fd)

    def _forget(self, offset: int, length: int) -> None:
        if not self.direct:
            again(self._disk.drop_cache, self._fd, offset, length)

    def close(self) -> None:
        """Close; closing twice is fine."""
        if self._close.alive:
            try:
                self._disk.close(self._fd)
            except OSError:
                self._close.detach()  # gone all the same
                raise
            self._close.detach()
            self._fd = -1
