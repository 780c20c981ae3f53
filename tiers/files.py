"""Private directories, aligned memory, and positional file I/O that never stops half way."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import stat
import sys
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pagedkv.allocator import PAGE_ALIGNMENT, ColdStoreError, ConfigError

Bytes = npt.NDArray[np.uint8]


def aligned_buffer(nbytes: int) -> Bytes:
    """Anonymous memory aligned to the VM page (4 or 16 KiB), as direct I/O wants it."""
    size = -(-max(nbytes, 1) // PAGE_ALIGNMENT) * PAGE_ALIGNMENT
    return np.frombuffer(mmap.mmap(-1, size), np.uint8)[:nbytes]


def private_directory(parent: str | os.PathLike[str] | None) -> Path:
    """Make a new directory that only this user can enter.

    Args:
        parent: where; the system's temporary directory if None. Created if it is missing.

    Raises:
        ConfigError: if `parent` is a file, a symbolic link, or not writable.
    """
    if parent is not None:
        path = Path(parent)
        if path.is_symlink():
            raise ConfigError(
                f"cold_dir {str(path)!r} is a symbolic link: name the directory it points to"
            )
        if path.exists() and not path.is_dir():
            raise ConfigError(f"cold_dir {str(path)!r} is a file: name a directory")
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as e:
            raise ConfigError(f"cold_dir {str(path)!r} cannot be created: {e.strerror}") from e
    try:
        return Path(tempfile.mkdtemp(prefix="pagedkv-", dir=parent))  # mkdtemp makes it 0700
    except OSError as e:
        where = str(parent or tempfile.gettempdir())
        raise ConfigError(
            f"cold_dir {where!r} is not writable ({e.strerror}): choose another with cold_dir="
        ) from e


def remove_directory(path: Path) -> None:
    """Delete a directory made by `private_directory`; a missing one is fine."""
    shutil.rmtree(path, ignore_errors=True)


class PageFile:
    """A file of aligned records, read and written past the page cache where the system can.

    `F_NOCACHE` on macOS, `O_DIRECT` on Linux file systems that have it; else plain I/O with the
    pages dropped from the cache after use. Offsets, sizes and buffers are multiples of 16 KiB.
    """

    def __init__(self, path: Path) -> None:
        """Create the file, mode 0600; it must not exist."""
        self._flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        self.path = path
        self.direct = False
        self._fd = self._open(path)
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):
            os.close(self._fd)
            raise ColdStoreError(f"{path} is not a regular file")
        self._close = weakref.finalize(self, os.close, self._fd)  # also when merely dropped

    def _open(self, path: Path) -> int:
        direct = getattr(os, "O_DIRECT", 0)
        if direct:
            try:
                fd = os.open(path, self._flags | direct, 0o600)
                self.direct = True
                return fd
            except OSError as e:
                if e.errno != errno.EINVAL:
                    raise
                path.unlink(missing_ok=True)  # some systems create the file before they refuse
        fd = os.open(path, self._flags, 0o600)
        if sys.platform == "darwin":
            import fcntl

            fcntl.fcntl(fd, fcntl.F_NOCACHE, 1)
            self.direct = True
        return fd

    def write(self, data: Bytes, offset: int) -> None:
        """Write all of `data` at `offset`; short writes go on where they stopped."""
        view = data.data
        while view:
            done = os.pwrite(self._fd, view, offset)
            if done <= 0:
                raise OSError(errno.EIO, f"wrote nothing at {offset}", str(self.path))
            view, offset = view[done:], offset + done
        self._forget(offset - len(data), len(data))

    def read(self, buffers: Sequence[Bytes], offset: int) -> None:
        """Fill `buffers` one after the other from `offset`.

        Raises:
            EOFError: if the file ends before they are full.
        """
        total = sum(len(b) for b in buffers)
        views: list[Any] = [b.data for b in buffers]
        at = offset
        while views:
            done = os.preadv(self._fd, views, at)
            if done <= 0:
                raise EOFError(f"{self.path.name} ends at {at}, {offset + total - at} bytes short")
            at += done
            while views and done >= len(views[0]):
                done -= len(views.pop(0))
            if done:
                views[0] = views[0][done:]
        self._forget(offset, total)

    def _forget(self, offset: int, length: int) -> None:
        if not self.direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close; closing twice is fine."""
        self._fd = -1
        self._close()
