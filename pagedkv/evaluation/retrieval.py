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
from dataclasses import asdict, dataclass
from typing import Any, cast

import mlx.core as mx

from pagedkv import hook
from pagedkv.cache import PagedCache
from pagedkv.config import TierConfig
from pagedkv.errors import ConfigError, PagedKVError
from pagedkv.evaluation.haystack import digest
from pagedkv.evaluation.prompts import Example, build
from pagedkv.evaluation.tasks import TASKS
from pagedkv.models import unwrap, wrap, wrapping_of

BASELINE = "fp16"
CacheMaker = Callable[[], list[Any]]
"""Makes an empty cache of another kind, such as mlx-lm's quantized one: one per layer."""
Configs = Sequence[tuple[str, TierConfig | CacheMaker | None]]


@dataclass(frozen=True)
class Grid:
    """Which cells are run.

    Attributes:
        tasks: keys of `tasks.TASKS`.
        lengths: tokens of prompt and answer.
        depths: percent of the text before what is asked for.
        examples: cells for each task, length and depth; tasks without a depth get as many in all.
        seed: of the first example.
        chat: use the tokenizer's chat template, if it has one.
        chunk: tokens per call while the text is read.
    """

    tasks: tuple[str, ...] = tuple(TASKS)
    lengths: tuple[int, ...] = (1024, 2048, 4096)
    depths: tuple[int, ...] = (0, 25, 50, 75, 100)
    examples: int = 1
    seed: int = 0
    chat: bool = False
    chunk: int = 2048

    def __post_init__(self) -> None:
        if unknown := [name for name in self.tasks if name not in TASKS]:
            raise ConfigError(f"unknown tasks {unknown}: there are {', '.join(TASKS)}")
        if bad := [depth for depth in self.depths if not 0 <= depth <= 100]:
            raise ConfigError(f"a depth is a percentage from 0 to 100, got {bad}")
        for name in ("tasks", "lengths", "depths"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"{name} is a list of different values, got {values}")
        for name in ("examples", "chunk"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is a number from 1 up, got {getattr(self, name)}")

    def cells(self) -> list[Cell]:
        """All cells: short ones first, so that a run that is cut short has some of each task."""
        return [
            Cell(task, tokens, depth if TASKS[task].has_depth else None, seed)
            for tokens in self.lengths
            for example in range(self.examples)
            for task in self.tasks
            for i, depth in enumerate(self.depths)
            for seed in [self.seed + example * len(self.depths) + i]
        ]


@dataclass(frozen=True)
class Cell:
    """One prompt.

    Attributes:
        task: a key of `tasks.TASKS`.
        tokens: of prompt and answer.
        depth: in percent; None where it means nothing.
        seed: of the prompt.
    """

    task: str
    tokens: int
    depth: int | None
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What a model made of a cell with one cache.

    Attributes:
        cache: label of the cache.
        cell: that was run.
        prompt_tokens: of the prompt.
        paged_tokens: tokens in pages when the question came; 0 means that all were 16 bit.
        answers: what was right.
        text: what the model wrote.
        score: from 0 to 1; None if there was an error.
        seconds: that it took.
        error: why there is no score, else empty.
    """

    cache: str
    cell: Cell
    prompt_tokens: int
    paged_tokens: int
    answers: tuple[str, ...]
    text: str
    score: float | None
    seconds: float
    error: str = ""


@dataclass(frozen=True)
class RetrievalResult:
    """Outcomes of a run.

    Attributes:
        grid: that was asked for.
        caches: labels; the first one is what others are compared with.
        tiers: of each; None for caches that are not paged.
        outcomes: of each cell the baseline's first.
        complete: whether all cells were run.
    """

    grid: Grid
    caches: tuple[str, ...]
    tiers: tuple[TierConfig | None, ...]
    outcomes: tuple[Outcome, ...]
    complete: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; `text` names the built-in text."""
        return {**asdict(self), "text": digest()}

    def rows(self) -> list[dict[str, Any]]:
        """One level of names for each outcome, for CSV."""
        rows = [asdict(outcome) for outcome in self.outcomes]
        return [{"cache": row.pop("cache"), **row.pop("cell"), **row} for row in rows]


def run_retrieval(
    model: Any,
    tokenizer: Any,
    configs: Configs,
    grid: Grid | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
    max_seconds: float | None = None,
) -> RetrievalResult:
    """Run every cell on mlx-lm's cache and on each of the others.

    Args:
        model: of mlx-lm, not wrapped; it is not wrapped afterwards either.
        tokenizer: of the model, as `mlx_lm.load` returns it.
        configs: labels and tiers; None is mlx-lm's own cache, a function makes another kind.
            mlx-lm's own is the baseline and run first, asked for or not.
        grid: of cells; the default one if None.
        progress: called with the number of cells done and of all.
        max_seconds: no cell is begun after so long.

    Returns:
        One outcome for each cell and cache; of a cell that is run, all caches'.

    Raises:
        ConfigError: if labels repeat, the model is wrapped, a length is beyond what the model was
            made for or too short for a task, or a cache cannot be made.
    """
    grid = grid or Grid()
    caches = _caches(model, configs)
    _require_lengths(model, grid)
    cells, outcomes, started = grid.cells(), list[Outcome](), time.monotonic()
    for done, cell in enumerate(cells):
        if max_seconds is not None and time.monotonic() - started > max_seconds:
            break
        example = build(cell.task, tokenizer, cell.tokens, cell.depth or 0, cell.seed, grid.chat)
        outcomes += [_outcome(model, tokenizer, cache, cell, example, grid) for cache in caches]
        if progress:
            progress(done + 1, len(cells))
    complete = len(outcomes) == len(cells) * len(caches)
    return RetrievalResult(
        grid,
        tuple(cache.label for cache in caches),
        tuple(cache.config for cache in caches),
        tuple(outcomes),
        complete,
    )


class _Caches:
    """Makes empty caches of one kind for a model, one after the other."""

    def __init__(self, model: Any, label: str, config: TierConfig | CacheMaker | None) -> None:
        self.label = label
        self.config: TierConfig | None = None
        self._wrapping: Any = None
        if isinstance(config, TierConfig):
            self.config = config
            with wrap(model, config):
                self._wrapping = wrapping_of(model)
            unwrap(model)
        self._make = config if callable(config) else lambda: _own_cache(model)

    @contextmanager
    def opened(self) -> Iterator[list[Any]]:
        """An empty cache; its memory and files are given back at the end."""
        try:
            if self._wrapping is None:
                yield self._make()
                return
            hook.install()
            try:
                with self._wrapping.make_cache() as cache:
                    yield cache
            finally:
                hook.uninstall()
        finally:
            mx.clear_cache()


def _own_cache(model: Any) -> list[Any]:
    from mlx_lm.models.cache import make_prompt_cache

    return list(make_prompt_cache(model))


def _caches(model: Any, configs: Configs) -> list[_Caches]:
    if wrapping_of(model):
        raise ConfigError("the model is wrapped: unwrap it, so that it can have mlx-lm's cache too")
    first = next((each for each in configs if each[1] is None), (BASELINE, None))
    configs = [first, *(each for each in configs if each is not first)]
    labels = [label for label, _ in configs]
    if len(set(labels)) < len(labels):
        raise ConfigError(f"two caches have the same label: {', '.join(labels)}")
    return [_Caches(model, label, config) for label, config in configs]


def _require_lengths(model: Any, grid: Grid) -> None:
    limit = getattr(getattr(model, "args", None), "max_position_embeddings", None)
    if isinstance(limit, int) and 0 < limit < max(grid.lengths):
        raise ConfigError(
            f"the model was made for {limit:,} tokens: {max(grid.lengths):,} would say nothing "
            f"about the cache"
        )


def _outcome(
    model: Any, tokenizer: Any, caches: _Caches, cell: Cell, example: Example, grid: Grid
) -> Outcome:
    started = time.perf_counter()
    text, error, paged, score = "", "", 0, None
    try:
        with caches.opened() as cache:
            _read(model, cache, example.tokens[: example.question_at], grid.chunk)
            paged = _paged_tokens(cache)
            text = _answer(model, tokenizer, cache, example)
            score = example.judge.score(text)
    except PagedKVError as e:
        error = f"{type(e).__name__}: {e}"
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
    )


def _read(model: Any, cache: list[Any], tokens: Sequence[int], chunk: int) -> None:
    """Put tokens into a cache, a chunk at a time, as mlx-lm does."""
    for start in range(0, len(tokens), chunk):
        model(mx.array([tokens[start : start + chunk]]), cache=cache)
        mx.eval([layer.state for layer in cache])
        mx.clear_cache()


def _answer(model: Any, tokenizer: Any, cache: list[Any], example: Example) -> str:
    """The greedy answer; the next step is under way while a token is looked at."""
    ends = _end_tokens(tokenizer)

    def step(tokens: mx.array) -> mx.array:
        chosen = mx.argmax(model(tokens, cache=cache)[:, -1], axis=-1)
        mx.async_eval(chosen)  # type: ignore[no-untyped-call]
        return chosen

    ids, text = list[int](), ""
    chosen = step(mx.array([example.tokens[example.question_at :]]))
    for left in reversed(range(example.max_new_tokens)):
        following = step(chosen[:, None]) if left else chosen
        token = int(cast(int, chosen.item()))
        if token in ends:
            break
        ids.append(token)
        text = str(tokenizer.decode(ids))
        if example.judge.finished(text):
            break
        chosen = following
    mx.eval(following)  # nothing is in flight when the cache is closed
    return text


def _end_tokens(tokenizer: Any) -> set[int]:
    ends = getattr(tokenizer, "eos_token_ids", None) or [getattr(tokenizer, "eos_token_id", None)]
    return {int(token) for token in ends if token is not None}


def _paged_tokens(cache: list[Any]) -> int:
    if not isinstance(cache, PagedCache):
        return 0
    stats = cache.stats()
    return stats.warm.tokens + stats.cold.tokens
