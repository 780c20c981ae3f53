"""What a cache lost and gained against the baseline, prompt by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pagedkv.tools.evaluation.bootstrap import Interval, paired_interval
from pagedkv.tools.evaluation.retrieval_result import Cell, Outcome, RetrievalResult
from pagedkv.tools.evaluation.scoring import mean

ALL = "all"

CLOSE = 0.5
"""Nats by which the baseline was ahead: below, an answer hangs on little. Pages of eight bits move
a margin by up to a tenth of a nat (`docs/fidelity.md`)."""


@dataclass(frozen=True)
class Pair:
    """One prompt with the baseline and with another cache; both have a score."""

    baseline: Outcome
    other: Outcome

    @property
    def difference(self) -> float:
        """The other's score less the baseline's."""
        assert self.baseline.score is not None and self.other.score is not None
        return self.other.score - self.baseline.score

    @property
    def close(self) -> bool | None:
        """Whether the baseline's own answer hung on little; None if it is not known."""
        margin = self.baseline.margin
        return None if margin is None else margin < CLOSE


@dataclass(frozen=True)
class Comparison:
    """A cache beside the baseline, over the cells of a task or of all.

    Attributes:
        cache: its label.
        task: a task's name, or `ALL`.
        cells: that both have a score of.
        errors: cells without a score, with either.
        paged_cells: cells in which some of the text was in pages when the question came.
        baseline_score: mean score of the baseline.
        score: mean score of the cache.
        lost: cells in which it scored less.
        gained: cells in which it scored more.
        close: of those lost, cells whose margin with the baseline was less than `CLOSE`; None if
            the result does not tell margins.
        firm: of those lost, cells that the baseline scored alike whatever calls the text was read
            in, or type the model computed in; None if it was read once.
        interval: of the difference of the means, 95 %; None without cells.
    """

    cache: str
    task: str
    cells: int
    errors: int
    paged_cells: int
    baseline_score: float
    score: float
    lost: int
    gained: int
    interval: Interval | None
    close: int | None = None
    firm: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def pairs(result: RetrievalResult, cache: str) -> list[Pair]:
    """Each cell that both the baseline and `cache` have a score of."""
    base = _scored(result, result.caches[0])
    other = _scored(result, cache)
    return [Pair(base[cell], other[cell]) for cell in base if cell in other]


def compare(result: RetrievalResult) -> list[Comparison]:
    """Every cache but the baseline: a comparison for each task, and one over all."""
    tasks = [*result.grid.tasks, ALL]
    return [_comparison(result, cache, task) for cache in result.caches[1:] for task in tasks]


def firm_cells(result: RetrievalResult) -> set[Cell] | None:
    """Cells that the baseline's cache scored alike in all readings.

    Returns:
        None if there was but one.
    """
    alike = [
        {pair.baseline.cell for pair in pairs(result, each) if not pair.difference}
        for each in result.again
    ]
    return set.intersection(*alike) if alike else None


def _comparison(result: RetrievalResult, cache: str, task: str) -> Comparison:
    mine = [pair for pair in pairs(result, cache) if _is_of(pair.baseline.cell, task)]
    tried = {o.cell for o in result.outcomes if o.cache == cache and _is_of(o.cell, task)}
    differences = [pair.difference for pair in mine]
    lost = [pair for pair in mine if pair.difference < 0]
    close = [pair.close for pair in lost]
    firm = firm_cells(result)
    return Comparison(
        cache,
        task,
        len(mine),
        len(tried) - len(mine),
        sum(pair.other.paged_tokens > 0 for pair in mine),
        mean([pair.baseline.score or 0.0 for pair in mine]),
        mean([pair.other.score or 0.0 for pair in mine]),
        sum(difference < 0 for difference in differences),
        sum(difference > 0 for difference in differences),
        paired_interval(differences) if differences else None,
        None if None in close else sum(map(bool, close)),
        None if firm is None else sum(pair.baseline.cell in firm for pair in lost),
    )


@dataclass(frozen=True)
class Square:
    """Cells of one depth and length, summed over tasks and seeds.

    Attributes:
        cells: how many.
        baseline_score: mean score of the baseline.
        score: mean score of the cache.
        lost: cells in which the cache scored less than the baseline.
    """

    cells: int
    baseline_score: float
    score: float
    lost: int


def squares(
    result: RetrievalResult, cache: str, tasks: Sequence[str] | None = None
) -> dict[tuple[int | None, int], Square]:
    """Depth by length, for one cache.

    Args:
        result: of a run.
        cache: its label; the baseline's own is fine.
        tasks: which; all if None.

    Returns:
        By depth in percent (None for tasks without one) and length in tokens.
    """
    grouped: dict[tuple[int | None, int], list[Pair]] = {}
    for pair in pairs(result, cache):
        cell = pair.baseline.cell
        if tasks is None or cell.task in tasks:
            grouped.setdefault((cell.depth, cell.tokens), []).append(pair)
    return {
        place: Square(
            len(group),
            mean([pair.baseline.score or 0.0 for pair in group]),
            mean([pair.other.score or 0.0 for pair in group]),
            sum(pair.difference < 0 for pair in group),
        )
        for place, group in grouped.items()
    }


def _scored(result: RetrievalResult, cache: str) -> dict[Cell, Outcome]:
    return {o.cell: o for o in result.outcomes if o.cache == cache and o.score is not None}


def _is_of(cell: Cell, task: str) -> bool:
    return task in (ALL, cell.task)
