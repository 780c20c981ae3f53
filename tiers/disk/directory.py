"""The directories that cold files lie in: made, locked, looked at before use, and removed.

A private one is temporary: gone when it is closed, or when the next one is made after a process
was killed. A lasting one belongs to one process at a time.
"""

from __future__ import annotations

import errno
import gc
import os
import secrets
import stat
import tempfile
import time
import weakref
from contextlib import suppress
from pathlib import Path

import numpy as np

from pagedkv.allocator import ConfigError, StoreLockedError, UnsafeStoreError
from pagedkv.tiers.checkpoints.manifest import NOT_INDEXED
from pagedkv.tiers.disk.disk import CREATE_OR_OPEN, READ_WRITE, Disk
from pagedkv.tiers.disk.io import (
    NO_PERMISSIONS,
    again,
    keeps_permissions,
    open_private,
    reason,
    remove_file,
    require_private,
    sync_directory,
    told,
    write_exactly,
)

LOCK = "LOCK"
PREFIX = "pagedkv-cold-"
"""Begins the names of temporary directories."""

TOUCH_SECONDS = 3600

TRIES = 16
"""Directories that may vanish under our hands before we give up; each is another process's."""


class StoreDirectory:
    """A directory of cold files that this process holds alone, until `close`."""

    def __init__(self, path: Path, fd: int, disk: Disk, temporary: bool) -> None:
        self.path = path
        self.temporary = temporary
        self._disk, self._fd = disk, fd
        self._touched = time.monotonic()
        _held.add(self)
        self._remove = [temporary]
        self._held = disk, path, fd, self._remove, os.getpid()
        # Also when it is merely dropped, and at exit.
        self._close = weakref.finalize(self, _let_go, *self._held)

    @classmethod
    def make_temporary(cls, parent: str | None, disk: Disk) -> StoreDirectory:
        """Make a new one, and remove those that killed processes left beside it.

        Args:
            parent: where; the system's temporary directory if None.
            disk: the file system.

        Raises:
            ConfigError: if `parent` cannot be used.
        """
        where = Path(tempfile.gettempdir()) if parent is None else require_parent(parent, disk)
        remove_abandoned(where, disk)
        for _ in range(TRIES):
            path = where / f"{PREFIX}{secrets.token_hex(8)}{NOT_INDEXED}"
            try:
                again(disk.mkdir, path)
                fd = _lock(path, disk)
            except StoreLockedError:
                continue  # somebody who cleans up was quicker, and took it for abandoned
            except UnsafeStoreError:  # our own file is: nobody would remove it later
                with suppress(OSError):
                    _delete(disk, path)
                raise
            except OSError as e:
                raise _not_writable(where, e) from e
            if fd is not None:
                return cls(path, fd, disk, temporary=True)
        raise ConfigError(f"cold_dir {str(where)!r}: something removes every directory made there")

    @classmethod
    def open_lasting(cls, parent: str, name: str, disk: Disk) -> StoreDirectory:
        """Open one by name, or make it.

        Raises:
            ConfigError: if `parent` cannot be used.
            StoreLockedError: if another process has it open.
            UnsafeStoreError: if it is a link, somebody else's, or open to others.
            ColdStoreError: if the disk fails.
        """
        path = require_parent(parent, disk) / name
        with told(f"cannot open the store {path}"):
            _take_earlier_name(path, disk)
        for _ in range(TRIES):
            try:
                again(disk.mkdir, path)
                disk.exclude_from_backup(path)
            except FileExistsError:
                pass
            except OSError as e:
                raise _not_writable(path.parent, e) from e
            with told(f"cannot open the store {path}"):
                require_private(disk, path, again(disk.lstat, path), directory=True)
                try:
                    fd = _lock(path, disk)
                except StoreLockedError:
                    gc.collect()  # by a cache of ours, perhaps, that was dropped and not closed
                    fd = _lock(path, disk)
            if fd is not None:
                _sign(disk, fd)
                return cls(path, fd, disk, temporary=False)
        raise StoreLockedError(errno.EAGAIN, f"the store {path} is removed again and again")

    def require_held(self) -> None:
        """See that nobody else can have locked the directory meanwhile.

        Raises:
            StoreLockedError: if our lock is not the directory's any more.
            ColdStoreError: if the disk fails.
        """
        with told(f"cannot look at the lock of {self.path}"):
            try:
                named = again(self._disk.lstat, self.path / LOCK)
                held = os.path.samestat(again(self._disk.fstat, self._fd), named)
            except FileNotFoundError:
                held = False
        if not held:
            raise StoreLockedError(
                errno.EBUSY,
                f"the {LOCK} of the store {self.path} was removed or replaced while it was in use: "
                f"another process may write there. save() this cache to a file, close() it, and "
                f"keep other programs out of the cold_dir or name another",
            )

    def touch(self) -> None:
        """Say once an hour that the lock is in use: cleaners of temporary directories go by age.

        Without its lock a directory is taken for abandoned.
        """
        now = time.monotonic()
        if now - self._touched >= TOUCH_SECONDS:
            self._touched = now
            with suppress(OSError):
                again(self._disk.touch, self._fd)

    def close(self, remove: bool = False) -> None:
        """Let go of it, and delete it if it is temporary or `remove` says so."""
        _held.discard(self)
        self._remove[0] |= remove
        if self._close.alive:
            _let_go(*self._held)
            self._close.detach()  # only now: who was interrupted closes again


_held: weakref.WeakSet[StoreDirectory] = weakref.WeakSet()


def _leave_to_parent() -> None:
    """In a forked child: hold no lock, or the parent could not let go of it while we live."""
    for directory in list(_held):
        with suppress(OSError):
            directory._disk.close(directory._fd)
    _held.clear()


os.register_at_fork(after_in_child=_leave_to_parent)


def require_parent(parent: str, disk: Disk) -> Path:
    """A directory that others cannot exchange under our hands; made if it is missing.

    Raises:
        ConfigError: if it is a file, a symbolic link, or cannot be made.
        UnsafeStoreError: if anybody may rename what lies in it.
    """
    path = Path(parent)
    try:
        status = again(disk.lstat, path)
    except FileNotFoundError:
        try:
            for directory in _missing(path, disk):
                with suppress(FileExistsError):
                    again(disk.mkdir, directory)
                    _make_durable(directory.parent, disk)
            status = again(disk.lstat, path)
        except OSError as e:
            raise ConfigError(f"cold_dir {parent!r} cannot be created: {reason(e)}") from e
    except NotADirectoryError as e:
        raise ConfigError(f"cold_dir {parent!r} cannot be created: it lies below a file") from e
    except OSError as e:
        raise ConfigError(f"cold_dir {parent!r} cannot be used: {reason(e)}") from e
    if stat.S_ISLNK(status.st_mode):
        raise ConfigError(
            f"cold_dir {parent!r} is a symbolic link: name the directory it points to"
        )
    if not stat.S_ISDIR(status.st_mode):
        raise ConfigError(f"cold_dir {parent!r} is a file: name a directory")
    if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
        remedy = "chmod o-w it, or name another"
        if not keeps_permissions(disk, path):
            remedy = NO_PERMISSIONS
        raise UnsafeStoreError(
            errno.EPERM,
            f"cold_dir {parent!r} has mode {stat.S_IMODE(status.st_mode):04o}: anybody may put "
            f"other files in the place of ours; {remedy}",
        )
    return path


def _missing(path: Path, disk: Disk) -> list[Path]:
    """The directories that are to be made for one that is not there, the outermost first."""
    missing = [path]
    for parent in path.parents:
        with suppress(FileNotFoundError):
            again(disk.lstat, parent)
            break
        missing.insert(0, parent)
    return missing


def remove_abandoned(parent: Path, disk: Disk) -> int:
    """Delete the temporary directories of killed processes; those in use are locked.

    Returns:
        How many there were.
    """
    removed = 0
    with suppress(OSError):
        for name in again(disk.list, parent):
            if name.startswith(PREFIX):
                with suppress(OSError):  # somebody else's, in use, or gone meanwhile
                    removed += _remove_if_abandoned(parent / name, disk)
    return removed


def bytes_below(path: Path, disk: Disk, leave_out: Path) -> int:
    """Bytes of all files in a directory and below, without those in `leave_out`.

    Raises:
        OSError: from the disk.
    """
    total, directories = 0, [path]
    while directories:
        directory = directories.pop()
        try:
            names = again(disk.list, directory)
        except (FileNotFoundError, PermissionError):
            continue  # gone meanwhile, or not ours to see
        for name in names:
            entry = directory / name
            with suppress(FileNotFoundError):
                status = again(disk.lstat, entry)
                if stat.S_ISDIR(status.st_mode):
                    directories += [entry] if entry != leave_out else []
                elif stat.S_ISREG(status.st_mode):
                    total += status.st_size
    return total


def _make_durable(directory: Path, disk: Disk) -> None:
    """See that a power failure does not undo a name that was just made in a directory.

    It happens once, so nobody is asked for his `durability`. Where we may not read, or the system
    cannot sync directories, it is not undone by us.
    """
    try:
        sync_directory(disk, directory)
    except OSError as e:
        if e.errno not in (errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOTSUP):
            raise


def _take_earlier_name(path: Path, disk: Disk) -> None:
    """Give a store that a version without `NOT_INDEXED` made the name that it has now.

    Raises:
        StoreLockedError: if such a version has it open.
        UnsafeStoreError: if it is a link, somebody else's, or open to others.
        OSError: from the disk.
    """
    earlier = path.with_name(path.name.removesuffix(NOT_INDEXED))
    with suppress(FileNotFoundError):
        again(disk.lstat, path)
        return
    try:
        require_private(disk, earlier, again(disk.lstat, earlier), directory=True)
    except FileNotFoundError:
        return
    if (fd := _lock(earlier, disk)) is not None:
        try:
            again(disk.rename, earlier, path)
        finally:
            disk.close(fd)
        disk.exclude_from_backup(path)


def _not_writable(where: Path, e: OSError) -> ConfigError:
    return ConfigError(
        f"cold_dir {str(where)!r} is not writable ({reason(e)}): choose another with cold_dir="
    )


def _lock(path: Path, disk: Disk) -> int | None:
    """A descriptor that holds the directory's lock; None if the directory vanished meanwhile.

    Raises:
        StoreLockedError: if another has it, with that one's process number.
    """
    lock = path / LOCK
    try:
        fd = open_private(disk, lock, CREATE_OR_OPEN)
    except FileNotFoundError:
        return None
    try:
        again(disk.lock, fd)
        if os.path.samestat(again(disk.fstat, fd), again(disk.lstat, lock)):
            return fd
    except BlockingIOError as e:
        message = _locked(path, _signature(disk, fd))
        disk.close(fd)
        raise StoreLockedError(errno.EAGAIN, message) from e
    except FileNotFoundError:
        pass
    except BaseException:
        disk.close(fd)
        raise
    disk.close(fd)  # whoever removed it held the lock until now
    return None


def _locked(path: Path, pid: int | None) -> str:
    if pid == os.getpid():
        return (
            f"the store {path} is open in this process already: close() the caches that use it, "
            f"or name another cold_dir"
        )
    who = f"process {pid}" if pid else "another process"
    return f"the store {path} is in use by {who}: end that one first, or name another cold_dir"


def _sign(disk: Disk, fd: int) -> None:
    """Note our process number for those who find the lock held."""
    with suppress(OSError):  # on a full disk the store can still be read
        again(disk.truncate, fd, 0)
        write_exactly(disk, fd, [np.frombuffer(b"%d\n" % os.getpid(), np.uint8)], 0)


def _signature(disk: Disk, fd: int) -> int | None:
    buffer = np.zeros(20, np.uint8)
    with suppress(OSError, ValueError):
        count = again(disk.pread, fd, [buffer], 0)
        return int(buffer[:count].tobytes())
    return None


def _remove_if_abandoned(path: Path, disk: Disk) -> bool:
    require_private(disk, path, again(disk.lstat, path), directory=True)
    try:
        fd = open_private(disk, path / LOCK, READ_WRITE)
    except FileNotFoundError:
        again(disk.rmdir, path)  # killed before it was locked: nothing can be inside
        return True
    try:
        again(disk.lock, fd)
        _delete(disk, path)
    finally:
        disk.close(fd)
    return True


def _let_go(disk: Disk, path: Path, fd: int, remove: list[bool], pid: int) -> None:
    if os.getpid() != pid:
        return  # a forked child that ends: its parent still uses the directory, and has the lock
    with suppress(OSError):
        if remove[0]:
            _delete(disk, path)
    with suppress(OSError):
        disk.close(fd)


def _delete(disk: Disk, path: Path) -> None:
    """Delete a directory's files, the lock last, and the directory."""
    names = again(disk.list, path)
    for name in [*(n for n in names if n != LOCK), LOCK]:
        remove_file(disk, path / name)
    again(disk.rmdir, path)
