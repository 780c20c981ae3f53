"""How sure a difference of means is: paired bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
_BLOCK = 2**22
"""Numbers drawn at a time, so that many pairs take no more memory."""


@dataclass(frozen=True)
class Interval:
    """A mean, and between which values it would lie if other pairs had been drawn.

    Attributes:
        mean: of the differences.
        low: end of the interval.
        high: end of the interval.
    """

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the sign of the difference is beyond chance at this level."""
        return self.low > 0 or self.high < 0


def paired_interval(
    differences: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL
) -> Interval:
    """The percentile bootstrap of the mean of paired differences.

    Pairs are drawn with replacement, as many as there are; the same seed gives the same interval.

    Args:
        differences: one per pair, such as one cache's score minus the other's on one prompt.
        seed: of the draws.
        resamples: draws.
        level: share of draws that the interval holds.

    Raises:
        ValueError: if there are no pairs.
    """
    values = np.asarray(differences, np.float64)
    if not values.size:
        raise ValueError("there are no pairs: the mean of nothing has no interval")
    rng, means = np.random.default_rng(seed), []
    block = max(1, _BLOCK // values.size)
    for start in range(0, resamples, block):
        drawn = rng.integers(0, values.size, (min(block, resamples - start), values.size))
        means.append(values[drawn].mean(axis=1))
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(means), (tail, 1 - tail))
    return Interval(float(values.mean()), float(low), float(high))
