"""Attention alone: one layer, a query token or a few, ours beside MLX's, in turns."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from pagedkv.attn.driver import DECODE_TOKENS
from pagedkv.tools.bench.caches import release
from pagedkv.tools.bench.contenders import (
    CACHE_BYTES,
    COLD,
    QUANTIZED_NAME,
    SHUFFLED,
    Contender,
    Place,
    paged,
    quantized,
    stock,
    stock_name,
)
from pagedkv.tools.bench.result import Row, failed, first_words, succeeded
from pagedkv.tools.bench.timing import Chain, Deadline, Sample, chain_lengths
from pagedkv.tools.bench.yardstick import Yardstick, YardstickMeter, call_limit, roofline_fields

WARM_UP_ROUNDS = 2
FEWEST_ROUNDS = 3
"""Rounds that are made even when the time is up."""


@dataclass
class _Race:
    """A contender with its clocks; times are seconds per call."""

    contender: Contender
    chain: Chain
    single: Chain
    call_seconds: float
    output: mx.array
    difference: float
    length: int = 1
    error: str = ""
    times: list[float] = field(default_factory=list)
    builds: list[float] = field(default_factory=list)
    singles: list[float] = field(default_factory=list)
    stalls: list[float] = field(default_factory=list)

    @property
    def is_baseline(self) -> bool:
        """Whether it is what the others are compared with."""
        return self.contender.name.startswith("mlx ")

    def attempt(self, keep: bool, builds_count: bool) -> None:
        """Measure once; what goes wrong ends this contender's part, and no other's."""
        try:
            self._measure(keep, builds_count)
        except Exception as e:
            self.error = first_words(e)
            self.contender.close()

    def _measure(self, keep: bool, builds_count: bool) -> None:
        stalled = self.contender.stall_seconds
        build, evaluate = self.chain.run(self.length)
        stalled = self.contender.stall_seconds - stalled
        single = sum(self.single.run(1))
        if keep:
            counts = builds_count or self.contender.evaluates
            self.times.append((evaluate + build * counts) / self.length)
            self.stalls.append(stalled / self.length)
            self.builds.append(build / self.length)
            self.singles.append(single)


def measure_attention(place: Place, deadline: Deadline | None = None) -> list[Row]:
    """Measure one shape at one depth: MLX's attention, mlx-lm's quantized one, and ours.

    Each is measured as a chain of dependent calls over several caches, and as a single call. All
    of them, and the yardsticks, take turns for `BenchSettings.rounds` rounds.

    Args:
        place: shape, depth, type, settings.
        deadline: rounds end when it has passed.

    Returns:
        A row for each; one that cannot run has the status ``"failed"`` and a note.
    """
    deadline = deadline or Deadline()
    q = mx.random.normal(
        (1, place.shape.query_heads, place.settings.queries, place.shape.dim)
    ).astype(place.dtype)
    mx.eval(q)
    base = _base_row(place)
    races: list[_Race] = []
    rows: list[Row] = []
    reference: mx.array | None = None
    for name, build in _builders(place):
        try:
            contender = build()
            if contender is not None:
                race = _ready(contender, q, reference)
                if race.is_baseline:
                    reference = race.output
                races.append(race)
        except Exception as e:  # whatever a backend lacks or runs out of is a row, not the end
            rows.append(failed(base | {"what": name}, f"does not run: {first_words(e)}"))
            release()
    lengths = chain_lengths([r.chain for r in races], [r.call_seconds for r in races])
    for race, length in zip(races, lengths, strict=True):
        race.length = length
    yard = _run(races, place, deadline)
    rows = [*_rows(races, base, yard), *rows]
    for race in races:
        race.contender.close()
    races.clear()
    release()
    return rows


def _base_row(place: Place) -> Row:
    return {
        "part": "attention",
        "shape": str(place.shape),
        "depth": place.depth,
        "queries": place.settings.queries,
    }


def _builders(place: Place) -> Iterator[tuple[str, Callable[[], Contender | None]]]:
    yield stock_name(place.dtype), functools.partial(stock, place)
    yield QUANTIZED_NAME, functools.partial(quantized, place)
    for kv in place.settings.kv:
        yield kv, functools.partial(paged, place, kv)
        if place.settings.shuffled:
            yield f"{kv}{SHUFFLED}", functools.partial(paged, place, kv, SHUFFLED)
        if place.settings.cold:
            yield f"{kv}{COLD}", functools.partial(paged, place, kv, COLD)


def _ready(contender: Contender, q: mx.array, reference: mx.array | None) -> _Race:
    """Call it, see that it gives numbers, and how long that takes.

    Raises:
        ArithmeticError: if it gives NaN or infinity.
    """
    output = contender.calls[0](q).astype(mx.float32)
    if not math.isfinite(_rms(output)):
        raise ArithmeticError("the output is not finite")
    off = 0.0 if reference is None else _rms(output - reference) / _rms(reference)
    chain = Chain(contender.calls, q)
    return _Race(contender, chain, Chain(contender.calls, q), chain.call_seconds(), output, off)


def _rms(x: mx.array) -> float:
    size: Any = mx.sqrt(mx.mean(mx.square(x))).item()
    return float(size)


def _run(races: list[_Race], place: Place, deadline: Deadline) -> Yardstick:
    """All rounds; every round begins with another contender."""
    meter = YardstickMeter(place.settings.copy_bytes)
    # Attention over many query tokens evaluates on the way: building it is then most of the work.
    builds_count = place.settings.queries > DECODE_TOKENS
    for turn in range(WARM_UP_ROUNDS + place.settings.rounds):
        kept = turn - WARM_UP_ROUNDS
        if kept >= FEWEST_ROUNDS and deadline.passed:
            break
        if kept >= 0:
            meter.round()
        first = turn % len(races) if races else 0
        for race in races[first:] + races[:first]:
            if not race.error:
                race.attempt(kept >= 0, builds_count)
    return meter.result()


def _rows(races: list[_Race], base: Row, yard: Yardstick) -> list[Row]:
    rows: list[Row] = []
    baseline: float | None = None
    for race in races:
        row = base | {"what": race.contender.name}
        if race.error:
            rows.append(failed(row, f"does not run: {race.error}"))
            continue
        seconds = Sample.of(race.times).median
        if baseline is None and race.is_baseline:
            baseline = seconds
        rows.append(_row(race, row, yard, baseline))
    return rows


def _row(race: _Race, row: Row, yard: Yardstick, baseline: float | None) -> Row:
    contender, time = race.contender, Sample.of(race.times)
    stall = Sample.of(race.stalls).median
    fits = contender.working_set < CACHE_BYTES and not contender.evaluates
    return succeeded(
        {
            **row,
            **time.fields("us", 1e6),
            **Sample.of(race.singles).fields("single_us", 1e6),
            "disk_wait_us": 1e6 * stall,
            "build_us": 1e6 * Sample.of(race.builds).median,
            "times_fp16": baseline / time.median if baseline else None,
            **roofline_fields(time.median, contender.nbytes, yard, "us", 1e6),
            "limit": call_limit(time.median, contender.nbytes, yard, stall),
            "difference": race.difference,
            "caches": len(contender.calls),
            "working_set_bytes": contender.working_set,
            "chain": race.length,
            "rounds": time.count,
            **contender.facts,
            "note": "fits the processor's cache" if fits else "",
        }
    )
