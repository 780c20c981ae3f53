"""Whole-model decode by depth: time per token and memory; kinds of cache alternate step by step."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from pagedkv.tools.bench.caches import fill_model, release
from pagedkv.tools.bench.model_caches import (
    CacheKind,
    cache_bytes,
    cache_bytes_read,
    hooked,
    kinds,
    opened,
)
from pagedkv.tools.bench.result import Row, failed, first_words, skipped, succeeded
from pagedkv.tools.bench.settings import BenchSettings
from pagedkv.tools.bench.subject import Subject
from pagedkv.tools.bench.timing import Deadline, Sample
from pagedkv.tools.bench.yardstick import Yardstick, YardstickMeter, roofline_fields, step_limit

WARM_UP_STEPS = 6
"""Steps of a kind of cache before its first block; its memory is measured in them."""

BLOCK_STEPS = 4
"""Steps that are timed together."""

LEAD_IN_STEPS = 2
"""Steps before them: from then on one step is under way whenever a token is read."""

FEWEST_ROUNDS = 3
"""Rounds that are made even when the time is up."""

PROBE_STEPS = 3
"""Steps built on their own after the timed ones, to see what Python and launches take."""

ALL, PAIRS, RUNS = "all", "pairs", "runs"
"""Whose blocks alternate: all kinds', or those of fp16 and one other, or nobody's."""

_VIEWS = """
Broadcast Reshape Transpose Slice ExpandDims Squeeze Flatten Unflatten Split AsStrided StopGradient
Depends View Copy
"""
NO_KERNEL = frozenset(_VIEWS.split())
"""Operations that only describe memory; all others count as a launch."""


@dataclass
class Tally:
    """What the runs of one kind of cache gave.

    Attributes:
        kind: of cache.
        turns: ``"all"``, ``"pairs"`` or ``"runs"``.
        seconds: per step, of each block.
        paired: each block's time over that of the baseline's block in the same round.
        builds: seconds in which Python built the graph of a step.
        launches: operations of a step that do something.
        cache_read: bytes that a step reads from the caches.
        cache_bytes: memory that the caches take.
        active, peak: MLX's memory during the steps, and its peak then, in bytes; without what
            other kinds hold.
        fill_peak: likewise while the caches were filled.
        error: why it does not run; empty if it does.
    """

    kind: CacheKind
    turns: str = RUNS
    seconds: list[float] = field(default_factory=list)
    paired: list[float] = field(default_factory=list)
    builds: list[float] = field(default_factory=list)
    launches: int = 0
    cache_read: int = 0
    cache_bytes: int = 0
    active: int = 0
    peak: int = 0
    fill_peak: int = 0
    error: str = ""


def measure_decode(
    subject: Subject, depth: int, settings: BenchSettings, deadline: Deadline | None = None
) -> list[Row]:
    """Measure decode steps at one depth, as mlx-lm makes them.

    The caches are filled with random keys and values, without running the model. Then
    `mlx_lm.generate.generate_step` runs over all of them in turn, `BLOCK_STEPS` steps each, until
    each has made `BenchSettings.steps`. This is done `BenchSettings.repeats` times, with new
    caches. What does not fit into memory together takes turns as `alternating` says.

    Args:
        subject: the model.
        depth: tokens in the cache.
        settings: precisions, steps, repeats, chunk, tiers.
        deadline: what has not begun when it passes is left out.

    Returns:
        A row for each kind; one that cannot run has the status ``"failed"`` and a note.
    """
    deadline = deadline or Deadline()
    tallies = [Tally(kind) for kind in kinds(subject, settings)]
    race = _Race(subject, depth, settings, deadline)
    groups = race.groups(tallies)
    for _ in range(settings.repeats):
        for group in groups:
            race.run([tally for tally in group if not tally.error])
            release()
    return _rows(tallies, subject, depth, race.meter.result())


def alternating(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Which caches are in memory together: all, or each beside the first, or each alone.

    A step needs room beyond the caches, most of all where one grows: half of the largest is
    allowed for it (0.45 of mlx-lm's fp16 cache were measured at 128K tokens on an H100).

    Args:
        sizes: bytes of each, the baseline's first.
        room: bytes for all of it.

    Returns:
        Groups of indices into `sizes`.
    """

    def fit(group: list[int]) -> bool:
        each = [sizes[i] for i in group]
        return sum(each) + max(each) // 2 <= room

    everyone = list(range(len(sizes)))
    if fit(everyone):
        return [everyone]
    groups = [[0, i] if fit([0, i]) else [i] for i in everyone[1:]]
    return groups if any(0 in group for group in groups) else [[0], *groups]


class _Race:
    """Kinds of cache at one depth, with what they share."""

    def __init__(
        self, subject: Subject, depth: int, settings: BenchSettings, deadline: Deadline
    ) -> None:
        self._subject, self._depth, self._settings = subject, depth, settings
        self._deadline = deadline
        self._rounds = -(-settings.steps // BLOCK_STEPS)
        steps = WARM_UP_STEPS + self._rounds * (LEAD_IN_STEPS + BLOCK_STEPS) + PROBE_STEPS
        self._tokens = depth + steps + 2
        self.meter = YardstickMeter(settings.copy_bytes)
        self.meter.rest()

    def groups(self, tallies: Sequence[Tally]) -> list[list[Tally]]:
        """Who alternates with whom; each tally is told."""
        sizes: list[int] = []
        able: list[Tally] = []
        for tally in tallies:
            try:
                size = cache_bytes(tally.kind, self._subject, self._tokens, self._settings.tiers)
            except Exception as e:  # a kind that cannot run is a row, not the end
                tally.error = first_words(e)
                continue
            able.append(tally)
            sizes.append(size)
        room = mx.get_memory_limit() - mx.get_active_memory()
        groups = [[able[i] for i in group] for group in alternating(sizes, room)]
        for group in groups:
            for tally in group:
                tally.turns = ALL if len(groups) == 1 else PAIRS if len(group) > 1 else RUNS
        return groups

    def run(self, group: Sequence[Tally]) -> None:
        """Fill the caches of a group one after the other, then let their blocks alternate."""
        base = mx.get_active_memory()
        with ExitStack() as stack:
            runs: list[_Run] = []
            for tally in group:
                if self._deadline.passed:
                    break
                self.meter.round()
                self.meter.rest()
                try:
                    runs.append(stack.enter_context(self._open(tally, base)))
                except Exception as e:
                    tally.error = first_words(e)
                release()
            for turn in range(self._rounds):
                if turn >= FEWEST_ROUNDS and self._deadline.passed:
                    break
                first = turn % len(runs) if runs else 0
                for run in runs[first:] + runs[:first]:
                    run.attempt(run.block)
            for run in runs:
                run.attempt(run.probe)
            _note(runs)

    @contextmanager
    def _open(self, tally: Tally, base: int) -> Iterator[_Run]:
        """Fill the caches of one kind and make its first steps, with its memory.

        Args:
            tally: for the numbers.
            base: MLX's memory before the first kind of the group: the rest is that of others.
        """
        subject, settings = self._subject, self._settings
        before = mx.get_active_memory()
        others = before - base
        with opened(tally.kind, subject, self._tokens, settings.tiers) as caches:
            mx.reset_peak_memory()
            fill_model(caches, subject.shapes, self._depth, settings.chunk, subject.dtype)
            mx.clear_cache()
            tally.fill_peak = max(tally.fill_peak, mx.get_peak_memory() - others)
            tally.cache_bytes = max(tally.cache_bytes, mx.get_active_memory() - before)
            tally.cache_read = cache_bytes_read(caches)
            mx.reset_peak_memory()
            run = _Run(tally, subject, caches)
            tally.active = max(tally.active, run.warm_up() - others)
            tally.peak = max(tally.peak, mx.get_peak_memory() - others)
            try:
                yield run
            finally:
                run.close()


class _Run:
    """Filled caches, and mlx-lm's generator over them; between blocks nothing is under way."""

    def __init__(self, tally: Tally, subject: Subject, caches: list[Any]) -> None:
        from mlx_lm.generate import generate_step, generation_stream

        self.tally = tally
        self.seconds: list[float] = []
        self._subject, self._caches, self._stream = subject, caches, generation_stream
        # -1 is endless: it is asked for as many steps as there are, and then closed.
        self._steps: Any = generate_step(
            mx.array([1]), subject.model, max_tokens=-1, prompt_cache=caches
        )

    def warm_up(self) -> int:
        """Make the first steps; returns the most memory in use when a token was read."""
        active = 0
        with hooked(self.tally.kind):
            for _ in range(WARM_UP_STEPS):
                next(self._steps)
                active = max(active, mx.get_active_memory())
        mx.synchronize(self._stream)
        return active

    def attempt(self, work: Callable[[], None]) -> None:
        """Do one thing; what goes wrong ends this kind's part, and no other's."""
        if self.tally.error:
            return
        try:
            with hooked(self.tally.kind):
                work()
        except Exception as e:
            self.tally.error = first_words(e)

    def block(self) -> None:
        """Time a block.

        mlx-lm builds a step while the one before runs. Stopping for others would take that
        overlap from the first and the last step, so both are made outside the time.
        """
        for _ in range(LEAD_IN_STEPS):
            next(self._steps)
        started = time.perf_counter()
        for _ in range(BLOCK_STEPS):
            next(self._steps)
        seconds = time.perf_counter() - started
        mx.synchronize(self._stream)
        self.seconds.append(seconds / BLOCK_STEPS)

    def probe(self) -> None:
        """Build some steps on their own."""
        for _ in range(PROBE_STEPS):
            build, self.tally.launches = _probe(self._subject, self._caches)
            self.tally.builds.append(build)

    def close(self) -> None:
        """End the generator."""
        self._steps.close()


def _note(runs: Sequence[_Run]) -> None:
    """Put the blocks of a group into its tallies, beside the baseline's where it alternated."""
    able = [run for run in runs if not run.tally.error]
    baseline = next((run for run in able if run.tally.kind.is_baseline), None)
    for run in able:
        run.tally.seconds += run.seconds
        if baseline is not None and run.tally.turns != RUNS:
            pairs = zip(run.seconds, baseline.seconds, strict=True)
            run.tally.paired += [own / other for own, other in pairs]


def _probe(subject: Subject, caches: list[Any]) -> tuple[float, int]:
    """Seconds in which Python builds the graph of a step, and the launches in it."""
    started = time.perf_counter()
    logits = subject.model(mx.array([[1]]), cache=caches)
    token = mx.argmax(logits[:, -1], axis=-1)
    seconds = time.perf_counter() - started
    launches = count_launches(token)
    mx.eval(token)
    return seconds, launches


def count_launches(x: mx.array) -> int:
    """Operations in the graph of a lazy array that do more than describe memory."""
    graph = io.StringIO()
    mx.export_to_dot(graph, x)
    names = re.findall(r'label ?="([^"]*)", shape=rectangle', graph.getvalue())
    return sum(name not in NO_KERNEL for name in names)


def _rows(tallies: list[Tally], subject: Subject, depth: int, yard: Yardstick) -> list[Row]:
    baseline = next((t for t in tallies if t.kind.is_baseline and t.seconds), None)
    rows = []
    for tally in tallies:
        row: Row = {
            "part": "decode",
            "model": subject.name,
            "depth": depth,
            "what": tally.kind.name,
        }
        if tally.error:
            rows.append(failed(row, f"does not run: {tally.error}"))
        elif not tally.seconds:
            rows.append(skipped(row, "the time was up"))
        else:
            rows.append(succeeded(row | _numbers(tally, baseline, subject, yard)))
    return rows


def _numbers(tally: Tally, baseline: Tally | None, subject: Subject, yard: Yardstick) -> Row:
    time = Sample.of(tally.seconds)
    build = Sample.of(tally.builds).median
    nbytes = subject.weight_bytes + tally.cache_read
    ratio = _time_of_baseline(tally, baseline)
    return {
        **time.fields("ms", 1e3),
        "tokens_per_s": 1 / time.median,
        "times_fp16": 1 / ratio["time_of_fp16"] if ratio else None,
        **ratio,
        "turns": tally.turns,
        **roofline_fields(time.median, nbytes, yard, "ms", 1e3),
        "limit": step_limit(time.median, nbytes, yard, tally.launches, build),
        "build_ms": 1e3 * build,
        "launches": tally.launches,
        "weight_bytes": subject.weight_bytes,
        "cache_bytes": tally.cache_bytes,
        "cache_of_fp16": tally.cache_bytes / baseline.cache_bytes if baseline else None,
        "active_bytes": tally.active,
        "peak_bytes": tally.peak,
        "peak_of_fp16": tally.peak / baseline.peak if baseline else None,
        "fill_peak_bytes": tally.fill_peak,
        "blocks": time.count,
        "steps": time.count * BLOCK_STEPS,
    }


def _time_of_baseline(tally: Tally, baseline: Tally | None) -> dict[str, float]:
    """Time over the baseline's: of paired blocks with its spread, or of medians without."""
    if tally.paired:
        return Sample.of(tally.paired).fields("time_of_fp16")
    if baseline is None:
        return {}
    ratio = Sample.of(tally.seconds).median / Sample.of(baseline.seconds).median
    return {"time_of_fp16": ratio}
