"""A long context under fixed budgets whose every answer is known.

Random keys and values, regenerated from a seed whenever they are needed, go through
`pagedkv.attention` in prefill chunks and decode steps. Needles are planted at random depths: keys
in a direction of their own that a query can ask for, with values of their own. At the end each
needle's answer is compared, in every layer and head, with a softmax in float64 over the original
numbers, and every stored token is read back and compared with the one that went in.

How far an answer may be off follows from the precision of the page:

- A stored number is within one quantization step of its group, ``(max - min) / (2^bits - 1)``:
  half a step of rounding, and up to half a step where `mx.quantize` moves the scale so that zero
  is exact. A page that was encoded again at a lower precision adds up one step for each time.
- A needle's answer is within one step of its value, plus what leaks in from other tokens. Key
  rounding shifts a score by a random amount of deviation ``σ = scale · |q| · 0.375 step`` (the
  deviation of a number within a step, and a third more for the moved scale), so the other tokens'
  exact weight may grow by ``exp(6σ + σ²)``. Queries are made so sharp that this stays small.
- The cosine to the exact answer is at least ``1 / sqrt(1 + r²)`` with r half a step over the
  value's root mean square, less the leak.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from pagedkv.allocator import Precision
from pagedkv.allocator.precision import GROUP_TOKENS
from pagedkv.attention import KVView
from pagedkv.cache import PagedCache, PagedLayerCache, attention
from pagedkv.config import TierConfig
from pagedkv.errors import ColdStoreError, ConfigError, PagedKVError
from pagedkv.stats import CacheStats
from pagedkv.tiers import Run

Array = npt.NDArray[Any]
Watch = Callable[[str, int, int, str], None]
"""Told the phase, units done, units in all, and how full the budgets are."""

QUERIES = 16
"""Query tokens of a prefill chunk: its last ones. Asking for all would only repeat the same work."""

GAIN = 2.0  # a needle's key is this much longer than the others
MARGIN = 16.0  # nats between a needle's score and all other tokens' together
ROUNDING = 2.0**-9  # of the largest number: 16-bit outputs, scales and biases


@dataclass(frozen=True)
class SyntheticModel:
    """The shape of a model that does not exist.

    Attributes:
        layers: attention layers.
        query_heads: heads of a query; a multiple of `kv_heads`.
        kv_heads: key/value heads.
        head_dim: channels per head.
    """

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class StressOptions:
    """What to run.

    Attributes:
        tokens: prompt tokens.
        needles: needles to plant; as many decode steps follow the prompt.
        seed: of everything random.
        chunk: tokens per prefill chunk.
        attend_every: attend in every n-th prefill chunk (and the last), append only in others.
    """

    tokens: int
    needles: int = 8
    seed: int = 0
    chunk: int = 2048
    attend_every: int = 1

    def __post_init__(self) -> None:
        if min(self.needles, self.chunk, self.attend_every) < 1 or self.seed < 0:
            raise ConfigError("needles, chunk and attend_every start at 1, and the seed at 0")
        if self.tokens < QUERIES + self.needles:
            raise ConfigError(
                f"{self.tokens} tokens cannot hold {self.needles} needles: give at least "
                f"{QUERIES + self.needles}"
            )


@dataclass
class Check:
    """One property that was watched, in many places.

    Attributes:
        name: of the property.
        worst: largest deviation seen, as a fraction of what is allowed.
        count: places where it was looked at.
        failures: what was wrong, the first few in words.
        failed: how many were wrong.
    """

    name: str
    worst: float = 0.0
    count: int = 0
    failures: list[str] = field(default_factory=list)
    failed: int = 0

    @property
    def ok(self) -> bool:
        """Whether it held everywhere it was looked at, and was looked at."""
        return self.failed == 0 and self.count > 0

    def see(self, fraction: float, where: str) -> None:
        """Note one measurement; above 1, or not a number, it is a failure."""
        self.count += 1
        self.worst = max(self.worst, fraction) if math.isfinite(fraction) else math.inf
        if not fraction <= 1:
            self.fail(f"{where}: {fraction:.3g} times the tolerance")

    def fail(self, text: str) -> None:
        """Note a failure."""
        self.count += 1
        self.failed += 1
        if len(self.failures) < 5:
            self.failures.append(text)


@dataclass
class StressReport:
    """What happened.

    Attributes:
        checks: each property and how it held.
        seconds: per phase.
        needles: position, tier, precision, worst error and cosine of each.
        peaks: the most bytes each tier was seen to take, and its budget.
        stats: of the cache, before it was closed.
    """

    checks: list[Check]
    seconds: dict[str, float]
    needles: list[dict[str, Any]]
    peaks: dict[str, tuple[int, int]]
    stats: CacheStats

    @property
    def ok(self) -> bool:
        """Whether every check held."""
        return all(check.ok for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "ok": self.ok,
            "checks": [{**asdict(c), "ok": c.ok} for c in self.checks],
            "seconds": self.seconds,
            "needles": self.needles,
            "peaks": {n: {"bytes": b, "budget": limit} for n, (b, limit) in self.peaks.items()},
            "stats": self.stats.to_dict(),
        }
