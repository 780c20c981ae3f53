"""What a row is held against: copy bandwidth, the cost of a launch, and the rules for its limit."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from pagedkv.tools.bench.timing import Chain, Sample

LAUNCH, BYTES, ARITHMETIC = "launch", "bytes", "arithmetic/latency"
HOST, DISK = "host", "disk"

LAUNCH_FACTOR = 3.0
"""An attention call that takes less than this many empty kernels is bound by launching."""

BYTES_SHARE = 0.6
"""A row that reaches more than this share of the copy bandwidth is bound by bytes."""

STEP_SHARE = 0.6
"""A model step of which launches, or Python, take more than this share is bound by them."""

DISK_SHARE = 0.5
"""A call that waits for the disk more than this share of its time is bound by it."""

_LINKS = 256
_PASSES = 4


@dataclass(frozen=True)
class Yardstick:
    """The machine's own speed, measured in the same run as the rows that name it.

    Attributes:
        copy: bytes per second of copying a large array, bytes read plus bytes written.
        link: seconds per call in a chain of additions to a few numbers: what one kernel costs
            that does nothing.
    """

    copy: Sample
    link: Sample

    def roofline(self, nbytes: float) -> float:
        """Seconds that moving `nbytes` takes at copy bandwidth."""
        return nbytes / self.copy.median

    def fields(self) -> dict[str, float]:
        """As entries of a row: GB/s and microseconds."""
        return {
            "copy_gb_per_s": self.copy.median / 1e9,
            "link_us": 1e6 * self.link.median,
        }


class YardstickMeter:
    """Measures a `Yardstick` round by round, between the rows that are held against it."""

    def __init__(self, copy_bytes: int) -> None:
        """Compile both kernels.

        Args:
            copy_bytes: size of the array that is copied; it should be far larger than the
                processor's cache.
        """
        self._copy_bytes = copy_bytes
        self._array: mx.array | None = None
        one, start = mx.array(1.0), mx.zeros((64,))
        mx.eval(one, start)
        self._links = Chain([lambda x: x + one], start)
        self._copies: list[float] = []
        self._seconds: list[float] = []
        self._copy()
        self._links.run(_LINKS)

    def _copy(self) -> float:
        """Bytes per second of passes that read and write the whole array.

        Negation and no plain copy: MLX copies pieces of arrays with kernels for any strides, and
        does nothing at all for a whole one. The buffer is handed on from pass to pass.
        """
        array, self._array = self._array, None
        if array is None:
            array = mx.random.uniform(shape=(max(1, self._copy_bytes // 4),))
            mx.eval(array)
        mx.synchronize()
        started = time.perf_counter()
        for _ in range(_PASSES):
            array = -array
        mx.eval(array)
        mx.synchronize()
        seconds = time.perf_counter() - started
        self._array = array
        return float(2 * _PASSES * array.nbytes / seconds)

    def round(self) -> None:
        """Measure both once."""
        self._copies.append(self._copy())
        self._seconds.append(self._links.run(_LINKS)[1] / _LINKS)

    def rest(self) -> None:
        """Free what is copied until the next round, so that memory can be measured."""
        self._array = None
        mx.clear_cache()

    def result(self) -> Yardstick:
        """What all rounds gave; one is measured if there was none."""
        if not self._copies:
            self.round()
        return Yardstick(Sample.of(self._copies), Sample.of(self._seconds))


def call_limit(seconds: float, nbytes: float, yard: Yardstick, disk_seconds: float = 0.0) -> str:
    """What bounds one attention call.

    Args:
        seconds: that it takes.
        nbytes: that it must read.
        yard: of the same run.
        disk_seconds: of them spent waiting for the disk.

    Returns:
        ``"disk"`` if it waits for it more than half of the time, ``"launch"`` if it takes less
        than three empty kernels, ``"bytes"`` if it reads at more than 60 % of copy bandwidth,
        else ``"arithmetic/latency"``.
    """
    if disk_seconds > DISK_SHARE * seconds:
        return DISK
    if seconds < LAUNCH_FACTOR * yard.link.median:
        return LAUNCH
    return BYTES if yard.roofline(nbytes) > BYTES_SHARE * seconds else ARITHMETIC


def step_limit(
    seconds: float, nbytes: float, yard: Yardstick, launches: int, build_seconds: float
) -> str:
    """What bounds a whole model's step.

    Args:
        seconds: that it takes.
        nbytes: that it must read, weights and cache.
        yard: of the same run.
        launches: operations in its graph that do something.
        build_seconds: that Python takes to build the graph.

    Returns:
        ``"bytes"`` above 60 % of copy bandwidth; ``"host"`` if building the graph takes more than
        60 % of the step, ``"launch"`` if as many empty kernels would; else
        ``"arithmetic/latency"``.
    """
    if yard.roofline(nbytes) > BYTES_SHARE * seconds:
        return BYTES
    if build_seconds > STEP_SHARE * seconds:
        return HOST
    if launches * yard.link.median > STEP_SHARE * seconds:
        return LAUNCH
    return ARITHMETIC


def roofline_fields(
    seconds: float, nbytes: float, yard: Yardstick, unit: str, scale: float
) -> dict[str, Any]:
    """Entries of a row: bytes, their time at copy bandwidth, and the share of it reached.

    Args:
        seconds: that were measured.
        nbytes: that must be read.
        yard: of the same run.
        unit: of times in this row, such as ``"us"``.
        scale: of that unit per second.
    """
    roofline = yard.roofline(nbytes)
    return {
        "bytes": round(nbytes),
        f"roofline_{unit}": scale * roofline,
        "achieved": roofline / seconds,
        **yard.fields(),
    }
