"""A stress run as its operations see it: a contract, which `synthetic.SyntheticStress` keeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from pagedkv.cache.paged_cache import PagedCache
from pagedkv.config.tier_config import TierConfig
from pagedkv.tools.stress.checks import Check
from pagedkv.tools.stress.faults import Faults
from pagedkv.tools.stress.memory import Memory
from pagedkv.tools.stress.options import StressOptions
from pagedkv.tools.stress.sequence import Sequence
from pagedkv.tools.stress.tokens import SyntheticTokens
from pagedkv.tools.stress.verify import Verifier

T = TypeVar("T")


class Run(Protocol):
    """What an operation may use of a run.

    Attributes:
        options: of the run.
        config: tiers.
        tokens: what layers are given.
        rng: for what is random.
        folder: for files.
        faults: of the disk.
        verifier: knows what attention has to give.
        memory: watches the process.
        main: the sequence that the run is about.
        open: it, and its forks.
        books: whether everything adds up.
        saves: whether saved sequences came back.
        resumes: whether flushed ones did.
        notes: for the report.
    """

    options: StressOptions
    config: TierConfig
    tokens: SyntheticTokens
    rng: np.random.Generator
    folder: Path
    faults: Faults
    verifier: Verifier
    memory: Memory
    main: Sequence
    open: list[Sequence]
    books: Check
    saves: Check
    resumes: Check
    notes: list[str]

    def step(self, seq: Sequence, stop: int, rows: int, kind: str, first: int = 0) -> None:
        """Append tokens up to `stop` to every layer, and check what is answered."""

    def survive(self, seq: Sequence, call: Callable[[], T], length: int | None = None) -> T:
        """Make a call again while the disk fails."""

    def repair(self, seq: Sequence) -> None:
        """Make damaged pages again, from their tokens."""

    def check_books(self) -> None:
        """Offsets, pages, slots and references of every sequence."""

    def reopen(self) -> PagedCache:
        """An empty cache over this run's store."""

    def close(self, cache: PagedCache) -> None:
        """Close the last cache of its pager, and keep count of its traffic."""
