"""How much of the machine other programs took while something was measured."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil

QUIET = 0.15
"""Others may take this share of all cores in a round that counts as undisturbed."""


@dataclass
class Neighbours:
    """Shares of the machine's processor time that other programs took, round by round.

    Attributes:
        shares: of all cores, 0 to 1; whole ticks of the system's clock (10 ms on Linux).
    """

    shares: list[float] = field(default_factory=list)

    @contextmanager
    def round(self, keep: bool = True) -> Iterator[None]:
        """Watch one round; it counts if `keep`."""
        busy, idle, own = _times()
        yield
        busy, idle, own = (b - a for a, b in zip((busy, idle, own), _times(), strict=True))
        total = busy + idle
        if keep:
            self.shares.append(min(1.0, max(0.0, busy - own) / total) if total > 0 else 0.0)

    def undisturbed(self, least: int) -> list[int]:
        """Rounds that others hardly disturbed: all rounds if they are fewer than `least`."""
        quiet = [i for i, share in enumerate(self.shares) if share <= QUIET]
        return quiet if len(quiet) >= least else list(range(len(self.shares)))

    def fields(self, rounds: Sequence[int]) -> dict[str, float | int]:
        """As entries of a row: rounds used, rounds made, and others' median share in the former."""
        chosen = sorted(self.shares[i] for i in rounds)
        return {
            "rounds": len(rounds),
            "rounds_made": len(self.shares),
            "others": chosen[len(chosen) // 2] if chosen else 0.0,
        }


def _times() -> tuple[float, float, float]:
    """Seconds of all cores at work and idle, and of this process."""
    now, mine = psutil.cpu_times(), os.times()
    working = ("user", "nice", "system", "irq", "softirq", "steal")
    busy = sum(getattr(now, name, 0.0) for name in working)
    return busy, now.idle + getattr(now, "iowait", 0.0), mine.user + mine.system
