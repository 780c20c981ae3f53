"""What came of a stress run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pagedkv.cache.stats import CacheStats
from pagedkv.tools.stress.checks import Check
from pagedkv.tools.stress.memory import Memory

_KEPT = 400  # steps of a kind in a report


@dataclass(frozen=True)
class Status:
    """Where a run stands, for a progress line.

    Attributes:
        phase: what it is at.
        done: tokens held.
        total: tokens in the end.
        tiers: bytes taken and budget, by tier.
        read: bytes from disk so far.
        written: bytes to disk so far.
        process: memory of the process at the latest sample.
        allowed: what it may take.
        mlx: MLX's active memory at the latest sample.
    """

    phase: str
    done: int
    total: int
    tiers: dict[str, tuple[int, int]]
    read: int
    written: int
    process: int
    allowed: int
    mlx: int


Watch = Callable[[Status], None]


def ignore(status: Status) -> None:
    """Watches nothing."""


@dataclass
class Latencies:
    """How long the cache took for each step, all layers together, without the harness.

    Attributes:
        steps: by kind of step: tokens held afterwards, and seconds.
    """

    steps: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    def add(self, kind: str, tokens: int, seconds: float) -> None:
        """Note one step."""
        self.steps.setdefault(kind, []).append((tokens, seconds))

    def summary(self) -> list[dict[str, Any]]:
        """Count, median, 99th percentile and largest of each kind, in seconds."""
        rows = []
        for kind, steps in self.steps.items():
            times = [seconds for _, seconds in steps]
            rows.append(
                {
                    "kind": kind,
                    "count": len(times),
                    "p50": float(np.percentile(times, 50)),
                    "p99": float(np.percentile(times, 99)),
                    "max": max(times),
                }
            )
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Every step, or evenly chosen ones where there are many."""
        kept = {}
        for kind, steps in self.steps.items():
            every = -(-len(steps) // _KEPT)
            kept[kind] = [[tokens, round(seconds, 6)] for tokens, seconds in steps[::every]]
        return kept


@dataclass
class StressReport:
    """What happened.

    Attributes:
        model: its name.
        shape: what was driven, in words.
        tokens: that the context grew to, before the last decode steps.
        checks: each property and how it held.
        seconds: per phase.
        memory: samples, peaks, budgets and what the process may take.
        stats: of the cache, before it was closed.
        latencies: of steps.
        operations: how often each was done.
        notes: what was left out, and why.
        needles: position, tier, precision, worst error and cosine of each.
        faults: injected, detected and absorbed ones; empty without faults.
    """

    model: str
    shape: str
    tokens: int
    checks: list[Check]
    seconds: dict[str, float]
    memory: Memory
    stats: CacheStats
    latencies: Latencies
    operations: dict[str, int]
    notes: list[str] = field(default_factory=list)
    needles: list[dict[str, Any]] = field(default_factory=list)
    faults: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether every check held."""
        return all(check.ok for check in self.checks)

    @property
    def wrong(self) -> list[str]:
        """What was wrong, a line each."""
        lines = []
        for check in self.checks:
            if not check.ok:
                reason = check.failures[0] if check.failures else "was never looked at"
                lines.append(f"{check.name}: {check.failed:,} of {check.count:,} wrong; {reason}")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        memory = self.memory
        return {
            "ok": self.ok,
            "wrong": self.wrong,
            "model": self.model,
            "shape": self.shape,
            "tokens": self.tokens,
            "operations": self.operations,
            "notes": self.notes,
            "checks": [check.to_dict() for check in self.checks],
            "seconds": self.seconds,
            "peaks": memory.peaks,
            "budgets": memory.budgets,
            "memory": {
                "allowed": memory.allowed,
                "before the run": memory.base,
                "parts": memory.limits,
                "looks": memory.looked,
                "pace": memory.pace,
            },
            "latencies": self.latencies.summary(),
            "needles": self.needles,
            "faults": self.faults,
            "stats": self.stats.to_dict(),
            "samples": memory.samples,
            "steps": self.latencies.to_dict(),
        }
