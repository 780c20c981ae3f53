"""Whether the machine runs out of memory, asked seldom."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import psutil

INTERVAL = 2.0
"""Seconds for which an answer holds."""

RELIEF = 1.25
"""Pressure ends when so many times what should be left is left: no going back and forth."""

NORMAL, WARNING = 1, 2
"""Levels of `kern.memorystatus_vm_pressure_level`; 4 is critical."""


@dataclass(frozen=True)
class Memory:
    """What the machine has left.

    Attributes:
        available: bytes that programs can take without others being swapped out.
        mlx_left: bytes that MLX may still take before its own limit; None if it has none.
        level: the system's own verdict (macOS), `NORMAL` or above; None where it has none.
    """

    available: int
    mlx_left: int | None = None
    level: int | None = None

    @property
    def left(self) -> int:
        """The smaller of both."""
        return self.available if self.mlx_left is None else min(self.available, self.mlx_left)


def machine_memory() -> Memory:
    """Ask the system, and MLX. On the generation thread; a few system calls."""
    limit = mx.get_memory_limit()
    return Memory(
        psutil.virtual_memory().available,
        max(0, limit - mx.get_active_memory()) if limit else None,
        pressure_level() if pressure_level else None,
    )


def _macos_level() -> Callable[[], int | None]:
    """What reads the level: the function is looked up once."""
    call = ctypes.CDLL(None).sysctlbyname
    name = b"kern.memorystatus_vm_pressure_level"

    def read() -> int | None:
        value = ctypes.c_int(0)
        size = ctypes.c_size_t(ctypes.sizeof(value))
        failed = call(name, ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0))
        return None if failed else value.value

    return read


pressure_level: Callable[[], int | None] | None = (
    _macos_level() if sys.platform == "darwin" else None
)
"""The system's memory pressure; None where the system does not tell."""


class Pressure:
    """Says whether warm pages should leave memory early.

    Attributes:
        keep_free: bytes that the machine should have left; 0 never feels pressure.
        memory: the latest answer; None before the first.
        samples: how often the machine was asked.
    """

    def __init__(
        self,
        keep_free: int,
        ask: Callable[[], Memory] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.keep_free = keep_free
        self.memory: Memory | None = None
        self.samples = 0
        self._ask, self._clock = ask or (lambda: machine_memory()), clock
        self._asked = -INTERVAL
        self._high = False

    @property
    def high(self) -> bool:
        """Whether memory is short; asks the machine if the last answer is old."""
        if self.keep_free and self._clock() - self._asked >= INTERVAL:
            self._sample()
        return self._high

    @property
    def name(self) -> str:
        """``"off"``, ``"none"`` or ``"high"``, as of the last time it was asked."""
        return "off" if not self.keep_free else "high" if self._high else "none"

    def _sample(self) -> None:
        self.memory = memory = self._ask()
        self._asked = self._clock()
        self.samples += 1
        enough = self.keep_free * (RELIEF if self._high else 1)
        self._high = memory.left < enough or (memory.level or NORMAL) >= WARNING
