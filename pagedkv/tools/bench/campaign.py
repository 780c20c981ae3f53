"""A list of measurements, run one after the other, each written down as soon as it is made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from pagedkv.tools.bench.attention import measure_attention
from pagedkv.tools.bench.caches import release
from pagedkv.tools.bench.contenders import Place
from pagedkv.tools.bench.decode import measure_decode
from pagedkv.tools.bench.eviction import TOKENS, measure_eviction
from pagedkv.tools.bench.prefill import measure_prefill
from pagedkv.tools.bench.result import Result, Row, failed, first_words, group_of, skipped
from pagedkv.tools.bench.seal import measure_seal, seal_tokens
from pagedkv.tools.bench.settings import (
    PARTS,
    STREAMING,
    AttentionShape,
    BenchSettings,
    short_tokens,
)
from pagedkv.tools.bench.streaming import LEAST_TOKENS, measure_overlap, measure_reads
from pagedkv.tools.bench.subject import Subject
from pagedkv.tools.bench.timing import Deadline

Say = Callable[[str], None]


@dataclass(frozen=True)
class Task:
    """One group of rows, measured in turns.

    Attributes:
        part: ``"attention"``, ``"paged"`` (attention again, over windows that hold nothing),
            ``"decode"``, ``"prefill"`` or ``"seal"``; of streaming ``"reads"``, ``"overlap"`` or
            ``"eviction"``.
        depth: tokens in the cache, or of the prompt.
        shape: of attention; None for the parts that take a model.
    """

    part: str
    depth: int
    shape: AttentionShape | None = None

    def row(self, model: str, queries: int) -> Row:
        """What all its rows have in common."""
        where: Row = {"model": model, "depth": self.depth}
        if self.shape is not None:
            where = {"shape": str(self.shape), "depth": self.depth, "queries": queries}
        return {"part": self.part, **where, "what": "all"}


def plan_tasks(
    parts: Sequence[str],
    shapes: Sequence[AttentionShape],
    depths: Sequence[int],
    settings: BenchSettings,
) -> list[Task]:
    """The tasks of some parts at some depths; sealing goes with prefill."""
    found: list[Task] = []
    for part in PARTS:
        if part not in parts:
            continue
        if part == "attention":
            found += [Task(part, depth, shape) for shape in shapes for depth in depths]
        else:
            found += [Task(part, depth) for depth in depths]
    if "prefill" in parts:
        found.append(Task("seal", seal_tokens(settings)))
    if STREAMING in parts:
        found.append(Task("reads", 0, shapes[0]))
        found += [Task("overlap", max(*depths, LEAST_TOKENS), shape) for shape in shapes]
        found += [Task("eviction", TOKENS, shape) for shape in shapes]
    return found


@dataclass
class Campaign:
    """What a list of tasks needs.

    Attributes:
        settings: how to measure.
        dtype: of attention alone.
        model: name of the model, for rows.
        opener: makes the model of mlx-lm, when the first task needs it.
        result: where rows go.
        deadline: tasks that have not begun when it passes are noted as skipped.
        say: called with one line before each task.
    """

    settings: BenchSettings
    dtype: mx.Dtype
    model: str
    opener: Callable[[], Any]
    result: Result
    deadline: Deadline
    say: Say

    def __post_init__(self) -> None:
        self._subject: Subject | None = None

    def run(self, tasks: Iterable[Task]) -> None:
        """Run tasks; those whose rows are in the result already are passed over.

        A task that fails is a failed row.

        Raises:
            ConfigError: if the model cannot be had, or its caches cannot be filled.
            OSError: if the result cannot be written.
        """
        for task in tasks:
            row = task.row(self.model, self.settings.queries)
            if self.result.has(group_of(row)):
                continue
            if self.deadline.passed:
                self.result.add([skipped(row, "the time was up")])
                continue
            if task.shape is None:
                self._require_subject()
            self.say(f"{task.part}, {task.shape or self.model}, {short_tokens(task.depth)} tokens")
            self.result.add(self._attempt(task, row))
            release()

    def _require_subject(self) -> Subject:
        if self._subject is None:
            self.say(f"making {self.model}")
            subject = Subject(self.model, self.opener())
            _ = subject.shapes  # says now whether its caches can be filled
            mx.eval(subject.model.parameters())  # casts of them would be counted with the caches
            release()
            self._subject = subject
        return self._subject

    def _attempt(self, task: Task, row: Row) -> list[Row]:
        try:
            return self._measure(task)
        except Exception as e:  # such as no memory for the yardstick: a row, not the end
            return [failed(row, f"does not run: {first_words(e)}")]

    def _measure(self, task: Task) -> list[Row]:
        if task.part in ("reads", "overlap", "eviction"):
            return self._stream(task)
        if task.shape is not None:
            place = Place(task.shape, task.depth, self.dtype, self.settings)
            return [row | {"part": task.part} for row in measure_attention(place, self.deadline)]
        subject = self._require_subject()
        if task.part == "seal":
            return measure_seal(subject, self.settings)
        measure = measure_decode if task.part == "decode" else measure_prefill
        return measure(subject, task.depth, self.settings, self.deadline)

    def _stream(self, task: Task) -> list[Row]:
        assert task.shape is not None
        base = task.row(self.model, self.settings.queries)
        if task.part == "reads":
            return measure_reads(self.settings, base, self.deadline)
        if task.part == "overlap":
            return measure_overlap(task.shape, task.depth, self.settings, base, self.deadline)
        return measure_eviction(task.shape, self.settings, base, self.deadline)
