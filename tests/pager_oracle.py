"""What the sequences of a pager must hold, in plain lists, and what their files look like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import mlx.core as mx
import numpy as np

from pagedkv.allocator import KVShape, Ladder, LayerLadders, PageGeometry, PageTable, Precision
from pagedkv.tiers import (
    ColdRecord,
    LayerPager,
    LayerState,
    Lineage,
    Pager,
    SequenceState,
    StoreIdentity,
    TierBudget,
)
from pagedkv.tiers.cold.record import pack
from tests.store_oracle import NOISE, Violation

TOKENS = 256
SINKS = 4
LADDER = Ladder.parse("fp16:512,K4V4")
NEAR, FAR = Precision(16, 16), Precision(4, 4)
SHAPES = (KVShape(1, 32, 32), KVShape(1, 64, 32))
"""Pages of 32 and 48 KiB at 16 bits, of which lz4 may make less, and of 16 at 4."""
IDENTITY = StoreIdentity("machine", len(SHAPES), str(LADDER), SINKS, TOKENS, None)
BUDGET = dict(warm_bytes=420 << 10, cold_bytes=1500 << 10, write_buffer_bytes=3 * (48 << 10))
STAGING = 6 * (48 << 10)
RUN = 2


@dataclass(frozen=True)
class Want:
    """A page by what it must contain: no two are alike."""

    layer: int
    precision: Precision
    seed: int


@lru_cache(maxsize=512)
def content(want: Want) -> np.ndarray:
    """The page's bytes: noise, or (every fourth) what lz4 shrinks."""
    nbytes = PageGeometry(SHAPES[want.layer], TOKENS, want.precision).page_bytes
    if want.seed % 4:
        at = want.seed * 4099 % (len(NOISE) - nbytes)
        out = NOISE[at : at + nbytes].copy()
    else:
        out = np.full(nbytes, want.seed % 251, np.uint8)
    out.reshape(-1, 4096)[:, :8] = np.frombuffer(want.seed.to_bytes(8, "little"), np.uint8)
    out.flags.writeable = False
    return out


@lru_cache(maxsize=512)
def on_disk(want: Want) -> bytes:
    """The page's record."""
    return pack(content(want)).tobytes()


def encoded(wants: Sequence[Want]) -> mx.array:
    """The pages as `LayerPager.seal` takes them."""
    return mx.array(np.stack([content(w).view(np.uint32) for w in wants]))


@dataclass(eq=False)
class Sequence_:
    """A sequence, and by layer what it must hold: each page and how many of its tokens count."""

    name: str
    lineage: Lineage
    tables: list[PageTable]
    wants: list[list[tuple[Want, int]]] = field(default_factory=lambda: [[] for _ in SHAPES])

    def tokens(self, layer: int) -> int:
        return sum(tokens for _, tokens in self.wants[layer])

    def trim(self, layer: int, tokens: int) -> None:
        """What `PageTable.trim` is to do."""
        pages = self.wants[layer]
        while tokens and pages:
            want, held = pages.pop()
            if held > tokens:
                pages.append((want, held - tokens))
            tokens -= min(tokens, held)


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint must give back."""

    state: SequenceState
    wants: tuple[tuple[tuple[Want, int], ...], ...]


def snapshot(sequence: Sequence_, moment: int) -> Snapshot:
    """A sequence as `PagedCache.flush` would describe it."""
    held = [sequence.tokens(layer) for layer in range(len(SHAPES))]
    tokens = max(held) + 3 + moment % 5
    layers = tuple(
        LayerState(
            layer,
            shape.kv_heads,
            shape.key_dim,
            shape.value_dim,
            "float16",
            TOKENS,
            tokens - held[layer],
            len(sequence.wants[layer]),
        )
        for layer, shape in enumerate(SHAPES)
    )
    state = SequenceState(IDENTITY, sequence.name, tokens, moment, layers)
    return Snapshot(state, tuple(map(tuple, sequence.wants)))


def hot_parts(state: SequenceState) -> list[np.ndarray]:
    sizes = [n for layer in state.layers for n in (layer.key_bytes, layer.value_bytes)]
    return [noise(state.flushed_at * 977 + i, n) for i, n in enumerate(sizes)]


def noise(seed: int, nbytes: int) -> np.ndarray:
    if nbytes > len(NOISE) // 2:
        return np.resize(NOISE, nbytes)
    at = seed % (len(NOISE) - nbytes)
    return NOISE[at : at + nbytes]


def make_pager(directory: Path, **others: object) -> tuple[Pager, list[LayerPager]]:
    """A pager on a store that lasts, and its layers; small enough to be full all the time."""
    most = max(PageGeometry(shape, TOKENS, NEAR).page_bytes for shape in SHAPES)
    given = dict(
        cold_dir=str(directory),
        ladders=LayerLadders(LADDER),
        hot_tokens=16,
        sink_tokens=SINKS,
        page_tokens=TOKENS,
    )
    budget = TierBudget(staging_bytes=16 * most, **BUDGET, **given)  # type: ignore[arg-type]
    pager = Pager(budget, len(SHAPES), identity=IDENTITY, **others)  # type: ignore[arg-type]
    layers = [pager.layer(i, shape, mx.float16) for i, shape in enumerate(SHAPES)]
    pager.budget = TierBudget(staging_bytes=STAGING, **BUDGET, **given)  # type: ignore[arg-type]
    for layer in layers:
        layer.pages_per_run = RUN  # short ones, that there are many
    return pager, layers


def traffic(pager: Pager) -> dict[str, int]:
    """What a pager did in its life."""
    moved, cold = pager.counters, pager.cold.counters
    return {
        "pages sealed": moved.sealed,
        "pages demoted": moved.demoted,
        "pages promoted": moved.promoted,
        "pages lowered": moved.lowered,
        "pages written": cold.pages_written,
        "pages read": cold.pages_read,
        "pages read before they were written": cold.reads_from_write_queue,
        "writes that failed": cold.write_errors,
    }


def is_damaged(pager: Pager, record: ColdRecord, want: Want) -> bool:
    """Whether the file has something else than the page that was written there."""
    name = f"layer-{want.layer:04d}-{record.nbytes // 1024}k.kv"
    path = pager.cold.directory / name
    if not path.exists():
        return True
    with path.open("rb") as f:
        f.seek(record.offset)
        return f.read(len(on_disk(want))) != on_disk(want)


def located(layer: LayerPager, sequence: Sequence_) -> list[tuple[object, Want]]:
    """A layer's pages of a sequence, each with what it must contain.

    Raises:
        Violation: if the table is not what it must be.
    """
    wants = sequence.wants[layer.layer]
    table = sequence.tables[layer.layer]
    found = [(layer.pages[e.page].precision, e.tokens) for e in table]
    if found != [(want.precision, tokens) for want, tokens in wants]:
        raise Violation(f"{sequence.name}, layer {layer.layer}: {found} is not {wants}")
    if table.tokens != sequence.tokens(layer.layer):
        raise Violation(f"{sequence.name}, layer {layer.layer}: {table.tokens} tokens")
    return [(layer.pages[e.page], want) for e, (want, _) in zip(table, wants, strict=True)]
