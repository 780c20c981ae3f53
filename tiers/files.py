"""Aligned memory, and file I/O that never stops half way, over `pagedkv.tiers.disk`."""

from __future__ import annotations

import errno
import mmap
import os
import secrets
import stat
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

from pagedkv.allocator import PAGE_ALIGNMENT, ColdStoreError, UnsafeStoreError
from pagedkv.tiers.disk import CREATE, DIRECTORY, READ_WRITE, Buffer, Disk, RealDisk

Bytes = npt.NDArray[np.uint8]
P = ParamSpec("P")
T = TypeVar("T")

DIRECT_UNIT = 4096
"""Where uncached I/O may begin: a request that stopped elsewhere goes on from the unit before."""

STUCK = 3
"""Requests without progress after which a file has ended, or does not take what is written."""

TEMPORARY = ".tmp"
"""Ends the names of files that are not complete yet."""


def aligned_buffer(nbytes: int) -> Bytes:
    """Anonymous memory aligned to the VM page (4 or 16 KiB), as direct I/O wants it."""
    size = -(-max(nbytes, 1) // PAGE_ALIGNMENT) * PAGE_ALIGNMENT
    return np.frombuffer(mmap.mmap(-1, size), np.uint8)[:nbytes]


def again(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Make a call of `Disk`, and make it again whenever a signal interrupted it."""
    while True:
        try:
            return call(*args, **kwargs)
        except InterruptedError:
            continue


def read_exactly(disk: Disk, fd: int, buffers: Sequence[Bytes], offset: int, unit: int = 1) -> None:
    """Fill buffers one after the other from `offset`.

    Raises:
        EOFError: if the file ends before they are full.
        OSError: from the disk.
    """

    def move(rest: Sequence[Buffer], at: int) -> int:
        return again(disk.pread, fd, rest, at)

    done, total = _transfer(move, buffers, offset, unit)
    if done < total:
        raise EOFError(f"the file ends at {offset + done}, {total - done} bytes short")


def write_exactly(
    disk: Disk, fd: int, buffers: Sequence[Bytes], offset: int, unit: int = 1
) -> None:
    """Write buffers one after the other at `offset`, all of them.

    Raises:
        OSError: from the disk, or if it takes nothing without saying why.
    """

    def move(rest: Sequence[Buffer], at: int) -> int:
        return again(disk.pwrite, fd, rest, at)

    done, total = _transfer(move, buffers, offset, unit)
    if done < total:
        raise OSError(errno.EIO, f"wrote {done} of {total} bytes at {offset}")


def _transfer(
    move: Callable[[Sequence[Buffer], int], int],
    buffers: Sequence[Bytes],
    offset: int,
    unit: int,
) -> tuple[int, int]:
    """Repeat short requests, each from a multiple of `unit`: bytes moved, and bytes in all."""
    total, done, stuck = sum(len(b) for b in buffers), 0, 0
    while done < total and stuck < STUCK:
        moved = max(0, move(_after(buffers, done), offset + done))
        if done + moved < total:
            moved -= (offset + done + moved) % unit
        stuck = 0 if moved > 0 else stuck + 1
        done += max(0, moved)
    return done, total


def _after(buffers: Sequence[Bytes], done: int) -> list[Buffer]:
    """What is left of the buffers after so many bytes."""
    rest: list[Buffer] = []
    for buffer in buffers:
        if done < len(buffer):
            rest.append(buffer[done:].data)
        done = max(0, done - len(buffer))
    return rest


@contextmanager
def told(what: str) -> Iterator[None]:
    """Turn the system's errors into ours, which say what could not be done."""
    try:
        yield
    except ColdStoreError:
        raise
    except OSError as e:
        raise ColdStoreError(e.errno or errno.EIO, f"{what}: {e.strerror or e}") from e


def require_private(path: Path, status: os.stat_result, directory: bool = False) -> None:
    """Check that a file or directory is what it seems, ours, and closed to everybody else.

    Raises:
        UnsafeStoreError: saying which of these it is not.
    """
    mode, kind = stat.S_IMODE(status.st_mode), "directory" if directory else "regular file"
    is_kind = stat.S_ISDIR if directory else stat.S_ISREG
    problem, remedy = None, "remove it, or name another cold_dir"
    if stat.S_ISLNK(status.st_mode):
        problem = "is a symbolic link"
    elif not is_kind(status.st_mode):
        problem = f"is no {kind}"
    elif status.st_uid != os.geteuid():
        problem = f"belongs to user {status.st_uid}, not to {os.geteuid()}"
    elif mode & 0o077:
        problem = f"has mode {mode:04o}: others may open it"
        remedy = f"if nobody did, chmod {'700' if directory else '600'} it"
    if problem:
        raise UnsafeStoreError(errno.EPERM, f"{path} {problem}; {remedy}")


def open_private(disk: Disk, path: Path, flags: int) -> int:
    """Open a file that must be ours alone.

    Raises:
        UnsafeStoreError: if it is a symbolic link, no regular file, or not private.
        OSError: from the disk.
    """
    try:
        fd = again(disk.open, path, flags)
    except OSError as e:
        if e.errno != errno.ELOOP:
            raise
        raise UnsafeStoreError(
            errno.ELOOP, f"{path} is a symbolic link; remove it, or name another cold_dir"
        ) from e
    try:
        require_private(path, again(disk.fstat, fd))
    except BaseException:
        disk.close(fd)
        raise
    return fd


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

    def write(self, data: Bytes, offset: int) -> None:
        """Write all of `data` at `offset`."""
        write_exactly(self._disk, self._fd, [data], offset, self._unit)
        self._forget(offset, len(data))

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
        self._fd = -1
        self._close()


def remove_file(disk: Disk, path: Path) -> None:
    """Delete a file; a missing one is fine."""
    with suppress(FileNotFoundError):
        again(disk.unlink, path)


def write_new(disk: Disk, path: Path, fill: Callable[[int], None], durable: bool) -> Path:
    """Write a file that is to be put in the place of `path` by `rename`, under another name.

    Args:
        disk: the file system.
        path: the name that it will have.
        fill: writes the content, given a descriptor.
        durable: return only when a power failure cannot undo it.

    Returns:
        The name it has now.

    Raises:
        OSError: from the disk, or what `fill` raises; the file is gone then.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
    try:
        fd = again(disk.open, temporary, CREATE)
        try:
            fill(fd)
            if durable:
                again(disk.sync, fd)
        finally:
            disk.close(fd)
    except BaseException:
        with suppress(OSError):  # whoever opens the store next does it
            remove_file(disk, temporary)
        raise
    return temporary


def put_in_place(disk: Disk, temporary: Path, path: Path, durable: bool) -> None:
    """Give a file from `write_new` its name: afterwards there is the old one or the new one.

    Raises:
        OSError: from the disk. Which of the two a crash would leave is not known then.
    """
    try:
        again(disk.rename, temporary, path)
    except BaseException:
        with suppress(OSError):
            remove_file(disk, temporary)
        raise
    if durable:
        sync_directory(disk, path.parent)


def replace_file(disk: Disk, path: Path, content: bytes, durable: bool) -> None:
    """Replace a small file in one step; see `write_new` and `put_in_place`."""
    data = np.frombuffer(content, np.uint8)
    fill = lambda fd: write_exactly(disk, fd, [data], 0)  # noqa: E731
    put_in_place(disk, write_new(disk, path, fill, durable), path, durable)


def sync_directory(disk: Disk, path: Path) -> None:
    """Return when a power failure cannot undo the names in a directory."""
    fd = again(disk.open, path, DIRECTORY)
    try:
        again(disk.sync, fd)
    finally:
        disk.close(fd)
