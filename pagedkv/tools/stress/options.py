"""What a stress run is asked to do, and in which order it does it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from pagedkv.errors import ConfigError

OPERATIONS = {
    "prefill": 0,
    "decode": 16,
    "trim": 6,
    "fork": 4,
    "save": 1,
    "kill": 2,
}
"""What a run can be made of, and how often each is done unless the user says so.

Prefill fills whatever lies between the others.
"""

_COUNT = re.compile(r"\d{1,18}")

MOST_TOKENS = 2**40
MOST_SECONDS = 86_400

LOOKS = 32
"""Prefill chunks of a run that attend, unless the user says in which."""


@dataclass(frozen=True)
class StressOptions:
    """What to run.

    Attributes:
        tokens: length that the context grows to.
        needles: needles to plant; as many decode steps follow at the end.
        seed: of everything random.
        chunk: tokens per prefill chunk, at most.
        queries: query tokens of a prefill chunk that attends, its last ones.
        attend_every: attend in every n-th prefill chunk (and the last), append only in others;
            so that some `LOOKS` chunks attend, if None.
        ops: how often each of `OPERATIONS` is done, at random lengths; prefill need not be named.
        faults: let the disk fail, by a schedule that the seed decides.
        sample_seconds: pace at which memory is looked at.
    """

    tokens: int
    needles: int = 8
    seed: int = 0
    chunk: int = 2048
    queries: int = 16
    attend_every: int | None = None
    ops: Mapping[str, int] = field(default_factory=lambda: dict(OPERATIONS))
    faults: bool = False
    sample_seconds: float = 0.25

    def __post_init__(self) -> None:
        every = 1 if self.attend_every is None else self.attend_every
        least = (self.needles, self.chunk, self.queries, every)
        if min(least) < 1 or self.seed < 0:
            raise ConfigError(
                f"needles, chunk, queries and attend_every are from 1 up and the seed from 0 up, "
                f"got {least} and {self.seed}"
            )
        if self.tokens > MOST_TOKENS:
            raise ConfigError(f"{self.tokens:,} tokens are too many: {MOST_TOKENS:,} at most")
        if self.tokens < self.queries + self.needles:
            raise ConfigError(
                f"{self.tokens} tokens cannot hold {self.needles} needles: give at least "
                f"{self.queries + self.needles}"
            )
        for name, count in self.ops.items():
            if name not in OPERATIONS or count < 0:
                raise ConfigError(f"operations are {', '.join(OPERATIONS)}, got {name}={count}")
            if count > self.tokens:
                raise ConfigError(f"{name} {count:,} times is more often than there are tokens")
        if not 0 < self.sample_seconds <= MOST_SECONDS:
            raise ConfigError(
                f"sample_seconds is more than 0, and {MOST_SECONDS:,} at most, got "
                f"{self.sample_seconds}"
            )

    @property
    def attends_every(self) -> int:
        """Every which prefill chunk attends."""
        chunks = -(-self.tokens // self.chunk)
        return self.attend_every or max(1, round(chunks / LOOKS))

    @property
    def most_tokens(self) -> int:
        """The longest that all sequences together can become, in tokens."""
        return self.tokens + self.needles + 4 * self.chunk


def parse_ops(text: str) -> dict[str, int]:
    """Operations as a user lists them: ``"prefill,decode,trim=20,kill"``.

    Returns:
        How often each is done; those that are not named are left out.

    Raises:
        ConfigError: if there is no such operation, or a count is none.
    """
    ops: dict[str, int] = {}
    for word in text.split(","):
        name, _, count = word.strip().partition("=")
        if name not in OPERATIONS or (count and not _COUNT.fullmatch(count)):
            raise ConfigError(
                f"--ops {word.strip()!r}: list some of {', '.join(OPERATIONS)}, each perhaps with "
                f"how often, as in decode,trim=20,kill=1"
            )
        ops[name] = int(count) if count else OPERATIONS[name]
    return ops


def schedule(options: StressOptions) -> list[tuple[int, str]]:
    """The operations but prefill, each with the length at which it comes, shortest first."""
    rng = np.random.default_rng([options.seed, 4])
    found = []
    for name, count in options.ops.items():
        if name == "prefill" or not count:
            continue
        edges = np.linspace(0, options.tokens, count + 1)
        for low, high in itertools.pairwise(edges):
            found.append((max(1, int(rng.uniform(low, high))), name))
    return sorted(found)
