"""Retrieval tasks for the rows of a comparison: the same caches, in the same result."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pagedkv.config.tier_config import TierConfig
from pagedkv.tools.bench.result import OK, Row
from pagedkv.tools.bench.timing import Deadline
from pagedkv.tools.evaluation.caches import Own, as_it_runs
from pagedkv.tools.evaluation.quantized import quantized_caches
from pagedkv.tools.evaluation.result import RETRIEVAL, Result
from pagedkv.tools.evaluation.retrieval import Again, CacheMaker, require_cells, run_retrieval
from pagedkv.tools.evaluation.retrieval_comparison import compare
from pagedkv.tools.evaluation.retrieval_result import Grid, RetrievalResult
from pagedkv.tools.evaluation.variants import (
    AGAIN,
    Variant,
    require_different,
    require_other_types,
    require_shorter,
)

SAVED_EVERY = 10.0
"""Seconds between two writings of the result: what is lost at most if the process is killed."""

Watch = Callable[[str, int, int, str], None]
"""Called with what is being done, how much of it, of how much, and what is counted."""


@dataclass
class Retrieval:
    """What retrieval tasks need as part of a comparison.

    Attributes:
        model: of mlx-lm, not wrapped.
        tokenizer: of the model.
        variants: to be compared with the model's own cache.
        grid: of cells.
        result: where outcomes go; those that it has are not run again.
        deadline: no cell is begun when this has passed.
        say: called with one line for each thing to be known.
        watch: called as cells are done.
    """

    model: Any
    tokenizer: Any
    variants: Sequence[Variant]
    grid: Grid
    result: Result
    deadline: Deadline
    say: Callable[[str], None] = lambda line: None
    watch: Watch = lambda label, done, total, unit: None

    def require(self) -> None:
        """Check what can be checked before anything is run.

        Raises:
            ConfigError: if a label comes twice, a row is the baseline itself, or the cells do
                not fit the model or the tasks.
        """
        require_different(self.variants)
        require_shorter(self.variants, self.grid.chunk)
        require_other_types(self.variants, Own.of(self.model).label)
        require_cells(self.model, self.tokenizer, self.grid)

    def run(self) -> None:
        """Run every cell; what goes wrong with one cache is an error in its outcome.

        Raises:
            ConfigError: as `require` does, or if no such pages can be had for the model.
            OSError: if the result cannot be written.
        """
        variants = [as_it_runs(variant, self.model) for variant in self.variants]
        for variant in variants:
            if variant.note:
                self.say(f"{variant.label}: {variant.note}")
        before, saved = self.result.retrieval, time.monotonic()
        self.say(f"{RETRIEVAL}, {', '.join(self.grid.tasks)}: {len(self.grid.cells())} cells")

        def keep(so_far: RetrievalResult) -> None:
            nonlocal saved
            if time.monotonic() - saved > SAVED_EVERY:
                self._keep(so_far, variants)
                saved = time.monotonic()

        done = run_retrieval(
            self.model,
            self.tokenizer,
            [(Own.of(self.model).label, None), *((v.label, self._cache(v)) for v in variants)],
            self.grid,
            progress=lambda done, total: self.watch(RETRIEVAL, done, total, "cells"),
            deadline=self.deadline,
            before=before.outcomes if before else (),
            keep=keep,
        )
        self._keep(done, variants)

    def _keep(self, so_far: RetrievalResult, variants: Sequence[Variant]) -> None:
        notes = ("", *(variant.note for variant in variants))
        self.result.retrieval = replace(so_far, notes=notes)
        self.result.write()

    def _cache(self, variant: Variant) -> TierConfig | CacheMaker | Again | None:
        if variant.kind == AGAIN:
            return Again(variant.calls or self.grid.chunk, variant.dtype)
        if variant.config is not None or variant.bits is None:
            return variant.config
        return partial(quantized_caches, self.model, variant.bits, variant.dequantized)


def comparison_rows(result: RetrievalResult, model: str) -> list[Row]:
    """A row for each cache and task, named as those of texts are: for CSV.

    Args:
        result: of a run.
        model: its name.
    """
    rows: list[Row] = []
    for each in compare(result):
        interval = each.interval
        rows.append(
            {
                "model": model,
                "text": each.task,
                "leg": RETRIEVAL,
                "what": each.cache,
                "status": OK,
                "cells": each.cells,
                "errors": each.errors,
                "paged_cells": each.paged_cells,
                "baseline_score": each.baseline_score if interval else None,
                "score": each.score if interval else None,
                "difference": interval.mean if interval else None,
                "difference_low": interval.low if interval else None,
                "difference_high": interval.high if interval else None,
                "lost": each.lost,
                "gained": each.gained,
                "close": each.close,
                "firm": each.firm,
            }
        )
    return rows
