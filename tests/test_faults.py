"""The cold store over a disk that fails on purpose: never wrong, at worst absent."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import pagedkv
from pagedkv.tiers import RealDisk
from pagedkv.tiers.disk.disk import CREATE
from pagedkv.tiers.disk.io import read_exactly, replace_file, write_exactly
from pagedkv.tiers.disk.write_limit import Note, read_written
from pagedkv.tools.stress.faulty_disk import APPLIES, FaultyDisk
from tests import fault_campaign, fuzz_checkpoint
from tests.store_oracle import (
    NAMES,
    Held,
    Want,
    commit,
    fetch,
    hot_parts,
    open_store,
    put,
    snapshot,
    stored_pages,
)


def test_one_seed_gives_one_schedule(tmp_path: Path) -> None:
    seen = []
    for run in range(2):
        disk = FaultyDisk(RealDisk(), 7, dict.fromkeys(APPLIES, 0.05))
        with disk.quietly():
            fd = disk.open(tmp_path / f"{run}", CREATE)
        data = np.arange(8192, dtype=np.uint8)
        for i in range(200):
            try:
                write_exactly(disk, fd, [data.copy()], 8192 * (i % 7))
                read_exactly(disk, fd, [data.copy()], 8192 * (i % 5))
            except (OSError, EOFError):
                continue
        disk.close(fd)
        seen.append((disk.injected, (tmp_path / f"{run}").read_bytes()))
    assert seen[0] == seen[1]
    assert len(seen[0][0]) >= 12


@pytest.mark.parametrize("call", ["fstat", "open"])
def test_a_page_file_that_could_not_be_made_is_made_later(tmp_path: Path, call: str) -> None:
    """It was made, then looking at it failed: the next attempt found its own leftover."""
    disk = FaultyDisk(RealDisk())
    store = open_store(tmp_path, disk)
    want = Want(0, 4, 1)
    disk.arm("eio_other" if call == "fstat" else "emfile")
    with pytest.raises(pagedkv.ColdStoreError, match="cannot open"):
        put(store, want)
    fetch(store, [(want, put(store, want))])
    store.check()
    store.close()


@pytest.mark.parametrize("seed", [1, 4])  # as it is, and packed
def test_a_page_that_is_written_again_is_the_one_that_was_verified(
    tmp_path: Path, seed: int
) -> None:
    """After a failed fsync: what was verified was read once more, and that went to the disk."""
    disk = FaultyDisk(RealDisk())
    store = open_store(tmp_path, disk)
    held, want = Held(NAMES[0]), Want(0, 4, seed)
    held.pages[0].append((want, put(store, want)))
    disk.arm("fsync")
    with pytest.raises(pagedkv.ColdStoreError, match="durable"):
        commit(store, held, 1, durable=True)
    disk.arm("flip_read", after=1)
    with suppress(pagedkv.CorruptPageError):
        commit(store, held, 2, durable=True)
    with disk.quietly():
        fetch(store, held.pages[0])
    store.close()


def test_a_checkpoint_that_is_not_as_long_as_it_says_leaves_the_last_one(tmp_path: Path) -> None:
    store = open_store(tmp_path, RealDisk())
    held, want = Held(NAMES[0]), Want(0, 4, 1)
    held.pages[0].append((want, put(store, want)))
    first, _ = commit(store, held, 1, durable=False)
    state, _ = snapshot(held, 2)
    with pytest.raises(pagedkv.PagedKVError, match="bytes were described and"):
        store.sequences.commit(state, stored_pages(held), hot_parts(state)[:-1], False)
    assert store.sequences.load(NAMES[0]).state == first
    assert not list(store.directory.glob("*.tmp"))
    store.check()
    store.close()


def test_a_note_of_bytes_written_that_is_read_in_parts_is_read_whole(tmp_path: Path) -> None:
    """Half of its digits were a smaller number, and the limit of the day was forgotten."""
    disk = FaultyDisk(RealDisk(), 3)
    path = tmp_path / "WRITTEN"
    replace_file(disk, path, b"20000 123456789\n", durable=False)
    with path.open("rb") as file:
        for _ in range(8):
            disk.arm("short_read")
            assert read_written(disk, file.fileno(), path) == Note(20000, 123456789)


@pytest.mark.slow
def test_thousands_of_faults(capsys: pytest.CaptureFixture[str]) -> None:
    assert fault_campaign.main(["--faults", "600", "--seed", "7"]) == 0, capsys.readouterr().out


def test_thousands_of_malformed_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz_checkpoint.main(["--inputs", "3000", "--seed", "7"]) == 0, capsys.readouterr().out


@pytest.mark.slow
def test_dozens_of_killed_processes(tmp_path: Path) -> None:
    """In a process of its own: a fork must not inherit the threads of other tests."""
    command = [sys.executable, "-m", "tests.kill_campaign", "--kills", "20", "--seed", "7"]
    done = subprocess.run(
        [*command, "--where", str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
