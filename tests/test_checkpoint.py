"""The checkpoint file: what is not whole is refused, and costs no more than its length."""

from __future__ import annotations

import json
import os
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pagedkv
from pagedkv.tiers import LayerState, RealDisk, SequenceState, StoreIdentity
from pagedkv.tiers.checkpoints.file_format import (
    ENTRY,
    HEADER,
    MAGIC,
    VERSION,
    Checkpoint,
    _checksum,
    file_bytes,
    read_checkpoint,
    read_hot,
    write_checkpoint,
)
from pagedkv.tiers.disk.disk import CREATE

PAGE = 32768
IDENTITY = StoreIdentity("mine", 2, "K4V4", 4, None, None)
STATE = SequenceState(
    IDENTITY,
    "0123456789abcdef",
    700,
    1,
    (
        LayerState(0, 1, 64, 64, "float16", 256, 188, 2),
        LayerState(3, 1, 64, 32, "bfloat16", 256, 188, 2),
    ),
)


def entries() -> np.ndarray:
    pages = np.zeros(4, ENTRY)
    pages["layer"] = [0, 0, 3, 3]
    pages["tokens"], pages["page_tokens"] = 256, 256
    pages["key_bits"] = pages["value_bits"] = 4
    pages["slot"] = [0, 5, 1, 0]
    pages["page_bytes"], pages["stored_bytes"] = [PAGE, PAGE, 16384, 16384], 16384
    pages["checksum"] = np.arange(64).reshape(4, 16)
    return pages


def hot(state: SequenceState) -> list[np.ndarray]:
    sizes = [n for layer in state.layers for n in (layer.key_bytes, layer.value_bytes)]
    return [np.full(n, i + 1, np.uint8) for i, n in enumerate(sizes)]


def write(path: Path, state: SequenceState = STATE, pages: Any = None) -> bytes:
    disk = RealDisk()
    path.unlink(missing_ok=True)
    fd = disk.open(path, CREATE)
    write_checkpoint(disk, fd, state, entries() if pages is None else pages, hot(state))
    disk.close(fd)
    return path.read_bytes()


def read(path: Path) -> Checkpoint:
    return read_checkpoint(RealDisk(), path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "one.checkpoint"


def test_what_is_written_is_read(path: Path) -> None:
    data = write(path)
    assert len(data) == file_bytes(STATE)
    checkpoint = read(path)
    assert checkpoint.state == STATE
    assert np.array_equal(checkpoint.entries, entries())
    parts = [part for _, *pair in read_hot(RealDisk(), checkpoint) for part in pair]
    assert all(np.array_equal(a, b) for a, b in zip(parts, hot(STATE), strict=True))


def test_the_format_has_not_changed_unnoticed(path: Path) -> None:
    """docs/format.md and every store in the world count on these."""
    data = write(path)
    assert (MAGIC, VERSION, HEADER.size, ENTRY.itemsize) == (b"PAGEDKV\n", 2, 64, 64)
    assert data[:16] == b"PAGEDKV\n" + b"\x02\x00\x00\x00" + len(STATE.to_json()).to_bytes(
        4, "little"
    )
    offsets = {name: ENTRY.fields[name][1] for name in ENTRY.names}
    assert offsets == {
        "layer": 0,
        "tokens": 4,
        "position": 8,
        "page": 16,
        "page_tokens": 20,
        "key_bits": 22,
        "value_bits": 23,
        "generation": 24,
        "slot": 32,
        "page_bytes": 40,
        "stored_bytes": 44,
        "checksum": 48,
    }
    assert IDENTITY.directory == "store-632508bd09ca6e8c6355869ddaead7a0.noindex"


def test_a_flipped_bit_anywhere_is_found(path: Path) -> None:
    data = write(path)
    dense = HEADER.size + len(STATE.to_json()) + 4 * ENTRY.itemsize
    places = [*range(dense), *range(dense, len(data), 997), len(data) - 1]
    for at in places:
        for bit in range(8) if at < HEADER.size else (at % 8,):
            damaged = bytearray(data)
            damaged[at] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(
                pagedkv.CorruptStoreError, match=r"one.checkpoint is damaged: it.*; remove"
            ):
                list(read_hot(RealDisk(), read(path)))


def test_a_file_cut_short_or_lengthened_is_found(path: Path) -> None:
    data = write(path)
    for length in [*range(0, 900, 7), len(data) - 1, len(data) + 1, 2 * len(data)]:
        path.write_bytes(data)
        os.truncate(path, length)
        with pytest.raises(pagedkv.CorruptStoreError, match="is damaged"):
            read(path)


@pytest.mark.parametrize("version", [1, 3])
def test_another_version_is_not_called_damaged(path: Path, version: int) -> None:
    data = bytearray(write(path))
    data[8] = version
    body = np.frombuffer(bytes(data), np.uint8)[HEADER.size : -STATE.hot_bytes]
    data[48:64] = _checksum(bytes(data[:48]) + bytes(16), body)
    path.write_bytes(data)
    with pytest.raises(
        pagedkv.CorruptStoreError, match=f"has version {version}, this pagedkv reads 2"
    ):
        read(path)


def change(**fields: Any) -> Any:
    def pages() -> np.ndarray:
        found = entries()
        for name, value in fields.items():
            found[name][1] = value
        return found

    return pages


@pytest.mark.parametrize(
    ("pages", "problem"),
    [
        (change(layer=3), "another layer"),
        (change(tokens=0), "holds 444 of 700 tokens"),
        (change(tokens=2**32 - 1), "holds 4,294,967,739 of 700"),
        (change(page_tokens=512), "another layer or size"),
        (change(key_bits=5), "unknown precision K5V4"),
        (change(key_bits=16, value_bits=16), "fp16 pages that are not 65,536"),
        (change(page_bytes=2**31), "are not 32,768 bytes long"),
        (change(stored_bytes=0), "impossible stored length"),
        (change(stored_bytes=PAGE + 16384), "impossible stored length"),
        (change(stored_bytes=1), "impossible stored length"),
    ],
)
def test_entries_that_cannot_be_are_refused_though_their_checksum_is_right(
    path: Path, pages: Any, problem: str
) -> None:
    write(path, pages=pages())
    with pytest.raises(pagedkv.CorruptStoreError, match=problem):
        read(path)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"tokens": -1}, "tokens is no number"),
        ({"tokens": True}, "tokens is no number"),
        ({"tokens": 1e9}, "tokens is no number"),
        ({"sequence": "../../etc/passwd"}, "sequence is not what it can be"),
        ({"layers": []}, "not one of each"),
        ({"layers": 7}, "layers is no list"),
        ({"layers": [1]}, "layers is no JSON object"),
        ({"identity": None}, "identity is no JSON object"),
        ({"flushed_at": 2**64}, "flushed_at is no number"),
        ("[" * 100_000, "no JSON"),
        ("9" * 10_000, "no JSON"),
        ("\xff", "no JSON object"),
    ],
)
def test_descriptions_that_cannot_be_are_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, problem: str
) -> None:
    text = json.dumps(
        {**json.loads(STATE.to_json()), **change} if isinstance(change, dict) else change
    )
    raw = text.encode() if isinstance(change, dict) or "\xff" in change else change.encode()
    with monkeypatch.context() as patch:
        patch.setattr(SequenceState, "to_json", lambda self: raw)
        write(path)
    with pytest.raises(pagedkv.CorruptStoreError, match=problem):
        read(path)


def test_layers_out_of_order_or_twice_are_refused(path: Path) -> None:
    for layers in (STATE.layers[::-1], STATE.layers[:1] * 2):
        write(path, replace(STATE, layers=layers))
        with pytest.raises(pagedkv.CorruptStoreError, match="not one of each, in order"):
            read(path)


def test_a_page_size_that_is_not_offered_is_damage(path: Path) -> None:
    """In entries and description alike: it was a ConfigError, and the store did not open."""
    layers = tuple(replace(layer, page_tokens=300) for layer in STATE.layers)
    pages = entries()
    pages["page_tokens"] = 300
    write(path, replace(STATE, layers=layers), pages)
    with pytest.raises(pagedkv.CorruptStoreError, match="page_tokens is none of"):
        read(path)


def test_a_header_that_lies_costs_no_memory(path: Path) -> None:
    write(path)
    data = path.read_bytes()
    tracemalloc.start()
    for field in (2**63, 2**40, 2**32):
        for at in (16, 24):  # bytes of body, bytes of hot arrays
            path.write_bytes(data[:at] + field.to_bytes(8, "little") + data[at + 8 :])
            with pytest.raises(pagedkv.CorruptStoreError, match="its header tells of"):
                read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * len(data)


def test_noise_is_refused(path: Path) -> None:
    rng = np.random.default_rng(0)
    good = write(path)
    for _ in range(300):
        noise = bytearray(good)
        for _ in range(rng.integers(1, 5)):
            at, length = rng.integers(0, len(good)), rng.integers(1, 40)
            noise[at : at + length] = rng.bytes(rng.integers(0, 40))
        path.write_bytes(noise)
        if bytes(noise) == good:
            continue
        with pytest.raises(pagedkv.CorruptStoreError):
            list(read_hot(RealDisk(), read(path)))
