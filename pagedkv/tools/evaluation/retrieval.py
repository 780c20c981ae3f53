"""Runs retrieval tasks on a model with mlx-lm's cache and with paged ones, cell by cell.

A cell is a task at a length, a depth and a seed. All caches get the very same tokens. The text is
read first, and the question in a call of its own: in one chunk with the text it would be attended
in 16 bit, before the pages are sealed, and say nothing about them.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx

from pagedkv.cache.paged_cache import PagedCache
from pagedkv.config.tier_config import TierConfig
from pagedkv.errors import ConfigError
from pagedkv.integrations.mlx_lm.wrapping import unwrap, wrap, wrapping_of
from pagedkv.tools.bench.result import first_words
from pagedkv.tools.bench.timing import Deadline
from pagedkv.tools.evaluation.caches import hooked, own_caches
from pagedkv.tools.evaluation.copies import Copies
from pagedkv.tools.evaluation.prompts import Example, build
from pagedkv.tools.evaluation.retrieval_result import Cell, Grid, Outcome, RetrievalResult

BASELINE = "fp16"
CacheMaker = Callable[[], list[Any]]
"""Makes an empty cache of another kind, such as mlx-lm's quantized one: one per layer."""


@dataclass(frozen=True)
class Again:
    """mlx-lm's own cache once more: how much is chance.

    Attributes:
        chunk: tokens per call while the text is read.
        dtype: in which the model computes, see `Copies.of`.
    """

    chunk: int
    dtype: str | None = None


Kind = TierConfig | CacheMaker | Again | None
Configs = Sequence[tuple[str, Kind]]


def run_retrieval(
    model: Any,
    tokenizer: Any,
    configs: Configs,
    grid: Grid | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
    deadline: Deadline | None = None,
    before: Sequence[Outcome] = (),
    keep: Callable[[RetrievalResult], None] | None = None,
) -> RetrievalResult:
    """Run every cell on mlx-lm's cache and on each of the others.

    Args:
        model: of mlx-lm, not wrapped; it is not wrapped afterwards either.
        tokenizer: of the model, as `mlx_lm.load` returns it.
        configs: labels and tiers; None is mlx-lm's own cache, `Again` the same in other calls or
            another type, a function makes another kind. mlx-lm's own is the baseline and run
            first, asked for or not.
        grid: of cells; the default one if None.
        progress: called with the number of cells done and of all.
        deadline: no cell is begun when it has passed.
        before: outcomes of an earlier run of the same kind; their cells are not run again.
        keep: called with the result so far after each cell that was run.

    Returns:
        One outcome for each cell and cache; of a cell that is run, all caches'. What a cache
        raises is an error in its outcome.

    Raises:
        ConfigError: if labels repeat, the model is wrapped, a length is beyond what the model was
            made for or too short for a task, or a cache cannot be made.
    """
    grid, deadline = grid or Grid(), deadline or Deadline()
    caches = _caches(model, configs, grid.chunk)
    require_cells(model, tokenizer, grid)
    cells, found = grid.cells(), _complete(before, [cache.label for cache in caches])

    def so_far() -> RetrievalResult:
        return RetrievalResult(
            grid,
            tuple(cache.label for cache in caches),
            tuple(cache.config for cache in caches),
            tuple(outcome for cell in cells for outcome in found.get(cell, ())),
            all(cell in found for cell in cells),
            again=tuple(cache.label for cache in caches if cache.again),
        )

    for done, cell in enumerate(cells):
        if cell in found:
            continue
        if deadline.passed:
            break
        example = build(cell.task, tokenizer, cell.tokens, cell.depth or 0, cell.seed, grid.chat)
        found[cell] = [_outcome(tokenizer, each, cell, example) for each in caches]
        if keep:
            keep(so_far())
        if progress:
            progress(done + 1, len(cells))
    return so_far()


def require_cells(model: Any, tokenizer: Any, grid: Grid) -> None:
    """Check that a model was made for the lengths, and that the shortest prompts have room.

    Raises:
        ConfigError: saying what is too long or too short.
    """
    limit = getattr(getattr(model, "args", None), "max_position_embeddings", None)
    if isinstance(limit, int) and 0 < limit < max(grid.lengths):
        raise ConfigError(
            f"the model was made for {limit:,} tokens: {max(grid.lengths):,} would say nothing "
            f"about the cache"
        )
    for cell in grid.cells():
        if cell.tokens == min(grid.lengths):
            build(cell.task, tokenizer, cell.tokens, cell.depth or 0, cell.seed, grid.chat)


def _complete(outcomes: Sequence[Outcome], caches: Sequence[str]) -> dict[Cell, list[Outcome]]:
    """The outcomes of cells that have one of every cache, in the caches' order."""
    found: dict[Cell, dict[str, Outcome]] = {}
    for outcome in outcomes:
        found.setdefault(outcome.cell, {})[outcome.cache] = outcome
    return {
        cell: [by_cache[label] for label in caches]
        for cell, by_cache in found.items()
        if set(caches) <= by_cache.keys()
    }


class _Caches:
    """Makes empty caches of one kind for a model, one after the other."""

    def __init__(self, models: Copies, label: str, config: Kind, chunk: int) -> None:
        self.label = label
        self.again = isinstance(config, Again)
        self.chunk, dtype = chunk, None
        if isinstance(config, Again):
            self.chunk, dtype = config.chunk, config.dtype
        self.model = model = models.of(dtype)
        self.config: TierConfig | None = None
        self._wrapping: Any = None
        if isinstance(config, TierConfig):
            self.config = config
            with wrap(model, config):
                self._wrapping = wrapping_of(model)
            unwrap(model)
        self._make = config if callable(config) else lambda: own_caches(model)

    @contextmanager
    def opened(self) -> Iterator[list[Any]]:
        """An empty cache; its memory and files are given back at the end."""
        try:
            if self._wrapping is None:
                yield self._make()
                return
            with hooked(), self._wrapping.make_cache() as cache:
                yield cache
        finally:
            mx.clear_cache()


def _caches(model: Any, configs: Configs, chunk: int) -> list[_Caches]:
    if wrapping_of(model):
        raise ConfigError("the model is wrapped: unwrap it, so that it can have mlx-lm's cache too")
    first = next((each for each in configs if each[1] is None), (BASELINE, None))
    configs = [first, *(each for each in configs if each is not first)]
    labels = [label for label, _ in configs]
    if len(set(labels)) < len(labels):
        raise ConfigError(f"two caches have the same label: {', '.join(labels)}")
    models = Copies(model)
    return [_Caches(models, label, config, chunk) for label, config in configs]


def _outcome(tokenizer: Any, caches: _Caches, cell: Cell, example: Example) -> Outcome:
    started, model = time.perf_counter(), caches.model
    text, error, paged, score, margin = "", "", 0, None, None
    try:
        with caches.opened() as cache:
            read_tokens(model, cache, example.tokens[: example.question_at], caches.chunk)
            paged = _paged_tokens(cache)
            text, margin = _answer(model, tokenizer, cache, example)
            score = example.judge.score(text)
    except Exception as e:  # of this cache, as for a text's rows; the others go on
        error = f"{type(e).__name__}: {first_words(e, 300)}"
        gc.collect()  # the traceback held the cache
    return Outcome(
        caches.label,
        cell,
        len(example.tokens),
        paged,
        example.answers,
        text,
        score,
        time.perf_counter() - started,
        error,
        margin,
    )


def read_tokens(model: Any, cache: list[Any], tokens: Sequence[int], chunk: int) -> None:
    """Put tokens into a cache, a chunk at a time, as mlx-lm does.

    Args:
        model: of mlx-lm.
        cache: its layers' caches.
        tokens: ids.
        chunk: tokens per call of the model.
    """
    for start in range(0, len(tokens), chunk):
        model(mx.array([tokens[start : start + chunk]]), cache=cache)
        mx.eval([layer.state for layer in cache])
        mx.clear_cache()


def _answer(
    model: Any, tokenizer: Any, cache: list[Any], example: Example
) -> tuple[str, float | None]:
    """The greedy answer, and its margin (`Outcome.margin`).

    The next step is under way while a token is looked at.
    """
    ends = _end_tokens(tokenizer)

    def step(tokens: mx.array) -> tuple[mx.array, mx.array]:
        logits = model(tokens, cache=cache)[:, -1]
        chosen, best = mx.argmax(logits, axis=-1), mx.topk(logits.astype(mx.float32), 2)
        ahead = mx.abs(best[:, 0] - best[:, 1])
        mx.async_eval(chosen, ahead)  # type: ignore[no-untyped-call]
        return chosen, ahead

    ids, texts, gaps = list[int](), [""], list[float]()
    chosen, ahead = step(mx.array([example.tokens[example.question_at :]]))
    for left in reversed(range(example.max_new_tokens)):
        following = step(chosen[:, None]) if left else (chosen, ahead)
        token = int(cast(int, chosen.item()))
        if token in ends:
            break
        ids.append(token)
        gaps.append(float(cast(float, ahead.item())))
        texts.append(str(tokenizer.decode(ids)))
        if example.judge.finished(texts[-1]):
            break
        chosen, ahead = following
    mx.eval(following)  # nothing is in flight when the cache is closed
    return texts[-1], _margin(example, texts, gaps)


def _margin(example: Example, texts: Sequence[str], gaps: Sequence[float]) -> float | None:
    """The least gap among the tokens until the score is what it ends as.

    Args:
        example: whose judge scores.
        texts: the answer without a token, with one, with two, ...
        gaps: of each token.
    """
    scores = [example.judge.score(text) for text in texts]
    if not scores[-1]:
        return None
    needed = next(n for n in range(len(scores)) if len(set(scores[n:])) == 1)
    return min(gaps[:needed], default=None)


def _end_tokens(tokenizer: Any) -> set[int]:
    ends = getattr(tokenizer, "eos_token_ids", None) or [getattr(tokenizer, "eos_token_id", None)]
    return {int(token) for token in ends if token is not None}


def _paged_tokens(cache: list[Any]) -> int:
    if not isinstance(cache, PagedCache):
        return 0
    stats = cache.stats()
    return stats.warm.tokens + stats.cold.tokens
