"""The cold store: what goes in comes out, or an error says which page did not."""

from __future__ import annotations

import errno
import os
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import pagedkv
from pagedkv.tiers import ColdReader, FileColdStore
from pagedkv.tiers.cold.buffers import BufferPool
from pagedkv.tiers.disk.disk import RealDisk
from pagedkv.tiers.disk.io import aligned_buffer
from pagedkv.tiers.disk.page_file import PageFile
from tests.models import random_tokens, tiny_llama

PAGE = 2 * 16384
LAYOUT = (4, 4, 256)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FileColdStore]:
    store = FileColdStore(str(tmp_path), 64 * PAGE, 2, 4 * PAGE)
    yield store
    store.close()


def random_page(seed: int) -> np.ndarray:
    return np.frombuffer(np.random.default_rng(seed).bytes(PAGE), np.uint8)


def fetch(store: FileColdStore, *records: Any) -> np.ndarray:
    out = aligned_buffer(sum(r.nbytes for r in records))
    store.fetch(records, out).result()
    return out


def damage(store: FileColdStore, at: int, data: bytes) -> None:
    (file,) = store.directory.glob("*.kv")
    with file.open("r+b") as f:
        f.seek(at)
        f.write(data)


def test_a_page_that_is_cut_off_is_named_and_not_its_neighbour(store: FileColdStore) -> None:
    """They are read with one request."""
    records = [store.put(0, i, LAYOUT, random_page(i)) for i in range(4)]
    store.flush()
    (file,) = store.directory.glob("*.kv")
    with file.open("r+b") as f:
        f.truncate(2 * PAGE + 100)
    with pytest.raises(pagedkv.CorruptPageError, match="page 2 .* is missing"):
        fetch(store, *records)
    assert np.array_equal(fetch(store, *records[:2])[PAGE:], random_page(1))


def test_pages_come_back(store: FileColdStore) -> None:
    pages = [random_page(i) for i in range(20)]
    records = [store.put(0, i, LAYOUT, page) for i, page in enumerate(pages)]
    early = fetch(store, *records)  # some from the write queue, some from the file
    store.flush()
    late = fetch(store, *records[::-1])
    assert np.array_equal(early, np.concatenate(pages))
    assert np.array_equal(late, np.concatenate(pages[::-1]))
    assert store.counters.pages_written == 20
    assert store.counters.bytes_read >= 20 * PAGE


def test_compressible_pages_take_fewer_bytes_to_read(store: FileColdStore) -> None:
    page = np.zeros(PAGE, np.uint8)
    record = store.put(0, 0, LAYOUT, page)
    store.flush()
    assert record.stored_bytes == PAGE // 2
    assert np.array_equal(fetch(store, record), page)
    assert store.counters.bytes_read == PAGE // 2


@pytest.mark.parametrize("at", [0, 1, PAGE // 2, PAGE - 1])
def test_a_flipped_bit_is_found(store: FileColdStore, at: int) -> None:
    page = random_page(1)
    record = store.put(0, 7, LAYOUT, page)
    store.flush()
    damage(store, at, bytes([page[at] ^ 1]))
    with pytest.raises(pagedkv.CorruptPageError, match="layer 0 page 7 .*does not match"):
        fetch(store, record)


def test_a_valid_page_at_the_wrong_place_is_refused(store: FileColdStore) -> None:
    pages = [random_page(i) for i in range(2)]
    records = [store.put(0, i, LAYOUT, page) for i, page in enumerate(pages)]
    store.flush()
    damage(store, 0, pages[1].tobytes() + pages[0].tobytes())
    for record in records:
        with pytest.raises(pagedkv.CorruptPageError):
            fetch(store, record)


def test_a_stale_page_is_refused(store: FileColdStore) -> None:
    """The same page number in the same slot, but an older generation of it."""
    old = random_page(1)
    first = store.put(0, 0, LAYOUT, old)
    store.flush()
    store.free(first)
    second = store.put(0, 0, LAYOUT, random_page(2))
    store.flush()
    assert second.slot == first.slot
    damage(store, 0, old.tobytes())
    with pytest.raises(pagedkv.CorruptPageError):
        fetch(store, second)


def test_a_truncated_file_is_a_missing_page(store: FileColdStore) -> None:
    record = store.put(1, 3, LAYOUT, random_page(1))
    store.flush()
    (file,) = store.directory.glob("*.kv")
    os.truncate(file, PAGE // 2)
    with pytest.raises(pagedkv.CorruptPageError, match="layer 1 page 3 .*is missing"):
        fetch(store, record)


def test_a_damaged_lz4_block_is_found(store: FileColdStore) -> None:
    record = store.put(0, 0, LAYOUT, np.zeros(PAGE, np.uint8))
    store.flush()
    for garbage in (b"\xff" * 4, b"\x10\x00\x00\x00" + b"\xff" * 16, b"\x00" * 4):
        damage(store, 0, garbage)
        with pytest.raises(pagedkv.CorruptPageError):
            fetch(store, record)


def test_each_layer_keeps_to_its_share(store: FileColdStore) -> None:
    records = [store.put(0, i, LAYOUT, random_page(i)) for i in range(32)]
    assert store.room(0, PAGE) == 0
    assert store.room(1, PAGE) == 32
    with pytest.raises(pagedkv.OutOfPagesError, match="cold tier full: layer 0"):
        store.put(0, 32, LAYOUT, random_page(32))
    store.free(records[5])
    assert store.room(0, PAGE) == 1
    again = store.put(0, 33, LAYOUT, random_page(33))
    assert again.slot == records[5].slot
    assert np.array_equal(fetch(store, again), random_page(33))
    assert store.nbytes == 32 * PAGE
    store.check()


def test_reading_ahead_yields_in_order_and_reuses_its_memory(store: FileColdStore) -> None:
    pages = [random_page(i) for i in range(12)]
    records = [store.put(0, i, LAYOUT, page) for i, page in enumerate(pages)]
    store.flush()
    reader = ColdReader(store, 4 * PAGE)
    batches = [tuple(records[i : i + 2]) for i in range(0, 12, 2)]
    for _ in range(3):
        got = [buffer.copy() for buffer in reader.stream(batches[:3], batches[3:])]
        got += [buffer.copy() for buffer in reader.stream(batches[3:])]
        assert np.array_equal(np.concatenate(got), np.concatenate(pages))
    assert reader.nbytes <= 4 * PAGE
    assert reader.counters.hits + reader.counters.misses == 18
    reader.close()


def test_read_ahead_of_a_freed_page_is_forgotten(store: FileColdStore) -> None:
    records = [store.put(0, i, LAYOUT, random_page(i)) for i in range(3)]
    store.flush()
    reader = ColdReader(store, 4 * PAGE)
    list(reader.stream([(records[0],)], [(records[1],)]))
    store.free(records[1])
    reader.forget_freed()
    fresh = store.put(0, 9, LAYOUT, random_page(9))
    assert fresh.slot == records[1].slot
    (got,) = [b.copy() for b in reader.stream([(fresh,)])]
    assert np.array_equal(got, random_page(9))
    reader.close()


class WatchedDisk(RealDisk):
    """Notes how many bytes each request moves; writes wait for the gate."""

    def __init__(self) -> None:
        self.reads: list[int] = []
        self.writes: list[int] = []
        self.gate, self.arrived = threading.Event(), threading.Event()
        self.gate.set()

    def pread(self, fd: int, buffers: Any, offset: int) -> int:
        self.reads.append(sum(map(len, buffers)))
        return super().pread(fd, buffers, offset)

    def pwrite(self, fd: int, buffers: Any, offset: int) -> int:
        self.arrived.set()
        self.gate.wait()
        self.writes.append(sum(map(len, buffers)))
        return super().pwrite(fd, buffers, offset)


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[tuple[FileColdStore, WatchedDisk]]:
    disk = WatchedDisk()
    store = FileColdStore(str(tmp_path), 128 * PAGE, 2, 32 * PAGE, disk=disk)
    yield store, disk
    store.close()


def test_small_batches_are_read_together(watched: tuple[FileColdStore, WatchedDisk]) -> None:
    store, disk = watched
    pages = [random_page(i) for i in range(24)]
    records = [store.put(i // 16, i, LAYOUT, page) for i, page in enumerate(pages)]
    store.flush()
    reader = ColdReader(store, 20 * PAGE, depth=4)
    got = [b.copy() for b in reader.stream([(record,) for record in records])]
    assert np.array_equal(np.concatenate(got), np.concatenate(pages))
    assert reader.nbytes <= 20 * PAGE
    # The first one is wanted at once; the others come four by four, but never of two layers.
    assert sorted(disk.reads) == sorted(n * PAGE for n in (1, 4, 4, 4, 3, 4, 4))
    reader.close()


def test_damage_concerns_its_own_batch_alone(watched: tuple[FileColdStore, WatchedDisk]) -> None:
    """The others were read by the same request, and a page read ahead may have been freed."""
    store, _ = watched
    pages = [random_page(i) for i in range(6)]
    records = [store.put(0, i, LAYOUT, page) for i, page in enumerate(pages)]
    store.flush()
    damage(store, 4 * PAGE, b"damage")
    reader = ColdReader(store, 20 * PAGE)
    stream = reader.stream([(record,) for record in records])
    got = [next(stream).copy() for _ in range(4)]
    assert np.array_equal(np.concatenate(got), np.concatenate(pages[:4]))
    with pytest.raises(pagedkv.CorruptPageError, match="layer 0 page 4 "):
        next(stream)
    (last,) = [b.copy() for b in reader.stream([(records[5],)])]
    assert np.array_equal(last, pages[5])
    reader.close()


def test_pages_that_lie_together_are_written_together(
    watched: tuple[FileColdStore, WatchedDisk],
) -> None:
    store, disk = watched
    disk.gate.clear()
    pages = [random_page(i) for i in range(9)]
    pages[6] = np.zeros(PAGE, np.uint8)  # is packed, and so leaves a gap
    records = [store.put(0, 0, LAYOUT, pages[0])]
    assert disk.arrived.wait(30)  # alone: the others are put while it waits
    records += [store.put(0, i, LAYOUT, page) for i, page in enumerate(pages) if i]
    records.append(store.put(1, 0, LAYOUT, pages[0]))
    store.free(records[4])  # not to be written any more
    disk.gate.set()
    store.flush()
    assert disk.writes[1:] == [3 * PAGE, PAGE, PAGE // 2, 2 * PAGE, PAGE]
    kept = [i for i in range(9) if i != 4]
    got = fetch(store, *(records[i] for i in kept))
    assert np.array_equal(got, np.concatenate([pages[i] for i in kept]))
    assert store.counters.pages_written == 9
    assert store.counters.bytes_written == sum(disk.writes)
    store.check()


@pytest.mark.parametrize("staging", ["32MiB", 4 * 16384])
def test_a_decode_step_reads_every_cold_byte_once(
    staging: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "pagedkv.tiers.pages.layer_pager.RUN_TOKENS", 512
    )  # more batches of few tokens
    model = tiny_llama(layers=3)
    config = pagedkv.TierConfig(
        hot_tokens=64, sink_tokens=4, page_tokens=256, warm=200_000, cold="64MB", staging=staging
    )
    with pagedkv.wrap(model, config) as cache:
        mx.eval(model(random_tokens(2200), cache=cache))
        pager = cache.context.pager
        pager.cold.flush()

        def after(steps: int) -> int:
            for _ in range(steps):
                mx.eval(model(mx.array([[1]]), cache=cache))
            for ticket in pager.reader._tickets.values():
                ticket.done.result()
            return pager.cold.counters.bytes_read

        first = after(2)
        cold = cache.stats().cold.bytes
        assert cold >= 10 * 16384
        assert after(5) - first == 5 * cold
        assert cache.stats().cold.bytes == cold  # nothing was sealed meanwhile


def test_buffers_never_exceed_their_limit() -> None:
    pool = BufferPool(100_000)
    held = [pool.take(32768) for _ in range(3)]
    assert pool.take(32768) is None
    assert pool.nbytes == 3 * 32768
    for buffer in held:
        assert buffer is not None
        assert buffer.__array_interface__["data"][0] % 4096 == 0
        pool.give(buffer)
    assert pool.take(65536) is not None  # idle buffers of another size make way
    assert pool.nbytes <= 100_000
    with pytest.raises(ValueError, match="exceeds"):
        pool.take(100_001)


class FullDisk:
    """Stands in for what `PageFile` writes with: no space left after so many bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, space: int) -> None:
        self.space = space
        real = PageFile.write_several

        def write(file: PageFile, pages: list[np.ndarray], offset: int) -> None:
            if offset + sum(map(len, pages)) > self.space:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file.path))
            real(file, pages, offset)

        monkeypatch.setattr(PageFile, "write_several", write)


def test_a_full_disk_keeps_pages_in_memory_and_loses_none(
    store: FileColdStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FullDisk(monkeypatch, 2 * PAGE)
    records = [store.put(0, i, LAYOUT, random_page(i)) for i in range(2)]
    store.flush()
    records += [store.put(0, i, LAYOUT, random_page(i)) for i in range(2, 6)]
    store.flush()
    assert store.room(0, PAGE) == 0
    assert store.last_error is not None
    with pytest.raises(pagedkv.OutOfPagesError, match="No space left") as full:
        store.put(0, 6, LAYOUT, random_page(6))
    assert "4 pages (131,072 bytes) wait in memory" in str(full.value)
    for i, record in enumerate(records):
        assert np.array_equal(fetch(store, record), random_page(i))
    disk.space = 64 * PAGE  # somebody made room
    records.append(store.put(0, 6, LAYOUT, random_page(6)))
    store.flush()
    assert store.last_error is None
    assert all(r.pending is None for r in records)
    for i, record in enumerate(records):
        assert np.array_equal(fetch(store, record), random_page(i))


def test_decoding_goes_on_from_memory_when_the_disk_is_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_llama(layers=1)
    config = pagedkv.TierConfig(
        hot_tokens=64, sink_tokens=4, page_tokens=256, warm=100_000, cold="64MB", write_buffer=70000
    )
    tokens = random_tokens(68 + 256 * 20)

    def logits(cache: pagedkv.PagedCache, chunks: int) -> list[mx.array]:
        out = []
        for i in range(chunks):
            out.append(model(tokens[:, 256 * i : 256 * (i + 1)], cache=cache))
            mx.eval(out)
        return out

    with pagedkv.wrap(model, config) as cache:
        expected = logits(cache, 12)
        slots = cache.paged_layers[0]._pager._slabs
        page_bytes = next(iter(slots.values())).page_bytes
    FullDisk(monkeypatch, page_bytes)
    with pagedkv.wrap(model, config) as cache:
        # One page fits the disk, two the write buffers, the rest the warm slab.
        fits = next(iter(slots.values())).max_slots + 1 + 70000 // page_bytes
        actual = logits(cache, fits)
        for a, b in zip(actual, expected, strict=False):
            assert mx.array_equal(a, b).item()
        with pytest.raises(pagedkv.OutOfPagesError, match="No space left"):
            for i in range(fits, 20):
                mx.eval(model(tokens[:, 256 * i : 256 * (i + 1)], cache=cache))
        before = cache.offset
        assert cache.trim(before - 256 * 4) == before - 256 * 4
        again = model(tokens[:, 256 * 4 : 256 * 5], cache=cache)
        assert not mx.isnan(again).any().item()  # what was there stays readable
        assert cache.stats().write_errors > 0


def test_damage_reaches_the_caller_as_a_typed_error(tmp_path: Path) -> None:
    model = tiny_llama(layers=1)
    config = pagedkv.TierConfig(
        hot_tokens=64,
        sink_tokens=4,
        page_tokens=256,
        warm=100_000,
        cold="64MB",
        cold_dir=str(tmp_path),
    )
    with pagedkv.wrap(model, config) as cache:
        mx.eval(model(random_tokens(3000), cache=cache))
        pager = cache.context.pager
        pager.cold.flush()
        pager.reader.close()  # what was read ahead is still good; forget it
        (file,) = pager.cold.directory.glob("*.kv")
        content = bytearray(file.read_bytes())
        content[100] ^= 4
        file.write_bytes(content)
        with pytest.raises(pagedkv.CorruptPageError, match="layer 0 page"):
            mx.eval(model(mx.array([[1]]), cache=cache))


@pytest.mark.parametrize("kind", ["file", "link", "readonly"])
def test_bad_directories_are_refused_when_the_model_is_wrapped(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "cold"
    expected = {"file": "is a file", "link": "symbolic link", "readonly": "not writable"}[kind]
    if kind == "file":
        place.write_text("")
    elif kind == "link":
        place.symlink_to(tmp_path)
    else:
        place.mkdir(mode=0o500)
        if os.geteuid() == 0:
            place = Path("/proc")  # not even root makes directories there
    with pytest.raises(pagedkv.ConfigError, match=expected):
        pagedkv.wrap(tiny_llama(), pagedkv.TierConfig(cold_dir=str(place)))


def test_a_lock_in_use_does_not_grow_old(
    store: FileColdStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who cleans up temporary directories removes files that nobody used for days."""
    record = store.put(0, 0, LAYOUT, random_page(0))
    lock, hours = store.directory / "LOCK", iter((0.5, 1.5, 2.0, 2.6))
    started = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: started + 3600 * next(hours))
    for touched in (False, True, False, True):
        os.utime(lock, (0, 0))
        fetch(store, record)
        assert (lock.stat().st_mtime > 0) == touched


@pytest.fixture
def few_files() -> Iterator[int]:
    """A process that may have few files open, as one that a terminal of macOS starts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = len(os.listdir("/dev/fd")) + 12  # noqa: PTH208
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard))
    yield few
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_store_may_open_more_files_than_a_terminal_gives(
    few_files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_many(directory: str) -> None:
        with closing(FileColdStore(str(tmp_path / directory), 10**9, 40, 2**20)) as store:
            for layer in range(40):
                store.put(layer, 0, (4, 4, 256), np.zeros(16384, np.uint8))

    open_many("granted")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert few_files < soft <= hard or hard == resource.RLIM_INFINITY

    def refuse(*args: Any) -> None:
        raise ValueError("not allowed to raise maximum limit")

    resource.setrlimit(resource.RLIMIT_NOFILE, (few_files, hard))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    with pytest.raises(
        pagedkv.ColdStoreError, match=f"Too many open.*have {few_files}.: .*ulimit -n 4096"
    ):
        open_many("refused")
    monkeypatch.undo()


def test_files_are_private(store: FileColdStore) -> None:
    store.put(0, 0, LAYOUT, random_page(0))
    store.flush()
    (file,) = store.directory.glob("*.kv")
    assert oct(file.stat().st_mode & 0o777) == "0o600"
    assert oct(store.directory.stat().st_mode & 0o777) == "0o700"


def test_a_closed_store_says_so(store: FileColdStore) -> None:
    record = store.put(0, 0, LAYOUT, random_page(0))
    store.close()
    store.close()
    assert not store.directory.exists()
    with pytest.raises(pagedkv.ClosedError):
        store.put(0, 0, LAYOUT, random_page(0))
    with pytest.raises(pagedkv.ClosedError):
        store.fetch([record], np.zeros(PAGE, np.uint8))
    store.free(record)
