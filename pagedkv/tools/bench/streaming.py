"""What comes from disk: the store's reads beside plain ones, and reading beside attending.

The physics first. A decode step reads every cold page once, so the disk bounds it: bytes over the
disk's rate. To get there, verifying must hide behind reading, and reading behind attending. Plain
reads here are what the disk gives to anybody: `preadv` of the store's own file, past the page
cache, into aligned buffers, by as many threads as requests are to be in flight.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import numpy as np

from pagedkv.attn.driver import attend
from pagedkv.cache.paged_cache import PagedCache
from pagedkv.tiers import ColdReader, ColdRecord, FileColdStore
from pagedkv.tiers.disk.io import aligned_buffer
from pagedkv.tiers.disk.page_file import PageFile
from pagedkv.tools.bench.caches import budgeted, fill, rows_by_precision
from pagedkv.tools.bench.quiet import Neighbours
from pagedkv.tools.bench.result import Row, succeeded
from pagedkv.tools.bench.settings import MIB, AttentionShape, BenchSettings
from pagedkv.tools.bench.timing import Deadline, Sample

REQUESTS = (MIB // 4, MIB, 4 * MIB)
"""Bytes of a run of pages, as one request."""

IN_FLIGHT = (1, 2, 4)
"""Requests at once: up to the number of the store's reading threads."""

PAGE_BYTES = MIB // 4
STAGING = 32 * MIB
LEAST_TOKENS = 8192
MOST_LAYERS = 8
STEPS = 3
"""Decode steps in a row: while the last layer is attended, the first one's pages are read again."""

WARM_UP_ROUNDS = 1
FEWEST_ROUNDS = 3


# Reads


class _File:
    """A store's page file full of noise, and two ways to read it from end to end."""

    def __init__(self, cold_dir: str | None, nbytes: int) -> None:
        self.nbytes = max(nbytes, 4 * REQUESTS[-1])
        self.store = FileColdStore(cold_dir, 2 * self.nbytes, 1, 16 * MIB)
        noise = np.random.default_rng(0).integers(0, 256, (8, PAGE_BYTES), np.uint8)
        self.records: list[ColdRecord] = []
        for i in range(self.nbytes // PAGE_BYTES):
            noise[i % 8, :8] = np.frombuffer(i.to_bytes(8, "little"), np.uint8)
            self.records.append(self.store.put(0, i, (4, 4, 256), noise[i % 8]))
        self.store.flush()
        (path,) = self.store.directory.glob("*.kv")
        self._plain = PageFile(path, create=False)
        self.uncached = self._plain.direct
        # Memory that was never written to would be counted with the reads: all of it is kept.
        self._readers = {n: ColdReader(self.store, STAGING, n) for n in IN_FLIGHT}
        self._buffers = {
            size: [aligned_buffer(size) for _ in range(max(IN_FLIGHT))] for size in REQUESTS
        }

    def plain(self, size: int, in_flight: int) -> float:
        """Seconds of plain reads."""
        offsets = iter(range(0, self.nbytes, size))  # one step of it is one call: no lock needed

        def work(buffer: Any) -> None:
            for offset in offsets:
                self._plain.read([buffer], offset)

        with ThreadPoolExecutor(in_flight) as threads:
            started = time.perf_counter()
            list(threads.map(work, self._buffers[size][:in_flight]))
            return time.perf_counter() - started

    def verified(self, size: int, in_flight: int) -> float:
        """Seconds of reads as attention makes them: verified, in order, through staging."""
        pages = size // PAGE_BYTES
        batches = [tuple(self.records[i : i + pages]) for i in range(0, len(self.records), pages)]
        reader = self._readers[in_flight]
        started = time.perf_counter()
        for _ in reader.stream(batches):
            pass
        return time.perf_counter() - started

    def close(self) -> None:
        """Delete everything."""
        for reader in self._readers.values():
            reader.close()
        self._plain.close()
        self.store.close()


def measure_reads(settings: BenchSettings, base: Row, deadline: Deadline) -> list[Row]:
    """Read a store's file plainly and through the store, in turns, by size and depth.

    Args:
        settings: rounds, working set, cold directory.
        base: entries that all rows have.
        deadline: nothing new is begun after it.

    Returns:
        A row for each size of request and number of requests in flight.
    """
    file = _File(settings.tiers.cold_dir, settings.working_set)
    cases = list(itertools.product(REQUESTS, IN_FLIGHT))
    plain: dict[tuple[int, int], list[float]] = {case: [] for case in cases}
    ours: dict[tuple[int, int], list[float]] = {case: [] for case in cases}
    others = {case: Neighbours() for case in cases}
    try:
        for turn in range(WARM_UP_ROUNDS + settings.rounds):
            if turn >= WARM_UP_ROUNDS + FEWEST_ROUNDS and deadline.passed:
                break
            for case in cases:
                pair = [(plain, file.plain), (ours, file.verified)]
                with others[case].round(keep=turn >= WARM_UP_ROUNDS):
                    for rates, read in pair[:: 1 if turn % 2 else -1]:
                        rate = file.nbytes / read(*case)
                        if turn >= WARM_UP_ROUNDS:
                            rates[case].append(rate)
    finally:
        file.close()
    return [
        succeeded(
            {
                **base,
                "what": f"{case[0] // 1024} KiB x {case[1]}",
                "request_bytes": case[0],
                "in_flight": case[1],
                **_rates(plain[case], ours[case], others[case]),
                "uncached": file.uncached,
                "threads": file.store.readers,
            }
        )
        for case in cases
    ]


def _rates(plain: list[float], ours: list[float], others: Neighbours) -> dict[str, Any]:
    """Both rates, and ours as a share of the plain one that was measured next to it."""
    rounds = others.undisturbed(FEWEST_ROUNDS)
    return {
        **Sample.of([plain[i] for i in rounds]).fields("plain_mb_per_s", 1e-6),
        **Sample.of([ours[i] for i in rounds]).fields("store_mb_per_s", 1e-6),
        **Sample.of([ours[i] / plain[i] for i in rounds]).fields("share"),
        **others.fields(rounds),
    }


# Overlap


@dataclass
class Step:
    """A decode step's attention, all layers of a cache one after the other."""

    cache: PagedCache
    shape: AttentionShape
    q: mx.array = field(init=False)

    def __post_init__(self) -> None:
        shape = (1, self.shape.query_heads, 1, self.shape.dim)
        self.q = mx.random.normal(shape, key=mx.random.key(1))
        mx.eval(self.q)

    def attend(self) -> float:
        """Seconds of attending, per step."""
        started = time.perf_counter()
        for layer in STEPS * self.cache.paged_layers:
            view = layer.view()
            mx.eval(attend(view, self.q, self.shape.scale, None, backend=layer._backend))
        return (time.perf_counter() - started) / STEPS

    def read(self) -> float:
        """Seconds of reading what attending would read, as far ahead, per step."""
        started = time.perf_counter()
        for layer in STEPS * self.cache.paged_layers:
            view = layer.view()
            assert view.pager is not None
            for _ in view.pager.stream(layer._cold_batches(), view.following()):
                pass
        return (time.perf_counter() - started) / STEPS

    def forget(self) -> None:
        """Drop what was read ahead: the next step begins as the first one did."""
        reader = self.cache.context.pager.open_reader
        if reader is not None:
            reader.close()


@contextmanager
def filled(
    shape: AttentionShape,
    layers: int,
    tokens: int,
    settings: BenchSettings,
    cold: bool,
    disk: int = 0,
) -> Iterator[PagedCache]:
    """A cache full of random tokens: all warm, or nearly all on disk."""
    if cold:
        disk = 2 * layers * tokens * shape.kv.token_bytes() + 2**30
    config = budgeted(settings.tiers, shape.kv, layers, tokens, disk if cold else 0)
    config = replace(config, cold=disk)
    with PagedCache.standalone(layers, config) as cache:
        fill(cache.paged_layers, shape.kv, tokens, settings.chunk, mx.float32)
        if cold:
            cache.context.pager.cold.flush()
        yield cache


def layers_for(shape: AttentionShape, kv: str, tokens: int, settings: BenchSettings) -> int:
    """Layers whose pages together are about the working set."""
    from pagedkv.config.planner import plan

    whole = plan(shape.kv, 1, tokens, replace(settings.tiers, kv=kv, warm="1TB", cold=0))
    return min(MOST_LAYERS, max(2, round(settings.working_set / max(1, whole.warm_bytes))))


def measure_overlap(
    shape: AttentionShape, tokens: int, settings: BenchSettings, base: Row, deadline: Deadline
) -> list[Row]:
    """Attend warm pages, read cold ones, and do both at once, in turns.

    Args:
        shape: of a layer.
        tokens: in the cache.
        settings: precisions, rounds, working set, tiers.
        base: entries that all rows have.
        deadline: nothing new is begun after it.

    Returns:
        A row for each precision. ``overlap`` is the longer of reading and attending over both
        at once: 1 if the shorter one is hidden completely.
    """
    return rows_by_precision(
        settings, base, lambda mine, row: _overlap(shape, tokens, mine, row, deadline)
    )


def _overlap(
    shape: AttentionShape, tokens: int, settings: BenchSettings, row: Row, deadline: Deadline
) -> Row:
    layers = layers_for(shape, settings.tiers.kv, tokens, settings)
    with (
        filled(shape, layers, tokens, settings, cold=False) as warm,
        filled(shape, layers, tokens, settings, cold=True) as cold,
    ):
        store = cold.context.pager.cold
        hidden, shown = Step(warm, shape), Step(cold, shape)
        works: dict[str, Callable[[], float]] = {
            "read": shown.read,
            "attend": hidden.attend,
            "both": shown.attend,
        }
        times: dict[str, list[float]] = {name: [] for name in works}
        others = Neighbours()
        for turn in range(WARM_UP_ROUNDS + settings.rounds):
            if turn >= WARM_UP_ROUNDS + FEWEST_ROUNDS and deadline.passed:
                break
            with others.round(keep=turn >= WARM_UP_ROUNDS):
                for name, work in works.items():
                    shown.forget()
                    seconds = work()
                    if turn >= WARM_UP_ROUNDS:
                        times[name].append(seconds)
        shown.forget()
        rounds = others.undisturbed(FEWEST_ROUNDS)
        read, attended, both = ([times[name][i] for i in rounds] for name in works)
        ratios = [max(r, a) / b for r, a, b in zip(read, attended, both, strict=True)]
        nbytes = cold.stats().cold.bytes
        return succeeded(
            {
                **row,
                "depth": tokens,
                "layers": layers,
                **Sample.of(read).fields("read_ms", 1e3),
                **Sample.of(attended).fields("attend_ms", 1e3),
                **Sample.of(both).fields("both_ms", 1e3),
                **Sample.of(ratios).fields("overlap"),
                "cold_bytes": nbytes,
                "read_mb_per_s": nbytes / Sample.of(read).median / 1e6,
                "threads": store.readers,
                "blas_threads": os.environ.get("OPENBLAS_NUM_THREADS", "all"),
                **others.fields(rounds),
            }
        )
