"""How fast the cold directory's disk is, measured through the cold tier's own file layer."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pagedkv.allocator import ColdStoreError
from pagedkv.tiers.disk.directory import StoreDirectory
from pagedkv.tiers.disk.disk import RealDisk
from pagedkv.tiers.disk.io import aligned_buffer
from pagedkv.tiers.disk.page_file import PageFile

Bytes = npt.NDArray[np.uint8]

TEST_BYTES = 256_000_000
REQUEST_BYTES = 4 * 2**20
IN_FLIGHT = 4
"""Requests read at once, as the cold tier does."""

SECONDS = 2.0
"""Longest time spent in each direction."""


@dataclass(frozen=True)
class DiskRate:
    """A small sequential test.

    Attributes:
        nbytes: bytes written and read back.
        write_rate: bytes per second.
        read_rate: bytes per second.
        uncached: whether the page cache was bypassed; if not, reading may be overrated.
    """

    nbytes: int
    write_rate: float
    read_rate: float
    uncached: bool


def measure_disk(cold_dir: str | None, nbytes: int = TEST_BYTES) -> DiskRate:
    """Write, then read back, up to `nbytes` in a private directory; leaves nothing behind.

    Args:
        cold_dir: as in `TierConfig`.
        nbytes: at most; less on a slow disk, which is given two seconds each way.

    Raises:
        ConfigError: if the directory cannot be used.
        ColdStoreError: if the disk returns other bytes than were written.
        OSError: if it is full, or fails.
    """
    directory = StoreDirectory.make_temporary(cold_dir, RealDisk())
    try:
        file = PageFile(directory.path / "rate.kv")
        try:
            return _measure(file, nbytes)
        finally:
            file.close()
    finally:
        directory.close()


def _measure(file: PageFile, nbytes: int) -> DiskRate:
    source = aligned_buffer(REQUEST_BYTES)
    source[:] = np.random.default_rng(0).integers(0, 256, REQUEST_BYTES, np.uint8)
    requests = max(1, nbytes // REQUEST_BYTES)
    started, written = time.perf_counter(), 0
    while written < requests and (not written or time.perf_counter() - started < SECONDS):
        file.write(source, written * REQUEST_BYTES)
        written += 1
    file.sync()  # without it a cached write looks faster than the disk is
    write_seconds = time.perf_counter() - started
    targets = [aligned_buffer(REQUEST_BYTES) for _ in range(IN_FLIGHT)]
    for target in targets:
        target[:] = 0  # memory that was never written to is slow at first
    places = iter(range(written))

    def read(target: Bytes) -> int:
        done = 0
        for place in places:
            file.read([target], place * REQUEST_BYTES)
            done += 1
            if time.perf_counter() - started > SECONDS:
                break
        return done

    with ThreadPoolExecutor(IN_FLIGHT) as threads:
        started = time.perf_counter()
        counts = list(threads.map(read, targets))
        read_seconds = time.perf_counter() - started
    used = [target for target, count in zip(targets, counts, strict=True) if count]
    if not all(np.array_equal(source, target) for target in used):
        raise ColdStoreError(f"{file.path.parent} returns other bytes than were written to it")
    done = sum(counts)
    return DiskRate(
        written * REQUEST_BYTES,
        written * REQUEST_BYTES / write_seconds,
        done * REQUEST_BYTES / read_seconds,
        file.direct,
    )
