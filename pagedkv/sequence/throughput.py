"""How fast prompts are read and decode steps follow each other."""

from __future__ import annotations

import statistics
import time
from collections import deque

LATEST = 64
"""Steps that the rate is of."""


class Pace:
    """Counts decode steps, and keeps the time between the latest ones and between prompt chunks.

    A pause, a prompt in between or a slow step moves the median little.
    """

    def __init__(self) -> None:
        self.steps = 0
        self._last: float | None = None
        self._times: deque[float] = deque(maxlen=LATEST)
        self._rates: deque[float] = deque(maxlen=LATEST)
        self._began = 0.0
        self._chunk = 0  # tokens of the prompt chunk that is under way

    def step(self) -> None:
        """A decode step begins."""
        now = time.perf_counter()
        self._end_chunk(now)
        if self._last is not None:
            self._times.append(now - self._last)
        self._last = now
        self.steps += 1

    def prompt(self, tokens: int) -> None:
        """A chunk of a prompt begins."""
        now = time.perf_counter()
        self._end_chunk(now)
        self._last, self._chunk = None, tokens
        self._began = now

    def _end_chunk(self, now: float) -> None:
        if self._chunk:
            self._rates.append(self._chunk / max(now - self._began, 1e-9))
        self._chunk = 0

    @property
    def prompt_per_second(self) -> float:
        """Prompt tokens a second; 0 if no chunk was followed by anything."""
        return statistics.median(self._rates) if self._rates else 0.0

    @property
    def per_second(self) -> float:
        """Steps a second; 0 if no two followed each other."""
        return 1 / statistics.median(self._times) if self._times else 0.0
