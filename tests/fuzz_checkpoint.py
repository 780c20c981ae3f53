"""Malformed files by the million: the readers refuse them with their own error, and cheaply.

    python -m tests.fuzz_checkpoint --inputs 1000000 --seed 1

Inputs are noise, damaged checkpoints, and checkpoints whose checksums are right and whose content
cannot be meant; some are packed pages and notes of bytes written. Nothing but the typed error may
come out, and no more memory be taken than a small multiple of the input. Ends at the first input
that breaks this, which is left in a file.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import stat
import sys
import tempfile
import time
import traceback
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

import pagedkv
from pagedkv.tiers import LayerState, PageIdentity, RealDisk, SequenceState, StoreIdentity
from pagedkv.tiers.checkpoints.file_format import (
    ENTRY,
    HEADER,
    MAGIC,
    VERSION,
    read_checkpoint,
    read_hot,
)
from pagedkv.tiers.cold.record import pack, unpack
from pagedkv.tiers.disk.directory import _signature
from pagedkv.tiers.disk.io import aligned_buffer
from pagedkv.tiers.disk.write_limit import read_written

TIMES, CONSTANT = 48, 64 * 1024
"""Bytes of memory that an input of n bytes may take: TIMES * n + CONSTANT. Python's smallest
objects take 24 times what JSON writes them with."""

PATH = Path("/nowhere/sequence-0123456789abcdef.checkpoint")
NUMBERS = (0, 1, 2, 63, 64, 255, 2**16, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)
VALUES: tuple[Any, ...] = (
    *NUMBERS, -1, 10**30, 1.5, float("nan"), float("inf"), True, False, None, "", "x", "\ud800",
    "float32", "0123456789abcdef", [], {}, [[]], [1, 2], {"layer": 1}, "9" * 50, 300, 512, 7,
)  # fmt: skip


class MemoryDisk(RealDisk):
    """One file, of these bytes, whatever its name."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def open(self, path: Path, flags: int) -> int:
        return -7

    def close(self, fd: int) -> None:
        pass

    def fstat(self, fd: int) -> os.stat_result:
        return os.stat_result(
            (stat.S_IFREG | 0o600, 1, 1, 1, os.geteuid(), 0, len(self.content), 0, 0, 0)
        )

    def pread(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        done = 0
        for buffer in buffers:
            part = self.content[offset + done : offset + done + len(buffer)]
            memoryview(buffer)[: len(part)] = part
            done += len(part)
        return done


def whole(layers: int, pages: int, hot: int) -> tuple[dict[str, Any], bytearray, bytes]:
    """Description, entries and hot tokens of a good checkpoint."""
    tokens = pages * 256 + hot
    told = tuple(LayerState(i, 1, 64, 64, "float16", 256, hot, pages) for i in range(layers))
    identity = StoreIdentity("fuzz", layers, "K4V4", 4, None, None)
    state = SequenceState(identity, PATH.name[9:25], tokens, 1, told)
    entries = np.zeros(layers * pages, ENTRY)
    entries["layer"] = np.repeat(np.arange(layers), pages)
    entries["tokens"] = entries["page_tokens"] = 256
    entries["key_bits"] = entries["value_bits"] = 4
    entries["page_bytes"], entries["stored_bytes"] = 32768, 16384
    entries["slot"] = np.arange(layers * pages)
    return json.loads(state.to_json()), bytearray(entries.tobytes()), bytes(state.hot_bytes)


def signed(text: bytes, entries: bytes, hot: bytes, version: int = VERSION) -> bytes:
    """A file whose checksums are right."""
    body = text + entries
    start = (MAGIC, version, len(text), len(body), len(hot), hashlib.sha256(hot).digest()[:16])
    zero = HEADER.pack(*start, bytes(16))
    return HEADER.pack(*start, hashlib.sha256(zero + body).digest()[:16]) + body + hot


GOOD = [whole(1, 0, 1), whole(1, 1, 0), whole(2, 2, 3), whole(3, 5, 1)]
FILES = [signed(json.dumps(state).encode(), bytes(e), hot) for state, e, hot in GOOD]
PACKED = pack(np.tile(np.arange(64, dtype=np.uint8), 1024))[:4096].tobytes()


# Mutations


def noise(random: Random) -> bytes:
    data = random.randbytes(random.choice((0, 1, 8, 63, 64, 65, 300, 2000)))
    return MAGIC + data if random.random() < 0.5 else data


def hurt(random: Random, data: bytearray) -> bytes:
    """Flip, overwrite, cut, repeat or insert, up to four times."""
    for _ in range(random.randrange(1, 5)):
        if not data:
            break
        at = random.randrange(min(len(data), 80) if random.random() < 0.4 else len(data))
        way = random.randrange(6)
        if way == 0:
            data[at] ^= 1 << random.randrange(8)
        elif way == 1:
            data[at] = random.randrange(256)
        elif way == 2:
            number = random.choice(NUMBERS).to_bytes(8, "little")[: random.choice((2, 4, 8))]
            data[at : at + len(number)] = number
        elif way == 3:
            del data[at : at + random.choice((1, 8, 64, 10**6))]
        elif way == 4:
            data[at:at] = data[at : at + random.randrange(1, 200)]
        else:
            data[at:at] = random.randbytes(random.randrange(1, 20))
    return bytes(data)


def change(random: Random, tree: Any) -> Any:
    """Another value, one key less or more, somewhere in the description."""
    if isinstance(tree, dict) and tree and random.random() < 0.9:
        key = random.choice(list(tree))
        if random.random() < 0.1:
            return {k: v for k, v in tree.items() if k != key}
        return {**tree, key: change(random, tree[key])}
    if isinstance(tree, list) and tree and random.random() < 0.9:
        at = random.randrange(len(tree))
        if random.random() < 0.2:
            return tree[:at] + tree[at:] * random.choice((0, 2, 3))
        return [*tree[:at], change(random, tree[at]), *tree[at + 1 :]]
    if isinstance(tree, int) and random.random() < 0.4:
        return tree + random.choice((-256, -1, 1, 256))
    return random.choice(VALUES)


BOMBS: list[Callable[[int], str]] = [
    lambda n: "[" * n,
    lambda n: '{"a":' * n,
    lambda n: "[" + "[]," * n + "[]]",
    lambda n: '{"layers":[' + "{}," * n + "{}]}",
    lambda n: "9" * n,
    lambda n: '"' + "\\u00e9" * n + '"',
    lambda n: "[" + "1.5," * n + "1]",
]


def lie(random: Random) -> bytes:
    """Right checksums over what cannot be meant."""
    state, entries, hot = random.choice(GOOD)
    tree, table, way = state, bytearray(entries), random.random()
    text: bytes | None = None
    if way < 0.05 and table:  # description and entries lie alike
        pages = np.frombuffer(table, ENTRY).copy()
        number = random.choice((255, 257, 300, 512, 1000, 1024))
        pages["page_tokens"] = number
        layers = [{**layer, "page_tokens": number} for layer in state["layers"]]
        tree, table = {**state, "layers": layers}, bytearray(pages.tobytes())
    elif way < 0.5:
        for _ in range(random.randrange(1, 3)):
            tree = change(random, tree)
    elif way < 0.85 and table:
        at = random.randrange(0, len(table), 4)
        number = random.choice(NUMBERS).to_bytes(8, "little")[: random.choice((1, 2, 4, 8))]
        table[at : at + len(number)] = number
    elif way < 0.95:
        text = hurt(random, bytearray(json.dumps(state).encode()))
    else:
        text = random.choice(BOMBS)(random.choice((10, 1000, 5000))).encode()
    if random.random() < 0.1:
        hot = hot[: random.randrange(len(hot) + 1)]
    if text is None:
        text = json.dumps(tree).encode()
    return signed(text, bytes(table), hot, random.choice((1,) * 9 + (2,)))


# What is asked to read them


def read_one(data: bytes) -> str:
    disk = MemoryDisk(data)
    try:
        checkpoint = read_checkpoint(disk, PATH)
        for _layer, _keys, _values in read_hot(disk, checkpoint):
            pass
    except pagedkv.CorruptStoreError as e:
        str(e).encode("utf-8", "backslashreplace")
        return "refused"
    str(checkpoint.state.identity), checkpoint.state.identity.digest
    return "read"


def unpack_one(data: bytes) -> str:
    out = aligned_buffer(65536)
    stored = aligned_buffer(max(4, len(data)))
    stored[: len(data)] = np.frombuffer(data, np.uint8)
    try:
        unpack(PageIdentity(bytes(16), 0, 0, 0, (4, 4, 256)), stored, out)
    except pagedkv.CorruptPageError:
        return "refused"
    return "read"


def note_one(data: bytes) -> str:
    disk = MemoryDisk(data)
    _signature(disk, -7)
    try:
        note = read_written(disk, -7, PATH)
    except pagedkv.CorruptStoreError:
        return "refused"
    assert min(note.day, note.count) >= 0
    return "read"


def one_input(random: Random) -> tuple[str, Callable[[bytes], str], bytes]:
    way = random.random()
    if way < 0.1:
        return "noise", read_one, noise(random)
    if way < 0.4:
        return "damaged", read_one, hurt(random, bytearray(random.choice(FILES)))
    if way < 0.9:
        return "signed", read_one, lie(random)
    if way < 0.97:
        return "packed page", unpack_one, hurt(random, bytearray(PACKED))
    return "note", note_one, hurt(random, bytearray(b"20000 123456\n"))


def problem(read: Callable[[bytes], str], data: bytes, traced: bool) -> str | None:
    """What is wrong with how an input is read; the outcome goes to `read.outcome`."""
    most = TIMES * len(data) + CONSTANT + (2 * 65536 if read is unpack_one else 0)
    if traced:
        gc.collect(0)
        tracemalloc.start()
    try:
        COUNTS[read(data)] += 1
    except Exception:
        return traceback.format_exc()
    finally:
        peak = tracemalloc.get_traced_memory()[1] if traced else 0
        if traced:
            tracemalloc.stop()
    return f"it took {peak:,} bytes, {most:,} are allowed" if peak > most else None


COUNTS: Counter[str] = Counter()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="at most")
    parser.add_argument("--traced", type=int, default=8, help="memory is measured for one in N")
    args = parser.parse_args(argv)
    random, started, kinds, done = Random(args.seed), time.monotonic(), Counter(), 0
    COUNTS.clear()
    while done < args.inputs and time.monotonic() - started < args.seconds:
        kind, read, data = one_input(random)
        wrong = problem(read, data, traced=done % args.traced == 0)
        if wrong:
            with tempfile.NamedTemporaryFile(prefix="fuzz-", delete=False) as file:
                file.write(data)
            print(f"{wrong}\ninput {done} of seed {args.seed} ({kind}, {len(data):,} bytes)")
            print(f"it is in {file.name}")
            return 1
        kinds[kind] += 1
        done += 1
    seconds = time.monotonic() - started
    print(", ".join(f"{n:,} {kind}" for kind, n in sorted(kinds.items())))
    print(f"{done:,} inputs in {seconds:.0f} s ({done / seconds:,.0f} a second), seed {args.seed}")
    print(f"{COUNTS['refused']:,} refused, {COUNTS['read']:,} read, none wrong")
    return 0


if __name__ == "__main__":
    sys.exit(main())
