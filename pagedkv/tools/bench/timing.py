"""Clocks: medians with their spread, chains of dependent calls, and a limit on time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

Call = Callable[[mx.array], mx.array]
"""One attention call: queries in, an output of the same shape."""

CHAIN_SECONDS = 0.02
"""What the fastest chain should take, so that the overhead of evaluating it is small in it."""

LONG_CHAIN_SECONDS = 0.1
"""What a slower one may take at most, once every cache was called."""

LONGEST_CHAIN = 1024
SLOW_CHAIN_SECONDS = 1.0
PROBE_CALLS = 32


@dataclass(frozen=True)
class Sample:
    """What repeated measurements gave.

    Attributes:
        median: of them.
        p10: a tenth are below it.
        p90: a tenth are above it.
        count: how many there were.
    """

    median: float
    p10: float
    p90: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Sample:
        """Sum up measurements; there must be at least one."""
        ordered = sorted(values)
        median, p10, p90 = (quantile(ordered, q) for q in (0.5, 0.1, 0.9))
        return cls(median, p10, p90, len(ordered))

    def fields(self, name: str, scale: float = 1.0) -> dict[str, float]:
        """As entries of a row: the median under `name`, the spread beside it.

        Args:
            name: of the entry, with its unit, such as ``"us"``.
            scale: multiplies the numbers, such as 1e6 from seconds.
        """
        return {
            name: scale * self.median,
            f"{name}_p10": scale * self.p10,
            f"{name}_p90": scale * self.p90,
        }


def quantile(ordered: Sequence[float], q: float) -> float:
    """The value below which a fraction `q` of sorted numbers lies, interpolated."""
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


class Deadline:
    """A limit on the time of a run; without one it never passes."""

    def __init__(self, seconds: float | None = None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    @property
    def passed(self) -> bool:
        """Whether the time is up."""
        return self._end is not None and time.monotonic() >= self._end


class Chain:
    """Dependent calls in one evaluation: each takes the output of the one before.

    GPU work is asynchronous and an evaluation costs tens of microseconds, as much as an attention
    call: only many calls in one evaluation say what one of them takes. Dependent, they cannot
    overlap. Consecutive calls go to different caches, as the layers of a model do, so that none
    finds its keys in the processor's cache; where a chain stops, the next one goes on.
    """

    def __init__(self, calls: Sequence[Call], first: mx.array) -> None:
        """Prepare a chain.

        Args:
            calls: the same call on different caches, taken in turn.
            first: what the first call of every chain gets.
        """
        self._calls, self._first = calls, first
        self._at = 0

    @property
    def caches(self) -> int:
        """How many caches are called in turn."""
        return len(self._calls)

    def run(self, length: int) -> tuple[float, float]:
        """Time one chain.

        Args:
            length: calls in it.

        Returns:
            Seconds in which Python built the graph, and seconds in which it was evaluated.
        """
        x = self._first
        mx.synchronize()
        started = time.perf_counter()
        for _ in range(length):
            x = self._calls[self._at](x)
            self._at = (self._at + 1) % len(self._calls)
        built = time.perf_counter()
        mx.eval(x)
        mx.synchronize()
        return built - started, time.perf_counter() - built

    def call_seconds(self) -> float:
        """About what a call takes in a chain, once everything is compiled."""
        self.run(1)  # compiles kernels
        first = sum(self.run(1))
        probe = 1 if first > 0.02 else PROBE_CALLS
        self.run(probe)
        return max(1e-7, sum(self.run(probe)) / probe)


def chain_lengths(chains: Sequence[Chain], seconds: Sequence[float]) -> list[int]:
    """Calls for each of several chains that are compared: as many for one as for the other.

    What evaluating costs once, and the time until the first calls reach the device (MLX hands
    them over by the hundred on CUDA), is shared by all calls of a chain: with fewer calls it
    would weigh more. Only chains that would take long are shorter.

    Args:
        chains: all of them.
        seconds: what a call takes in each.
    """
    common = min(LONGEST_CHAIN, math.ceil(CHAIN_SECONDS / min(seconds, default=1.0)))
    lengths = []
    for chain, each in zip(chains, seconds, strict=True):
        wanted = max(8, chain.caches, min(common, math.ceil(LONG_CHAIN_SECONDS / each)))
        lengths.append(max(1, min(wanted, math.ceil(SLOW_CHAIN_SECONDS / each))))
    return lengths
