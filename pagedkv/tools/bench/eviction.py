"""A decode step while pages are on their way to the disk, beside the same step without."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from pagedkv.cache.paged_cache import PagedCache, attention
from pagedkv.tiers import ColdRecord, FileColdStore
from pagedkv.tools.bench.caches import rows_by_precision
from pagedkv.tools.bench.quiet import Neighbours
from pagedkv.tools.bench.result import Row, succeeded
from pagedkv.tools.bench.settings import AttentionShape, BenchSettings
from pagedkv.tools.bench.streaming import FEWEST_ROUNDS, filled
from pagedkv.tools.bench.timing import Deadline, Sample, quantile

BLOCK_STEPS = 100
LAYERS = 4
DISK = 2**30
TOKENS = 2048
QUEUED_SHARE = 0.75
"""Of the write buffers: filled up before each step, so that the writer never runs out of work."""


@dataclass
class _Steps:
    """Decode steps over a cache that is all warm; nothing is sealed while they are timed."""

    cache: PagedCache
    shape: AttentionShape
    layout: tuple[int, int, int] = field(init=False)
    page: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        heads, kv_heads, dim = self.shape.query_heads, self.shape.kv_heads, self.shape.dim
        sizes = [(1, heads, 1, dim), (1, kv_heads, 1, dim), (1, kv_heads, 1, dim)]
        self.tokens = [mx.random.normal(size, key=mx.random.key(i)) for i, size in enumerate(sizes)]
        mx.eval(self.tokens)
        layer = self.cache.paged_layers[0]
        (precision,) = {page.precision for page, _ in layer.located_pages()}
        self.layout = (precision.key_bits, precision.value_bits, 256)
        noise = np.random.default_rng(0)
        self.page = noise.integers(0, 256, layer.page_bytes(precision), np.uint8)
        self._records: list[ColdRecord] = []

    @property
    def _store(self) -> FileColdStore:
        return self.cache.context.pager.cold

    def step(self) -> float:
        """Seconds of one step: every layer appends a token and attends."""
        q, k, v = self.tokens
        started = time.perf_counter()
        out = q
        for layer in self.cache.paged_layers:
            out = attention(out, k, v, cache=layer, scale=self.shape.scale)
        mx.eval(out)
        seconds = time.perf_counter() - started
        self.cache.trim(1)
        return seconds

    def block(self, evicting: bool) -> tuple[list[float], float]:
        """Seconds of each of some steps, and bytes written in that time per second of it.

        Args:
            evicting: keep the write queue full.
        """
        written, times = self._store.counters.bytes_written, list[float]()
        for _ in range(BLOCK_STEPS):
            if evicting:
                self._evict()
            times.append(self.step())
        written = self._store.counters.bytes_written - written
        self._store.flush()
        self._forget(self._records)
        return times, written / sum(times)

    def _evict(self) -> None:
        """Put pages until the write buffers are nearly full, in place of those that are written."""
        self._forget([record for record in self._records if record.pending is None])
        room = QUEUED_SHARE * self.cache.context.pager.budget.write_buffer_bytes
        while (len(self._records) + 1) * len(self.page) <= room:
            self.page[:8] += 1  # no two are alike
            layer = len(self._records) % LAYERS
            self._records.append(self._store.put(layer, 10**6, self.layout, self.page))

    def _forget(self, records: list[ColdRecord]) -> None:
        for record in list(records):
            self._records.remove(record)
            self._store.free(record)


def measure_eviction(
    shape: AttentionShape, settings: BenchSettings, base: Row, deadline: Deadline
) -> list[Row]:
    """Time decode steps while the write queue is full and while it is empty, in turns.

    This is the worst case: a model evicts a page of each layer every 256 steps or so.

    Args:
        shape: of a layer.
        settings: precisions, rounds, tiers.
        base: entries that all rows have.
        deadline: nothing new is begun after it.

    Returns:
        A row for each precision. ``p50`` and ``p99`` are over those of the blocks without eviction
        that were timed next to them.
    """

    def measure(settings: BenchSettings, row: Row) -> Row:
        with filled(shape, LAYERS, TOKENS, settings, cold=False, disk=DISK) as cache:
            return _eviction(cache, shape, settings, row, deadline)

    return rows_by_precision(settings, base, measure)


def _eviction(
    cache: PagedCache, shape: AttentionShape, settings: BenchSettings, row: Row, deadline: Deadline
) -> Row:
    steps, others = _Steps(cache, shape), Neighbours()
    plain: list[list[float]] = []
    evicting: list[list[float]] = []
    rates: list[float] = []
    steps.block(True)
    for turn in range(settings.rounds):
        if turn >= FEWEST_ROUNDS and deadline.passed:
            break
        with others.round():
            for evict in (False, True) if turn % 2 else (True, False):
                times, rate = steps.block(evict)
                (evicting if evict else plain).append(sorted(times))
                rates += [rate] if evict else []
    rounds = others.undisturbed(FEWEST_ROUNDS)
    fields: dict[str, float] = {}
    for name, q in (("p50", 0.5), ("p99", 0.99)):
        alone = [1e3 * quantile(plain[i], q) for i in rounds]
        beside = [1e3 * quantile(evicting[i], q) for i in rounds]
        fields |= Sample.of(alone).fields(f"plain_{name}_ms")
        fields |= Sample.of(beside).fields(f"evicting_{name}_ms")
        ratios = [b / a for a, b in zip(alone, beside, strict=True)]
        fields |= Sample.of(ratios).fields(name)
    return succeeded(
        {
            **row,
            "depth": TOKENS,
            "layers": LAYERS,
            **fields,
            "written_mb_per_s": Sample.of(rates).median / 1e6,
            "steps": BLOCK_STEPS * len(rounds),
            **others.fields(rounds),
        }
    )
