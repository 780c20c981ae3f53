"""What retrieval tasks are run on, and what came of it: grids, cells, outcomes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from pagedkv.config.tier_config import TierConfig
from pagedkv.errors import ConfigError
from pagedkv.tools.bench.result import first_words
from pagedkv.tools.evaluation.haystack import digest
from pagedkv.tools.evaluation.tasks import TASKS

MOST_EXAMPLES = 10**5


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
        if self.examples > MOST_EXAMPLES:
            raise ConfigError(f"examples are {MOST_EXAMPLES:,} at most, got {self.examples:,}")
        for name in ("examples", "chunk"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is a number from 1 up, got {getattr(self, name)}")

    def cells(self) -> list[Cell]:
        """All cells, an example of each first: a run that is cut short has some of every kind."""
        return [
            Cell(task, tokens, depth if TASKS[task].has_depth else None, seed)
            for example in range(self.examples)
            for tokens in self.lengths
            for task in self.tasks
            for i, depth in enumerate(self.depths)
            for seed in [self.seed + example * len(self.depths) + i]
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; `text` names the built-in text."""
        return {**asdict(self), "text": digest()}


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
        margin: how far the closest token that the score hangs on was ahead of the next one, in
            nats; None for a score of 0, where there is none, and in results that do not tell.
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
    margin: float | None = None


@dataclass(frozen=True)
class RetrievalResult:
    """Outcomes of a run.

    Attributes:
        grid: that was asked for.
        caches: labels; the first one is what others are compared with.
        tiers: of each; None for caches that are not paged.
        outcomes: of each cell the baseline's first.
        complete: whether all cells were run.
        notes: of each cache; empty if there is nothing to say.
        again: labels of caches that are the baseline's, with the text read in other calls or the
            model computing in another type.
    """

    grid: Grid
    caches: tuple[str, ...]
    tiers: tuple[TierConfig | None, ...]
    outcomes: tuple[Outcome, ...]
    complete: bool
    notes: tuple[str, ...] = ()
    again: tuple[str, ...] = ()

    @property
    def scored(self) -> list[Outcome]:
        """Outcomes of the other caches that have a score."""
        return [o for o in self.outcomes if o.cache != self.caches[0] and o.score is not None]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "grid": self.grid.to_dict()}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> RetrievalResult:
        """What `to_dict` told, also when it comes back from a JSON file.

        Raises:
            ConfigError: if that is something else.
        """
        try:
            return cls(
                _made(Grid, document["grid"]),
                tuple(document["caches"]),
                tuple(tiers and TierConfig(**tiers) for tiers in document["tiers"]),
                tuple(
                    _made(Outcome, {**outcome, "cell": _made(Cell, outcome["cell"])})
                    for outcome in document["outcomes"]
                ),
                document["complete"],
                tuple(document["notes"]),
                tuple(document.get("again", ())),
            )
        except (KeyError, TypeError) as e:
            raise ConfigError(f"this is no result of retrieval tasks: {first_words(e)}") from e

    def rows(self) -> list[dict[str, Any]]:
        """One level of names for each outcome, for CSV."""
        rows = [asdict(outcome) for outcome in self.outcomes]
        return [{"cache": row.pop("cache"), **row.pop("cell"), **row} for row in rows]


_Made = TypeVar("_Made", Grid, Cell, Outcome)


def _made(kind: type[_Made], values: Mapping[str, Any]) -> _Made:
    """An instance of plain values: lists are tuples, other names are left out."""
    names = {field.name for field in fields(kind)}
    given: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in names
    }
    return kind(**given)
