"""The bytes written per day: one count, whoever writes, whatever the clock and the process do."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest

import pagedkv
from pagedkv.tiers.disk.disk import RealDisk
from pagedkv.tiers.disk.write_limit import DAY, WriteLimit
from tests.stores import empty_cache, fill, settings

LIMIT = 100_000


def limit(directory: Path | None, days: float = 20_000.5, per_day: int = LIMIT) -> WriteLimit:
    return WriteLimit(RealDisk(), directory, per_day, clock=lambda: days * DAY)


def charged(count: WriteLimit, step: int = 1000) -> int:
    """Write until it is refused; bytes written."""
    for n in range(0, 2 * LIMIT, step):
        try:
            count.charge(step)
        except OSError as e:
            if e.errno == errno.EDQUOT:
                return n
            raise
    raise AssertionError("there is no limit")


def test_other_settings_of_one_directory_count_together(tmp_path: Path) -> None:
    written = []
    for more in ({}, {"kv": "K8V8"}, {"sink_tokens": 8}):
        with empty_cache(settings(tmp_path, write_limit="500KB", **more)) as cache:
            with suppress(pagedkv.OutOfPagesError):
                fill(cache, *[256] * 20)
            written.append(cache.stats().nvme_bytes_written)
    assert 400_000 < sum(written) <= 500_000
    assert [path.name for path in tmp_path.iterdir()] == ["WRITTEN"]  # nothing was flushed


@pytest.mark.parametrize("kept", [True, False])
def test_many_writers_keep_one_limit(tmp_path: Path, kept: bool) -> None:
    used_before = 0 if kept else LIMIT - 60_000
    counts = [limit(tmp_path if kept else None, 20_001.5) for _ in range(4)]
    counts[0].charge(used_before)

    def write(number: int) -> int:
        random, done = Random(number), 0
        for _ in range(200):
            size = random.randrange(1, 900)
            with suppress(OSError):
                counts[number].charge(size)
                done += size
        return done

    with ThreadPoolExecutor(4) as threads:
        done = used_before + sum(threads.map(write, range(4)))
    assert 0.9 * LIMIT < done <= LIMIT
    for count in counts:
        count.close()
    rest = charged(limit(tmp_path if kept else None, 20_001.6), 1)
    assert done + rest == LIMIT  # what was reserved and not used is not lost


def test_killed_writers_have_noted_enough(tmp_path: Path) -> None:
    done = 0
    for _ in range(10):
        count = limit(tmp_path)  # and never closed
        with suppress(OSError):
            count.charge(7_000)
            done += 7_000
    assert done + charged(limit(tmp_path), 1) <= LIMIT
    (tmp_path / "WRITTEN.0123abcd.tmp").write_bytes(b"20000 ")
    limit(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["WRITTEN"]


def test_the_count_never_goes_down_within_a_day(tmp_path: Path) -> None:
    clock = [20_000.5]
    count = WriteLimit(RealDisk(), tmp_path, LIMIT, clock=lambda: clock[0] * DAY)
    count.charge(60_000)
    clock[0] = 19_999.9  # back by a day, in the same process
    count.charge(30_000)
    count.close()
    again = limit(tmp_path, 19_990)  # and in another one
    with pytest.raises(
        OSError, match=r"90,000 were written .* clock was ahead .*WRITTEN if it was"
    ):
        again.charge(20_000)
    assert charged(again) == 10_000
    assert charged(limit(tmp_path, 20_000.99)) == 0
    clock[0] = 20_001.0
    assert charged(count) == LIMIT  # a new day, in a process that was there the day before
    assert charged(limit(tmp_path, 20_002.1)) == LIMIT
    (tmp_path / "WRITTEN").unlink()
    assert charged(limit(tmp_path, 19_990)) == LIMIT


@pytest.mark.parametrize("content", [b"20000", b"20000 many", b"-1 5", b"20000 -5", b"1 2" * 40])
def test_a_count_that_cannot_be_read_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "WRITTEN"
    path.touch(0o600)
    limit(tmp_path)  # killed before the first note
    path.write_bytes(content)
    with pytest.raises(pagedkv.CorruptStoreError, match="WRITTEN.* is damaged: remove it to begin"):
        empty_cache(settings(tmp_path, write_limit="500KB"))
    empty_cache(settings(tmp_path)).close()  # has no limit
    path.chmod(0o644)
    with pytest.raises(pagedkv.UnsafeStoreError, match="WRITTEN has mode 0644"):
        empty_cache(settings(tmp_path, write_limit="500KB"))
    assert path.read_bytes() == content


def test_a_process_that_hangs_with_the_count_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pagedkv.tiers.disk.write_limit.PATIENCE", 0.1)
    count = limit(tmp_path)
    code = "import fcntl, sys; f = open(sys.argv[1], 'r+'); fcntl.flock(f, 2); print(); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "WRITTEN")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(pagedkv.StoreLockedError, match="WRITTEN is locked by another"):
            count.charge(1)
        holder.communicate(b"\n")
    count.charge(1)
    assert os.stat(tmp_path / "WRITTEN").st_mode & 0o777 == 0o600  # noqa: PTH116
