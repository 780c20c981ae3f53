"""Whole-model decode by depth: time per token and memory, with each kind of cache, in turns."""

from __future__ import annotations

import io
import itertools
import re
import time
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from pagedkv.bench.caches import fill_model, release
from pagedkv.bench.model_caches import CacheKind, cache_bytes_read, kinds, opened
from pagedkv.bench.result import Row, failed, first_words, skipped, succeeded
from pagedkv.bench.settings import BenchSettings
from pagedkv.bench.subject import Subject
from pagedkv.bench.timing import Deadline, Sample
from pagedkv.bench.yardstick import Yardstick, YardstickMeter, roofline_fields, step_limit

WARM_UP_STEPS = 4
PROBE_STEPS = 3
"""Steps built on their own after the timed ones, to see what Python and launches take."""

_VIEWS = """
Broadcast Reshape Transpose Slice ExpandDims Squeeze Flatten Unflatten Split AsStrided StopGradient
Depends View Copy
"""
NO_KERNEL = frozenset(_VIEWS.split())
"""Operations that only describe memory; all others count as a launch."""


@dataclass
class Tally:
    """What the repeats of one kind of cache gave.

    Attributes:
        kind: of cache.
        seconds: of each decode step.
        builds: seconds in which Python built the graph of a step.
        launches: operations of a step that do something.
        cache_read: bytes that a step reads from the caches.
        cache_bytes: memory that the caches take.
        active, peak: MLX's memory during the steps, and its peak then, in bytes.
        fill_peak: MLX's peak while the caches were filled.
        error: why it does not run; empty if it does.
    """

    kind: CacheKind
    seconds: list[float] = field(default_factory=list)
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
    `mlx_lm.generate.generate_step` runs: the next step is on its way before a token is read. Each
    kind of cache is built, run and freed `BenchSettings.repeats` times, all kinds in turn.

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
    meter = YardstickMeter(settings.copy_bytes)
    for _ in range(settings.repeats):
        for tally in tallies:
            if tally.error or deadline.passed:
                continue
            meter.round()
            meter.rest()
            try:
                _repeat(tally, subject, depth, settings)
            except Exception as e:  # a kind that cannot run is a row, not the end
                tally.error = first_words(e)
            release()
    return _rows(tallies, subject, depth, meter.result())


def _repeat(tally: Tally, subject: Subject, depth: int, settings: BenchSettings) -> None:
    tokens = depth + settings.steps + WARM_UP_STEPS + PROBE_STEPS + 2
    before = mx.get_active_memory()
    with opened(tally.kind, subject, tokens, settings.tiers) as caches:
        mx.reset_peak_memory()
        fill_model(caches, subject.shapes, depth, settings.chunk, subject.dtype)
        mx.clear_cache()
        tally.fill_peak = max(tally.fill_peak, mx.get_peak_memory())
        tally.cache_bytes = max(tally.cache_bytes, mx.get_active_memory() - before)
        tally.cache_read = cache_bytes_read(caches)
        mx.reset_peak_memory()
        tally.seconds += _steps(subject, caches, settings.steps)
        tally.active = max(tally.active, mx.get_active_memory())
        tally.peak = max(tally.peak, mx.get_peak_memory())
        for _ in range(PROBE_STEPS):
            build, tally.launches = _probe(subject, caches)
            tally.builds.append(build)


def _steps(subject: Subject, caches: list[Any], steps: int) -> list[float]:
    """Seconds of each decode step, the first few aside."""
    from mlx_lm.generate import generate_step

    marks = []
    prompt = mx.array([1])
    count = WARM_UP_STEPS + steps
    for _ in generate_step(prompt, subject.model, max_tokens=count, prompt_cache=caches):
        marks.append(time.perf_counter())
    kept = marks[WARM_UP_STEPS - 1 :]
    return [after - at for at, after in itertools.pairwise(kept)]


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
    return {
        **time.fields("ms", 1e3),
        "tokens_per_s": 1 / time.median,
        "times_fp16": Sample.of(baseline.seconds).median / time.median if baseline else None,
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
        "steps": time.count,
    }
