"""A limit on the bytes written per day, kept over restarts: flash wears out."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from pagedkv.tiers.disk import READ, Disk
from pagedkv.tiers.files import again, open_private, read_exactly, replace_file

WRITTEN = "WRITTEN"
DAY = 86_400
STEPS = 256
"""Into so many parts the limit is cut; each is noted before it is used, so that a killed process
has noted too much and never too little."""


class WriteLimit:
    """Counts what is written today (in UTC), and refuses what would be too much.

    Used by the writer thread and by the generation thread.
    """

    def __init__(
        self,
        disk: Disk,
        directory: Path | None,
        per_day: int | None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Take up where an earlier process stopped.

        Args:
            disk: the file system.
            directory: where the count is kept; None forgets it at the end.
            per_day: bytes; None for no limit, and then nothing is kept.
            clock: seconds since 1970.
        """
        self.per_day = per_day
        self._disk, self._clock = disk, clock
        self._path = directory / WRITTEN if directory and per_day is not None else None
        self._lock = threading.Lock()
        self._day = self._today()
        self.today = read_written(disk, self._path, self._day) if self._path else 0
        self._noted = self.today

    def charge(self, nbytes: int) -> None:
        """Count bytes that are about to be written.

        Raises:
            OSError: EDQUOT, with the numbers, if they are too many for today.
        """
        if self.per_day is None:
            return
        with self._lock:
            if self._today() != self._day:
                self._day, self.today, self._noted = self._today(), 0, 0
            if self.today + nbytes > self.per_day:
                raise OSError(
                    errno.EDQUOT,
                    f"write_limit of {self.per_day:,} bytes a day is reached, {self.today:,} "
                    f"were written since midnight UTC",
                )
            if self.today + nbytes > self._noted:
                self._note(self.today + nbytes + self.per_day // STEPS)
            self.today += nbytes

    def close(self) -> None:
        """Note the exact count."""
        with self._lock, suppress(OSError):
            if self._noted != self.today:
                self._note(self.today)

    def _today(self) -> int:
        return int(self._clock() // DAY)

    def _note(self, count: int) -> None:
        if self._path:
            replace_file(self._disk, self._path, b"%d %d\n" % (self._day, count), durable=False)
        self._noted = count


def read_written(disk: Disk, path: Path, day: int) -> int:
    """The bytes that a store noted for a day; 0 if it noted none, or the note is unreadable."""
    buffer = np.zeros(64, np.uint8)
    with suppress(OSError, EOFError, ValueError):
        fd = open_private(disk, path, READ)
        try:
            count = min(again(disk.fstat, fd).st_size, len(buffer))
            read_exactly(disk, fd, [buffer[:count]], 0)
        finally:
            disk.close(fd)
        noted, written = buffer[:count].tobytes().split()
        return max(0, int(written)) if int(noted) == day else 0
    return 0
