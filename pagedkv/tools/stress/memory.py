"""Memory of a stress run: sampled at a steady pace, and held against what is stated beforehand.

What the process may take is its budgets (warm, staging, write buffer, scratch), the hot tokens,
and a constant, whose parts are stated in the report: the interpreter with its libraries as it was
before the cache was made, MLX's own temporaries and cache of freed buffers, and what the harness
itself needs to make tokens and to know the answers.
"""

from __future__ import annotations

import resource
import sys
import threading
import time
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import psutil

from pagedkv.attn.driver import DECODE_TOKENS, SCORE_BYTES
from pagedkv.cache.paged_cache import PagedCache
from pagedkv.cache.stats import CacheStats
from pagedkv.config.sizes import format_size
from pagedkv.tiers.budget import MIB, TierBudget
from pagedkv.tiers.pages.layer_pager import RUN_TOKENS
from pagedkv.tools.stress.checks import Check

MLX_CACHE = 128 * MIB
"""Limit set on MLX's cache of freed buffers while a run goes on."""

SLACK = 64 * MIB
"""Freed memory that malloc has not given back, and threads."""

_KEPT = 600  # samples in a report; beyond, the pace is halved


def process_bytes() -> int:
    """What only this process takes of the machine's memory.

    macOS's physical footprint where psutil knows it, else the unique set size, else what is
    resident.
    """
    process = psutil.Process()
    try:
        full = process.memory_full_info()
    except psutil.Error:
        return int(process.memory_info().rss)
    for name in ("phys_footprint", "footprint", "uss"):
        if value := getattr(full, name, 0):
            return int(value)
    return int(full.rss)


def peak_resident() -> int:
    """The most that was ever resident, by the system's own account."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def allowance(
    budget: TierBudget, layers: int, token_bytes: int, page_tokens: int, chunk: int
) -> dict[str, int]:
    """Memory that the cache and attention may take, part by part.

    Args:
        budget: of the cache.
        layers: paged layers.
        token_bytes: of one token of one layer, in 16 bit.
        page_tokens: tokens per page.
        chunk: tokens per prefill chunk, at most.
    """
    window = budget.sink_tokens + budget.hot_tokens + page_tokens + DECODE_TOKENS
    held = window + chunk
    run = 2 * RUN_TOKENS * 2 * token_bytes  # in float32; the next one is under way
    return {
        "warm": budget.warm_bytes,
        "staging": budget.staging_bytes,
        "write buffer": budget.write_buffer_bytes,
        "scratch": budget.scratch_bytes,
        "bounds of cold pages": budget.bounds_bytes,
        "hot tokens": (layers + 3) * held * token_bytes,  # a fork shares them until it writes
        # What was expanded into the scratch is copied once while it is attended.
        "attention temporaries": 2 * SCORE_BYTES + max(run, budget.scratch_bytes),
        "MLX's freed buffers": MLX_CACHE,
    }


@dataclass
class Traffic:
    """What went to and from the disk, over all pagers of a run."""

    read: int = 0
    written: int = 0
    write_errors: int = 0

    def of(self, cache: PagedCache) -> Traffic:
        """With the pager that is open now."""
        store = cache.context.pager.open_cold
        if store is None:
            return self
        c = store.counters
        return Traffic(
            self.read + c.bytes_read,
            self.written + c.bytes_written,
            self.write_errors + c.write_errors,
        )

    def add(self, cache: PagedCache) -> None:
        """Keep the counts of a pager that is about to be closed."""
        now = self.of(cache)
        self.read, self.written, self.write_errors = now.read, now.written, now.write_errors


class _Sampler(threading.Thread):
    """Looks at the process, and never at mlx: that is the generation thread's."""

    def __init__(self, pace: float) -> None:
        super().__init__(name="pagedkv-stress-sampler", daemon=True)
        self._pace = pace
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._highest = 0
        self.count = 0

    def run(self) -> None:
        while not self._over.wait(self._pace):
            self.note(process_bytes())

    def note(self, nbytes: int) -> None:
        with self._lock:
            self._highest = max(self._highest, nbytes)
            self.count += 1

    def take(self) -> int:
        """The most since the last call."""
        with self._lock:
            highest, self._highest = self._highest, 0
        return highest

    def stop(self) -> None:
        self._over.set()
        self.join()


@dataclass
class Memory:
    """Samples what a cache, MLX and the process take, and holds it against what they may.

    Attributes:
        cache: that is looked at; put another in its place when it is reopened.
        limits: what the process may take, part by part, but for `base`.
        pace: seconds between samples.
        base: what it took before.
        budgets: what each tier may take.
        peaks: the most that was seen of each.
        tiers: check of the tiers against their budgets.
        process: check of the process against everything together.
        samples: one row per moment.
        traffic: of pagers that were closed.
    """

    cache: PagedCache
    limits: dict[str, int]
    pace: float
    base: int = field(default_factory=process_bytes)
    budgets: dict[str, int] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    traffic: Traffic = field(default_factory=Traffic)

    def __post_init__(self) -> None:
        budget = self.cache.context.pager.budget
        self.tiers, self.process = Check("budgets"), Check("process memory")
        self.budgets = {
            "warm": budget.warm_bytes,
            "cold": budget.cold_bytes,
            "staging": budget.staging_bytes,
            "write buffer": budget.write_buffer_bytes,
        }
        self.peaks = dict.fromkeys([*self.budgets, "process", "mlx_active", "mlx_cache"], 0)
        self._resident_before = peak_resident()
        self._started, self._due, self._every = time.perf_counter(), 0.0, self.pace
        self._mlx_peak_before = mx.get_peak_memory()
        mx.reset_peak_memory()
        self._cache_limit = mx.set_cache_limit(MLX_CACHE)
        self._sampler = _Sampler(self.pace)
        self._sampler.start()

    @property
    def allowed(self) -> int:
        """Bytes that the process may take."""
        return self.base + sum(self.limits.values())

    def taken(self) -> dict[str, int]:
        """What each tier takes now."""
        pager = self.cache.context.pager
        store, reader = pager.open_cold, pager.open_reader
        return {
            "warm": sum(layer.warm_bytes for layer in pager.layer_pagers),
            "cold": store.nbytes if store else 0,
            "staging": reader.nbytes if reader else 0,
            "write buffer": store.buffer_bytes if store else 0,
        }

    def look(self, tokens: int) -> dict[str, Any]:
        """Hold every tier against its budget; at the pace, take a sample too.

        Returns:
            The latest sample.
        """
        taken = self.taken()
        for tier, nbytes in taken.items():
            self.peaks[tier] = max(self.peaks[tier], nbytes)
            limit = self.budgets[tier]
            fraction = nbytes / limit if limit else 2.0 * (nbytes > 0)
            self.tiers.see(
                fraction, f"{tier} takes {nbytes:,} of {limit:,} bytes at {tokens:,} tokens"
            )
        now = time.perf_counter() - self._started
        if now >= self._due or not self.samples:
            self._due = now + self._every
            self._sample(now, tokens, taken)
        return self.samples[-1]

    def _sample(self, now: float, tokens: int, taken: dict[str, int]) -> None:
        highest = self._sampler.take() or process_bytes()
        traffic = self.traffic.of(self.cache)
        row: dict[str, Any] = {
            "seconds": round(now, 3),
            "tokens": tokens,
            **{tier.replace(" ", "_"): nbytes for tier, nbytes in taken.items()},
            "read": traffic.read,
            "written": traffic.written,
            "process": highest,
            "mlx_active": mx.get_active_memory(),
            "mlx_cache": mx.get_cache_memory(),
        }
        for name in ("process", "mlx_active", "mlx_cache"):
            self.peaks[name] = max(self.peaks[name], row[name])
        self._judge(highest, f"at {tokens:,} tokens")
        self.samples.append(row)
        if len(self.samples) > _KEPT:
            del self.samples[1::2]
            self._every *= 2

    def _judge(self, nbytes: int, when: str) -> None:
        self.process.see(
            nbytes / self.allowed,
            f"the process takes {format_size(nbytes)} of {format_size(self.allowed)} {when}",
        )

    def finish(self, tokens: int) -> None:
        """Stop sampling; the system's own account of the peak counts as well."""
        if self._sampler.is_alive():
            self._sampler.note(process_bytes())
            self._due = 0.0
            self.look(tokens)
            self._sampler.stop()
            self.peaks["mlx_peak"] = mx.get_peak_memory()
            mx.set_cache_limit(self._cache_limit)
            resident = peak_resident()
            if resident > self._resident_before:  # else the peak is of before the run
                self.peaks["resident"] = resident
                shared = psutil.Process().memory_info().rss - process_bytes()
                self._judge(resident - max(0, shared), "at its peak, by the system's account")

    @property
    def looked(self) -> int:
        """How often the process was looked at."""
        return self._sampler.count

    def stats(self) -> CacheStats:
        """Of the cache, with the traffic of all pagers."""
        traffic = self.traffic.of(self.cache)
        return replace(
            self.cache.stats(),
            nvme_bytes_read=traffic.read,
            nvme_bytes_written=traffic.written,
            write_errors=traffic.write_errors,
        )
