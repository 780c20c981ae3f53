"""Live progress of a stress run: a line that is rewritten on a terminal, else one now and then."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO

from pagedkv.cli.output import rate, seconds
from pagedkv.config.sizes import format_size
from pagedkv.tools.stress import Status

_REDRAW, _LINE = 0.25, 5.0  # seconds


class StressProgress:
    """Tokens, tiers against budgets, rates, and memory."""

    def __init__(
        self, quiet: bool, stream: TextIO | None = None, pace: float | None = None
    ) -> None:
        """Start the clock.

        Args:
            quiet: never show anything.
            stream: stderr if None.
            pace: seconds between lines; by the kind of stream if None.
        """
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._pace = pace if pace is not None else (_REDRAW if self._terminal else _LINE)
        self._quiet = quiet
        self._started = time.monotonic()
        self._due = self._started + self._pace
        self._last: tuple[float, Status] | None = None
        self._drawn = False

    def __call__(self, status: Status) -> None:
        """Show where things stand; cheap enough to call at every step."""
        now = time.monotonic()
        if self._quiet or now < self._due:
            return
        self._due = now + self._pace
        line = self._line(now, status)
        self._last = (now, status)
        if self._terminal:
            columns = shutil.get_terminal_size().columns - 1
            self._stream.write(f"\r\x1b[2K{line[:columns]}")
            self._drawn = True
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def _line(self, now: float, s: Status) -> str:
        then, before = self._last or (self._started, None)
        spent = now - then
        tokens = max(0, s.done - (before.done if before else 0))  # a trim is no speed
        read = s.read - (before.read if before else 0)
        written = s.written - (before.written if before else 0)
        parts = [
            f"{s.phase} {s.done:,}/{s.total:,} tokens {100 * s.done // max(1, s.total)}%",
            f"{tokens / spent:,.0f} tokens/s" if spent > 0 else "",
            *(f"{t} {format_size(n)}/{format_size(limit)}" for t, (n, limit) in s.tiers.items()),
            f"NVMe {rate(read, spent)} in, {rate(written, spent)} out",
            f"process {format_size(s.process)}/{format_size(s.allowed)}",
            f"MLX {format_size(s.mlx)}",
            seconds(now - self._started),
        ]
        return "  ".join(part for part in parts if part)

    def close(self) -> None:
        """Wipe the line away."""
        if self._drawn:
            self._stream.write("\r\x1b[2K")
            self._stream.flush()
            self._drawn = False

    def __enter__(self) -> StressProgress:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
