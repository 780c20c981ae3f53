"""The file layer: what a disk does half, is interrupted in, or refuses, is made whole or told."""

from __future__ import annotations

import errno
import itertools
import os
import plistlib
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pagedkv.tiers.disk import disk as disk_module
from pagedkv.tiers.disk.disk import READ, RealDisk
from pagedkv.tiers.disk.io import (
    aligned_buffer,
    read_exactly,
    replace_file,
    write_exactly,
)
from pagedkv.tiers.disk.page_file import PageFile


class HalfDisk(RealDisk):
    """Moves at most so many bytes a call, and is interrupted before every other one."""

    def __init__(self, most: int) -> None:
        self.most, self.calls = most, 0

    def _interrupt(self) -> None:
        self.calls += 1
        if self.calls % 2:
            raise InterruptedError(errno.EINTR, "interrupted")

    def pread(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        self._interrupt()
        return super().pread(fd, [self._less(buffers)], offset)

    def pwrite(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        self._interrupt()
        return super().pwrite(fd, [self._less(buffers)], offset)

    def _less(self, buffers: Sequence[Any]) -> Any:
        return buffers[0][: self.most]


def pages(seed: int, nbytes: int = 65536) -> np.ndarray:
    buffer = aligned_buffer(nbytes)
    buffer[:] = np.frombuffer(np.random.default_rng(seed).bytes(nbytes), np.uint8)
    return buffer


class CountingDisk(RealDisk):
    """Refuses 2 GiB at once, as macOS does, and moves nothing."""

    def __init__(self) -> None:
        self.moved: list[tuple[int, int]] = []

    def pread(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        total = sum(map(len, buffers))
        if total > 2**31 - 1:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self.moved.append((offset, total))
        return total

    pwrite = pread


@pytest.mark.parametrize("move", [read_exactly, write_exactly])
@pytest.mark.parametrize("parts", [1, 3, 7])
@pytest.mark.parametrize("unit", [1, 4096])
def test_no_request_is_larger_than_a_system_takes(move: Any, parts: int, unit: int) -> None:
    disk, total, start = CountingDisk(), 5 * 2**30 + 4096, 7 * 4096
    memory = np.empty(total, np.uint8)  # never touched: it takes addresses only
    ends = [total * i // parts for i in range(parts + 1)]
    buffers = [memory[a:b] for a, b in itertools.pairwise(ends)]
    move(disk, 3, buffers, start, unit)
    at = start
    for offset, count in disk.moved:
        assert offset == at
        at += count
    assert at == start + total


@pytest.mark.parametrize("most", [4096, 16384, 20480])
def test_short_and_interrupted_requests_are_continued(tmp_path: Path, most: int) -> None:
    file = PageFile(tmp_path / "pages", HalfDisk(most))
    data = pages(0)
    file.write(data, 16384)
    out = [aligned_buffer(16384), aligned_buffer(49152)]
    file.read(out, 16384)
    assert np.array_equal(np.concatenate(out), data)
    assert file.size == 16384 + 65536
    file.close()
    file.close()


def test_a_disk_that_takes_nothing_is_an_error_and_no_hang(tmp_path: Path) -> None:
    class Stubborn(RealDisk):
        def pwrite(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
            return 0

    file = PageFile(tmp_path / "pages", Stubborn())
    with pytest.raises(OSError, match="wrote 0 of 65536 bytes at 0") as caught:
        file.write(pages(0), 0)
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize("length", [0, 1, 16384, 16385, 65535])
def test_a_file_that_ends_early_is_found(tmp_path: Path, length: int) -> None:
    path = tmp_path / "pages"
    file = PageFile(path)
    file.write(pages(0), 0)
    os.truncate(path, length)
    with pytest.raises(EOFError, match="bytes short"):
        file.read([aligned_buffer(65536)], 0)


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, durable: bool) -> None:
    path, old, new = tmp_path / "state", pages(1, 1000).tobytes(), pages(2, 700).tobytes()
    replace_file(RealDisk(), path, old, durable)

    class Broken(RealDisk):
        def __init__(self, call: str) -> None:
            def fail(*args: Any) -> Any:
                raise OSError(errno.EIO, f"{call} failed")

            setattr(self, call, fail)

    calls = ["open", "pwrite", "rename", *(["sync"] if durable else [])]
    for call in calls:
        with pytest.raises(OSError, match=f"{call} failed"):
            replace_file(Broken(call), path, new, durable)
        assert path.read_bytes() == old
        assert [p.name for p in tmp_path.iterdir()] == ["state"]
    replace_file(RealDisk(), path, new, durable)
    assert path.read_bytes() == new
    assert oct(path.stat().st_mode & 0o777) == "0o600"


def test_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"x" * 16384)
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for create in (True, False):
        with pytest.raises(OSError, match="link"):
            PageFile(tmp_path / "link", create=create)


def test_small_files_move_in_parts(tmp_path: Path) -> None:
    disk, parts = HalfDisk(5000), [pages(3, 10_000), pages(4, 3)]
    replace_file(disk, tmp_path / "state", np.concatenate(parts).tobytes(), durable=False)
    fd = disk.open(tmp_path / "state", READ)
    out = [np.zeros(9_999, np.uint8), np.zeros(4, np.uint8)]
    read_exactly(disk, fd, out, 0)
    disk.close(fd)
    assert np.array_equal(np.concatenate(out), np.concatenate(parts))
    with pytest.raises(OSError):
        write_exactly(disk, -1, parts, 0)


def test_free_space_beyond_what_macos_counts_in_32_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = 5 * 2**32

    def statfs(path: bytes, buffer: Any) -> int:
        struct.pack_into("<IiQQQ", buffer, 0, 4096, 2**20, 9 * blocks, 2 * blocks, blocks)
        return 0 if path == bytes(tmp_path) else -1

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(disk_module, "_system", lambda: SimpleNamespace(statfs=statfs))
    assert RealDisk().free_space(tmp_path) == 80 * 2**40
    assert 0 < RealDisk().free_space(tmp_path.parent) != 80 * 2**40


def test_the_mark_that_keeps_macos_from_backing_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []
    library = SimpleNamespace(setxattr=lambda *args: calls.append(args))
    monkeypatch.setattr(disk_module, "_system", lambda: library)
    RealDisk().exclude_from_backup(tmp_path)
    assert not calls  # not on Linux
    monkeypatch.setattr(sys, "platform", "darwin")
    RealDisk().exclude_from_backup(tmp_path)
    ((path, name, value, size, position, flags),) = calls
    assert (path, name) == (
        bytes(tmp_path),
        b"com.apple.metadata:com_apple_backup_excludeItem",
    )
    assert plistlib.loads(value) == "com.apple.backupd"
    assert (size.value, position.value, flags) == (len(value), 0, 0)
