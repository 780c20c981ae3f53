"""What a cold store must contain, beside the store: for the campaigns of faults and kills."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pagedkv.tiers import FileColdStore, LayerState, SequenceState, StoreIdentity
from pagedkv.tiers.checkpoints.file_format import Checkpoint, read_hot
from pagedkv.tiers.cold.record import ColdRecord
from pagedkv.tiers.disk.io import aligned_buffer

IDENTITY = StoreIdentity("campaign", 2, "K4V4", 4, None, None)
SHAPES = {0: (64, 64), 3: (64, 32)}
"""Key and value channels by layer: pages of 32 and 16 KiB at 4 bits, 64 and 48 at 16."""
PAGE_BYTES = {(0, 4): 32768, (3, 4): 16384, (0, 16): 65536, (3, 16): 49152}
TOKENS = 256
NAMES = ("00000000000000aa", "00000000000000bb", "00000000000000cc")
NOISE = np.frombuffer(np.random.default_rng(0).bytes(1 << 20), np.uint8)


class Violation(AssertionError):
    """The store did what it must never do."""


@dataclass(frozen=True)
class Want:
    """A page by what it must contain."""

    layer: int
    bits: int
    seed: int

    @property
    def nbytes(self) -> int:
        return PAGE_BYTES[self.layer, self.bits]

    def bytes(self) -> np.ndarray:
        """Noise, or (every fourth) what lz4 shrinks; no two pages are the same."""
        out = aligned_buffer(self.nbytes)
        if self.seed % 4:
            at = self.seed * 4099 % (len(NOISE) - self.nbytes)
            out[:] = NOISE[at : at + self.nbytes]
        else:
            out[:] = self.seed % 251
        out.reshape(-1, 4096)[:, :8] = np.frombuffer(self.seed.to_bytes(8, "little"), np.uint8)
        return out


@dataclass
class Held:
    """One sequence: its pages by layer, each with its record."""

    name: str
    pages: dict[int, list[tuple[Want, ColdRecord]]] = field(
        default_factory=lambda: {layer: [] for layer in SHAPES}
    )


Snapshot = tuple[SequenceState, tuple[Want, ...]]
"""What a checkpoint must give back."""


def snapshot(sequence: Held, moment: int) -> Snapshot:
    """The state of a sequence, as `flush` of a cache would describe it."""
    hot = 3 + moment % 5
    most = max(len(pages) for pages in sequence.pages.values())
    tokens = most * TOKENS + hot
    layers = tuple(
        LayerState(
            layer, 1, *SHAPES[layer], "float16", TOKENS, tokens - len(pages) * TOKENS, len(pages)
        )
        for layer, pages in sequence.pages.items()
    )
    state = SequenceState(IDENTITY, sequence.name, tokens, moment, layers)
    return state, tuple(want for pages in sequence.pages.values() for want, _ in pages)


def hot_parts(state: SequenceState) -> list[np.ndarray]:
    sizes = [n for layer in state.layers for n in (layer.key_bytes, layer.value_bytes)]
    at = state.flushed_at * 977 % (len(NOISE) // 2)
    return [np.resize(NOISE[at + i :], n) for i, n in enumerate(sizes)]


def stored_pages(sequence: Held) -> list[tuple[ColdRecord, int, int]]:
    return [
        (record, i * TOKENS, TOKENS)
        for pages in sequence.pages.values()
        for i, (_, record) in enumerate(pages)
    ]


def commit(store: FileColdStore, sequence: Held, moment: int, durable: bool) -> Snapshot:
    state, wants = snapshot(sequence, moment)
    store.sequences.commit(state, stored_pages(sequence), hot_parts(state), durable)
    return state, wants


def open_store(directory: Path, disk: Any, **others: Any) -> FileColdStore:
    given: dict[str, Any] = dict(budget=6 << 20, write_buffer_bytes=6 * 65536, **others)
    return FileColdStore(
        str(directory), layers=len(SHAPES), disk=disk, identity=IDENTITY, readers=2, **given
    )


def put(store: FileColdStore, want: Want) -> ColdRecord:
    layout = (want.bits, want.bits, TOKENS)
    return store.put(want.layer, want.seed % 2**31, layout, want.bytes())


def fetch(store: FileColdStore, pages: Sequence[tuple[Want, ColdRecord]]) -> None:
    """Fetch pages and compare every byte.

    Raises:
        Violation: if they are others than they must be.
        PagedKVError: from the store.
    """
    out = aligned_buffer(sum(want.nbytes for want, _ in pages))
    out[:] = 0x55
    store.fetch([record for _, record in pages], out).result(timeout=60)
    at = 0
    for want, record in pages:
        if not np.array_equal(out[at : at + want.nbytes], want.bytes()):
            raise Violation(f"{record.identity} came back wrong and without an error")
        at += want.nbytes


def match(checkpoint: Checkpoint, disk: Any, wanted: Snapshot) -> None:
    """Compare a checkpoint with what was committed, its hot tokens too.

    Raises:
        Violation: if it tells something else.
        PagedKVError: if its hot tokens cannot be read.
    """
    state, wants = wanted
    if checkpoint.state != state:
        raise Violation(f"sequence {state.sequence}: its checkpoint tells of another state")
    told = [(int(e["layer"]), int(e["key_bits"]), int(e["page"])) for e in checkpoint.entries]
    if told != [(w.layer, w.bits, w.seed % 2**31) for w in wants]:
        raise Violation(f"sequence {state.sequence}: its checkpoint lists other pages")
    parts = [part for _, *pair in read_hot(disk, checkpoint) for part in pair]
    if not all(np.array_equal(a, b) for a, b in zip(parts, hot_parts(state), strict=True)):
        raise Violation(f"sequence {state.sequence}: its hot tokens came back wrong")


def held_slots(store: FileColdStore) -> int:
    return sum(e.holders.total() for e in store._files._extents.values())


def idle_buffers(store: FileColdStore) -> int:
    """Bytes of write buffers that are not in use."""
    free = store._writer.buffers._free
    return sum(size * len(buffers) for size, buffers in free.items())
