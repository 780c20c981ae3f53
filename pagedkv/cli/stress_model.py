"""A stress run of a real model: a long text under tight budgets, beside the same with all warm."""

from __future__ import annotations

import time
import warnings
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import psutil

from pagedkv.cache import PagedCache
from pagedkv.cli.loading import wrapped
from pagedkv.cli.stress_checks import BudgetWatch, Check, StressReport, Watch, check_books
from pagedkv.config import TierConfig
from pagedkv.errors import ColdStoreError
from pagedkv.sizes import format_size
from pagedkv.stats import CacheStats
from pagedkv.stress import Array, StressOptions


class ModelStress:
    """One run. The text is Python's own manual, starting at a place that the seed chooses."""

    def __init__(
        self,
        name: str,
        model: Any,
        tokenizer: Any,
        options: StressOptions,
        config: TierConfig,
        watch: Watch = lambda *_: None,
    ) -> None:
        """Tokenize the text.

        Args:
            name: of the model, for the report.
            model: of mlx-lm.
            tokenizer: of the model.
            options: prompt tokens, seed, chunk; `needles` is the number of decode steps.
            config: tiers.
            watch: called often, for a progress line.
        """
        self._name, self._model, self._options = name, model, options
        self._config, self._watch = config, watch
        self._tokens = text_tokens(tokenizer, options.tokens + options.needles, options.seed)
        self._books = Check("bookkeeping")
        self._finite = Check("finite logits")
        self._placement = Check("placement")
        self._reads = Check("page reads")
        self._seconds: dict[str, float] = {}

    def run(self) -> StressReport:
        """Run under the budgets, then with everything warm if that fits in memory, and compare."""
        with wrapped(self._model, self._config) as cache:
            budgets = BudgetWatch(cache)
            logits: list[Array] = []
            try:
                logits = self._play(cache, budgets, "")
                self._reads.count += 1
            except ColdStoreError as e:  # a page that cannot be read is a finding
                self._reads.fail(str(e))
            stats = cache.stats()
        for i, row in enumerate(logits):
            self._finite.hold(bool(np.isfinite(row).all()), f"decode step {i} has no finite logits")
        if logits:
            self._compare(logits, stats)
        else:
            self._placement.skipped = self._finite.skipped = "the run did not end"
        return StressReport(
            self._name,
            self._options.tokens,
            [self._placement, self._finite, budgets.check, self._books, self._reads],
            self._seconds,
            budgets.peaks,
            budgets.budgets,
            stats,
        )

    def _play(self, cache: PagedCache, budgets: BudgetWatch, suffix: str) -> list[Array]:
        """Prefill and decode; the logits of each decode step."""
        started, end = time.perf_counter(), self._options.tokens
        for start in range(0, end, self._options.chunk):
            stop = min(start + self._options.chunk, end)
            self._model(self._tokens[None, start:stop], cache=cache)
            mx.eval([layer.state for layer in cache])  # as mlx-lm does after each chunk
            self._look(cache, budgets, stop)
            self._watch(f"prefill{suffix}", stop, end, budgets.note())
        self._seconds[f"prefill{suffix}"] = time.perf_counter() - started
        started, logits = time.perf_counter(), []
        for at in range(end, end + self._options.needles):
            out = self._model(self._tokens[None, at : at + 1], cache=cache)
            logits.append(np.array(out[0, -1].astype(mx.float32)))
            self._look(cache, budgets, at + 1)
            self._watch(f"decode{suffix}", at + 1 - end, self._options.needles, budgets.note())
        self._seconds[f"decode{suffix}"] = time.perf_counter() - started
        return logits

    def _look(self, cache: PagedCache, budgets: BudgetWatch, tokens: int) -> None:
        budgets.sample()
        check_books(cache, tokens, self._books)

    def _compare(self, logits: list[Array], stats: CacheStats) -> None:
        """Placement never changes a token: the same with all pages warm gives identical bits."""
        pages = stats.warm.bytes + stats.cold.bytes
        if not stats.cold.pages:
            self._placement.skipped = "no page is cold under these budgets: lower --warm"
            return
        free = psutil.virtual_memory().available
        if free < 2 * pages:
            self._placement.skipped = (
                f"an all-warm run needs {format_size(2 * pages)} of memory, "
                f"{format_size(free)} are free"
            )
            return
        # Half as much again: growing slabs hold back a part of their budget.
        config = replace(self._config, warm=2 * pages)
        with wrapped(self._model, config) as cache, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what there is to say was said in the first run
            expected = self._play(cache, BudgetWatch(cache), ", all warm")
        for i, (row, other) in enumerate(zip(logits, expected, strict=True)):
            off = float(np.abs(row - other).max())
            self._placement.hold(
                np.array_equal(row, other), f"decode step {i}: logits differ by up to {off:.3g}"
            )


def text_tokens(tokenizer: Any, count: int, seed: int) -> mx.array:
    """`count` tokens of Python's manual, repeated if it is too short, as a 1-d array."""
    from pydoc_data.topics import topics  # half a megabyte, in every CPython

    names = sorted(topics)
    first = int(np.random.default_rng(seed).integers(len(names)))
    tokens: list[int] = []
    while len(tokens) < count:
        for name in names[first:] + names[:first]:
            tokens += tokenizer.encode(topics[name], add_special_tokens=False)
            if len(tokens) >= count:
                break
    return mx.array(tokens[:count])
