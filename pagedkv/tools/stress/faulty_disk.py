"""A disk that fails on purpose, as a seed decides: for tests and `pagedkv stress`."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np

from pagedkv.tiers.disk.disk import Buffer, Bytes, Disk
from pagedkv.tiers.disk.io import aligned_buffer

BLOCK = 4096

SILENT = {
    "flip_write": "one bit of what is written",
    "zero": "zeros are written instead, whole or in part",
    "drop": "a write is not made",
    "misplace": "a write lands one record further or before",
    "stale": "after a write, another record of the file is again what it was before",
    "tear_4k": "only some 4 KiB blocks from the start are written",
    "tear_16k": "only some 16 KiB blocks from the start are written",
    "cut": "after a write the file ends somewhere inside of it",
}
"""Faults of pwrite that nobody is told of."""

ERRORS: dict[str, tuple[int, tuple[str, ...]]] = {
    "eio_read": (errno.EIO, ("pread",)),
    "eio_write": (errno.EIO, ("pwrite",)),
    "enospc": (errno.ENOSPC, ("pwrite", "mkdir", "truncate")),
    "fsync": (errno.EIO, ("sync",)),
    "rename": (errno.EIO, ("rename",)),
    "emfile": (errno.EMFILE, ("open",)),
    "eio_other": (
        errno.EIO,
        ("fstat", "lstat", "truncate", "unlink", "mkdir", "rmdir", "list", "free_space"),
    ),
}
"""Faults that the system tells: the error, and the calls that may have it."""

OTHERS: dict[str, tuple[str, ...]] = {
    "flip_read": ("pread",),
    "short_read": ("pread",),
    "short_write": ("pwrite",),
    "eintr": ("open", "pread", "pwrite", "sync", "rename", "fstat", "lstat", "list", "lock"),
    "slow": ("open", "pread", "pwrite", "sync", "rename"),
}

APPLIES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(SILENT, ("pwrite",)),
    **{kind: calls for kind, (_, calls) in ERRORS.items()},
    **OTHERS,
}
"""Every kind of fault, and the calls of `Disk` that may have it."""

_CALLS = [name for name in vars(Disk) if not name.startswith("_")]

REMEMBERED = 256
"""Earlier contents that `stale` can bring back."""


class Injection(NamedTuple):
    """One fault: its kind, the call, and the bytes of the file that it touched, if any."""

    kind: str
    call: str
    path: Path | None
    start: int = 0
    stop: int = 0


def _apply(
    buffers: Sequence[Buffer], at: int, change: Callable[[Bytes], None], only_first: bool = False
) -> None:
    """Change what lies in the buffers from byte `at` on."""
    for buffer in buffers:
        if at < len(buffer):
            change(np.frombuffer(buffer, np.uint8)[at:])
            if only_first:
                return
        at = max(0, at - len(buffer))


class FaultyDisk:
    """Another disk, with faults.

    Each method has a random sequence of its own, so that one seed gives the same faults for the
    same calls, whichever thread comes first.

    Attributes:
        injected: faults so far, by kind.
        log: the same one by one; whoever reads it may clear it.
        calls: calls so far, by name.
        dead: every call but `close` fails with EIO: the process is about to be given up.
    """

    def __init__(self, disk: Disk, seed: int = 0, rates: Mapping[str, float] | None = None) -> None:
        """Wrap a disk.

        Args:
            disk: where the calls go.
            seed: of the schedule.
            rates: probability of each kind in each call that may have it; others have none.
        """
        self.injected: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.log: list[Injection] = []
        self.dead = False
        self._disk = disk
        self._lock = threading.RLock()
        self._quiet = 0
        self._armed: tuple[str, int] | None = None
        self._paths: dict[int, Path] = {}
        self._before: dict[tuple[Path, int], list[bytes]] = {}
        self._random = {call: Random(f"{seed} {call}") for call in _CALLS}
        self._rates: dict[str, list[tuple[str, float]]] = {call: [] for call in _CALLS}
        for kind, rate in (rates or {}).items():
            for call in APPLIES[kind]:
                self._rates[call].append((kind, rate))

    def arm(self, kind: str, after: int = 0) -> None:
        """Give the next call that may have this fault the fault, or a later one, once."""
        self._armed = (kind, after)

    @contextmanager
    def quietly(self) -> Iterator[None]:
        """No faults in here, from any thread; the schedule stands still."""
        self._quiet += 1
        try:
            yield
        finally:
            self._quiet -= 1

    def _next(self, call: str) -> str | None:
        """The fault that a call is to have; errors are raised, all else is left to the caller."""
        with self._lock:
            self.calls[call] += 1
            if self.dead:
                raise OSError(errno.EIO, f"dead at {call}")
            kind = None if self._quiet else self._scheduled(call)
        if kind in ERRORS:
            number = ERRORS[kind][0]
            self._note(kind, call, None)
            raise OSError(number, f"{os.strerror(number)} (injected at {call})")
        if kind == "eintr":
            self._note(kind, call, None)
            raise InterruptedError(errno.EINTR, f"interrupted (injected at {call})")
        if kind == "slow":
            self._note(kind, call, None)
            time.sleep(0.0005)
            return None
        return kind

    def _scheduled(self, call: str) -> str | None:
        if self._armed is not None:
            kind, after = self._armed
            if call in APPLIES[kind]:
                self._armed = (kind, after - 1) if after else None
                if not after:
                    return kind
        if self._rates[call]:
            point = self._random[call].random()
            for kind, rate in self._rates[call]:
                if point < rate:
                    return kind
                point -= rate
        return None

    def _note(self, kind: str, call: str, fd: int | None, start: int = 0, stop: int = 0) -> None:
        with self._lock:
            self.injected[kind] += 1
            path = None if fd is None else self._paths.get(fd)
            self.log.append(Injection(kind, call, path, start, stop))

    # Calls with faults of their own

    def open(self, path: Path, flags: int) -> int:
        """See `Disk.open`."""
        self._next("open")
        fd = self._disk.open(path, flags)
        self._paths[fd] = path
        return fd

    def close(self, fd: int) -> None:
        """See `Disk.close`. Never fails: nothing in here depends on how it ends."""
        self._paths.pop(fd, None)
        self._disk.close(fd)

    def pread(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        """See `Disk.pread`."""
        kind = self._next("pread")
        count = self._disk.pread(fd, buffers, offset)
        if kind is None or count < 2:
            return count
        random = self._random["pread"]
        at = random.randrange(1, count)
        if kind == "short_read":
            self._note(kind, "pread", fd)
            _apply(buffers, at, lambda rest: rest.fill(0xAA))  # nobody may count on these
            return at
        if random.random() < 0.5:
            at = random.randrange(min(count, 1024))  # where headers are
        bit = np.uint8(1 << random.randrange(8))

        def flip(rest: Bytes) -> None:
            rest[0] ^= bit

        _apply(buffers, at, flip, only_first=True)
        self._note(kind, "pread", fd, offset + at, offset + at + 1)
        return count

    def pwrite(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        """See `Disk.pwrite`."""
        kind = self._next("pwrite")
        data = np.concatenate([np.frombuffer(b, np.uint8) for b in buffers])
        if kind == "short_write" and len(data) > 1:
            self._note(kind, "pwrite", fd)
            count = self._random["pwrite"].randrange(1, len(data))
            self._write(fd, data[: -(-count // BLOCK) * BLOCK], offset)
            return count
        if kind in SILENT:
            with self._lock:
                self._write_wrongly(kind, fd, data, offset)
            return len(data)
        self._remember(fd, len(data), offset)
        return self._disk.pwrite(fd, buffers, offset)

    def _write(self, fd: int, data: Bytes, offset: int) -> None:
        aligned = aligned_buffer(len(data))
        aligned[:] = data
        self._disk.pwrite(fd, [aligned], offset)

    def _write_wrongly(self, kind: str, fd: int, data: Bytes, offset: int) -> None:
        random, total = self._random["pwrite"], len(data)
        start, stop = offset, offset + total
        if kind == "flip_write":
            at = random.randrange(min(total, 1024) if random.random() < 0.5 else total)
            data[at] ^= 1 << random.randrange(8)
            start, stop = offset + at, offset + at + 1
        elif kind == "zero":
            data[random.choice((0, total // 2)) :] = 0
        elif kind in ("tear_4k", "tear_16k"):
            unit = BLOCK if kind == "tear_4k" else 4 * BLOCK
            data = data[: random.randrange(-(-total // unit)) * unit]
            start = offset + len(data)
        elif kind == "drop":
            data = data[:0]
        elif kind == "misplace":
            other = offset - total if random.random() < 0.5 and offset >= total else offset + total
            self._note_only(kind, fd, offset, offset + total)
            offset, start, stop = other, other, other + total
        if len(data):
            self._write(fd, data, offset)
        if kind == "cut":
            start = offset + random.randrange(total)
            stop = max(stop, self._disk.fstat(fd).st_size)
            self._disk.truncate(fd, start)
        elif kind == "stale":
            start, stop = self._restore(fd, random)
        self._note(kind, "pwrite", fd, start, stop)

    def _note_only(self, kind: str, fd: int, start: int, stop: int) -> None:
        """A second place that one fault touched."""
        self.log.append(Injection(kind, "also", self._paths.get(fd), start, stop))

    def _remember(self, fd: int, total: int, offset: int) -> None:
        path = self._paths.get(fd)
        if path is None or total % BLOCK or not any(k == "stale" for k, _ in self._rates["pwrite"]):
            return
        old = aligned_buffer(total)
        if self._disk.pread(fd, [old], offset) == total:
            with self._lock:
                self._before.setdefault((path, offset), []).append(old.tobytes())
                if len(self._before) > REMEMBERED:
                    del self._before[next(iter(self._before))]

    def _restore(self, fd: int, random: Random) -> tuple[int, int]:
        """Put an old record back into this file; the bytes that it touched."""
        places = [key for key in self._before if key[0] == self._paths.get(fd)]
        if not places:
            return 0, 0
        place = random.choice(places)
        old = np.frombuffer(random.choice(self._before[place]), np.uint8)
        self._write(fd, old, place[1])
        return place[1], place[1] + len(old)

    # Calls that fail or do not

    def fstat(self, fd: int) -> os.stat_result:
        """See `Disk.fstat`."""
        self._next("fstat")
        return self._disk.fstat(fd)

    def lstat(self, path: Path) -> os.stat_result:
        """See `Disk.lstat`."""
        self._next("lstat")
        return self._disk.lstat(path)

    def truncate(self, fd: int, length: int) -> None:
        """See `Disk.truncate`."""
        self._next("truncate")
        self._disk.truncate(fd, length)

    def sync(self, fd: int) -> None:
        """See `Disk.sync`."""
        self._next("sync")
        self._disk.sync(fd)

    def touch(self, fd: int) -> None:
        """See `Disk.touch`."""
        self._next("touch")
        self._disk.touch(fd)

    def rename(self, old: Path, new: Path) -> None:
        """See `Disk.rename`."""
        self._next("rename")
        self._disk.rename(old, new)

    def unlink(self, path: Path) -> None:
        """See `Disk.unlink`."""
        self._next("unlink")
        self._disk.unlink(path)

    def mkdir(self, path: Path) -> None:
        """See `Disk.mkdir`."""
        self._next("mkdir")
        self._disk.mkdir(path)

    def rmdir(self, path: Path) -> None:
        """See `Disk.rmdir`."""
        self._next("rmdir")
        self._disk.rmdir(path)

    def list(self, path: Path) -> list[str]:
        """See `Disk.list`."""
        self._next("list")
        return self._disk.list(path)

    def free_space(self, path: Path) -> int:
        """See `Disk.free_space`."""
        self._next("free_space")
        return self._disk.free_space(path)

    def exclude_from_backup(self, path: Path) -> None:
        """See `Disk.exclude_from_backup`."""
        self._disk.exclude_from_backup(path)

    def lock(self, fd: int) -> None:
        """See `Disk.lock`."""
        self._next("lock")
        self._disk.lock(fd)

    def bypass_cache(self, fd: int) -> bool:
        """See `Disk.bypass_cache`."""
        return self._disk.bypass_cache(fd)

    def drop_cache(self, fd: int, offset: int, length: int) -> None:
        """See `Disk.drop_cache`."""
        self._disk.drop_cache(fd, offset, length)
