"""Whole-model prefill by prompt length, with each kind of cache, in turns."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import mlx.core as mx

from pagedkv.tools.bench.caches import release
from pagedkv.tools.bench.model_caches import CacheKind, cache_bytes_read, hooked, kinds, opened
from pagedkv.tools.bench.result import Row, failed, first_words, skipped, succeeded
from pagedkv.tools.bench.settings import BenchSettings
from pagedkv.tools.bench.subject import Subject
from pagedkv.tools.bench.timing import Deadline, Sample
from pagedkv.tools.bench.yardstick import (
    ARITHMETIC,
    BYTES,
    BYTES_SHARE,
    Yardstick,
    YardstickMeter,
    roofline_fields,
)


@dataclass
class Tally:
    """What the repeats of one kind of cache gave: seconds, bytes read from it, MLX's memory."""

    kind: CacheKind
    seconds: list[float] = field(default_factory=list)
    cache_read: int = 0
    active: int = 0
    peak: int = 0
    error: str = ""


def measure_prefill(
    subject: Subject, tokens: int, settings: BenchSettings, deadline: Deadline | None = None
) -> list[Row]:
    """Measure a prompt from its first token to the logits after its last, as mlx-lm runs it.

    Each kind of cache takes its turn `BenchSettings.repeats` times, after a short prompt to
    compile what is needed.

    Args:
        subject: the model.
        tokens: length of the prompt.
        settings: precisions, repeats, chunk, tiers.
        deadline: what has not begun when it passes is left out.

    Returns:
        A row for each kind; one that cannot run has the status ``"failed"`` and a note.
    """
    deadline = deadline or Deadline()
    tallies = [Tally(kind) for kind in kinds(subject, settings)]
    meter = YardstickMeter(settings.copy_bytes)
    warm_up = min(tokens, settings.chunk + 1)
    for turn in range(1 + settings.repeats):
        for tally in tallies:
            if tally.error or (turn and deadline.passed):
                continue
            meter.round()
            meter.rest()
            try:
                _prompt(tally, subject, tokens if turn else warm_up, settings, keep=turn > 0)
            except Exception as e:  # a kind that cannot run is a row, not the end
                tally.error = first_words(e)
            release()
    return _rows(tallies, subject, tokens, settings.chunk, meter.result())


def _prompt(
    tally: Tally, subject: Subject, tokens: int, settings: BenchSettings, keep: bool
) -> None:
    from mlx_lm.generate import generate_step

    prompt = subject.prompt(tokens)
    with opened(tally.kind, subject, tokens, settings.tiers) as caches, hooked(tally.kind):
        mx.eval(prompt)
        mx.reset_peak_memory()
        started = time.perf_counter()
        for _ in generate_step(
            prompt,
            subject.model,
            max_tokens=0,  # up to the logits after the last token, and no further
            prefill_step_size=settings.chunk,
            prompt_cache=caches,
        ):
            pass
        mx.synchronize()
        seconds = time.perf_counter() - started
        if keep:
            tally.seconds.append(seconds)
            tally.active = max(tally.active, mx.get_active_memory())
            tally.peak = max(tally.peak, mx.get_peak_memory())
            tally.cache_read = cache_bytes_read(caches)


def prefill_bytes(weights: int, cache: int, tokens: int, chunk: int) -> int:
    """Bytes that a prompt must read: the weights once per chunk, and what is cached by then.

    Args:
        weights: bytes.
        cache: bytes of the cache after the prompt.
        tokens: in the prompt.
        chunk: tokens at a time.
    """
    ends = [min(start + chunk, tokens) for start in range(0, tokens, chunk)]
    return len(ends) * weights + cache * sum(ends) // tokens


def _rows(
    tallies: list[Tally], subject: Subject, tokens: int, chunk: int, yard: Yardstick
) -> list[Row]:
    baseline = next((t for t in tallies if t.kind.is_baseline and t.seconds), None)
    rows = []
    for tally in tallies:
        row: Row = {
            "part": "prefill",
            "model": subject.name,
            "depth": tokens,
            "what": tally.kind.name,
        }
        if tally.error:
            rows.append(failed(row, f"does not run: {tally.error}"))
        elif not tally.seconds:
            rows.append(skipped(row, "the time was up"))
        else:
            nbytes = prefill_bytes(subject.weight_bytes, tally.cache_read, tokens, chunk)
            rows.append(succeeded(row | _numbers(tally, baseline, tokens, nbytes, yard)))
    return rows


def _numbers(
    tally: Tally, baseline: Tally | None, tokens: int, nbytes: int, yard: Yardstick
) -> Row:
    time = Sample.of(tally.seconds)
    return {
        **time.fields("s"),
        "tokens_per_s": tokens / time.median,
        "times_fp16": Sample.of(baseline.seconds).median / time.median if baseline else None,
        **roofline_fields(time.median, nbytes, yard, "s", 1.0),
        "limit": _limit(time.median, nbytes, yard),
        "active_bytes": tally.active,
        "peak_bytes": tally.peak,
        "peak_of_fp16": tally.peak / baseline.peak if baseline else None,
        "repeats": time.count,
    }


def _limit(seconds: float, nbytes: float, yard: Yardstick) -> str:
    """``"bytes"`` above 60 % of copy bandwidth; a prompt is too much work to be launches."""
    return BYTES if yard.roofline(nbytes) > BYTES_SHARE * seconds else ARITHMETIC
