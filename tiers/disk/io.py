"""Aligned memory, and file I/O that never stops half way, over `pagedkv.tiers.disk`."""

from __future__ import annotations

import errno
import mmap
import os
import resource
import secrets
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

from pagedkv.allocator import PAGE_ALIGNMENT, ColdStoreError, UnsafeStoreError
from pagedkv.tiers.disk.disk import CREATE, DIRECTORY, Buffer, Disk

Bytes = npt.NDArray[np.uint8]
P = ParamSpec("P")
T = TypeVar("T")

MOST_BYTES = 2**30
"""In one request: macOS refuses 2 GiB and more."""

OPEN_FILES = 4096
"""Wanted for a process with stores: one of 100 layers may take 300, a server's clients as many."""

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
    """Repeat short requests, each from a multiple of `unit`: bytes moved, and bytes in all.

    None is for more than `MOST_BYTES`.
    """
    total, done, stuck = sum(len(b) for b in buffers), 0, 0
    while done < total and stuck < STUCK:
        moved = max(0, move(_after(buffers, done), offset + done))
        if done + moved < total:
            moved -= (offset + done + moved) % unit
        stuck = 0 if moved > 0 else stuck + 1
        done += max(0, moved)
    return done, total


def _after(buffers: Sequence[Bytes], done: int) -> list[Buffer]:
    """What is left of the buffers after so many bytes, `MOST_BYTES` of it."""
    rest: list[Buffer] = []
    room = MOST_BYTES
    for buffer in buffers:
        part = buffer[done : done + room]
        if len(part):
            rest.append(part.data)
            room -= len(part)
        done = max(0, done - len(buffer))
    return rest


def raise_file_limit() -> None:
    """Let this process open as many files as a store may need, one for each layer and page size.

    macOS gives 256 to what a terminal starts, and does not take "unlimited" for an answer. Where
    the system does not grant more, who opens too many is told (`told`).
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@contextmanager
def told(what: str) -> Iterator[None]:
    """Turn the system's errors into ours, which say what could not be done."""
    try:
        yield
    except ColdStoreError:
        raise
    except OSError as e:
        raise ColdStoreError(e.errno or errno.EIO, f"{what}: {reason(e)}{_advice(e)}") from e


def reason(e: OSError) -> str:
    """What the system said, for the text of another error."""
    return e.strerror or str(e) or type(e).__name__


def _advice(e: OSError) -> str:
    if e.errno != errno.EMFILE:
        return ""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return f" (this process may have {limit:,}): allow more, as with ulimit -n {OPEN_FILES}"


def require_private(
    disk: Disk, path: Path, status: os.stat_result, directory: bool = False
) -> None:
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
        if not keeps_permissions(disk, path.parent):
            remedy = NO_PERMISSIONS
    if problem:
        raise UnsafeStoreError(errno.EPERM, f"{path} {problem}; {remedy}")


NO_PERMISSIONS = (
    "this file system keeps no permissions, so chmod does not help (exFAT and FAT have none): "
    "format the disk as APFS or another file system that has them, or name another cold_dir"
)


def keeps_permissions(disk: Disk, directory: Path) -> bool:
    """Whether what is made in a directory has the mode that it was made with; True if not known."""
    made = directory / f"pagedkv-mode-{secrets.token_hex(8)}"
    try:
        again(disk.mkdir, made)
        try:
            return not stat.S_IMODE(again(disk.lstat, made).st_mode) & 0o077
        finally:
            again(disk.rmdir, made)
    except OSError:
        return True


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
        require_private(disk, path, again(disk.fstat, fd))
    except BaseException:
        disk.close(fd)
        raise
    return fd


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
    """Return when a power failure cannot undo the names in a directory.

    A link to one is followed (``/tmp`` is one on macOS): it is synced, and nothing in it trusted.
    """
    fd = again(disk.open, path.resolve(), DIRECTORY)
    try:
        again(disk.sync, fd)
    finally:
        disk.close(fd)
