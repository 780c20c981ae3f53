"""How fast decode steps follow each other, for `stats()`."""

from __future__ import annotations

import statistics
import time
from collections import deque

LATEST = 64
"""Steps that the rate is of."""


class Pace:
    """Counts decode steps and keeps the time between the latest ones.

    A pause, a prompt in between or a slow step moves the median little.
    """

    def __init__(self) -> None:
        self.steps = 0
        self._last: float | None = None
        self._times: deque[float] = deque(maxlen=LATEST)

    def step(self) -> None:
        """A decode step begins."""
        now = time.perf_counter()
        if self._last is not None:
            self._times.append(now - self._last)
        self._last = now
        self.steps += 1

    def rest(self) -> None:
        """Something else begins: the time until the next step is none between steps."""
        self._last = None

    @property
    def per_second(self) -> float:
        """Steps a second; 0 if no two followed each other."""
        return 1 / statistics.median(self._times) if self._times else 0.0
