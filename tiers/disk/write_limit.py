"""A limit on the bytes written per day, kept over restarts: flash wears out."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pagedkv.allocator import CorruptStoreError, StoreLockedError
from pagedkv.tiers.disk.disk import CREATE_OR_OPEN, Disk
from pagedkv.tiers.disk.io import (
    TEMPORARY,
    again,
    open_private,
    read_exactly,
    remove_file,
    replace_file,
    told,
)

WRITTEN = "WRITTEN"
DAY = 86_400
STEPS = 256
"""Into so many parts the limit is cut; each is noted before it is used, so that a killed process
has noted too much and never too little."""

MOST_NOTE = 64
"""Bytes of a note, at most."""

PATIENCE, PAUSE = 10.0, 0.005
"""Seconds to wait for others who note something, and between two looks: they take milliseconds."""


@dataclass
class Note:
    """Bytes written, or about to be, on the last day on which there were any (since 1970, UTC)."""

    day: int = 0
    count: int = 0


_of_process = Note()
_of_process_lock = threading.Lock()


class WriteLimit:
    """Counts what is written today (in UTC), and refuses what would be too much.

    There is one count for all stores in a directory, whichever process has them, and one for the
    stores of a process that have none. It never goes down within a day: if the clock is set back,
    the day goes on that was noted.

    Used by the writer thread and by the generation thread.
    """

    def __init__(
        self,
        disk: Disk,
        directory: Path | None,
        per_day: int | None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Take up where others stopped.

        Args:
            disk: the file system.
            directory: where the count is kept; None for the one of this process.
            per_day: bytes; None for no limit, and then nothing is counted.
            clock: seconds since 1970.

        Raises:
            CorruptStoreError: if the count that is there cannot be read.
            UnsafeStoreError: if it is not ours alone.
            ColdStoreError: if the disk fails.
        """
        self.per_day = per_day
        self._disk, self._clock = disk, clock
        self._path = directory / WRITTEN if directory else None
        self._lock = threading.Lock()
        self._day = 0
        self._left = 0
        """Bytes that are noted for that day and not used yet."""

        if per_day is not None:
            with self._shared():
                self._clear_away()

    def charge(self, nbytes: int) -> None:
        """Count bytes that are about to be written.

        Raises:
            OSError: EDQUOT, with the numbers, if they are too many for today.
            ColdStoreError: if they cannot be noted.
        """
        if self.per_day is None:
            return
        with self._lock:
            today = int(self._clock() // DAY)
            if today > self._day or nbytes > self._left:
                self._reserve(nbytes, today)
            self._left -= nbytes

    def _reserve(self, nbytes: int, today: int) -> None:
        """Note that so many bytes, and some more, are about to be written."""
        assert self.per_day is not None
        with self._shared() as note:
            if today > note.day:
                note.day, note.count = today, 0
            if note.day > self._day:
                self._day, self._left = note.day, 0
            written = max(0, note.count - self._left)  # the note may have been removed
            fits = written + nbytes <= self.per_day
            if fits:
                self._left = min(nbytes + self.per_day // STEPS, self.per_day - written)
                note.count = written + self._left
        if not fits:
            ahead = self._day > today and self._path is not None
            hint = f"; the clock was ahead when it was counted: remove {self._path} if it was wrong"
            raise OSError(
                errno.EDQUOT,
                f"write_limit of {self.per_day:,} bytes a day is reached, {written:,} "
                f"were written since midnight UTC{hint if ahead else ''}",
            )

    def close(self) -> None:
        """Note the exact count."""
        with self._lock, suppress(OSError):
            if self._left:
                with self._shared() as note:
                    if note.day == self._day:
                        note.count = max(0, note.count - self._left)
                self._left = 0

    @contextmanager
    def _shared(self) -> Iterator[Note]:
        """The count of all, which nobody else changes meanwhile; what was changed is kept."""
        if self._path is None:
            with _of_process_lock:
                yield _of_process
            return
        with told(f"cannot count in {self._path} what is written"):
            fd = self._open_locked(self._path)
            try:
                note = read_written(self._disk, fd, self._path)
                before = Note(note.day, note.count)
                yield note
                if note != before:
                    content = b"%d %d\n" % (note.day, note.count)
                    replace_file(self._disk, self._path, content, durable=False)
            finally:
                self._disk.close(fd)

    def _open_locked(self, path: Path) -> int:
        """The file, locked. Whoever changes it puts another in its place: then ours is not it."""
        end = time.monotonic() + PATIENCE
        while True:
            fd = open_private(self._disk, path, CREATE_OR_OPEN)
            try:
                again(self._disk.lock, fd)
                if os.path.samestat(again(self._disk.fstat, fd), again(self._disk.lstat, path)):
                    return fd
            except (BlockingIOError, FileNotFoundError):
                pass
            except BaseException:
                self._disk.close(fd)
                raise
            self._disk.close(fd)
            if time.monotonic() > end:
                raise StoreLockedError(
                    errno.EAGAIN, f"{path} is locked by another process for {PATIENCE:.0f} s"
                )
            time.sleep(PAUSE)

    def _clear_away(self) -> None:
        """Remove what killed processes did not finish; nobody else is about to."""
        if self._path is None:
            return
        for name in again(self._disk.list, self._path.parent):
            if name.startswith(f"{WRITTEN}.") and name.endswith(TEMPORARY):
                remove_file(self._disk, self._path.with_name(name))


def read_written(disk: Disk, fd: int, path: Path) -> Note:
    """What was noted; nothing in a file that was just made.

    Args:
        disk: the file system.
        fd: of the file.
        path: its name.

    Raises:
        CorruptStoreError: if it is no such note.
        OSError: from the disk.
    """
    size = again(disk.fstat, fd).st_size
    if not size:
        return Note()
    buffer = np.zeros(min(size, MOST_NOTE), np.uint8)
    try:
        read_exactly(disk, fd, [buffer], 0)
        day, count = map(int, buffer.tobytes().split())
    except (EOFError, ValueError):
        day = count = -1
    if size > MOST_NOTE or day < 0 or count < 0:
        raise CorruptStoreError(
            errno.EBADMSG,
            f"{path}, the count of bytes written today, is damaged: remove it to begin at 0",
        )
    return Note(day, count)
