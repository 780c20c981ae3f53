"""What is remembered of sequences in memory, so that one that begins alike need not be computed.

What is kept is a fork of the sequence, cut to its sealed pages: page numbers, no bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, Self, TypeVar

from pagedkv.allocator import PrefixIndex
from pagedkv.tiers import Pager

HOT_SHARE = 1 / 8
"""Of the warm budget: what the 16-bit sinks of remembered sequences may take beside it."""


class Remembered(Protocol):
    """A cache of a sequence, as far as it is remembered: `cache.paged_cache.PagedCache`."""

    @property
    def context(self) -> Any:
        """What its layers share; see `sequence.SequenceContext`."""

    @property
    def paged_layers(self) -> Sequence[Any]:
        """Its layers; see `layer.PagedLayerCache`."""

    def fork(self) -> Self:
        """A cache of the same tokens, which shares their pages."""

    def close(self) -> None:
        """Give back its pages."""


C = TypeVar("C", bound=Remembered)


class Prefixes(Generic[C]):
    """What the caches of one wrapped model remember of sequences, in memory.

    Remembered sequences use the model's budgets, and are given up, the one used longest ago first,
    when pages are wanted for others.

    Attributes:
        lasting: whether they stay when the last cache is closed, as while a model is wrapped: it
            can make another one.
        weights: tells the model's fingerprint as it is now; empty if nobody knows.
        reused: tokens that were not computed again.
        prompt_rate: prompt tokens computed per second, as last measured; 0 if nothing was.
    """

    def __init__(self, weights: Callable[[], str] = str, *, lasting: bool = False) -> None:
        self.weights, self.lasting = weights, lasting
        self._index: PrefixIndex[int] = PrefixIndex()
        self._kept: dict[int, C] = {}
        self._leaving: dict[int, C] = {}  # to be closed, now or after an interruption
        self._closing = False
        self._names = itertools.count()
        self.reused = 0
        self.prompt_rate = 0.0

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, cache: C, digests: Sequence[bytes], tokens: int) -> None:
        """Remember the first `tokens` tokens of a cache, which have these digests."""
        self._close_leaving()
        best = self._longest(digests)
        if best is not None and best[1] == len(digests):  # that one holds all of this
            self._index.touch(best[0])
            return
        covered = self._index.covered(digests)
        relief = cache.context.pager.relief
        if self.give_up_one not in relief:
            relief.append(self.give_up_one)
        fork, name = cache.fork(), next(self._names)
        self._leaving[name] = fork  # until everything is done
        for layer in fork.paged_layers:
            # Each to that length: after a call that was broken off some are longer than others.
            layer.trim(layer.offset - tokens)
            layer.compact()
        self._index.add(name, digests)
        self._kept[name] = self._leaving.pop(name)
        for other in covered:
            self._drop(other)
        most = HOT_SHARE * cache.context.pager.budget.warm_bytes
        while len(self._kept) > 1 and self.hot_bytes > most:
            self.give_up_one()

    @property
    def hot_bytes(self) -> int:
        """Memory of the 16-bit tokens that are remembered."""
        return sum(c.hot_bytes for cache in self._kept.values() for c in cache.paged_layers)

    def longest(self, digests: Sequence[bytes]) -> tuple[C, int] | None:
        """The remembered cache that shares most with a chain, and the units that it shares."""
        found = self._longest(digests)
        if found is None:
            return None
        name, units = found
        self._index.touch(name)
        return self._kept[name], units

    def _longest(self, digests: Sequence[bytes]) -> tuple[int, int] | None:
        """The same, by name; names that an interruption left behind are forgotten."""
        while (found := self._index.longest(digests)) and found[0] not in self._kept:
            self._index.remove(found[0])
        return found

    def give_up_one(self) -> bool:
        """Give up the sequence used longest ago; False if there is none."""
        if self._leaving and not self._closing:
            self._close_leaving()
            return True
        while (name := self._index.oldest) is not None:
            if name in self._kept:
                self._drop(name)
                return True
            self._index.remove(name)
        return False

    def clear(self) -> None:
        """Give up all of them."""
        self._leaving |= self._kept
        self._kept, self._index = {}, PrefixIndex()
        self._close_leaving()

    def alone(self, pager: Pager) -> bool:
        """Whether nobody but what is remembered uses the tiers."""
        remembered = len(self._kept) + len(self._leaving)
        return remembered > 0 and len(pager.users) <= remembered * pager.layers

    def _drop(self, name: int) -> None:
        self._index.remove(name)
        self._leaving[name] = self._kept.pop(name)
        self._close_leaving()

    def _close_leaving(self) -> None:
        """Close what is given up; who was interrupted does the rest the next time."""
        if self._closing:
            return  # by a cache that is being closed here
        self._closing = True
        try:
            while self._leaving:
                name = next(iter(self._leaving))
                self._leaving[name].close()
                del self._leaving[name]
        finally:
            self._closing = False
