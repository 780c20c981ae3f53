"""Whether an error grows along a text: a least-squares slope, and how sure one can be of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

COVERAGE = 0.95


@dataclass(frozen=True)
class Slope:
    """A straight line's slope.

    Attributes:
        slope: by least squares, per step of position.
        low, high: ends of its 95 % interval.
    """

    slope: float
    low: float
    high: float

    @property
    def flat(self) -> bool:
        """Whether the interval holds zero: no trend can be told."""
        return self.low <= 0 <= self.high


def fit_slope(values: Floats, seed: int, block: int = 64, resamples: int = 2000) -> Slope:
    """Fit a line to a series, with an interval from a block bootstrap.

    Neighbours in a text have much in common, so single values must not be drawn on their own: whole
    runs of `block` (position, value) pairs are, with replacement, until there are as many as in the
    series. The line is fitted again to each such sample; the interval holds the middle 95 % of
    the slopes. It needs no values of equal spread: KL has none.

    Args:
        values: at positions 0, 1, ...; at least two blocks of them.
        seed: of what is drawn.
        block: values drawn together.
        resamples: samples.

    Raises:
        ValueError: if there are fewer than two blocks.
    """
    count = len(values)
    if count < 2 * block:
        raise ValueError(f"{count} values are fewer than two blocks of {block}")
    x = np.arange(count) - (count - 1) / 2
    y = np.asarray(values, np.float64)
    terms = np.stack([x, y, x * x, x * y])
    sums = np.concatenate([np.zeros((4, 1)), np.cumsum(terms, axis=1)], axis=1)
    blocks = sums[:, block:] - sums[:, :-block]  # of the block at each place
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, blocks.shape[1], (resamples, -(-count // block)))
    slopes = _slopes(blocks[:, drawn].sum(axis=2), drawn.shape[1] * block)
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(slopes, (tail, 1 - tail))
    whole = _slopes(terms.sum(axis=1)[:, None], count)
    return Slope(float(whole[0]), float(low), float(high))


def _slopes(sums: Floats, count: int) -> Floats:
    """Least-squares slopes from sums of x, y, x x and x y, ``[4, samples]``."""
    x, y, xx, xy = sums / count
    slopes: Floats = (xy - x * y) / (xx - x * x)
    return slopes
