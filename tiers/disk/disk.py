"""Every system call that the cold tier makes on files, behind one interface.

Each method is one call that may fail, with the meaning and the errors of the call it names.
Nothing is tried again here: an interrupted call, a short read or a short write is handled by who
called (`pagedkv.tiers.files`), so that a disk that fails on purpose can show what happens then.
"""

from __future__ import annotations

import ctypes
import errno
import os
import plistlib
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

if sys.platform == "darwin":
    from fcntl import F_FULLFSYNC, F_NOCACHE
from fcntl import LOCK_EX, LOCK_NB, fcntl, flock

Bytes = npt.NDArray[np.uint8]
Buffer = Bytes | memoryview

SAFE = os.O_CLOEXEC | os.O_NOFOLLOW
READ = os.O_RDONLY | os.O_NONBLOCK | SAFE  # a pipe in place of a file must not hang us
READ_WRITE = os.O_RDWR | SAFE
CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | SAFE
CREATE_OR_OPEN = os.O_RDWR | os.O_CREAT | SAFE
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | SAFE
"""What `Disk.open` is asked for; `O_DIRECT` may come on top of the ones that write."""

_EXCLUDED = b"com.apple.metadata:com_apple_backup_excludeItem"
_BY = plistlib.dumps("com.apple.backupd", fmt=plistlib.FMT_BINARY)

_STATFS = struct.Struct("<I20xQ")
"""Of what statfs(2) of macOS fills in: bytes of a block; blocks that we may still write."""

_STATFS_BYTES = 4096
"""More than it fills in."""


def _system() -> ctypes.CDLL:
    """The C library, for the few calls that Python does not have."""
    return ctypes.CDLL(None)


class Disk(Protocol):
    """What the cold tier needs of a file system. `RealDisk` is the one there is.

    Files are named by path when they are opened and by descriptor from then on. Every method may
    raise `OSError`; `InterruptedError` means that nothing was done. May be called from several
    threads at once.
    """

    def open(self, path: Path, flags: int) -> int:
        """Open, or make with mode 0600, for a descriptor; flags are `READ`, `CREATE` and so on."""
        ...

    def close(self, fd: int) -> None:
        """Close, giving up the lock as well. The descriptor is gone even if this raises."""
        ...

    def pread(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        """As preadv(2): fill the buffers from `offset`, perhaps in part; 0 is the end."""
        ...

    def pwrite(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        """As pwritev(2): write the buffers at `offset`, perhaps in part; returns the count."""
        ...

    def fstat(self, fd: int) -> os.stat_result:
        """Kind, owner, mode and size of an open file."""
        ...

    def lstat(self, path: Path) -> os.stat_result:
        """The same of a name, symbolic links not followed."""
        ...

    def truncate(self, fd: int, length: int) -> None:
        """Cut a file off, or lengthen it with zeros."""
        ...

    def sync(self, fd: int) -> None:
        """Of a file or a directory: return when a power failure cannot undo what was done to it."""
        ...

    def touch(self, fd: int) -> None:
        """Say that an open file is in use now, for those who remove what nobody uses."""
        ...

    def rename(self, old: Path, new: Path) -> None:
        """Give a file another name, in one step; a file of that name is replaced."""
        ...

    def unlink(self, path: Path) -> None:
        """Delete a file's name."""
        ...

    def mkdir(self, path: Path) -> None:
        """Make a directory, mode 0700."""
        ...

    def rmdir(self, path: Path) -> None:
        """Delete an empty directory."""
        ...

    def list(self, path: Path) -> list[str]:
        """The names in a directory, in any order."""
        ...

    def free_space(self, path: Path) -> int:
        """Bytes that we may still write on the file system of `path`."""
        ...

    def exclude_from_backup(self, path: Path) -> None:
        """Ask that a directory be left out of backups, where the system has such a mark.

        Never fails: what is backed up all the same is right, and a waste.
        """
        ...

    def lock(self, fd: int) -> None:
        """As flock(2), exclusive, without waiting: `BlockingIOError` if someone else holds it.

        Held until the descriptor is closed, by `close` or by the end of the process.
        """
        ...

    def bypass_cache(self, fd: int) -> bool:
        """Ask for I/O past the page cache (`F_NOCACHE`); whether the system has such a switch."""
        ...

    def drop_cache(self, fd: int, offset: int, length: int) -> None:
        """These bytes will not be wanted from the page cache."""
        ...


class RealDisk:
    """The operating system's files."""

    def open(self, path: Path, flags: int) -> int:
        """See `Disk.open`."""
        return os.open(path, flags, 0o600)

    def close(self, fd: int) -> None:
        """See `Disk.close`."""
        os.close(fd)

    def pread(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        """See `Disk.pread`."""
        views: list[Any] = list(buffers)
        return os.preadv(fd, views, offset)

    def pwrite(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        """See `Disk.pwrite`."""
        views: list[Any] = list(buffers)
        return os.pwritev(fd, views, offset)

    def fstat(self, fd: int) -> os.stat_result:
        """See `Disk.fstat`."""
        return os.fstat(fd)

    def lstat(self, path: Path) -> os.stat_result:
        """See `Disk.lstat`."""
        return path.lstat()

    def truncate(self, fd: int, length: int) -> None:
        """See `Disk.truncate`."""
        os.ftruncate(fd, length)

    def sync(self, fd: int) -> None:
        """See `Disk.sync`. On macOS fsync(2) stops at the drive's cache, `F_FULLFSYNC` does not."""
        if sys.platform == "darwin":
            try:
                fcntl(fd, F_FULLFSYNC)
            except OSError as e:
                if e.errno not in (errno.ENOTSUP, errno.EINVAL, errno.ENOTTY):
                    raise
                os.fsync(fd)  # what file systems without it have
        else:
            os.fsync(fd)

    def touch(self, fd: int) -> None:
        """See `Disk.touch`."""
        os.utime(fd)

    def rename(self, old: Path, new: Path) -> None:
        """See `Disk.rename`."""
        old.replace(new)

    def unlink(self, path: Path) -> None:
        """See `Disk.unlink`."""
        path.unlink()

    def mkdir(self, path: Path) -> None:
        """See `Disk.mkdir`."""
        path.mkdir(mode=0o700)

    def rmdir(self, path: Path) -> None:
        """See `Disk.rmdir`."""
        path.rmdir()

    def list(self, path: Path) -> list[str]:
        """See `Disk.list`."""
        return os.listdir(path)  # noqa: PTH208  # names are wanted, not paths

    def free_space(self, path: Path) -> int:
        """See `Disk.free_space`. statvfs(3) of macOS counts in 32 bits: no more than 16 TiB."""
        if sys.platform == "darwin":
            found = ctypes.create_string_buffer(_STATFS_BYTES)
            if _system().statfs(os.fsencode(path), found) == 0:
                block, available = _STATFS.unpack_from(found)
                return int(block * available)
        status = os.statvfs(path)
        return status.f_bavail * status.f_frsize

    def exclude_from_backup(self, path: Path) -> None:
        """See `Disk.exclude_from_backup`: the mark that `tmutil addexclusion` sets."""
        if sys.platform == "darwin":
            size, nothing = ctypes.c_size_t(len(_BY)), ctypes.c_uint32(0)
            _system().setxattr(os.fsencode(path), _EXCLUDED, _BY, size, nothing, 0)

    def lock(self, fd: int) -> None:
        """See `Disk.lock`."""
        flock(fd, LOCK_EX | LOCK_NB)

    def bypass_cache(self, fd: int) -> bool:
        """See `Disk.bypass_cache`."""
        if sys.platform == "darwin":
            fcntl(fd, F_NOCACHE, 1)
            return True
        return False

    def drop_cache(self, fd: int, offset: int, length: int) -> None:
        """See `Disk.drop_cache`."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)
